"""A GGUF file with DeepSeek-R1's true geometry and a recipe's types, but few layers and random weights: to time with.

    python scripts/bench/synthetic_gguf.py OUT.gguf --dense 1 --moe 1

Each type's blocks are encoded once, for a spread of 1 / sqrt(n_in) so that activations stay finite, and repeated at a
different offset for every matrix. The vocabulary is tiny-r1's with R1's 129,280 entries. One dense and one MoE layer
of the 1.58bit recipe are 4.2 GB, two MoE layers 6.6 GB.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
from synthetic import layout

from quantkit import bundle, machine
from quantkit.codecs import types as qtypes
from quantkit.formats.gguf_writer import GGUFWriter
from quantkit.ggml.quants import quantize
from quantkit.models import family
from quantkit.models.tokenizer_metadata import tokenizer_metadata
from quantkit.planning.assign import make_plan
from quantkit.planning.plan import PlannedTensor
from quantkit.planning.recipe import Recipe
from quantkit.progress import track

POOL_WEIGHTS = 1 << 20  # encoded for each type and row length
SLICE_BYTES = 64 << 20
BIAS_SPREAD = 0.01  # of the routers' selection bias


class Blocks:
    """Encoded random weights of every type, handed out at shifting offsets."""

    def __init__(self, seed: int):
        self.generator = np.random.default_rng(seed)
        self.pools: dict[tuple[str, int], np.ndarray] = {}
        self.offset = 0

    def _pool(self, qtype: str, n_in: int) -> np.ndarray:
        """uint8 [blocks, bytes of a block]"""
        if (qtype, n_in) not in self.pools:
            n_rows = -(-POOL_WEIGHTS // n_in)
            rows = self.generator.standard_normal((n_rows, n_in), np.float32) / np.float32(n_in**0.5)
            packed = quantize(qtype, rows, np.ones(n_in, np.float32))
            self.pools[qtype, n_in] = packed.reshape(n_rows * n_in // qtypes.get(qtype).block_size, -1)
        return self.pools[qtype, n_in]

    def take(self, tensor: PlannedTensor, n_rows: int) -> Callable[[], np.ndarray]:
        """What makes uint8 [n_rows, row_bytes], in any thread."""
        pool, n_in = self._pool(tensor.qtype, tensor.shape[-1]), tensor.shape[-1]
        self.offset = offset = (self.offset + 104_729) % len(pool)
        n_blocks = n_rows * n_in // qtypes.get(tensor.qtype).block_size
        return lambda: np.resize(np.roll(pool, -offset, axis=0), (n_blocks, pool.shape[1])).reshape(n_rows, -1)


def vector(tensor: PlannedTensor, blocks: Blocks) -> np.ndarray:
    """Norms are one; a router's bias is small."""
    if tensor.role == "exp_probs_b":
        return (BIAS_SPREAD * blocks.generator.standard_normal(tensor.shape)).astype(np.float32)
    return np.ones(tensor.shape, np.float32)


@click.command()
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--dense", default=1, show_default=True, type=click.IntRange(0, 3))
@click.option("--moe", default=1, show_default=True, type=click.IntRange(1, 58))
@click.option("--recipe", default="1.58bit", show_default=True)
@click.option("--target", default="llama.cpp", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, dense: int, moe: int, recipe: str, target: str, seed: int) -> None:
    """Write a random R1-shaped GGUF file."""
    config = layout(dense, moe, 256)[0]
    c = family.from_hf(config)
    plan = make_plan(family.specs(c), Recipe.load(recipe), target, "deepseek-r1-random")
    metadata = family.metadata(c, plan.mla, plan.model) | tokenizer_metadata(
        bundle.models_dir() / "tiny-r1", c.n_vocab, family.PRE
    )
    blocks = Blocks(seed)
    with (
        GGUFWriter.open(out, plan.tensors, metadata, fingerprint={}, restart=True, overwrite=True) as writer,
        track("write", plan.n_bytes / 1e6, "MB") as advance,
        ThreadPoolExecutor(machine.cores()) as threads,
    ):

        def put(tensor: PlannedTensor, start: int, rows: Callable[[], np.ndarray]) -> None:
            writer.write(tensor.name, start, data := rows())
            advance(data.nbytes / 1e6)

        jobs = []
        for tensor in plan.tensors:
            if len(tensor.shape) == 1:
                writer.write(tensor.name, 0, vector(tensor, blocks).view(np.uint8)[None])
                continue
            n_rows = tensor.n_bytes // tensor.row_bytes
            step = tensor.shape[-2] if len(tensor.shape) == 3 else max(1, SLICE_BYTES // tensor.row_bytes)
            for start in range(0, n_rows, step):
                rows = blocks.take(tensor, min(step, n_rows - start))
                jobs.append(threads.submit(put, tensor, start, rows))
        for job in jobs:
            job.result()
    for qtype in sorted({tensor.qtype for tensor in plan.tensors}):
        size = sum(tensor.n_bytes for tensor in plan.tensors if tensor.qtype == qtype)
        click.echo(f"{qtype:8} {size / 1e6:9.1f} MB", err=True)


if __name__ == "__main__":
    main()
