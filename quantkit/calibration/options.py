"""What a calibration measures, and how much text it takes where nobody says.

Error feedback needs some tokens for each dimension of an expert's input (docs/results/encoders.md). A token goes to
n_used of a layer's n_expert, so R1 needs 917,504 for PER_DIMENSION. A pass on a GPU waits for the disk until computing
takes longer: at 2.5 GB/s R1's 688 GB take 275 s, in which GPU_RATE is 410,000 tokens of 74 GFLOP.
"""

from dataclasses import dataclass, field, replace

import torch

from quantkit.calibration.corpus import Chunks, TextChoice
from quantkit.calibration.state import EVERY, LARGE
from quantkit.models import family
from quantkit.models.config import ModelConfig
from quantkit.progress import say
from quantkit.runtime.memory import RAM_SHARE, machine_memory, memory
from quantkit.runtime.rates import CPU_RATE, DISK_RATE, GPU_RATE, active_weights
from quantkit.runtime.room import Place
from quantkit.runtime.stream import Source
from quantkit.sizes import both_units

LEAST = 131072
LARGE_WEIGHTS = 10**10
PER_DIMENSION = 4
ADVICE = (
    "--data HuggingFaceFW/fineweb-edu:sample-10BT "
    "--data 'math=open-r1/OpenR1-Math-220k:default:train:{problem} {generations[0]}'"
)


@dataclass(frozen=True)
class Calibration:
    """How to measure.

    min_expert_tokens: experts with fewer are filled up with the layer's mean statistics. expert_tokens: keep drawing
    text until every expert saw that many (0: one pass over the chosen tokens). memory: limit in bytes on the device.
    hidden: where hidden states live (default: the first of device, RAM and disk that has room).
    """

    text: TextChoice = field(default_factory=TextChoice)
    min_expert_tokens: int = 32
    expert_tokens: int = 0
    memory: int | None = None
    hidden: Place | None = None


def wanted(config: ModelConfig) -> int:
    """Tokens of which PER_DIMENSION for each dimension reach the experts of a layer, used alike."""
    if not config.n_moe:
        return LEAST
    return max(LEAST, -(-PER_DIMENSION * config.d * config.n_expert // config.n_used))


def sized(choice: TextChoice, config: ModelConfig, device: torch.device, limit: int | None = None) -> TextChoice:
    """With a number of tokens: as given, else LEAST on a CPU, and on a GPU what is `wanted`, or less if neither it nor
    RAM has room. limit: bytes of GPU memory, as given. A machine decides the same whenever it is asked."""
    if choice.n_tokens is not None:
        return choice
    n_tokens = LEAST
    if device.type == "cuda":
        need = memory(config, torch.bfloat16, torch.bfloat16)
        total = limit or torch.cuda.get_device_properties(device).total_memory
        there, beside = need.most_tokens(total), need.most_tokens(total, "ram")
        in_ram = int(RAM_SHARE * machine_memory()) // need.per_token
        n_tokens = max(LEAST, min(wanted(config), max(there, min(beside, in_ram))))
    return replace(choice, n_tokens=-(-n_tokens // choice.chunk) * choice.chunk)


def check_length(chunks: Chunks, choice: TextChoice, source: Source) -> None:
    """Says so if the text has clearly less than was chosen to be taken for the model's experts; and what the pass over
    a large model will take."""
    found, config = chunks.tokens.numel(), source.config
    if choice.n_tokens and found < 0.9 * min(choice.n_tokens, wanted(config)):
        each = found * config.n_used / (config.n_expert * config.d) if config.n_moe else 0
        say(
            f"warning: the text has {found:,} tokens of {choice.n_tokens:,}, {each:.1f} for each dimension of an "
            f"expert's input; give more, such as {ADVICE}"
        )
    if (read := sum(spec.n_rows * spec.n_in for spec in family.specs(config))) > LARGE_WEIGHTS:
        rate, hidden = GPU_RATE if source.device.type == "cuda" else CPU_RATE, 2 * found * config.width
        saved = config.n_layer // EVERY if hidden > LARGE else config.n_layer
        seconds = max(read / DISK_RATE, 2 * found * active_weights(config) / rate) + saved * hidden / DISK_RATE
        say(
            f"{found:,} tokens: {both_units(2 * hidden)} of disk for the state, and about {seconds / 60:,.0f} minutes "
            f"to read and compute on a fast {'GPU' if source.device.type == 'cuda' else 'CPU'}, encoding not counted"
        )
