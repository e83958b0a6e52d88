"""Tokens of many sequences at once: the same as one by one, and as often as they are probable."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from quantkit import runtime
from quantkit.errors import QuantkitError
from quantkit.runtime import draws
from quantkit.runtime.draws import tokens
from quantkit.runtime.generate import Ask, Dice, NoneLeft, Sampling, pick

NOTHING = np.empty(0, np.int64), np.empty(0, np.float32)
HOWS = (
    Sampling(0.0),
    Sampling(1.0, 1.0),
    Sampling(0.6, 0.95),
    Sampling(3.0, 0.999),
    Sampling(1.0, 0.0),
    Sampling(0.8, 1.0, top_k=1),
    Sampling(1.3, 1.0, top_k=40),
    Sampling(1.3, 0.9, top_k=300),
    Sampling(1.0, 1.0, top_k=2**63 - 1, min_p=0.02),
    Sampling(0.9, 0.97, top_k=100, min_p=0.1),
    Sampling(1.0, 0.9, typical_p=0.5),
)


@pytest.fixture(params=["compiled", "numpy"])
def way(request, monkeypatch):
    """With numba's kernels, and without."""
    if request.param == "numpy":
        monkeypatch.setattr(draws, "kernels", lambda: None)
    else:
        assert draws.kernels() is not None


def asks(n: int, n_vocab: int, generator: np.random.Generator) -> list[Ask]:
    """Of all kinds: some rows with edited logits, some with tokens that must not come."""
    found = []
    for i in range(n):
        ids = generator.choice(n_vocab, min(5, n_vocab), replace=False) if i % 3 == 1 else NOTHING[0]
        values = generator.standard_normal(len(ids)).astype(np.float32) * 4
        allowed = (generator.random(n_vocab) < 0.7).astype(np.uint8) if i % 4 == 2 else None
        if allowed is not None:
            allowed[generator.integers(n_vocab)] = 1
        found.append(Ask(HOWS[i % len(HOWS)], generator.random(), ids, values, allowed))
    return found


def exact(logits: np.ndarray, ask: Ask) -> np.ndarray:
    """Probabilities [n_vocab], with everything sorted, in float64."""
    values = logits.astype(np.float64)
    values[ask.ids] = ask.values
    if ask.allowed is not None:
        values[ask.allowed == 0] = -np.inf
    how = ask.how
    p = np.exp((values - values.max()) / how.temperature)
    order = np.argsort(-p, kind="stable")[: how.top_k or len(p)]
    share = p[order] / p[order].sum()
    kept = order[(np.cumsum(share) - share < how.top_p) & (p[order] >= how.min_p)]
    out = np.zeros(len(p))
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize("n_vocab", [1, 7, 255, 256, 257, 3000, 129_280])
def test_kernels_draw_what_numpy_draws(n_vocab):
    generator = np.random.default_rng(n_vocab)
    n = 66 if n_vocab > 10_000 else 330
    for scale in (0.1, 1.0, 4.0):
        logits = generator.standard_normal((n, n_vocab)).astype(np.float32) * np.float32(scale)
        asked = asks(n, n_vocab, generator)
        expected = [pick(ask.edited(row), ask.how, ask.uniform) for row, ask in zip(logits, asked, strict=True)]
        assert tokens(logits, asked) == expected


def test_of_equally_probable_tokens_the_first_ones_are_left(way):
    logits = np.zeros((1000, 5000), np.float32)
    uniforms = (np.arange(1000) + 0.5) / 1000
    for how, n in (
        (Sampling(1.0, 1.0), 5000),
        (Sampling(1.0, 0.5), 2500),
        (Sampling(0.7, 1.0, top_k=7), 7),
        (Sampling(1.0, 0.5, top_k=8), 4),
    ):
        asked = [Ask(how, uniform, *NOTHING) for uniform in uniforms]
        assert tokens(logits, asked) == (uniforms * n).astype(int).tolist(), how


SHARES = (
    Sampling(1.0, 1.0),  # the whole softmax
    Sampling(0.6, 1.0),
    Sampling(1.0, 0.8),
    Sampling(1.5, 1.0, top_k=100),
    Sampling(1.0, 1.0, min_p=0.01),
    Sampling(1.7, 0.8, top_k=60, min_p=0.01),
)


def drawn(how: Sampling, uniforms: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """How often each of 700 tokens was drawn by these numbers, and its exact probability. Some logits are edited, some
    tokens must not come."""
    row = np.random.default_rng(7).standard_normal(700).astype(np.float32) * 2
    allowed = (np.arange(700) % 5 != 1).astype(np.uint8)
    ask = Ask(how, 0.0, np.array([3, 699, 256], np.int64), np.array([4.0, -1.0, 5.5], np.float32), allowed)
    rows, counts = np.tile(row, (1000, 1)), np.zeros(len(row))
    for begin in range(0, len(uniforms), 1000):
        asked = [ask._replace(uniform=uniform) for uniform in uniforms[begin : begin + 1000]]
        counts += np.bincount(tokens(rows[: len(asked)], asked), minlength=len(row))
    return counts, exact(row, ask)


@pytest.mark.parametrize("how", SHARES)
def test_each_token_has_its_share_of_the_numbers(way, how):
    """Evenly spaced numbers: each token gets as many as its probability says, to one."""
    n = 8_000
    counts, p = drawn(how, ((np.arange(n) + 0.5) / n).tolist())
    assert np.abs(counts - n * p).max() < 1.01


@pytest.mark.parametrize("how", SHARES)
def test_tokens_are_drawn_as_often_as_they_are_probable(way, how):
    """Chi squared against the exact distribution, over all tokens; rare ones together."""
    n, dice = 12_000, Dice(11)
    counts, p = drawn(how, [dice.throw() for _ in range(n)])
    assert counts[p == 0].sum() == 0
    often = n * p >= 10
    seen, expected = counts[often], n * p[often]
    rare = n * p[~often].sum()
    if rare >= 10:
        seen, expected = np.append(seen, counts[~often].sum()), np.append(expected, rare)
    freedom = len(seen) - 1
    chi = float(((seen - expected) ** 2 / expected).sum())
    assert freedom > 15 and chi < freedom + 3.3 * (2 * freedom) ** 0.5 + 5, (chi, freedom)  # once in a thousand


def test_a_draw_does_not_depend_on_who_is_beside(way):
    generator = np.random.default_rng(3)
    logits = generator.standard_normal((44, 2000)).astype(np.float32) * 3
    before, asked = logits.copy(), asks(44, 2000, generator)
    together = tokens(logits, asked)
    assert [tokens(logits[i : i + 1], asked[i : i + 1])[0] for i in range(44)] == together
    assert tokens(logits[::-1], asked[::-1]) == together[::-1]
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda i: tokens(logits[i : i + 4], asked[i : i + 4]), range(0, 44, 4))
        assert [token for part in parts for token in part] == together
    assert (logits == before).all()


def test_without_numba_a_line_says_that_it_is_slower(monkeypatch, caplog):
    assert draws.kernels() is not None
    for name in ("numba", "quantkit.runtime.draw_kernels"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(runtime, "draw_kernels")
    monkeypatch.setitem(sys.modules, "numba", None)
    assert draws.kernels.__wrapped__() is None
    assert len(caplog.messages) == 1 and "by numpy" in caplog.text and "numba" in caplog.text


def test_dice_are_what_torch_draws_one_by_one():
    generator, dice = torch.Generator().manual_seed(5), Dice(5)
    alone = [torch.rand((), dtype=torch.float64, generator=generator).item() for _ in range(100)]
    assert [dice.throw() for _ in range(100)] == alone


def test_what_cannot_be_drawn_from_is_said_of_its_row(way):
    inf, nan = np.inf, np.nan
    rows = np.zeros((7, 600), np.float32)
    rows[1, 300], rows[2, 10], rows[3], rows[4, 5:] = nan, inf, -inf, -inf
    rows[5, 7] = np.copysign(nan, -1)
    none = np.zeros(600, np.uint8)
    for how in (Sampling(1.0, 1.0), Sampling(0.0), Sampling(0.6, 0.9, top_k=5)):
        asked = [Ask(how, 0.999, *NOTHING, none if i == 6 else None) for i in range(7)]
        found = tokens(rows, asked)
        assert [isinstance(each, QuantkitError) for each in found] == [False, True, True, True, False, True, True], how
        assert "no finite numbers" in str(found[1]) and isinstance(found[6], NoneLeft), how
        assert found[4] in range(5)


def test_the_ends_of_a_row_are_reached(way):
    """The least and the largest number there are, beside tokens without probability."""
    rows = np.full((2, 1025), -np.inf, np.float32)
    rows[:, [300, 700, 1023]] = 0.0
    for how in (Sampling(1.0, 1.0), Sampling(1.0, 0.99)):
        assert tokens(rows, [Ask(how, 0.0, *NOTHING), Ask(how, 1 - 2**-53, *NOTHING)]) == [300, 1023]


def test_sums_of_exponentials(way):
    rows = torch.randn(5, 5000, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[0.1], [1], [4], [20], [90]]
    )
    exact = rows.double().logsumexp(-1)
    assert [draws.log_total(row.numpy()) for row in rows] == pytest.approx(exact.tolist(), rel=1e-6)
