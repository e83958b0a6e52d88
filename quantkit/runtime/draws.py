"""Tokens of many sequences at once, by compiled kernels where numba is, else by `generate.pick`.

Which token a sequence gets depends on its own logits and its own random numbers alone, not on who is drawn beside it or
by how many threads.
"""

import logging
import threading
import time
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from types import ModuleType

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.runtime.generate import NONE_LEFT, NOT_FINITE, Ask, NoneLeft, Sampling, pick

log = logging.getLogger(__name__)


@cache
def kernels() -> ModuleType | None:
    """quantkit.runtime.draw_kernels; None, once said, without numba."""
    try:
        from quantkit.runtime import draw_kernels
    except ImportError as error:
        log.warning("tokens are drawn by numpy, which takes longer with many users: %s", error)
        return None
    return draw_kernels


_here = threading.local()


def _room(n_vocab: int) -> tuple[np.ndarray, ...]:
    """What kernels work in, of this thread."""
    made = kernels()
    assert made is not None
    if getattr(_here, "n_vocab", None) != n_vocab:
        _here.n_vocab, _here.room = n_vocab, made.Room(n_vocab)
    return _here.room.arrays


def tokens(logits: np.ndarray, asked: Sequence[Ask]) -> list[int | QuantkitError]:
    """A token from each row of logits float32 [n, n_vocab], or why there is none."""
    made = kernels()
    slow = [made is None or ask.how.typical_p < 1 for ask in asked]
    if not any(slow):
        return _by_kernels(logits, asked)
    out = [_token(*each) if by_pick else 0 for each, by_pick in zip(zip(logits, asked, strict=True), slow, strict=True)]
    quick = [i for i, by_pick in enumerate(slow) if not by_pick]
    if quick:
        for i, token in zip(quick, _by_kernels(logits[quick], [asked[i] for i in quick]), strict=True):
            out[i] = token
    return out


def _by_kernels(logits: np.ndarray, asked: Sequence[Ask]) -> list[int | QuantkitError]:
    made, out = kernels(), np.empty(len(asked), np.int64)
    assert made is not None
    asks = [ask.how for ask in asked]
    hows = [
        (0 if how.greedy else how.temperature, min(how.top_k, logits.shape[1]), how.top_p, how.min_p) for how in asks
    ]
    starts = np.array([0, *accumulate(len(ask.ids) for ask in asked)])
    edits = starts, *(np.concatenate(parts) for parts in zip(*((ask.ids, ask.values) for ask in asked), strict=True))
    masks = [ask.allowed for ask in asked if ask.allowed is not None]
    which, n = np.full(len(asked), -1), 0
    for i, ask in enumerate(asked if masks else ()):
        if ask.allowed is not None:
            which[i], n = n, n + 1
    allowed = np.stack(masks) if masks else np.empty((0, 0), np.uint8)
    uniforms = np.array([ask.uniform for ask in asked])
    room = _room(logits.shape[1])
    made.choose(np.ascontiguousarray(logits), np.array(hows, np.float64), uniforms, edits, (which, allowed), room, out)
    return [_said(token) if token < 0 else token for token in out.tolist()]


def _said(token: int) -> QuantkitError:
    made = kernels()
    assert made is not None
    return NoneLeft(NONE_LEFT) if token == made.NONE_LEFT else QuantkitError(NOT_FINITE)


def _token(logits: np.ndarray, ask: Ask) -> int | QuantkitError:
    try:
        return pick(ask.edited(logits), ask.how, ask.uniform)
    except QuantkitError as error:
        return error


def log_total(logits: np.ndarray) -> float:
    """Natural logarithm of the sum of exponentials of float32 logits [n_vocab]; the same in whichever thread."""
    made = kernels()
    if made is None:
        most = float(logits.max())
        return most + float(np.log(np.exp(logits - np.float32(most)).sum(dtype=np.float64)))
    out = np.empty(1)
    made.log_totals(np.ascontiguousarray(logits)[None], _room(len(logits)), out)
    return float(out[0])


def warm_up(n_vocab: int) -> None:
    """Have the kernels compiled, or loaded: seconds, or one."""
    if kernels() is None:
        return
    begun = time.perf_counter()
    zeros = np.zeros((1, n_vocab), np.float32)
    nothing = np.empty(0, np.int64), np.empty(0, np.float32)
    tokens(zeros, [Ask(Sampling(), 0.0, *nothing)])
    log_total(zeros[0])
    log.info("kernels that draw tokens are there after %.1f s", time.perf_counter() - begun)
