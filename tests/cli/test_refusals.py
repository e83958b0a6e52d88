"""Help, and what can be refused by its value alone: at once, before torch is loaded, in one line, leaving nothing."""

import json
import subprocess
import sys

import pytest

from quantkit.errors import QuantkitError
from quantkit.job.asked import check_new_imatrix, check_new_model
from quantkit.job.plan import plan_model

NO_HELP: list[tuple[str, str]] = [
    ("make --size 3x", "--size 3x: not a size"),
    ("make --size much", "--size much: not a size"),
    ("make --encoder best", "--encoder best: unknown; choose auto, quantkit, ggml"),
    ("make --device tpu", "--device tpu"),
    ("make --tokens x", "--tokens x: not a number of tokens"),
    ("make --target vllm", "unknown target 'vllm'"),
    ("make --target llama.cpp/x", "after the slash stands"),
    ("make --data nofile", "--data nofile: no such file or folder (a dataset is user/name)"),
    ("make --data user/notes.txt", "no such file or folder"),
    ("make --eval-data empty", "file in this folder"),
    ("make --recipe 9bit", "no recipe '9bit'"),
    ("make --recipe none.json", "none.json: no such file"),
    ("make --recipe list.json", "the plan is not an object"),
    ("make --recipe auto", "--recipe auto leaves types to a budget"),
    ("make --recipe 1.58bit --size 150GB", "--recipe 1.58bit: its rules fix every type"),
    ("make --recipe Q4_K_M --size 150GB", "--recipe Q4_K_M: its rules fix every type"),
    ("make --size 1GB --ram 1GB", "contradict each other"),
    ("make --vram 24GB", "--vram needs --ram too"),
    ("make --imatrix text.txt", "text.txt: not a GGUF imatrix"),
    ("make --imatrix begins.gguf --encoder quantkit", "--imatrix holds no second moments"),
    ("make --imatrix begins.gguf --data text.txt", "nothing reads --data"),
    ("make --imatrix begins.gguf --effort best", "--effort best is of quantkit's encoder, but --imatrix means ggml's"),
    ("make --encoder ggml --effort best", "--effort best is of quantkit's encoder, but --encoder ggml"),
    ("make --data=", "one of them is empty"),
    ("make --baseline --no-verify", "leave out --no-verify"),
    ("make --baseline --encoder ggml", "--baseline compares with ggml's encoder"),
    ("make no-such-model", "not one of the bundled models"),
    ("make ./nothere", "not one of the bundled models"),
    ("make a/b/c", "not one of the bundled models"),
    ("make text.txt", "text.txt is a file, neither a GGUF nor"),
    ("make lfs.gguf", "a Git LFS pointer"),
    ("make empty", "empty/config.json: no such file (is empty a model folder?)"),
    ("make deepseek-r1", "a description without weights"),
    ("calibrate --data nofile", "--data nofile: no such file"),
    ("calibrate deepseek-r1", "a description without weights"),
    ("calibrate -o begins.gguf", "begins.gguf exists already; --restart measures it anew"),
    ("sensitivity --imatrix text.txt", "not a GGUF imatrix"),
    ("sensitivity --gradients empty", "empty holds no gradients"),
    ("sensitivity --imatrix begins.gguf --types IQ9", "--types IQ9: unknown"),
    ("plan -o x.foo", "-o x.foo: name it .json"),
    ("plan --compare 1.58bit 9bit", "no recipe '9bit'"),
    ("plan --sensitivity text.txt", "text.txt: not a sensitivity file"),
    ("hardware --recipe auto", "--recipe auto leaves types to a budget"),
    ("hardware --gpu 9999", "--gpu 9999: not known"),
    ("hardware --bandwidth disk=nofile", "--bandwidth disk=nofile"),
    ("quantize tiny-r1 --plan list.json --imatrix begins.gguf -o x", "the plan is not an object"),
    ("status empty", "no job is at work here"),
    ("recipes Q4_K_M nomodel", "nomodel: no such folder"),
    ("inspect text.txt", "text.txt is a file"),
    ("verify text.txt", "text.txt: not a GGUF file"),
    ("verify begins.gguf --reference deepseek-r1", "a description without weights"),
    ("certify lfs.gguf", "lfs.gguf: is a Git LFS pointer"),
    ("certify begins.gguf --imatrix text.txt", "not a GGUF imatrix"),
    ("evaluate begins.gguf --json x.jsonl", "name it x.json"),
    ("export-kt text.txt", "not a GGUF file"),
    ("export-kt begins.gguf -o empty", "empty exists already; remove it"),
    ("report empty", "neither verify.json nor plan.json"),
    ("publish empty --repo user/name", "is empty a folder that `quantkit make` left?"),
    ("run .", "2 models (begins.gguf, lfs.gguf)"),
    ("run empty", "empty: no finished GGUF file in this folder"),
    ("run text.txt", "text.txt: not a GGUF file"),
    ("run begins.gguf -c lots", "--context lots: not a number of tokens"),
    ("run begins.gguf -p x --system s", "--system is for chats"),
    ("serve begins.gguf -ngl many", "--gpu-layers many: write auto or a number"),
    ("serve begins.gguf -ngl 101%", "--gpu-layers 101%: write auto or a number"),
    ("serve begins.gguf --host 0.0.0.0", "--host 0.0.0.0 lets other machines in"),
    ("serve begins.gguf --cors chat", "--cors chat: write an origin"),
]
HEADERS = [  # what needs names, shapes and types alone
    "inspect tiny-r1",
    "inspect deepseek-r1 --json",
    "plan tiny-r1",
    "plan deepseek-r1 --size 150GB -o -",
    "hardware deepseek-r1 --recipe 1.58bit --gpu 4090 --cpu epyc-9004 --ram 200GB",
    "families",
    "status work",
]
HELP = ["--help", "make --help", "run --help", "serve --help", "publish --help"]

PROGRAM = """
import json, sys
from click.testing import CliRunner
from quantkit.__main__ import main
for call in json.load(sys.stdin):
    done = CliRunner().invoke(main, call.split())
    print(json.dumps([call, done.exit_code, done.stdout, done.stderr, 'torch' in sys.modules]), file=sys.__stdout__)
    if 'torch' in sys.modules:
        break
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    (folder / "empty").mkdir()
    (folder / "work").mkdir()
    (folder / "work" / "plan.json").write_text(plan_model("tiny-r1").to_json())
    (folder / "work" / "provenance.json").write_text('{"command": "quantkit make"}')
    (folder / "text.txt").write_text("words\n" * 9)
    (folder / "list.json").write_text("[]")
    (folder / "begins.gguf").write_bytes(b"GGUF")
    (folder / "lfs.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    return folder


@pytest.fixture(scope="module")
def answers(place):
    """All of the calls in one process that has loaded nothing before: call -> exit code, stdout, stderr."""
    calls = [*HELP, *(call for call, _ in NO_HELP), *HEADERS]
    command = [sys.executable, "-c", PROGRAM]
    before = sorted(place.rglob("*"))
    done = subprocess.run(command, input=json.dumps(calls), capture_output=True, text=True, cwd=place)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(calls) and not found[-1][-1], f"torch was loaded, or it failed: {found[-1:]} {done.stderr}"
    assert sorted(place.rglob("*")) == before
    return {call: rest for call, *rest in found}


@pytest.mark.parametrize(("call", "says"), NO_HELP, ids=[call for call, _ in NO_HELP])
def test_a_wrong_value_is_refused_before_torch_is_loaded(answers, call, says):
    code, stdout, stderr, _ = answers[call]
    assert (code, stdout) == (1, "") and says in stderr and stderr.startswith("quantkit: "), stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("call", HEADERS)
def test_headers_are_read_without_torch(answers, call):
    """Two seconds to load, on a quiet machine."""
    code, stdout, _, loaded = answers[call]
    assert code == 0 and stdout and not loaded


@pytest.mark.parametrize("call", HELP)
def test_help_answers_at_once(answers, call):
    code, stdout, _, _ = answers[call]
    assert code == 0 and stdout.startswith("Usage: ")


def test_a_taken_name_is_refused_but_not_to_a_run_that_goes_on(tmp_path):
    model = tmp_path / "a[1].gguf"
    check_new_model(model, overwrite=False, restart=False)
    model.touch()
    check_new_model(model, overwrite=True, restart=False)
    with pytest.raises(QuantkitError, match=r"exists already; --overwrite replaces it"):
        check_new_model(model, overwrite=False, restart=False)
    (tmp_path / f"{model.name}.part.ledger").touch()  # it was killed while it renamed
    check_new_model(model, overwrite=False, restart=False)
    with pytest.raises(QuantkitError, match="exists already"):
        check_new_model(model, overwrite=False, restart=True)


def test_an_imatrix_is_not_measured_again_unasked(tmp_path):
    imatrix, gradients = tmp_path / "a[1].gguf", tmp_path / "g"
    check_new_imatrix(imatrix, gradients, restart=False)
    imatrix.touch()
    check_new_imatrix(imatrix, gradients, restart=True)
    with pytest.raises(QuantkitError, match=r"a\[1\]\.gguf exists already; --restart measures it anew"):
        check_new_imatrix(imatrix, gradients, restart=False)
    for state in (tmp_path / f"{imatrix.name}.state", gradients / "state"):  # `--restart` was stopped in either pass
        state.mkdir(parents=True)
        check_new_imatrix(imatrix, gradients, restart=False)
        state.rmdir()
    (tmp_path / "a1.gguf.state").mkdir()
    with pytest.raises(QuantkitError, match="exists already"):
        check_new_imatrix(imatrix, None, restart=False)
