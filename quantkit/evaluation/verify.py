"""`quantkit verify`: is the file sound, and how far is it from the original? One read of both, layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.corpus import Chunks
from quantkit.errors import QuantkitError
from quantkit.evaluation.divergence import compare, scored, scored_targets
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.planning import targets
from quantkit.planning.plan import mla_of, split_name
from quantkit.progress import track
from quantkit.runtime.sources import GGUFSource, Source
from quantkit.runtime.stream import logit_tiles, stream


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a finished file in the words of a plan."""

    name: str
    role: str
    shape: tuple[int, ...]
    qtype: str


def sizes(file: GGUFFile) -> dict[str, Any]:
    """bytes of the file(s), bpw of all weights and of the routed experts (tensor data bits per weight)."""

    def bpw(tensors) -> float:
        tensors = list(tensors)
        weights = sum(prod(tensor.shape) for tensor in tensors)
        return 8 * sum(tensor.n_bytes for tensor in tensors) / weights if weights else 0.0

    values = file.tensors.values()
    return {
        "bytes": sum(path.stat().st_size for path in file.files),
        "bpw": bpw(values),
        "bpw_routed": bpw(tensor for tensor in values if "_exps." in tensor.name),
    }


def check_same_model(source: Source, reference: Source) -> None:
    """Both must be the same architecture in every number that decides what a layer computes."""
    ours, theirs = vars(source.config), vars(reference.config)
    for key in ("has_bias", "tied", "bos", "eos"):  # a tied head is written once; GGUF derives the others elsewhere
        ours, theirs = ({k: v for k, v in d.items() if k != key} for d in (ours, theirs))
    for key, value in theirs.items():
        close = isinstance(value, float) and abs(ours[key] - value) <= 1e-6 * abs(value)
        if ours[key] != value and not close and key != "yarn":
            raise QuantkitError(f"{source.name}: {key} is {ours[key]}, but {reference.name} has {value}")


def verify(source: GGUFSource, reference: Source, chunks: Chunks, target: str | None = None,
           known: torch.Tensor | None = None) -> dict[str, Any]:  # fmt: skip
    """Structure, types, then perplexity and divergence from the reference on the second half of every chunk.

    known: the reference's `scored` states of these chunks, if a pass has computed them already.

    Returns what verify.json holds: sizes, the figures of Divergence.summary, and what was compared.
    """
    if target:
        check_target(source.file, target)
    check_same_model(source, reference)
    hidden = [] if known is None else [known]
    n_tokens = chunks.tokens.numel()
    for model, label in ((reference, "reference"), (source, "quantized"))[len(hidden) :]:
        with track(label, model.config.n_layer * n_tokens / 1e3, "ktoken-layers") as advance:
            for layer in stream(model, chunks.tokens):
                states = layer.hidden
                advance(n_tokens / 1e3)
        hidden.append(scored(states))
    tiles = (logit_tiles(reference, hidden[0]), logit_tiles(source, hidden[1]))
    figures = compare(*tiles, scored_targets(chunks.targets)).summary()
    about = {"file": source.name, "reference": reference.name, "chunks": len(chunks.tokens),
             "chunk_length": chunks.tokens.shape[1]}  # fmt: skip
    return about | sizes(source.file) | figures


def check_target(file: GGUFFile, target: str) -> None:
    """Refuse types and layouts that the target cannot compute."""
    found = [FileTensor(t.name, split_name(t.name)[0], t.shape, t.qtype) for t in file.tensors.values()]
    targets.check_mla(mla_of([tensor.role for tensor in found]), target)
    targets.check(found, target)


def short_table(result: Mapping[str, Any], path: Path) -> str:
    """The lines that `make` and `verify` end with."""
    rows = [
        ("file", f"{path}"),
        ("size", f"{result['bytes']:,} bytes"),
        ("bpw", f"{result['bpw']:.3f} (routed experts {result['bpw_routed']:.3f})"),
        ("perplexity", f"{result['ppl']:.4f} (original {result['ppl_reference']:.4f})"),
        ("KLD", f"mean {result['kld_mean']:.5f} ± {result['kld_mean_error']:.5f}, median {result['kld_median']:.5f}, "
                f"99 % {result['kld_p99']:.4f}"),
        ("same top-1", f"{result['top1_agreement']:.2f} %"),
        ("tokens", f"{result['tokens']:,} scored"),
    ]  # fmt: skip
    return "\n".join(f"{key:<12}{value}" for key, value in rows)
