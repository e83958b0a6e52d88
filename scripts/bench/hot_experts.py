"""How many of a text's experts are in GPU memory if it holds the ones chosen most, and if it holds whole layers.

    python scripts/bench/hot_experts.py FILE --text TEXT --tokens 4096

Computes the text with the file's dequantized weights on the CPU, notes which experts each token chooses, and replays
that with the engine's own rules (runtime/engines/heat.py): hit rates of the same bytes filled with whole layers, with
the experts that the imatrix beside the file says, the same and exchanged while running, and exchanged from the first
experts on without an imatrix. Predicted: tok/s of R1 (61 layers, 58 of experts) if its routing were like that, from
what one H200 beside 16 cores takes (docs/results/runtime.md).
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from quantkit.models.tokenizer import tokenize
from quantkit.runtime import layers
from quantkit.runtime.engines import heat, hot
from quantkit.runtime.engines.gpu_load import calibrated
from quantkit.runtime.engines.heat import Heat, hottest
from quantkit.runtime.engines.torch import TorchEngine
from quantkit.runtime.sources.gguf import open_source

PIECE = 256
VISITS = 2.5e-3  # seconds of a layer's eight experts on 16 cores
REST = 0.36e-3  # seconds of a layer on the GPU
LAYERS, MOE_LAYERS = 61, 58


def trace(engine: TorchEngine, tokens: list[int]) -> np.ndarray:
    """Experts that each token chooses, int64 [n_moe, n, n_used]."""
    found: list[torch.Tensor] = []
    plain = layers.route

    def noted(*arguments):
        expert, weight = plain(*arguments)
        found.append(expert)
        return expert, weight

    layers.route = noted
    try:
        for at in range(0, len(tokens), PIECE):
            engine.prefill(0, tokens[at : at + PIECE], at % engine.capacity)
    finally:
        layers.route = plain
    n_moe = engine.config.n_moe
    return np.stack([torch.cat(found[i::n_moe]).numpy() for i in range(n_moe)])


def replay(chosen: np.ndarray, here: np.ndarray, shares: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Hits of each token, [n], and how many experts were exchanged, by the rules of `HotExperts`. shares: None: nothing
    is known at first."""
    (n_moe, n, n_used), here = chosen.shape, here.copy()
    found = Heat(np.zeros(here.shape) if shares is None else shares, n_used)
    rows, hits, credit, moved = np.arange(n_moe), np.zeros(n), 0.0, 0
    able = rows[here.any(1) & ~here.all(1)]
    for t in range(n):
        now = chosen[:, t]
        there = here[rows[:, None], now]
        hits[t] = there.mean()
        found.add(rows, now, 1)
        credit = min(credit + hot.BACKGROUND * float((~there).sum()), hot.AT_ONCE)
        if credit >= 1:
            swaps = found.swaps(here, able, int(credit))
            for layer, leaves, comes in swaps:
                here[layer, leaves], here[layer, comes] = False, True
            credit, moved = credit - len(swaps) if swaps else 0.0, moved + len(swaps)
    return hits, moved


def rate(hit: float, waiting: float) -> float:
    """R1's tok/s. hit: of choices; waiting: share of layers with any expert on the CPU."""
    return 1 / (LAYERS * REST + MOE_LAYERS * (VISITS * (1 - hit) + heat.LAYER_SECONDS * waiting))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    args = parser.parse_args()
    source = open_source(args.file)
    c, engine = source.config, TorchEngine(source, 1, 2048)
    chosen = trace(engine, tokenize(source.tokenizer(), args.text.read_text())[: args.tokens])
    known, sizes = calibrated(args.file, c), np.ones(c.n_moe, np.int64)
    moe = [i for i in range(c.n_layer) if c.is_moe(i)]
    print(
        f"{args.file.name}, {args.text.name}: {chosen.shape[1]} tokens, {c.n_used} of {c.n_expert} experts in {c.n_moe}"
    )
    print(f"without any expert in GPU memory: R1 at {rate(0, 1):.1f} tok/s")
    for share in args.shares:
        room = round(share * c.n_moe * c.n_expert)
        print(f"{share:.0%} of the experts: whole layers hit {share:.3f}, R1 {rate(share, 1 - share):.1f} tok/s")
        first = hottest(np.tile(np.arange(c.n_expert, 0, -1), (c.n_moe, 1)), sizes, room)
        ways = [("without an imatrix, exchanged", first, None)]
        if known is not None:
            here = hottest(known[moe], sizes, room)
            static = here[np.arange(c.n_moe)[:, None, None], chosen].mean()
            print(f"    by the imatrix: {static:.3f}, R1 {rate(static, 1):.1f} tok/s")
            ways.insert(0, ("by the imatrix, exchanged", here, known[moe]))
        for name, here, shares in ways:
            hits, moved = replay(chosen, here, shares)
            hit, later, n = hits.mean(), hits[len(hits) // 2 :].mean(), len(hits)
            print(
                f"    {name}: {hit:.3f} (second half {later:.3f}), R1 {rate(hit, 1):.1f} tok/s; "
                f"{moved / n:.3f} experts moved a token"
            )


if __name__ == "__main__":
    main()
