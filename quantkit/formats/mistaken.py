"""What a file is that is not what its name says: downloads and clones leave other things under the same name."""

from collections.abc import Iterable, Mapping
from typing import Any

KINDS: Mapping[bytes, str] = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull`, or use `hf download`",
    b"<!doctype": "an HTML page, perhaps of a login or an error; download the file again",
    b"<html": "an HTML page, perhaps of a login or an error; download the file again",
    b"<?xml": "an XML answer of a server, not the file; download it again",
    b"gguf": "a GGUF file",
    b"pk\x03\x04": "a ZIP archive, such as PyTorch's own format; convert it to safetensors",
    b"\x80\x02": "a Python pickle, such as PyTorch's own format; convert it to safetensors",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"\0" * 8: "zeros: a download that reserved its place and was interrupted",
}
WORDS = ".weight_packed"
# Tensors that packed checkpoints have instead of `weight`.
PACKED: Mapping[str, str] = {
    ".qweight": "packed by GPTQ or AWQ",
    ".qzeros": "packed by GPTQ or AWQ",
    WORDS: "packed to 4 bits by compressed-tensors",
    ".weight.absmax": "packed by bitsandbytes",
    ".weight_blocks": "packed as MXFP4",
    "_proj_blocks": "packed as MXFP4",
    ".lora_A.weight": "a LoRA adapter",
}


def kind_of(head: bytes) -> str | None:
    """What a file that begins so is, if it is one of what is often found under another's name."""
    start = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    return next((kind for magic, kind in KINDS.items() if start.startswith(magic)), None)


def packed(names: Iterable[str], config: Mapping[str, Any], int4: str | None) -> str | None:
    """How a checkpoint with tensors of these names is packed, None if it can be read: a line for people. int4: why
    those of compressed-tensors cannot be (`int4.readable`)."""
    unread = {suffix: what for suffix, what in PACKED.items() if int4 or suffix != WORDS}
    found = next(((name, what) for name in names for suffix, what in unread.items() if name.endswith(suffix)), None)
    if found is None:
        return None
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    more = int4 if method == "compressed-tensors" else f"quant_method {method}" if method else None
    return f"tensor {found[0]!r} is {found[1]}" + (f" ({more})" if more else "")
