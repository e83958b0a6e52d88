"""Our files against llama.cpp's own tools: the same plan and importance give the same bytes, and the same text the
same importance.

    QUANTKIT_LLAMA_BIN=folder/of/llama.cpp/build/bin pytest -m large tests/evaluation/oracles/test_llama_quantize.py

llama-quantize and llama-imatrix are looked for in that folder, then on PATH.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from oracle_files import make, reference

from quantkit.calibration import corpus
from quantkit.calibration.measure import calibrate
from quantkit.calibration.options import Calibration
from quantkit.codecs import types as qtypes
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.imatrix import fit, load_imatrix
from quantkit.models import family

pytestmark = pytest.mark.large

TIMEOUT = 900
MAX_DIFFERENCE = 0.01  # relative, in in_sum2
MAX_TIES = 0.005  # share of routed rows that may go to another expert because two router scores tie


def tool(name: str) -> Path:
    folder = os.environ.get("QUANTKIT_LLAMA_BIN")
    found = shutil.which(name, path=folder) if folder else shutil.which(name)
    if not found:
        pytest.skip(f"no {name}: set QUANTKIT_LLAMA_BIN to a folder with llama.cpp's tools, or put them on PATH")
    return Path(found)


def run(name: str, *arguments: object) -> None:
    done = subprocess.run(
        [tool(name), *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def llama_quantize(plain: Path, ours: Path, imatrix: Path, out: Path) -> Path:
    """llama-quantize's file of the types that ours has, tensor by tensor."""
    types = out.with_suffix(".types")
    tensors = GGUFFile.open(ours).tensors.values()
    wanted = [t for t in tensors if len(t.shape) > 1 and not t.name.endswith(("_norm.weight", "ffn_gate_inp.weight"))]
    types.write_text("".join(f"^{re.escape(t.name)}$={t.qtype.lower()}\n" for t in wanted), encoding="utf-8")
    run("llama-quantize", "--imatrix", imatrix, "--tensor-type-file", types, plain, out, "Q8_0", 2)
    return out


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    first, second = GGUFFile.open(ours), GGUFFile.open(theirs)
    assert first.tensors.keys() == second.tensors.keys()
    kinds = {name: (tensor.qtype, second.tensors[name].qtype) for name, tensor in first.tensors.items()}
    assert {name: kind for name, kind in kinds.items() if kind[0] != kind[1]} == {}
    different = [name for name in kinds if not np.array_equal(first.data(name), second.data(name))]
    assert not different, [(name, kinds[name][0]) for name in different]
    print(f"{len(kinds)} tensors equal, of types {' '.join(sorted({kind for kind, _ in kinds.values()}))}")


@pytest.mark.parametrize("mla", ["split", "combined"])
@pytest.mark.parametrize("target", ["llama.cpp", "ktransformers"])
def test_same_bytes(target: str, mla: str, quantized: Callable[..., Path], plain, imatrix: Path, tmp_path: Path):
    tool("llama-quantize")
    ours = quantized("1.58bit", target, mla)
    assert_same_tensors(ours, llama_quantize(plain("F32", mla), ours, imatrix, tmp_path / "theirs.gguf"))


@pytest.mark.parametrize("turn", [0, 5, 11])
def test_same_bytes_in_every_type(turn: int, plain, imatrix: Path, tmp_path: Path):
    """All types in one file, dealt out to matrices in turn."""
    tool("llama-quantize")
    ours = make(tmp_path / "ours.gguf", all_types(tmp_path, turn), imatrix)
    used = {tensor.qtype for tensor in GGUFFile.open(ours).tensors.values()}
    assert used == set(qtypes.QTYPES)
    assert_same_tensors(ours, llama_quantize(plain("F32"), ours, imatrix, tmp_path / "theirs.gguf"))


def all_types(folder: Path, turn: int) -> Path:
    matrices = [spec for spec in family.specs(reference().config) if not spec.fixed]
    names, rules, next_type = list(qtypes.QTYPES), "", turn
    for spec in matrices:
        qtype = names[next_type % len(names)]
        unmeasured = spec.role in ("token_embd", "output")  # no importance is collected for them
        if not qtypes.fits(qtype, spec.n_in) or (unmeasured and qtypes.needs_importance(qtype)):
            qtype = "Q8_0"
        else:
            next_type += 1
        rules += f'[[rules]]\nmatch = "{spec.name}"\nqtype = "{qtype}"\nwhy = "its turn"\n'
    path = folder / "all-types.toml"
    head = 'name = "all-types"\ndescription = "every type"\ntarget = "llama.cpp"\nmla = "split"\n'
    path.write_text(head + rules, encoding="utf-8")
    return path


def test_same_importance(work: Path, plain, tmp_path: Path):
    tool("llama-imatrix")
    text, theirs_path, ours_path = tmp_path / "text.txt", tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    text.write_text(corpus.default("calibration").documents[0].text, encoding="utf-8")
    n_chunk, length = 8, 256
    run(
        "llama-imatrix",
        "-m",
        plain("F32"),
        "-f",
        text,
        "-o",
        theirs_path,
        "-c",
        length,
        "--chunks",
        n_chunk,
        "--no-ppl",
        "-t",
        2,
        "-fa",
        "off",
    )
    choice = corpus.TextChoice((str(text),), n_chunk * length, length, from_start=True)
    calibrate(reference(), Calibration(choice), ours_path)
    compare_importance(ours_path, theirs_path)
    make(tmp_path / "with-theirs.gguf", "1.58bit", theirs_path)  # theirs serves our encoders


def compare_importance(ours_path: Path, theirs_path: Path) -> None:
    ours, theirs = load_imatrix(ours_path)[0], load_imatrix(theirs_path)[0]
    assert not theirs.keys() - ours.keys(), sorted(theirs.keys() - ours.keys())
    worst, moved = 0.0, 0.0
    for name, entry in theirs.items():
        mine = ours[name]
        entry = fit(entry, *mine.in_sum2.shape, name)  # llama-imatrix writes the heads of attn_k_b in one row
        assert mine.counts.shape == entry.counts.shape, name
        moved = max(moved, float(np.abs(mine.counts - entry.counts).sum() / entry.counts.sum()))
        same = np.broadcast_to(mine.counts == entry.counts, len(entry.in_sum2)) & (entry.in_sum2.any(axis=1))
        norms = np.linalg.norm(entry.in_sum2[same], axis=1)
        worst = max([worst, *np.linalg.norm(mine.in_sum2[same] - entry.in_sum2[same], axis=1) / norms])
    print(f"{len(theirs)} entries: worst relative difference {worst:.2e}, counts moved by ties at most {moved:.2e}")
    assert worst < MAX_DIFFERENCE and moved < MAX_TIES
