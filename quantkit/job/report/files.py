"""What `compare` found, as text that is Markdown and reads on a terminal of 80 columns; and its one figure."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError, needs
from quantkit.formats.gguf_reader import model_file_name
from quantkit.formats.whole_file import make_folders, write_json, write_text, write_whole
from quantkit.job.report.parts import Point, Table, markdown, verdict
from quantkit.planning.plan import PlannedTensor
from quantkit.planning.table import Named, by_class, differing_lines, unit_of
from quantkit.progress import say
from quantkit.sizes import both_units
from quantkit.tensors import mtp_layers

if TYPE_CHECKING:
    from quantkit.job.headers import Opened

RESULT, PAGE, FIGURE = "compare.json", "compare.md", "compare.png"
WIDTH, AT_ONCE = 80, 3  # columns; files whose classes stand beside each other
NAME = 22  # characters of a file's name in the figure
NEAR = 0.02  # of the largest, within which letters would lie on each other


def letters(n: int) -> list[str]:
    """A, B, C …, and after Z AA."""
    every = [*ascii_uppercase, *(a + b for a in ascii_uppercase for b in ascii_uppercase)]
    return every[:n]


def text(found: Mapping[str, Any], files: Sequence["Opened"]) -> str:
    """Everything, as Markdown. found: `headers.tables` or `compare.scored_tables` of these files."""
    names, facts = letters(len(files)), found["files"]
    named = [(name, one.tensors) for name, one in zip(names, files, strict=True)]
    shared = {one["file"] for i, one in enumerate(facts) if any(one["file"] == other["file"] for other in facts[:i])}
    parts = [
        "\n".join(line for name, one in zip(names, facts, strict=True) for line in _about(name, one, shared)),
        markdown(_sizes(names, facts)),
        *_scores(names, found),
        *_classes(named),
        "\n".join(["Types by class, those with the most bytes first:", "", "```", *_types(named), "```"]),
    ]
    if rows := differing_lines([(name, _parted(tensors)[0]) for name, tensors in named], WIDTH - 2):
        parts.append("\n".join(["Where types differ, by layer:", "", "```", *rows, "```"]))
    return "\n\n".join(parts) + "\n"


def _about(name: str, one: Mapping[str, Any], shared: Collection[str]) -> list[str]:
    """A file's name, or its path if another one has that name, and what is to be known of it."""
    rest = [f"{one['files']} splits"] if one["files"] > 1 else []
    lines = [f"- **{name}** {one['path' if one['file'] in shared else 'file']}" + "".join(f", {each}" for each in rest)]
    programs: dict[str, list[str]] = {}
    for qtype, program in one["foreign_types"].items():
        programs.setdefault(program, []).append(qtype)
    notes = list(one["notes"])
    notes += [f"{', '.join(types)}: types of {program}, not decoded here" for program, types in programs.items()]
    if one["not_computed"] and not programs:
        notes.append(f"not computed: {one['not_computed']}")
    for note in notes:
        lines += wrap(note, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)
    return lines


def _sizes(names: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (
            name,
            f"{one['bytes']:,}",
            both_units(one["bytes"]),
            f"{one['bpw']:.3f}",
            f"{one['bpw_routed']:.3f}",
            "both" if one["mla"] and " and " in one["mla"] else one["mla"] or "–",
        )
        for name, one in zip(names, facts, strict=True)
    ]
    return Table(("", "bytes", "size", "bpw", "experts", "kv_b"), rows)


def _scores(names: Sequence[str], found: Mapping[str, Any]) -> list[str]:
    """What was measured, and what each file has more than the best of them on the same tokens."""
    scored = [i for i, one in enumerate(found["files"]) if one["scores"]]
    if not scored:
        return []
    scores = {i: found["files"][i]["scores"] for i in scored}
    kind = "kld_mean" if found["reference"] else "ppl"
    best = min(scored, key=lambda i: scores[i][kind])
    head = ("", *(("mean KLD (95 %)", "same top-1 (95 %)") if found["reference"] else ()), "perplexity (95 %)")
    rows = [(names[i], *_cells(scores[i])) for i in scored]
    tokens = f"{scores[best]['tokens']:,} tokens of {found['text']}, {found['chunks']} chunks"
    against = f"KLD in nats a token from {found['reference']}; " if found["reference"] else ""
    parts = ["\n".join(wrap(f"{against}{tokens}:", WIDTH)), markdown(Table(head, rows))]
    if others := [row for row in found["differences"] if best in (row["of"], row["from"])]:
        parts += [f"More than {names[best]}, the nearest, on the same tokens (95 %, paired):"]
        parts += [markdown(Table(_difference_head(others[0]), [_difference(names, row, best) for row in others]))]
    if len(shown := points(found)) > 1:
        parts.append("\n".join(wrap(verdict(shown, _by_chance(found)), WIDTH)))
    return parts


def _cells(scores: Mapping[str, Any]) -> list[str]:
    spans = scores["ci95"]

    def cell(key: str, form: str, short: str) -> str:
        span = spans[key]
        return f"{scores[key]:{form}}" + (f" ({span[0]:{short}}–{span[1]:{short}})" if span else "")

    kld = [cell("kld_mean", ".5f", ".4f"), cell("top1_agreement", ".2f", ".1f")] if "kld_mean" in scores else []
    return [*kld, cell("ppl", ".6g", ".4g")]


def _difference_head(row: Mapping[str, Any]) -> tuple[str, ...]:
    shown = {"kld": "KLD", "top1": "top-1, points", "nll": "log perplexity"}
    return "", *(label for key, label in shown.items() if key in row)


def _difference(names: Sequence[str], row: Mapping[str, Any], best: int) -> list[str]:
    """A row of what the other one of a pair has more than the best."""
    other, sign = (row["of"], 1) if row["from"] == best else (row["from"], -1)
    cells = [names[other]]
    for key, form in (("kld", "+.4f"), ("top1", "+.1f"), ("nll", "+.3f")):
        if key not in row:
            continue
        by, span = sign * row[key]["by"], row[key]["ci95"]
        ends = sorted(sign * end for end in span) if span else []
        cells.append(f"{by:{form}}" + (f" ({ends[0]:{form}} {ends[1]:{form}})" if ends else ""))
    return cells


def _classes(named: Named) -> list[str]:
    """Bytes and bpw of each class, a few files at a time."""
    unit, size = unit_of(max(sum(t.n_bytes for t in tensors) for _, tensors in named))
    parts = [f"Size of each class in {unit}, and bits per weight:"]
    for start in range(0, len(named), AT_ONCE):
        few = named[start : start + AT_ONCE]
        each = (*_by_class(few), ("total", [tensors for _, tensors in few]))
        rows = [(group, *(_size(tensors, size) for tensors in cells)) for group, cells in each]
        parts.append(markdown(Table(("class", *(name for name, _ in few)), rows)))
    return parts


def _parted(tensors: Sequence[PlannedTensor]) -> tuple[list[PlannedTensor], list[PlannedTensor]]:
    """The model, and its layer that drafts the token after the next, which many converters leave out."""
    drafts = mtp_layers(tensors)
    return [t for t in tensors if t.layer not in drafts], [t for t in tensors if t.layer in drafts]


def _by_class(named: Named) -> list[tuple[str, Sequence[Sequence[PlannedTensor]]]]:
    """As `by_class`, with that layer as a class of its own."""
    parted = [_parted(tensors) for _, tensors in named]
    rows: list[tuple[str, Sequence[Sequence[PlannedTensor]]]] = []
    rows += by_class([(name, main) for (name, _), (main, _) in zip(named, parted, strict=True)])
    drafts = [draft for _, draft in parted]
    return [*rows, *([("MTP layer", drafts)] if any(drafts) else [])]


def _size(tensors: Sequence[PlannedTensor], unit: int) -> str:
    n_bytes, weights = sum(t.n_bytes for t in tensors), sum(t.n_weights for t in tensors)
    return f"{n_bytes / unit:,.2f} {8 * n_bytes / weights:6.3f}" if weights else "–"


def _types(named: Named) -> list[str]:
    lines = []
    for group, cells in _by_class(named):
        every = [_by_bytes(tensors) for tensors in cells]
        for i, types in enumerate(dict.fromkeys(every)):
            alike = [name for (name, _), own in zip(named, every, strict=True) if own == types]
            who = "all" if 1 < len(named) == len(alike) else " ".join(alike)
            first = f"{group if i == 0 else '':<13} "
            lines += wrap(f"{who}  {types}", WIDTH - 2, initial_indent=first, subsequent_indent=" " * 18)
    return lines


def _by_bytes(tensors: Sequence[PlannedTensor]) -> str:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.qtype] = sizes.get(tensor.qtype, 0) + tensor.n_bytes
    return " ".join(sorted(sizes, key=lambda qtype: -sizes[qtype])) or "–"


def points(found: Mapping[str, Any]) -> list[Point]:
    """The files that were scored against an original, by name as far as a figure has room for it."""
    return [
        (name, one["bytes"], one["scores"]["kld_mean"])
        for name, one in zip(_names(found), found["files"], strict=True)
        if one["scores"] and "kld_mean" in one["scores"]
    ]


def _by_chance(found: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Pairs of names of `points` whose divergences differ by no more than another text could make them differ."""
    names, pairs = _names(found), set()
    for row in found["differences"]:
        low, high = row["kld"]["ci95"] or (-1.0, 1.0)
        if low <= 0 <= high:
            pairs |= {(names[row["of"]], names[row["from"]]), (names[row["from"]], names[row["of"]])}
    return pairs


def _names(found: Mapping[str, Any]) -> list[str]:
    """Letter and short name of each file."""
    rows = zip(letters(len(found["files"])), found["files"], strict=True)
    return [f"{letter} {_short(one['file'])}" for letter, one in rows]


def _short(file: str) -> str:
    name = model_file_name(Path(file))
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


def _marks(shown: Sequence[Point]) -> list[Point]:
    """The points by their letters alone; of those that lie together the first has the letters of all."""
    wide, high = max(n_bytes for _, n_bytes, _ in shown), max(kld for *_, kld in shown)
    marks: list[Point] = []
    for name, n_bytes, kld in shown:
        letter = name.split(" ")[0]
        near = (i for i, p in enumerate(marks) if p[0] and abs(p[1] - n_bytes) < NEAR * wide)
        first = next((i for i in near if abs(marks[i][2] - kld) < NEAR * high), None)
        if first is not None:
            marks[first] = (marks[first][0] + letter, *marks[first][1:])
        marks.append((letter if first is None else "", n_bytes, kld))
    return marks


def write(found: Mapping[str, Any], page: str, folder: Path) -> list[Path]:
    """compare.json, compare.md and, of two or more files that were scored against an original, compare.png: bytes
    against KLD with 95 % intervals. Returns their paths. QuantkitError if something cannot be written."""
    every = [folder / name for name in (RESULT, PAGE)]
    make_folders(folder)
    write_json(every[0], found)  # before anything that may be missing: it took hours
    if len(shown := points(found)) > 1:
        if figure := _drawn(shown, [one["scores"]["ci95"]["kld_mean"] for one in found["files"] if one["scores"]]):
            write_whole(folder / FIGURE, figure)
            every.append(folder / FIGURE)
            page += f"\n![bytes against KLD]({FIGURE})\n"
    write_text(every[1], page)
    return every


def _drawn(shown: Sequence[Point], spans: Sequence[Any]) -> bytes | None:
    """The figure as a PNG. None, said in a line, if what draws it is not installed."""
    try:
        with needs("plots"):
            from quantkit.job.report.figures import COLOURS, front, legend, png, style
    except QuantkitError as error:
        say(f"no {FIGURE}: {error}")
        return None
    with style():
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(shown))]
        drawn = front(_marks(shown), colours, spans)
        assert drawn
        legend(drawn, [name for name, *_ in shown], colours)
        return png(drawn)
