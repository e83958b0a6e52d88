"""A plan is fact: every tensor of the file with its type, bytes and offset, in file order.

It follows from shapes and a recipe alone, so the header and all offsets are known before a weight is read. bpw is bits
of tensor data per weight; the header is not counted.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any

from quantkit.codecs import types as qtypes
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_spec import MAX_NAME, pad
from quantkit.models.config import MLA, Mla, mla_of
from quantkit.planning import fields, targets
from quantkit.tensors import ROUTED_ROLES, TensorSpec, split_name

FORMAT = 1
MAX_WEIGHTS = 1 << 50
MAX_TENSORS = 1 << 17

CLASSES = ("experts gate", "experts up", "experts down", "attention", "shared", "dense", "embeddings", "rest")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file.

    shape: as in TensorSpec, slowest first. offset: from the start of the data section of an unsplit file.
    rule: number of the recipe's rule, None where the format fixes the type. why: that rule's reason.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    layer: int | None
    qtype: str
    row_bytes: int
    n_bytes: int
    offset: int
    rule: int | None
    why: str

    @property
    def n_weights(self) -> int:
        """Weights in all."""
        return prod(self.shape)

    @property
    def is_routed(self) -> bool:
        """Whether it holds the matrices of routed experts."""
        return targets.tensor_class(self.role) == targets.EXPERTS

    @property
    def group(self) -> str:
        """Which of CLASSES it is counted under."""
        return _group(self.role, len(self.shape))


@dataclass(frozen=True)
class Outlook:
    """What an allocation promises. limit: the budget in words; kld: predicted KL divergence, nats a token; gap: share
    of the damage that another choice could save at most; damage: what the prediction rests on."""

    limit: str
    solver: str
    kld: float
    gap: float
    damage: str


@dataclass(frozen=True)
class Plan:
    """outlook: None where rules alone chose."""

    model: str
    recipe: str
    target: str
    mla: Mla
    tensors: tuple[PlannedTensor, ...]
    outlook: Outlook | None = None

    @cached_property
    def by_name(self) -> dict[str, PlannedTensor]:
        """The tensors by their GGUF names."""
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def n_bytes(self) -> int:
        """Bytes of tensor data, without header and padding."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def data_bytes(self) -> int:
        """Length of the data section of an unsplit file: n_bytes with padding between tensors."""
        return max((pad(tensor.offset + tensor.n_bytes) for tensor in self.tensors), default=0)

    @property
    def bpw(self) -> float:
        """Bits of data per weight, of all tensors."""
        return bpw(self.tensors)

    @property
    def routed_bpw(self) -> float:
        """Bits of data per weight of the routed experts."""
        return bpw(tensor for tensor in self.tensors if tensor.is_routed)

    def check_model(self, specs: Iterable[TensorSpec]) -> None:
        """QuantkitError unless it names exactly these tensors, with their shapes."""
        shapes = {spec.name: spec.shape for spec in specs}
        if missing := [name for name in shapes if name not in self.by_name]:
            raise QuantkitError(f"plan has no tensor {missing[0]} ({len(missing)} missing): it is for another model")
        for tensor in self.tensors:
            if shapes.get(tensor.name) != tensor.shape:
                raise QuantkitError(
                    f"plan's tensor {tensor.name} {tensor.shape} is not in this model: it is for another one"
                )

    def digest(self) -> str:
        """sha256 of what decides the layout of the file: layout, names, shapes, types, order. Not of reasons."""
        facts = [self.mla, [[t.name, list(t.shape), t.qtype] for t in self.tensors]]
        return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> str:
        """plan.json: one line per tensor, in file order."""
        head = {"quantkit_plan": FORMAT, "model": self.model, "recipe": self.recipe, "target": self.target}
        head |= {"mla": self.mla, "n_bytes": self.n_bytes, "digest": self.digest()}
        head |= {"outlook": asdict(self.outlook)} if self.outlook else {}
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        rows = ",\n".join("    " + json.dumps(asdict(tensor), ensure_ascii=False) for tensor in self.tensors)
        return "\n".join(["{", *lines, '  "tensors": [', rows, "  ]", "}\n"])

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "plan.json") -> "Plan":
        """The plan in a plan.json, believed in nothing: sizes and offsets must be those that follow from the types."""
        try:
            table = fields.load_json(text)
        except (ValueError, RecursionError) as error:
            raise QuantkitError(f"{source}: not a plan: {str(error)[:200] or type(error).__name__}") from None
        try:
            return _read_plan(table)
        except QuantkitError as error:
            raise QuantkitError(f"{source}: {error}") from None


def offsets(sizes: Iterable[int]) -> list[int]:
    """Where each tensor's data starts when tensors of these byte sizes follow each other in one file."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end = pad(end + size)
    return starts


def bpw(tensors: Iterable[PlannedTensor]) -> float:
    """Bits of data per weight; 0 of nothing."""
    sizes = [(tensor.n_bytes, tensor.n_weights) for tensor in tensors]
    return 8 * sum(b for b, _ in sizes) / max(1, sum(n for _, n in sizes))


def check_rows(name: str, role: str, n_in: int, qtype: str) -> None:
    """Refuse a type whose blocks do not divide the rows, or that needs importance where there is none."""
    block = qtypes.get(qtype).block_size
    if n_in % block:
        use = " ".join(q for q in qtypes.QTYPES if qtypes.fits(q, n_in))
        raise QuantkitError(f"{name}: rows of {n_in} weights do not divide into {qtype} blocks of {block}; {use} fit")
    if role == "token_embd" and qtypes.needs_importance(qtype):
        raise QuantkitError(f"{name}: {qtype} needs importance, and embeddings have none; use Q2_K or more")


def _group(role: str, n_dims: int) -> str:
    if role in ROUTED_ROLES:
        return f"experts {role.split('_')[1]}"
    if n_dims < 2 or role == "ffn_gate_inp":
        return "rest"
    for start, group in (("attn_", "attention"), ("token_embd", "embeddings"), ("output", "embeddings")):
        if role.startswith(start):
            return group
    return "shared" if role.endswith("_shexp") else "dense" if role in ("ffn_gate", "ffn_up", "ffn_down") else "rest"


# Reading a plan.json that anyone may have written.


def _read_plan(table: Any) -> Plan:
    version = fields.typed(table, "quantkit_plan", int, "the plan")
    if version != FORMAT:
        raise QuantkitError(f"plan format {version}; this quantkit reads {FORMAT}: make the plan again")
    fields.known(
        table,
        {"quantkit_plan", "model", "recipe", "target", "mla", "n_bytes", "digest", "outlook", "tensors"},
        "the plan",
    )
    model, recipe, target, mla = (fields.text(table, key, "the plan") for key in ("model", "recipe", "target", "mla"))
    if mla not in MLA:
        raise QuantkitError(f"unknown mla {mla!r:.60}; known: {' '.join(MLA)}")
    for key, value in (("model", model), ("recipe", recipe)):
        if len(value) > 200 or "/" in value or "\\" in value:  # they become part of file names
            raise QuantkitError(f"{key} {value!r:.80} must be a plain name")
    rows = fields.typed(table, "tensors", list, "the plan")
    if not 0 < len(rows) <= MAX_TENSORS:
        raise QuantkitError(f"{len(rows)} tensors; a plan has 1 to {MAX_TENSORS}")
    tensors = tuple(_read_tensor(row, f"tensor {i}") for i, row in enumerate(rows))
    plan = Plan(model, recipe, target, MLA[mla], tensors, _read_outlook(table))
    _check_plan(plan)
    if fields.typed(table, "n_bytes", int, "the plan") != plan.n_bytes:
        raise QuantkitError(f"n_bytes is {table['n_bytes']}, but the tensors sum to {plan.n_bytes}")
    if fields.typed(table, "digest", str, "the plan") != plan.digest():
        raise QuantkitError("digest does not match the tensors: the plan was changed by hand; make it again")
    return plan


def _read_outlook(table: Any) -> Outlook | None:
    if "outlook" not in table:
        return None
    row = fields.typed(table, "outlook", dict, "the plan")
    fields.known(row, {field.name for field in dataclasses.fields(Outlook)}, "outlook")
    kld, gap = (fields.typed(row, key, float, "outlook") for key in ("kld", "gap"))
    limit, solver, damage = (fields.text(row, key, "outlook") for key in ("limit", "solver", "damage"))
    return Outlook(limit, solver, kld, gap, damage)


def _read_tensor(row: Any, where: str) -> PlannedTensor:
    name = fields.text(row, "name", where)
    if not 0 < len(name.encode()) <= MAX_NAME:
        raise QuantkitError(f"{where}: name {name!r:.80} must be 1 to {MAX_NAME} bytes")
    fields.known(row, {field.name for field in dataclasses.fields(PlannedTensor)}, name)
    shape = tuple(fields.typed(row, "shape", list, name))
    if not 1 <= len(shape) <= 4 or not all(type(n) is int and 0 < n <= MAX_WEIGHTS for n in shape):
        raise QuantkitError(f"{name}: shape {list(shape)!r:.80} must be 1 to 4 positive numbers")
    if prod(shape) > MAX_WEIGHTS:
        raise QuantkitError(f"{name}: shape {list(shape)} has more than {MAX_WEIGHTS} weights")
    role, layer = split_name(name)
    if (fields.text(row, "role", name), row.get("layer", -1)) != (role, layer) or type(row["layer"]) is bool:
        raise QuantkitError(f"{name}: role and layer must be {role!r} and {layer}, as its name says")
    qtype = fields.text(row, "qtype", name)
    rule = None if row.get("rule", "") is None else fields.typed(row, "rule", int, name)
    sizes = {key: fields.typed(row, key, int, name) for key in ("row_bytes", "n_bytes", "offset")}
    try:
        check_rows(name, role, shape[-1], qtype)
    except QuantkitError as error:
        raise QuantkitError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
    return PlannedTensor(name, shape, role, layer, qtype, rule=rule, why=fields.text(row, "why", name), **sizes)


def _check_plan(plan: Plan) -> None:
    if len(plan.by_name) != len(plan.tensors):
        names = [tensor.name for tensor in plan.tensors]
        raise QuantkitError(f"tensor {next(n for i, n in enumerate(names) if n in names[:i])} appears twice")
    if mla_of(plan.by_name, plan.mla) != plan.mla:
        raise QuantkitError(f"mla is {plan.mla}, but the tensors are in the other layout")
    for tensor in plan.tensors:
        row = qtypes.row_bytes(tensor.qtype, tensor.shape[-1])
        n_bytes = row * prod(tensor.shape[:-1])
        if (tensor.row_bytes, tensor.n_bytes) != (row, n_bytes):
            raise QuantkitError(f"{tensor.name}: row_bytes and n_bytes must be {row} and {n_bytes}")
    for tensor, start in zip(plan.tensors, offsets(t.n_bytes for t in plan.tensors), strict=True):
        if tensor.offset != start:
            raise QuantkitError(f"{tensor.name}: offset must be {start}, not {tensor.offset}")
    check_target(plan)


def check_target(plan: Plan) -> None:
    """Refuse what the target cannot compute."""
    targets.check_mla(plan.mla, plan.target)
    for tensor in plan.tensors:
        targets.check(plan.target, tensor.name, tensor.shape, tensor.qtype)
