"""`compare`: files in every form that other programs write, made from one of ours, give what `verify` gives, to the
digit; types that nothing here decodes are named; R1's headers take seconds."""

import json
import math
import os
import struct
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from mutations import Model, Tensor

from quantkit.__main__ import main
from quantkit.calibration.corpus import TextChoice
from quantkit.codecs.foreign import FOREIGN
from quantkit.errors import QuantkitError
from quantkit.formats import gguf_reader
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.gguf_values import U32
from quantkit.job.headers import Opened, opened, tables
from quantkit.job.plan import files_of, plan_model
from quantkit.job.report.files import text
from quantkit.job.stages import VerifyOptions, verify_file
from quantkit.models.open import open_model
from quantkit.models.other_layouts import as_ours
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.sources.gguf import open_gguf

TOKENS = 1024
IK = "IQ1_S_R4", "IQ2_KS", "IQ3_KT"


def fused(model: Model) -> None:
    """Gate and up of every expert in one matrix, as convert_hf_to_gguf.py --fuse-gate-up-exps writes them."""
    for layer in range(1, 4):
        gate, up = (model.tensors.pop(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up"))
        name, (n_expert, rows, n_in) = f"blk.{layer}.ffn_gate_up_exps.weight", gate.shape
        both = np.concatenate((gate.matrices, up.matrices), axis=1).reshape(-1, gate.row_bytes)
        model.tensors[name] = Tensor(name, (n_expert, 2 * rows, n_in), gate.qtype, both)


def with_drafts(model: Model, key: bool = True) -> None:
    """A copy of the last layer behind it, that drafts the token after the next, with an embedding and an output matrix
    of its own. key: whether the metadata speak of it."""

    def add(name: str, tensor: Tensor) -> None:
        model.tensors[name] = replace(tensor, name=name)

    for name in [name for name in model.tensors if name.startswith("blk.3.")]:
        add(name.replace("blk.3.", "blk.4."), model.tensors[name])
    norm, embedding, output = (model.tensors[f"{name}.weight"] for name in ("output_norm", "token_embd", "output"))
    for name in ("enorm", "hnorm", "shared_head_norm"):
        add(f"blk.4.nextn.{name}.weight", norm)
    (d,) = norm.shape
    zeros = np.zeros((d, 2 * d), np.float32).view(np.uint8)
    add("blk.4.nextn.eh_proj.weight", Tensor("", (d, 2 * d), "F32", zeros))
    add("blk.4.nextn.embed_tokens.weight", embedding)
    add("blk.4.nextn.shared_head_head.weight", output)
    if key:
        model.key("block_count", U32(5))
        model.key("nextn_predict_layers", U32(1))


def as_ik(model: Model, combined: Model) -> None:
    """attn_kv_b beside attn_k_b and attn_v_b, which have no dimension for heads, as ik_llama.cpp's converter writes
    them; and the router's bias under an older name."""
    for layer in range(4):
        kv_b = f"blk.{layer}.attn_kv_b.weight"
        model.tensors[kv_b] = combined.tensors[kv_b]
        for part in ("k", "v"):
            name = f"blk.{layer}.attn_{part}_b.weight"
            heads, rows, n_in = model.tensors[name].shape
            model.change(name, lambda t: replace(t, shape=(heads * rows, n_in)))  # noqa: B023
    for layer in range(1, 4):
        model.rename(f"blk.{layer}.exp_probs_b.bias", f"blk.{layer}.exp_probs_b.weight")


def combined(model: Model) -> None:
    """kv_b in one tensor, as before split MLA; and another type for some matrices."""
    for layer in range(4):
        k_b, v_b = (model.tensors.pop(f"blk.{layer}.attn_{part}_b.weight").values() for part in ("k", "v"))
        kv_b = np.concatenate((k_b.transpose(0, 2, 1), v_b), axis=1)
        name = f"blk.{layer}.attn_kv_b.weight"
        model.tensors[name] = Tensor(name, (), "Q8_0", np.empty(0)).with_values(kv_b.reshape(-1, kv_b.shape[-1]))
        model.change(f"blk.{layer}.attn_output.weight", lambda t: t.with_values(t.values(), "Q2_K"))
    split, c = {"attention.key_length_mla", "attention.value_length_mla"}, model.metadata
    for key in split:
        c[f"deepseek2.{key.removesuffix('_mla')}"] = c[f"deepseek2.{key}"]
        model.key(key)


@pytest.fixture(scope="module")
def files(made: Path, tmp_path_factory) -> dict[str, Path]:
    """By what is special about them. The first is as llama-quantize would write it, byte for byte
    (tests/evaluation/oracles/test_llama_quantize.py)."""
    folder, base = tmp_path_factory.mktemp("others"), made / "tiny-r1-1.58bit.gguf"
    old = Model(base)
    combined(old)
    out = old.write(folder / "combined.gguf")
    found = {"ours": base, "combined": out, "shards": Model(base).write(folder / "shards.gguf", 1_500_000)}
    for name, change in (
        ("fused", fused),
        ("drafts", with_drafts),
        ("leftover", lambda model: with_drafts(model, key=False)),
        ("ik", lambda model: as_ik(model, Model(out))),
    ):
        model = Model(base)
        change(model)
        found[name] = model.write(folder / f"{name}.gguf")
    return found


def compare(*arguments: object) -> str:
    done = CliRunner().invoke(main, ["compare", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def compared(files, tmp_path_factory) -> tuple[dict, Path]:
    """compare.json of all of them, and its folder."""
    out = tmp_path_factory.mktemp("compare")
    json_text = compare(*files.values(), "--reference", "tiny-r1", "--tokens", TOKENS, "-o", out, "--json")
    assert json.loads(json_text) == json.loads((out / "compare.json").read_text())
    return json.loads(json_text), out


def test_scores_are_those_of_verify(compared, files, tiny):
    """To the last digit, in whichever form the weights are stored."""
    scores = dict(zip(files, (one["scores"] for one in compared[0]["files"]), strict=True))
    for name in ("ours", "combined", "fused"):
        alone = verify_file(files[name], tiny, "cpu", VerifyOptions(TextChoice(n_tokens=TOKENS)))
        for key in ("kld_mean", "ppl", "top1_agreement", "kld_p99", "ci95", "domains", "kld_histogram"):
            assert scores[name][key] == alone[key], (name, key)
    assert scores["combined"]["kld_mean"] != scores["ours"]["kld_mean"]
    for name in ("shards", "fused", "drafts", "leftover", "ik"):
        assert scores[name] == scores["ours"], name


def test_what_is_read_otherwise_is_said(compared, files):
    notes = dict(zip(files, ("; ".join(one["notes"]) for one in compared[0]["files"]), strict=True))
    assert not notes["ours"] and not notes["combined"] and not notes["shards"]
    assert "gate and up of each expert lie together" in notes["fused"]
    assert "layer 4 drafts the token after the next: an embedding and output matrix of its own" in notes["drafts"]
    assert "layer 4 drafts the token after the next: all of it (" in notes["leftover"]
    assert "attn_kv_b (" in notes["ik"] and "3 tensors have older names" in notes["ik"]
    page = (compared[1] / "compare.md").read_text()
    assert "![bytes against KLD](compare.png)" in page and (compared[1] / "compare.png").stat().st_size > 5000
    assert max(map(len, page.splitlines())) <= 80, page


def test_bytes_and_bits_are_those_of_the_file(compared, files):
    """Fused experts count as experts; what is not read counts too."""
    for path, one in zip(files.values(), compared[0]["files"], strict=True):
        file = GGUFFile.open(path)
        assert one["bytes"] == sum(p.stat().st_size for p in file.files) and one["files"] == len(file.files)
        assert one["data_bytes"] == sum(t.n_bytes for t in file.tensors.values())
        assert sum(group["bytes"] for group in one["classes"].values()) == one["data_bytes"]
    ours, fused_ = (compared[0]["files"][list(files).index(name)] for name in ("ours", "fused"))
    assert ours["bpw_routed"] == fused_["bpw_routed"] and ours["classes"] == fused_["classes"]


def test_differences_are_paired(compared, files):
    """On the same tokens, of all pairs; nothing between files of the same weights."""
    rows = {(row["of"], row["from"]): row for row in compared[0]["differences"]}
    assert len(rows) == len(files) * (len(files) - 1) // 2
    names, scores = list(files), [one["scores"] for one in compared[0]["files"]]
    row = rows[names.index("combined"), names.index("ours")]
    by = scores[1]["kld_mean"] - scores[0]["kld_mean"]
    low, high = row["kld"]["ci95"]
    assert row["kld"]["by"] == pytest.approx(by) and low <= by <= high
    alone = scores[0]["ci95"]["kld_mean"]
    assert high - low < 0.7 * (alone[1] - alone[0])
    same = rows[names.index("fused"), names.index("ours")]
    assert all(same[key] == {"by": 0.0, "ci95": [0.0, 0.0]} for key in ("kld", "top1", "nll"))


def test_files_of_one_name_are_told_apart(files, tmp_path):
    """As the folders of two runs of `make` hold them."""
    other = Model(files["ours"]).write(tmp_path / files["ours"].name)
    shown = compare(other, files["fused"], files["ours"])
    assert f"- **A** {other}" in shown and f"- **C** {files['ours']}" in shown
    assert f"- **B** {files['fused'].name}" in shown


def test_what_is_no_model_is_refused(files, made, tmp_path):
    """An imatrix lies beside every file; other GGUFs say what they are, or hold nothing of a model."""
    with pytest.raises(QuantkitError, match=r"imatrix\.gguf: is no model: its general\.type is imatrix"):
        opened([files["ours"], made / "imatrix.gguf"])
    model = Model(files["ours"])
    model.tensors = {"blk.0.attn_norm.weight": model.tensors["blk.0.attn_norm.weight"]}
    with pytest.raises(QuantkitError, match=r"no model that generates text: it has no tensor 'token_embd\.weight'"):
        opened([model.write(tmp_path / "part.gguf")])
    del model.metadata["general.type"]
    with pytest.raises(QuantkitError, match="no model that generates text"):
        opened([model.write(tmp_path / "older.gguf")])


def test_headers_are_read_without_torch(files):
    """Which takes longer to load than they to be read."""
    code = (
        "import sys\nfrom quantkit.__main__ import main\n"
        "main(sys.argv[1:], standalone_mode=False)\nassert 'torch' not in sys.modules, 'torch'"
    )
    paths = [str(path) for path in files.values()][:2]
    done = subprocess.run([sys.executable, "-c", code, "compare", *paths, "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and len(json.loads(done.stdout)["files"]) == 2, done.stderr


def test_it_goes_on_where_it_stopped(compared, files, capsys):
    """What lies in the folder is taken, what is damaged there is measured again: the result is the same."""
    result, out = compared
    before = (out / "compare.json").read_bytes()
    notes = sorted(out.glob("tokens-*.safetensors"))
    notes[0].unlink()
    notes[1].write_bytes(notes[1].read_bytes()[:-8])
    with redirect_stdout(StringIO()):
        arguments = [*map(str, files.values()), "--reference", "tiny-r1", "--tokens", str(TOKENS), "-o", str(out)]
        main(["compare", *arguments], standalone_mode=False)
    said = capsys.readouterr().err
    assert said.count("scored by an earlier run") == len(files) - 2 and "the original first" not in said
    assert (out / "compare.json").read_bytes() == before and result["files"]


def test_without_an_original(files, tmp_path, monkeypatch):
    """Perplexity on a text, or types alone; then nothing is written. Headers are read once."""
    read = []
    parse = gguf_reader.parse_header
    monkeypatch.setattr(gguf_reader, "parse_header", lambda data, path: read.append(path) or parse(data, path))
    data = tmp_path / "text.txt"
    data.write_text("It was a dark and stormy night; the rain fell in torrents. " * 200)
    some = (files["ours"], files["ik"])
    found = json.loads(compare(*some, "--data", data, "--tokens", TOKENS, "-o", tmp_path / "out", "--json"))
    assert sorted(read) == sorted(some)
    scores = [one["scores"] for one in found["files"]]
    assert scores[0] == scores[1] and set(scores[0]) == {"tokens", "ppl", "ppl_error", "nll", "ci95", "domains"}
    assert set(found["differences"][0]) == {"of", "from", "nll"}
    page = compare(files["ours"], files["combined"])
    assert "mean KLD" not in page and "attn_kv_b\n  A –\n  B blk 0-3 Q8_0" in page
    assert max(map(len, page.splitlines())) <= 80


def test_a_fused_file_runs(files):
    """The engine multiplies experts whose gate and up lie together: the same tokens as of the file of ours."""
    runs = []
    for name in ("ours", "fused"):
        engine = open_engine(open_gguf(files[name]), 1, 64)
        logits = engine.prefill(0, list(range(5, 25)), 0)
        tokens = [int(logits.argmax())]
        for _ in range(8):
            tokens.append(int(engine.decode([0], tokens[-1:])[0].argmax()))
        runs.append(tokens)
    assert runs[0] == runs[1]


def with_types(path: Path, out: Path, types: dict[str, str]) -> Path:
    """The header of a file whose tensors of some roles have types of ik_llama.cpp; zeros for data."""
    file = GGUFFile.open(path)
    data = bytearray(file.files[0].read_bytes()[: min(t.offset for t in file.tensors.values())])
    offset = 0
    for name, tensor in file.tensors.items():
        at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + 4 + 8 * len(tensor.shape)
        number, size = struct.unpack_from("<I", data, at)[0], tensor.n_bytes
        if qtype := types.get(tensor.role):
            foreign = FOREIGN[qtype]
            number, rows = foreign.number, int(np.prod(tensor.shape[:-1]))
            size = rows * (foreign.row_meta + tensor.shape[-1] // foreign.block_size * foreign.type_size)
        struct.pack_into("<IQ", data, at, number, offset)
        offset += -(-size // 32) * 32
    out.write_bytes(bytes(data) + bytes(offset))
    return out


def test_types_of_others_are_named_and_counted(files, tmp_path):
    """Types and bytes are compared; what cannot be decoded is not scored, and says so."""
    types = dict(zip(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), IK, strict=True))
    theirs = with_types(files["ours"], tmp_path / "ik-types.gguf", types)
    options = ("--reference", "tiny-r1", "--tokens", TOKENS, "-o", tmp_path / "out")
    found = json.loads(compare(files["ours"], theirs, *options, "--json"))
    ours, other = found["files"]
    assert ours["scores"] and other["scores"] is None and "a type of ik_llama.cpp" in other["not_computed"]
    assert other["foreign_types"] == dict.fromkeys(IK, "ik_llama.cpp")
    # 256 weights of a row: 8 blocks of 32 in 6 bytes each and 2 of the row; 70 and 2; 100 and 4
    n_in = GGUFFile.open(theirs).tensors["blk.1.ffn_gate_exps.weight"].shape[-1]
    assert other["classes"]["experts gate"]["bpw"] == pytest.approx(8 * (n_in // 32 * 6 + 2) / n_in)
    page = compare(files["ours"], theirs)
    assert "IQ1_S_R4, IQ2_KS, IQ3_KT: types of ik_llama.cpp, not decoded here" in page.replace("\n    ", " ")
    refused = CliRunner().invoke(main, ["compare", str(theirs), *map(str, options)])
    assert refused.exit_code == 1 and "no file was scored; why stands beside each" in refused.stderr
    assert "types of ik_llama.cpp, not decoded here" in refused.stdout.replace("\n    ", " ")


def test_a_file_of_no_numbers_does_not_stop_the_others(files, tmp_path):
    model = Model(files["ours"])
    model.change("blk.1.ffn_norm.weight", lambda t: t.with_values(t.values() * float("nan")))
    bad = [model.write(tmp_path / "nan.gguf")]
    for name, factor in (("head", float("nan")), ("huge", 1e6)):
        model = Model(files["ours"])
        model.change("output.weight", lambda t: t.with_values(t.values() * factor, "F32"))  # noqa: B023
        bad.append(model.write(tmp_path / f"{name}.gguf"))
    options = ("--reference", "tiny-r1", "--tokens", TOKENS, "-o", tmp_path / "out", "--json")
    found = json.loads(compare(*bad, files["ours"], *options), parse_constant=pytest.fail)
    layer, head, huge, ours = found["files"]
    assert ours["scores"] and layer["scores"] is None and head["scores"] is None
    assert layer["not_computed"].startswith("a layer computes numbers that are not finite")
    assert head["not_computed"].startswith("the output matrix computes numbers that are not finite")
    assert huge["scores"]["ppl"] == math.exp(300) and huge["scores"]["kld_mean"] > 1e4


def test_any_name_may_be_compared(files, tmp_path, monkeypatch, capsys):
    """Equal names are told apart by their paths, others only shown; what draws the figure need not be there."""
    paths = [
        tmp_path / "a" / "m.gguf",
        tmp_path / "b" / "m.gguf",
        Path(os.fsdecode(bytes(tmp_path) + b"/$x\xff$^.gguf")),
    ]
    other = Model(files["ours"])
    other.change("blk.0.attn_output.weight", lambda t: t.with_values(t.values() * 0.5))
    for path, name in zip(paths, (files["ours"], other.write(tmp_path / "other.gguf"), files["ours"]), strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.read_bytes())
        os.utime(path, ns=(0, 10**18))
    out = tmp_path / "out"
    arguments = (*paths, "--reference", "tiny-r1", "--tokens", TOKENS, "-o", out)
    page = compare(*arguments)
    assert f"- **A** {paths[0]}" in page and f"- **B** {paths[1]}" in page and "- **C** $x" in page
    ours, other, again = json.loads((out / "compare.json").read_text())["files"]
    assert again["file"].startswith("$x") and again["scores"] == ours["scores"] != other["scores"]
    (out / "compare.json").unlink()
    monkeypatch.delitem(sys.modules, "quantkit.job.report.figures")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    main(["compare", *map(str, arguments)], standalone_mode=False)
    assert "no compare.png: this needs matplotlib: pip install" in capsys.readouterr().err
    assert (out / "compare.json").is_file() and "compare.png" not in (out / "compare.md").read_text()


def test_files_without_groups_of_experts_are_computed_as_llama_cpp_does(files, tmp_path, tiny):
    """As older converters leave them; a line says so. Another difference is still refused."""
    found = []
    for key in ("expert_group_count", "expert_used_count"):
        model = Model(files["ours"])
        if key == "expert_used_count":
            model.key(key, U32(1))
        else:
            for each in ("expert_group_count", "expert_group_used_count"):
                model.key(each)
        found.append(model.write(tmp_path / f"{key}.gguf"))
    options = ("--reference", "tiny-r1", "--tokens", TOKENS, "-o", tmp_path / "out", "--json")
    ungrouped, refused = json.loads(compare(*found, *options))["files"]
    assert "computed as llama.cpp does, from all of them" in ungrouped["notes"][0] and ungrouped["scores"]
    alone = verify_file(found[0], tiny, "cpu", VerifyOptions(TextChoice(n_tokens=TOKENS)))
    assert ungrouped["scores"]["kld_mean"] == alone["kld_mean"]
    assert refused["scores"] is None and "n_used is 1" in refused["not_computed"]


def test_only_what_is_known_is_forgiven(files, tmp_path):
    """A tensor of no such model is refused as before; a file named twice, too."""
    model = Model(files["fused"])
    model.rename("blk.2.ffn_gate_up_exps.weight", "blk.2.ffn_gate_down_exps.weight")
    path = model.write(tmp_path / "strange.gguf")
    with pytest.raises(QuantkitError, match=r"strange.gguf: tensor blk.2.ffn_gate_exps.weight is missing"):
        open_gguf(path)
    model = Model(files["ours"])
    gates = {name: t for name, t in model.tensors.items() if "ffn_gate_exps" in name}
    fused(model)
    model.tensors |= gates
    twice = Opened.of(model.write(tmp_path / "twice.gguf"))
    assert sum(t.n_bytes for t in twice.tensors) == sum(t.n_bytes for t in twice.file.tensors.values())
    with pytest.raises(QuantkitError, match="is named twice"):
        opened([files["shards"], files["shards"].with_name("shards-00002-of-00003.gguf")])


def test_r1s_headers_take_seconds(tmp_path):
    """All of R1's 61 layers, by headers: files of 140 and 169 GB of which only the first bytes are on the disk."""
    paths = []
    for recipe, target in (("1.58bit", "llama.cpp"), ("1.73bit", "ktransformers/combined")):
        plan = plan_model("deepseek-r1", recipe, target)
        (layout,) = files_of(open_model("deepseek-r1"), plan, None)
        paths.append(tmp_path / layout.path.name)
        with open(paths[-1], "wb") as file:
            file.write(layout.header)
            file.truncate(layout.size)
    found = opened(paths)
    facts = tables(found)["files"]
    assert facts[0]["bytes"] > 139e9 and facts[1]["bytes"] > 168e9
    assert not as_ours(found[1].file).notes
    page = text(tables(found), found)
    assert "ffn_down_exps" in page and max(map(len, page.splitlines())) <= 80
