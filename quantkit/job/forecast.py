"""What a job will read, write and take, said before its first byte; `make --dry-run` says only that.

Sizes are exact or upper estimates; times are those of `job.work`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantkit import machine
from quantkit.codecs import types as qtypes
from quantkit.codecs.registry import FORMATS
from quantkit.encoding.moments import FACTOR_COPIES, GROUP_SHARE
from quantkit.encoding.saved import Kept
from quantkit.formats.tensor_table import weight_of
from quantkit.job.work import SMALL_WEIGHTS, Work, rounded
from quantkit.models import family
from quantkit.models.config import ModelConfig
from quantkit.models.family import SLICE_WEIGHTS
from quantkit.planning.plan import Plan
from quantkit.runtime.memory import BASE_BYTES, HIDDEN_BYTES, RAM_SHARE, machine_memory, memory
from quantkit.runtime.rates import DISK_RATE
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.stream import Source
from quantkit.sizes import both_units

if TYPE_CHECKING:
    from quantkit.job.options import Order
    from quantkit.job.stages import QuantizeOptions


LOW = 4.0  # bits per weight, below which quantkit's encoder was measured to halve the KLD


def forecast(order: "Order", source: CheckpointSource, n_bytes: int) -> list[str]:
    """Lines for `make`. n_bytes: of all files that it will write."""
    options, config, work = order.options, source.config, order.work
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
        *_memory_lines(work, order.encoder, order.device),
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


def forecast_calibration(source: Source, n_tokens: int, out: Path, moments: Path | None) -> list[str]:
    """Lines for `calibrate`. moments: the folder of second moments, if they are kept."""
    config, on_gpu = source.config, source.device.type != "cpu"
    work = Work(config, 0, n_tokens, 0, on_gpu, machine.threads())
    kept = Kept(config, n_tokens, source.dtype) if moments else None
    imatrix = sum(4 * s.n_matrices * (s.n_in + 1) for s in family.specs(config) if s.layer is not None and not s.fixed)
    disk = imatrix + 2 * hidden_bytes(config, n_tokens) + (kept.total() if kept else 0)
    read = sum(source.layer_bytes())
    seconds = max(read / DISK_RATE, work.seconds_to_compute(n_tokens) + (work.seconds_to_sum(kept.sums) if kept else 0))
    return [
        f"reads       {both_units(read)} of {source.name}",
        f"writes      {both_units(imatrix)}, {out}",
        *([f"moments     {kept.words()}, in {moments}"] if kept else []),
        f"disk        {both_units(disk)} at most, {both_units(machine.free_disk(out.parent))} are free",
        *_memory_lines(work, None, source.device.type),
        f"time        about {rounded(seconds)}{_machine_words(work)}",
    ]


def forecast_quantize(source: CheckpointSource, plan: Plan, out: Path, how: "QuantizeOptions") -> list[str]:
    """Lines for `quantize`."""
    encoder = "quantkit" if how.by_moments else "ggml"
    n_weights, on_gpu = sum(t.n_weights for t in plan.tensors), source.device.type != "cpu"
    work = Work(source.config, n_weights, 0, 0, on_gpu, machine.threads())
    read = bytes_read(source)
    seconds = max(read / DISK_RATE, work.seconds_to_encode(encoder, how.effort))
    n_files = max(1, -(-plan.data_bytes // how.split_max_bytes)) if how.split_max_bytes else 1
    jobs = BASE_BYTES + 2 * 4 * SLICE_WEIGHTS * work.threads
    return [
        f"encoder     {how.reason}",
        f"reads       {both_units(read)} of {source.name}",
        f"writes      {both_units(plan.data_bytes)}, {n_files} file{'s' if n_files > 1 else ''} in {out.parent}",
        f"disk        {both_units(plan.data_bytes)}, {both_units(machine.free_disk(out.parent))} are free",
        *(
            _memory_lines(work, encoder, source.device.type)
            if encoder == "quantkit"
            else [f"RAM         {both_units(jobs)} at most, {both_units(machine_memory())} are there"]
        ),
        f"time        about {rounded(seconds)}{_machine_words(work)}",
    ]


def encoder_reason(order: "Order", work: Work) -> str:
    """Which encoder packs the blocks, and why; what the better one would take, if it is not that."""
    options = order.options
    if options.imatrix:
        return f"ggml, for --imatrix holds no second moments{_worse(order)}"
    if options.encoder != "auto":
        effort = f", effort {options.effort}" if order.encoder == "quantkit" else ""
        return f"{order.encoder}{effort}, as asked" + (
            f", as llama-quantize{_worse(order)}" if order.encoder == "ggml" else ""
        )
    if order.encoder == "quantkit":
        ours, ggml = (rounded(work.seconds_to_encode(encoder, options.effort)) for encoder in ("quantkit", "ggml"))
        why = "on a GPU" if order.device != "cpu" else f"a small model, {work.n_weights / 1e6:,.0f} M weights"
        if order.device == "cpu" and work.n_weights > SMALL_WEIGHTS:
            why = f"encodes in about {ours} here; --encoder ggml {ggml}, with about twice the KLD"
        return f"quantkit, effort {options.effort}: {why}"
    ours, ggml = (rounded(work.seconds_to_encode(encoder, options.effort)) for encoder in ("quantkit", "ggml"))
    return f"ggml, a large model on a CPU: encodes in about {ggml}, with about twice the KLD; --encoder quantkit {ours}"


def _worse(order: "Order") -> str:
    """What ggml's encoder costs in the types of this plan: measured of low-bit ones (docs/results/encoders.md)."""
    weights = {name: 0 for name in ("all", "ours", "low")}
    for tensor in order.plan.tensors:
        if len(tensor.shape) > 1 and tensor.rule is not None:
            weights["all"] += tensor.n_weights
            weights["ours"] += tensor.n_weights * (tensor.qtype in FORMATS)
            weights["low"] += tensor.n_weights * ((tensor.qtype in FORMATS) and qtypes.get(tensor.qtype).bpw < LOW)
    if not weights["ours"]:
        return "; quantkit too leaves these types to it"
    if 2 * weights["low"] < weights["all"]:
        return ": a larger KLD than quantkit's in the same bytes"
    return ": about twice the KLD of quantkit's in the same bytes"


def bytes_read(source: CheckpointSource) -> int:
    """Of one pass: the layers, embedding and output matrix."""
    needed = family.source_shapes(source.config)
    return sum(entry.n_bytes for name, entry in source.checkpoint.stored.items() if weight_of(name) in needed)


def hidden_bytes(config: ModelConfig, n_tokens: int) -> int:
    """Hidden states of a pass, as its state on disk holds them."""
    whole = 4 * n_tokens * config.width
    return whole if whole <= HIDDEN_BYTES else whole // 2


def _memory_lines(work: Work, encoder: str | None, device: str) -> list[str]:
    """Peaks, by the same upper estimates by which a pass is refused."""
    config, on_gpu = work.config, work.on_gpu
    compute = torch.bfloat16 if on_gpu else torch.float32
    stored = torch.float32 if 4 * work.tokens * config.width <= HIDDEN_BYTES else torch.bfloat16
    need = memory(config, compute, stored)
    passes = [need.total(work.tokens), 2 * memory(config, compute, torch.float32).total(work.judged)]
    if encoder == "quantkit":
        passes[0] += FACTOR_COPIES * 4 * config.d * config.d
    if not on_gpu:
        return [f"RAM         {both_units(max(passes))} at most, {both_units(machine_memory())} are there"]
    there = torch.cuda.get_device_properties(device).total_memory
    beside = need.total(work.tokens, "ram") + (int(GROUP_SHARE * there) if encoder == "quantkit" else 0)
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
