"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880): several residual streams instead of one.

Each half of a layer computes one input out of the streams, and what comes out goes back into all of them, while they
mix among themselves by a matrix whose rows and columns sum to one. All weights of that follow from the streams, a token
at a time.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from quantkit.models.config import ModelConfig, Streams
from quantkit.runtime.rotation import unit_rms


@dataclass
class Mixing:
    """Of a half of a layer, float32: fn [(2 + n) n, n d], base [(2 + n) n], scale [3]; of what is merged at the end: fn
    [n, n d], base [n], scale [1]."""

    fn: torch.Tensor
    base: torch.Tensor
    scale: torch.Tensor


class Mixed(NamedTuple):
    """Of m tokens: x [m, d], what the half computes on; post [m, n], how much of its output each stream takes; carry
    [m, n, n], how much of stream i goes on in stream j."""

    x: torch.Tensor
    post: torch.Tensor
    carry: torch.Tensor


def mix(hidden: torch.Tensor, mixing: Mixing, config: ModelConfig) -> Mixed:
    """What a half computes on, of streams hidden [m, n d], float32."""
    assert config.streams
    n = config.streams.n
    streams = hidden.float()
    told = unit_rms(streams, config.rms_eps) @ mixing.fn.T
    pre, post, carry = told.split([n, n, n * n], dim=-1)
    base = mixing.base.split([n, n, n * n])
    pre = torch.sigmoid(pre * mixing.scale[0] + base[0]) + config.streams.eps
    post = 2 * torch.sigmoid(post * mixing.scale[1] + base[1])
    carry = (carry * mixing.scale[2] + base[2]).view(-1, n, n)
    return Mixed(_gathered(streams, pre), post, doubly_stochastic(carry, config.streams))


def doubly_stochastic(logits: torch.Tensor, how: Streams) -> torch.Tensor:
    """Sinkhorn and Knopp's iteration on [m, n, n], as DeepSeek and llama.cpp do it: softmax of rows, then columns, then
    rows and columns in turn."""
    out = logits.softmax(-1) + how.eps
    out = out / (out.sum(-2, keepdim=True) + how.eps)
    for _ in range(how.iterations - 1):
        out = out / (out.sum(-1, keepdim=True) + how.eps)
        out = out / (out.sum(-2, keepdim=True) + how.eps)
    return out


def taken_up(hidden: torch.Tensor, y: torch.Tensor, mixed: Mixed) -> torch.Tensor:
    """Streams [m, n d] after a half whose output is y [m, d], float32."""
    m, n = mixed.post.shape
    streams = hidden.float().view(m, n, -1)
    out = mixed.carry.transpose(1, 2) @ streams + mixed.post[..., None] * y.float()[:, None]
    return out.view(m, -1)


def merged(hidden: torch.Tensor, mixing: Mixing, config: ModelConfig) -> torch.Tensor:
    """What the output norm is taken of, float32 [..., d], of streams hidden [..., n d]."""
    assert config.streams
    streams = hidden.flatten(0, -2).float()
    told = unit_rms(streams, config.rms_eps) @ mixing.fn.T
    weight = torch.sigmoid(told * mixing.scale + mixing.base) + config.streams.eps
    return _gathered(streams, weight).view(*hidden.shape[:-1], -1)


def _gathered(streams: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    m, n = weight.shape
    return (weight[:, None] @ streams.view(m, n, -1))[:, 0]
