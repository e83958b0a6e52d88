"""A folder that `make` left, read back: whole, certified, and without secrets; or a QuantkitError says what is not."""

import glob
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.evaluation.certificate import failures
from quantkit.formats.byte_source import read_whole
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.safetensors_header import load_object
from quantkit.job.finished import recorded
from quantkit.job.folder import CERTIFY, IMATRIX, NOT_MADE, PLAN, PROVENANCE, RECIPE, REPORT, VERIFY
from quantkit.job.publish.secrets import refuse_in_header, refuse_local, refuse_secrets, without_local
from quantkit.planning.plan import Plan
from quantkit.progress import say

REQUIRED = (PLAN, VERIFY, PROVENANCE)
OPTIONAL = (RECIPE, CERTIFY, REPORT)
CLEANED = (VERIFY, PROVENANCE, CERTIFY)  # published without where things lie here
BUNDLED = "dataset-build evaluation ("  # what the name of the bundled text begins with
TEXTS = b'<div class="pair">'  # in a report: a continuation beside the original's
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Quant:
    """One finished quantization. files: path in the repository -> local path. cleaned: the
    bytes to publish in place of some of them. problems: why not to publish it."""

    name: str
    folder: Path
    plan: Plan
    gguf: tuple[Path, ...]
    verify: Mapping[str, Any]
    provenance: Mapping[str, Any]
    files: Mapping[str, Path]
    cleaned: Mapping[str, bytes] = field(default_factory=dict)
    problems: tuple[str, ...] = field(default=())

    @property
    def n_bytes(self) -> int:
        """Of the model's files."""
        return sum(path.stat().st_size for path in self.gguf)


def read_folder(folder: Path, name: str | None = None) -> Quant:
    """QuantkitError if there is no finished GGUF with its plan; lesser faults are in `problems`."""
    if not folder.is_dir():
        raise QuantkitError(f"{folder}: no such folder")
    plan = Plan.from_json(_bytes(folder / PLAN), str(folder / PLAN))
    name = name or plan.recipe
    if not NAME.fullmatch(name):
        raise QuantkitError(f"--name {name}: use letters, digits, dots and dashes")
    found = sorted(path for path in folder.glob(f"{glob.escape(plan.model)}-{glob.escape(plan.recipe)}*.gguf"))
    if not found:
        raise QuantkitError(f"{folder}: no finished {plan.model}-{plan.recipe}.gguf; run `quantkit make` to its end")
    file = GGUFFile.open(found[0])
    gguf = tuple(file.files)
    verify, provenance = (_json(folder / each) for each in (VERIFY, PROVENANCE))
    problems = [f"{each} is missing" for each in (*REQUIRED, IMATRIX) if not (folder / each).is_file()]
    problems += [
        f"{path.name} is left of an unfinished run"
        for path in sorted(folder.iterdir())
        if path.name.endswith((".part", ".state", ".ledger"))
    ]
    problems += [f"{path.name} is not one of the files of {gguf[0].name}" for path in found if path not in gguf]
    planned = {tensor.name: (tensor.qtype, tuple(tensor.shape)) for tensor in plan.tensors}
    if planned != {tensor.name: (tensor.qtype, tuple(tensor.shape)) for tensor in file.tensors.values()}:
        problems.append(f"{gguf[0].name} does not hold the tensors of {PLAN}")
    sizes = {path.name: path.stat().st_size for path in gguf}
    if verify and (verify.get("file"), verify.get("bytes")) != (gguf[0].name, sum(sizes.values())):
        problems.append(f"{VERIFY} is of other files; run `quantkit make` or `quantkit verify --json` again")
    problems += _certificate(folder / CERTIFY, sizes)
    files = {f"{name}/{path.name}": path for path in gguf}
    files |= {f"{name}/{each}": folder / each for each in (*REQUIRED, *OPTIONAL) if (folder / each).is_file()}
    if (folder / IMATRIX).is_file():
        # Not beside the model: KTransformers takes every .gguf of its folder for a part of it.
        files[f"imatrix/{name}.gguf"] = folder / IMATRIX
    if kept := _texts_of_others(verify):
        files.pop(f"{name}/{REPORT}", None)
        say(f"{folder}: {kept} texts of --data that {VERIFY} holds are not published, nor {REPORT}, which shows them")
    elif (folder / REPORT).is_file() and _shows_other_texts(_bytes(folder / REPORT), verify):
        del files[f"{name}/{REPORT}"]
        say(f"{folder}: {REPORT} shows texts of an earlier {VERIFY} and is not published; run `quantkit report` again")
    cleaned = _checked(files, folder)
    for header in [file, *(GGUFFile.open(path) for path in files.values() if path.name == IMATRIX)]:
        refuse_in_header(header, folder)
    provenance = without_local(provenance)
    return Quant(name, folder, plan, gguf, verify, provenance, files, cleaned, tuple(problems))


def _checked(files: Mapping[str, Path], folder: Path) -> dict[str, bytes]:
    """What is published in place of files that say where things lie here. QuantkitError for secrets, and for such
    places in files that are published as they are."""
    cleaned = {}
    for stored, path in files.items():
        if path.suffix == ".gguf":
            continue
        data = _bytes(path)
        if path.name in CLEANED:
            value = without_local(load_object(data, str(path)))
            if path.name == VERIFY and _texts_of_others(value):
                value["generation"].pop("samples")
            data = cleaned[stored] = json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
        refuse_secrets(path, data)
        refuse_local(path, data, folder)
    return cleaned


def _texts_of_others(verify: Mapping[str, Any]) -> int:
    """How many texts `verify --prompts` kept that are not the bundled ones: whose they are, nobody here knows."""
    generation = verify.get("generation")
    samples = generation.get("samples") if isinstance(generation, dict) else None
    return 0 if not isinstance(samples, list) or str(verify.get("text")).startswith(BUNDLED) else len(samples)


def _shows_other_texts(page: bytes, verify: Mapping[str, Any]) -> bool:
    """Whether a report has continuations, and is not of the text of this verify.json."""
    return TEXTS in page and str(verify.get("text_sha256", TEXTS)).encode() not in page


def reproduce(provenance: Mapping[str, Any], base: str, name: str, repo: str) -> list[str]:
    """The commands that make the same bytes again, from what the repository holds."""
    download = f'hf download {shlex.quote(repo)} --include {shlex.quote(name + "/*")} "imatrix/*" --local-dir published'
    if not provenance.keys() >= {"target", "mla", "effort", "calibration"}:  # of a version that did not record them
        return [download]
    p, calibration = provenance, provenance["calibration"]
    source = p.get("source") or {}
    words = ["quantkit", "make", f"{base}@{source['commit']}" if source.get("commit") else base]
    words += ["--recipe", f"published/{name}/{PLAN}"]
    text = calibration.get("text")
    if p.get("packed_by") == "ggml":
        words += ["--imatrix", f"published/imatrix/{name}.gguf"]
    elif text:
        words += ["--encoder", "quantkit", "--effort", p["effort"], *text_words(text, "")]
    if p.get("split_max_bytes") is not None:
        words += ["--split-max-size", str(p["split_max_bytes"])]
    words += text_words(p.get("evaluation") or {}, "eval-")
    command = " ".join([*map(shlex.quote, words), "--output", "again"])
    special = unspoken(calibration) if p.get("packed_by") != "ggml" else []
    return [
        download,
        *(f"# from Python, with {' and '.join(special)} (quantkit.job.make):" for _ in special[:1]),
        command,
    ]


def unspoken(calibration: Mapping[str, Any]) -> list[str]:
    """What the command line cannot say of a calibration, as Python says it."""
    text = calibration.get("text") or {}
    usual = {"chunk": 512, "from_start": False}
    found = [f"TextChoice.{key}={text[key]}" for key, value in usual.items() if text.get(key, value) != value]
    least = calibration.get("min_expert_tokens", 32)
    return found + ([f"Calibration.min_expert_tokens={least}"] if least != 32 else [])


def text_words(text: Mapping[str, Any], prefix: str) -> list[str]:
    """Options of a TextChoice."""
    if not text:
        return []
    words = [word for source in text.get("data", ()) for word in (f"--{prefix}data", source)]
    return [*words, f"--{prefix}tokens", str(text["n_tokens"])]


def _certificate(path: Path, sizes: Mapping[str, int]) -> list[str]:
    if not path.is_file():
        return ["it is not certified; run `quantkit certify`"]
    found = _json(path)
    if failures(found):
        return [f"{CERTIFY} says that a check failed"]
    if found.get("passed") is not True or found.get("engine_run") is not True:
        said = found.get("verdict") or "not that a program has run the file"
        return [f"{CERTIFY} says {said}: install what it lacks, or free memory, and run `quantkit certify` again"]
    made, seen = recorded(path.parent), found.get("crc32") or {}
    changed = not isinstance(seen, dict) or any(made.get(name, crc) != crc for name, crc in seen.items())
    if found.get("files") != sizes or changed:
        return [f"{CERTIFY} is of other files; run `quantkit certify` again"]
    return []


def _bytes(path: Path) -> bytes:
    if not path.exists():
        raise QuantkitError(NOT_MADE.format(path, path.parent))
    return read_whole(path, "record")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return load_object(_bytes(path), str(path))
