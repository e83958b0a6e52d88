"""A checkpoint with DeepSeek-R1's true geometry and random FP8 weights: any number of layers, to measure with.

    python scripts/bench/synthetic.py OUT --dense 1 --moe 2
    python scripts/bench/synthetic.py OUT --dense 1 --moe 1 --config scripts/bench/glm-5.2.json
    python scripts/bench/synthetic.py OUT --dense 1 --moe 1 --model kimi-k2
    python scripts/bench/synthetic.py OUT --moe 2 --model deepseek-v4-flash

Kimi-K2's routed experts are INT4 as compressed-tensors packs them, all else BF16, as in K2-Thinking: 9.6 GB a layer.
DeepSeek-V4's layers begin with its third, which compresses by 4 and routes by the token; the next compresses by 128 and
routes by score. Experts are FP4, 3.5 GB a layer of V4-Flash.

Names, shapes, dtypes and shard sizes (about 4.3 GB) are R1's. Weights are drawn from one random block that is repeated
at a different offset for every tensor, and all cores write, so writing is cheap; scales give each matrix a spread of
about 1 / sqrt(n_in), so activations stay finite. One MoE layer is 11.5 GB; with fewer --experts, each of them has its
true dimensions and about the true number of tokens for 1/8 of the text (one expert a token). --vocabulary shortens the
embedding and the output matrix, which no layer's figures depend on. With --config the geometry is that of any
config.json that is supported, its matrices stored as R1's are (one MoE layer of GLM-5.2: 9.8 GB).
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import log2, prod
from pathlib import Path

import click
import torch

from quantkit import bundle, machine
from quantkit.formats.geometry import Geometry
from quantkit.models import family

SHARD_BYTES = 4_300_000_000
DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
POOL = 1 << 26
R1_EXPERTS, KIMI_EXPERTS = 256, 384
V4 = ("deepseek-v4-flash", "deepseek-v4-pro")
KIMI_K2 = {
    "model_type": "kimi_k2",
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "vocab_size": 163840,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.827,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 64.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 262144,
    "num_nextn_predict_layers": 0,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True, "type": "int"},
            }
        },
    },
}


Layout = dict[str, tuple[tuple[int, ...], str]]
"""Tensors as stored: name -> (shape, dtype)."""


class Pool:
    """Random bytes that are handed out at an offset that is another one for every tensor: FP8 numbers without NaN, and
    BF16 ones of a spread of 1 / sqrt(n_in)."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        values = (torch.randn(POOL, generator=self.generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        self.coded = values.view(torch.uint8).repeat(2)
        self.normal = torch.randn(POOL // 4, generator=self.generator)
        self.plain: dict[int, torch.Tensor] = {}

    def of(self, dtype: str, n_in: int) -> torch.Tensor:
        """uint8 [at least 2 x what is repeated]"""
        if dtype != "BF16":
            return self.coded
        if n_in not in self.plain:
            self.plain[n_in] = (self.normal / n_in**0.5).bfloat16().view(torch.uint8).repeat(2)
        return self.plain[n_in]

    def pieces(self, dtype: str, n_in: int, turn: int, n_bytes: int) -> Iterator[memoryview]:
        """So many bytes, for the tensor of this number."""
        values = self.of(dtype, n_in)
        period = len(values) // 2
        start = turn * 8 * 104_729 % period
        whole = memoryview(values.numpy())[start : start + period]
        for at in range(0, n_bytes, period):
            yield whole[: min(period, n_bytes - at)]


def row_length(scale: str, tensors: Layout) -> int:
    """Weights in a row of the matrix that this is the scale of."""
    stem = scale.removesuffix("_scale_inv").removesuffix("_scale")
    stem = stem.removesuffix("scale") + "weight" if stem.endswith(".scale") else stem
    packed = {"I32": 8, "I8": 2}
    shape, dtype = tensors.get(stem) or tensors[stem + "_packed"]
    return shape[-1] * packed.get(dtype, 1)


def small(name: str, shape: tuple[int, ...], dtype: str, tensors: Layout, draw: torch.Generator) -> torch.Tensor:
    """Whatever is not a matrix of random numbers: scales, norms, ids, biases, and matrices in float32."""
    if dtype == "F8_E8M0":  # a power of two; E2M1 numbers of random bits have a spread of about 2.9
        spread = 2.9 if ".experts." in name else 100
        return torch.full(shape, 2.0 ** round(-log2(spread * row_length(name, tensors) ** 0.5)))
    if dtype == "I64":
        experts = next(shape[0] for name, (shape, _) in tensors.items() if name.endswith("gate.weight"))
        return torch.randint(experts, shape, generator=draw)
    if name.endswith("weight_scale"):  # codes -8 to 7 have a spread of about 4.6
        return torch.full(shape, 1 / 4.6 / row_length(name, tensors) ** 0.5)
    if name.endswith("weight_scale_inv"):
        return torch.full(shape, 1 / 100 / row_length(name, tensors) ** 0.5)
    if name.endswith("e_score_correction_bias"):
        return torch.randn(shape, generator=draw) * 0.01
    if dtype == "F32" and ".weight" not in name:
        return torch.randn(shape, generator=draw) / shape[-1] ** 0.5
    return torch.ones(shape)


def layout(dense: int, moe: int, experts: int) -> tuple[dict, Layout]:
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
    return config, dict(sorted(found.items()))


def layout_of(config: dict, dense: int, moe: int, experts: int | None = None) -> tuple[dict, Layout]:
    """As `layout`, of any config.json: FP8 in blocks of 128 for all matrices but embeddings, routers and the weights of
    an indexer's heads."""
    shorter = {"num_hidden_layers": dense + moe, "first_k_dense_replace": dense, "num_nextn_predict_layers": 0}
    if experts:
        used = max(1, config["num_experts_per_tok"] * experts // config["n_routed_experts"])
        shorter |= {"n_routed_experts": experts, "num_experts_per_tok": used}
    config = config | {key: value for key, value in shorter.items() if key in config}
    found: Layout = {}
    for name, shape in family.source_shapes(family.from_hf(config)).items():
        plain = len(shape) == 1 or name.endswith(("embed_tokens.weight", "lm_head.weight", "gate.weight"))
        plain |= name.endswith("weights_proj.weight")
        found[name] = shape, "BF16" if plain else "F8_E4M3"
        if not plain:
            found[name + "_scale_inv"] = tuple(-(-n // 128) for n in shape), "F32"
    return config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, found


def kimi_layout(dense: int, moe: int, experts: int) -> tuple[dict, Layout]:
    """`layout` of Kimi-K2-Thinking: config.json and tensors, `weight_shape` left out."""
    config = json.loads((bundle.models_dir() / "deepseek-r1" / "config.json").read_bytes()) | KIMI_K2
    config |= {"num_hidden_layers": dense + moe, "first_k_dense_replace": dense, "n_routed_experts": experts}
    config["num_experts_per_tok"] = max(1, 8 * experts // KIMI_EXPERTS)
    found: Layout = {}
    for name, shape in family.source_shapes(family.from_hf(config)).items():
        if ".mlp.experts." in name:
            found[f"{name}_packed"] = (shape[0], shape[1] // 8), "I32"
            found[f"{name}_scale"] = (shape[0], shape[1] // 32), "BF16"
        else:
            found[name] = shape, "BF16"
    return config, found


def v4_layout(name: str, moe: int, experts: int) -> tuple[dict, Layout]:
    """`layout` of so many layers of a bundled DeepSeek-V4, from the last that routes by the token on."""
    geometry = Geometry.load(bundle.models_dir() / name)
    first = geometry.config["num_hash_layers"] - 1
    found = {}
    for tensor_name, entry in geometry.tensors.items():
        parts = tensor_name.split(".")
        if parts[0] == "mtp" or (parts[0] == "layers" and not first <= int(parts[1]) < first + moe):
            continue
        if "experts" in parts and int(parts[parts.index("experts") + 1]) >= experts:
            continue
        if parts[0] == "layers":
            parts[1] = str(int(parts[1]) - first)
        stored = (*entry.shape[:-1], entry.shape[-1] // 2) if entry.dtype == "FP4" else tuple(entry.shape)
        if parts[-2:] in (["gate", "weight"], ["gate", "bias"]):
            stored = (experts, *stored[1:])
        elif parts[-1] == "tid2eid":
            stored = stored[0], max(1, stored[1] * experts // geometry.config["n_routed_experts"])
        found[".".join(parts)] = stored, "I8" if entry.dtype == "FP4" else entry.dtype
    ratios = geometry.config["compress_ratios"][first : first + moe]
    config = {"num_hidden_layers": moe, "compress_ratios": ratios, "num_hash_layers": 1, "num_nextn_predict_layers": 0}
    used = max(1, geometry.config["num_experts_per_tok"] * experts // geometry.config["n_routed_experts"])
    return geometry.config | config | {"n_routed_experts": experts, "num_experts_per_tok": used}, found


def with_vocabulary(config: dict, tensors: Layout, n: int) -> tuple[dict, Layout]:
    """The same with so many words."""
    tables = ("embed_tokens.weight", "lm_head.weight", "embed.weight", "head.weight", "tid2eid")
    found = {
        name: ((n, *shape[1:]) if name.endswith(tables) else shape, dtype) for name, (shape, dtype) in tensors.items()
    }
    return config | {"vocab_size": n, "bos_token_id": 0, "eos_token_id": 1}, found


def write(out: Path, tensors: Layout, seed: int) -> None:
    """The shards and their index, by all cores."""
    pool, index, shards, filled = Pool(seed), {}, [[]], 0
    sizes = {name: prod(shape) * DTYPES[dtype].itemsize for name, (shape, dtype) in tensors.items()}
    for name, n_bytes in sizes.items():
        if filled + n_bytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += n_bytes

    def fill(file: int, turn: int, name: str, at: int) -> None:
        shape, dtype = tensors[name]
        if len(shape) == 1 or dtype in ("F32", "F8_E8M0", "I64") or name.endswith("_scale"):
            draw = torch.Generator().manual_seed(seed + turn)
            made = small(name, shape, dtype, tensors, draw).to(DTYPES[dtype]).contiguous()
            assert made.nbytes == sizes[name], name
            pieces = iter([memoryview(made.flatten().view(torch.uint8).numpy())])
        else:
            pieces = pool.pieces(dtype, shape[-1], turn, sizes[name])
        for piece in pieces:
            while piece:
                done = os.pwrite(file, piece, at)
                piece, at = piece[done:], at + done

    turns = {name: turn for turn, name in enumerate(tensors)}
    with ThreadPoolExecutor(machine.cores()) as threads:
        for number, names in enumerate(shards, start=1):
            header, at = {}, 0
            for name in names:
                shape, dtype = tensors[name]
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + sizes[name]]}
                at += sizes[name]
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            path = out / f"model-{number:05d}.safetensors"
            with path.open("wb", buffering=0) as file:
                file.write(len(text).to_bytes(8, "little") + text)
                jobs = [
                    threads.submit(fill, file.fileno(), turns[name], name, 8 + len(text) + entry["data_offsets"][0])
                    for name, entry in header.items()
                ]
                for job in jobs:
                    job.result()
            index |= dict.fromkeys(names, path.name)
            click.echo(f"{path.name}: {at / 1e9:.2f} GB", err=True)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dense", default=1, show_default=True, type=click.IntRange(0, 3))
@click.option("--moe", default=2, show_default=True, type=click.IntRange(0, 60))
@click.option("--experts", default=None, type=click.IntRange(2, 384), help="Of each MoE layer. Default: all.")
@click.option("--model", default="r1", type=click.Choice(["r1", "kimi-k2", *V4]), show_default=True)
@click.option("--config", "given", default=None, type=click.Path(path_type=Path), help="The shape of another model.")
@click.option("--vocabulary", default=None, type=click.IntRange(16), help="Words. Default: the model's.")
@click.option("--seed", default=0, show_default=True)
def main(
    out: Path,
    dense: int,
    moe: int,
    experts: int | None,
    model: str,
    given: Path | None,
    vocabulary: int | None,
    seed: int,
) -> None:
    """Write a random checkpoint folder of R1's, Kimi-K2's or DeepSeek-V4's shapes, or of another config.json's."""
    out.mkdir(parents=True, exist_ok=True)
    if given:
        config, tensors = layout_of(json.loads(given.read_text()), dense, moe, experts)
    elif model in V4:
        most = Geometry.load(bundle.models_dir() / model).config["n_routed_experts"]
        config, tensors = v4_layout(model, moe, min(experts or most, most))
    else:
        make, most = (kimi_layout, KIMI_EXPERTS) if model == "kimi-k2" else (layout, R1_EXPERTS)
        config, tensors = make(dense, moe, experts or most)
    if vocabulary:
        config, tensors = with_vocabulary(config, tensors, vocabulary)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    write(out, tensors, seed)


if __name__ == "__main__":
    main()
