"""A layer of DeepSeek-V4: attention to a window and to compressed entries, and the feed-forward, between streams.

A head's key is its value, one for all heads. Besides the window a layer sees one entry for every 4 or 128 tokens so
far: a mean of theirs, weighed number by number. Of the entries of 4 tokens an indexer chooses the best, if there are
more than its top-k. Whole chunks from their first token on; or, with a cache, tokens after those that it holds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from quantkit.models.config import ModelConfig
from quantkit.runtime.compressed_cache import Blocks, CompressedCache
from quantkit.runtime.forms import QUERY_TILE, SCORE_ELEMENTS
from quantkit.runtime.layers import Feed, LayerExperts, LayerWeights, Linear, Router, See, rms_norm, token_weight
from quantkit.runtime.pauses import pause
from quantkit.runtime.rope import angles, turning
from quantkit.runtime.rotation import Angles, rotate_last, unit_rms
from quantkit.runtime.streams import Mixing, mix, taken_up
from quantkit.runtime.swiglu import swiglu
from quantkit.runtime.watch import Watcher


@dataclass
class Entries:
    """What makes an entry of `ratio` tokens: kv and gate [m, d] -> [m, width], or twice that where an entry reaches
    into the block before; ape float32 [ratio, the same]; norm float32 [width]."""

    kv: Linear
    gate: Linear
    ape: torch.Tensor
    norm: torch.Tensor

    @property
    def ratio(self) -> int:
        """Tokens to an entry."""
        return len(self.ape)


@dataclass
class Chooser:
    """The indexer of a layer: q_b [m, q_lora] -> [m, n_head width], proj float32 [n_head, d], and entries of its own,
    of which each token attends to the top_k."""

    q_b: Linear
    proj: torch.Tensor
    entries: Entries
    top_k: int


@dataclass
class LimitedFeed(Feed):
    """A shared expert whose gate and up are cut off (see `swiglu`)."""

    limit: float | None = None

    def activated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """As `Feed`."""
        return swiglu(gate, up, self.limit)


@dataclass
class CompressedLayer:
    """The weights of one layer, as callables and small tensors. output_a: [m, groups, n_head width / groups] ->
    [m, groups lora]; sinks float32 [n_head]. dtype: of what is multiplied. entries: of layers that compress; chooser:
    of those that choose among them."""

    attn_norm: torch.Tensor
    q: tuple[Linear, torch.Tensor, Linear]
    kv: Linear
    kv_norm: torch.Tensor
    sinks: torch.Tensor
    output_a: Linear
    output_b: Linear
    ffn_norm: torch.Tensor
    feed: Feed | None
    router: Router | None
    experts: LayerExperts | None
    attn_mixing: Mixing
    ffn_mixing: Mixing
    dtype: torch.dtype
    entries: Entries | None = None
    chooser: Chooser | None = None

    def attend(self, hidden: torch.Tensor, config: ModelConfig, n_chunks: int, watcher: Watcher | None) -> None:
        """The attention half of a layer, in place on streams hidden [n_chunk, t, n d], so many chunks at a time."""
        device = self.attn_norm.device
        for part in hidden.split(n_chunks):
            streams = part.to(device).flatten(0, 1)
            mixed = mix(streams, self.attn_mixing, config)
            see = None if watcher is None else partial(_see, watcher, token_weight(streams))
            y = attention(mixed.x.view(*part.shape[:2], -1), self, config, see)
            part.copy_(taken_up(streams, y.flatten(0, 1), mixed).view_as(part))

    def ffn_inputs(self, hidden: torch.Tensor, config: ModelConfig, out: torch.Tensor, n_tokens: int) -> None:
        """Normed inputs of the feed-forward into out [m, d], of streams hidden [m, n d], so many tokens at a time."""
        for to, part in zip(out.split(n_tokens), hidden.split(n_tokens), strict=True):
            x = mix(part.to(self.ffn_norm.device), self.ffn_mixing, config).x
            to.copy_(rms_norm(x, self.ffn_norm, config.rms_eps))

    def take_up(self, hidden: torch.Tensor, y: torch.Tensor, config: ModelConfig, n_tokens: int) -> None:
        """The feed-forward's output y [m, d] into streams hidden [m, n d], in place. These are mixed again, which costs
        less than to keep what the feed-forward was computed on."""
        device = self.ffn_norm.device
        for part, own in zip(hidden.split(n_tokens), y.split(n_tokens), strict=True):
            streams = part.to(device)
            part.copy_(taken_up(streams, own.to(device), mix(streams, self.ffn_mixing, config)))


Layer = LayerWeights | CompressedLayer
"""The weights of one layer of any family."""


@dataclass(frozen=True)
class Parts:
    """Where a layer's weights come from, by role (`attn_q_a`): matrices to multiply by in the compute dtype, those of
    which so many groups of rows have inputs of their own, float32 vectors. Routed experts and the router come as they
    are made elsewhere."""

    linear: Callable[[str], Linear]
    grouped: Callable[[str, int], Linear]
    vector: Callable[[str], torch.Tensor]
    dtype: torch.dtype


def built(config: ModelConfig, layer: int, parts: Parts, router: Router, experts: LayerExperts) -> CompressedLayer:
    """A layer of a checkpoint or of a file."""
    c, how = config, config.compression
    assert how and c.indexer
    linear, vector = parts.linear, parts.vector

    def mixing(half: str) -> Mixing:
        return Mixing(*(vector(f"hc_{half}_{part}") for part in ("fn", "base", "scale")))

    def entries(role: str) -> Entries:
        kv, gate = linear(f"{role}_kv"), linear(f"{role}_gate")
        return Entries(kv, gate, vector(f"{role}_ape"), vector(f"{role}_norm"))

    chooser = None
    if c.indexer.full[layer]:
        proj, own = vector("indexer.proj"), entries("indexer_compressor")
        chooser = Chooser(linear("indexer.attn_q_b"), proj, own, c.indexer.top_k)
    feed = None
    if c.n_shared:
        gate, up, down = (linear(f"ffn_{part}_shexp") for part in ("gate", "up", "down"))
        feed = LimitedFeed(gate, up, down, c.limit)
    return CompressedLayer(
        attn_norm=vector("attn_norm"),
        q=(linear("attn_q_a"), vector("attn_q_a_norm"), linear("attn_q_b")),
        kv=linear("attn_kv"),
        kv_norm=vector("attn_kv_a_norm"),
        sinks=vector("attn_sinks"),
        output_a=parts.grouped("attn_output_a", how.n_group),
        output_b=linear("attn_output_b"),
        ffn_norm=vector("ffn_norm"),
        feed=feed,
        router=router,
        experts=experts,
        attn_mixing=mixing("attn"),
        ffn_mixing=mixing("ffn"),
        dtype=parts.dtype,
        entries=entries("attn_compressor") if how.ratios[layer] else None,
        chooser=chooser,
    )


def by_groups(matrix: torch.Tensor, n: int) -> Linear:
    """Products of a matrix [n_out, n_in] whose n equal groups of rows have inputs of their own: x [m, n, n_in] ->
    [m, n_out]."""
    groups = matrix.view(n, -1, matrix.shape[-1])
    return lambda x: torch.einsum("ngi,goi->ngo", x, groups).flatten(1)


def _see(watcher: Watcher, weight: torch.Tensor, role: str, x: torch.Tensor) -> None:
    """x [n, n_in], or [n, groups, n_in] of a matrix that all groups' rows go through."""
    if x.ndim == 3:
        weight, x = weight.repeat_interleave(x.shape[1]), x.flatten(0, 1)
    watcher.observe(role, x, weight)


# Attention


def attention(
    h: torch.Tensor,
    layer: CompressedLayer,
    config: ModelConfig,
    see: See | None = None,
    cache: CompressedCache | None = None,
) -> torch.Tensor:
    """Output of the attention for h [n_seq, t, d]: tokens from position 0 on, or of one sequence after the cache's."""
    (n_seq, t, d), c = h.shape, config
    begin = cache.length if cache else 0
    if cache is None:
        far = angles(turning(c, layer.entries is not None), torch.arange(t, device=h.device))
    else:
        far = cache.upto(begin + t)
    turns = Angles(far.cos[begin : begin + t], far.sin[begin : begin + t])
    x = rms_norm(h, layer.attn_norm, c.rms_eps).reshape(-1, d).to(layer.dtype)
    q_a, q_norm, q_b = layer.q
    low = rms_norm(q_a(x), q_norm, c.rms_eps)
    q = unit_rms(q_b(low).view(n_seq, t, c.n_head, c.qk_head), c.rms_eps)
    q = rotate_last(q, turns.cos[:, None], turns.sin[:, None])
    kv = rms_norm(layer.kv(x), layer.kv_norm, c.rms_eps).view(n_seq, t, -1)
    kv = rotate_last(kv, turns.cos, turns.sin)
    if see:
        _tell(see, layer, x, low)
    if cache is not None:
        kv = cache.append(kv)
    found, mask = None, None
    if layer.entries is not None:
        found = compressed(x.view(n_seq, t, d), layer.entries, far, c.rms_eps, cache.blocks if cache else None)
        if layer.chooser is not None and (cache is None or cache.index is not None):
            index = cache.index if cache else None
            mask = chosen(x.view(n_seq, t, d), low, layer.chooser, (far, begin), c, index)
    mixed = _attended((q, begin), kv, found, mask, layer, c)
    mixed = rotate_last(mixed, turns.cos[:, None], -turns.sin[:, None])
    assert c.compression
    grouped = mixed.reshape(n_seq * t, c.compression.n_group, -1)
    values = layer.output_a(grouped)
    if see:
        see("attn_output_a", grouped)
        see("attn_output_b", values)
    return layer.output_b(values).view(n_seq, t, d)


def _tell(see: See, layer: CompressedLayer, x: torch.Tensor, low: torch.Tensor) -> None:
    roles = ["attn_q_a", "attn_kv"]
    roles += ["attn_compressor_kv", "attn_compressor_gate"] if layer.entries else []
    roles += ["indexer_compressor_kv", "indexer_compressor_gate"] if layer.chooser else []
    for role in roles:
        see(role, x)
    for role in ["attn_q_b", *(["indexer.attn_q_b"] if layer.chooser else [])]:
        see(role, low)


def compressed(x: torch.Tensor, how: Entries, turns: Angles, eps: float, kept: Blocks | None = None) -> torch.Tensor:
    """Entries of all whole blocks of tokens, [n_seq, t // ratio, width], of normed inputs x [n_seq, t, d] from position
    0 on; or, of one sequence, those `kept` and those that x brings after them. turns: of all positions so far. Of two
    widths the first are for the block that follows, the second for the tokens' own."""
    (n_seq, t, _), ratio, width = x.shape, how.ratio, len(how.norm)
    n = t // ratio
    if kept is None and not n:
        return x.new_empty(n_seq, 0, width)
    rows = x.flatten(0, 1) if kept else x[:, : n * ratio].flatten(0, 1)
    kv, gate = (linear(rows).float().view(n_seq, len(rows) // n_seq, -1) for linear in (how.kv, how.gate))
    first = lead = 0
    if kept is not None:
        first = kept.n
        kv, gate, lead = kept.take(kv, gate)
        if not kv.shape[1]:  # no block has become whole
            return kept.entries[:, :first]
        n = kv.shape[1] // ratio - lead
    kv, gate = (value.view(n_seq, lead + n, ratio, -1) for value in (kv, gate))
    gate = gate + how.ape
    if kv.shape[-1] > width:
        kv = torch.cat((_block_before(kv, lead, width, 0.0), kv[:, lead:, :, width:]), dim=2)
        gate = torch.cat((_block_before(gate, lead, width, float("-inf")), gate[:, lead:, :, width:]), dim=2)
    entries = rms_norm((kv * gate.softmax(2)).sum(2), how.norm, eps)
    at = slice(first * ratio, (first + n) * ratio, ratio)
    entries = rotate_last(entries, turns.cos[at], turns.sin[at]).to(x.dtype)
    return entries if kept is None else kept.add(entries)


def _block_before(rows: torch.Tensor, lead: int, width: int, none: float) -> torch.Tensor:
    """What each block gets of the one before, of rows [n_seq, lead + n, ratio, 2 width] -> [n_seq, n, ratio, width];
    the first of a text gets `none`."""
    if lead:
        return rows[:, :-1, :, :width]
    return F.pad(rows[:, :-1, :, :width], (0, 0, 0, 0, 1, 0), value=none)


@torch.no_grad()
def chosen(
    x: torch.Tensor,
    low: torch.Tensor,
    how: Chooser,
    place: tuple[Angles, int],
    config: ModelConfig,
    kept: Blocks | None = None,
) -> torch.Tensor | None:
    """Which entries each token attends to, bool [n_seq, t, n]; None for all before it. x [n_seq, t, d]: normed inputs;
    low [n_seq t, q_lora]: what queries come from. place: angles of all positions so far, and where x begins. kept: the
    indexer's own entries of what is before."""
    (n_seq, t, d), n_head, width = x.shape, len(how.proj), len(how.entries.norm)
    far, first = place
    n = (first + t) // how.entries.ratio
    if kept is None and n <= how.top_k:
        return None
    entries = compressed(x, how.entries, far, config.rms_eps, kept)
    if n <= how.top_k:
        return None
    turns = Angles(far.cos[first : first + t], far.sin[first : first + t])
    query = rotate_last(how.q_b(low).float().view(n_seq, t, n_head, width), turns.cos[:, None], turns.sin[:, None])
    share = (x.reshape(-1, d).float() @ how.proj.T).view(n_seq, t, 1, n_head) * (n_head * width) ** -0.5
    by_key = entries.float().transpose(1, 2)
    mask = torch.zeros(n_seq, t, n, dtype=torch.bool, device=x.device)
    block = torch.arange(n, device=x.device)
    step = max(1, SCORE_ELEMENTS // (n_seq * n_head * n))
    for begin in range(0, t, step):
        end = min(begin + step, t)
        scores = (query[:, begin:end].flatten(1, 2) @ by_key).relu_().view(n_seq, end - begin, -1, n)
        scores = (share[:, begin:end] @ scores)[:, :, 0]
        seen = torch.arange(first + begin + 1, first + end + 1, device=x.device) // how.entries.ratio
        later = block >= seen[:, None]
        best = scores.masked_fill_(later, float("-inf")).topk(how.top_k, dim=-1).indices
        mask[:, begin:end].scatter_(-1, best, True).logical_and_(~later)
        pause(x.device, "a tile of scores")
    return mask


def _attended(
    asked: tuple[torch.Tensor, int],
    kv: torch.Tensor,
    entries: torch.Tensor | None,
    mask: torch.Tensor | None,
    layer: CompressedLayer,
    config: ModelConfig,
) -> torch.Tensor:
    """Softmax over the window, the entries before it and a sink that takes its share and gives nothing; in tiles of
    queries. asked: q [s, t, h, w], and the position of the first; kv [s, m, w], of whose positions the queries' are the
    last, entries [s, n, w], mask bool [s, t, n] -> [s, t, h, w]."""
    assert config.compression
    q, before = asked
    (n_seq, t, n_head, _), window = q.shape, config.compression.window
    n, left_out = 0 if entries is None else entries.shape[1], before + t - kv.shape[1]
    out = torch.empty_like(q)
    step = max(1, min(QUERY_TILE, SCORE_ELEMENTS // (n_seq * n_head * (window + QUERY_TILE + n))))
    sinks = layer.sinks.view(1, 1, n_head, 1)
    for begin in range(0, t, step):
        end = min(begin + step, t)
        first, last = max(0, before + begin - window + 1), before + end
        keys = kv[:, first - left_out : last - left_out]
        position = torch.arange(before + begin, last, device=q.device)[:, None]
        column = torch.arange(first, last, device=q.device)
        hidden = ((column > position) | (column <= position - window))[None]
        if entries is not None and layer.entries is not None:
            whole = last // layer.entries.ratio
            keys = torch.cat((keys, entries[:, :whole]), dim=1)
            later = (torch.arange(whole, device=q.device) >= (position + 1) // layer.entries.ratio)[None]
            later = later if mask is None else later | ~mask[:, begin:end, :whole]
            hidden = torch.cat((hidden.expand(len(later), -1, -1), later), dim=-1)
        scores = (q[:, begin:end].flatten(1, 2) @ keys.transpose(1, 2)).float().mul_(config.softmax_scale)
        scores = scores.view(n_seq, end - begin, n_head, -1).masked_fill_(hidden[:, :, None], float("-inf"))
        scores = torch.cat((scores, sinks.expand(n_seq, end - begin, -1, -1)), dim=-1).softmax(-1)[..., :-1]
        out[:, begin:end] = (scores.to(q.dtype).flatten(1, 2) @ keys).view(n_seq, end - begin, n_head, -1)
        pause(q.device, "a tile of attention")
    return out
