"""What a file writes, not only what it predicts: greedy agreement with the original, and whether long text loops.

An original of 671 B parameters cannot generate on a workstation, but it need not: its greedy continuation equals the
file's up to the first token that the original, reading the file's text, would not have chosen. One streamed pass over
all continuations therefore gives the exact length of agreement.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from quantkit.calibration.corpus import Chunks
from quantkit.evaluation.divergence import VOCAB_SLAB, HeadLogits
from quantkit.progress import track
from quantkit.runtime.engines.streams import StreamsEngine
from quantkit.runtime.engines.torch import TorchEngine
from quantkit.runtime.generate import Engine, Opener, Sampling, generate
from quantkit.runtime.stream import Source, final_hidden

GREEDY = Sampling(temperature=0.0)
PERIOD, SPAN, REPEATS = 64, 32, 4  # a loop: a period up to 64 tokens, at least 32 tokens and four times over
SMALL_WEIGHTS = 200_000_000  # an original up to this size also generates, for comparison
SAMPLES = 4  # continuations kept as text


@dataclass(frozen=True)
class Continuation:
    """One prompt. tokens: the file's greedy continuation. matched: its first tokens that the original would have
    written too. agreed: of all its tokens, those that are the original's choice at that place, in percent.
    loop: period of the loop in which the long sampled text ends, 0 if it does not; loop_original: the original's."""

    domain: str
    tokens: int
    matched: int
    agreed: float
    loop: int
    loop_original: int | None


def loop_period(tokens: Sequence[int]) -> int:
    """Shortest period in which the text ends, over at least SPAN tokens and REPEATS times; 0 if there is none."""
    for period in range(1, PERIOD + 1):
        end = len(tokens)
        while end > period and tokens[end - 1] == tokens[end - 1 - period]:
            end -= 1
        repeated = len(tokens) - end + period
        if repeated >= max(SPAN, REPEATS * period):
            return period
    return 0


def top_tokens(source: Source, hidden: torch.Tensor) -> torch.Tensor:
    """Most likely next token of final hidden states [n, d], int64 [n], over slabs of the vocabulary."""
    head = HeadLogits(source, hidden)
    best, ids = torch.full((len(hidden),), -torch.inf), torch.zeros(len(hidden), dtype=torch.int64)
    for start in range(0, source.config.n_vocab, VOCAB_SLAB):
        logits = head.slab(start, min(start + VOCAB_SLAB, source.config.n_vocab))(slice(None)).cpu()
        value, at = logits.max(-1)
        ids, best = torch.where(value > best, at + start, ids), torch.maximum(best, value)
    return ids


@torch.inference_mode()
def check(
    runtime: Opener,
    reference: Source,
    chunks: Chunks,
    n_prompts: int,
    *,
    n_prompt: int = 32,
    n_new: int = 64,
    n_long: int = 256,
) -> dict[str, Any]:
    """Continue the first n_prompt tokens of the first n_prompts chunks. The same file and text give the same result.

    runtime: opens the file as a person runs it.

    Greedily for n_new tokens, compared with the original; sampled as R1 is meant to be (temperature 0.6, top-p 0.95,
    seed = number of the prompt) for n_long tokens, searched for loops.
    """
    prompts = chunks.tokens[:n_prompts, :n_prompt]
    engine = runtime(n_prompt + max(n_new, n_long) + 1)
    with track("generate", len(prompts) * (n_new + n_long), "tokens") as advance:
        greedy = [_write(engine, prompt.tolist(), n_new, GREEDY) for prompt in prompts]
        advance(len(prompts) * n_new)
        long = []
        for seed, prompt in enumerate(prompts):
            long.append(loop_period(_write(engine, prompt.tolist(), n_long, Sampling(seed=seed))))
            advance(n_long)
    chosen = _choices(reference, prompts, greedy)
    rows = []
    for i, (tokens, wanted) in enumerate(zip(greedy, chosen, strict=True)):
        same = [a == b for a, b in zip(tokens, wanted, strict=True)]
        matched = same.index(False) if False in same else len(same)
        rows.append((chunks.domains[i], len(tokens), matched, 100 * sum(same) / len(same), long[i]))
    pairs = zip(prompts[:SAMPLES].tolist(), greedy, chosen, chunks.domains, strict=False)
    samples = [_sample(reference, *pair) for pair in pairs]
    loops = _loops_of_original(reference, prompts, n_long)
    found = [Continuation(*row, loop) for row, loop in zip(rows, loops, strict=True)]
    return {
        "prompts": len(found),
        "new_tokens": n_new,
        "long_tokens": n_long,
        "summary": summary(found),
        "matched_median": statistics.median(c.matched for c in found),
        "agreed": _agreed(found),
        "loops": sum(c.loop > 0 for c in found),
        "continuations": [asdict(c) for c in found],
        "samples": samples,
    }


def _write(engine: Engine, prompt: list[int], n: int, how: Sampling) -> list[int]:
    """The continuation, with the EOS that ended it."""
    tokens = list(generate(engine, prompt, n, how))
    return tokens if len(tokens) == n else [*tokens, engine.config.eos]


def _choices(reference: Source, prompts: torch.Tensor, continuations: list[list[int]]) -> list[list[int]]:
    """The original's choice at every place of each continuation, given what the file wrote before it."""
    n, longest = prompts.shape[1], max(map(len, continuations))
    texts = torch.zeros((len(prompts), n + longest), dtype=torch.int64)  # what follows a text does not reach back to it
    texts[:, :n] = prompts
    for row, tokens in zip(texts, continuations, strict=True):
        row[n : n + len(tokens)] = torch.tensor(tokens)
    hidden = final_hidden(reference, texts)[:, n - 1 : -1]
    top = top_tokens(reference, hidden.reshape(-1, hidden.shape[-1])).view(len(prompts), longest)
    return [row[: len(tokens)].tolist() for row, tokens in zip(top, continuations, strict=True)]


def _sample(reference: Source, prompt: list[int], greedy: list[int], chosen: list[int], domain: str) -> dict[str, Any]:
    """Texts of a prompt, of the file's continuation, and of the original's: whole if it is small enough to generate,
    else up to its first token that is another (`original_whole`)."""
    tokenizer, c = reference.tokenizer(), reference.config
    small = _is_small(reference)
    if small:
        theirs = _write(_engine(reference, len(prompt) + len(greedy) + 1), prompt, len(greedy), GREEDY)
    else:
        parted = next((i for i, (a, b) in enumerate(zip(greedy, chosen, strict=True)) if a != b), len(greedy))
        theirs = chosen[: parted + 1]
    texts = {"prompt": prompt, "file": greedy, "original": theirs}
    ends = {c.bos, c.eos}
    decoded = {key: tokenizer.decode([t for t in ids if t not in ends]) for key, ids in texts.items()}
    return {"domain": domain, **decoded, "original_whole": small}


def _engine(reference: Source, capacity: int) -> Engine:
    """For one text of the original."""
    return (TorchEngine if reference.config.compression is None else StreamsEngine)(reference, 1, capacity)


def _is_small(reference: Source) -> bool:
    c = reference.config
    return c.n_moe * c.n_expert * 3 * c.d * c.n_ff_exp <= SMALL_WEIGHTS


def _loops_of_original(reference: Source, prompts: torch.Tensor, n_long: int) -> list[int | None]:
    if not _is_small(reference):
        return [None] * len(prompts)
    engine = _engine(reference, prompts.shape[1] + n_long + 1)
    return [
        loop_period(_write(engine, prompt.tolist(), n_long, Sampling(seed=seed))) for seed, prompt in enumerate(prompts)
    ]


def summary(found: Sequence[Continuation]) -> str:
    """One line for a person."""
    matched, agreed = statistics.median(c.matched for c in found), _agreed(found)
    originals = [c.loop_original for c in found if c.loop_original is not None]
    theirs = f" (the original: {sum(map(bool, originals))})" if originals else ""
    return (
        f"{len(found)} prompt{'s' if len(found) > 1 else ''}: greedy text is the original's for {matched:g} tokens "
        f"(median), {agreed:.1f} % of "
        f"its tokens are the original's choice; {sum(map(bool, (c.loop for c in found)))} long texts end in a "
        f"loop{theirs}"
    )


def _agreed(found: Sequence[Continuation]) -> float:
    return sum(c.agreed * c.tokens for c in found) / sum(c.tokens for c in found)
