"""Recovery: what a finished file leaves free is tuned end to end against the original. Not a byte is added.

Free are the superblock scales of every matrix (their codes stay), the norms and routers (F32 in the file), and, before
those of 4 bits and more are encoded once more, their weights. The loss is the KL divergence of the logits from the
original's over the calibration text, by Adam (arXiv 1412.6980); tuning only scales after rounding follows EfficientQAT
(arXiv 2407.11062), with the divergence of the whole model as target in place of the next token.

The decoded model has to fit on the device: this is for models of up to about 15 billion weights on one GPU. The same
by layer or by expert, which R1 would need, was measured and does not help (docs/results/encoders.md).
"""

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quantkit.codecs import types as qtypes
from quantkit.codecs.format import SUPERBLOCK
from quantkit.codecs.registry import FORMATS, rescale
from quantkit.encoding.api import SUPPORTED, encode_batch
from quantkit.encoding.moments import SAME_INPUT, Moments
from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.ggml import quants
from quantkit.job.student import Student
from quantkit.models import family
from quantkit.planning.plan import Plan
from quantkit.progress import say, track
from quantkit.runtime.layers import rms_norm
from quantkit.runtime.memory import memory_limit
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.stream import final_hidden, head_logits, stream
from quantkit.runtime.watch import Watcher
from quantkit.sizes import gb
from quantkit.tensors import TensorSpec

FINE_BITS = 4.0  # matrices of this many bits a weight are moved in full precision and encoded again
LOGITS = 1 << 26  # logits of one backward pass: 256 MB as float32, of which about five copies live
FREE_BYTES, MOVED_BYTES = 16, 20  # Adam: value, gradient and two moments; a moved matrix also its original


@dataclass(frozen=True)
class RecoverOptions:
    """epochs over the calibration text in the two stages (weights and scales; scales alone), chunks a step, step sizes
    (of the logarithm of a scale; of a weight in standard deviations of its matrix), one chunk in `held_out` is kept
    back to judge by."""

    epochs: tuple[int, int] = (8, 4)
    batch: int = 8
    lr: float = 1e-3
    lr_moved: float = 2e-3
    held_out: int = 16


class Inputs(Watcher):
    """Moments of what some of a layer's matrices multiply, by role."""

    def __init__(self, roles: set[str]):
        self.roles, self.moments = roles, dict[str, Moments]()

    def observe(self, role: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Adds the inputs of the roles that are asked for."""
        if role in self.roles:
            self.moments.setdefault(role, Moments()).add(x, weight)


class Recovery:
    """One job: student, original and text. `run` leaves the tuned parameters in the student."""

    def __init__(
        self,
        path: Path,
        original: CheckpointSource,
        plan: Plan,
        tokens: torch.Tensor,
        how: RecoverOptions,
        state: Path,
        job: str,
    ):
        self.original, self.plan, self.how, self.state, self.job = original, plan, how, state, job
        self.student = Student(path, str(original.device), original.dtype)
        self.specs = [s for s in family.specs(original.config, plan.mla) if s.name in self.student.base]
        hold = max(1, len(tokens) // how.held_out)
        every = torch.linspace(0, len(tokens) - 1, hold + 2)[1:-1].round().long()
        kept = torch.ones(len(tokens), dtype=torch.bool)
        kept[every] = False
        self.held, self.text = (every, kept.nonzero()[:, 0]) if kept.any() else (every, every)
        self.tokens = tokens
        with torch.no_grad():
            say("original's hidden states")
            self.target = final_hidden(original, tokens).cpu()
            self.head = original.head()

    def run(self) -> tuple[float, float]:
        """KLD on the chunks kept back: before and after."""
        before = self.divergence()
        fine = [s for s in self.specs if self._is_fine(s)]
        self.student.free(self.specs, {s.name: self._original(s) for s in fine})
        stage, epoch, saved = self._resume()
        if stage == 0:
            self._train(0, epoch, saved)
            with torch.no_grad():
                self._encode_again(fine)
            self._save(1, 0, None)
            epoch, saved = 0, {}
        else:
            self._put_packed(fine, saved)
        self._train(1, epoch, saved)
        return before, self.divergence()

    def _is_fine(self, spec: TensorSpec) -> bool:
        qtype = self.student.file.tensors[spec.name].qtype
        quantized = len(spec.shape) > 1 and not spec.fixed and qtypes.stored(qtype).block_size > 1
        return quantized and not spec.is_routed and spec.role != "token_embd" and qtypes.get(qtype).bpw >= FINE_BITS

    def _original(self, spec: TensorSpec) -> torch.Tensor:
        source = self.original
        rows = [
            family.read(source.checkpoint, source.config, spec, *bounds, str(source.device))
            for bounds in family.slices(spec)
        ]
        return torch.cat(rows).view(spec.shape).to(source.device, source.dtype)

    def _parameters(self) -> dict[str, torch.Tensor]:
        return {f"factor/{n}": t for n, t in self.student.factor.items()} | {
            f"moved/{n}": t for n, t in self.student.moved.items()
        }

    def _train(self, stage: int, epoch: int, saved: dict[str, torch.Tensor]) -> None:
        how, student = self.how, self.student
        parameters = self._parameters()
        groups = [
            {"params": list(student.factor.values()), "peak": how.lr},
            {"params": list(student.moved.values()), "peak": how.lr_moved},
        ]
        adam = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.95))
        for name, parameter in parameters.items():
            if f"value/{name}" in saved:
                parameter.data.copy_(saved[f"value/{name}"])
                moments = {"exp_avg": saved[f"m/{name}"], "exp_avg_sq": saved[f"v/{name}"]}
                adam.state[parameter] = {k: t.to(parameter.device) for k, t in moments.items()}
                adam.state[parameter]["step"] = saved["step"].clone()
        per_epoch = math.ceil(len(self.text) / how.batch)
        steps = how.epochs[stage] * per_epoch
        with track(f"recover {stage + 1}/2", steps, "steps") as advance:
            advance(epoch * per_epoch)
            for now in range(epoch, how.epochs[stage]):
                order = torch.randperm(len(self.text), generator=torch.Generator().manual_seed(1000 * stage + now))
                for i, pick in enumerate(order.split(how.batch)):
                    for group in adam.param_groups:
                        group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * (now * per_epoch + i) / steps))
                    adam.zero_grad()
                    chunks = self.text[pick]
                    for part in chunks.split(self._together()):
                        (self._divergences(part).sum() / (len(chunks) * self.tokens.shape[1])).backward()
                    adam.step()
                    advance(1)
                self._save(stage, now + 1, adam)

    def _together(self) -> int:
        """Chunks of one backward pass."""
        return max(1, LOGITS // (self.tokens.shape[1] * self.original.config.n_vocab))

    def _divergences(self, chunks: torch.Tensor) -> torch.Tensor:
        """KLD of every token of these chunks, float32 [n_chunk, t]; differentiable in the student."""
        with torch.no_grad():
            target = self.target[chunks].to(self.original.device)
            log_p = head_logits(self.original, self.head, target).log_softmax(-1)
        log_q = self.student.logits(self.tokens[chunks]).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    @torch.no_grad()
    def divergence(self) -> float:
        """Mean KLD over the second halves of the chunks that were kept back."""
        half = self.tokens.shape[1] // 2
        parts = [self._divergences(part)[:, half:] for part in self.held.split(self._together())]
        return float(torch.cat(parts).mean())

    def _encode_again(self, fine: list[TensorSpec]) -> None:
        """Layer after layer, the moved matrices under the moments of the inputs that they now have."""
        student = self.student
        by_layer: dict[int | None, list[TensorSpec]] = {}
        for spec in fine:
            by_layer.setdefault(spec.layer, []).append(spec)
        last = None
        for step in stream(student, self.tokens[self.text]):
            mine = by_layer.get(step.layer, [])
            inputs = Inputs({SAME_INPUT.get(spec.role, spec.role) for spec in mine})
            last = step.compute(inputs)
            for spec in mine:
                self._encode_one(spec, inputs.moments[SAME_INPUT.get(spec.role, spec.role)])
        if last is not None:
            for spec in by_layer.get(None, []):  # the output
                self._encode_one(spec, self._moments_of_output(last))

    def _moments_of_output(self, hidden: torch.Tensor) -> Moments:
        """Of the rows that the head multiplies; hidden [n_chunk, t, d] after the last layer."""
        seen, norm = Moments(), self.student.part("output_norm.weight")
        for part in hidden.split(4):
            x = rms_norm(part, norm, self.student.config.rms_eps).flatten(0, 1)
            seen.add(x, torch.ones(len(x), device=x.device))
        return seen

    def _encode_one(self, spec: TensorSpec, seen: Moments) -> None:
        student, name = self.student, spec.name
        qtype = student.file.tensors[name].qtype
        weight = student.part(name).float().view(spec.n_matrices, -1, spec.n_in)
        hessians = seen.hessians()
        if qtype in SUPPORTED:
            packed = encode_batch(qtype, weight, hessians, device=student.device)
        else:
            diagonal = [None if h.diagonal is None else h.diagonal.float().cpu().numpy() for h in hessians]
            packed = np.stack(
                [quants.quantize(qtype, w, d) for w, d in zip(weight.cpu().numpy(), diagonal, strict=True)]
            )
        self._adopt(spec, packed)

    def _adopt(self, spec: TensorSpec, packed: np.ndarray) -> None:
        """From now on the tensor is what these bytes decode to; its scales are free, its weights no longer."""
        student, name = self.student, spec.name
        qtype = student.file.tensors[name].qtype
        student.packed[name] = packed.reshape(*spec.shape[:-1], -1)
        values = quants.dequantize(qtype, packed.reshape(-1, packed.shape[-1]), spec.n_in)
        student.base[name] = torch.from_numpy(values).view(spec.shape).to(student.device, student.dtype)
        student.moved.pop(name, None)
        if qtype in FORMATS:
            shape = (*spec.shape[:-1], spec.n_in // SUPERBLOCK)
            student.factor[name] = torch.zeros(shape, device=student.device, requires_grad=True)

    def _save(self, stage: int, epoch: int, adam: torch.optim.Adam | None) -> None:
        tensors, step = {}, torch.tensor(0.0)
        for name, parameter in self._parameters().items():
            tensors[f"value/{name}"] = parameter.detach().cpu()
            moments = adam.state[parameter] if adam else {"exp_avg": torch.zeros_like(parameter)}
            tensors[f"m/{name}"] = moments["exp_avg"].detach().cpu()
            tensors[f"v/{name}"] = moments.get("exp_avg_sq", moments["exp_avg"]).detach().cpu().clone()
            step = moments.get("step", step)
        tensors |= {f"packed/{name}": torch.from_numpy(data) for name, data in self.student.packed.items()}
        part = self.state.with_name(self.state.name + ".part")
        about = {"stage": str(stage), "epoch": str(epoch), "job": self.job}
        save_file({k: t.contiguous() for k, t in tensors.items()} | {"step": step.cpu().clone()}, part, about)
        os.replace(part, self.state)

    def _resume(self) -> tuple[int, int, dict[str, torch.Tensor]]:
        if not self.state.exists():
            return 0, 0, {}
        try:
            with safe_open(self.state, "pt") as file:
                about = file.metadata() or {}
                if about.get("job") != self.job:
                    return 0, 0, {}
                saved = {key: file.get_tensor(key) for key in file.keys()}
            return int(about["stage"]), int(about["epoch"]), saved
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise QuantkitError(f"{self.state}: not a state of recovery ({error}); remove it") from None

    def _put_packed(self, fine: list[TensorSpec], saved: dict[str, torch.Tensor]) -> None:
        for spec in fine:
            self._adopt(spec, saved[f"packed/{spec.name}"].numpy())

    def changed(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor whose bytes are no longer those of the file: name, uint8 of the same size."""
        student = self.student
        with torch.no_grad():
            for name, tensor in student.file.tensors.items():
                if name in student.moved or (name in student.factor and tensor.qtype == "F32"):
                    yield name, student.part(name).float().cpu().numpy().view(np.uint8)
                elif name in student.factor:
                    data = student.packed.get(name, student.file.data(name))
                    yield name, rescale(tensor.qtype, np.asarray(data), student.factor[name].exp().cpu().numpy())
                elif name in student.packed:
                    yield name, student.packed[name]


def recover(
    base: Path,
    folder: Path,
    original: CheckpointSource,
    plan: Plan,
    tokens: torch.Tensor,
    job: str,
    how: RecoverOptions | None = None,
) -> tuple[list[Path], dict[str, float]]:
    """Write the recovered twin of the file (or splits) `base` into another folder; the files, and what was gained.

    tokens int64 [n_chunk, t]: calibration text. job: identity of base file and text; a stopped run of the same job
    goes on after its last epoch. If the chunks kept back do not gain, the twin is a plain copy.
    """
    state = folder / (base.name + ".recover")
    work = Recovery(base, original, plan, tokens, how or RecoverOptions(), state, job)
    before, after = work.run()
    say(f"recovery: KLD on {len(work.held)} chunks kept back {before:.4f} -> {after:.4f}")
    files = work.student.file.files
    parts = {file: folder / (file.name + ".part") for file in files}
    for file, part in parts.items():
        shutil.copyfile(file, part)
    if after < before:
        for name, data in work.changed():
            tensor = work.student.file.tensors[name]
            with open(parts[tensor.file], "rb+") as out:
                out.seek(tensor.offset)
                out.write(np.ascontiguousarray(data).tobytes())
    else:
        say("recovery: no gain on text that it was not tuned on; the file stays as it was")
    for part in parts.values():
        with open(part, "rb+") as out:
            os.fsync(out.fileno())
    for file, part in parts.items():
        os.replace(part, folder / file.name)
    state.unlink(missing_ok=True)
    return [folder / file.name for file in files], {"kld_before": before, "kld_after": after}


def open_original(checkpoint: Checkpoint, plan: Plan, device: str, n_tokens: int, ram: int | None) -> CheckpointSource:
    """The original in float32, or bfloat16 where the decoded model would not fit otherwise; refused, before any work,
    if it does not fit at all."""
    n = sum(t.n_weights for t in plan.tensors)
    moved = sum(t.n_weights for t in plan.tensors if not t.is_routed and t.role != "token_embd")
    d = family.from_hf(checkpoint.config).d
    besides = moved * MOVED_BYTES + n // SUPERBLOCK * FREE_BYTES + 6 * 4 * LOGITS + 4 * n_tokens * d
    limit, where = memory_limit(ram, torch.device(device))
    for dtype in (torch.float32, torch.bfloat16):
        if n * dtype.itemsize + besides <= limit and (dtype == torch.float32 or device != "cpu"):
            return CheckpointSource(checkpoint, device, dtype)
    raise QuantkitError(
        f"--recover holds the decoded model: that takes {gb(2 * n + besides)}, {where} is {gb(limit)}; leave it out"
    )
