"""A good file passes; every way of breaking one is caught by the check that should, and named."""

import json
import re
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from mutations import MUTATIONS, Model

from quantkit import bundle
from quantkit.__main__ import main
from quantkit.evaluation import oracle_checks, structure
from quantkit.evaluation.certificate import Certificate
from quantkit.evaluation.certify import certify
from quantkit.evaluation.oracles import kt, llama
from quantkit.evaluation.oracles.child import IllegalInstruction
from quantkit.evaluation.weights import WeightCheck
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.geometry import Geometry
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.gguf_values import F32, U16, U32


@pytest.fixture(scope="module")
def good(made) -> Path:
    return made / "tiny-r1-1.58bit.gguf"


def failures(made: Certificate) -> dict[str, str]:
    return {check.name: check.detail for check in made.checks if check.status == "fail"}


def test_a_good_file_passes(good, tiny):
    made = certify(good, "ktransformers", tiny, oracle=False)
    assert not made.failed() and not failures(made)
    assert {check.name for check in made.checks} >= {"files", "metadata", "tensors", "types", "tokenizer", "weights"}
    assert made.files == {good.name: good.stat().st_size}
    json.dumps(made.to_dict(), allow_nan=False)


def test_one_reading_serves_weights_checksums_and_sample(good, tmp_path, capsys, monkeypatch):
    """Each layer goes through the sample's pass before the weights of the next are looked at; splits have a checksum
    each. What the sample alone gives is the same."""
    first = Model(good).write(tmp_path / "split.gguf", split_max_bytes=1_600_000)
    order, computed = list[tuple[str, int]](), list[torch.Tensor]()
    judge, advance = WeightCheck._judge, oracle_checks.SamplePass.advance

    def judged(self, spec, sums):
        order.append(("weights", -1 if spec.layer is None else spec.layer))
        judge(self, spec, sums)

    def advanced(self, n_layers):
        order.append(("sample", n_layers - 1))
        advance(self, n_layers)

    def asked(path, file, device, begun):
        computed.append(begun.sample.whole().hidden)
        return iter(())

    monkeypatch.setattr(WeightCheck, "_judge", judged)
    monkeypatch.setattr(oracle_checks.SamplePass, "advance", advanced)
    monkeypatch.setattr(oracle_checks, "llama_cpp", asked)
    monkeypatch.setattr(llama, "available", lambda: True)
    made = certify(first, "llama.cpp")
    assert not made.failed(), made.checks
    assert made.crc32 == {path.name: zlib.crc32(path.read_bytes()) for path in sorted(tmp_path.glob("*.gguf"))}
    inner = [(what, layer) for what, layer in order if layer >= 0]
    assert inner == sorted(inner, key=lambda each: (each[1], each[0] == "sample")) and ("sample", 3) in inner
    monkeypatch.undo()
    assert torch.equal(computed[0], oracle_checks.sample(first, "cpu").hidden)
    assert re.search(r"reads 4\.\d MB, .* once, for weights, checksums and a sample of text\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (MemoryError(), "memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "GPU memory"),
    ],
)
def test_memory_that_runs_out_leaves_what_was_done(error, lacking, good, tmp_path, monkeypatch):
    """The file is not to blame for it; it is for what was found before."""

    def decoded(self, spec, start, stop):
        if spec.layer == 2:
            raise error
        return decode(self, spec, start, stop)

    decode = WeightCheck.decoded
    monkeypatch.setattr(WeightCheck, "decoded", decoded)
    out = tmp_path / "certify.json"
    how = ["--target", "ktransformers", "--reference", "tiny-r1", "--no-oracle", "--json", str(out)]
    done = CliRunner().invoke(main, ["certify", str(good), *how])
    assert done.exit_code == 0, done.output
    known = json.loads(out.read_text())
    (weights,) = [check for check in known["checks"] if check["name"] == "weights"]
    found = re.fullmatch(rf"not run: too little {lacking} after (\d+) of \d+ tensors", weights["detail"])
    assert found and weights["status"] == "skip" and "weights" in known["not_run"] and known["crc32"] is None
    assert len(known["weights"]["tensors"]) == int(found[1]) > 10
    model = Model(good)
    model.change("blk.1.ffn_up_exps.weight", lambda tensor: tensor.with_values(tensor.values() * 0, "Q8_0"))
    done = CliRunner().invoke(main, ["certify", str(model.write(tmp_path / "zeros.gguf")), *how])
    assert done.exit_code == 1 and "all zeros" in done.output and "too little" in done.output


def test_a_template_in_a_file_of_its_own_is_missed_too(good, model_copy):
    """As transformers 5 saves it; the GGUF was made of the one in tokenizer_config.json."""
    (model_copy / "chat_template.jinja").write_text("{{ messages }}")
    found = failures(certify(good, "llama.cpp", Checkpoint.open(model_copy), oracle=False, values=False))
    assert found["tokenizer"] == "tokenizer.chat_template is not the original one"


def test_what_ktransformers_would_read_too(good, tmp_path):
    """Its loader walks down from the folder, and takes the last of two tensors of one name."""
    (tmp_path / good.name).symlink_to(good)
    file = GGUFFile.open(tmp_path / good.name)
    assert structure.beside(file, "ktransformers") is None
    (tmp_path / "Q8_0" / "old").mkdir(parents=True)
    for n in range(4):
        (tmp_path / "Q8_0" / "old" / f"{n}.gguf").touch()
    warning = structure.beside(file, "ktransformers")
    assert warning and warning.endswith("Q8_0/old/0.gguf, Q8_0/old/1.gguf, Q8_0/old/2.gguf and 1 more too")
    assert structure.beside(file, "llama.cpp") is None


def test_writing_a_file_again_changes_nothing(good, tmp_path, tiny):
    """The mutations start from this, so what they are caught for is the mutation."""
    again = Model(good).write(tmp_path / "again.gguf")
    assert again.read_bytes() == good.read_bytes()


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught_and_named(name, good, tmp_path, tiny):
    change, check, says = MUTATIONS[name]
    model = Model(good)
    change(model)
    found = failures(certify(model.write(tmp_path / "broken.gguf"), "ktransformers", tiny, oracle=False))
    assert check in found, found
    assert says in found[check]


def cut(path: Path, share: float) -> None:
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda files: cut(files[-1], 0.5), "00003-of-00003.gguf: truncated: tensor"),
        (lambda files: cut(files[0], 0.001), "truncated"),
        (lambda files: files[1].unlink(), "1 of 3 splits are missing, first broken-00002-of-00003.gguf"),
        (lambda files: shutil.copy(files[0], files[1]), "split.no, split.count are (0, 3), the name says (1, 3)"),
        (lambda files: files[0].write_bytes(b"GGML" + files[0].read_bytes()[4:]), "bad magic"),
    ],
    ids=["truncated split", "truncated header", "missing split", "one split twice", "not GGUF"],
)
def test_damaged_files_are_named(damage, says, good, tmp_path, tiny):
    first = Model(good).write(tmp_path / "broken.gguf", split_max_bytes=1_600_000)
    files = sorted(tmp_path.glob("*.gguf"))
    assert not certify(first, "llama.cpp", tiny, oracle=False, values=False).failed()
    damage(files)
    found = failures(certify(files[0], "llama.cpp", tiny, oracle=False))
    assert says in found["files"]


def test_unfinished_download_is_seen_without_the_original(good, tmp_path):
    """A file of the right length whose end is zeros."""
    broken = Path(shutil.copy(good, tmp_path / "broken.gguf"))
    size = broken.stat().st_size
    cut(broken, 0.7)
    with broken.open("r+b") as file:
        file.truncate(size)
    assert "all zeros" in failures(certify(broken, "llama.cpp", oracle=False))["weights"]


def test_splits_are_for_new_versions_of_ollama(good, tmp_path):
    first = Model(good).write(tmp_path / "parts.gguf", split_max_bytes=1_600_000)
    found = {check.name: check for check in certify(first, "ollama", oracle=False, values=False).checks}
    assert found["folder"].status == "warn" and found["folder"].detail.startswith("3 splits: ")
    assert "`LLAMA_ARG_REPACK=0 ollama serve`" in found["start"].detail


@pytest.mark.parametrize(
    "key", ["expert_gating_func", "rope.scaling.type", "rope.scaling.yarn_log_multiplier", "attention.value_length_mla"]
)
def test_metadata_rules_need_no_original(key, good, tmp_path):
    """With another hidden FFN size no bundled model knows the geometry; the keys must still fit each other."""
    model = Model(good)
    model.key("expert_group_count", U32(2))
    model.key("feed_forward_length", U32(999))
    model.key("context_length", U32(163840))
    path = model.write(tmp_path / "unknown.gguf")
    assert "metadata" not in failures(certify(path, "llama.cpp", oracle=False, values=False))
    model.key(key)
    found = failures(certify(model.write(tmp_path / "broken.gguf"), "llama.cpp", oracle=False, values=False))
    assert key in found["metadata"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", U32(4_000_000_000)),
        ("expert_count", U32(4_000_000_000)),
        ("attention.kv_lora_rank", "much"),
        ("attention.head_count", F32(4.0)),
        ("embedding_length", U32(0)),
        ("expert_gating_func", "sigmoid"),
    ],
)
def test_hostile_metadata_fail_without_harm(key, value, good, tmp_path):
    model = Model(good)
    model.key("feed_forward_length", U32(999))  # no bundled model has this geometry
    model.key(key, value)
    found = failures(certify(model.write(tmp_path / "hostile.gguf"), "llama.cpp", oracle=False))
    assert found.keys() & {"metadata", "tensors"}


def test_r1_metadata_come_from_the_bundled_description(good, tmp_path):
    """A description without weights serves as reference: its metadata are compared, its weights are not."""
    geometry = Geometry.load(bundle.models_dir() / "deepseek-r1")
    found = failures(certify(good, "llama.cpp", geometry, oracle=False, values=False))
    assert "deepseek2.block_count is 4, must be 61" in found["metadata"]


def test_cli_exit_code_table_and_json(good, tmp_path):
    out = tmp_path / "certify.json"
    arguments = ["certify", str(good), "--target", "ktransformers", "--reference", "tiny-r1", "--no-oracle"]
    done = CliRunner().invoke(main, [*arguments, "--json", str(out)])
    assert done.exit_code == 0 and "tokenizer" in done.stdout
    found = json.loads(out.read_text())
    assert found["passed"] is False and found["verdict"] == "nothing failed, engine not run"
    assert found["crc32"] == {good.name: zlib.crc32(good.read_bytes())}
    model = Model(good)
    model.key("expert_gating_func", U32(1))
    broken = model.write(tmp_path / "broken.gguf")
    done = CliRunner().invoke(main, ["certify", str(broken), "--no-oracle", "--no-values"])
    assert done.exit_code == 1
    assert json.loads((tmp_path / "certify.json").read_text())["passed"] is False


@pytest.mark.skipif(not llama.available(), reason=f"needs {llama.WHEEL}")
class TestLlamaCpp:
    def test_loads_and_agrees(self, good):
        found, *build = oracle_checks.llama_cpp(good, GGUFFile.open(good), "cpu")
        assert (found.name, found.status) == ("oracle llama.cpp", "pass"), found.detail
        assert found.engine and found.engine.version in found.detail and found.engine.cpu.startswith(("AVX", "NEON"))
        assert {check.name.partition(" --")[0] for check in build} == {oracle_checks.NATIVE}

    def test_refusal_is_the_reason(self, good, tmp_path):
        model = Model(good)
        model.metadata["deepseek2.context_length"] = U16(4096)
        path = model.write(tmp_path / "u16.gguf")
        found, *_ = oracle_checks.llama_cpp(path, GGUFFile.open(path), "cpu")
        assert found.status == "fail" and "wrong type u16" in found.detail


def test_a_kernel_for_another_cpu_says_nothing_of_the_file(good, monkeypatch):
    """Also where kt-kernel's variant computed other kinds of experts, or was said to run."""

    def dies(*_: object) -> None:
        raise IllegalInstruction("this CPU does not run kt-kernel (amx)")

    for name, does in (("available", lambda: True), ("version", lambda: "0"), ("runnable", lambda *_: "amx")):
        monkeypatch.setattr(kt, name, does)
    monkeypatch.setattr(kt, "experts", dies)
    found = list(oracle_checks.kt_kernel(good, GGUFFile.open(good)))
    assert len(found) == 2 and {(c.status, c.detail) for c in found} == {
        ("skip", "not run: this CPU does not run kt-kernel (amx)")
    }


@pytest.mark.large
@pytest.mark.skipif(not kt.available(), reason=f"needs pip install --no-deps {kt.WHEEL}")
class TestKtKernel:
    def test_every_combination_of_types_is_computed(self, good):
        found = list(oracle_checks.kt_kernel(good, GGUFFile.open(good)))
        assert [check.name for check in found] == [
            "oracle kt-kernel IQ1_S/IQ1_S/Q2_K",
            "oracle kt-kernel IQ1_S/IQ1_S/IQ1_S",
        ]
        assert all(check.status == "pass" for check in found), found

    @pytest.mark.parametrize(("qtype", "says"), [("IQ2_XXS", "relative error"), ("IQ3_S", "silent zeros")])
    def test_traps_are_caught_by_their_numbers(self, qtype, says, good, tmp_path):
        """As up's type: gate's would abort. IQ2_XXS is right on the wheel's avx2 and avx512_base variants alone."""
        model = Model(good)
        for layer in (1, 2, 3):
            model.change(f"blk.{layer}.ffn_up_exps.weight", lambda t: t.with_values(t.values(), qtype))
        path = model.write(tmp_path / "trap.gguf")
        found = list(oracle_checks.kt_kernel(path, GGUFFile.open(path)))
        plain = any(variant in check.detail for check in found for variant in ("avx2", "avx512_base"))
        for check in found:
            assert check.status == ("pass" if plain and qtype == "IQ2_XXS" else "fail"), check.detail
            assert says in check.detail
