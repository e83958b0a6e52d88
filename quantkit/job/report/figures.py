"""The figures of a report: None where the folder does not hold what they show, or holds a single point of it.

On a page their colours are those of the page, light or dark; as PNGs they are on white.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from quantkit.calibration.coverage import coverage
from quantkit.errors import printable
from quantkit.job.report.material import Material
from quantkit.job.report.parts import Point
from quantkit.planning.bitmap import bit_map
from quantkit.planning.plan import CLASSES
from quantkit.tensors import ROUTED_ROLES, split_name

INK, BLUE, RED, GREY, ORANGE, PAPER = "#1c2330", "#2f6690", "#c0322b", "#8793a0", "#b86a00", "#ffffff"
COLOURS = (BLUE, ORANGE, RED, GREY, INK)  # of what is compared
ON_PAGE = {INK: "ink", BLUE: "blue", RED: "bad", GREY: "grey", ORANGE: "orange", PAPER: "paper"}
SIZE = (4.6, 2.8)  # inches: at a phone's 390 pixels the figure's 9-point text is 11 pixels high
NARROW = 3.4  # inches, of a bit map on a phone
DPI = 160
MANY_LAYERS = 24  # beyond, pairs of bars would be hairs


def style() -> AbstractContextManager[None]:
    """Around all drawing."""
    return matplotlib.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "axes.facecolor": PAPER,
            "figure.facecolor": PAPER,
            "svg.fonttype": "none",
            "text.parse_math": False,  # folders may be called a$x_{$b
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )


def svg(figure: Figure, name: str) -> Markup:
    """The figure as an element of the page, in the page's colours; the same bytes every time."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]  # without the XML prologue, which names a DTD elsewhere
    for colour, variable in ON_PAGE.items():
        text = text.replace(f": {colour}", f": var(--{variable})")
    return Markup(text)


def png(figure: Figure) -> bytes:
    """The figure as a file of its own."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()


def axes_of(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def whole_numbers(axes: Axes) -> None:
    """Ticks along x at whole numbers only: layers."""
    locator = axes.xaxis.get_major_locator()
    assert isinstance(locator, MaxNLocator)
    locator.set_params(integer=True)


NEAR = 0.2, 0.06  # of the largest size and divergence: there names of points would lie on each other
LINE = 11  # points from one name to the next


def front(
    points: Sequence[Point], colours: Sequence[str], spans: Sequence[Sequence[float] | None] = ()
) -> Figure | None:
    """Divergence over size, and the front of those that no other beats in both. spans: 95 % intervals of the first
    ones."""
    if len(points) < 2:
        return None
    figure, axes = axes_of()
    unit, name_of_unit = (1e9, "GB") if max(size for _, size, _ in points) >= 1e9 else (1e6, "MB")
    by_size = sorted((size / unit, kld) for _, size, kld in points)
    best = [p for i, p in enumerate(by_size) if all(p[1] < q[1] for q in by_size[:i])]
    if len(best) > 1:
        axes.plot(*zip(*best, strict=True), color=GREY, linewidth=1, zorder=1)
    largest = max(size for _, size, _ in points), max(kld for _, _, kld in points)
    for i, ((name, size, kld), colour) in enumerate(zip(points, colours, strict=True)):
        axes.scatter(size / unit, kld, color=colour, s=26, zorder=2)
        near = sum(
            abs(size - s) < NEAR[0] * largest[0] and abs(kld - k) < NEAR[1] * largest[1] for _, s, k in points[:i]
        )  # their names stand there already
        place = 5, 4 - LINE * near
        axes.annotate(name, (size / unit, kld), place, textcoords="offset points", fontsize=8.5, color=colour)
    for (_, size, kld), colour, span in zip(points, colours, spans, strict=False):
        if span:
            error = [[kld - span[0]], [span[1] - kld]]
            axes.errorbar(size / unit, kld, yerr=error, color=colour, capsize=3, zorder=3)
    axes.set(xlabel=f"file size in {name_of_unit}", ylabel="mean KLD in nats")
    axes.margins(0.3)
    axes.set_ylim(0, 1.2 * max(kld for _, _, kld in points))
    axes.ticklabel_format(style="plain", useOffset=False)
    return figure


def legend(figure: Figure, names: Sequence[str], colours: Sequence[str]) -> None:
    """Below the axes: what stands for what."""
    columns = 2
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * -(-len(names) // columns))
    handles = [
        Line2D([], [], color=c, marker="o", linewidth=0, label=_as_text(n)) for n, c in zip(names, colours, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _as_text(name: str) -> str:
    """A file's name, of which matplotlib makes no formula."""
    return printable(name).replace("$", r"\$")


def position(m: Material) -> Figure | None:
    """The folder's own file among its neighbours and its baseline."""
    if "kld_mean" not in m.scores:
        return None
    points = [(m.name, m.scores["bytes"], m.scores["kld_mean"])]
    points += [(name, s["bytes"], s["kld_mean"]) for name, s in m.others.items()]
    colours = [RED, *[GREY] * len(m.others)]
    if m.baseline:
        points.append(("ggml's encoder", m.baseline["bytes"], m.baseline["kld_mean"]))
        colours.append(ORANGE)
    return front(points, colours, [(m.scores.get("ci95") or {}).get("kld_mean")])


def layers(m: Material) -> Figure | None:
    """Each layer's own error, and the error gathered by then."""
    rows = m.scores.get("layers") or []
    if len(rows) < 2:
        return None
    figure, axes = axes_of()
    index = [row["layer"] for row in rows]
    colours = [RED if i in m.scores.get("bad_layers", ()) else BLUE for i in index]
    axes.bar(index, [row["own"] for row in rows], color=colours, label="its own, on the original's input")
    axes.plot(index, [row["error"] for row in rows], color=INK, marker=".", markersize=4, label="of the state after it")
    axes.set(xlabel="layer", ylabel="relative error")
    whole_numbers(axes)
    axes.set_ylim(0, 1.3 * max(max(row["own"], row["error"]) for row in rows))
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    return figure


def kld(m: Material) -> Figure | None:
    """Histogram of the tokens' divergence, with its median, mean and 99th percentile."""
    histogram = m.scores.get("kld_histogram")
    if not histogram:
        return None
    figure, axes = axes_of()
    edges, counts = np.array(histogram["edges"]), np.array(histogram["counts"])
    share = 100 * counts / max(1, counts.sum())
    axes.stairs(share, edges, fill=True, color=BLUE)
    axes.set_ylim(0, 1.4 * max(share.max(), 1e-9))  # room for the names of the lines
    marks: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "rotation": 90}
    for key, name in (("kld_median", "median"), ("kld_mean", "mean"), ("kld_p99", "99 %")):
        at = np.log10(max(m.scores[key], 1e-7))
        axes.axvline(at, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate(name, (at, 1), (2, -2), va="top", fontsize=8.5, **marks)
    exponents = range(-7, 2)
    axes.set_xticks(list(exponents), [f"1e{e}" if e else "1" for e in exponents])
    axes.set_xlim(max(-7, edges[np.argmax(counts > 0)] - 0.5), 1.5)
    axes.set(xlabel="KLD of a token in nats", ylabel="% of tokens")
    return figure


def domains(m: Material) -> Figure | None:
    """Divergence domain by domain, of the file and of the baseline."""
    sides = {"this file": m.scores} | ({"ggml's encoder": m.baseline} if m.baseline else {})
    return by_domain(sides, [BLUE, ORANGE])


def by_domain(sides: Mapping[str, Mapping[str, Any]], colours: Sequence[str]) -> Figure | None:
    """Mean KLD and its 95 % interval by domain; sides: name -> scores measured alike."""
    found = list(next(iter(sides.values())).get("domains") or {})
    if len(found) < 2:
        return None
    figure, axes = axes_of()
    at, width = np.arange(len(found)), 0.8 / len(sides)
    for i, (name, scores) in enumerate(sides.items()):
        rows = [scores["domains"].get(domain, {}) for domain in found]
        means = [row.get("kld_mean", np.nan) for row in rows]
        spans = [(row.get("ci95") or {}).get("kld_mean") or (mean, mean) for row, mean in zip(rows, means, strict=True)]
        error = [[mean - low for mean, (low, _) in zip(means, spans, strict=True)]]
        error.append([high - mean for mean, (_, high) in zip(means, spans, strict=True)])
        place = at + (i - (len(sides) - 1) / 2) * width
        axes.bar(place, means, 0.9 * width, color=colours[i], yerr=error, capsize=2, ecolor=INK, label=name)
    axes.set_xticks(at, found)
    axes.set(ylabel="mean KLD in nats", ylim=(0, None))
    if len(sides) > 1:
        axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
        axes.legend(frameon=False, fontsize=8.5, loc="upper left", ncols=2)
    return figure


def classes(m: Material) -> Figure | None:
    """Bytes of each class of tensors, and its bits per weight."""
    if m.plan is None:
        return None
    rows = [(group, [t for t in m.plan.tensors if t.group == group]) for group in CLASSES]
    rows = [(group, tensors) for group, tensors in rows if tensors]
    sizes = [sum(t.n_bytes for t in tensors) for _, tensors in rows]
    bits = [8 * n / max(1, sum(t.n_weights for t in ts)) for n, (_, ts) in zip(sizes, rows, strict=True)]
    figure, axes = axes_of((SIZE[0], 0.7 + 0.26 * len(rows)))
    unit, name = (1e9, "GB") if max(sizes) >= 1e9 else (1e6, "MB")
    bars = axes.barh([group for group, _ in rows], [n / unit for n in sizes], color=BLUE, height=0.7)
    axes.bar_label(bars, [f"{n / unit:,.2f} {name}, {b:.2f} bpw" for n, b in zip(sizes, bits, strict=True)], padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.75 * max(sizes) / unit)
    axes.set_xlabel(f"size in {name}")
    axes.tick_params(axis="y", length=0)
    return figure


def predicted(m: Material) -> Figure | None:
    """Share of each layer in what was predicted, and in the layers' own measured errors (squared, as damages add)."""
    rows = m.scores.get("layers") or []
    if m.plan is None or len(rows) < 2:
        return None
    damage, specs = m.damage()
    expected = dict.fromkeys((row["layer"] for row in rows), 0.0)
    for spec in specs:
        if spec.layer in expected:
            expected[spec.layer] += damage.of(spec, m.plan.by_name[spec.name].qtype)
    own = {row["layer"]: row["own"] ** 2 for row in rows}
    figure, axes = axes_of()
    for side, values, colour, name in ((-0.2, expected, GREY, "predicted"), (0.2, own, BLUE, "measured")):
        whole = sum(values.values()) or 1.0
        shares = [100 * value / whole for value in values.values()]
        if len(rows) > MANY_LAYERS:
            axes.plot(list(values), shares, color=colour, label=name)
        else:
            axes.bar([i + side for i in values], shares, 0.38, color=colour, label=name)
    axes.set(xlabel="layer", ylabel="% of the damage")
    whole_numbers(axes)
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper right")
    return figure


def expert_coverage(m: Material) -> Figure | None:
    """Calibration tokens of every routed expert, a row a layer."""
    rows = coverage(m.imatrix, 0)
    if not rows:
        return None
    gates = {split_name(name): entry.counts for name, entry in m.imatrix.items()}
    counts = [gates[ROUTED_ROLES[0], row.layer] for row in rows]
    grid = np.maximum(1, np.array(counts, dtype=float))
    figure, axes = axes_of((SIZE[0], min(5.0, max(1.6, 1.2 + 0.14 * len(rows)))))
    low, high = grid.min(), grid.max()
    norm = LogNorm(low, high if high > low else low + 1)
    image = axes.imshow(grid, aspect="auto", norm=norm, cmap="viridis", interpolation="nearest")
    step = max(1, len(rows) // 10)
    axes.set_yticks(range(0, len(rows), step), [str(row.layer) for row in rows[::step]])
    axes.set(xlabel="routed expert", ylabel="layer")
    whole_numbers(axes)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, label="tokens", format=FuncFormatter(lambda value, _: f"{value:,.0f}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.set_ticks([low, high] if high > low else [low])
    bar.outline.set_visible(False)
    return figure


FIGURES: Mapping[str, Callable[[Material], Figure | None]] = {
    "domains": domains,
    "layers": layers,
    "kld": kld,
    "position": position,
    "classes": classes,
    "bitmap": lambda m: bit_map(m.plan) if m.plan else None,
    "predicted": predicted,
    "coverage": expert_coverage,
}
