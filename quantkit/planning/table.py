"""A plan as a table of 79 columns: GB and GiB (MB and MiB if small) and bpw per class, types by layer."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from textwrap import wrap
from typing import Any

from quantkit.planning.plan import CLASSES, Plan, PlannedTensor, bpw
from quantkit.sizes import both_units

WIDTH = 79
TYPES_WIDTH = 35
UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20))
DECIMAL = {"GiB": ("GB", 10**9), "MiB": ("MB", 10**6)}
Unit = tuple[str, int]


def unit_of(n_bytes: int) -> Unit:
    """Of a table whose largest entry has so many bytes."""
    return UNITS[0] if n_bytes >= UNITS[0][1] else UNITS[1]


def render(plan: Plan) -> str:
    """The whole table as plain text."""
    title = " · ".join(filter(None, (plan.model, f"recipe {plan.recipe}", f"target {plan.target}", f"mla {plan.mla}")))
    unit = unit_of(plan.n_bytes)
    lines = [
        f"{title} · {len(plan.tensors):,} tensors",
        "",
        _row("class", "types", DECIMAL[unit[0]][0], unit[0], "bpw"),
        _rule(),
    ]
    for group in CLASSES:
        tensors = [tensor for tensor in plan.tensors if tensor.group == group]
        if tensors:
            lines += _class_rows(group, tensors, unit)
    lines += [_rule(), *_rows("total", [""], plan.tensors, unit)]
    return "\n".join(
        [*lines, f"routed experts {plan.routed_bpw:.3f} bpw, the whole {plan.bpw:.3f} bpw: {plan.n_bytes:,} bytes", ""]
    )


def outlook(plan: Plan, file_bytes: int, kld: float, source: str) -> str:
    """The lines under the table: bytes of the whole file, KLD predicted (nats a token) from source, the budget."""
    lines = [
        f"whole file  {file_bytes:,} bytes ({both_units(file_bytes)})",
        f"predicted   KLD {kld:.4f} nats a token ({source})",
    ]
    if plan.outlook:
        lines += [
            f"budget      {plan.outlook.limit}",
            f"solver      {plan.outlook.solver}, at most {plan.outlook.gap:.3%} above the least possible",
        ]
    return "\n".join(part for line in lines for part in wrap(line, WIDTH, subsequent_indent=" " * len("whole file  ")))


def facts(plan: Plan, file_bytes: int, kld: float, source: str) -> dict[str, Any]:
    """`render` and `outlook` for programs. Of every class of tensors its bytes, bpw, and roles: type -> layers."""
    return {
        "model": plan.model,
        "recipe": plan.recipe,
        "target": plan.target,
        "mla": plan.mla,
        "tensors": len(plan.tensors),
        "weights": sum(tensor.n_weights for tensor in plan.tensors),
        "bytes": plan.n_bytes,
        "file_bytes": file_bytes,
        "bpw": plan.bpw,
        "routed_bpw": plan.routed_bpw,
        "predicted_kld": kld,
        "predicted_by": source,
        "outlook": asdict(plan.outlook) if plan.outlook else None,
        "classes": classes(plan.tensors),
    }


def classes(tensors: Sequence[PlannedTensor]) -> dict[str, dict[str, Any]]:
    """Of every class of tensors its bytes, bpw, and roles: type -> layers."""
    found: dict[str, Any] = {}
    for group, (mine,) in by_class([("", tensors)]):
        roles: dict[str, dict[str, list[int]]] = {}
        for tensor in mine:
            at = roles.setdefault(tensor.role, {}).setdefault(tensor.qtype, [])
            at += [] if tensor.layer is None else [tensor.layer]
        found[group] = {"bytes": sum(tensor.n_bytes for tensor in mine), "bpw": bpw(mine), "roles": roles}
    return found


Named = Sequence[tuple[str, Sequence[PlannedTensor]]]
"""Plans or files that are compared: name, tensors."""


def by_class(named: Named) -> list[tuple[str, list[list[PlannedTensor]]]]:
    """Classes of tensors, with those of each plan or file; classes that none has are left out."""
    rows = [(group, [[t for t in tensors if t.group == group] for _, tensors in named]) for group in CLASSES]
    return [(group, cells) for group, cells in rows if any(cells)]


def differing(named: Named) -> list[tuple[str, list[str]]]:
    """Roles whose types are not the same in all, with the types by layer of each: as `layer_ranges`, empty where there
    is no such tensor."""
    rows = []
    for role in dict.fromkeys(t.role for _, tensors in named for t in tensors):
        cells = [layer_ranges(t for t in tensors if t.role == role) for _, tensors in named]
        if len(set(cells)) > 1:
            rows.append((role, cells))
    return rows


def compare(a: Plan, b: Plan, kld_a: float, kld_b: float) -> str:
    """Two plans side by side, class by class; kld: what is predicted for each, nats a token."""
    unit, size = unit_of(max(a.n_bytes, b.n_bytes))
    head = f"{'':<16} {'A: ' + a.recipe:>24} {'B: ' + b.recipe:>24} {'B - A':>12}"
    second = f"{'class':<16}" + f" {unit:>14} {'bpw':>9}" * 2 + f" {unit:>12}"
    lines = [f"{a.model} · A {a.target}, mla {a.mla} · B {b.target}, mla {b.mla}", "", head, second, "─" * len(second)]
    named: Named = [("A", a.tensors), ("B", b.tensors)]
    for group, pair in (*by_class(named), ("total", [list(tensors) for _, tensors in named])):
        sizes = [sum(t.n_bytes for t in tensors) for tensors in pair]
        cells = "".join(f" {n / size:>14.3f} {bpw(t):>9.3f}" for n, t in zip(sizes, pair, strict=True))
        lines.append(f"{group:<16}{cells} {(sizes[1] - sizes[0]) / size:>+12.3f}")
    lines.append(f"{'':<16} {both_units(a.n_bytes):>24} {both_units(b.n_bytes):>24}")
    lines += [f"{'predicted KLD':<16} {kld_a:>24.4f} {kld_b:>24.4f} {kld_b - kld_a:>+12.4f}", ""]
    return "\n".join([*lines, *differing_lines(named, 96)])


def differing_lines(named: Named, width: int) -> list[str]:
    """`differing` as text: a role, and under it the types of each, the names of those that are alike together, wrapped
    to so many columns."""
    lines = []
    for role, cells in differing(named):
        lines.append(role)
        for types in dict.fromkeys(cells):
            alike = " ".join(name for (name, _), own in zip(named, cells, strict=True) if own == types)
            lines += wrap(f"{alike} {types or '–'}", width, initial_indent="  ", subsequent_indent="      ")
    return lines


def layer_ranges(tensors: Iterable[PlannedTensor]) -> str:
    """`blk 3-8 IQ2_XXS · 9-60 IQ1_S`; the type alone outside the blocks."""
    tensors = list(tensors)
    outside = list(dict.fromkeys(tensor.qtype for tensor in tensors if tensor.layer is None))
    types = sorted({(tensor.layer, tensor.qtype) for tensor in tensors if tensor.layer is not None})
    runs = []
    for qtype, run in groupby(types, key=lambda pair: pair[1]):
        layers = [layer for layer, _ in run]
        runs.append(f"{_ranges(layers)} {qtype}")
    return " · ".join([*outside, *(["blk " + " · ".join(runs)] if runs else [])])


def _ranges(layers: Sequence[int]) -> str:
    """Sorted numbers as `0-2,5`."""
    pieces = []
    for _, run in groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0]):
        numbers = [n for _, n in run]
        pieces.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return ",".join(pieces)


def _class_rows(group: str, tensors: list[PlannedTensor], unit: Unit) -> list[str]:
    """One line per distinct assignment; roles that share one stand together."""
    assigned: dict[str, list[str]] = {}
    for role in dict.fromkeys(tensor.role for tensor in tensors):
        assigned.setdefault(layer_ranges(t for t in tensors if t.role == role), []).append(role)
    if group.startswith("experts"):
        texts = list(assigned)
    else:
        texts = [f"{', '.join(roles)}: {types}" for types, roles in assigned.items()]
    wrapped = [line for text in texts for line in wrap(text, TYPES_WIDTH, subsequent_indent="  ")]
    return _rows(group, wrapped, tensors, unit)


def _rows(group: str, texts: list[str], tensors: Sequence[PlannedTensor], unit: Unit) -> list[str]:
    n_bytes = sum(tensor.n_bytes for tensor in tensors)
    decimal = n_bytes / DECIMAL[unit[0]][1]
    first = _row(group, texts[0], f"{decimal:,.3f}", f"{n_bytes / unit[1]:,.3f}", f"{bpw(tensors):.3f}")
    return [first, *(_row("", text, "", "", "") for text in texts[1:])]


def _row(group: str, types: str, decimal: str, binary: str, bits: str) -> str:
    return f"{group:<13} {types:<{TYPES_WIDTH}} {decimal:>10} {binary:>10} {bits:>7}".rstrip()


def _rule() -> str:
    return "─" * (13 + TYPES_WIDTH + 10 + 10 + 7 + 4)
