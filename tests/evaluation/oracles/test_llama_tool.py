"""llama-perplexity as an oracle: of a build for this machine where there is one, which on a CPU with AMX multiplies by
other kernels than a wheel's library. Elsewhere `scripts/research/amx_emulator.c` can stand in for the CPU, with a build
for AMX (docs/results/amx.md):

    QUANTKIT_LLAMA_BIN=llama.cpp/build/bin LD_PRELOAD=$PWD/amx_emulator.so \
        pytest -n 0 tests/evaluation/oracles/test_llama_tool.py
"""

import _ctypes
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mutations import Model

from quantkit import machine
from quantkit.errors import QuantkitError
from quantkit.evaluation import oracle_checks
from quantkit.evaluation.certificate import Check
from quantkit.evaluation.oracles import llama, llama_tool
from quantkit.evaluation.oracles.child import NotRun, OracleError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.ggml.library import processor_flags
from quantkit.job.certify import CertifyOptions, certify_file

EMULATOR = Path(__file__).parents[3] / "scripts" / "research" / "amx_emulator.c"
AMX = "amx_int8" in processor_flags() or "amx_emulator" in os.environ.get("LD_PRELOAD", "")


@pytest.fixture(scope="module")
def ours(made) -> oracle_checks.Sample:
    return oracle_checks.sample(made / "tiny-r1-1.58bit.gguf", "cpu")


def judged(path: Path) -> list[Check]:
    """What a native build makes of a file, its default flags first."""
    program = llama_tool.program()
    if program is None:
        pytest.skip(f"no {llama_tool.PROGRAM}: set {llama_tool.FOLDER} to the folder of a native build of llama.cpp")
    return list(oracle_checks.built(program, GGUFFile.open(path), oracle_checks.sample(path, "cpu")))


def test_a_build_agrees_and_is_named(made):
    found = judged(made / "tiny-r1-1.58bit.gguf")
    assert found[0].status == "pass", found
    assert found[0].engine and found[0].engine.version != "of unknown build" and found[0].engine.cpu != "plain"
    assert not AMX or found[0].engine.flags.split() == ["--no-repack"]


@pytest.mark.skipif(not AMX, reason="this CPU has no AMX (amx_int8 in /proc/cpuinfo)")
def test_heads_that_amx_takes_need_a_flag(made):
    """attn_k_b as Q8_0: llama.cpp (b11434) aborts, unless it multiplies the weights as they lie in the file."""
    right, died = judged(made / "tiny-r1-1.58bit.gguf")
    assert (right.status, right.name) == ("pass", "oracle llama.cpp build --no-repack")
    assert died.status == "warn" and "GGML_ASSERT(*cur_backend_id != -1)" in died.detail


def test_log_probabilities_are_read_as_llama_cpp_leaves_them(tmp_path):
    """n_vocab 3, 6 tokens, after tokens 3 and 4: the first two numbers of a row are a float32 scale and the least."""
    rows = [(0.5, -4.0, (0, 2, 7)), (0.25, -1.0, (1, 0, 4))]
    path = tmp_path / "logits"
    packed = b"".join(struct.pack("<ff3HH", scale, least, *steps, 0) for scale, least, steps in rows)
    path.write_bytes(b"_logits_" + struct.pack("<9i", 6, 3, 1, 0, 5, 4, 3, 2, 1) + packed)
    tokens, log_probs = llama_tool._read(path, 6)
    assert tokens.tolist() == [0, 5, 4, 3, 2, 1]
    np.testing.assert_allclose(log_probs, [[-4.0, -3.0, -0.5], [-0.75, -1.0, 0.0]])
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(OracleError, match="left no log-probabilities of 6 tokens"):
        llama_tool._read(path, 6)


@pytest.mark.parametrize(
    ("said", "cpu"),
    [
        (
            "load_backend: loaded CPU backend from /x/libggml-cpu-sapphirerapids.so\n"
            "system_info: n_threads = 1 / 2 | CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 1 | AMX_INT8 = 1 | REPACK = 1 |\n",
            "sapphirerapids: AMX_INT8",
        ),
        ("0.0.1 I system_info: n_threads = 1 | CPU : SSE3 = 1 | AVX = 1 | AVX2 = 0 |", "AVX"),
        ("", "plain"),
    ],
)
def test_the_variant_is_read_of_what_it_prints(said, cpu):
    assert llama_tool.cpu_of(said) == cpu


@pytest.mark.parametrize(
    ("said", "build"),
    [
        (
            "version: 0.6.0-dev (build 11434, commit 0c1e570)\nbuilt with GNU 12.2.0 for Linux x86_64\n",
            "0.6.0-dev (build 11434, commit 0c1e570), GNU 12.2.0",
        ),
        (
            "version: 4430 (ecebbd29)\nbuilt with cc (GCC) 14.2.1 for x86_64-pc-linux-gnu",
            "4430 (ecebbd29), cc (GCC) 14.2.1",
        ),
        ("", "of unknown build"),
    ],
)
def test_the_build_is_read_of_its_version(said, build):
    assert llama_tool.build_of(said) == build


STARTS = "#!/bin/sh\n[ $# -gt 1 ] || exit 0\n"


def pretended(folder: Path, monkeypatch, does: str) -> Path:
    """A llama-perplexity that starts, and then does this with a model."""
    program = folder / llama_tool.PROGRAM
    program.write_text(f"{STARTS}{does}\n")
    program.chmod(0o755)
    monkeypatch.setenv(llama_tool.FOLDER, str(folder))
    return program


def test_a_build_that_dies_fails_by_its_last_words(made, tmp_path, monkeypatch):
    """With --no-repack too; a program of that name that does nothing is no llama.cpp either. It is found by a relative
    path, and leaves no log in the caller's folder."""
    program = pretended(
        tmp_path, monkeypatch, "> llama.log; echo 'x.cpp:1: GGML_ASSERT(right) failed' >&2; kill -ABRT $$"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(llama_tool.FOLDER, ".")
    (found,) = judged(made / "tiny-r1-1.58bit.gguf")
    assert (found.name, found.status) == ("oracle llama.cpp build", "fail")
    assert found.detail == "llama-perplexity ended with signal 6: x.cpp:1: GGML_ASSERT(right) failed"
    assert [path.name for path in tmp_path.iterdir()] == [llama_tool.PROGRAM]
    named = "llama_model_loader: - kv   1:    general.name str    = std::bad_alloc"  # whoever made the file wrote that
    program.write_text(f"{STARTS}echo '{named}' >&2; kill -SEGV $$\n")
    (found,) = judged(made / "tiny-r1-1.58bit.gguf")
    assert (found.status, found.detail) == ("fail", "llama-perplexity ended with signal 11")
    for dies in ("kill -ILL $$", "sh -c 'kill -ILL $$'; exit $?"):
        program.write_text(f"{STARTS}{dies}\n")
        (found,) = judged(made / "tiny-r1-1.58bit.gguf")
        assert (found.status, found.detail) == ("skip", oracle_checks.ILLEGAL)
    program.write_text("#!/bin/sh\n")
    assert "left no log-probabilities" in judged(made / "tiny-r1-1.58bit.gguf")[0].detail


NO_MEMORY = "was killed (signal 9), which Linux does when memory runs out"


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("kill -KILL $$", NO_MEMORY),
        ("sh -c 'kill -KILL $$'; exit $?", NO_MEMORY),
        ('echo "  what():  std::bad_alloc" >&2; kill -ABRT $$', "ran out of memory: what():  std::bad_alloc"),
        ("echo 'load: unable to allocate CPU buffer' >&2; exit 1", "memory: load: unable to allocate CPU buffer"),
        (f"ulimit -v 99999; exec {sys.executable} -c 'bytearray(1 << 30)'", "ran out of memory: MemoryError"),
        (f"exec {sys.executable} -c 'import numpy; numpy.ones(1 << 50)'", "_ArrayMemoryError: Unable to allocate"),
        (
            "echo 'error: unknown argument: -dev' >&2; exit 1",
            "too new or not whole: error: unknown argument: -dev",
        ),
        ("echo 'error: invalid argument: -dev' >&2; exit 1", "not whole: error: invalid argument: -dev"),
    ],
)
def test_no_file_is_blamed_for_what_its_program_lacks(does, says, ours, tmp_path, monkeypatch):
    """--no-repack is not tried either."""
    pretended(tmp_path, monkeypatch, does)
    build = llama_tool.program()
    assert build
    (found,) = oracle_checks.built(build, ours.source.file, ours)
    assert found.status == "skip" and found.detail.startswith("not run: llama-perplexity ") and says in found.detail


def test_no_file_is_blamed_for_a_program_that_is_slow_or_hangs(ours, tmp_path, monkeypatch):
    """It is started twice to know what it is, and once for the file."""
    program = pretended(tmp_path, monkeypatch, "exec sleep 60")
    program.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/starts\n' + program.read_text().partition("\n")[2])
    monkeypatch.setattr(llama, "available", lambda: False)
    monkeypatch.setattr(llama_tool, "TIMEOUT", 1)
    how = CertifyOptions("llama.cpp", values=False)
    found, _ = certify_file(ours.source.file.path, "cpu", tmp_path / "certify.json", how)
    build = found.checks[-1]
    assert (build.name, build.status) == (oracle_checks.NATIVE, "skip") and not found.failed()
    assert build.detail == "not run: llama-perplexity did not answer in 1 s: too slow here, or hung"
    assert (tmp_path / "starts").read_text().split() == ["--version", "--help", "-m"]


def test_a_file_that_fails_by_the_one_flag_that_runs_has_failed(ours, tmp_path, monkeypatch):
    pretended(tmp_path, monkeypatch, 'case "$*" in *--no-repack*) exit 0;; esac; kill -ILL $$')
    (found,) = judged(ours.source.file.path)
    assert found.status == "fail" and "left no log-probabilities" in found.detail and "--no-repack" in found.name


def test_what_was_not_run_has_not_passed(ours, tmp_path, monkeypatch):
    monkeypatch.setattr(llama, "available", lambda: False)
    pretended(tmp_path, monkeypatch, "kill -KILL $$")
    how = CertifyOptions("llama.cpp", values=False)
    found, _ = certify_file(ours.source.file.path, "cpu", tmp_path / "certify.json", how)
    assert not found.failed() and not found.passed and found.verdict == "nothing failed, engine not run"
    assert oracle_checks.NATIVE in found.not_run

    def lacking(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(oracle_checks, "sample", lacking)
    found, _ = certify_file(ours.source.file.path, "cpu", tmp_path / "certify.json", how)
    assert [(c.status, c.name) for c in found.checks][-1] == ("skip", "oracle") and not found.failed()


def test_no_file_is_blamed_for_another_version_of_the_package(ours, tmp_path, monkeypatch):
    """A library in which llama.cpp's functions are not."""
    (tmp_path / "xllamacpp").mkdir()
    (tmp_path / "xllamacpp" / "__init__.py").touch()
    (tmp_path / "xllamacpp" / "lib.so").symlink_to(_ctypes.__file__)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    (found,) = oracle_checks.installed(ours.source.file, ours)
    assert found.status == "skip" and "llama.cpp cannot answer: lib.so has no llama_" in found.detail, found


def test_no_file_is_blamed_for_a_package_for_another_cpu(ours, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    (found,) = oracle_checks.installed(ours.source.file, ours)
    assert (found.status, found.detail) == ("skip", "not run: this CPU does not run llama.cpp")


def test_what_the_right_flags_gave_is_kept_if_nothing_comes_without(ours, monkeypatch):
    """As of a model whose YaRN needs them."""

    def once(*_: object, **how: object) -> np.ndarray:
        if answered or how["n_threads"] != machine.threads():
            raise NotRun(NO_MEMORY)
        answered.append(1)
        own = ours.logits().slab(0, ours.source.config.n_vocab)(slice(None))
        return torch.nn.functional.pad(own, (0, 0, 0, 1))[None].numpy()

    answered: list[int] = []
    monkeypatch.setattr(oracle_checks.targets, "start_flags", lambda *_: " --yarn-beta-fast 32")
    for name, answer in (("tokenize", [ours.ids]), ("version", "1"), ("system_info", "AVX2 = 1")):
        monkeypatch.setattr(llama, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(llama, "logits", once)
    right, without = oracle_checks.installed(ours.source.file, ours)
    assert (right.status, right.name) == ("pass", "oracle llama.cpp --yarn-beta-fast 32"), right
    assert (without.status, without.detail) == ("skip", f"not run: {NO_MEMORY}")


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (None, "no llama-perplexity there that can be executed"),
        (b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xff\x7f" + bytes(100), "cannot be executed: Exec format error"),
        (
            b"#!/bin/sh\necho 'error while loading shared libraries: libllama.so' >&2; exit 127\n",
            "not whole: error while",
        ),
        (b"#!/bin/sh\necho '-mla,  --mla-use'\n", "is ik_llama.cpp's"),
    ],
    ids=["none", "another machine's", "without its library", "a fork's"],
)
def test_no_file_is_blamed_for_a_program_that_is_none(program, says, made, tmp_path, monkeypatch):
    """Who named it is told at once; one on PATH is left out, and said to be."""
    monkeypatch.setattr(llama, "available", lambda: False)
    monkeypatch.setattr(oracle_checks, "sample", lambda *_: pytest.fail("computed for a program that is none"))
    monkeypatch.setenv(llama_tool.FOLDER, str(tmp_path))
    file = made / "tiny-r1-1.58bit.gguf"
    if program:
        (tmp_path / llama_tool.PROGRAM).write_bytes(program)
        (tmp_path / llama_tool.PROGRAM).chmod(0o755)
    with pytest.raises(QuantkitError, match=re.escape(says)):
        certify_file(file, "cpu", tmp_path / "certify.json", CertifyOptions("llama.cpp"))
    assert not (tmp_path / "certify.json").exists()
    monkeypatch.delenv(llama_tool.FOLDER)
    monkeypatch.setenv("PATH", str(tmp_path))
    *_, build = oracle_checks.llama_cpp(file, GGUFFile.open(file), "cpu")
    assert (build.name, build.status) == (oracle_checks.NATIVE, "skip")
    assert (says if program else "build llama.cpp (cmake") in build.detail


def test_texts_begin_as_the_file_says(made, tmp_path):
    """GLM-5's files say without BOS: llama-perplexity asks for none."""
    model = Model(made / "tiny-r1-1.58bit.gguf")
    model.metadata["tokenizer.ggml.add_bos_token"] = False
    path = model.write(tmp_path / "without.gguf")
    ours = oracle_checks.sample(path, "cpu")
    assert ours.tokens[0].tolist() == ours.ids[: oracle_checks.TOKENS]
    assert judged(path)[0].status == "pass"


def test_the_emulator_multiplies_as_a_loop_does(tmp_path):
    """Its own test, of all five kinds of products, on tiles that are not full."""
    compiler, out = shutil.which("gcc"), tmp_path / "test"
    if not compiler or "avx2" not in processor_flags():
        pytest.skip("needs gcc and an x86-64 CPU")
    words = [compiler, "-O2", "-DSELF_TEST", "-mamx-tile", "-mamx-int8", "-mamx-bf16", str(EMULATOR), "-o", str(out)]
    if (built := subprocess.run([*words, "-ldl"], capture_output=True, text=True, check=False)).returncode:
        if "unrecognized" in built.stderr:
            pytest.skip("this gcc knows no AMX")
        pytest.fail(built.stderr)
    done = subprocess.run([out], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("equal") == 5, done.stdout
