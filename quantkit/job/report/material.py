"""What a folder of `make` holds for a report."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError, printable
from quantkit.formats.byte_source import read_whole
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.imatrix import ImatrixInfo, load_imatrix
from quantkit.formats.safetensors_header import load_object
from quantkit.formats.sensitivity import Sensitivity
from quantkit.job.folder import (
    BASELINE,
    CERTIFY,
    IMATRIX,
    NO_FIGURES,
    PLAN,
    PROVENANCE,
    SENSITIVITY,
    VERIFY,
    certifies,
    finished_files,
)
from quantkit.models import family
from quantkit.models.config import ModelConfig
from quantkit.planning.damage import Damage, Measured, unmeasured
from quantkit.planning.plan import Plan
from quantkit.tensors import Imatrix, TensorSpec

NEEDED = ("bytes", "kld_mean", "top1_agreement", "ppl", "ppl_reference")  # without which scores are none of `verify`
ALIKE = ("reference", "text_sha256", "tokens", "score")  # what two verify.json must share to be compared


@dataclass
class Material:
    """What lies in the folder. Anything but the scores or the plan may be missing.

    certificates: by target, the file's own first; certificate: that, or the first there is.
    baseline: scores of the same types by ggml's encoder. file: the model's, as it is called; config: its numbers.
    others: name -> scores of neighbouring folders that were measured against the same original on the same text.
    """

    folder: Path
    scores: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    certificates: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] | None = None
    sensitivity: Path | None = None
    imatrix: Imatrix = field(default_factory=dict)
    imatrix_info: ImatrixInfo | None = None
    file: str = ""
    config: ModelConfig | None = None
    others: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "Material":
        """QuantkitError if there is nothing to report on, or if a file is damaged."""
        scores = _json(folder / VERIFY) or {}
        if scores and (missing := [key for key in NEEDED if not isinstance(scores.get(key), int | float)]):
            raise QuantkitError(
                f"{folder / VERIFY}: no number for {', '.join(missing)}: not of `quantkit verify`; run that again"
            )
        plan = (
            Plan.from_json(read_whole(folder / PLAN, "plan"), str(folder / PLAN)) if (folder / PLAN).is_file() else None
        )
        if not scores and plan is None:
            raise QuantkitError(NO_FIGURES.format(folder))
        others = sorted(folder.glob(f"{Path(CERTIFY).stem}-*.json"))
        certificates = [found for path in (folder / CERTIFY, *others) if (found := _json(path))]
        made = cls(folder, scores, plan, certificates, _json(folder / PROVENANCE) or {})
        baseline = _json(folder / BASELINE)
        if baseline and scores and comparable(baseline, scores):
            made.baseline = baseline
        if (folder / SENSITIVITY).is_file():
            made.sensitivity = folder / SENSITIVITY
        if (folder / IMATRIX).is_file():
            made.imatrix, made.imatrix_info = load_imatrix(folder / IMATRIX)
        made._look_at_file()
        made.certificates = [found for found in certificates if certifies(found, made.file)]
        made.others = _neighbours(folder, scores)
        return made

    def _look_at_file(self) -> None:
        """Its name and numbers, from headers; a folder may hold the records alone."""
        found = finished_files(self.folder / f"{self.plan.model}-{self.plan.recipe}.gguf") if self.plan else []
        self.file = found[0].name if found else str(self.scores.get("file", ""))
        if found:
            self.config = family.from_gguf(GGUFFile.open(found[0]).metadata)

    @property
    def name(self) -> str:
        """The folder's, which may be no text."""
        return printable(os.fsencode(self.folder.resolve().name).decode(errors="replace"))

    @property
    def certificate(self) -> dict[str, Any]:
        """The file's own, or the first there is; nothing without any."""
        return next(iter(self.certificates), {})

    @property
    def ratio(self) -> float | None:
        """KLD of the file over that of ggml's encoder in the same bytes."""
        if not self.baseline or not self.baseline.get("kld_mean"):
            return None
        return float(self.scores["kld_mean"] / self.baseline["kld_mean"])

    def damage(self) -> tuple[Damage, list[TensorSpec]]:
        """What predicts the plan's divergence, and the tensors that it speaks of; needs a plan."""
        assert self.plan
        specs = [
            TensorSpec(t.name, t.shape, t.role, t.layer, (), fixed=t.qtype if t.rule is None else None)
            for t in self.plan.tensors
        ]
        if self.sensitivity is None:
            return unmeasured(specs), specs
        found = Sensitivity.load(self.sensitivity)
        entries = {(e.tensor, e.qtype): (e.kld, e.kld_error) for e in found.entries}
        return Measured(entries, f"{SENSITIVITY} of {found.model}"), specs


def comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two verify.json are of the same original, text and way of scoring: only those share a chart."""
    return all(a.get(key) == b.get(key) for key in ALIKE)


def names(materials: Iterable[Material]) -> list[str]:
    """A name for each: the folder's, with its parent's where two are the same."""
    every = list(materials)
    plain = [m.name for m in every]
    return [
        f"{printable(m.folder.resolve().parent.name)}/{name}" if plain.count(name) > 1 else name
        for m, name in zip(every, plain, strict=True)
    ]


def _json(path: Path) -> dict[str, Any] | None:
    return load_object(read_whole(path, "record"), str(path)) if path.is_file() else None


def _neighbours(folder: Path, scores: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Scores beside this folder that can be compared with its own."""
    found = {}
    for path in sorted(folder.resolve().parent.glob(f"*/{VERIFY}")):
        other = _json(path) or {}
        if path.parent != folder.resolve() and scores and comparable(other, scores):
            found[path.parent.name] = other
    return found
