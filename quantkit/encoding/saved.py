"""Second moments on disk, so that calibrating and encoding can be two commands: what `calibrate --moments DIR` keeps.

moments-NNN.safetensors  of layer NNN: `matrix.ROLE` float32, Σ w x xᵀ of the inputs of each matrix that is not routed,
                         [n, n] or of every head [h, n, n]; `sums.ROLE` float64 as int64 bits: Σw, Σw²
experts-NNN.safetensors  of its routed experts, in the smaller of two exact forms:
  rows      the rows that their moments are sums of, once for all experts: `inputs` [n_tokens, d] in the pass's dtype,
            `weights` float32 [n_tokens]; `counts` int64 [n_expert], and expert after expert `tokens` int32 and `shares`
            float32: which rows it saw, and how much of its output they took. What goes into down is computed again.
  matrices  `inputs` float32 [n_expert, d, d] and `hidden` [n_expert, n_ff, n_ff], each a weighted mean; `counts`;
            `effective` float64 as int64 bits [n_expert, 2]: the tokens behind both means (see `Hessian`)

Of R1 a layer's matrices are 57 GB and its rows, of 131,072 tokens in float32, 3.8 GB. An expert sees fewer tokens than
its inputs have dimensions, so its moments have that rank, and rows are their low-rank form without any loss. Both files
are sealed (`formats.sealed`); expert files are written while the layer is computed, and never held.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import torch

from quantkit import machine, ranks
from quantkit.calibration.collect import Accumulator
from quantkit.encoding.hessian import second_moment
from quantkit.encoding.moments import SAME_INPUT, Moments
from quantkit.errors import QuantkitError
from quantkit.formats import sealed
from quantkit.formats.whole_file import make_folders
from quantkit.models import family
from quantkit.models.config import ModelConfig
from quantkit.progress import say
from quantkit.runtime.stream import Source, job_of
from quantkit.runtime.watch import ExpertVisit
from quantkit.sizes import both_units
from quantkit.tensors import Importance, TensorSpec

ROWS, MATRICES = "rows", "matrices"
VERSION = "moments 1"
KEPT_ROLE = "ffn_gate_inp"  # fixed in the file, but its inputs are those of the experts


@dataclass(frozen=True)
class Kept:
    """How much a pass of n_tokens, [n_chunk, t] in all, keeps of a model. dtype: of the pass. n_chunk: an MTP layer has
    no input for the last token of each; 0 where only sizes are estimated."""

    config: ModelConfig
    n_tokens: int
    dtype: torch.dtype
    n_chunk: int = 0

    @property
    def form(self) -> str:
        """The smaller one for the routed experts."""
        return min((ROWS, MATRICES), key=lambda form: self._bytes(self.shapes(form)))

    def shapes(self, form: str, layer: int = 0) -> sealed.Shapes:
        """Of the file of a layer's routed experts."""
        c, n = self.config, self.n_tokens
        n -= self.n_chunk if layer >= c.n_layer else 0
        counts = {"counts": (torch.int64, (c.n_expert,))}
        if form == ROWS:
            seen = n * c.n_used
            rows = {"inputs": (self.dtype, (n, c.d)), "weights": (torch.float32, (n,))}
            return {**rows, "tokens": (torch.int32, (seen,)), "shares": (torch.float32, (seen,)), **counts}
        inputs, hidden = ((torch.float32, (c.n_expert, n_in, n_in)) for n_in in (c.d, c.n_ff_exp))
        return {"inputs": inputs, "hidden": hidden, "effective": (torch.int64, (c.n_expert, 2)), **counts}

    def of_layer(self, layer: int, form: str) -> int:
        """Bytes of one layer's files."""
        matrices = sum(4 * prod(shape) for shape in _moment_shapes(self.config)[layer].values())
        return matrices + (self._bytes(self.shapes(form, layer)) if self.config.is_moe(layer) else 0)

    def total(self, form: str | None = None) -> int:
        """Bytes of all layers."""
        return sum(self.of_layer(layer, form or self.form) for layer in range(self.config.n_block))

    @property
    def sums(self) -> int:
        """Entries of all moments that are formed while the pass goes on, each by all tokens."""
        found = sum(prod(shape) for shapes in _moment_shapes(self.config) for shape in shapes.values())
        c = self.config
        return found + ((c.n_moe + c.n_mtp) * c.n_used * (c.d**2 + c.n_ff_exp**2) if self.form == MATRICES else 0)

    def words(self) -> str:
        """For people, before it begins."""
        layer = max(range(self.config.n_block), key=lambda i: self.of_layer(i, self.form))
        said = f"{both_units(self.total())}, {both_units(self.of_layer(layer, self.form))} a layer"
        if not self.config.n_moe:
            return said
        other = MATRICES if self.form == ROWS else ROWS
        which = "experts as the rows that theirs are sums of" if self.form == ROWS else "experts as matrices"
        return f"{said}, {which} (as {other}: {both_units(self.of_layer(layer, other))} a layer)"

    @staticmethod
    def _bytes(shapes: sealed.Shapes) -> int:
        return sum(map(sealed.n_bytes, shapes.values()))


@cache
def _moment_shapes(config: ModelConfig) -> Sequence[Mapping[str, tuple[int, ...]]]:
    """Of each layer: role -> shape of its moments, of what is not routed; a role that multiplies another's inputs has
    none."""
    found: list[dict[str, tuple[int, ...]]] = [{} for _ in range(config.n_block)]
    for spec in (*family.specs(config), *family.of(config).specs(config, "combined")):
        if spec.layer is not None and _has_moments(spec):
            heads = (spec.n_matrices,) if spec.n_matrices > 1 else ()
            found[spec.layer][spec.role] = (*heads, spec.n_in, spec.n_in)
    return found


def _has_moments(spec: TensorSpec) -> bool:
    encoded = spec.fixed is None or spec.role == KEPT_ROLE
    return encoded and len(spec.shape) > 1 and not spec.is_routed and SAME_INPUT.get(spec.role, spec.role) == spec.role


def moments_path(folder: Path, layer: int) -> Path:
    """Of what is not routed."""
    return folder / f"moments-{layer:03}.safetensors"


def experts_path(folder: Path, layer: int) -> Path:
    """Of routed experts."""
    return folder / f"experts-{layer:03}.safetensors"


def of_tokens(source: Source) -> str:
    """What moments say of the weights that they are of, and of the arithmetic."""
    return f"{VERSION}, {source.fingerprint()} {source.dtype} {source.device.type}"


def check_kept(config: ModelConfig, folder: Path) -> None:
    """QuantkitError if the moments of such a model are not kept, or by several ranks: before anything is read."""
    if ranks.count() > 1:
        raise QuantkitError(f"{folder}: --moments are written by one process; run it without other ranks")
    if config.compression is not None:
        raise QuantkitError(f"--moments: not kept of {config.architecture} models; `quantkit make` needs none")


class Keeper:
    """Keeps the moments of one pass over `source` in a folder: `watch` makes the watcher of each layer. tokens int64
    [n_chunk, t]. QuantkitError if the disk has no room, or if several ranks share the pass."""

    def __init__(self, folder: Path, source: Source, tokens: torch.Tensor):
        check_kept(source.config, folder)
        self.folder, self.config = folder, source.config
        self.kept = Kept(source.config, tokens.numel(), source.dtype, len(tokens))
        self.form = self.kept.form
        self.job = f"{job_of(source, tokens)} {VERSION}"
        self.about = {"job": self.job, "of": of_tokens(source), "form": self.form}
        there = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
        need, free = self.kept.total(self.form), machine.free_disk(folder)
        if need - there > free:
            raise QuantkitError(
                f"{folder}: moments of {tokens.numel():,} tokens take {both_units(need)}; free are {both_units(free)}: "
                "take another folder, fewer --tokens, or `quantkit make`, which keeps none"
            )

    def whole(self, layers: int) -> bool:
        """Whether all of the first layers lies there, undamaged and of this pass; what is wrong is said."""
        for layer in range(layers):
            for path in self._paths(layer):
                if (why := sealed.whole(path)) or sealed.about(path).get("job") != self.job:
                    say(f"{why or f'{path}: of another pass'}; the pass begins anew")
                    return False
        return True

    def _paths(self, layer: int) -> list[Path]:
        experts = [experts_path(self.folder, layer)] if self.config.is_moe(layer) else []
        return [moments_path(self.folder, layer), *experts]

    def watch(self, layer: int) -> "LayerKeeper":
        """For the time of one layer."""
        make_folders(self.folder)
        return LayerKeeper(layer, self)


class LayerKeeper(Accumulator):
    """Sees one layer being computed; its moments are on disk when `finish` returns."""

    def __init__(self, layer: int, keeper: Keeper):
        super().__init__(layer, keeper.config.n_expert)
        self.keeper, self.moments, self.rows = keeper, dict[str, Moments](), 0
        self.seen = torch.zeros(self.n_expert, dtype=torch.int64)  # tokens of each expert
        self.weights: list[torch.Tensor] = []
        self.writing = ExitStack()
        self.wanted = _moment_shapes(keeper.config)[layer]
        if keeper.config.is_moe(layer):
            path, shapes = experts_path(keeper.folder, layer), keeper.kept.shapes(keeper.form, layer)
            self.file = self.writing.enter_context(sealed.writing(path, shapes, keeper.about))

    def observe(self, role: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        """For the importance, and for the moments."""
        super().observe(role, x, weight)
        if role in self.wanted:
            self.moments.setdefault(role, Moments()).add(x, weight)
        if role == KEPT_ROLE:
            if self.keeper.form == ROWS:
                first = sum(map(len, self.weights))
                self._put("inputs", x, first)
                self._put("weights", weight, first)
            self.weights.append(weight)

    def observe_expert(self, visit: ExpertVisit) -> None:
        """For the importance; then its rows or its matrices."""
        super().observe_expert(visit)
        n = len(visit.tokens)
        if self.keeper.form == ROWS:
            self._put("tokens", visit.tokens, self.rows)
            self._put("shares", visit.weight, self.rows)
            self.rows += n
        else:
            weight = torch.cat(self.weights)[visit.tokens] * visit.weight.float().square()
            inputs, hidden = second_moment(visit.x, weight), second_moment(visit.hidden, weight)
            for name, found in (("inputs", inputs), ("hidden", hidden)):
                if found.matrix is not None:
                    self._put(name, found.matrix[None], visit.expert)
                else:
                    self._nothing(name, visit.expert)
            self._put("effective", _bits([inputs.tokens, hidden.tokens])[None], visit.expert)
        self.seen[visit.expert] = n

    def _nothing(self, name: str, expert: int) -> None:
        n_in = self.keeper.config.d if name == "inputs" else self.keeper.config.n_ff_exp
        self._put(name, torch.zeros(1, n_in, n_in), expert)

    def _put(self, name: str, rows: torch.Tensor, first: int = 0) -> None:
        """Into the experts' file. QuantkitError naming it, which is then removed, if the disk does not take it."""
        try:
            self.file.write(name, rows, first)
        except OSError:
            with self.writing:
                raise

    def finish(self) -> dict[str, Importance]:
        """As `Accumulator`, when everything is on disk."""
        if self.keeper.config.is_moe(self.layer):
            self._put("counts", self.seen)
            for expert in (self.seen == 0).nonzero().flatten().tolist() if self.keeper.form == MATRICES else ():
                for name in ("inputs", "hidden"):
                    self._nothing(name, expert)
                self._put("effective", _bits([0.0, 0.0])[None], expert)
            self.writing.close()
        tensors: dict[str, torch.Tensor] = {}
        for role, moments in self.moments.items():
            if moments.matrix is not None:
                tensors[f"matrix.{role}"] = moments.matrix
                tensors[f"sums.{role}"] = _bits([moments.total, moments.squares])
        path = moments_path(self.keeper.folder, self.layer)
        try:
            sealed.write(path, tensors, self.keeper.about)
        except OSError as error:
            raise QuantkitError(f"{path}: cannot write ({error.strerror}); run again to resume") from None
        return super().finish()


def _bits(values: list[float]) -> torch.Tensor:
    """float64 as the integers that have their bits: safetensors here know no float64."""
    return torch.tensor(values, dtype=torch.float64).view(torch.int64)


def floats(bits: torch.Tensor) -> list[float]:
    """What `_bits` was given."""
    return [float(value) for value in bits.view(torch.float64)]
