"""What `kt_legacy.py` compares KTransformers with: tokens and logits of a file by quantkit, and a file of all types.

    python scripts/bench/kt_reference.py model FILE.gguf REF.pt --text TEXT   # FILE: what `export-kt` was given
    python scripts/bench/kt_reference.py types FOLDER                         # gguf/types.gguf and types.pt in it
    python scripts/bench/kt_reference.py kernel FOLDER [--variant avx2]       # the same, by an installed kt-kernel

`model`: greedy tokens by the engine of `quantkit run`; float32 logits of them and of TEXT from the decoded weights.
`types`: experts of random weights, a layer for each type, encoded by ggml and decoded by the gguf package.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import click
import gguf
import numpy as np
import torch

from quantkit.evaluation.divergence import HeadLogits
from quantkit.evaluation.oracles import kt
from quantkit.evaluation.oracles.child import OracleError
from quantkit.ggml.quants import quantize
from quantkit.models.config import ModelConfig
from quantkit.models.tokenizer import tokenize
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.generate import Sampling, generate
from quantkit.runtime.sources.gguf import GGUFSource, open_source
from quantkit.runtime.stream import final_hidden

PROMPTS = ("It was a dark and stormy", "def area(r):\n", "Let f be continuous on [a, b]. Then", "学而时习之")
TYPES = (
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S "
    "IQ4_NL IQ4_XS"
).split()
PLAIN = {"F32": np.float32, "F16": np.float16}
N_EXPERT, N_USED, D, N_FF = 8, 4, 512, 256
ROWS = 32
PATH = click.Path(path_type=Path)


@click.group()
def main() -> None:
    """What KTransformers is compared with."""


@main.command()
@click.argument("file", type=PATH)
@click.argument("out", type=PATH)
@click.option("--text", type=PATH, required=True, help="Scored token by token.")
@click.option("--scored", default=160, show_default=True, help="Tokens of it.")
@click.option("--tokens", default=32, show_default=True, help="Greedy tokens after each prompt.")
@click.option("--device", default="cpu", show_default=True)
@torch.inference_mode()
def model(file: Path, out: Path, text: Path, scored: int, tokens: int, device: str) -> None:
    """Greedy tokens after four prompts, logits over a text."""
    source = open_source(file, device)
    config, tokenizer = source.config, source.tokenizer()
    prompts = [[config.bos, *tokenize(tokenizer, prompt)] for prompt in PROMPTS]
    read = [config.bos, *tokenize(tokenizer, text.read_text(encoding="utf-8")[: 8 * scored])][:scored]
    engine = open_engine(source.weights, 1, max(len(read), *map(len, prompts)) + tokens)
    found = [list(generate(engine, prompt, tokens, Sampling(temperature=0))) for prompt in prompts]
    exact = [_logits(source, prompt + new)[len(prompt) - 1 : -1] for prompt, new in zip(prompts, found, strict=True)]
    held = {"texts": list(PROMPTS), "prompts": prompts, "tokens": found, "exact": exact, "scored": read}
    held["logits"] = _logits(source, read)
    torch.save(held, out)
    p = held["logits"].double().log_softmax(-1)
    q = (
        torch.stack([engine.prefill(0, [token], at).cpu().clone() for at, token in enumerate(read)])
        .double()
        .log_softmax(-1)
    )
    kld, top = (p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).double().mean()
    click.echo(
        f"{out}: {len(prompts)} × {tokens} tokens; the engine over {len(read)} of them: KLD mean {kld.mean():.5f}, "
        f"median {kld.median():.5f}, worst {kld.max():.3f}, same top {top:.1%}"
    )


def _logits(source: GGUFSource, tokens: list[int]) -> torch.Tensor:
    """float32 [n, n_vocab] from the decoded weights."""
    head = HeadLogits(source, final_hidden(source, torch.tensor([tokens], device=source.device))[0])
    return head.slab(0, source.config.n_vocab)(slice(None)).cpu()


@main.command()
@click.argument("folder", type=PATH)
def types(folder: Path) -> None:
    """Layer n holds experts of type n."""
    (folder / "gguf").mkdir(parents=True)
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(folder / "gguf" / "types.gguf", "deepseek2")
    decoded = {}
    for layer, qtype in enumerate(TYPES):
        for part, shape in (("gate", (N_FF, D)), ("up", (N_FF, D)), ("down", (D, N_FF))):
            name, n_in = f"blk.{layer}.ffn_{part}_exps.weight", shape[1]
            rows = generator.standard_normal((N_EXPERT * shape[0], n_in), np.float32) / np.float32(n_in**0.5)
            if qtype in PLAIN:
                data = rows.astype(PLAIN[qtype])
                writer.add_tensor(name, data.reshape(N_EXPERT, *shape))
            else:
                data = quantize(qtype, rows, np.ones(n_in, np.float32))
                kind = gguf.GGMLQuantizationType[qtype]
                writer.add_tensor(name, data.reshape(N_EXPERT, shape[0], -1), raw_dtype=kind)
            decoded[name] = torch.from_numpy(
                gguf.dequantize(data, gguf.GGMLQuantizationType[qtype]).reshape(N_EXPERT, *shape).astype(np.float32)
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    x = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    chosen = torch.stack(
        [torch.randperm(N_EXPERT, generator=torch.Generator().manual_seed(i))[:N_USED] for i in range(ROWS)]
    )
    weight = torch.rand(ROWS, N_USED, generator=torch.Generator().manual_seed(1))
    torch.save({"types": TYPES, "decoded": decoded, "x": x, "expert": chosen, "weight": weight}, folder / "types.pt")


@main.command()
@click.argument("folder", type=PATH)
@click.option("--variant", "variants", multiple=True, default=("avx512_bf16", "avx2"), help="Of the wheel's.")
def kernel(folder: Path, variants: tuple[str, ...]) -> None:
    """Relative error of kt-kernel's experts for each type."""
    held = torch.load(folder / "types.pt")
    config = cast(ModelConfig, SimpleNamespace(n_expert=N_EXPERT, n_used=N_USED, d=D, n_ff_exp=N_FF))
    x, expert, weight = held["x"].float(), held["expert"], held["weight"]
    click.echo(f"| type | {' | '.join(variants)} |\n|---|{'---|' * len(variants)}")
    for layer, qtype in enumerate(held["types"]):
        gate, up, down = (held["decoded"][f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        want = torch.zeros(ROWS, D)
        for row in range(ROWS):
            for e, w in zip(expert[row], weight[row], strict=True):
                want[row] += w * (down[e] @ (torch.nn.functional.silu(gate[e] @ x[row]) * (up[e] @ x[row])))
        cells = []
        for variant in variants:
            try:
                found = kt.experts(folder / "gguf", layer, config, x, expert, weight, variant)
                error = float((found - want).norm() / want.norm())
                cells.append("zeros" if not found.any() else f"{error:.2%}")
            except OracleError as failure:
                cells.append(str(failure).splitlines()[0][:60])
        click.echo(f"| {qtype} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
