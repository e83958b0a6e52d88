"""What a type costs a tensor: predicted KL divergence at the output, nats a token.

Three sources. `Prior` knows no model: one gain per role and an error per type, fitted on measured models
(docs/results/allocation.md). `Known` has what was published of models of this geometry. `Measured` holds the entries of
a sensitivity.json.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from quantkit.codecs import types as qtypes
from quantkit.errors import QuantkitError
from quantkit.models.config import is_finite
from quantkit.planning import published
from quantkit.planning.prior import ERROR, GAIN, LEVEL
from quantkit.tensors import ROUTED_ROLES, TensorSpec, split_name

EXACT = frozenset(name for name, qtype in qtypes.QTYPES.items() if not qtype.damage)
FLOOR = 1e-9
SPREAD = 0.15  # of log damages around gain + error, where measurement noise is small (tiny-r1)
FIT_ROUNDS = 30


PUBLISHED = "damage published"  # what the name of `Known` begins with


def costs_nothing(spec: TensorSpec, qtype: str) -> bool:
    """Whether the tensor has its numbers in this type, or no other."""
    return spec.fixed is not None or qtype in EXACT or qtype == spec.exact


class Damage(Protocol):
    """name: what it rests on, for the plan."""

    name: str

    def of(self, spec: TensorSpec, qtype: str) -> float:
        """If only this tensor has this type."""
        ...

    def total(self, damages: float) -> float:
        """Of a whole file, given the sum over its tensors."""
        ...


class Prior:
    """For models without a measurement. specs: all tensors of the model; a role's gain is shared by its tensors, so a
    model of any depth is judged alike."""

    name = "prior"

    def __init__(self, specs: Iterable[TensorSpec]):
        self.count = Counter(spec.role for spec in specs)

    def gain(self, spec: TensorSpec) -> float:
        """Damage at Q4_K, nats a token, if only this tensor has it."""
        return LEVEL * GAIN[spec.role] / self.count[spec.role]

    def of(self, spec: TensorSpec, qtype: str) -> float:
        """Nats a token if only this tensor has this type."""
        return 0.0 if costs_nothing(spec, qtype) else self.gain(spec) * ERROR[qtype]

    def total(self, damages: float) -> float:
        """Nats a token of a whole file, given the sum over its tensors."""
        return interact(damages)


class Known:
    """For models of a geometry that others measured. Roles that they did not measure have the prior's gain."""

    def __init__(self, found: published.Published, specs: Sequence[TensorSpec]):
        self.found, self.prior = found, Prior(specs)
        self.name = f"{PUBLISHED} of {found.models} by {found.credit}"

    def of(self, spec: TensorSpec, qtype: str) -> float:
        """Nats a token if only this tensor has this type."""
        if costs_nothing(spec, qtype):
            return 0.0
        gain = self.found.gain(spec.role, spec.layer)
        return (self.prior.gain(spec) if gain is None else gain) * ERROR[qtype]

    def total(self, damages: float) -> float:
        """Nats a token of a whole file, given the sum over its tensors."""
        return interact(damages)


def unmeasured(specs: Sequence[TensorSpec]) -> Damage:
    """For a model without a measurement of its own: what was published of its like, else the prior."""
    found = published.recognise(specs)
    return Known(found, specs) if found else Prior(specs)


class Measured:
    """A measurement of this model, smoothed: log damage is nearly gain of the tensor + error of the type.

    entries: (tensor, qtype) -> (nats, standard error). Each is drawn towards that additive model, the more the
    larger its relative error is against SPREAD, what the model leaves unexplained. Types without a measurement follow
    the model.
    """

    def __init__(self, entries: Mapping[tuple[str, str], tuple[float, float]], name: str):
        self.name = name
        self.gains: dict[str, float] = {}
        self.errors: dict[tuple[bool, str], float] = {}
        self.points: dict[tuple[str, str], _Point] = {}
        for (tensor, qtype), (kld, error) in entries.items():
            qtypes.get(qtype)
            numbers = all(is_finite(value) for value in (kld, error))
            if not numbers or error < 0:
                raise QuantkitError(f"{name}: {tensor} {qtype}: {kld} ± {error} is not a divergence")
            value = max(kld, error, FLOOR)
            self.points[tensor, qtype] = _Point(math.log(value), min(1.0, error / value))
        self._fit()

    def _fit(self) -> None:
        """Weighted alternating least squares; one imagined observation holds each type's error near the prior's."""
        self.gains = {tensor: 0.0 for tensor, _ in self.points}
        self.errors = {(routed, qtype): math.log(error) for routed in (False, True) for qtype, error in ERROR.items()}
        for _ in range(FIT_ROUNDS):
            sums: dict[str, list[tuple[float, float]]] = {}
            for (tensor, qtype), point in self.points.items():
                sums.setdefault(tensor, []).append((point.log - self.errors[_key(tensor, qtype)], point.weight))
            self.gains = {tensor: _mean(values) for tensor, values in sums.items()}
            off: dict[tuple[bool, str], list[tuple[float, float]]] = {
                key: [(math.log(ERROR[key[1]]), 1 / SPREAD**2)] for key in self.errors
            }
            for (tensor, qtype), point in self.points.items():
                off[_key(tensor, qtype)].append((point.log - self.gains[tensor], point.weight))
            self.errors = {key: _mean(values) for key, values in off.items()}

    def of(self, spec: TensorSpec, qtype: str) -> float:
        """Nats a token if only this tensor has this type. QuantkitError if nothing was measured of it."""
        if costs_nothing(spec, qtype):
            return 0.0
        if spec.name not in self.gains:
            raise QuantkitError(f"{self.name} has no entry for {spec.name}: it is of another model, or another layout")
        model = self.gains[spec.name] + self.errors[_key(spec.name, qtype)]
        point = self.points.get((spec.name, qtype))
        if point is None:
            return math.exp(model)
        share = SPREAD**2 / (SPREAD**2 + point.relative**2)
        return math.exp(share * point.log + (1 - share) * model)

    def total(self, damages: float) -> float:
        """Nats a token of a whole file, given the sum over its tensors."""
        return interact(damages)


@dataclass(frozen=True)
class _Point:
    """Logarithm of a measured damage and its relative standard error."""

    log: float
    relative: float

    @property
    def weight(self) -> float:
        return 1 / (SPREAD**2 + self.relative**2)


def _key(tensor: str, qtype: str) -> tuple[bool, str]:
    return split_name(tensor)[0] in ROUTED_ROLES, qtype


def _mean(values: list[tuple[float, float]]) -> float:
    """Weighted mean of (value, weight)."""
    return sum(value * weight for value, weight in values) / sum(weight for _, weight in values)


def interact(damages: float) -> float:
    """Damages add up while small; larger ones meet a model that is already off (docs/results/allocation.md)."""
    return damages * (1 + INTERACTION * damages)


INTERACTION = 0.3
