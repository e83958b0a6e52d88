"""A folder that `make` left, read back: whole, certified, and without secrets; or a QuantkitError says what is not."""

import glob
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.utils import get_token

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.safetensors_header import load_object
from quantkit.planning.plan import Plan

REQUIRED = ("plan.json", "verify.json", "provenance.json")
OPTIONAL = ("recipe.toml", "certify.json", "report.html")
IMATRIX = "imatrix.gguf"
SECRET = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")


@dataclass(frozen=True)
class Quant:
    """One finished quantization. files: path in the repository -> local path. problems: why not to publish it."""

    name: str
    folder: Path
    plan: Plan
    gguf: tuple[Path, ...]
    verify: Mapping[str, Any]
    provenance: Mapping[str, Any]
    files: Mapping[str, Path]
    problems: tuple[str, ...] = field(default=())

    @property
    def n_bytes(self) -> int:
        """Of the model's files."""
        return sum(path.stat().st_size for path in self.gguf)


def read_folder(folder: Path, name: str | None = None) -> Quant:
    """QuantkitError if there is no finished GGUF with its plan; lesser faults are in `problems`."""
    if not folder.is_dir():
        raise QuantkitError(f"{folder}: no such folder")
    plan = Plan.from_json(_bytes(folder / "plan.json"), str(folder / "plan.json"))
    name = name or plan.recipe
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise QuantkitError(f"--name {name}: use letters, digits, dots and dashes")
    found = sorted(path for path in folder.glob(f"{glob.escape(plan.model)}-{glob.escape(plan.recipe)}*.gguf"))
    if not found:
        raise QuantkitError(f"{folder}: no finished {plan.model}-{plan.recipe}.gguf; run `quantkit make` to its end")
    file = GGUFFile.open(found[0])
    gguf = tuple(file.files)
    verify, provenance = (_json(folder / each) for each in ("verify.json", "provenance.json"))
    problems = [f"{each} is missing" for each in (*REQUIRED, IMATRIX) if not (folder / each).is_file()]
    problems += [
        f"{path.name} is left of an unfinished run"
        for path in sorted(folder.iterdir())
        if path.name.endswith((".part", ".state", ".ledger"))
    ]
    problems += [f"{path.name} is not one of the files of {gguf[0].name}" for path in found if path not in gguf]
    planned = {tensor.name: (tensor.qtype, tuple(tensor.shape)) for tensor in plan.tensors}
    if planned != {tensor.name: (tensor.qtype, tuple(tensor.shape)) for tensor in file.tensors.values()}:
        problems.append(f"{gguf[0].name} does not hold the tensors of plan.json")
    sizes = {path.name: path.stat().st_size for path in gguf}
    if verify and (verify.get("file"), verify.get("bytes")) != (gguf[0].name, sum(sizes.values())):
        problems.append("verify.json is of other files; run `quantkit make` or `quantkit verify --json` again")
    problems += _certificate(folder / "certify.json", sizes)
    files = {f"{name}/{path.name}": path for path in gguf}
    files |= {f"{name}/{each}": folder / each for each in (*REQUIRED, *OPTIONAL) if (folder / each).is_file()}
    if (folder / IMATRIX).is_file():
        # Not beside the model: KTransformers takes every .gguf of its folder for a part of it.
        files[f"imatrix/{name}.gguf"] = folder / IMATRIX
    for path in files.values():
        if path.suffix != ".gguf":
            refuse_secrets(path, path.read_bytes())
    return Quant(name, folder, plan, gguf, verify, provenance, files, tuple(problems))


def refuse_secrets(where: object, data: bytes) -> None:
    """QuantkitError if a token stands in a file that is to be published."""
    token = get_token()
    if SECRET.search(data) or (token and token.encode() in data):
        raise QuantkitError(f"{where}: holds an access token; remove it before publishing")


def reproduce(provenance: Mapping[str, Any], base: str, name: str, repo: str) -> list[str]:
    """The commands that make the same bytes again, from what the repository holds."""
    download = f'hf download {repo} --include "{name}/*" "imatrix/*" --local-dir published'
    if not provenance.keys() >= {"target", "mla", "effort", "calibration"}:  # of a version that did not record them
        return [download]
    p, calibration = provenance, provenance["calibration"]
    source = p.get("source") or {}
    words = ["quantkit", "make", f"{base}@{source['commit']}" if source.get("commit") else base]
    words += ["--recipe", f"published/{name}/plan.json"]
    text = calibration.get("text")
    if p.get("packed_by") == "ggml":
        words += ["--imatrix", f"published/imatrix/{name}.gguf"]
    elif text:
        words += ["--encoder", "quantkit", "--effort", p["effort"], *text_words(text, "")]
        words += ["--min-expert-tokens", str(calibration["min_expert_tokens"])]
    if p.get("split_max_bytes") is not None:
        words += ["--split-max-size", str(p["split_max_bytes"])]
    words += text_words(p.get("evaluation") or {}, "eval-")
    return [download, " ".join([*map(shlex.quote, words), "--output", "again"])]


def text_words(text: Mapping[str, Any], prefix: str) -> list[str]:
    """Options of a TextChoice; column and chunk are shared by both texts, so only the first gives them."""
    if not text:
        return []
    words = [word for source in text.get("data", ()) for word in (f"--{prefix}data", source)]
    words += [f"--{prefix}tokens", str(text["n_tokens"])]
    if not prefix or text["chunk"] != 512:
        words += ["--chunk", str(text["chunk"])]
    if text.get("data") and (column := text.get("column", "text")) != "text":
        words += ["--template", column.replace("\n", "\\n")] if "{" in column else ["--column", column]
    return words + (["--from-start"] if text.get("from_start") else [])


def _certificate(path: Path, sizes: Mapping[str, int]) -> list[str]:
    if not path.is_file():
        return ["it is not certified; run `quantkit certify`"]
    found = _json(path)
    if found.get("passed") is not True:
        return ["certify.json says that a check failed"]
    return [] if found.get("files") == sizes else ["certify.json is of other files; run `quantkit certify` again"]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise QuantkitError(f"{path}: {error.strerror}; is {path.parent} a folder that `quantkit make` left?") from None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return load_object(_bytes(path), str(path))
