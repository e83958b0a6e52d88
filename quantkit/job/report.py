"""`quantkit report`: what a folder of `quantkit make` proves, on one self-contained page, and its figures as PNGs."""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from quantkit import __version__
from quantkit.calibration.coverage import coverage
from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import read_whole
from quantkit.formats.imatrix import ImatrixInfo, imatrix_digest, load_imatrix
from quantkit.formats.safetensors_header import load_object
from quantkit.formats.whole_file import write_whole
from quantkit.job.folder import CERTIFY, IMATRIX, PLAN, PROVENANCE, REPORT, VERIFY
from quantkit.planning.bitmap import bit_map
from quantkit.planning.plan import Plan
from quantkit.sizes import gb, gib
from quantkit.tensors import Imatrix

INK, BLUE, RED, GREY = "#1c2330", "#31688e", "#c0322b", "#9aa5b1"
SIZE = (4.6, 2.8)  # inches: at a phone's 390 pixels the figure's 9-point text is 11 pixels high
DPI = 160


@dataclass
class Material:
    """What lies in the folder. Anything but the scores or the plan may be missing.

    others: name -> scores of neighbouring folders that were measured against the same original on the same text.
    """

    folder: Path
    scores: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    certificate: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    imatrix: Imatrix = field(default_factory=dict)
    imatrix_info: ImatrixInfo | None = None
    others: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "Material":
        """QuantkitError if there is nothing to report on, or if a file is damaged."""
        scores = _json(folder / VERIFY) or {}
        plan = (
            Plan.from_json(read_whole(folder / PLAN, "plan"), str(folder / PLAN)) if (folder / PLAN).is_file() else None
        )
        if not scores and plan is None:
            raise QuantkitError(f"{folder}: neither {VERIFY} nor {PLAN}; give the folder that `quantkit make` left")
        made = cls(folder, scores, plan, _json(folder / CERTIFY), _json(folder / PROVENANCE) or {})
        if (folder / IMATRIX).is_file():
            made.imatrix, made.imatrix_info = load_imatrix(folder / IMATRIX)
        made.others = _comparable(folder, scores)
        return made


def _json(path: Path) -> dict[str, Any] | None:
    return load_object(read_whole(path, "record"), str(path)) if path.is_file() else None


def _comparable(folder: Path, scores: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Scores beside this folder with the same original, text and way of scoring: only those share a chart."""
    found = {}
    for path in sorted(folder.resolve().parent.glob(f"*/{VERIFY}")):
        other = _json(path) or {}
        keys = ("reference", "text_sha256", "tokens", "score")
        if path.parent != folder.resolve() and scores and all(other.get(k) == scores.get(k) for k in keys):
            found[path.parent.name] = other
    return found


def write_report(folder: Path) -> list[Path]:
    """Write report.html and report-*.png into the folder; returns their paths, the page first."""
    material = Material.load(folder)
    figures: dict[str, Figure] = {}
    with _style():
        for name, draw in FIGURES.items():
            if (figure := draw(material)) is not None:
                figures[name] = figure
        page = _page(material, {name: _svg(figure, name) for name, figure in figures.items()})
        made = {REPORT: page.encode(errors="backslashreplace")}
        for name, figure in figures.items():
            out = io.BytesIO()
            figure.savefig(out, format="png", dpi=DPI)
            made[f"report-{name}.png"] = out.getvalue()
    for name, data in made.items():
        write_whole(folder / name, data)
    return [folder / name for name in made]


def _style() -> AbstractContextManager[None]:
    return matplotlib.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "svg.fonttype": "none",
            "text.parse_math": False,  # folders may be called a$x_{$b
        }
    )


def _svg(figure: Figure, name: str) -> Markup:
    """The figure as an element of the page, the same bytes every time."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    return Markup(text[text.index("<svg") :])  # without the XML prologue, which names a DTD elsewhere


# Figures: None where the folder does not hold what they show.


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    return figure, figure.subplots()


def _whole_numbers(axes: Axes) -> None:
    """Ticks along x at whole numbers only: layers."""
    locator = axes.xaxis.get_major_locator()
    assert isinstance(locator, MaxNLocator)
    locator.set_params(integer=True)


def pareto(m: Material) -> Figure | None:
    """Divergence over size, the folder's own file among its neighbours."""
    if "kld_mean" not in m.scores:
        return None
    figure, axes = _axes()
    unit, name_of_unit = (1e9, "GB") if m.scores["bytes"] >= 1e9 else (1e6, "MB")
    every = {name: (s["bytes"] / unit, s["kld_mean"]) for name, s in m.others.items()}
    own = (m.scores["bytes"] / unit, m.scores["kld_mean"])
    points = sorted([*every.values(), own])
    front = [p for i, p in enumerate(points) if all(p[1] < q[1] for q in points[:i])]
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=GREY, linewidth=1, zorder=1)
    for name, (x, y) in every.items():
        axes.scatter(x, y, color=GREY, s=22, zorder=2)
        axes.annotate(name, (x, y), (4, 4), textcoords="offset points", fontsize=8.5, color=GREY)
    low, high = (m.scores.get("ci95") or {}).get("kld_mean") or (own[1], own[1])
    span = [[own[1] - low], [high - own[1]]]
    axes.errorbar(*own, yerr=span, color=RED, marker="o", markersize=6, capsize=3, zorder=3)
    name = os.fsencode(m.folder.resolve().name).decode(errors="replace")  # of a folder, it may be no text
    axes.annotate(name, own, (7, 5), textcoords="offset points", color=RED)
    axes.set(xlabel=f"file size in {name_of_unit}", ylabel="mean KLD in nats")
    axes.margins(0.25)
    axes.ticklabel_format(style="plain", useOffset=False)
    return figure


def layers(m: Material) -> Figure | None:
    """Each layer's own error, and the error gathered by then."""
    rows = m.scores.get("layers")
    if not rows:
        return None
    figure, axes = _axes()
    index = [row["layer"] for row in rows]
    colours = [RED if i in m.scores.get("bad_layers", ()) else BLUE for i in index]
    axes.bar(index, [row["own"] for row in rows], color=colours, label="its own, on the original's input")
    axes.plot(index, [row["error"] for row in rows], color=INK, marker=".", markersize=4, label="of the state after it")
    axes.set(xlabel="layer", ylabel="relative error")
    _whole_numbers(axes)
    axes.set_ylim(0, 1.3 * max(max(row["own"], row["error"]) for row in rows))
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    return figure


def kld(m: Material) -> Figure | None:
    """Histogram of the tokens' divergence, with its median, mean and 99th percentile."""
    histogram = m.scores.get("kld_histogram")
    if not histogram:
        return None
    figure, axes = _axes()
    edges, counts = np.array(histogram["edges"]), np.array(histogram["counts"])
    axes.stairs(100 * counts / max(1, counts.sum()), edges, fill=True, color=BLUE)
    for key, name in (("kld_median", "median"), ("kld_mean", "mean"), ("kld_p99", "99 %")):
        at = np.log10(max(m.scores[key], 1e-7))
        axes.axvline(at, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate(
            name,
            (at, 1),
            (2, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            rotation=90,
            va="top",
            fontsize=8.5,
        )
    exponents = range(-7, 2)
    axes.set_xticks(list(exponents), [f"1e{e}" if e else "1" for e in exponents])
    axes.set_xlim(max(-7, edges[np.argmax(counts > 0)] - 0.5), 1.5)
    axes.set(xlabel="KLD of a token in nats", ylabel="% of tokens")
    return figure


def domains(m: Material) -> Figure | None:
    """Perplexity of the original and of the file, domain by domain."""
    found = m.scores.get("domains")
    if not found:
        return None
    figure, axes = _axes()
    at = np.arange(len(found))
    ppl = [d["ppl"] for d in found.values()]
    spans = [(d.get("ci95") or {}).get("ppl") or (d["ppl"], d["ppl"]) for d in found.values()]
    error = [
        [p - low for p, (low, _) in zip(ppl, spans, strict=True)],
        [high - p for p, (_, high) in zip(ppl, spans, strict=True)],
    ]
    axes.bar(at - 0.2, [d["ppl_reference"] for d in found.values()], 0.38, color=GREY, label="original")
    axes.bar(at + 0.2, ppl, 0.38, color=BLUE, yerr=error, capsize=3, ecolor=INK, label="file")
    axes.set_xticks(at, list(found))
    axes.set_ylabel("perplexity")
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def expert_coverage(m: Material) -> Figure | None:
    """Calibration tokens of each layer's experts: fewest, median and most."""
    rows = coverage(m.imatrix, 0)
    if not rows:
        return None
    figure, axes = _axes()
    index = [row.layer for row in rows]
    axes.fill_between(
        index,
        [max(1, row.least) for row in rows],
        [row.most for row in rows],
        color=BLUE,
        alpha=0.25,
        label="fewest to most",
    )
    axes.plot(index, [row.median for row in rows], color=BLUE, marker=".", label="median")
    axes.set_yscale("log")
    axes.set(xlabel="layer", ylabel="calibration tokens per expert")
    _whole_numbers(axes)
    axes.legend(frameon=False, fontsize=8.5)
    return figure


FIGURES: Mapping[str, Callable[[Material], Figure | None]] = {
    "pareto": pareto,
    "bitmap": lambda m: bit_map(m.plan) if m.plan else None,
    "layers": layers,
    "kld": kld,
    "domains": domains,
    "coverage": expert_coverage,
}

MISSING = {
    **dict.fromkeys(("pareto", "layers", "kld", "domains"), "Not measured: run `quantkit verify --json verify.json`."),
    "bitmap": f"No {PLAN} in this folder.",
    "coverage": f"No {IMATRIX} with expert counts in this folder.",
    "generation": "Not measured: run `quantkit verify --prompts 16`.",
    "certificate": "Not certified: run `quantkit certify`.",
}


def _page(m: Material, figures: Mapping[str, Markup]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("quantkit.job", "templates"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
    )
    plan, scores = m.plan, m.scores
    title = f"{plan.model} · {plan.recipe}" if plan else str(scores.get("file", m.folder.name))
    target = f"made for {plan.target}, {plan.mla} MLA" if plan else ""
    return environment.get_template("report.html.jinja").render(
        title=title,
        subtitle=" · ".join(filter(None, (str(scores.get("file", "")), target))),
        tiles=_tiles(m),
        figures=figures,
        missing=MISSING,
        notes=_notes(m),
        domains=scores.get("domains"),
        generation=(scores.get("generation") or {}).get("summary"),
        certificate=m.certificate,
        provenance=_provenance(m),
    )


def _tiles(m: Material) -> list[tuple[str, str, str]]:
    s, plan, out = m.scores, m.plan, []
    if plan or s:
        size, bpw, routed = (
            (s["bytes"], s["bpw"], s["bpw_routed"])
            if s
            else (plan.n_bytes, plan.bpw, plan.routed_bpw)
            if plan
            else (0, 0.0, 0.0)
        )
        out.append(("size", gb(size), f"{gib(size)}, {size:,} bytes"))
        out.append(("bits per weight", f"{bpw:.3f}", f"routed experts {routed:.3f}"))
    if s:
        out += [
            ("perplexity", f"{s['ppl']:.3f}", f"original {s['ppl_reference']:.3f}"),
            ("mean KLD", f"{s['kld_mean']:.4f}", _span(s, "kld_mean", ".4f") or f"± {s['kld_mean_error']:.4f}"),
            ("same top token", f"{s['top1_agreement']:.1f} %", _span(s, "top1_agreement", ".1f")),
            ("tokens scored", f"{s['tokens']:,}", f"chunks of {s['chunk_length']}"),
        ]
    if m.certificate:
        verdict = m.certificate.get("verdict") or ("passed" if m.certificate.get("passed") else "failed")
        head, _, rest = verdict.partition(",")
        out.append(
            (
                "certificate",
                "FAILED" if head.startswith("failed") else head,
                f"{m.certificate.get('target')}, {rest.strip() or 'run in its program'}",
            )
        )
    return out


def _span(scores: Mapping[str, Any], key: str, form: str) -> str:
    span = (scores.get("ci95") or {}).get(key)
    return f"95 %: {span[0]:{form}} to {span[1]:{form}}" if span else ""


def _notes(m: Material) -> dict[str, str]:
    s, bad = m.scores, m.scores.get("bad_layers", ())
    named = f"Layer {', '.join(map(str, bad))} stands out." if bad else "No layer stands out."
    others = (
        f"Grey: {len(m.others)} file(s) beside this one, measured alike."
        if m.others
        else "No other file measured alike lies beside this one."
    )
    largest = f" The largest is {s['kld_max']:.3g} nats." if "kld_max" in s else ""
    info = m.imatrix_info
    return {
        "pareto": f"Lower and further left is better; the line is the front. {others}",
        "layers": f"Bars: what each layer alone does wrong. Line: what has gathered by then. {named}",
        "kld": f"How far the file's next-token distribution is from the original's, token by token.{largest}",
        "coverage": "Tokens of calibration text that reached each expert of a layer."
        + (f" Text: {', '.join(info.datasets)}, {info.chunk_count} chunks." if info else ""),
    }


def _provenance(m: Material) -> Sequence[tuple[str, str]]:
    names = {
        "checkpoint": "checkpoint fingerprint",
        "revision": "source revision",
        "recipe": "recipe",
        "plan": "plan digest",
        "target": "target",
        "mla": "MLA layout",
        "encoder": "encoder",
        "calibration_sha256": "calibration text, sha256",
        "quantkit": "quantkit",
    }
    out = [(label, str(m.provenance[key])) for key, label in names.items() if m.provenance.get(key) is not None]
    if m.imatrix:
        out.append(("importance, sha256", imatrix_digest(m.imatrix)))
    if read := m.scores.get("configuration"):
        out.append(("config.json", f"{read.get('status')}: {read.get('detail')}"))
    measured = {"text": "evaluation text", "text_sha256": "evaluation text, sha256", "reference": "original"}
    out += [(label, str(m.scores[key])) for key, label in measured.items() if key in m.scores]
    return [*out, ("report by", f"quantkit {__version__}")]
