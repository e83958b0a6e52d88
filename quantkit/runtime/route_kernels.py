"""Triton: a decoding step's router."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from quantkit.models.config import ModelConfig
from quantkit.runtime.launches import jit_kernel

ROUTED = 8  # tokens up to which a program for each score is faster than a product of matrices


@jit_kernel
def _scores(x, weights, out, d, n_expert, width: tl.constexpr):
    """Row program_id(0) of weights [n_expert, d] times token program_id(1), float32."""
    expert, token = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, width)
    w = tl.load(weights + expert * d + column, mask=column < d, other=0.0)
    v = tl.load(x + token.to(tl.int64) * d + column, mask=column < d, other=0.0)
    tl.store(out + token * n_expert + expert, tl.sum(w * v, axis=0))


def scores(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x float32 [n, d] times weights float32 [n_expert, d] -> [n, n_expert]."""
    (n, d), n_expert = x.shape, len(weights)
    if n > ROUTED:
        return x @ weights.T
    out = torch.empty(n, n_expert, device=x.device)
    _scores[(n_expert, n)](x, weights, out, d, n_expert, triton.next_power_of_2(d), num_warps=8)
    return out


class Routing(NamedTuple):
    """Constants of _route. best: how many experts speak for their group. size, groups, slots: experts of a group,
    groups and chosen experts, each padded to a power of two."""

    n_group: Any
    n_group_used: Any
    n_used: Any
    best: Any
    sigmoid: Any
    norm: Any
    size: Any
    groups: Any
    slots: Any


@jit_kernel
def _route(logits, bias, ids, weights, table, frames, n_expert, factor, how):
    """One token's experts, as layers.route: groups of experts, both padded. table (or None): as `route`."""
    token = tl.program_id(0)
    a, b = tl.arange(0, how.groups)[:, None], tl.arange(0, how.size)[None, :]
    per_group = n_expert // how.n_group
    real = (a < how.n_group) & (b < per_group)
    index = a * per_group + b
    x = tl.load(logits + token * n_expert + index, mask=real, other=float("-inf"))
    if how.sigmoid:
        score = 1 / (1 + tl.exp(-x))
    else:
        top = tl.max(tl.max(x, axis=1), axis=0)
        score = tl.exp(x - top)
        score = score / tl.sum(tl.sum(score, axis=1), axis=0)
    choice = score
    if bias is not None:
        choice += tl.load(bias + index, mask=real, other=0.0)
    choice = tl.where(real, choice, float("-inf"))
    if how.n_group > 1:
        first = tl.max(choice, axis=1)
        value = first
        if how.best == 2:
            at = tl.argmax(choice, axis=1)
            value += tl.max(tl.where(b == at[:, None], float("-inf"), choice), axis=1)
        group = tl.arange(0, how.groups)
        value = tl.where(group < how.n_group, value, float("-inf"))
        kept = group < 0
        for _ in tl.static_range(how.n_group_used):
            at = tl.argmax(value, axis=0)
            kept = kept | (group == at)
            value = tl.where(group == at, float("-inf"), value)
        choice = tl.where(kept[:, None], choice, float("-inf"))
    slot = tl.arange(0, how.slots)
    expert = tl.zeros([how.slots], tl.int32)
    weight = tl.zeros([how.slots], tl.float32)
    for k in tl.static_range(how.n_used):
        at_group = tl.argmax(tl.max(choice, axis=1), axis=0)
        inner = tl.max(tl.where(a == at_group, choice, float("-inf")), axis=0)
        at = at_group * per_group + tl.argmax(inner, axis=0)
        chosen = (index == at) & real
        w = tl.sum(tl.sum(tl.where(chosen, score, 0.0), axis=1), axis=0)
        choice = tl.where(chosen, float("-inf"), choice)
        expert = tl.where(slot == k, at, expert)
        weight = tl.where(slot == k, w, weight)
    if how.norm:
        weight = weight / (tl.sum(weight, axis=0) + 1e-20)
    if table is not None:
        found = tl.load(table + expert)
        tl.store(frames + token * how.n_used + slot, found, mask=slot < how.n_used)
        expert = tl.where(found < 0, expert, -1 - expert)
    tl.store(ids + token * how.n_used + slot, expert, mask=slot < how.n_used)
    tl.store(weights + token * how.n_used + slot, weight * factor, mask=slot < how.n_used)


def route(
    logits: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor | None, c: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `Between.route`, from logits float32 [n, n_expert]."""
    n = len(logits)
    ids = torch.empty(n, c.n_used, dtype=torch.int32, device=logits.device)
    weights = torch.empty(n, c.n_used, dtype=torch.float32, device=logits.device)
    frames = None if table is None else torch.empty_like(ids)
    powers = [triton.next_power_of_2(size) for size in (c.n_expert // c.n_group, c.n_group, c.n_used)]
    numbers = (c.n_group, c.n_group_used, c.n_used, 2 if c.group_score == "top2" else 1)
    how = Routing(*map(tl.constexpr, (*numbers, c.scoring == "sigmoid", c.norm_weights, *powers)))
    _route[(n,)](logits, bias, ids, weights, table, frames, c.n_expert, c.weights_scale, how, num_warps=1)
    return ids, weights, frames
