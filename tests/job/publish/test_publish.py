"""publish -> download -> verify and make again: the same figures, the same bytes. And what it refuses."""

import json
import shlex
import shutil
import struct
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard, snapshot_download
from loopback_hub import TOKEN, Blob
from mutations import Model

from quantkit.__main__ import main
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import Calibration
from quantkit.job.make import make
from quantkit.job.options import MakeOptions
from quantkit.job.publish.folder import read_folder
from quantkit.job.stages import VerifyOptions, verify_file
from quantkit.models import family
from quantkit.models.open import ModelRef, open_weights
from quantkit.planning import targets

TEXT = TextChoice(n_tokens=1024, chunk=128)
HOW = Calibration(TEXT)
OPTIONS = MakeOptions(recipe="2.51bit", calibration=HOW, evaluation=TEXT, encoder="ggml", split_max_bytes=4_000_000)
GGUF_BYTES = 4_000_000
BASE = ("--repo", "user/t", "--base-model", "a/b")


def certify(folder: Path) -> None:
    """The certificate of a file that passed, as `quantkit certify` writes it."""
    files = {path.name: path.stat().st_size for path in folder.glob("tiny-r1-*.gguf")}
    (folder / "certify.json").write_text(json.dumps({"passed": True, "engine_run": True, "files": files}))


@pytest.fixture(scope="module")
def made_local(sharded, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "out"
    make(sharded, folder, OPTIONS)
    certify(folder)
    return folder


@pytest.fixture
def token(env, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def quantkit(*arguments) -> str:
    """stdout and stderr of a command that must succeed, without a token in them."""
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert TOKEN not in done.output
    return done.output


def refused(*arguments) -> str:
    """The one line of a command that must fail."""
    done = CliRunner().invoke(main, list(map(str, arguments)))
    lines = [line for line in done.output.splitlines() if line.startswith("quantkit: ")]
    assert done.exit_code == 1 and len(lines) == 1 and TOKEN not in done.output, done.output
    return lines[0]


def test_publish_download_verify_and_make_again(hub, token, env, tmp_path):
    out = tmp_path / "out"
    _, result = make(ModelRef("user/tiny-r1"), out, OPTIONS)
    certify(out)
    quantkit("publish", out, "--repo", "user/tiny-r1-GGUF")
    got = Path(snapshot_download("user/tiny-r1-GGUF", local_dir=tmp_path / "published", token=TOKEN))
    parts = sorted((got / "2.51bit").glob("*.gguf"))
    assert [path.name for path in parts] == [path.name for path in sorted(out.glob("tiny-r1-*.gguf"))]
    assert len(parts) > 1
    checkpoint = open_weights(ModelRef("user/tiny-r1"))
    again = verify_file(parts[0], checkpoint, "cpu", VerifyOptions(TEXT, "ktransformers"))
    checkpoint.close()
    same = [
        key for key in result if key not in ("seconds", "layers", "bad_layers", "measured")
    ]  # a Hub make compares no layers
    print(
        f"\nmade: ppl {result['ppl']:.6f}, KLD {result['kld_mean']:.6f}; "
        f"downloaded: ppl {again['ppl']:.6f}, KLD {again['kld_mean']:.6f}"
    )
    assert {key: again[key] for key in same} == {key: result[key] for key in same}

    card = (got / "README.md").read_text()
    command = next(line for line in card.splitlines() if line.startswith("quantkit make"))
    words = command.replace("published/", f"{got}/").split()[1:]
    words[words.index("--output") + 1] = str(tmp_path / "again")
    quantkit(*words, "--tokens", "1024", "--no-verify")
    print(f"made again from the published recipe and imatrix: {len(parts)} files to compare")
    for path in parts:
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    for path in [p for folder in (out, got) for p in folder.rglob("*") if p.is_file()]:
        assert TOKEN.encode() not in path.read_bytes()


def test_card(hub, token, made_local):
    quantkit("publish", made_local, "--repo", "user/t", "--base-model", "deepseek-ai/DeepSeek-R1", "--license", "mit")
    text = hub.models["user/t"].commits[-1]["README.md"].read(0, 1 << 20).decode()
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "deepseek-ai/DeepSeek-R1" and head["base_model_relation"] == "quantized"
    assert head["license"] == "mit" and head["quantized_by"] == "user"
    assert {"gguf", "ktransformers", "llama.cpp"} <= set(head["tags"])
    figures = json.loads((made_local / "verify.json").read_text())
    for figure in (f"{figures['ppl']:.4f}", f"{figures['kld_mean']:.5f}", f"{figures['bpw']:.3f}"):
        assert figure in text
    for needed in ("llama-cli", "ktransformers", "ollama", "quantkit make deepseek-ai/DeepSeek-R1 --recipe"):
        assert needed in text
    assert ModelCard(text).data.to_dict()["library_name"] == "gguf"


def test_what_llama_cpp_computes_wrongly_stands_in_the_card(hub, token, made_local, tmp_path):
    """As V2's group-limited routing: what Order.caveats records becomes a line of its own."""
    folder = Path(shutil.copytree(made_local, tmp_path / "out"))
    config = replace(family.from_hf(open_weights("tiny-r1").config), group_score="max", scoring="softmax")
    lines = targets.caveats("llama.cpp", config)
    assert len(lines) == 1 and "its best two experts" in lines[0]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert "caveats" not in provenance and "**llama.cpp" not in quantkit("publish", folder, *BASE, "--dry-run")
    (folder / "provenance.json").write_text(json.dumps(provenance | {"caveats": lines}))
    assert f"\n**{lines[0]}.**\n" in quantkit("publish", folder, *BASE, "--dry-run")


def test_the_card_starts_programs_as_the_model_needs_it(hub, token, made_local, tmp_path):
    """Kimi-K2's YaRN, of which llama.cpp reads nothing in the file."""
    folder = Path(shutil.copytree(made_local, tmp_path / "out"))
    (first,) = folder.glob("tiny-r1-*00001*.gguf")
    said = quantkit("publish", folder, *BASE, "--dry-run")
    assert f"llama-cli -m published/2.51bit/{first.name} -p" in said and "LLAMA_ARG_YARN" not in said
    assert "echo 'FROM ./published/2.51bit' > Modelfile" in said  # of several files
    usual, kimis = (b"yarn_beta_fast" + struct.pack("<If", 6, beta) for beta in (32, 1))
    data = first.read_bytes()
    assert usual in data
    first.write_bytes(data.replace(usual, kimis))
    said = quantkit("publish", folder, *BASE, "--dry-run")
    assert f"llama-cli -m published/2.51bit/{first.name} --yarn-beta-fast 1 --yarn-beta-slow 1 -p" in said
    assert "LLAMA_ARG_YARN_BETA_FAST=1 LLAMA_ARG_YARN_BETA_SLOW=1 ollama serve &" in said


def test_several_quants_one_card(hub, token, made_local):
    base = ["--repo", "user/t", "--base-model", "a/b"]
    quantkit("publish", made_local, *base)
    quantkit("publish", made_local, *base, "--name", "other")
    files = hub.models["user/t"].commits[-1]
    assert {"2.51bit/plan.json", "other/plan.json", "imatrix/2.51bit.gguf", "imatrix/other.gguf"} <= files.keys()
    text = files["README.md"].read(0, 1 << 20).decode()
    assert "## 2.51bit" in text and "## other" in text and text.count("| [`") == 2
    model = hub.models["user/t"]
    lost = ("other/provenance.json", "other/verify.json")
    model.commits.append({name: blob for name, blob in files.items() if name not in lost})
    model.commits[-1]["2.51bit/tiny-r1-2.51bit-00001-of-00009.gguf"] = Blob(b"part of another split", True)
    quantkit("publish", made_local, *base)
    assert "2.51bit/tiny-r1-2.51bit-00001-of-00009.gguf" not in model.commits[-1]
    assert "not measured" in model.commits[-1]["README.md"].read(0, 1 << 20).decode()


def test_a_break_does_not_send_again_what_has_arrived(hub, token, made_local):
    """The second file fails for good in its middle; the next run sends it anew and what follows, and nothing else."""
    arguments = ["publish", made_local, "--repo", "user/t", "--base-model", "a/b"]
    size = sum(path.stat().st_size for path in made_local.glob("*.gguf"))
    first = sorted(made_local.glob("tiny-r1-*.gguf"))[0].stat().st_size
    stop = threading.Event()

    def rule(method, path):
        broken = method == "PUT" and hub.stored > first + 1_000_000 and not stop.is_set()
        return (403, {}) if broken else None

    hub.faults.append(rule)
    assert "no permission for 2.51bit/tiny-r1-2.51bit-00002-of" in refused(*arguments)
    stop.set()
    lost = hub.stored - first
    assert len(hub.objects) == 1 and 0 < lost < size - first
    quantkit(*arguments)
    sent = hub.stored
    assert sum(map(len, hub.objects.values())) == sent - lost  # the parts of the file that broke were sent twice
    quantkit(*arguments)
    assert hub.stored == sent


def test_transient_trouble_is_outlived(hub, token, made_local, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    with (
        hub.fault("PUT /upload", 500, 2),
        hub.fault("PUT /upload", 0, 2),
        hub.fault("POST /api/models", 503, 2),
        hub.fault("POST /api/repos", 429, 1, Retry_After="1"),
        hub.fault("/objects/batch", 500, 1),
    ):
        quantkit("publish", made_local, "--repo", "user/t", "--base-model", "a/b")
    stored = hub.models["user/t"].commits[-1]
    for path in made_local.glob("tiny-r1-*.gguf"):
        blob = stored[f"2.51bit/{path.name}"]
        assert blob.read(0, blob.size) == path.read_bytes()


def test_someone_commits_in_between(hub, token, made_local):
    hub.add("user/t", {"README.md": b"---\n---\n"})
    done = []

    def rule(method, path):
        if "/commit/" in path and not done:
            done.append(1)
            model = hub.models["user/t"]
            model.commits.append(model.commits[-1] | {"notes.txt": Blob(b"hello", False)})
        return None

    hub.faults.append(rule)
    quantkit("publish", made_local, "--repo", "user/t", "--base-model", "a/b")
    assert {"notes.txt", "2.51bit/plan.json"} <= hub.models["user/t"].commits[-1].keys()


def test_pull_request_private_and_dry_run(hub, token, made_local):
    base = ["publish", made_local, "--base-model", "a/b"]
    shown = quantkit(*base, "--repo", "user/t", "--dry-run")
    assert "user/t" not in hub.models and "base_model: a/b" in shown and "imatrix/2.51bit.gguf" in shown
    quantkit(*base, "--repo", "user/t", "--private")
    assert hub.models["user/t"].private
    hub.add("org/model", {"README.md": b"---\n---\n"})
    assert "discussions/1" in quantkit(*base, "--repo", "org/model", "--pr")
    assert "2.51bit/plan.json" in hub.models["org/model"].pulls["refs/pr/1"]
    assert "2.51bit/plan.json" not in hub.models["org/model"].commits[-1]


BROKEN = [
    ("certify.json", None, "quantkit certify"),
    ("certify.json", b'{"passed": false, "checks": [{"status": "fail"}]}', "a check failed"),
    ("certify.json", b'{"passed": true}', "not that a program has run the file"),
    ("certify.json", b'{"passed": true, "engine_run": true, "files": {"x.gguf": 1}}', "of other files"),
    ("certify.json", b'{"passed": true, "checks": ["x"]}', "certify.json is damaged: checks is no list of objects"),
    ("verify.json", None, "verify.json is missing"),
    ("imatrix.gguf", None, "imatrix.gguf is missing"),
    ("tiny-r1-2.51bit.gguf.part", b"", "unfinished"),
    ("plan.json", None, "plan.json"),
    ("provenance.json", b"{", "not valid JSON"),
    ("report.html", b"<p>hf_abcdefghijklmnopqrstuvwxyz0123</p>", "access token"),
    ("report.html", b"<p>hf&#95;abcdefghijklmnopqrstuvwxyz0123</p>", "access token"),
    ("recipe.toml", b'# from "https://me:secret@example.org/x"', "password or token in an address"),
    ("recipe.toml", str(Path.home() / "private" / "notes.txt").encode(), "where files lie"),
]


@pytest.mark.parametrize(("name", "data", "says"), BROKEN, ids=[f"{row[0]} {row[2]}" for row in BROKEN])
def test_refuses_what_is_incomplete(name, data, says, hub, token, made_local, tmp_path):
    folder = Path(shutil.copytree(made_local, tmp_path / "copy"))
    (folder / name).unlink(missing_ok=True)
    if data is not None:
        (folder / name).write_bytes(data)
    assert says in refused("publish", folder, "--repo", "user/t", "--base-model", "a/b")
    assert "user/t" not in hub.models


def test_a_certificate_of_bytes_that_were_made_again_is_refused(made_local, tmp_path):
    """Of the same names and sizes, which follow from the plan."""
    folder = Path(shutil.copytree(made_local, tmp_path / "copy"))
    (path,) = folder.glob("tiny-r1-*00001*.gguf")
    certificate = json.loads((folder / "certify.json").read_text())
    for crc, problems in ((zlib.crc32(path.read_bytes()), ()), (1, ("certify.json is of other files",))):
        (folder / "certify.json").write_text(json.dumps(certificate | {"crc32": {path.name: crc}}))
        found = read_folder(folder).problems
        assert len(found) == len(problems) and all(map(str.startswith, found, problems)), found


def with_metadata(path: Path, **changes) -> None:
    """The same GGUF with other metadata."""
    model = Model(path)
    model.metadata |= changes
    path.unlink()
    model.write(path)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("imatrix.datasets", ["https://me:secret@example.org/text"], "password or token"),
        ("imatrix.datasets", [str(Path.home() / "texts" / "diary.txt")], "where files lie"),
        ("general.description", "hf%5fabcdefghijklmnopqrstuvwxyz0123", "access token"),
    ],
)
def test_headers_of_gguf_files_are_searched(hub, token, made_local, tmp_path, key, value, says):
    folder = Path(shutil.copytree(made_local, tmp_path / "copy"))
    with_metadata(folder / "imatrix.gguf", **{key: value})
    line = refused("publish", folder, "--repo", "user/t", "--base-model", "a/b")
    assert "imatrix.gguf" in line and says in line and "secret" not in line and "abcdefgh" not in line


def test_where_things_lie_here_is_not_published(hub, token, made_local, tmp_path):
    folder = Path(shutil.copytree(made_local, tmp_path / "copy"))
    made = json.loads((folder / "provenance.json").read_text())
    assert "command" in made
    made["calibration"]["text"]["data"] = [f"math={tmp_path}/my texts/diary.txt", str(tmp_path / "other texts.txt")]
    made["command"] = f"quantkit make {tmp_path}/model --data x"
    (folder / "provenance.json").write_text(json.dumps(made))
    quantkit("publish", folder, "--repo", "user/t", "--base-model", "a/b")
    commit = hub.models["user/t"].commits[-1]
    for name in ("README.md", "2.51bit/provenance.json", "2.51bit/verify.json", "2.51bit/certify.json"):
        assert str(tmp_path).encode() not in commit[name].read(0, 1 << 20), name
    published = json.loads(commit["2.51bit/provenance.json"].read(0, 1 << 20))
    assert "command" not in published and published["calibration"]["text"]["data"][1] == "other texts.txt"
    assert {key: published[key] for key in ("checkpoint", "plan")} == {key: made[key] for key in ("checkpoint", "plan")}


def test_texts_of_ones_own_are_not_published(hub, token, made_local, tmp_path):
    """`verify --prompts --data notes.txt` keeps some of the notes: in verify.json, from where the report shows them."""
    folder = shutil.copytree(made_local, tmp_path / "own")
    scores = json.loads((folder / "verify.json").read_text())
    sample = {"domain": "prose", "prompt": "Dear diary", "file": "a", "original": "b", "original_whole": True}
    told = {"prompts": 1, "summary": "", "samples": [sample]}
    own = scores | {"text": "notes.txt", "text_sha256": "0" * 64, "generation": told}
    (folder / "verify.json").write_text(json.dumps(own))
    quantkit("report", folder)
    assert "Dear diary" in (folder / "report.html").read_text()
    said = quantkit("publish", folder, *BASE, "--name", "own")
    assert "1 texts of --data that verify.json holds are not published, nor report.html" in said
    there = hub.models["user/t"].commits[-1]
    assert "own/report.html" not in there and b"diary" not in there["own/verify.json"].read(0, 1 << 20)
    assert "samples" not in json.loads(there["own/verify.json"].read(0, 1 << 20))["generation"]
    (folder / "verify.json").write_text(json.dumps(scores))  # verified again, by the bundled text
    assert "shows texts of an earlier verify.json" in quantkit("publish", folder, *BASE, "--name", "own")
    assert "own/report.html" not in hub.models["user/t"].commits[-1]
    quantkit("report", folder)
    quantkit("publish", folder, *BASE, "--name", "own")
    assert b"diary" not in hub.models["user/t"].commits[-1]["own/report.html"].read(0, 1 << 24)


def test_names_and_facts_of_others_are_no_commands(hub, token, made_local):
    """A repository that holds folders with shell in their names, and JSON with Markdown and wrong kinds in it."""
    facts = {"target": "`id`", "quantkit": "1\n```\nrm -rf ~\n", "mla": "split", "effort": ["x"], "calibration": 3}
    files = {"$(id)/plan.json": b"{}", "a;id/plan.json": b"{}", "deep/er/plan.json": b"{}"}
    for name, made in (("one", facts), ("two", {**facts, "calibration": {"text": {"n_tokens": "9\n", "chunk": 1}}})):
        files |= {f"{name}/plan.json": b"{}", f"{name}/provenance.json": json.dumps(made).encode()}
        files |= {f"{name}/x$(id).gguf": b"GGUF", f"{name}/verify.json": b'{"bytes": "<script>"}'}
    files |= {"three/plan.json": b"{}", "three/provenance.json": b"[", "three/y.gguf": b"GGUF"}
    hub.add("user/t", files)
    shown = quantkit("publish", made_local, "--repo", "user/t", "--base-model", "a/b")
    assert "its name is unusual" in shown and "three" in shown
    text = hub.models["user/t"].commits[-1]["README.md"].read(0, 1 << 20).decode()
    assert "## one" in text and "a;id" not in text and "rm -rf" not in text and "<script>" not in text
    fenced = [part for i, part in enumerate(text.split("```")) if i % 2]
    for line in "\n".join(fenced).splitlines():
        words = shlex.split(line.removeprefix("bash"), comments=True)
        assert all("$(id)" not in word or "'" in line for word in words), line
    assert "unusual" not in quantkit("publish", made_local, "--repo", "user/u", "--base-model", "a/b")
    assert "user/name" in refused("publish", made_local, "--repo", "user/t", "--base-model", "x`id`/y")


def test_truncated_part_is_refused_and_force_publishes_the_uncertified(hub, token, made_local, tmp_path):
    folder = Path(shutil.copytree(made_local, tmp_path / "copy"))
    (folder / "certify.json").unlink()
    quantkit("publish", folder, "--repo", "user/t", "--base-model", "a/b", "--force")
    part = sorted(folder.glob("tiny-r1-*.gguf"))[1]
    part.write_bytes(part.read_bytes()[:-100])
    assert part.name in refused("publish", folder, "--repo", "user/t", "--base-model", "a/b", "--force")


def test_no_token_wrong_token_no_rights(hub, env, made_local, monkeypatch):
    arguments = ["publish", made_local, "--base-model", "a/b", "--repo"]
    assert "token" in refused(*arguments, "user/t")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "w" * 30)
    line = refused(*arguments, "user/t")
    assert "token was refused" in line and "wwww" not in line
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "no permission" in refused(*arguments, "stranger/t")
    assert "--base-model" in refused("publish", made_local, "--repo", "user/t")
