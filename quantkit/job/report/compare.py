"""The page about several folders: which file is worth its bytes, and where they differ."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from quantkit.errors import QuantkitError
from quantkit.formats.whole_file import write_whole
from quantkit.job.report.figures import (
    COLOURS,
    axes_of,
    by_domain,
    front,
    style,
    svg,
    whole_numbers,
)
from quantkit.job.report.material import Material, comparable, names
from quantkit.job.report.parts import Table, environment, verdict
from quantkit.planning.assign import predict
from quantkit.planning.plan import bpw
from quantkit.planning.table import by_class, differing
from quantkit.sizes import both_units

COMPARED = "compare.html"
Named = Sequence[tuple[str, Material]]


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write compare.html into the folder `out`. QuantkitError for more folders than there are colours, or if one has no
    scores."""
    if len(folders) > len(COLOURS):
        raise QuantkitError(f"{len(folders)} folders: at most {len(COLOURS)} can be told apart in one figure")
    found = [Material.load(folder) for folder in folders]
    for m in found:
        if not m.scores:
            raise QuantkitError(f"{m.folder}: nothing was measured there; run `quantkit verify` on its file first")
    every = list(zip(names(found), found, strict=True))
    alike = [(name, m) for name, m in every if comparable(m.scores, found[0].scores)]
    apart = [
        f"{name} was measured on other text, or against another original: its figures cannot be compared."
        for name, m in every
        if not comparable(m.scores, found[0].scores)
    ]
    with style():
        figures = {name: svg(figure, name) for name, figure in _figures(alike).items() if figure is not None}
    sections = [
        ("position", "Size and divergence", "Lower and further left is better; the line is the front."),
        ("domains", "By domain", "Mean KL divergence from the original, with 95 % intervals over chunks."),
        ("layers", "Error by layer", "What each layer alone does wrong, on the original's input."),
        ("classes", "Size by class", ""),
        ("types", "Types that differ", ""),
        ("predicted", "Predicted and measured", ""),
    ]
    tables = {"domains": _domains(alike), "classes": _classes(every), "types": _types(every)}
    tables["predicted"] = _predicted(every)
    text = (
        environment()
        .get_template("compare.html.jinja")
        .render(
            title=" · ".join(name for name, _ in every),
            verdict=verdict([(name, m.scores["bytes"], m.scores["kld_mean"]) for name, m in alike]),
            files=_files(every),
            apart=apart,
            figures=figures,
            tables=tables,
            sections=[s for s in sections if s[0] in figures or tables.get(s[0])],
        )
    )
    write_whole(out / COMPARED, text.encode(errors="backslashreplace"))
    return out / COMPARED


def _figures(alike: Named) -> dict[str, Figure | None]:
    points = [(name, m.scores["bytes"], m.scores["kld_mean"]) for name, m in alike]
    several = len(alike) > 1
    return {
        "position": front(points, COLOURS[: len(points)]),
        "domains": by_domain({name: m.scores for name, m in alike}, COLOURS) if several else None,
        "layers": _layers(alike) if several else None,
    }


def _layers(alike: Named) -> Figure | None:
    measured = [
        (name, m.scores["layers"], c) for (name, m), c in zip(alike, COLOURS, strict=False) if m.scores["layers"]
    ]
    if not measured:
        return None
    figure, axes = axes_of()
    for name, rows, colour in measured:
        axes.plot([r["layer"] for r in rows], [r["own"] for r in rows], color=colour, marker=".", label=name)
    axes.set(xlabel="layer", ylabel="relative error")
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    whole_numbers(axes)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    return figure


def _files(every: Named) -> Table:
    rows = []
    for name, m in every:
        s, certificate = m.scores, m.certificate
        ratio = f"{m.ratio:.2f}" if m.ratio is not None else "–"
        rows.append(
            (
                name,
                both_units(s["bytes"]),
                f"{s['bpw']:.3f}",
                f"{s['kld_mean']:.4f} ± {s['kld_mean_error']:.4f}",
                ratio,
                f"{s['ppl']:.3f}",
                f"{s['top1_agreement']:.1f} %",
                certificate.get("verdict") or "not certified",
            )
        )
    head = ("", "size", "bpw", "mean KLD", "of ggml's", "perplexity", "same top-1", "certificate")
    return Table(head, rows)


def _domains(alike: Named) -> Table | None:
    found = list(alike[0][1].scores.get("domains") or {})
    if not found or len(alike) < 2:
        return None
    rows = [
        (domain, *(f"{m.scores['domains'][domain]['kld_mean']:.4f}" for _, m in alike))
        for domain in found
        if all(domain in m.scores["domains"] for _, m in alike)
    ]
    return Table(("domain", *(name for name, _ in alike)), rows)


def _planned(every: Named) -> list[tuple[str, Material]]:
    return [(name, m) for name, m in every if m.plan is not None]


def _classes(every: Named) -> Table | None:
    planned = _planned(every)
    rows = [
        (group, *(f"{both_units(sum(t.n_bytes for t in c))} ({bpw(c):.3f} bpw)" for c in cells))
        for group, cells in by_class([(name, m.plan.tensors) for name, m in planned if m.plan])
    ]
    return Table(("class", *(name for name, _ in planned)), rows) if planned else None


def _types(every: Named) -> Table | None:
    planned = _planned(every)
    if len(planned) < 2:
        return None
    found = differing([(name, m.plan.tensors) for name, m in planned if m.plan])
    rows = [(role, *cells) for role, cells in found]
    return Table(("tensors", *(name for name, _ in planned)), rows, numbers=False) if rows else None


def _predicted(every: Named) -> Table | None:
    rows = []
    for name, m in _planned(every):
        assert m.plan
        damage, specs = m.damage()
        expected = m.plan.outlook.kld if m.plan.outlook else predict(m.plan, specs, damage)
        words = m.plan.outlook.damage if m.plan.outlook else damage.name
        rows.append((name, f"{expected:.4f}", f"{m.scores['kld_mean']:.4f}", words))
    return Table(("", "predicted KLD", "measured KLD", "predicted by"), rows) if rows else None
