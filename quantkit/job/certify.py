"""`quantkit certify`: a file, a target and perhaps the original -> a certificate beside the file."""

from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.evaluation.certificate import Certificate
from quantkit.evaluation.certify import certify
from quantkit.formats.imatrix import load_imatrix
from quantkit.formats.whole_file import write_json
from quantkit.models.open import open_model


@dataclass(frozen=True)
class CertifyOptions:
    """What `certify` checks. reference: a model, whose metadata and weights to compare with. imatrix: importance by
    which to weigh errors. oracle: run the file in the target's program where it is installed. values: decode all."""

    target: str = "llama.cpp"
    reference: str | Path | None = None
    imatrix: Path | None = None
    oracle: bool = True
    values: bool = True


@torch.inference_mode()
def certify_file(path: Path, device: str, out: Path, how: CertifyOptions = CertifyOptions()) -> Certificate:
    """All checks of a file for a target; writes certify.json, passed or not."""
    original = open_model(how.reference) if how.reference else None
    importance = load_imatrix(how.imatrix)[0] if how.imatrix else None
    made = certify(path, how.target, original, importance, oracle=how.oracle, values=how.values, device=device)
    write_json(out, made.to_dict())
    return made
