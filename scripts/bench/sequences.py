"""Total decode speed of several sequences in one engine, and whether each gets the tokens that it gets alone.

    python scripts/bench/sequences.py FILE [--threads 1] [--tokens 8] [--sequences 1 5 20] [--ram SIZE]

Every sequence has its own 4-token prompt; greedy.
"""

import argparse
import time

import torch

from quantkit import sizes
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.generate import Engine
from quantkit.runtime.sources.gguf import open_gguf


def decode(engine: Engine, prompts: list[list[int]], n_tokens: int) -> tuple[list[list[int]], float]:
    """New tokens of each sequence, and the total of those after the first per second."""
    made = [[int(engine.prefill(slot, prompt, 0).argmax())] for slot, prompt in enumerate(prompts)]
    start = time.perf_counter()
    for _ in range(n_tokens):
        logits = engine.decode(list(range(len(prompts))), [tokens[-1] for tokens in made])
        for tokens, best in zip(made, logits.argmax(-1).tolist(), strict=True):
            tokens.append(best)
    return made, len(prompts) * n_tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--ram", default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ram = sizes.parse_size(args.ram, "--ram") if args.ram else None
    weights = open_gguf(args.file, n_threads=args.threads, ram=ram)
    engine = open_engine(weights, max(args.sequences), 256)
    generator = torch.Generator().manual_seed(0)
    shape = (max(args.sequences), 4)
    prompts = torch.randint(300, weights.config.n_vocab - 100, shape, generator=generator).tolist()
    alone = [decode(engine, [prompt], args.tokens)[0][0] for prompt in prompts]
    for n in args.sequences:
        made, speed = decode(engine, prompts[:n], args.tokens)
        print(
            f"{n:3} sequences: {speed:8.1f} tok/s in all, {speed / n:7.1f} each, "
            f"tokens {'equal' if made == alone[:n] else 'DIFFERENT'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
