"""The recovered file: a copy of the base's bytes in which what moved is encoded again."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from quantkit import ranks
from quantkit.calibration.spill import Spill
from quantkit.codecs.registry import rescale
from quantkit.encoding.api import SUPPORTED, encode_batch
from quantkit.encoding.hessian import Hessian, prepare
from quantkit.encoding.moments import SAME_INPUT, Moments
from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import checksum
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.whole_file import make_folders, rename, sync_file
from quantkit.ggml import quants
from quantkit.job.recovery.passes import forward, inputs
from quantkit.job.recovery.tuned import TunedSource
from quantkit.job.recovery.values import ByLayer, Values
from quantkit.models import family
from quantkit.progress import say, track
from quantkit.runtime.layers import rms_norm
from quantkit.runtime.room import Room
from quantkit.runtime.stream import ATTENTION_TOKENS, Step
from quantkit.runtime.watch import Watcher
from quantkit.tensors import TensorSpec

_NOTE = "made"


class Twin:
    """A file or its splits in a folder of their own, under the base's names; tensors are written in place."""

    def __init__(self, base: GGUFFile, folder: Path):
        self.base, self.folder = base, folder
        self.files = [folder / file.name for file in base.files]

    def copy(self) -> None:
        """The base's bytes. QuantkitError if the disk does not take them."""
        for file, to in zip(self.base.files, self.files, strict=True):
            part = to.with_name(to.name + ".part")
            try:
                make_folders(self.folder)
                shutil.copyfile(file, part)
                rename(part, to)
            except OSError as error:
                raise QuantkitError(f"{to}: cannot write ({error.strerror}); run again to resume") from None

    def resumed(self, spill: Spill, done: int, moving: ByLayer) -> bool:
        """Whether the files are there and hold what an earlier run had made of `done` layers: tensors that were
        encoded again as noted in the spill, those still to be encoded the base's again, all others the base's."""
        if not all(file.exists() for file in self.files):
            return False
        made: dict[str, int] = {}
        for layer in range(done):
            if not spill.has(_note(layer)):
                return False
            made |= json.loads(spill.noted(_note(layer))[_NOTE])
        self.restore(spec.name for layer, specs in moving.items() if layer >= done for spec in specs)
        damaged = self._damaged(made)
        if damaged:
            say(f"{damaged}: damaged; it is encoded again")
        return not damaged

    def _damaged(self, made: Mapping[str, int]) -> Path | None:
        """The first of the files in which a tensor is neither the base's nor of this CRC-32."""
        for file, mine in zip(self.base.files, self.files, strict=True):
            tensors = [tensor for tensor in self.base.tensors.values() if tensor.file == file]
            head = min((tensor.offset for tensor in tensors), default=file.stat().st_size)
            places = [(0, head, None), *((t.offset, t.offset + t.n_bytes, made.get(t.name)) for t in tensors)]
            with open(file, "rb") as old, open(mine, "rb") as new:
                for start, stop, crc in places:
                    wanted = checksum(old.fileno(), start, stop)[0] if crc is None else crc
                    if checksum(new.fileno(), start, stop) != (wanted, stop - start):
                        return mine
        return None

    def note(self, spill: Spill, layer: int, names: Iterable[str]) -> None:
        """What was encoded again of a layer, for `resumed`."""
        found = {}
        for tensor in (self.base.tensors[name] for name in names):
            with open(self.folder / tensor.file.name, "rb") as file:
                found[tensor.name] = checksum(file.fileno(), tensor.offset, tensor.offset + tensor.n_bytes)[0]
        spill.note(_note(layer), {_NOTE: json.dumps(found)})

    def write(self, name: str, row: int, data: np.ndarray) -> None:
        """Bytes of a tensor from a row on."""
        tensor = self.base.tensors[name]
        with open(self.folder / tensor.file.name, "rb+") as out:
            out.seek(tensor.offset + row * tensor.row_bytes)
            out.write(np.ascontiguousarray(data).data)

    def restore(self, names: Iterable[str]) -> None:
        """The base's bytes of these tensors."""
        for name in names:
            self.write(name, 0, self.base.data(name))
        self.sync()

    def sync(self) -> None:
        """What was written is on disk."""
        for file in self.files:
            sync_file(file)

    def publish(self, folder: Path) -> None:
        """The files move there."""
        for file in self.files:
            rename(file, folder / file.name)


def _note(layer: int) -> str:
    return f"made-{layer:03}"


class Inputs(Watcher):
    """Moments of what some of a layer's matrices multiply, by role."""

    def __init__(self, roles: set[str]):
        self.roles, self.moments = roles, dict[str, Moments]()

    def observe(self, role: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Adds the inputs of the roles that are asked for."""
        if role in self.roles:
            self.moments.setdefault(role, Moments()).add(x, weight)


def encode_again(student: TunedSource, tokens: torch.Tensor, room: Room, spill: Spill, twin: Twin) -> None:
    """Everything that moved, layer by layer, into the twin: matrices under the moments of the inputs that the student
    has of these tokens, int64 [n_chunk, t]. Goes on after the last finished layer."""
    n_layer, specs, scales = student.config.n_layer, student.tuned.values.specs, student.tuned.values.scales

    def visit(step: Step) -> torch.Tensor:
        mine = specs[step.layer]
        encoded = [spec.role for spec in mine if spec.fixed is None and spec.name not in scales]
        seen = Inputs({SAME_INPUT.get(role, role) for role in encoded})
        made = step.compute(seen)
        for spec in mine[ranks.index() :: ranks.count()]:
            _write(student, spec, seen.moments.get(SAME_INPUT.get(spec.role, spec.role)), twin)
        twin.sync()
        twin.base.let_go()
        ranks.barrier()  # a layer is done when all its bytes are safe
        if ranks.index() == 0:
            twin.note(spill, step.layer, [spec.name for spec in mine])
        return made

    with torch.no_grad(), track("encode again", n_layer, "layers") as advance:
        forward(student, tokens, room, spill, visit=visit, advance=advance)
        hidden = torch.empty((*tokens.shape, student.config.d), dtype=room.hidden)
        spill.read(inputs(n_layer), hidden)
        for spec in specs.get(n_layer, ())[ranks.index() :: ranks.count()]:
            _write(student, spec, _of_output(student, hidden) if spec.fixed is None else None, twin)
        twin.sync()
        ranks.barrier()


def _of_output(student: TunedSource, hidden: torch.Tensor) -> Moments:
    """Of the rows that the output matrix multiplies."""
    seen, norm = Moments(), student.output_norm()
    for part in hidden.flatten(0, 1).split(ATTENTION_TOKENS):
        x = rms_norm(part.to(student.device, torch.float32), norm, student.config.rms_eps)
        seen.add(x, torch.ones(len(x), device=x.device))
    return seen


def _write(student: TunedSource, spec: TensorSpec, seen: Moments | None, twin: Twin) -> None:
    qtype, rows = twin.base.tensors[spec.name].qtype, student.tuned.rows
    if spec.name in student.tuned.values.scales:
        _rescale(student.tuned.values, spec, twin)
        return
    if seen is None:  # F32 in the file
        values = torch.cat([rows(spec, *some) for some in family.slices(spec)])
        twin.write(spec.name, 0, values.cpu().numpy())
        return
    hessians = seen.hessians()
    if qtype not in SUPPORTED:
        _by_ggml(student, spec, hessians, twin)
    elif spec.n_matrices > 1:  # heads, together: one after the other they would leave a GPU idle
        weights = torch.stack([_matrix(student, spec, i) for i in range(spec.n_matrices)])
        packed = encode_batch(qtype, weights, hessians, device=student.device)
        twin.write(spec.name, 0, packed.reshape(spec.n_rows, -1))
    else:
        factor = prepare(hessians, spec.n_in, student.device)
        for start, stop in family.slices(spec):
            packed = encode_batch(qtype, rows(spec, start, stop)[None], factor, device=student.device)
            twin.write(spec.name, start, packed[0])


def _rescale(values: Values, spec: TensorSpec, twin: Twin) -> None:
    """The base's codes under the scales that have moved, so many rows at a time: a stack of R1's is 1 GB."""
    packed = twin.base.data(spec.name).reshape(spec.n_rows, -1)
    for start, stop in family.slices(spec):
        delta = values.delta(spec, start, stop)
        if delta is None:
            return
        qtype = twin.base.tensors[spec.name].qtype
        twin.write(spec.name, start, rescale(qtype, packed[start:stop], delta.float().exp().numpy()))


def _by_ggml(student: TunedSource, spec: TensorSpec, hessians: list[Hessian], twin: Twin) -> None:
    qtype, each = twin.base.tensors[spec.name].qtype, spec.n_rows // spec.n_matrices
    for start, stop in family.slices(spec):
        diagonal = hessians[start // each].diagonal
        importance = None if diagonal is None else diagonal.float().cpu().numpy()
        values = student.tuned.rows(spec, start, stop).cpu().numpy()
        twin.write(spec.name, start, quants.quantize(qtype, values, importance))


def _matrix(student: TunedSource, spec: TensorSpec, index: int) -> torch.Tensor:
    each = spec.n_rows // spec.n_matrices
    parts = [some for some in family.slices(spec) if index * each <= some[0] < (index + 1) * each]
    return torch.cat([student.tuned.rows(spec, *some) for some in parts])
