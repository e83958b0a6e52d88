"""What a streaming pass needs in memory, what there is, and the room for its hidden states that follows."""

from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit import machine, ranks
from quantkit.errors import QuantkitError
from quantkit.models.config import ModelConfig
from quantkit.progress import say
from quantkit.runtime.forms import SCORE_ELEMENTS
from quantkit.runtime.room import Place, Room
from quantkit.runtime.stream import ATTENTION_TOKENS, Source
from quantkit.sizes import both_units

HIDDEN_BYTES = 2 << 30  # hidden states beyond this are kept in bfloat16
RAM_SHARE = 0.7  # of the machine's memory for hidden states of a GPU's pass
BASE_BYTES = 1 << 30  # Python, torch and their libraries


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
        """That fit into `limit` bytes there."""
        return max(0, (limit - self.fixed) // (self.total(1, place) - self.fixed))

    def __add__(self, more: "Memory") -> "Memory":
        return Memory(self.fixed + more.fixed, self.beside + more.beside, self.per_token + more.per_token)


def memory(config: ModelConfig, compute: torch.dtype, hidden: torch.dtype) -> Memory:
    """An upper estimate. Per token: hidden state, normed input, sum of experts. Fixed: weights and tiles."""
    c, size = config, compute.itemsize
    q = c.d * c.q_lora + c.q_lora * c.n_head * c.qk_head if c.q_lora else c.d * c.n_head * c.qk_head
    attn = q + c.d * (c.kv_lora + c.qk_rope) + c.n_head * c.v_head * c.d
    attn += 2 * c.n_head * (c.qk_nope + c.v_head) * c.kv_lora
    if c.compression is not None:  # no kv_b; output in two steps; compressors; mixing of streams, float32
        attn = q + 7 * c.d * c.qk_head + c.compression.lora * (c.n_head * c.v_head + c.compression.n_group * c.d)
        attn += 2 * 24 * c.width
    feed = 3 * c.d * max(c.n_ff if c.n_dense else 0, c.n_ff_exp * c.n_shared)
    weights = 2 * (attn + feed) * size + 2 * 3 * c.d * c.n_ff_exp * max(4, size)
    tile = ATTENTION_TOKENS * c.n_head * (2 * c.qk_head + 3 * (c.kv_lora + c.qk_rope)) * size + 3 * SCORE_ELEMENTS * 4
    ffn = ATTENTION_TOKENS * (c.n_ff if c.n_dense else c.n_ff_exp) * 3 * size
    routing = c.n_used * 24 + c.n_expert * 12  # ids, weights, sort; scores of all experts
    return Memory(BASE_BYTES + weights + tile + ffn, routing, (c.width + c.d) * hidden.itemsize + c.d * size)


def choose_place(
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
    least = f"no tokens fit: this model needs {both_units(need.fixed)}"
    advice = f"at most {most:,} tokens fit" if most else least
    raise QuantkitError(
        f"{n_tokens:,} tokens need {both_units(need.total(n_tokens, place))}, but {option} is {both_units(limit)}; "
        f"{advice}"
    )


def memory_limit(given: int | None, device: torch.device) -> tuple[int, str]:
    """Bytes that a pass may use where its tensors live (as given, or what there is), and what the limit is called."""
    if given is not None:
        return given, "--memory"
    if device.type == "cuda":
        return machine.free_vram(device), "free GPU memory"
    return machine_memory(), "this machine's memory"


def machine_memory() -> int:
    """This rank's share of it, bytes."""
    return machine.ram() // ranks.local_count()


@dataclass(frozen=True)
class Limits:
    """memory: bytes that a pass may take on its device (None: what there is). place: where its hidden states live
    (None: the first of device, RAM and disk that has room). folder: for those on disk. beside: tokens of another pass
    that runs along, in float32, with weights of its own in memory."""

    memory: int | None
    place: Place | None
    folder: Path
    beside: int = 0


def room_for(source: Source, n_tokens: int, limits: Limits, more: Memory = Memory(0, 0, 0)) -> Room:
    """The hidden states' room: float32 while they are small. Refuses a pass that fits nowhere.

    more: what it needs besides what a forward pass does."""
    hidden_dtype = torch.float32 if n_tokens * source.config.width * 4 <= HIDDEN_BYTES else torch.bfloat16
    need = memory(source.config, source.dtype, hidden_dtype) + more
    limit, option = memory_limit(limits.memory, source.device)
    if limits.beside:
        limit -= memory(source.config, source.dtype, torch.float32).total(limits.beside) - BASE_BYTES
        option += ", less what the evaluation's pass needs,"
    on_gpu = source.device.type != "cpu"
    place = choose_place(need, n_tokens, limits.place, limit, option, machine_memory(), on_gpu)
    if place != "device":
        say(
            f"hidden states of {n_tokens:,} tokens ({both_units(need.per_token * n_tokens)}) live "
            f"{'on disk' if place == 'disk' else 'in RAM'}"
        )
    return Room(place, source.device, limits.folder, hidden_dtype)
