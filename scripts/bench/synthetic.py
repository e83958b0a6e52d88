"""A checkpoint with DeepSeek-R1's true geometry and random FP8 weights: any number of layers, to measure with.

    python scripts/bench/synthetic.py OUT --dense 1 --moe 2
    python scripts/bench/synthetic.py OUT --dense 1 --moe 1 --config scripts/bench/glm-5.2.json

Names, shapes, dtypes and shard sizes (about 4.3 GB) are R1's. Weights are drawn from one random block that is repeated
at a different offset for every tensor, so writing is cheap; scales give each matrix a spread of about
1 / sqrt(n_in), so activations stay finite. One MoE layer is 11.5 GB; with fewer --experts, each of them has its true
dimensions and about the true number of tokens for 1/8 of the text (one expert a token). With --config the geometry is
that of any config.json that is supported, its matrices stored as R1's are (one MoE layer of GLM-5.2: 9.8 GB).
"""

import json
from math import prod
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

from quantkit import bundle
from quantkit.formats.geometry import Geometry
from quantkit.models import family

SHARD_BYTES = 4_300_000_000
POOL = 1 << 26


class Pool:
    """Random FP8 bytes without NaN, handed out at shifting offsets."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(POOL, generator=generator) * 100
        self.values = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).repeat(2)
        self.offset = 0

    def take(self, n: int) -> torch.Tensor:
        self.offset = (self.offset + 104_729) % POOL
        turned = self.values[self.offset : self.offset + POOL]
        return (turned if n <= POOL else turned.repeat(-(-n // POOL)))[:n].clone().view(torch.float8_e4m3fn)


def tensor(name: str, shape: tuple[int, ...], dtype: str, pool: Pool, n_in: dict[str, int]) -> torch.Tensor:
    if dtype == "F8_E4M3":
        n_in[name] = shape[-1]
        return pool.take(prod(shape)).view(shape)
    if name.endswith("weight_scale_inv"):
        return torch.full(shape, 1 / 100 / n_in[name.removesuffix("_scale_inv")] ** 0.5)
    if name.endswith("e_score_correction_bias"):
        return torch.randn(shape) * 0.01
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape) / shape[-1] ** 0.5).to(torch.bfloat16)


def layout(dense: int, moe: int, experts: int) -> tuple[dict, dict[str, tuple[tuple[int, ...], str]]]:
    """config.json and {name: (shape, dtype)} of a model of `dense` + `moe` layers, renumbered from R1's, with as many
    experts in each."""
    geometry = Geometry.load(bundle.models_dir() / "deepseek-r1")
    wanted = {**{i: i for i in range(dense)}, **{3 + i: dense + i for i in range(moe)}}
    found = {}
    for name, entry in geometry.tensors.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in wanted:
                continue
            parts[2] = str(wanted[int(parts[2])])
            if "experts" in parts and int(parts[parts.index("experts") + 1]) >= experts:
                continue
        shape = tuple(entry.shape)
        found[".".join(parts)] = ((experts, *shape[1:]) if "gate" in parts else shape, entry.dtype)
    config = geometry.config | {
        "num_hidden_layers": dense + moe,
        "first_k_dense_replace": dense,
        "num_nextn_predict_layers": 0,
    }
    if experts < config["n_routed_experts"]:
        used = max(1, config["num_experts_per_tok"] * experts // config["n_routed_experts"])
        config |= {"n_routed_experts": experts, "num_experts_per_tok": used, "n_group": 1, "topk_group": 1}
    # A scale follows its weight: it is made from that weight's row length.
    return config, dict(sorted(found.items(), key=lambda item: item[0].replace("weight_scale_inv", "weight~")))


def layout_of(config: dict, dense: int, moe: int) -> tuple[dict, dict[str, tuple[tuple[int, ...], str]]]:
    """As `layout`, of any config.json: FP8 in blocks of 128 for all matrices but embeddings, routers and the weights of
    an indexer's heads."""
    shorter = {"num_hidden_layers": dense + moe, "first_k_dense_replace": dense, "num_nextn_predict_layers": 0}
    config = config | {key: value for key, value in shorter.items() if key in config}
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, shape in family.source_shapes(family.from_hf(config)).items():
        plain = len(shape) == 1 or name.endswith(("embed_tokens.weight", "lm_head.weight", "gate.weight"))
        plain |= name.endswith("weights_proj.weight")
        found[name] = shape, "BF16" if plain else "F8_E4M3"
        if not plain:
            found[name + "_scale_inv"] = tuple(-(-n // 128) for n in shape), "F32"
    return config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, found


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dense", default=1, show_default=True, type=click.IntRange(0, 3))
@click.option("--moe", default=2, show_default=True, type=click.IntRange(0, 58))
@click.option("--experts", default=256, show_default=True, type=click.IntRange(2, 256), help="Of each MoE layer.")
@click.option("--config", "given", default=None, type=click.Path(path_type=Path), help="Of another model than R1.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, dense: int, moe: int, experts: int, given: Path | None, seed: int) -> None:
    """Write a random R1-shaped checkpoint folder, or one of the shape of another config.json, with all its experts."""
    out.mkdir(parents=True, exist_ok=True)
    config, tensors = layout_of(json.loads(given.read_text()), dense, moe) if given else layout(dense, moe, experts)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    torch.manual_seed(seed)
    pool, n_in = Pool(seed), {}
    shard, size, number, index = {}, 0, 1, {}

    def flush() -> None:
        nonlocal shard, size, number
        name = f"model-{number:05d}.safetensors"
        save_file(shard, out / name)
        index.update(dict.fromkeys(shard, name))
        click.echo(f"{name}: {size / 1e9:.2f} GB", err=True)
        shard, size, number = {}, 0, number + 1

    for name, (shape, dtype) in tensors.items():
        made = tensor(name, shape, dtype, pool, n_in)
        if size + made.nbytes > SHARD_BYTES:
            flush()
        shard[name] = made
        size += made.nbytes
    flush()
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


if __name__ == "__main__":
    main()
