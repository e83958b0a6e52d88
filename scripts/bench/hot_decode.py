"""A file on a GPU whose memory holds a part of the experts: whole layers against those chosen most, and short prompts
by each way.

    python scripts/bench/synthetic_gguf.py /dev/shm/r1.gguf --dense 1 --moe 4
    python scripts/bench/hot_decode.py /dev/shm/r1.gguf --threads 16

A synthetic file's routers choose nearly evenly. --skew adds so much noise to their selection bias, so that some experts
are chosen more often; what is chosen then is counted, and written beside the file as an imatrix (which must not exist).
Checked: logits against those with all experts on the CPU.
"""

import argparse
import gc
import logging
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from quantkit.formats.gguf_folder import IMATRIX
from quantkit.formats.imatrix import save_imatrix
from quantkit.runtime.engines import heat
from quantkit.runtime.engines.gpu import GpuEngine
from quantkit.runtime.engines.prompts import Costs
from quantkit.runtime.experts.streamed import expert_names
from quantkit.runtime.sources.gguf import open_gguf
from quantkit.tensors import Importance

BEGUN = time.perf_counter()
CPU, BUS = Costs(0, 0, 1, 1, 1), Costs(1, 1, 0, 1, 1)


def say(*parts) -> None:
    print(f"[{time.perf_counter() - BEGUN:5.1f}s]", *parts, flush=True)


def kld(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


class Bench:
    """Engines of one file, one after the other, with the same routing and tokens."""

    def __init__(self, args: argparse.Namespace):
        n_vocab = open_gguf(args.file).config.n_vocab
        self.args, self.tokens = args, torch.randint(300, min(8000, n_vocab - 100), (4096,)).tolist()
        self.expected: dict[float, torch.Tensor] = {}

    def engine(self, gpu_layers: int | float, skew: float) -> GpuEngine:
        gc.collect()
        torch.cuda.empty_cache()
        engine = GpuEngine(open_gguf(self.args.file, self.args.device, self.args.threads), 2, 2048, gpu_layers)
        generator = torch.Generator().manual_seed(1)
        for layer in engine.layers:
            if layer.router is not None and layer.router.bias is not None:
                noise = torch.randn(layer.router.bias.shape, generator=generator)
                layer.router.bias += skew * noise.to(layer.router.bias.device)
        return engine

    def decode(self, engine: GpuEngine, n: int, begin: int = 0) -> float:
        """tok/s, of tokens that are given: which is likely is nobody's question."""
        engine.prefill(0, self.tokens[begin : begin + 1], 0)
        start = time.perf_counter()
        for token in self.tokens[begin : begin + n]:
            engine.decode([0], [token])
        return n / (time.perf_counter() - start)

    def logits(self, engine: GpuEngine) -> torch.Tensor:
        """Of a prompt, then of tokens of two sequences."""
        found = []
        for slot in (0, 1):
            found.append(engine.prefill(slot, self.tokens[slot : slot + 40], 0).clone()[None])
        for token in self.tokens[50:66]:
            found.append(engine.decode([1, 0], [token, token + 1]).clone())
        return torch.cat(found)

    def count(self, engine: GpuEngine) -> None:
        """Which experts 1,000 tokens choose, written beside the file."""
        c = engine.config
        counts = np.zeros((c.n_layer, c.n_expert), np.float32)

        def note(layer: int, ids: torch.Tensor) -> None:
            np.add.at(counts[layer], ids.flatten().numpy(), 1)

        engine.hot.note = note
        self.decode(engine, self.args.count, 1000)
        sums = np.ones((c.n_expert, c.d), np.float32)
        found = {expert_names(i)[0]: Importance(sums, counts[i]) for i in range(c.n_layer) if c.is_moe(i)}
        save_imatrix(self.args.file.parent / IMATRIX, found, datasets=["bench"], chunk_count=1, chunk_size=1)

    def report(self, name: str, gpu_layers: int | float, skew: float) -> GpuEngine:
        engine = self.engine(gpu_layers, skew)
        found = self.logits(engine)
        error = kld(self.expected.setdefault(skew, found), found)
        self.decode(engine, 8)
        rates, hot = [], engine.hot
        hot.hits = hot.chosen = 0
        before = hot.moved
        for i in range(3):
            rates.append(self.decode(engine, self.args.tokens, 100 * i))
        hits = f", hit {hot.hits / hot.chosen:.3f}, {hot.moved - before} exchanged" if hot.chosen else ""
        say(f"{name}: {statistics.median(rates):.2f} tok/s {[round(r, 1) for r in rates]}{hits}; KLD {error:.6f}")
        return engine

    def prompts(self, engine: GpuEngine, sizes: tuple[int, ...]) -> None:
        """Short ones by each way."""
        measured = engine.prompts.costs
        assert measured is not None
        both = measured._replace(move=1e3)
        expected = {}
        for n in sizes:
            for name, costs in (("CPU", CPU), ("both", both), ("bus", BUS), ("chosen", measured)):
                engine.prompts.costs = costs
                times = []
                for _ in range(4):
                    torch.cuda.synchronize() if engine.on_gpu else None
                    start = time.perf_counter()
                    found = engine.prefill(0, self.tokens[:n], 0).clone()
                    times.append(time.perf_counter() - start)
                error = kld(expected.setdefault(n, found)[None], found[None])
                taken = " (all moved)" if name == "chosen" and engine.prompts.moves_all(n) else ""
                say(f"prompt of {n}, {name}{taken}: {n / statistics.median(times[1:]):.1f} tok/s; KLD {error:.6f}")
        engine.prompts.costs = measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--count", type=int, default=500, help="Tokens whose choices are counted.")
    parser.add_argument("--skew", type=float, default=0.1)
    args = parser.parse_args()
    if (args.file.parent / IMATRIX).exists():
        parser.error(f"{args.file.parent / IMATRIX} is there already")
    logging.basicConfig(level=logging.INFO, format="    %(message)s")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    bench, shares = Bench(args), (0.5, 0.25, 0.75)
    seconds = heat.LAYER_SECONDS
    for skew, some in ((args.skew, shares), (0.0, (0.5,))):
        engine = bench.report(f"skew {skew}, nothing in GPU memory", 0, skew)
        bench.count(engine)
        if skew:
            bench.prompts(engine, (16, 32, 64, 128, 256))
        n_moe = engine.config.n_moe
        del engine
        for share in some:
            bench.report(f"skew {skew}, {share:.0%}, whole layers", round(share * n_moe), skew)
            heat.LAYER_SECONDS = 0.0  # no whole layers among them
            bench.report(f"skew {skew}, {share:.0%}, the hottest", share, skew)
            heat.LAYER_SECONDS = seconds
        if skew:
            bench.prompts(bench.report(f"skew {skew}, 50%, as placed by default", 0.5, skew), (32, 128))
            (args.file.parent / IMATRIX).unlink()
            bench.report(f"skew {skew}, 50%, without an imatrix", 0.5, skew)
    bench.report("all in GPU memory", n_moe, 0.0)
    (args.file.parent / IMATRIX).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
