"""The model card: README.md of a repository with one or several quantizations of one model."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from io import BytesIO
from typing import Any
from urllib.parse import quote

import jinja2
from huggingface_hub import ModelCardData

from quantkit import __version__
from quantkit.errors import needs
from quantkit.planning.plan import CLASSES, Plan
from quantkit.planning.targets import environment as environment_of

TAGS = {"ktransformers": ["ktransformers"], "llama.cpp": ["llama.cpp"], "ollama": ["ollama"]}


@dataclass(frozen=True)
class Row:
    """One quantization as the card lists it: its files in the repository, and what make recorded about it."""

    name: str
    files: Mapping[str, int]
    verify: Mapping[str, Any]
    provenance: Mapping[str, Any]
    commands: Sequence[str]

    @property
    def gguf(self) -> list[str]:
        """Paths of its model files, first part first; those that can stand in a table and a command."""
        mine = (path for path in self.files if path.startswith(f"{self.name}/") and path.endswith(".gguf"))
        return sorted(path for path in mine if path.isprintable() and path.count("/") == 1)


def render_card(
    repo: str, model: str, base: str, license_name: str | None, rows: Sequence[Row], flags: str = ""
) -> str:
    """Markdown with its YAML head. rows: all quantizations of the repository, smallest first. flags: what llama.cpp
    must be told of the model, as `targets.start_flags`."""
    targets = sorted({row.provenance.get("target", "") for row in rows})
    tags = ["gguf", *dict.fromkeys(tag for target in ("llama.cpp", *targets) for tag in TAGS.get(target, ()))]
    head = ModelCardData(
        base_model=base,
        license=license_name,
        library_name="gguf",
        pipeline_tag="text-generation",
        tags=[*tags, "quantkit", "imatrix"],
        base_model_relation="quantized",
        quantized_by=repo.split("/")[0],
    )
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["gb"] = lambda n: f"{n / 1e9:,.2f} GB" if n >= 1e8 else f"{n / 1e6:,.2f} MB"
    environment.filters |= {"sh": shlex.quote, "code": code, "text": plain, "url": quote}
    template = environment.from_string(resources.files(__package__).joinpath("card.md.jinja").read_text("utf-8"))
    known = {"repo": repo, "model": model, "base": base, "rows": rows, "version": __version__, "targets": targets}
    start = {"flags": flags, "environment": environment_of(flags) if flags else ""}
    return template.render(head=head.to_yaml(), **known, **start)


def code(value: object) -> str:
    """Inline code in a table of Markdown, whatever the text is."""
    return "`" + "".join(c if c.isprintable() and c not in "`|" else "?" for c in str(value)) + "`"


def plain(value: object) -> str:
    """Words in Markdown: no links, HTML or new lines, whatever the text is."""
    line = "".join(c if c.isprintable() else " " for c in str(value))
    return re.sub(r"([\\`*_\[\]<>|#!&~$])", r"\\\1", line)


def layer_plot(plan: Plan) -> bytes:
    """PNG: bits per weight of each layer's classes, as far as they differ."""
    with needs("plots"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    layers = sorted({tensor.layer for tensor in plan.tensors if tensor.layer is not None})
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    for group in CLASSES[:-1]:
        bits = []
        for layer in layers:
            mine = [t for t in plan.tensors if t.layer == layer and t.group == group]
            weights = sum(t.n_weights for t in mine)
            bits.append(8 * sum(t.n_bytes for t in mine) / weights if weights else math.nan)
        if not all(map(math.isnan, bits)):
            axes.plot(layers, bits, drawstyle="steps-mid", marker="." if len(layers) < 8 else None, label=group)
    axes.set(xlabel="layer", ylabel="bits per weight", ylim=(0, None))
    axes.set_title(f"{plan.model} {plan.recipe}", parse_math=False)  # a$x_{$b is a name
    axes.legend(fontsize="small", ncols=3)
    out = BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()
