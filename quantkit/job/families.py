"""`quantkit families`: what is supported, how well, and the models that come along, most of them without weights."""

from dataclasses import fields
from textwrap import wrap

from quantkit import bundle
from quantkit.errors import QuantkitError
from quantkit.formats.model_folder import open_source
from quantkit.models import family
from quantkit.models.capabilities import CAPABILITIES
from quantkit.planning import published

WORDS = {"cpu": "run, CPU", "gpu": "run, GPU", "llama_cpp": "llama.cpp", "ktransformers": "KTransformers"}
WIDTH = 80


def describe() -> str:
    """The whole page."""
    lines = []
    for architecture in family.BY_ARCHITECTURE:
        known = CAPABILITIES[architecture]
        names = ", ".join(family.CONFIG_FILES[architecture].HF_ARCHITECTURES)
        lines += wrap(f"{architecture}: {known.title} ({names})", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        for field in fields(known)[1:]:
            text = getattr(known, field.name)
            indent = " " * 18
            lines += wrap(f"  {WORDS.get(field.name, field.name):<14}  {text}", WIDTH, subsequent_indent=indent)
        lines.append("")
    lines += wrap(
        "Models that `plan` and `inspect` know by name (none but tiny-r1 has weights here), and the damage by which a "
        "budget chooses their types: what was published of their like, or the prior:",
        WIDTH,
    )
    lines.append("")
    lines += [f"{'name':<17} {'family':<10} {'layers':>6} {'hidden':>6} {'experts':>7} {'weights':>17}  damage"]
    refused = []
    for name in bundle.model_names():
        try:
            lines.append(_row(name))
        except QuantkitError as error:
            refused.append(f"{name}: {str(error).removeprefix('config.json: ')}")
    return "\n".join([*lines, "", *(["Described, and not supported:", ""] if refused else []), *refused]).rstrip()


def _row(name: str) -> str:
    """One bundled model. weights: of the tensors that a GGUF has, so with an MTP layer only where that is kept.
    QuantkitError if its family is not supported."""
    source = open_source(bundle.models_dir() / name)
    config = family.from_hf(source.config)
    specs = family.specs(config)
    found = published.recognise(specs)
    what = "published" if found else "prior"
    return (
        f"{name:<17} {config.architecture:<10} {config.n_layer:>6} {config.d:>6,} {config.n_expert:>7} "
        f"{sum(spec.n_weights for spec in specs):>17,}  {what}"
    )
