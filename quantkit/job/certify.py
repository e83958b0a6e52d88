"""`quantkit certify`: a file, a target and perhaps the original -> a certificate beside the file."""

from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.errors import QuantkitError
from quantkit.evaluation.certificate import Certificate
from quantkit.evaluation.certify import certify
from quantkit.formats.byte_source import read_text
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.imatrix import load_imatrix
from quantkit.formats.safetensors_header import load_object
from quantkit.formats.whole_file import check_writable, make_folders, write_json
from quantkit.job.folder import CERTIFY, certifies
from quantkit.models.open import open_model
from quantkit.planning import targets
from quantkit.planning.targets import TARGETS

DEFAULT = targets.LLAMA_CPP.name


@dataclass(frozen=True)
class CertifyOptions:
    """What `certify` checks. target: default what the file says that it was made for, llama.cpp if it does not.
    reference: a model, whose metadata and weights to compare with. imatrix: importance by which to weigh errors.
    oracle: run the file in the target's program where it is installed. values: decode all."""

    target: str | None = None
    reference: str | Path | None = None
    imatrix: Path | None = None
    oracle: bool = True
    values: bool = True


def made_for(path: Path) -> str | None:
    """The target that a file's metadata name; None if they name none that is known, or cannot be read."""
    try:
        found = GGUFFile.open(path).metadata.get("quantkit.target")
    except QuantkitError:
        return None
    return found if isinstance(found, str) and found in TARGETS else None


def certificate_path(path: Path, target: str) -> Path:
    """Beside the file: certify.json for what it was made for, certify-TARGET.json for another target; with the file's
    name at the end if there is one of another file."""
    stem = Path(CERTIFY).stem if target == (made_for(path) or DEFAULT) else f"{Path(CERTIFY).stem}-{target}"
    out = path.with_name(f"{stem}.json")
    try:
        there = load_object(read_text(out, "record").encode(), out.name)
    except QuantkitError:
        there = {}
    return out if certifies(there, path.name) else path.with_name(f"{stem}-{path.stem}.json")


@torch.inference_mode()
def certify_file(
    path: Path, device: str, out: Path | None = None, how: CertifyOptions = CertifyOptions()
) -> tuple[Certificate, Path]:
    """All checks of a file for a target; writes the certificate to `out`, default `certificate_path`, passed or not."""
    target = how.target or made_for(path) or DEFAULT
    targets.get(target)
    out = out or certificate_path(path, target)
    check_writable(out)
    original = open_model(how.reference) if how.reference else None
    importance = load_imatrix(how.imatrix)[0] if how.imatrix else None
    made = certify(path, target, original, importance, oracle=how.oracle, values=how.values, device=device)
    make_folders(out.parent)
    write_json(out, made.to_dict())
    return made, out
