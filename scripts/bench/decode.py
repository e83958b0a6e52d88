"""Decode and prefill of a file in quantkit and in llama-bench, alternating in one run.

    python scripts/bench/decode.py LLAMA_BENCH FILE [--threads 1] [--prompt 512] [--tokens 100] [--rounds 5] [--cpu]

Prints both speeds (median of the rounds), their ratio (median of the rounds' ratios), and the time per token and layer
that quantkit spends outside ggml. --cpu: seconds of CPU time instead of elapsed ones, for a machine that others use;
llama-bench's are what three repetitions take more than one.
"""

import argparse
import json
import resource
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

from quantkit.ggml.graph import Graph
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.sources.gguf import open_gguf


def theirs(binary: str, file: str, threads: int, n_prompt: int, n_tokens: int) -> tuple[float, float]:
    """tok/s of llama-bench: prefill, decode."""
    options = f"-t {threads} -p {n_prompt} -n {n_tokens} -r 1 -ngl 0 -o json"
    command = [binary, "-m", file, *options.split()]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    by_kind = {row["n_gen"] > 0: row["avg_ts"] for row in rows}
    return by_kind[False], by_kind[True]


def theirs_by_cpu(binary: str, file: str, threads: int, n_prompt: int, n_tokens: int) -> tuple[float, float]:
    """tokens per second of CPU time of llama-bench: prefill, decode."""

    def seconds(kind: list[str], repetitions: int) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [binary, "-m", file, "-t", str(threads), *kind, "-r", str(repetitions), "-ngl", "0"]
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    kinds = (["-p", str(n_prompt), "-n", "0"], ["-p", "0", "-n", str(n_tokens)])
    prefill, decode = (seconds(kind, 3) - seconds(kind, 1) for kind in kinds)
    return 2 * n_prompt / prefill, 2 * n_tokens / decode


class Stopwatch:
    """Seconds spent within ggml's graphs."""

    def __init__(self, clock: Callable[[], float]):
        self.seconds, run = 0.0, Graph.run

        def timed(graph) -> None:
            start = clock()
            run(graph)
            self.seconds += clock() - start

        Graph.run = timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock, peer = (time.process_time, theirs_by_cpu) if args.cpu else (time.perf_counter, theirs)
    watch = Stopwatch(clock)
    weights = open_gguf(args.file, n_threads=args.threads)
    engine = open_engine(weights, 1, args.prompt + args.tokens)
    prompt = torch.randint(300, weights.config.n_vocab - 100, (args.prompt,)).tolist()

    def prefill() -> None:
        for at in range(0, len(prompt), engine.piece):
            engine.prefill(0, prompt[at : at + engine.piece], at)

    def decode() -> None:
        for token in prompt[: args.tokens]:
            engine.decode([0], [token]).argmax()

    def speed(work: Callable[[], None], n: int) -> float:
        start = clock()
        work()
        return n / (clock() - start)

    prefill()
    decode()
    ours, peers, outside = [], [], []
    for _ in range(args.rounds):
        peers.append(peer(args.binary, args.file, args.threads, args.prompt, args.tokens))
        pp = speed(prefill, args.prompt)
        engine.prefill(0, prompt[:1], 0)  # llama-bench decodes from an empty context
        watch.seconds = 0.0
        tg = speed(decode, args.tokens)
        outside.append((args.tokens / tg - watch.seconds) / args.tokens / weights.config.n_layer)
        ours.append((pp, tg))
    for i, what in enumerate(("prefill", "decode")):
        ratio = statistics.median(a[i] / b[i] for a, b in zip(ours, peers, strict=True))
        mine, other = (statistics.median(row[i] for row in rows) for rows in (ours, peers))
        print(f"{what:8} quantkit {mine:8.1f} tok/s, llama-bench {other:8.1f} tok/s, ratio {ratio:.2f}")
    print(f"outside ggml: {1e6 * statistics.median(outside):.1f} us per token and layer")


if __name__ == "__main__":
    main()
