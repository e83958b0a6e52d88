"""What a job will read, write and take, said before its first byte; `make --dry-run` says only that.

Sizes are exact or upper estimates. Times are arithmetic from rates that were measured on single machines
(docs/results/encoders.md, docs/results/calibration.md): right within a factor of two or three, and said as `about`.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from quantkit import machine
from quantkit.calibration.options import DISK_RATE, GPU_RATE, active_weights
from quantkit.encoding.moments import FACTOR_COPIES, GROUP_SHARE
from quantkit.formats.int4 import PACKED
from quantkit.formats.tensor_table import weight_of
from quantkit.models import family
from quantkit.models.config import ModelConfig
from quantkit.runtime.memory import BASE_BYTES, HIDDEN_BYTES, RAM_SHARE, machine_memory, memory
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.sizes import both_units

if TYPE_CHECKING:
    from quantkit.job.options import Order

CORE_RATE = 4e10  # operations a second of one core in products of float32
ON_CPU = {"fast": 9e6, "normal": 2.5e6, "best": 1e6}  # weights a second and core, quantkit's encoders
ON_GPU = {"fast": 1.5e9, "normal": 0.62e9, "best": 73e6}
"""Weights a second of one H100 or H200, the whole pass. best: gate and up alone have 75 million."""
GGML = 4e6  # weights a second and core


@dataclass(frozen=True)
class Work:
    """What decides how long a job takes. tokens: of calibration, 0 if there is none; judged: of the evaluation."""

    config: ModelConfig
    n_weights: int
    tokens: int
    judged: int
    on_gpu: bool
    threads: int

    def seconds_to_encode(self, encoder: str, effort: str) -> float:
        """ggml encodes on the CPU always."""
        if encoder == "ggml":
            return self.n_weights / (GGML * self.threads)
        if self.on_gpu:
            return self.n_weights / ON_GPU[effort]
        factors = 0.0
        if effort != "fast":  # second moments of an expert's tokens, and their factor
            c = self.config
            each = sum(n**3 + 2 * n * n * self.tokens * c.n_used / max(1, c.n_expert) for n in (c.d, c.n_ff_exp))
            factors = c.n_moe * c.n_expert * each / (CORE_RATE * self.threads)
        return self.n_weights / (ON_CPU[effort] * self.threads) + factors

    def seconds_to_compute(self, n_tokens: int) -> float:
        """So many tokens through the model once."""
        rate = GPU_RATE if self.on_gpu else CORE_RATE * self.threads
        return 2 * n_tokens * active_weights(self.config) / rate

    def seconds(self, encoder: str, effort: str, n_bytes: int) -> float:
        """The whole job; n_bytes: read of the checkpoint in one pass."""
        read = n_bytes / DISK_RATE
        first = max(read, self.seconds_to_compute(self.tokens)) + self.seconds_to_encode(encoder, effort)
        return first + (max(read, 2 * self.seconds_to_compute(self.judged)) if self.judged else 0)


def forecast(order: "Order", source: CheckpointSource, n_bytes: int) -> list[str]:
    """Lines for `make`. n_bytes: of all files that it will write."""
    options, config, work = order.options, source.config, work_of(order, source)
    read = bytes_read(source)
    local, judged = not order.checkpoint.origin, bool(work.judged)
    way = ", once to measure and encode, once to compare" if judged and local else ""
    way = ", downloaded once" if not local else way
    state = hidden_bytes(config, work.tokens)
    disk = n_bytes * (2 if options.recover or options.baseline else 1) + 2 * state
    files = max(1, -(-n_bytes // options.split_max_bytes)) if options.split_max_bytes else 1
    lines = [
        f"encoder     {encoder_reason(order, work)}",
        f"reads       {both_units(read)} of {order.checkpoint.name}{way}",
        f"writes      {both_units(n_bytes)}, {files} file{'s' if files > 1 else ''} in {order.folder}",
        f"disk        {both_units(disk)} at most, {both_units(machine.free_disk(order.folder))} are free",
        *_memory_lines(order, work),
        f"time        about {rounded(work.seconds(order.encoder, options.effort, read))}{_machine_words(work)}",
    ]
    if options.recover:
        lines.append("            and recovery, which says itself how long a step takes")
    if options.baseline:
        seconds = work.seconds_to_encode("ggml", "normal") + 2 * (
            work.seconds_to_compute(work.judged) + read / DISK_RATE
        )
        lines.append(
            f"baseline    about {rounded(seconds)} more: {both_units(n_bytes)} of that disk until it is judged, "
            "and the original read twice more"
        )
    return lines


def work_of(order: "Order", source: CheckpointSource) -> Work:
    """The order in numbers."""
    options, calibrates = order.options, order.options.imatrix is None
    tokens = options.calibration.text.n_tokens or 0
    judged = (options.evaluation.n_tokens or 0) if options.verify else 0
    n_weights = sum(tensor.n_weights for tensor in order.plan.tensors)
    on_gpu = order.device != "cpu"
    return Work(source.config, n_weights, tokens if calibrates else 0, judged, on_gpu, machine.threads())


def encoder_reason(order: "Order", work: Work) -> str:
    """Which encoder packs the blocks, and why; what the better one would take, if it is not that."""
    options = order.options
    if options.imatrix:
        return "ggml, for --imatrix holds no second moments: about twice the KLD of quantkit's in the same bytes"
    if options.encoder != "auto":
        effort = f", effort {options.effort}" if order.encoder == "quantkit" else ""
        worse = ", as llama-quantize: about twice the KLD of quantkit's in the same bytes"
        return f"{order.encoder}{effort}, as asked" + (worse if order.encoder == "ggml" else "")
    if order.encoder == "quantkit":
        why = "on a GPU" if order.device != "cpu" else f"a small model, {work.n_weights / 1e6:,.0f} M weights"
        return f"quantkit, effort {options.effort}: {why}"
    times = {f"quantkit {effort}": rounded(work.seconds_to_encode("quantkit", effort)) for effort in ("normal", "fast")}
    others = ", ".join(f"--encoder quantkit --effort {name.split()[1]} {time}" for name, time in times.items())
    ggml = rounded(work.seconds_to_encode("ggml", options.effort))
    return f"ggml, a large model on a CPU: encodes in about {ggml}, with about twice the KLD; {others}"


def bytes_read(source: CheckpointSource) -> int:
    """Of one pass: the layers, embedding and output matrix."""
    needed = family.source_shapes(source.config)
    stored = ((name, entry) for name, entry in source.checkpoint.tensors.items() if not name.endswith(PACKED))
    return sum(entry.n_bytes for name, entry in stored if weight_of(name) in needed)


def hidden_bytes(config: ModelConfig, n_tokens: int) -> int:
    """Hidden states of a pass, as its state on disk holds them."""
    whole = 4 * n_tokens * config.width
    return whole if whole <= HIDDEN_BYTES else whole // 2


def _memory_lines(order: "Order", work: Work) -> list[str]:
    """Peaks, by the same upper estimates by which a pass is refused."""
    config, on_gpu = work.config, work.on_gpu
    compute = torch.bfloat16 if on_gpu else torch.float32
    stored = torch.float32 if 4 * work.tokens * config.width <= HIDDEN_BYTES else torch.bfloat16
    need = memory(config, compute, stored)
    passes = [need.total(work.tokens), 2 * memory(config, compute, torch.float32).total(work.judged)]
    if order.encoder == "quantkit":
        passes[0] += FACTOR_COPIES * 4 * config.d * config.d
    if not on_gpu:
        return [f"RAM         {both_units(max(passes))} at most, {both_units(machine_memory())} are there"]
    there = torch.cuda.get_device_properties(order.device).total_memory
    beside = need.total(work.tokens, "ram") + (int(GROUP_SHARE * there) if order.encoder == "quantkit" else 0)
    hidden = need.per_token * work.tokens if passes[0] > there else 0
    ram = BASE_BYTES * 4 + min(hidden, int(RAM_SHARE * machine_memory()))
    return [
        f"VRAM        {both_units(min(there, max(min(passes[0], beside), passes[1])))} at most, "
        f"{both_units(there)} are there",
        f"RAM         {both_units(ram)} at most, {both_units(machine_memory())} are there",
    ]


def _machine_words(work: Work) -> str:
    if work.on_gpu:
        return " on a GPU as fast as an H100"
    return f" with {work.threads} thread" + ("s" if work.threads > 1 else "")


def rounded(seconds: float) -> str:
    """`40 seconds`, `12 minutes`, `3.5 hours`, `4 days`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    hours = timedelta(seconds=seconds) / timedelta(hours=1)
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"
