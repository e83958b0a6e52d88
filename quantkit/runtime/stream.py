"""Layer-synchronous execution: all tokens pass through layer 0, then 1, ...; each layer's weights are read once.

Besides the hidden states only one layer's attention and shared weights (and the next one's, being read) and two routed
experts are in memory, whatever the number of layers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from tokenizers import Tokenizer

from quantkit.errors import QuantkitError
from quantkit.models.config import DeepseekConfig
from quantkit.runtime.ahead import read_ahead
from quantkit.runtime.layers import (
    SCORE_ELEMENTS,
    Block,
    Linear,
    Observer,
    attention,
    feed_forward,
    rms_norm,
    token_weight,
)
from quantkit.runtime.room import Place, Room
from quantkit.runtime.rope import angles

ATTENTION_TOKENS = 2048  # tokens whose attention is computed together
HEAD_ELEMENTS = 1 << 25  # logits held at once: 128 MB as float32
RAM_SHARE = 0.7  # of the machine's memory for hidden states of a GPU's pass
BASE_BYTES = 1 << 30  # Python, torch and their libraries


class Source(Protocol):
    """A model whose layers can be loaded one at a time. device, dtype: of its matrices and their products."""

    name: str
    config: DeepseekConfig
    device: torch.device
    dtype: torch.dtype

    def tokenizer(self) -> Tokenizer:
        """The model's own."""

    def fingerprint(self) -> str:
        """Changes if the weights do."""

    def embed(self, tokens: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """tokens int64 [...] -> [..., d] in `out` (default: new, float32 on the device)."""

    def layer(self, layer: int) -> Block:
        """A layer's weights."""

    def head(self) -> tuple[torch.Tensor, Linear]:
        """Output norm and output matrix."""

    def output_norm(self) -> torch.Tensor:
        """float32 [d]."""

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the output matrix, [stop - start, d] in `dtype`."""


@dataclass
class Layer:
    """One step of the stream: the block that was applied to hidden [n_chunk, t, d] in place."""

    index: int
    block: Block
    hidden: torch.Tensor


Before = Callable[[int, Block], Observer | None]
"""Called with a freshly loaded block; may attach observers to it and returns the observer of its inputs."""


class Buffers:
    """The arrays of a pass, made once in its room: hidden [n_chunk, t, d], and inputs and sums of the feed-forward."""

    def __init__(self, room: Room, shape: tuple[int, ...], hidden: torch.dtype, compute: torch.dtype):
        self.hidden = room.empty(shape, hidden)
        self.inputs = room.empty((shape[0] * shape[1], shape[2]), compute)
        # A float32 sum for float32 hidden states; bfloat16 ones (large jobs) are summed as R1's own inference does.
        self.sums = room.empty((shape[0] * shape[1], shape[2]), hidden)


def stream(
    source: Source,
    tokens: torch.Tensor,
    before: Before | None = None,
    *,
    hidden: torch.Tensor | None = None,
    start: int = 0,
    hidden_dtype: torch.dtype = torch.float32,
    room: Room | None = None,
) -> Iterator[Layer]:
    """Run tokens int64 [n_chunk, t] (independent chunks) through all layers, yielding after each.

    hidden, start: resume with these states before layer `start`. hidden_dtype: bfloat16 saves memory in large jobs.
    room: where hidden states live (default: on the source's device).
    """
    room = room or Room("device", source.device)
    buffers = Buffers(room, (*tokens.shape, source.config.d), hidden_dtype, source.dtype)
    if hidden is None:
        source.embed(tokens, out=buffers.hidden)
    else:
        buffers.hidden.copy_(hidden)
    hidden = buffers.hidden
    cos, sin = angles(source.config, torch.arange(tokens.shape[1], device=source.device))
    for index, block in enumerate(read_ahead(source.layer, range(start, source.config.n_layer)), start):
        apply_block(buffers, block, source, cos, sin, before(index, block) if before else None)
        yield Layer(index, block, hidden)


def apply_block(
    buffers: Buffers,
    block: Block,
    source: Source,
    cos: torch.Tensor,
    sin: torch.Tensor,
    observe: Observer | None = None,
) -> None:
    """One layer, in place, on buffers.hidden [n_chunk, t, d]."""
    hidden = buffers.hidden
    apply_attention(hidden, block, source.config, cos, sin, observe)
    x = ffn_input(hidden, block, source, buffers.inputs)
    weight = torch.cat([token_weight(part.to(source.device)) for part in hidden.split(1)]) if observe else None
    flat = hidden.view(-1, hidden.shape[-1])
    flat += feed_forward(x, block, source.config, observe, weight, buffers.sums)


def apply_attention(
    hidden: torch.Tensor,
    block: Block,
    config: DeepseekConfig,
    cos: torch.Tensor,
    sin: torch.Tensor,
    observe: Observer | None = None,
) -> None:
    """The attention half of a layer, in place, a few chunks at a time."""
    step = max(1, ATTENTION_TOKENS // hidden.shape[1])
    for part in hidden.split(step):
        part += attention(part.to(cos.device), block, config, cos, sin, observe=observe).to(part.device)


def ffn_input(hidden: torch.Tensor, block: Block, source: Source, out: torch.Tensor | None = None) -> torch.Tensor:
    """Normed input of the feed-forward for all tokens, [n, d] in the compute dtype, where `hidden` is."""
    if out is None:
        shape = (hidden.shape[0] * hidden.shape[1], hidden.shape[2])
        out = torch.empty(shape, dtype=source.dtype, device=hidden.device)
    for to, part in zip(out.split(ATTENTION_TOKENS), hidden.view_as(out).split(ATTENTION_TOKENS), strict=True):
        to.copy_(rms_norm(part.to(source.device), block.ffn_norm, source.config.rms_eps))
    return out


def final_hidden(
    source: Source,
    tokens: torch.Tensor,
    progress: Callable[[int], None] | None = None,
    hidden_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Hidden states after the last layer, [n_chunk, t, d], before the output norm."""
    hidden = None
    for layer in stream(source, tokens, hidden_dtype=hidden_dtype):
        hidden = layer.hidden
        if progress:
            progress(layer.index)
    assert hidden is not None
    return hidden


def logit_tiles(source: Source, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
    """float32 logits of hidden [n, d] in tiles of rows; nothing of size tokens x vocabulary is ever held."""
    yield from head_tiles(source, source.head(), hidden)


def head_tiles(source: Source, head: tuple[torch.Tensor, Linear], hidden: torch.Tensor) -> Iterator[torch.Tensor]:
    """`logit_tiles` with a head that is already loaded: (output norm, output matrix)."""
    step = max(1, HEAD_ELEMENTS // source.config.n_vocab)
    for part in hidden.split(step):
        yield head_logits(source, head, part)


def head_logits(source: Source, head: tuple[torch.Tensor, Linear], hidden: torch.Tensor) -> torch.Tensor:
    """float32 logits [..., n_vocab] of hidden [..., d], all at once."""
    norm, output = head
    return output(rms_norm(hidden, norm, source.config.rms_eps).to(source.dtype)).float()


@dataclass(frozen=True)
class Memory:
    """Bytes that a streaming pass needs: where the weights are, besides the tokens; for each token there; and for each
    token wherever the room of the hidden states is."""

    fixed: int
    beside: int
    per_token: int

    def total(self, n_tokens: int, place: Place = "device") -> int:
        """On the device of the weights (the RAM, if that is the CPU)."""
        return self.fixed + n_tokens * (self.beside + (self.per_token if place == "device" else 0))

    def most_tokens(self, limit: int, place: Place = "device") -> int:
        return max(0, (limit - self.fixed) // (self.total(1, place) - self.fixed))


def memory(config: DeepseekConfig, compute: torch.dtype, hidden: torch.dtype) -> Memory:
    """An upper estimate. Per token: hidden state, normed input, sum of experts. Fixed: weights and tiles."""
    c, size = config, compute.itemsize
    q = c.d * c.q_lora + c.q_lora * c.n_head * c.qk_head if c.q_lora else c.d * c.n_head * c.qk_head
    attn = q + c.d * (c.kv_lora + c.qk_rope) + c.n_head * c.v_head * c.d
    attn += 2 * c.n_head * (c.qk_nope + c.v_head) * c.kv_lora
    feed = 3 * c.d * max(c.n_ff if c.n_dense else 0, c.n_ff_exp * c.n_shared)
    weights = 2 * (attn + feed) * size + 2 * 3 * c.d * c.n_ff_exp * max(4, size)
    tile = ATTENTION_TOKENS * c.n_head * (2 * c.qk_head + 3 * (c.kv_lora + c.qk_rope)) * size + 3 * SCORE_ELEMENTS * 4
    ffn = ATTENTION_TOKENS * (c.n_ff if c.n_dense else c.n_ff_exp) * 3 * size
    routing = c.n_used * 24 + c.n_expert * 12  # ids, weights, sort; scores of all experts
    return Memory(BASE_BYTES + weights + tile + ffn, routing, c.d * (2 * hidden.itemsize + size))


def choose_room(
    need: Memory, n_tokens: int, wanted: Place | None, limit: int, option: str, ram: int, on_gpu: bool
) -> Place:
    """Where hidden states shall live. Refuses, before any work, tokens that fit nowhere, and says what would.

    limit: bytes for the pass where the weights are, called `option`; ram: the machine's memory. By default the first
    place that has room: where the weights are, the RAM beside a GPU, the disk.
    """
    places: list[Place] = [wanted] if wanted else ["device", "ram", "disk"] if on_gpu else ["device", "disk"]
    for place in places:
        fits = need.total(n_tokens, place) <= limit
        if fits and (place != "ram" or need.per_token * n_tokens <= RAM_SHARE * ram):
            return place
    place = places[-1]
    most = need.most_tokens(limit, place)
    least = f"no tokens fit: this model needs {need.fixed / 1e9:.1f} GB"
    advice = f"at most {most:,} tokens fit" if most else least
    more = "; --hidden disk needs less" if place != "disk" and most else ""
    raise QuantkitError(
        f"{n_tokens:,} tokens need {need.total(n_tokens, place) / 1e9:.1f} GB, but {option} is "
        f"{limit / 1e9:.1f} GB; {advice}{more}"
    )
