"""A file on the CPU with the compiled products of routed experts and with ggml's, alternating in one process.

    python scripts/bench/compiled.py FILE [--threads 1] [--tokens 100] [--rounds 7]

Milliseconds (CPU time with one thread, else elapsed), medians of the rounds: tokens of one and of four sequences, and
prompts that go through the graph.
"""

import argparse
import os
import statistics
import time

import torch

from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.native import library
from quantkit.runtime.sources.gguf import open_gguf

SEQUENCES, PROMPTS = (1, 4), (4, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    engines = {}
    for name in ("compiled", "ggml"):
        os.environ[library.SWITCH] = "off" if name == "ggml" else "on"
        library.native.cache_clear()
        weights = open_gguf(args.file, n_threads=args.threads)
        engines[name] = open_engine(weights, max(SEQUENCES), max(PROMPTS) + args.tokens)
    tokens = torch.randint(300, weights.config.n_vocab - 100, (max(*PROMPTS, args.tokens),)).tolist()

    def decode(engine, n: int) -> None:
        for token in tokens[: args.tokens]:
            engine.decode(list(range(n)), [token] * n)

    def prefill(engine, n: int) -> None:
        for _ in range(max(PROMPTS) // n):
            engine.prefill(0, tokens[:n], 0)

    for what, work, sizes in (("decode", decode, SEQUENCES), ("prompt", prefill, PROMPTS)):
        for n in sizes:
            took: dict[str, list[float]] = {name: [] for name in engines}
            for i in range(args.rounds + 1):
                for name, engine in engines.items():
                    for slot in range(max(SEQUENCES)):
                        engine.prefill(slot, tokens[:1], 0)
                    begin = clock()
                    work(engine, n)
                    if i:  # the first one warms up
                        took[name].append(clock() - begin)
            a, b = (1e3 * statistics.median(times) for times in took.values())
            print(f"{what} {n:3}: compiled {a:8.2f} ms, ggml {b:8.2f} ms, {b / a:.2f} times as fast", flush=True)


if __name__ == "__main__":
    main()
