"""Steps of several sequences, prompts of some lengths, and several prompts in one pass, on a GPU: milliseconds each,
the engine alone.

    python scripts/bench/synthetic_gguf.py /dev/shm/r1.gguf --dense 1 --moe 4
    python scripts/bench/steps.py /dev/shm/r1.gguf --gpu-layers 4 --profile

A step: the mean of --rounds, after three, of sequences at position 40. A prompt: the first one, and the shortest of
--rounds. Several: as a prompt; 1x900+20x4@300 are one of 900 tokens and 20 of 4 that go on at position 300.
--profile: which kernels they consist of, by torch's profiler.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from quantkit import machine
from quantkit.runtime.engines.gpu import GpuEngine
from quantkit.runtime.generate import Piece
from quantkit.runtime.sources.gguf import open_gguf

BEGUN, KERNELS = 40, 12  # tokens that sequences have; kernels that are listed
TOGETHER = ["1x128", "4x32", "16x32", "64x16", "1x1000+20x1", "16x32@300", "8x32+8x32@300"]


def seconds(work: Callable[[], object]) -> float:
    """Of one call, until the GPU has done it."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def kernels(work: Callable[[], object]) -> None:
    """Those that take longest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        seconds(work)
    rows = sorted(found.key_averages(), key=lambda row: -row.device_time_total)
    total, count = sum(row.device_time_total for row in rows) / 1e3, sum(row.count for row in rows)
    print(f"    {total:.2f} ms of {count} kernels and copies")
    for row in rows[:KERNELS]:
        print(f"    {row.device_time_total / 1e3:9.3f} ms {row.count:5} x {row.key[:90]}", flush=True)


def pieces(text: str, tokens: Callable[[int], list[int]]) -> list[Piece]:
    """What is meant by 1x900+20x4@300, each in a slot of its own."""
    found = list[Piece]()
    for part in text.split("+"):
        size, _, begin = part.partition("@")
        n, length = map(int, size.split("x"))
        found += [Piece(len(found) + i, tokens(length), int(begin or 0)) for i in range(n)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--gpu-layers", type=int, default=0, help="Whose experts are in GPU memory.")
    parser.add_argument("--threads", type=int, default=machine.threads())
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--prompts", type=int, nargs="*", default=[16, 32, 64, 128, 1024])
    parser.add_argument("--together", nargs="*", default=TOGETHER, help="Of several sequences: how many x how long.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    weights, draw = open_gguf(args.file, "cuda", args.threads), torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, weights.config.n_vocab, (n,), generator=draw).tolist()

    several = [(text, pieces(text, tokens)) for text in args.together]
    ends = [piece.begin + len(piece.tokens) for _, some in several for piece in some]
    n_slots = max([1, *args.sequences, *(len(some) for _, some in several)])
    capacity = max([BEGUN, *args.prompts, *ends]) + 256
    engine: list[GpuEngine] = []
    opened = seconds(lambda: engine.append(GpuEngine(weights, n_slots, capacity, args.gpu_layers)))
    print(f"opened in {opened:.1f} s, {torch.cuda.memory_allocated() / 1e9:.1f} GB of GPU memory", flush=True)

    def decode(n: int) -> None:
        engine[0].decode(list(range(n)), tokens(n))

    def read(prompt: list[int]) -> None:
        for at in range(0, len(prompt), engine[0].piece):
            engine[0].prefill(0, prompt[at : at + engine[0].piece], at)

    for n in args.sequences:
        engine[0].length[:n] = [BEGUN] * n
        took = [seconds(lambda n=n: decode(n)) for _ in range(3 + args.rounds)][3:]
        mean = sum(took) / len(took)
        print(f"a step of {n}: {1e3 * mean:.2f} ms, {n / mean:.0f} tok/s", flush=True)
        if args.profile:
            kernels(lambda n=n: decode(n))

    def read_several(some: list[Piece]) -> None:
        engine[0].prefill_together(some)

    def prompt(what: str, n: int, work: Callable[[], object]) -> None:
        first, *later = (seconds(work) for _ in range(1 + args.rounds))
        took = min(later)
        print(f"{what}: first {1e3 * first:.1f} ms, later {1e3 * took:.1f} ms, {n / took:.0f} tok/s", flush=True)
        if args.profile:
            kernels(work)

    for n in args.prompts:
        prompt(f"a prompt of {n}", n, partial(read, tokens(n)))
    for text, some in several:
        prompt(f"{text} together", sum(len(piece.tokens) for piece in some), partial(read_several, some))


if __name__ == "__main__":
    main()
