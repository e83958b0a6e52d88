"""`quantkit export-kt`: rules that place every module, the sidecar's values, the folder's files and refusals.

How rules were compared with KTransformers' own code is told in docs/results/oracles.md; here its matching is repeated.
"""

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from oracle_files import MODEL
from oracle_files import quantkit as run
from tokenizers import Tokenizer

from quantkit import bundle
from quantkit.__main__ import main
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.job import kt_export
from quantkit.models import family
from quantkit.models.config import ModelConfig
from quantkit.models.family import PRE
from quantkit.models.tokenizer_metadata import read_tokenizer
from quantkit.runtime.mla import split_kv_b
from quantkit.runtime.sources.gguf import open_gguf

LINEAR = "torch.nn.Linear"
V3 = "ktransformers.models.modeling_deepseek_v3."


def modules(c: ModelConfig) -> Iterator[tuple[str, str]]:
    """Name and class of every module of ktransformers' DeepseekV3ForCausalLM, parents first, without the inside of
    `experts`, which is not visited."""
    yield from (("", V3 + "DeepseekV3ForCausalLM"), ("model", V3 + "DeepseekV3Model"))
    yield from (("model.embed_tokens", "torch.nn.Embedding"), ("model.layers", "torch.nn.ModuleList"))
    for layer in range(c.n_layer):
        p = f"model.layers.{layer}"
        yield from ((p, V3 + "DeepseekV3DecoderLayer"), (p + ".self_attn", V3 + "DeepseekV3Attention"))
        query = ("q_a_proj", "q_b_proj") if c.q_lora else ("q_proj",)
        for name in (*query, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            yield f"{p}.self_attn.{name}", LINEAR
        yield f"{p}.self_attn.rotary_emb", V3 + "DeepseekV3RotaryEmbedding"
        norms = ("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "input_layernorm", "post_attention_layernorm")
        yield from ((f"{p}.{name}", V3 + "DeepseekV3RMSNorm") for name in norms)
        moe = c.is_moe(layer)
        yield p + ".mlp", V3 + ("DeepseekV3MoE" if moe else "DeepseekV3MLP")
        feed = p + (".mlp.shared_experts" if moe else ".mlp")
        if moe:
            yield from ((p + ".mlp.gate", V3 + "MoEGate"), (p + ".mlp.experts", "torch.nn.ModuleList"))
            yield feed, V3 + "DeepseekV3MLP"
        yield f"{feed}.act_fn", "torch.nn.SiLU"
        yield from ((f"{feed}.{part}_proj", LINEAR) for part in ("gate", "up", "down"))
    yield from (("model.norm", V3 + "DeepseekV3RMSNorm"), ("lm_head", LINEAR))


def matching(rules: list[dict], name: str, kind: str) -> list[dict]:
    found = [rule for rule in rules if re.search(rule["match"]["name"], name)]
    return [rule for rule in found if rule["match"].get("class", kind) == kind]


def tiny_config() -> ModelConfig:
    return family.from_hf(json.loads((bundle.models_dir() / "tiny-r1" / "config.json").read_text()))


def r1_config() -> ModelConfig:
    return family.from_hf(json.loads((bundle.models_dir() / "deepseek-r1" / "config.json").read_text()))


@pytest.mark.parametrize(("config", "gpus"), [(tiny_config(), 1), (tiny_config(), 3), (r1_config(), 4)])
def test_every_module_has_its_rule(config, gpus):
    rules = yaml.safe_load(yaml.safe_dump(kt_export.rules(config, gpus)))
    device = {n: f"cuda:{g}" for g, (a, b) in enumerate(kt_export.spread(config.n_layer, gpus)) for n in range(a, b)}
    counts: Counter[str] = Counter()
    for name, kind in modules(config):
        found = matching(rules, name, kind)
        special = [rule for rule in found if rule["replace"]["class"] != "default"]
        assert len(special) <= 1, name  # the order of rules decides nothing but what is left over
        if name not in ("", "model.layers"):
            assert found, name
        if special:
            assert found[0] is special[0]
            counts[special[0]["replace"]["class"].rpartition(".")[2]] += 1
        wanted = kind == LINEAR and not name.endswith("kv_b_proj")
        assert bool(special and special[0]["replace"]["class"].endswith("KTransformersLinear")) == wanted, name
        if (layer := re.match(r"model\.layers\.(\d+)", name)) and found:
            kwargs = found[0]["replace"]["kwargs"]
            on_cpu = name.endswith(".mlp.experts")
            assert kwargs["generate_device"] == ("cpu" if on_cpu else device[int(layer[1])]), name
            assert kwargs["prefill_device"] == kwargs.get("out_device", device[int(layer[1])])
    n, moe = config.n_layer, config.n_moe
    assert counts == {
        "KDeepseekV2Model": 1,
        "KDeepseekV2Attention": n,
        "YarnRotaryEmbeddingV3": n,
        "KTransformersExperts": moe,
        "KDeepseekV3MoE": moe,
        "KMoEGate": moe,
        "KTransformersLinear": 7 * n + 1,
    }
    transfer = rules[0]["replace"]["kwargs"].get("transfer_map", {})
    assert list(transfer.values()) == [f"cuda:{gpu}" for gpu in range(1, gpus)]
    assert all(device[layer - 1] != device[layer] == to for layer, to in transfer.items())


def test_experts_are_not_searched():
    (rule,) = [r for r in kt_export.rules(r1_config()) if "KTransformersExperts" in r["replace"]["class"]]
    assert rule["recursive"] is False
    assert not re.search(rule["match"]["name"], "model.layers.2.mlp.experts")  # dense
    assert re.search(rule["match"]["name"], "model.layers.60.mlp.experts")
    assert not re.search(rule["match"]["name"], "model.layers.3.mlp.experts.0")


def test_linears_may_stay_bf16():
    operators = {rule["replace"]["kwargs"].get("generate_op") for rule in kt_export.rules(r1_config(), linear="torch")}
    assert operators == {None, "KLinearTorch", "KExpertsCPU"}


@pytest.fixture(scope="module")
def exported(quantized: Callable[..., Path], tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("with space") / "tiny kt"
    kt_export.export(quantized("1.58bit", "ktransformers"), out, threads=3)
    return out


def test_sidecar_holds_what_k_b_and_v_b_decode_to(exported, quantized):
    """Decoded by the gguf package alone, rounded to BF16 once, heads as in the checkpoint's kv_b_proj."""
    c = tiny_config()
    file = {t.name: t for t in gguf.GGUFReader(quantized("1.58bit", "ktransformers")).tensors}
    sidecar = {t.name: t for t in gguf.GGUFReader(exported / "gguf" / kt_export.SIDECAR).tensors}
    assert list(sidecar) == [f"blk.{layer}.attn_kv_b.weight" for layer in range(c.n_layer)]
    for layer in range(c.n_layer):
        k_b, v_b = (
            gguf.dequantize(t.data, t.tensor_type) for t in (file[f"blk.{layer}.attn_{p}_b.weight"] for p in "kv")
        )
        joined = sidecar[f"blk.{layer}.attn_kv_b.weight"]
        assert joined.tensor_type.name == "BF16"
        assert tuple(joined.shape) == (c.kv_lora, c.n_head * (c.qk_nope + c.v_head))
        heads = gguf.dequantize(joined.data, joined.tensor_type).reshape(c.n_head, c.qk_nope + c.v_head, c.kv_lora)

        def rounded(values: np.ndarray) -> np.ndarray:
            return torch.from_numpy(values.copy()).bfloat16().float().numpy()

        np.testing.assert_array_equal(heads[:, : c.qk_nope], rounded(k_b).transpose(0, 2, 1))
        np.testing.assert_array_equal(heads[:, c.qk_nope :], rounded(v_b))


def test_join_undoes_split():
    c = tiny_config()
    kv_b = torch.randn(c.n_head * (c.qk_nope + c.v_head), c.kv_lora)
    assert torch.equal(kt_export.join_kv_b(*split_kv_b(kv_b, c)), kv_b)


def test_folder_holds_one_model(exported, quantized):
    path = quantized("1.58bit", "ktransformers")
    ggufs = sorted(exported.rglob("*.gguf"))
    assert [p.name for p in ggufs] == [kt_export.SIDECAR, path.name]
    assert (exported / "gguf" / path.name).resolve() == path.resolve()
    main_file, sidecar = GGUFFile.open(path), GGUFFile.open(ggufs[0])
    assert not set(main_file.tensors) & set(sidecar.tensors)
    assert sidecar.metadata["general.architecture"] == main_file.metadata["general.architecture"]
    assert not list(exported.parent.glob(".*"))  # nothing left of the making
    assert yaml.safe_load((exported / "optimize.yaml").read_text()) == kt_export.rules(tiny_config())


def test_configuration_is_the_original(exported, chunks):
    found = json.loads((exported / "model" / "config.json").read_text())
    original = json.loads((bundle.models_dir() / "tiny-r1" / "config.json").read_text())
    ours = set(found) - set(original)
    assert ours == {"auto_map", "pretraining_tp", "seq_aux", "aux_loss_alpha"}
    assert set(original) - set(found) == {"num_nextn_predict_layers", "quantization_config"}
    assert {key: found[key] for key in set(found) - ours} == {key: original[key] for key in set(found) - ours}
    saved = Tokenizer.from_file(str(exported / "model" / "tokenizer.json"))
    theirs = read_tokenizer(bundle.models_dir() / "tiny-r1", PRE)
    text = theirs.decode(chunks(1, 256)[0].tolist(), skip_special_tokens=False) + "<｜User｜>深度 12345\n<think>"
    assert saved.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids
    merges = json.loads((exported / "model" / "tokenizer.json").read_text())["model"]["merges"]
    assert all(isinstance(merge, str) for merge in merges)  # what tokenizers 0.19 reads
    settings = json.loads((exported / "model" / "tokenizer_config.json").read_text())
    wanted = json.loads((bundle.models_dir() / "tiny-r1" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == wanted["chat_template"]
    assert settings["bos_token"] == wanted["bos_token"]["content"]


def launched(folder: Path, bin_dir: Path, *arguments: str, version: str = "0.2.3") -> subprocess.CompletedProcess:
    """launch.sh with programs on the PATH that print their arguments, one a line; asked for it, Python says `version`
    of ktransformers."""
    bin_dir.mkdir(exist_ok=True)
    for name in ("python", "ktransformers"):
        asked = f'[ "$1" != -c ] || {{ echo "{version}"; exit; }}\n'
        (bin_dir / name).write_text(f'#!/bin/sh\n{asked}echo "${{0##*/}}"\nprintf "%s\\n" "$@"\n')
        (bin_dir / name).chmod(0o755)
    return subprocess.run(
        [folder / "launch.sh", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": f"{bin_dir}:/usr/bin:/bin"},
    )


def test_one_thread_is_none_to_ktransformers(quantized, tmp_path):
    """0.3.2 computes with one less than --cpu_infer, and divides by that."""
    kt_export.export(quantized("1.58bit", "ktransformers"), tmp_path / "kt", threads=1)
    text = (tmp_path / "kt" / "launch.sh").read_text()
    assert "--cpu_infer 2 " in text and "--kt-cpuinfer 1 " in text


def test_launch(exported, tmp_path):
    folder = str(exported)
    common = [
        "--model_path",
        f"{folder}/model",
        "--gguf_path",
        f"{folder}/gguf",
        "--optimize_config_path",
        f"{folder}/optimize.yaml",
        "--cpu_infer",
        "3",
    ]
    chat = launched(exported, tmp_path / "bin", "chat", "--max_new_tokens", "7").stdout.splitlines()
    assert chat == ["python", "-m", "ktransformers.local_chat", *common, "--max_new_tokens", "7"]
    served = launched(exported, tmp_path / "bin", "serve").stdout.splitlines()
    assert served == ["ktransformers", "--host", "127.0.0.1", "--port", "10002", *common]
    for version in ("0.2.4.post1+cu121torch23fancy", "0.3", "0.3.1"):  # the tag v0.3.2 calls itself 0.3.1
        served = launched(exported, tmp_path / "bin", "serve", version=version).stdout.splitlines()
        assert served == [
            "ktransformers",
            *"--host 127.0.0.1 --port 10002 --backend_type ktransformers".split(),
            *common,
        ]
    sglang = launched(exported, tmp_path / "bin", "sglang", "/models/R 1", "--tp", "2").stdout.splitlines()
    assert sglang[:3] == ["python", "-m", "sglang.launch_server"]
    options = dict(zip(sglang[3::2], sglang[4::2], strict=False)) | {"--tp": sglang[-1]}
    assert options["--model"] == "/models/R 1"
    assert sglang[sglang.index("--kt-weight-path") + 1] == f"{folder}/gguf"
    assert sglang[-2:] == ["--tp", "2"]
    asked = launched(exported, tmp_path / "bin", "--help")
    assert asked.returncode == 0 and asked.stdout.startswith("usage: launch.sh chat|serve")
    for wrong in (("sglang",), ("fly",)):
        refused = launched(exported, tmp_path / "bin", *wrong)
        assert refused.returncode == 2
        assert not refused.stdout
    for version in ("0.2.1.post1", "0.4.1", "0.7.2"):
        refused = launched(exported, tmp_path / "bin", "chat", version=version)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert f"0.2.3 to 0.3.2, not {version}" in refused.stderr


def test_launch_from_elsewhere(exported, tmp_path):
    """By a relative path that CDPATH would lead elsewhere, in a folder with a space, where there is python3 only."""
    for parent in ("a b", "c"):
        (tmp_path / parent / "kt").mkdir(parents=True)
    own = tmp_path / "a b" / "kt" / "launch.sh"
    own.write_text((exported / "launch.sh").read_text())
    own.chmod(0o755)
    (tmp_path / "python3").write_text('#!/bin/sh\n[ "$1" != -c ] || { echo 0.3; exit; }\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    for name in ("sh", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    env = {"PATH": str(tmp_path), "CDPATH": str(tmp_path / "c")}
    call = {"cwd": tmp_path / "a b", "env": env, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(["kt/launch.sh"], **call)
    assert done.returncode == 0 and f"{own.parent}/gguf" in done.stdout.splitlines(), done
    (tmp_path / "python3").unlink()
    done = subprocess.run(["kt/launch.sh"], **call)
    assert (done.returncode, done.stderr) == (1, "launch.sh: no python on the PATH\n")


def test_command(quantized, tmp_path):
    path = quantized("Q6_K", "ktransformers", "combined")
    result = CliRunner().invoke(main, ["export-kt", str(path), "-o", str(tmp_path / "out"), "--gpus", "2"])
    assert result.exit_code == 0 and "to 4 bits when it loads them (Marlin)" in result.output
    exact = CliRunner().invoke(main, ["export-kt", str(path), "-o", str(tmp_path / "exact"), "--linear", "torch"])
    assert exact.exit_code == 0 and "Marlin" not in exact.output
    assert [p.name for p in (tmp_path / "out" / "gguf").iterdir()] == [path.name]  # kv_b is in the file already
    assert "layers 2 to 3 on cuda:1" in (tmp_path / "out" / "README.md").read_text()
    again = CliRunner().invoke(main, ["export-kt", str(path), "-o", str(tmp_path / "out")])
    assert again.exit_code == 1
    assert "exists already" in again.output


def test_types_that_ktransformers_cannot_compute(quantized, tmp_path):
    result = CliRunner().invoke(
        main, ["export-kt", str(quantized("1.58bit", "llama.cpp")), "-o", str(tmp_path / "out")]
    )
    assert result.exit_code == 1
    assert re.search(r"blk\.\d+\.ffn_down_exps\.weight: IQ2_XXS is refused for ktransformers", result.output)
    assert len(result.output.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_all_splits_are_linked(quantized, imatrix, tmp_path):
    whole = quantized("1.58bit", "ktransformers")
    run(
        "quantize",
        MODEL,
        "--plan",
        whole.with_name("plan.json"),
        "--imatrix",
        imatrix,
        "--output",
        tmp_path / "s.gguf",
        "--split-max-size",
        "2M",
    )
    parts = sorted(tmp_path.glob("s-*.gguf"))
    assert len(parts) > 1
    assert kt_export.default_output(parts[1]) == tmp_path / "s-kt"
    kt_export.export(parts[1], tmp_path / "s-kt")
    linked = sorted((tmp_path / "s-kt" / "gguf").glob("s-*.gguf"))
    assert [p.resolve() for p in linked] == parts
    assert GGUFFile.open(linked[0]).tensors.keys() == GGUFFile.open(whole).tensors.keys()


def test_failure_leaves_nothing(quantized, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kt_export, "write_model", full)
    with pytest.raises(OSError):
        kt_export.export(quantized("1.58bit", "ktransformers"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_the_rules_do_not_cover(quantized, tmp_path):
    source = open_gguf(quantized("1.58bit", "ktransformers"))
    kt_export.check(source)
    bias = source.file.tensors.pop("blk.2.exp_probs_b.bias")
    with pytest.raises(QuantkitError, match=r"blk\.2\.exp_probs_b\.bias"):
        kt_export.check(source)
    source.file.tensors[bias.name] = bias
    source.file.metadata["general.tags"] = []
    with pytest.raises(QuantkitError, match="empty array general"):
        kt_export.check(source)
    source.file.metadata["tokenizer.ggml.padding_token_id"] = 10**6
    with pytest.raises(QuantkitError, match="no token of the vocabulary"):
        kt_export.write_model(source, tmp_path / "model")
