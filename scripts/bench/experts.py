"""Routed experts on the CPU: products of one core by type, and a token's experts at R1's geometry, ours beside ggml's.

    python scripts/bench/experts.py [--threads 16] [--layers 4] [--experts 256] [--gate IQ1_S --down IQ2_XXS]

Weights are random blocks. GB/s count packed bytes; "G weights/s" of one core with rows from memory (a matrix of 64 MiB)
and 1, 4, 16 columns, and of all threads at once as `quantkit hardware` measures them. The step: n tokens with 8 random
experts each (of fewer than 256 a smaller share) through all layers, of which every expert is read anew; medians of the
rounds, ours and ggml's in turns (elapsed time; with one thread CPU time). --gap: us before each layer in which threads
wait, as while a GPU works.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from synthetic import layout

from quantkit import machine
from quantkit.ggml.graph import Linear
from quantkit.ggml.library import library
from quantkit.ggml.quants import row_size
from quantkit.models import family
from quantkit.runtime.experts.cpu import GgmlExperts
from quantkit.runtime.experts.native import NativeExperts, NativeLayer
from quantkit.runtime.native import probe
from quantkit.runtime.native.library import HALVES, SUPERBLOCK, TYPES, native

COLUMNS = (1, 4, 16)


def blocks(qtype: str, n_bytes: int, generator: np.random.Generator) -> np.ndarray:
    """About so many random bytes of whole superblocks, scales of ordinary size: uint8 [n, block]."""
    width = row_size(qtype, SUPERBLOCK)
    out = generator.integers(0, 256, (n_bytes // width, width), np.uint8)
    for byte in HALVES[qtype]:
        out[:, byte] = out[:, byte] & 3 | 0x20
    return out


def seconds(work, repeat: int = 4) -> float:
    """Least CPU time: others may use the machine."""
    found = []
    for _ in range(repeat):
        begin = time.thread_time()
        work()
        found.append(time.thread_time() - begin)
    return min(found)


def products(types: list[str], n_bytes: int) -> None:
    """One core."""
    lib, generator, n_in = native(), np.random.default_rng(0), 7168
    x = generator.standard_normal((max(COLUMNS), n_in), np.float32)
    for qtype in types:
        packed = blocks(qtype, n_bytes, generator)
        n = len(packed) * SUPERBLOCK // n_in
        rows = packed[: n * n_in // SUPERBLOCK].reshape(n, -1)
        linear, one = Linear(qtype, rows, n_in, n, 1), torch.from_numpy(x[:1])
        theirs = seconds(lambda linear=linear, one=one: linear(one))
        text = f"{qtype:8} ggml {n * n_in / theirs / 1e9:6.1f} G weights/s {rows.nbytes / theirs / 1e9:6.1f} GB/s"
        for m in COLUMNS:
            ours = seconds(lambda rows=rows, qtype=qtype, m=m: lib.product(qtype, rows, x[:m]))
            text += f" | {m:2} columns {n * n_in * m / ours / 1e9:6.1f}"
            text += f" ({rows.nbytes / ours / 1e9:.1f} GB/s)" if m == 1 else ""
        print(text, flush=True)


def stacks(c, gate: str, down: str, generator: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    """Gate, up and down of one layer."""
    found = []
    for qtype, n_out, n_in in ((gate, c.n_ff_exp, c.d), (gate, c.n_ff_exp, c.d), (down, c.d, c.n_ff_exp)):
        shape = (c.n_expert, n_out, row_size(qtype, n_in))
        data = np.resize(blocks(qtype, 8 << 20, generator), np.prod(shape)).reshape(shape)
        found.append((qtype, data))
    return found


def waited(experts, gap: float):
    """Those of a layer, after so many seconds in which its threads know that there will be work."""
    experts.wake()
    until = time.perf_counter() + gap
    while time.perf_counter() < until:
        pass
    return experts


def step(c, layers: list, threads: int, rounds: int, tokens: tuple[int, ...], gap: float) -> None:
    """All layers' experts, for some numbers of tokens."""
    ways = {"ggml": [GgmlExperts(layer, c, threads) for layer in layers]}
    if lib := native():
        ours = [NativeExperts(NativeLayer(lib, layer, c), c, threads, 128, None) for layer in layers]
        ways = {"ours": ours, **ways}
    clock = time.thread_time if threads == 1 else time.perf_counter
    size = sum(data[0].nbytes for layer in layers for _, data in layer)
    for n in tokens:
        took: dict[str, list[float]] = {name: [] for name in ways}
        read = []
        for _ in range(rounds):
            x = torch.randn(n, c.d)
            ids = [torch.stack([torch.randperm(c.n_expert)[: c.n_used] for _ in range(n)]) for _ in layers]
            weight = torch.rand(n, c.n_used)
            read.append(size * sum(len(i.unique()) for i in ids) / len(layers))
            results = []
            for name, experts in ways.items():
                found, spent = [], 0.0
                for layer, i in zip(experts, ids, strict=True):
                    ready, begin = waited(layer, gap), clock()
                    found.append(ready(x, i, weight).clone())
                    spent += clock() - begin
                results.append(found)
                took[name].append(spent)
            for a, b in zip(results[0], results[-1], strict=True):
                assert (a - b).abs().max() <= 2e-2 * b.abs().max(), "ours and ggml's differ"
        for name, times in took.items():
            median = statistics.median(times)
            print(f"{n:3} tokens {name}: {1e3 * median:7.2f} ms, {statistics.median(read) / median / 1e9:5.1f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=machine.threads())
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--gate", default="IQ1_S")
    parser.add_argument("--down", default="IQ2_XXS")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--matrix", type=int, default=64, help="MiB")
    parser.add_argument("--tokens", default="1,2,4,16")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--gap", type=float, default=0)
    args = parser.parse_args()
    print(library(), "threads", args.threads, "of", machine.cores(), flush=True)
    if native() and args.types:
        products(args.types.split(","), args.matrix << 20)
        together = ", ".join(f"{qtype} {rate / 1e9:.1f}" for qtype, rate in probe.rates(args.threads).items())
        print(f"{args.threads} threads at once, G weights/s: {together}", flush=True)
    c = family.from_hf(layout(1, args.layers, args.experts)[0])
    generator = np.random.default_rng(0)
    layers = [stacks(c, args.gate, args.down, generator) for _ in range(args.layers)]
    step(c, layers, args.threads, args.rounds, tuple(map(int, args.tokens.split(","))), args.gap / 1e6)


if __name__ == "__main__":
    main()
