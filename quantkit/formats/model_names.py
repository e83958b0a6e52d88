"""What may be a model or a file of one, judged by names and first bytes: the command line asks before torch is loaded,
which takes a second or two."""

import os
import re
from pathlib import Path

from quantkit import bundle
from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import open_regular, read_text_file
from quantkit.formats.mistaken import kind_of

CONFIG, TENSORS = "config.json", "tensors.json"
PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
REPO_ID = re.compile(rf"({PART}/{PART})(?:@([^\s@]+))?")


def head_of(path: Path) -> bytes:
    """The first bytes of a file. QuantkitError for one that is not regular or cannot be read."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(64)


def is_gguf(path: Path | str) -> bool:
    """Whether it is a file that begins as GGUF does, whatever its name."""
    try:
        return head_of(Path(path))[:4] == b"GGUF"
    except (QuantkitError, OSError):
        return False


def check_gguf(path: Path) -> None:
    """QuantkitError, saying what it is, for a file that does not begin as GGUF does."""
    if (head := head_of(path))[:4] != b"GGUF":
        kind = kind_of(head)
        raise QuantkitError(f"{path}: is {kind}" if kind else f"{path}: not a GGUF file (bad magic or too short)")


def check_imatrix(path: Path) -> None:
    """QuantkitError for a file that is no GGUF, with the way out for the format that llama.cpp had before."""
    if head_of(path)[:4] != b"GGUF":
        raise QuantkitError(
            f"{path}: not a GGUF imatrix; one of the old .dat format can be converted: "
            "llama-imatrix --in-file OLD.dat -o NEW.gguf"
        )


def folder_of(name: str) -> Path | None:
    """The folder that a model's name means, here or bundled; None if it means none."""
    if Path(name).is_dir():
        return Path(name)
    return bundle.models_dir() / name if name in bundle.model_names() else None


def check_model(name: str) -> None:
    """QuantkitError for a name that is no folder with a config.json, no bundled model, no GGUF, and nothing that a Hub
    could have. What else may be wrong, `models.open` finds."""
    folder, path = folder_of(name), Path(name)
    if folder:
        if not os.path.lexists(folder / CONFIG):
            read_text_file(folder / CONFIG)  # has the words for it
    elif path.exists():
        if path.is_file() and not is_gguf(path):
            what = kind_of(head_of(path)) or "a file, neither a GGUF nor the folder of a model with config.json"
            raise QuantkitError(f"{name} is {what}")
    elif "://" not in name and not REPO_ID.fullmatch(name.removeprefix("models/")):
        raise QuantkitError(bundle.no_model(name))


def is_description(folder: Path) -> bool:
    """Whether the folder tells of tensors and holds none."""
    return (folder / TENSORS).is_file() and not any(folder.glob("*.safetensors"))


def no_weights(name: object) -> str:
    """What is said of a description where weights are needed."""
    return f"{name} is a description without weights: it can be inspected and planned, not quantized"
