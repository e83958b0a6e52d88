"""quantkit/planning/published.toml from published damage of single tensors of large models.

    python scripts/research/fit_published.py TABLES -o quantkit/planning/published.toml

TABLES: a folder of `MODEL.kld.csv` and `MODEL.ppl.csv`, the kld_results.csv and ppl_results.csv of
https://github.com/Thireus/GGUF-Tool-Suite (models/MODEL/; © 2025 Thireus; its licence asks for credit to Thireus, GGUF
Tool Suite and its contributors). A cell is KLD or perplexity of a file of about 4 bits in which this tensor, or its
group, has the type of the row. What is fitted, and how well it holds: docs/results/allocation.md.
"""

import csv
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from quantkit.codecs.types import QTYPES
from quantkit.planning.prior import GAIN
from quantkit.tensors import ROUTED_ROLES, split_name

Damages = dict[str, np.ndarray]
"""Role -> nats a token of that role in each layer, at the type of the table; outside the layers one number."""

CREDIT = "Thireus, GGUF Tool Suite and its contributors"
MISSING = 404  # how a table says that nothing was measured
KNOT = 4  # layers between two knots of a profile; the last layer has its own
FLAT = 0.7  # how far profiles are drawn towards a flat one; judge_published.py shows what other numbers give
FLOOR = 0.05  # of a role's mean: what lies below cannot be told from noise
ERROR = {"iq1_m": QTYPES["IQ1_M"].damage, "iq1_m_r4": QTYPES["IQ1_M"].damage, "iq2_xxs": QTYPES["IQ2_XXS"].damage}
ERROR["iq1_kt"] = 0.64 * QTYPES["IQ1_M"].damage  # whole V3.1-Terminus in one type: KLD 0.520 against IQ1_M's 0.871


@dataclass(frozen=True)
class Known:
    """A family of models that were measured, recognised by depth (without MTP layers), hidden size and experts.

    level: which table's sum is believed; None: R1's published perplexities say it. GLM-5.1's own would be ten times too
    much: any change in an early layer gives 0.017, so most of a cell there is not its tensor's."""

    name: str
    title: str
    geometry: tuple[int, int, int]
    tables: tuple[str, ...]
    level: str | None


KNOWN = (
    Known(
        "deepseek-v3",
        "R1-0528, V3-0324, V3.1 and V3.1-Terminus",
        (61, 7168, 256),
        ("DeepSeek-R1-0528.ppl", "DeepSeek-V3-0324.ppl", "DeepSeek-V3.1.ppl", "DeepSeek-V3.1-Terminus.kld"),
        None,
    ),
    Known("kimi-k2", "Kimi-K2-Thinking", (61, 7168, 384), ("Kimi-K2-Thinking.kld",), "Kimi-K2-Thinking.kld"),
    Known("glm-5", "GLM-5.1", (78, 6144, 256), ("GLM-5.1.kld",), None),
)
PERPLEXITY = {"1.58bit": 5.5749, "1.73bit": 4.7238, "2.22bit": 4.0964}
R1_LOSS = {recipe: math.log(ppl / 3.3490) for recipe, ppl in PERPLEXITY.items()}
"""Unsloth's files of R1 against Q8_0, published perplexities."""


def read_table(path: Path, n_layer: int) -> Damages:
    """One table, its baseline taken off, damage at Q4_K; a group's damage is shared out as in the small models."""
    with path.open(encoding="utf-8") as file:
        names, cells = list(csv.reader(file))[:2]
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for name, cell in zip(names[1:], cells[1:], strict=True):
        role, layer = split_name(name)
        value = float(cell)
        if value != MISSING and (layer is None or layer < n_layer) and not role.startswith(("indexer", "nextn")):
            values[role][-1 if layer is None else layer] = value
    if path.name.endswith(".ppl.csv"):
        values = {role: {layer: math.log(v) for layer, v in row.items()} for role, row in values.items()}
    base = baseline(values, path)
    found = {}
    for role, row in values.items():
        full = np.full(n_layer if -1 not in row else 1, np.nan)
        for layer, value in row.items():
            full[max(layer, 0)] = (value - base) / ERROR[cells[0]] * share(role, values)
        found[role] = full
    return found


def baseline(values: dict[str, dict[int, float]], path: Path) -> float:
    """What the table would say of a file where nothing was lowered, which none of them states.

    KLD: the least cell, which is the noise of other kernels (V3.1-Terminus: 0.0035; the same weights with rows
    interleaved are published as 0.0034). Perplexity: the median of the small tensors of the first layers.
    """
    if path.name.endswith(".kld.csv"):
        return min(v for row in values.values() for v in row.values() if v > 0)
    first = min(values["ffn_down_exps"])
    early = [v for r in values if r.endswith("_shexp") for layer, v in values[r].items() if layer < first + 10]
    return float(np.median(early + [v for r in ("ffn_gate", "ffn_up", "ffn_down") for v in values[r].values()]))


def share(role: str, values: dict[str, dict[int, float]]) -> float:
    """1, or a role's part of the group that it was lowered with: roles with the same cells in all layers."""
    group = [r for r in values if values[r] == values[role] and len(values[role]) > 1]
    return GAIN[role] / sum(GAIN[r] for r in group) if len(group) > 1 else 1.0


def experts(table: Damages) -> float:
    """Damage of all routed experts together."""
    return sum(float(np.nansum(table[role])) for role in ROUTED_ROLES)


def knots(n_layer: int) -> list[int]:
    """Layers that a profile is given at."""
    return [*range(0, n_layer - KNOT // 2 - 1, KNOT), n_layer - 2, n_layer - 1]


def smooth(layers: np.ndarray) -> np.ndarray:
    """Values at the knots: means under the hat functions between them, at least FLOOR of the mean. Layers without a
    value (nan) count as the nearest with one."""
    at = knots(len(layers))
    there = np.flatnonzero(~np.isnan(layers))
    filled = np.interp(np.arange(len(layers)), there, layers[there])
    hats = np.stack([np.interp(np.arange(len(layers)), at, row) for row in np.eye(len(at))])
    return np.maximum(hats @ filled / hats.sum(1), FLOOR * max(np.mean(layers[there]), 1e-12))


def fit(tables: list[Damages], flat: float = FLAT) -> dict[str, np.ndarray]:
    """Role -> damage at Q4_K at the knots, routed experts together 1: the mean of the tables, each scaled so.

    Roles that no table has take their level from the small models, among what they share an input with. Profiles of all
    but the shared expert, on whose last layer every table agrees, are drawn towards flat ones.
    """
    n_layer = len(tables[0]["ffn_down_exps"])
    found = {}
    for role in dict.fromkeys(role for table in tables for role in table):
        rows = [table[role] / experts(table) for table in tables if role in table]
        mean = np.mean(rows, axis=0)
        found[role] = np.maximum(mean, 0) if len(mean) == 1 else smooth(mean)
        if len(mean) > 1 and not role.endswith("_shexp"):
            level = np.mean(np.interp(np.flatnonzero(~np.isnan(mean)), knots(n_layer), found[role]))
            found[role] = (1 - flat) * found[role] + flat * level
    attention = [role for role in found if role.startswith("attn_")]
    like = attention or ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]
    level = sum(found[role] for role in like) / sum(GAIN[role] for role in like)
    if not attention:  # the experts' depth says nothing of attention's
        level = np.full_like(level, 1 / n_layer / sum(GAIN[role] for role in like))
    for role in ("attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_k_b", "attn_v_b", "attn_output"):
        found.setdefault(role, level * GAIN[role])
    found["attn_kv_b"] = found["attn_k_b"] + found["attn_v_b"]
    return found


def noise(table: Damages) -> float:
    """Standard error of one cell of the routed experts, over their mean: from second differences between layers."""
    rows = [table[role][~np.isnan(table[role])] for role in ROUTED_ROLES]
    error = np.median(np.abs(np.concatenate([np.diff(row, 2) for row in rows]))) / 0.6745 / math.sqrt(6)
    return float(error / np.mean(np.concatenate(rows)))


@click.command()
@click.argument("tables", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True)
def main(tables: Path, output: Path) -> None:
    """Fit all families and write the file."""
    lines = [
        "# Damage of single tensors of large models, nats a token at Q4_K × 10^-6, at the layers of `knots`. Written",
        f"# by scripts/research/fit_published.py from tables published by {CREDIT}",
        "# (https://github.com/Thireus/GGUF-Tool-Suite, © 2025 Thireus): smoothed over layers, of several models.",
        "# noise: standard error of one cell of each table over the mean of its routed experts.",
        "",
    ]
    r1: float | None = None
    for known in KNOWN:
        n_layer, d, n_expert = known.geometry
        read = [read_table(tables / f"{name}.csv", n_layer) for name in known.tables]
        unit = fit(read)
        r1 = r1 or r1_level(unit, n_layer)  # of the first family, which is R1's
        level = experts(read_table(tables / f"{known.level}.csv", n_layer)) if known.level else r1
        lines += [f"[{known.name}]", f'models = "{known.title}"', f'credit = "{CREDIT}"']
        lines += [f"n_layer = {n_layer}", f"hidden_size = {d}", f"n_expert = {n_expert}"]
        lines += [f"noise = [{', '.join(f'{noise(table):.2f}' for table in read)}]", f"knots = {knots(n_layer)}"]
        lines += ["", f"[{known.name}.damage]"]
        for role, row in unit.items():
            lines.append(f"{role} = [{', '.join(f'{1e6 * level * x:.3g}' for x in row)}]")
        lines.append("")
    output.write_text("\n".join(lines), encoding="utf-8")
    click.echo(f"{output}: {output.stat().st_size:,} bytes")


def r1_level(unit: dict[str, np.ndarray], n_layer: int) -> float:
    """Damage of R1's routed experts at Q4_K: the geometric mean of what Unsloth's three files say."""
    from judge_published import damage_of, unsloth  # it needs this file

    at = []
    for recipe, loss in R1_LOSS.items():
        total = (math.sqrt(1 + 4 * 0.3 * loss) - 1) / (2 * 0.3)  # planning.damage.interact, backwards
        at.append(total / damage_of(unsloth(recipe), unit, n_layer))
    return math.exp(np.mean(np.log(at)))


if __name__ == "__main__":
    main()
