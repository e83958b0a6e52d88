"""Pieces of several prompts on a GPU pass the layers as one row of tokens: all that is per token is launched once.

Only attention itself is by sequence. Those of about the same length are padded and attend at once, so that what Python
launches does not grow with the number of short ones.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, chain, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantkit.models.config import ModelConfig
from quantkit.runtime.engines.gpu_layers import GpuLayer
from quantkit.runtime.forms import SCORE_ELEMENTS, absorbed, expanded
from quantkit.runtime.generate import Piece
from quantkit.runtime.layers import Experts, Feed

if TYPE_CHECKING:  # or the chain of imports would be long
    from quantkit.runtime.engines.step import Between

ROWS, POSITIONS = 2048, 1 << 15  # tokens (those that see something before them count twice), and positions of the
# cache, of several pieces that attend at once, padded: 400 MB of R1's queries, keys and values; 75 MB of its cache
SCORES = SCORE_ELEMENTS // 2  # of such, however much is padding: reckoned as what another batch's launches take
PLANNED = 2048  # tokens of a piece from which cuDNN's attention saves about the 70 ms that its plan for a new length
# takes: reckoned of R1's 61 layers 15 ms at 1,024 tokens, 56 at 2,048, 223 at 4,096 (docs/results/runtime.md)
UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Size(NamedTuple):
    """Of a batch: s pieces of t tokens that see n positions, if padded; without padding they see so many in all."""

    s: int = 0
    t: int = 0
    n: int = 0
    seen: int = 0

    def plus(self, piece: Piece) -> "Size":
        """With this one too."""
        t, n = len(piece.tokens), piece.begin + len(piece.tokens)
        return Size(self.s + 1, max(self.t, t), max(self.n, n), self.seen + t * n)

    def pays(self, n_head: int, begun: bool) -> bool:
        """Whether these should attend at once, by memory and by the work that padding is."""
        few = self.s * self.t <= (ROWS // 2 if begun else ROWS) and (not begun or self.s * self.n <= POSITIONS)
        return few and self.s * self.t * self.n <= max(self.seen * 5 // 4, SCORES // n_head)


def batches(pieces: Iterable[Piece], n_head: int) -> Iterator[list[Piece]]:
    """Pieces that attend at once: beginnings of sequences, then others, of each the longest first. Few batches: of
    those of some length there is hardly more than one."""
    batch, size, begun = list[Piece](), Size(), False
    for piece in sorted(pieces, key=_order):
        grown = size.plus(piece)
        if batch and not (begun == (piece.begin > 0) and grown.pays(n_head, begun)):
            yield batch
            batch, grown = [], Size().plus(piece)
        batch.append(piece)
        size, begun = grown, piece.begin > 0
    if batch:
        yield batch


def _order(piece: Piece) -> tuple[bool, int, int]:
    t = len(piece.tokens)
    return piece.begin > 0, -(piece.begin + t).bit_length(), -t


class Batch(NamedTuple):
    """s pieces that attend at once, padded to t tokens that see n positions. rows: their tokens. padded, real: int64
    [s · t] and [tokens], which of these stands where, and where each stands. cells: int64 [s · n] of the cache, if
    there is something before; seen: bool [s, t, n], which of them count. One piece alone has no padding."""

    rows: slice
    s: int
    padded: torch.Tensor | None = None
    real: torch.Tensor | None = None
    cells: slice | torch.Tensor | None = None
    seen: torch.Tensor | None = None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Of x [all tokens, ...]: [s, t, ...]."""
        own = x[self.rows]
        return (own if self.padded is None else own.index_select(0, self.padded)).unflatten(0, (self.s, -1))

    def put(self, found: torch.Tensor, out: torch.Tensor) -> None:
        """What was found, [s, t, ...], into out [all tokens, ...]."""
        if self.real is None:
            out[self.rows] = found.flatten(0, 1)
        else:
            torch.index_select(found.flatten(0, 1), 0, self.real, out=out[self.rows])


class Pieces:
    """Of different slots, put in order: `tokens`, and on the device where they are. cells: int64 [n] of the cache, all
    slots' in a row. turns: complex64 [n, 1, qk_rope / 2], by rope. last: int64, the last token of each piece, as they
    came. first: batches of beginnings; later: of the others."""

    def __init__(self, pieces: Sequence[Piece], c: ModelConfig, turned: torch.Tensor):
        """turned: of `gpu_buffers.Buffers`, of as many positions as the cache has for a slot."""
        groups, rows = list(batches(pieces, c.n_head)), len(turned)
        self.pieces = list(chain.from_iterable(groups))
        self.tokens = [token for piece in self.pieces for token in piece.tokens]
        positions = np.concatenate([piece.begin + np.arange(len(piece.tokens)) for piece in self.pieces])
        cells = positions + np.repeat([p.slot * rows for p in self.pieces], [len(p.tokens) for p in self.pieces])
        ends = {p.slot: end for p, end in zip(self.pieces, accumulate(len(p.tokens) for p in self.pieces), strict=True)}
        last = np.array([ends[piece.slot] - 1 for piece in pieces])
        tables = [_table(group, rows) for group in groups]
        sent = _sent([positions, cells, last, *chain.from_iterable(tables)], turned.device)
        self.turns = torch.view_as_complex(turned[next(sent)].view(len(positions), 1, -1, 2))
        self.cells, self.last = next(sent), next(sent)
        self.first, self.later, begin = list[Batch](), list[Batch](), 0
        for group, table in zip(groups, tables, strict=True):
            n = sum(len(piece.tokens) for piece in group)
            own = list(islice(sent, len(table)))
            batch = Batch(slice(begin, begin + n), len(group), *own[:3])
            if group[0].begin:
                self.later.append(_after(batch, group[0], rows, own[3:]))
            else:
                self.first.append(batch)
            begin += n

    def kernels(self) -> AbstractContextManager[None]:
        """Which of torch's attention is used within it, by the whole process. cuDNN plans it anew for each length, and
        in each thread, while everybody waits: not for short pieces, each of which has another length."""
        long = max(len(piece.tokens) for piece in self.pieces) >= PLANNED
        return nullcontext() if long else sdpa_kernel(UNPLANNED)

    def of_each(self, h: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Each piece with its rows of h [n, ...]."""
        yield from zip(self.pieces, h.split([len(piece.tokens) for piece in self.pieces]), strict=True)


def _table(group: list[Piece], rows: int) -> list[np.ndarray]:
    """int64 of a batch of several pieces: padded and real of `Batch`, and if there is something before them, cells and
    how many of each piece's do not count. Beginnings are padded behind, where nobody sees it; others in front, so that
    each token sees as far back from the end of its row as it should."""
    if len(group) == 1:
        return []
    length, begin, slot = (np.array(numbers)[:, None] for numbers in zip(*map(_numbers, group), strict=True))
    column, end, begun = np.arange(length.max()), begin + length, group[0].begin > 0
    skipped = length.max() - length if begun else np.zeros_like(length)
    inside = np.clip(column - skipped, 0, length - 1)
    padded, real = np.cumsum(length)[:, None] - length + inside, (column >= skipped) & (column < skipped + length)
    if not begun:
        return [padded.ravel(), np.flatnonzero(real)]
    before = end.max() - end
    cells = slot * rows + np.maximum(np.arange(end.max()) - before, 0)
    return [padded.ravel(), np.flatnonzero(real), cells.ravel(), before.ravel()]


def _numbers(piece: Piece) -> tuple[int, int, int]:
    return len(piece.tokens), piece.begin, piece.slot


def _sent(arrays: list[np.ndarray], device: torch.device) -> Iterator[torch.Tensor]:
    """int64, at once."""
    found = torch.from_numpy(np.concatenate(arrays)).to(device)
    return iter(found.split([len(array) for array in arrays]))


def _after(batch: Batch, first: Piece, rows: int, before: list[torch.Tensor]) -> Batch:
    """A batch whose pieces see something before them. before: of `_table`, for more than the first one."""
    if not before:
        at = first.slot * rows
        return batch._replace(cells=slice(at, at + first.begin + len(first.tokens)))
    assert batch.padded is not None and isinstance(batch.cells, torch.Tensor)
    t, n = len(batch.padded) // batch.s, len(batch.cells) // batch.s
    seen = torch.arange(n, device=batch.cells.device) >= before[0][:, None]
    return batch._replace(seen=seen[:, None].expand(-1, t, -1))


def _normed(x: torch.Tensor, weight: torch.Tensor, c: ModelConfig) -> torch.Tensor:
    """float32; one kernel on a GPU."""
    return F.rms_norm(x.float(), weight.shape, weight, c.rms_eps)


def _projected(
    x: torch.Tensor, layer: GpuLayer, c: ModelConfig, turns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [n, n_head, qk_head] and what the cache keeps [n, kv_lora + qk_rope], both turned, of normed x [n, d]."""
    if isinstance(layer.q, tuple):
        q_a, norm, q_b = layer.q
        query = q_b(_normed(q_a(x), norm, c).to(x.dtype))
    else:
        query = layer.q(x)
    query = query.view(len(x), c.n_head, c.qk_head)
    latent, key = layer.kv_a(x).split([c.kv_lora, c.qk_rope], dim=-1)
    turning = torch.cat((query[..., c.qk_nope :], key[:, None]), dim=1).float().unflatten(-1, (-1, 2))
    turned = torch.view_as_real(torch.view_as_complex(turning) * turns).flatten(2).to(x.dtype)
    query[..., c.qk_nope :] = turned[:, :-1]
    return query, torch.cat((_normed(latent, layer.kv_a_norm, c).to(x.dtype), turned[:, -1]), dim=-1)


def attention(h: torch.Tensor, layer: GpuLayer, c: ModelConfig, cache: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """As `layers.attention` of each piece: h float32 [n, d] -> [n, d]. cache: the layer's, [n_slots, rows, kv_lora +
    qk_rope]."""
    x = _normed(h, layer.attn_norm, c).to(cache.dtype)
    query, kept = _projected(x, layer, c, pieces.turns)
    flat, widths = cache.view(-1, cache.shape[-1]), [c.kv_lora, c.qk_rope]
    flat.index_copy_(0, pieces.cells, kept)
    k_b, v_b = layer.k_b.dense(), layer.v_b.dense()
    values = x.new_empty(len(x), c.n_head, c.v_head)
    for batch in pieces.first:
        latent, key = batch.take(kept).split(widths, dim=-1)
        batch.put(expanded(batch.take(query), latent, key, (k_b, v_b), c.softmax_scale), values)
    for batch in pieces.later:
        nope, turned = batch.take(query).split([c.qk_nope, c.qk_rope], dim=-1)
        asked = torch.einsum("sthn,hcn->sthc", nope, k_b)
        latent, key = flat[batch.cells].unflatten(0, (batch.s, -1)).split(widths, dim=-1)
        mixed = absorbed(asked, turned, latent, key, c.softmax_scale, batch.seen)
        batch.put(torch.einsum("sthc,hvc->sthv", mixed, v_b), values)
    return layer.output(values.flatten(1))


def feed_forward(
    h: torch.Tensor, layer: GpuLayer, between: "Between", c: ModelConfig, experts: Experts | None, dtype: torch.dtype
) -> torch.Tensor:
    """As `layers.feed_forward`: h float32 [n, d] -> [n, d]. experts: the routed ones; None without. dtype: what is
    multiplied."""
    normed, feed = _normed(h, layer.ffn_norm, c), None if layer.feed is None else Feed(*layer.feed)
    x = normed.to(dtype)
    if layer.router is None or experts is None:
        return x.new_zeros(()) if feed is None else feed(x)
    ids, weight, _ = between.route(normed, layer.router)
    del normed  # experts want its memory
    out = experts(x, ids.long(), weight)
    return out if feed is None else out.add_(feed(x))
