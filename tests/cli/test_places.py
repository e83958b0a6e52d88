"""A folder stands for the model in it; a certificate says for what, and whether a program has run the file."""

import json
import shutil
from dataclasses import replace

import pytest
from click.testing import CliRunner

from quantkit.__main__ import main
from quantkit.cli.values import MODEL_FILE
from quantkit.errors import QuantkitError
from quantkit.evaluation.certificate import Certificate, Check, Engine
from quantkit.formats.gguf_folder import model_in
from quantkit.job.publish.folder import read_folder
from quantkit.job.status import status


def test_a_folder_is_its_model(tmp_path):
    for name in ("imatrix.gguf", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "m.gguf.part"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert MODEL_FILE.convert(str(tmp_path), None, None) == tmp_path / "m-00001-of-00002.gguf"
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(QuantkitError, match=r"2 models \(m-00001-of-00002.gguf, other.gguf\); name one"):
        model_in(tmp_path)
    for path in tmp_path.glob("*.gguf"):
        path.unlink()
    with pytest.raises(QuantkitError, match="no finished GGUF file in this folder; `quantkit status"):
        model_in(tmp_path)


def test_a_certificate_for_each_target(made, tmp_path):
    """The file's own, of its metadata, is certify.json; another's has the target in its name."""
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    for arguments in ([], ["--target", "ollama"]):
        done = CliRunner().invoke(main, ["certify", str(folder), "--no-oracle", "--no-values", *arguments])
        assert done.exit_code == 0 and "nothing failed, engine not run" in done.stdout, done.output
    own, other = (json.loads((folder / name).read_text()) for name in ("certify.json", "certify-ollama.json"))
    assert (own["target"], other["target"]) == ("ktransformers", "ollama")
    assert not own["passed"] and not own["engine_run"] and not own["engines"]
    assert own["not_run"] == ["weights", "original", "oracle"]
    problems = read_folder(folder).problems
    assert any("certify.json says nothing failed, engine not run" in problem for problem in problems), problems


def test_a_certificate_for_each_file(made, tmp_path):
    """That of the file that `make` left is not replaced by another one's, and `status` tells its own."""
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    file = next(folder.glob("tiny-r1-*.gguf"))
    shutil.copy(file, folder / "second.gguf")
    for name in (file.name, "second.gguf"):
        done = CliRunner().invoke(main, ["certify", str(folder / name), "--no-oracle", "--no-values"])
        assert done.exit_code == 0, done.output
    own, other = (json.loads((folder / name).read_text()) for name in ("certify.json", "certify-second.json"))
    assert "second.gguf" not in own["files"] and list(other["files"]) == ["second.gguf"]
    told = "\n".join(status(folder))
    assert "(certify.json)" in told and "(certify-second.json)" not in told


WHEEL = Engine("llama.cpp", "xllamacpp 1", "AVX2")
BUILD = Engine("llama.cpp", "11434 (0c1e570)", "AMX_INT8", " --no-repack")
RUN = Check("oracle llama.cpp", "pass", "", WHEEL)


@pytest.mark.parametrize(
    ("checks", "verdict"),
    [
        ([Check("types", "pass", ""), RUN], "passed in llama.cpp (xllamacpp 1, AVX2)"),
        ([RUN, Check("oracle ollama itself", "skip", "")], f"passed in {WHEEL}; not run: ollama itself"),
        (
            [RUN, Check("b", "pass", "", BUILD), Check("weights", "skip", "")],
            f"passed in {WHEEL}, {BUILD}; not run: weights",
        ),
        ([Check("types", "pass", ""), Check("oracle", "skip", "")], "nothing failed, engine not run"),
        (
            [Check("oracle transformers", "pass", ""), Check("oracle llama.cpp", "skip", "")],
            "nothing failed, engine not run",
        ),
        ([replace(RUN, status="warn")], f"not passed: {WHEEL} computes another model"),
        ([replace(RUN, status="skip")], "nothing failed, engine not run"),
        ([RUN, Check("other kinds of experts", "skip", "", WHEEL)], "nothing failed, engine not run"),
        ([Check("types", "fail", ""), RUN], "failed: types"),
        ([], "failed: "),
    ],
)
def test_passed_is_said_of_what_a_program_has_run(checks, verdict):
    made = Certificate("ollama", {}, checks)
    assert made.verdict == verdict and made.to_dict()["verdict"] == verdict
    assert made.passed == verdict.startswith("passed")
