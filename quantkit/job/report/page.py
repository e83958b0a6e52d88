"""The page about one folder: a verdict, how to run the file, what was measured, what it was made from."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from quantkit import __version__
from quantkit.calibration.coverage import coverage
from quantkit.evaluation.certificate import failures
from quantkit.formats.imatrix import imatrix_digest
from quantkit.formats.whole_file import write_whole
from quantkit.job.folder import IMATRIX, PLAN, REPORT
from quantkit.job.report.figures import FIGURES, NARROW, png, style, svg
from quantkit.job.report.material import Material
from quantkit.job.report.parts import Table, environment, words_for
from quantkit.planning import targets
from quantkit.planning.assign import predict
from quantkit.planning.bitmap import bit_map
from quantkit.planning.plan import CLASSES, bpw
from quantkit.sizes import both_units, gb, gib

FEW_TOKENS = 32  # experts with fewer lean on their layer's mean statistics
VERIFY_HINT = "Not measured: run `quantkit verify {file} --reference {model}`."
MISSING = {
    **dict.fromkeys(("layers", "kld", "domains"), VERIFY_HINT),
    "bitmap": f"No {PLAN} in this folder.",
    "classes": f"No {PLAN} in this folder.",
    "predicted": "Errors of layers were not measured, or there is no plan: run `quantkit verify {file} --reference "
    "{model}`.",
    "coverage": f"No {IMATRIX} with expert counts in this folder.",
    "position": "No other file that was measured alike lies beside this one.",
    "baseline": "Not measured: `quantkit make` with --baseline also scores the same types by ggml's encoder.",
    "samples": "None: run `quantkit verify {file} --reference {model} --prompts 8`.",
    "certificate": "Not certified: run `quantkit certify {file} --reference {model}`.",
}
UNKNOWN = "it holds no verdict"
BY_GGML = "This file is by ggml's encoder itself."


def write_report(folder: Path) -> list[Path]:
    """Write report.html and report-*.png into the folder; returns their paths, the page first."""
    material = Material.load(folder)
    with style():
        drawn = {name: figure for name, draw in FIGURES.items() if (figure := draw(material)) is not None}
        inline = {name: svg(figure, name) for name, figure in drawn.items()}
        if material.plan:
            inline["bitmap-narrow"] = svg(bit_map(material.plan, NARROW), "bitmap-narrow")
        made = {REPORT: page(material, inline).encode(errors="backslashreplace")}
        made |= {f"report-{name}.png": png(figure) for name, figure in drawn.items()}
    for old in folder.glob("report-*.png"):
        if old.name not in made and old.name.removeprefix("report-").removesuffix(".png") in (*FIGURES, "pareto"):
            old.unlink()  # of an earlier report, of what is no more in the folder
    for name, data in made.items():
        write_whole(folder / name, data)
    return [folder / name for name in made]


def page(m: Material, figures: Mapping[str, Markup]) -> str:
    """The HTML."""
    plan, scores = m.plan, m.scores
    title = f"{plan.model} · {plan.recipe}" if plan else str(scores.get("file", m.name))
    known = {"file": m.file or "FILE", "model": str(scores.get("reference") or m.provenance.get("model") or "MODEL")}
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            title=title,
            verdict=verdict(m),
            tiles=_tiles(m),
            commands=commands(m),
            figures=figures,
            missing={name: text.format(**known) for name, text in MISSING.items()}
            | ({"baseline": BY_GGML} if m.provenance.get("encoder") == "ggml" else {}),
            notes=_notes(m),
            baseline=_baseline(m),
            domains=_domains(m),
            classes=_classes(m),
            predicted=_predicted(m),
            coverage=_coverage(m),
            generation=scores.get("generation") or {},
            certificates=m.certificates,
            caveats=m.provenance.get("caveats") or (),
            provenance=_provenance(m),
        )
    )


def verdict(m: Material) -> str:
    """One sentence."""
    s, certificate = m.scores, m.certificate
    if failed := ", ".join(failures(certificate)):
        return f"Do not use this file for {certificate.get('target')}: it failed certification ({failed})."
    if (s.get("configuration") or {}).get("status") == "fail":
        return "Do not trust these scores: transformers reads the original's config.json as another model."
    if not s:
        size = both_units(m.plan.n_bytes) if m.plan else ""
        return f"A plan of {size}, of which nothing has been measured yet."
    parts = [
        f"{words_for(s['kld_mean']).capitalize()}: in {both_units(s['bytes'])} it keeps the original's first choice "
        f"for {s['top1_agreement']:.0f} of 100 tokens and is {s['kld_mean']:.3g} nats a token away from it"
    ]
    if m.ratio is not None:
        parts.append(f"{m.ratio:.2f} of what ggml's encoder leaves in the same bytes")
    if s.get("bad_layers"):
        parts.append(f"layer {', '.join(map(str, s['bad_layers']))} stands out")
    words = f"certificate for {certificate.get('target')}: {certificate.get('verdict') or UNKNOWN}"
    parts.append(words if certificate else "not certified yet")
    return "; ".join(parts) + "."


def commands(m: Material) -> list[tuple[str, list[str]]]:
    """Program -> how to start it with this file, from this folder."""
    if not m.file:
        return []
    file, target = shlex.quote(m.file), m.plan.target if m.plan else "llama.cpp"
    flags = targets.start_flags("llama.cpp", m.config) if m.config else ""
    out = [
        ("quantkit", [f"quantkit run {file}", f"quantkit serve {file} --port 8000"]),
        ("llama.cpp", [f"llama-cli -m {file}{flags}", f"llama-server -m {file}{flags}"]),
    ]
    if m.plan and targets.aborts_on_amx((t.name, t.qtype) for t in m.plan.tensors):
        out[-1][1].append(f"llama-cli -m {file}{flags}{targets.NO_REPACK}  # on an Intel CPU with AMX, without a GPU")
    if target == "ktransformers":
        out.append(("KTransformers", [f"quantkit export-kt {file} --output kt", "kt/launch.sh chat"]))
    if target == "ollama":
        name = shlex.quote(f"{m.plan.model}-{m.plan.recipe}".lower() if m.plan else "model")
        serve = [f"{targets.environment(flags)} ollama serve"] if flags else []
        made = [f"printf 'FROM ./%s\\n' {file} > Modelfile", f"ollama create {name} -f Modelfile"]
        out.append(("ollama", serve + made))
    return out


def _tiles(m: Material) -> list[tuple[str, str, str]]:
    s, plan, out = m.scores, m.plan, []
    if plan or s:
        size, bits, routed = (
            (s["bytes"], s["bpw"], s["bpw_routed"])
            if s
            else (plan.n_bytes, plan.bpw, plan.routed_bpw)
            if plan
            else (0, 0.0, 0.0)
        )
        out.append(("size", gb(size), f"{gib(size)}, {size:,} bytes"))
        out.append(("bits per weight", f"{bits:.3f}", f"routed experts {routed:.3f}"))
    if s:
        out += [
            ("mean KLD", f"{s['kld_mean']:.4f}", _span(s, "kld_mean", ".4f") or f"± {s['kld_mean_error']:.4f}"),
            ("same top token", f"{s['top1_agreement']:.1f} %", _span(s, "top1_agreement", ".1f")),
            ("perplexity", f"{s['ppl']:.3f}", f"original {s['ppl_reference']:.3f}"),
            ("tokens scored", f"{s['tokens']:,}", f"chunks of {s['chunk_length']}"),
        ]
    if m.ratio is not None and m.baseline:
        out.append(("of ggml's KLD", f"{m.ratio:.2f}", f"{m.baseline['kld_mean']:.4f} in the same bytes"))
    if m.certificate:
        words = str(m.certificate.get("verdict") or UNKNOWN)
        head = words.partition(":" if words.startswith(("failed", "not passed")) else " in ")[0].partition(",")[0]
        shown = head.upper() if head == "failed" else head
        if head == "passed" and m.certificate.get("engine_run") is not True:  # as versions before this one said it
            shown = "engine not run"
        out.append(("certificate", shown, f"{m.certificate.get('target')}: {words}"))
    return out


def _span(scores: Mapping[str, Any], key: str, form: str) -> str:
    span = (scores.get("ci95") or {}).get(key)
    return f"95 %: {span[0]:{form}} to {span[1]:{form}}" if span else ""


def _baseline(m: Material) -> Table | None:
    if not m.baseline or m.ratio is None:
        return None
    rows = []
    for name, s in (("this file", m.scores), ("the same types by ggml", m.baseline)):
        interval = _span(s, "kld_mean", ".4f").removeprefix("95 %: ")
        cells = (f"{s['bytes']:,}", f"{s['kld_mean']:.4f}", interval, f"{s['ppl']:.3f}", f"{s['top1_agreement']:.1f} %")
        rows.append((name, *cells))
    return Table(("", "bytes", "mean KLD", "95 %", "perplexity", "same top-1"), rows)


def _domains(m: Material) -> Table | None:
    found = m.scores.get("domains")
    if not found:
        return None
    theirs = (m.baseline or {}).get("domains", {})
    head = ["domain", "tokens", "mean KLD", *(["of ggml's"] if theirs else []), "median", "99 %", "same top-1", "PPL"]
    rows = []
    for name, d in found.items():
        row = [name, f"{d['tokens']:,}", f"{d['kld_mean']:.4f}"]
        if theirs:
            other = theirs.get(name, {}).get("kld_mean")
            row.append(f"{d['kld_mean'] / other:.2f}" if other else "–")
        row += [f"{d['kld_median']:.4f}", f"{d['kld_p99']:.2f}", f"{d['top1_agreement']:.1f} %"]
        rows.append([*row, f"{d['ppl']:.2f} ({d['ppl_reference']:.2f})"])
    return Table(head, rows)


def _classes(m: Material) -> Table | None:
    if m.plan is None:
        return None
    rows = []
    for group in CLASSES:
        if mine := [tensor for tensor in m.plan.tensors if tensor.group == group]:
            size, weights = sum(t.n_bytes for t in mine), sum(t.n_weights for t in mine)
            types = ", ".join(dict.fromkeys(t.qtype for t in sorted(mine, key=lambda t: -t.n_bytes)))
            share = f"{size / m.plan.n_bytes:.1%}"
            rows.append((group, both_units(size), share, _weights(weights), f"{bpw(mine):.3f}", types))
    return Table(("class", "size", "share", "weights", "bpw", "types"), rows)


def _weights(n: int) -> str:
    return f"{n / 1e9:,.2f} G" if n >= 1e9 else f"{n / 1e6:,.2f} M"


def _predicted(m: Material) -> Table | None:
    if m.plan is None or not m.scores:
        return None
    damage, specs = m.damage()
    kld, words = predict(m.plan, specs, damage), damage.name
    if m.plan.outlook:
        kld, words = m.plan.outlook.kld, m.plan.outlook.damage
    rows = [
        (
            "size",
            both_units(m.plan.data_bytes),
            both_units(m.scores["bytes"]),
            "the plan's tensor data; the whole file",
        ),
        ("mean KLD", f"{kld:.4f}", f"{m.scores['kld_mean']:.4f}", f"by {words}"),
    ]
    if m.baseline:
        rows.append(("mean KLD, ggml", f"{kld:.4f}", f"{m.baseline['kld_mean']:.4f}", "of the baseline"))
    return Table(("", "predicted", "measured", "what"), rows)


def _coverage(m: Material) -> Table | None:
    rows = coverage(m.imatrix, FEW_TOKENS)
    if not rows:
        return None
    head = ("layer", "fewest", "median", "most", f"experts below {FEW_TOKENS}", "tokens a dimension")
    shown = [
        (r.layer, f"{r.least:,}", f"{r.median:,}", f"{r.most:,}", f"{r.below:,}", f"{r.per_dim:.1f}") for r in rows
    ]
    return Table(head, shown)


def _notes(m: Material) -> dict[str, str]:
    s, bad = m.scores, m.scores.get("bad_layers", ())
    named = f"Layer {', '.join(map(str, bad))} stands out." if bad else "No layer stands out."
    largest = f" The largest is {s['kld_max']:.3g} nats." if "kld_max" in s else ""
    info, rows = m.imatrix_info, coverage(m.imatrix, FEW_TOKENS)
    text = f" Text: {', '.join(info.datasets)}, {info.chunk_count} chunks." if info else ""
    least = min((row.least for row in rows), default=0)
    unseen = sum(
        int(np.sum(entry.counts == 0)) for name, entry in m.imatrix.items() if name.endswith("gate_exps.weight")
    )
    return {
        "position": "Lower and further left is better; the line is the front."
        + (f" Grey: {len(m.others)} file(s) beside this one, measured alike." if m.others else ""),
        "layers": f"Bars: what each layer alone does wrong. Line: what has gathered by then. {named}",
        "kld": f"How far the file's next-token distribution is from the original's, token by token.{largest}",
        "coverage": "Tokens of calibration text that reached each expert: "
        + f"{least:,} the least, {unseen:,} experts none.{text}",
        "bitmap": "The type of every matrix. Yellow is many bits, violet few.",
        "classes": "Where the bytes are.",
        "domains": "Mean KL divergence from the original by kind of text, with 95 % intervals over chunks.",
        "predicted": "Each layer's share of the damage: as the plan expects it, and as its own error was measured.",
    }


def _provenance(m: Material) -> Sequence[tuple[str, str]]:
    names = {
        "checkpoint": "checkpoint fingerprint",
        "revision": "source revision",
        "recipe": "recipe",
        "plan": "plan digest",
        "target": "target",
        "mla": "MLA layout",
        "packed_by": "encoder",
        "effort": "effort",
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
