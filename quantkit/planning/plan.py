"""A plan is fact: every tensor of the file with its type, bytes and offset, in file order.

It follows from shapes and a recipe alone, so the header and all offsets are known before a weight is read. bpw is bits
of tensor data per weight; the header is not counted.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from math import prod
from typing import Any

from quantkit.codecs import types as qtypes
from quantkit.errors import QuantkitError
from quantkit.planning import targets
from quantkit.planning.recipe import MLA, Recipe, Rule
from quantkit.tensors import TensorSpec

ALIGNMENT = 32
FORMAT = 1
MAX_NAME = 63  # GGML_MAX_NAME less its final zero
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
        return prod(self.shape)

    @property
    def is_routed(self) -> bool:
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
    mla: str
    tensors: tuple[PlannedTensor, ...]
    outlook: Outlook | None = None

    @cached_property
    def by_name(self) -> dict[str, PlannedTensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def n_bytes(self) -> int:
        """Bytes of tensor data, without header and padding."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def data_bytes(self) -> int:
        """Length of the data section of an unsplit file: n_bytes with padding between tensors."""
        return max((_padded(tensor.offset + tensor.n_bytes) for tensor in self.tensors), default=0)

    @property
    def bpw(self) -> float:
        return bpw(self.tensors)

    @property
    def routed_bpw(self) -> float:
        return bpw(tensor for tensor in self.tensors if tensor.is_routed)

    @property
    def bytes_by_class(self) -> dict[str, int]:
        """Tensor data bytes under each of CLASSES, all of them listed."""
        counts = dict.fromkeys(CLASSES, 0)
        for tensor in self.tensors:
            counts[tensor.group] += tensor.n_bytes
        return counts

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
            table = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise QuantkitError(f"{source}: not a plan: {str(error)[:200] or type(error).__name__}") from None
        try:
            return _read_plan(table)
        except QuantkitError as error:
            raise QuantkitError(f"{source}: {error}") from None


def make_plan(
    specs: Sequence[TensorSpec],
    recipe: Recipe,
    target: str | None = None,
    model: str = "",
    chosen: Mapping[str, str] | None = None,
    outlook: Outlook | None = None,
) -> Plan:
    """Give every tensor the type of the first rule that matches it, and refuse what the target cannot compute.

    chosen: tensor name -> qtype for the tensors that the recipe leaves to a budget (see `budget.plan_within`).
    """
    target = target or recipe.target
    picked = []
    for spec, rule in rule_of_each(specs, recipe, target):
        qtype = spec.fixed if rule is None else rule.qtype or (chosen or {}).get(spec.name)
        if qtype is None:
            raise QuantkitError(f"{recipe.source}: {spec.name} is left to a budget; give one, such as --size 140GB")
        picked.append((spec, rule, qtype))
    tensors = _lay_out(picked)
    mla = mla_of((spec.role for spec in specs), recipe.mla)
    targets.check_mla(mla, target)
    targets.check(tensors, target)
    return Plan(model, recipe.name, target, mla, tensors, outlook)


def rule_of_each(specs: Sequence[TensorSpec], recipe: Recipe, target: str) -> list[tuple[TensorSpec, Rule | None]]:
    """Every tensor with the rule that decides it (None where the format does). A rule without use is refused."""
    targets.get(target)
    rules = recipe.rules_for(target)
    moe_layers = sorted({spec.layer for spec in specs if spec.is_routed and spec.layer is not None})
    used: set[int] = set()
    found = []
    for spec in specs:
        rule = None if spec.fixed else _first_match(spec, rules, moe_layers, used)
        if rule is None and not spec.fixed:
            what = f"{spec.name} (role {spec.role}, target {target})"
            raise QuantkitError(f"{recipe.source}: no rule for {what}; add one")
        found.append((spec, rule))
    _refuse_useless(recipe, rules, used, specs, moe_layers)
    return found


def offsets(sizes: Iterable[int], alignment: int = ALIGNMENT) -> list[int]:
    """Where each tensor's data starts when tensors of these byte sizes follow each other in one file."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end = _padded(end + size, alignment)
    return starts


def bpw(tensors: Iterable[PlannedTensor]) -> float:
    """Bits of data per weight; 0 of nothing."""
    sizes = [(tensor.n_bytes, tensor.n_weights) for tensor in tensors]
    return 8 * sum(b for b, _ in sizes) / max(1, sum(n for _, n in sizes))


def mla_of(roles: Iterable[str], default: str = "split") -> str:
    """The MLA layout that these tensors are in."""
    roles = set(roles)
    split, combined = not roles.isdisjoint(("attn_k_b", "attn_v_b")), "attn_kv_b" in roles
    if split and combined:
        raise QuantkitError("attn_kv_b and attn_k_b/attn_v_b in one file: llama.cpp rejects it; keep one MLA layout")
    return "combined" if combined else "split" if split else default


def _first_match(spec: TensorSpec, rules: Sequence[Rule], moe_layers: list[int], used: set[int]) -> Rule | None:
    """The winner. Rules behind a share of the layers count as used too: in a shallow model the share may be all."""
    winner = None
    for rule in rules:
        if rule.matches(spec, moe_layers):
            used.add(rule.number)
            winner = winner or rule
            if rule.share is None:
                break
    return winner


def _refuse_useless(
    recipe: Recipe, rules: Sequence[Rule], used: set[int], specs: Sequence[TensorSpec], moe_layers: list[int]
) -> None:
    for rule in rules:
        if rule.number in used or rule.optional:
            continue
        what = f"{recipe.source}: rule {rule.number} ({', '.join(rule.match)} -> {rule.qtype or 'allocate'})"
        hits = [spec for spec in specs if rule.matches(spec, moe_layers)]
        if not hits:
            raise QuantkitError(f"{what} matches no tensor; correct it, or set optional = true")
        reason = "types are fixed by the format" if all(s.fixed for s in hits) else "tensors are taken by earlier rules"
        raise QuantkitError(f"{what} never applies: its {reason}; remove or move it")


def _lay_out(chosen: Sequence[tuple[TensorSpec, Rule | None, str]]) -> tuple[PlannedTensor, ...]:
    sized = []
    for spec, rule, qtype in chosen:
        _check_rows(spec.name, spec.role, spec.n_in, qtype)
        sized.append((spec, rule, qtype, qtypes.row_bytes(qtype, spec.n_in)))
    starts = offsets(row * spec.n_rows for spec, _, _, row in sized)
    return tuple(
        PlannedTensor(
            name=spec.name,
            shape=tuple(spec.shape),
            role=spec.role,
            layer=spec.layer,
            qtype=qtype,
            row_bytes=row,
            n_bytes=row * spec.n_rows,
            offset=start,
            rule=rule.number if rule else None,
            why=rule.why if rule else "the format allows no other type",
        )
        for (spec, rule, qtype, row), start in zip(sized, starts, strict=True)
    )


def _check_rows(name: str, role: str, n_in: int, qtype: str) -> None:
    if not qtypes.fits(qtype, n_in):
        use = " ".join(q for q in qtypes.QTYPES if qtypes.fits(q, n_in))
        block = qtypes.get(qtype).block_size
        raise QuantkitError(f"{name}: rows of {n_in} weights do not divide into {qtype} blocks of {block}; {use} fit")
    if role == "token_embd" and qtypes.needs_importance(qtype):
        raise QuantkitError(f"{name}: {qtype} needs importance, and embeddings have none; use Q2_K or more")


def _padded(n: int, alignment: int = ALIGNMENT) -> int:
    return -(-n // alignment) * alignment


def _group(role: str, n_dims: int) -> str:
    if role in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
        return f"experts {role.split('_')[1]}"
    if n_dims < 2 or role == "ffn_gate_inp":
        return "rest"
    for start, group in (("attn_", "attention"), ("token_embd", "embeddings"), ("output", "embeddings")):
        if role.startswith(start):
            return group
    return "shared" if role.endswith("_shexp") else "dense" if role in ("ffn_gate", "ffn_up", "ffn_down") else "rest"


# Reading a plan.json that anyone may have written.


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r:.80} appears twice")
    return table


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _typed(table: Any, key: str, kind: type, where: str) -> Any:
    """table[key], of exactly this type (True is no int)."""
    if not isinstance(table, dict):
        raise QuantkitError(f"{where} is not an object")
    if key not in table:
        raise QuantkitError(f"{where}: {key} is missing")
    if type(table[key]) is not kind:
        raise QuantkitError(f"{where}: {key} must be {kind.__name__}, not {table[key]!r:.60}")
    return table[key]


def _read_plan(table: Any) -> Plan:
    version = _typed(table, "quantkit_plan", int, "the plan")
    if version != FORMAT:
        raise QuantkitError(f"plan format {version}; this quantkit reads {FORMAT}: make the plan again")
    _known(
        table,
        {"quantkit_plan", "model", "recipe", "target", "mla", "n_bytes", "digest", "outlook", "tensors"},
        "the plan",
    )
    model, recipe, target, mla = (_text(table, key, "the plan") for key in ("model", "recipe", "target", "mla"))
    for key, value in (("model", model), ("recipe", recipe)):
        if len(value) > 200 or "/" in value or "\\" in value:  # they become part of file names
            raise QuantkitError(f"{key} {value!r:.80} must be a plain name")
    rows = _typed(table, "tensors", list, "the plan")
    if not 0 < len(rows) <= MAX_TENSORS:
        raise QuantkitError(f"{len(rows)} tensors; a plan has 1 to {MAX_TENSORS}")
    tensors = tuple(_read_tensor(row, f"tensor {i}") for i, row in enumerate(rows))
    plan = Plan(model, recipe, target, mla, tensors, _read_outlook(table))
    _check_plan(plan)
    if _typed(table, "n_bytes", int, "the plan") != plan.n_bytes:
        raise QuantkitError(f"n_bytes is {table['n_bytes']}, but the tensors sum to {plan.n_bytes}")
    if _typed(table, "digest", str, "the plan") != plan.digest():
        raise QuantkitError("digest does not match the tensors: the plan was changed by hand; make it again")
    return plan


def _read_outlook(table: Any) -> Outlook | None:
    if "outlook" not in table:
        return None
    row = _typed(table, "outlook", dict, "the plan")
    _known(row, {field.name for field in fields(Outlook)}, "outlook")
    kld, gap = (_typed(row, key, float, "outlook") for key in ("kld", "gap"))
    return Outlook(
        *(_text(row, key, "outlook") for key in ("limit", "solver")), kld, gap, _text(row, "damage", "outlook")
    )


def _read_tensor(row: Any, where: str) -> PlannedTensor:
    name = _text(row, "name", where)
    if not 0 < len(name.encode()) <= MAX_NAME:
        raise QuantkitError(f"{where}: name {name!r:.80} must be 1 to {MAX_NAME} bytes")
    _known(row, {field.name for field in fields(PlannedTensor)}, name)
    shape = tuple(_typed(row, "shape", list, name))
    if not 1 <= len(shape) <= 4 or not all(type(n) is int and 0 < n <= MAX_WEIGHTS for n in shape):
        raise QuantkitError(f"{name}: shape {list(shape)!r:.80} must be 1 to 4 positive numbers")
    if prod(shape) > MAX_WEIGHTS:
        raise QuantkitError(f"{name}: shape {list(shape)} has more than {MAX_WEIGHTS} weights")
    role, layer = split_name(name)
    if (_text(row, "role", name), row.get("layer", -1)) != (role, layer) or type(row["layer"]) is bool:
        raise QuantkitError(f"{name}: role and layer must be {role!r} and {layer}, as its name says")
    qtype = _text(row, "qtype", name)
    rule = None if row.get("rule", "") is None else _typed(row, "rule", int, name)
    sizes = {key: _typed(row, key, int, name) for key in ("row_bytes", "n_bytes", "offset")}
    try:
        _check_rows(name, role, shape[-1], qtype)
    except QuantkitError as error:
        raise QuantkitError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
    return PlannedTensor(name, shape, role, layer, qtype, rule=rule, why=_text(row, "why", name), **sizes)


def split_name(name: str) -> tuple[str, int | None]:
    """GGUF name -> role, layer: `blk.3.ffn_norm.weight` -> `ffn_norm`, 3."""
    stem = name.removesuffix(".weight").removesuffix(".bias")
    parts = stem.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isascii() and parts[1].isdigit() and len(parts[1]) < 6:
        return parts[2], int(parts[1])
    return stem, None


def _check_plan(plan: Plan) -> None:
    if plan.mla not in MLA:
        raise QuantkitError(f"unknown mla {plan.mla!r:.60}; known: {' '.join(MLA)}")
    if len(plan.by_name) != len(plan.tensors):
        names = [tensor.name for tensor in plan.tensors]
        raise QuantkitError(f"tensor {next(n for i, n in enumerate(names) if n in names[:i])} appears twice")
    if mla_of((tensor.role for tensor in plan.tensors), plan.mla) != plan.mla:
        raise QuantkitError(f"mla is {plan.mla}, but the tensors are in the other layout")
    for tensor in plan.tensors:
        row = qtypes.row_bytes(tensor.qtype, tensor.shape[-1])
        n_bytes = row * prod(tensor.shape[:-1])
        if (tensor.row_bytes, tensor.n_bytes) != (row, n_bytes):
            raise QuantkitError(f"{tensor.name}: row_bytes and n_bytes must be {row} and {n_bytes}")
    for tensor, start in zip(plan.tensors, offsets(t.n_bytes for t in plan.tensors), strict=True):
        if tensor.offset != start:
            raise QuantkitError(f"{tensor.name}: offset must be {start}, not {tensor.offset}")
    targets.check_mla(plan.mla, plan.target)
    targets.check(plan.tensors, plan.target)


def _known(table: dict[str, Any], keys: set[str], where: str) -> None:
    for key in table:
        if key not in keys:
            raise QuantkitError(f"{where}: unknown key {key!r:.60}")


def _text(table: Any, key: str, where: str) -> str:
    value = _typed(table, key, str, where)
    if len(value) > 1000 or not (value.isprintable() or not value):
        raise QuantkitError(f"{where}: {key} must be one line of text, not {value!r:.60}")
    return value
