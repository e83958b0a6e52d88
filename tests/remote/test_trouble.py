"""What can go wrong between here and a Hub: outlived if it passes, one clear line if it does not."""

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from loopback_hub import TOKEN, Blob

from quantkit.__main__ import main
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import Calibration
from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.job.make import make
from quantkit.job.options import MakeOptions
from quantkit.models.open import ModelRef, open_weights
from quantkit.remote import client
from quantkit.remote.cache import RangeCache, home_of
from quantkit.remote.pieces import PIECE, Range, cut
from quantkit.remote.repo import parse

NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT", 0.005)


def line_of(*arguments) -> str:
    """The one line of a command that must fail."""
    done = CliRunner().invoke(main, list(map(str, arguments)))
    lines = [line for line in done.output.splitlines() if line.startswith("quantkit: ")]
    assert done.exit_code == 1 and len(lines) == 1 and TOKEN not in done.output, done.output
    return lines[0]


def test_inspect_and_plan_need_headers_only(hub, env, sharded):
    told = CliRunner().invoke(main, ["inspect", "user/tiny-r1"]).output
    assert told.splitlines()[1:] == CliRunner().invoke(main, ["inspect", str(sharded)]).output.splitlines()[1:]
    hub.reset()
    planned = CliRunner().invoke(main, ["plan", f"{hub.url}/user/tiny-r1/tree/main"]).output
    assert planned == CliRunner().invoke(main, ["plan", str(sharded)]).output
    assert not hub.sent  # small files and headers were kept


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("user/none", "no such model, or it is private"),
        ("user/private", "no such model, or it is private"),
        ("user/gated", "gated; ask for access on its page"),
        ("user/empty", "no config.json"),
        ("nothing-here", "no such folder"),
        ("http://127.0.0.1:9/a/b", "check the network"),
    ],
)
def test_one_line_for_a_model_that_cannot_be_had(model, says, hub, env, fast, sharded):
    files = {path.name: path for path in sharded.iterdir()}
    hub.add("user/private", files, private=True)
    hub.add("user/gated", files, gated=True)
    hub.add("user/empty", {"README.md": b"nothing"})
    assert says in line_of("inspect", model)


def test_one_line_for_a_wrong_revision_or_token(hub, env, monkeypatch):
    assert "no revision nope" in line_of("plan", "user/tiny-r1@nope")
    hub.models["user/tiny-r1"].private = True
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    line = line_of("inspect", "user/tiny-r1")
    assert "your token was sent" in line and "xxxx" not in line
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert CliRunner().invoke(main, ["inspect", "user/tiny-r1"]).exit_code == 0


def test_a_token_goes_to_no_other_endpoint(hub, env, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.models["user/tiny-r1"].private = True
    other = hub.url.replace("127.0.0.1", "localhost")
    assert "no token was sent" in line_of("inspect", f"{other}/user/tiny-r1")


@pytest.mark.parametrize(("status", "says"), [(500, "HTTP 500"), (429, "rate limited"), (0, "failed (")])
def test_lasting_trouble_gives_up_with_one_line(status, says, hub, env, fast, monkeypatch):
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.01)
    with hub.fault("GET /api/models", status):
        assert says in line_of("inspect", "user/tiny-r1")
    with hub.fault("/model-00007-of", status):
        assert says in line_of("inspect", "user/tiny-r1")


def test_passing_trouble_is_outlived(hub, env, fast, sharded):
    hub.shorten = lambda file: file.endswith(".safetensors") and len(hub.log) % 3 == 0
    with (
        hub.fault("/api/models", 503, 2),
        hub.fault("GET", 500, 3),
        hub.fault("config.json", 0, 1),
        hub.fault("model-00003", 429, 2, Retry_After="0"),
    ):
        remote = open_weights(ModelRef("user/tiny-r1"))
        assert torch.equal(remote.read(NAME), Checkpoint.open(sharded).read(NAME))
        remote.close()


def test_retry_after_is_honoured_and_a_long_one_is_refused(hub, env, fast, monkeypatch):
    slept = []
    monkeypatch.setattr(client.time, "sleep", slept.append)
    with hub.fault("GET /api/models", 429, 1, Retry_After="7"):
        assert CliRunner().invoke(main, ["inspect", "user/tiny-r1"]).exit_code == 0
    assert slept == [7.0]
    with hub.fault("GET /api/models", 429, 1, Retry_After="4000"):
        assert "asks to wait 4000 s" in line_of("inspect", "user/tiny-r1")


def test_an_expired_address_is_asked_for_anew(hub, env, fast, sharded):
    local, remote = Checkpoint.open(sharded), open_weights(ModelRef("user/tiny-r1"))
    assert torch.equal(remote.read(NAME), local.read(NAME))
    hub.signature = "2"
    for name in list(local.tensors)[:200]:
        if not name.endswith("_scale_inv"):
            assert torch.equal(remote.read(name), local.read(name))
    remote.close()


def test_a_changed_file_is_noticed(hub, env, fast):
    """The same commit with other content, as only a mirror could have it, and one that changes behind its address."""
    remote = open_weights(ModelRef("user/tiny-r1"))
    files = hub.models["user/tiny-r1"].commits[0]
    file = remote.entry(NAME).file
    data = bytearray(files[file].read(0, files[file].size))
    data[-1] ^= 1
    sha = hub.models["user/tiny-r1"].sha()
    files[file] = Blob(bytes(data), True)
    hub.models["user/tiny-r1"].sha = lambda index=-1: sha
    with pytest.raises(QuantkitError, match=f"{file} changed"):
        remote.read(NAME)
    remote.close()


def test_new_weights_under_the_same_name_are_another_job(hub, env, tmp_path):
    text = TextChoice(n_tokens=256, chunk=64)
    how = Calibration(text)
    options = MakeOptions(recipe="2.51bit", calibration=how, encoder="ggml", verify=False)
    make(ModelRef("user/tiny-r1"), tmp_path / "out", options)
    model = hub.models["user/tiny-r1"]
    name = next(name for name in model.commits[0] if name.endswith("-00009-of-000024.safetensors"))
    blob = model.commits[0][name]
    data = bytearray(blob.read(0, blob.size))
    data[-1] ^= 1
    model.commits.append(model.commits[0] | {name: Blob(bytes(data), True)})
    with pytest.raises(QuantkitError, match="holds another job: weights"):
        make(ModelRef("user/tiny-r1"), tmp_path / "out", options)
    old = ModelRef("user/tiny-r1", model.sha(0))
    make(old, tmp_path / "out", options)


def test_damaged_cache_is_downloaded_again(hub, env, sharded):
    local, remote = Checkpoint.open(sharded), open_weights(ModelRef("user/tiny-r1"))
    remote.read(NAME)
    remote.close()
    headers = (home_of(hub.url) / "headers").glob("*")
    for path in [*(home_of(hub.url) / "ranges").glob("*/*"), *headers]:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
    remote = open_weights(ModelRef("user/tiny-r1"))
    assert torch.equal(remote.read(NAME), local.read(NAME))
    remote.close()


def test_a_cache_too_small_for_anything_still_reads_right(hub, env, sharded):
    local, remote = Checkpoint.open(sharded), open_weights(ModelRef("user/tiny-r1", None, 500_000))
    for name in list(local.tensors)[::40]:
        if not name.endswith("_scale_inv"):
            assert torch.equal(remote.read(name), local.read(name))
    remote.close()


def test_two_processes_do_not_share_a_cache(hub, env):
    first, second = (open_weights(ModelRef("user/tiny-r1")) for _ in range(2))
    first.read(NAME)
    with pytest.raises(QuantkitError, match="another quantkit is using this cache"):
        second.read(NAME)
    first.close()
    second.read(NAME)
    second.close()


def test_offline_from_the_cache_and_from_a_whole_snapshot(hub, env, sharded, monkeypatch):
    from huggingface_hub import constants, snapshot_download

    local = Checkpoint.open(sharded)
    snapshot_download("user/tiny-r1", cache_dir=env / "hub")
    open_weights(ModelRef("user/tiny-r1")).close()
    hub.reset()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    remote = open_weights(ModelRef("user/tiny-r1"))
    assert torch.equal(remote.read(NAME), local.read(NAME)) and not hub.sent
    remote.close()
    shutil.rmtree(env)
    assert "HF_HUB_OFFLINE" in line_of("inspect", "user/tiny-r1")


def test_offline_from_what_hf_download_left(hub, env, sharded, monkeypatch):
    """Never looked at before, and the same job as online."""
    from huggingface_hub import constants, snapshot_download

    snapshot_download("user/tiny-r1", cache_dir=env / "hub")
    online = open_weights(ModelRef("user/tiny-r1"))
    origin = dict(online.origin)
    online.close()
    shutil.rmtree(env / "quantkit")
    hub.reset()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    remote = open_weights(ModelRef("user/tiny-r1"))
    assert torch.equal(remote.read(NAME), Checkpoint.open(sharded).read(NAME)) and not hub.sent
    assert {**remote.origin, "license": None} == {**origin, "license": None}
    remote.close()
    shard = next((env / "hub").rglob("snapshots/*/*.safetensors"))
    shard.unlink()
    assert "no such file" in line_of("inspect", "user/tiny-r1")


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def no_locks(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with contextlib.closing(RangeCache(tmp_path, 100).open()) as cache:
        assert cache.is_open and "no locks on this file system" in capsys.readouterr().err


def test_read_only_folder(hub, env, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", "/sys/quantkit")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(env / "hub"))
    assert "not writable" in line_of("inspect", "user/tiny-r1")


def test_full_disk(hub, env, tmp_path):
    """A file system of 6 MB, in a namespace of its own."""
    mount = "mount -t tmpfs -o size=6m tmpfs $HF_HOME && exec "
    command = f"{mount}{sys.executable} -m quantkit calibrate user/tiny-r1 --tokens 512 -o {tmp_path}/i.gguf"
    env.mkdir()
    unshare = ["unshare", "-rm", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "mount -t tmpfs none /mnt"]).returncode:
        pytest.skip("no user namespaces here")
    done = subprocess.run([*unshare, command], capture_output=True, text=True, timeout=120, env=os.environ)
    lines = [line for line in done.stderr.splitlines() if line.startswith("quantkit: ")]
    assert done.returncode == 1 and len(lines) == 1 and "the disk is full" in lines[0], done.stderr
    assert not (tmp_path / "i.gguf").exists()


@pytest.mark.parametrize(
    ("text", "id_", "revision"),
    [
        ("user/name", "user/name", None),
        ("user/name@v1.0", "user/name", "v1.0"),
        ("hf://user/name", "user/name", None),
        ("https://huggingface.co/user/name/tree/refs%2Fpr%2F1", "user/name", "refs/pr/1"),
        ("https://hf.co/user/name", "user/name", None),
        ("./user/name", None, None),
        ("a/b/c", None, None),
        ("name", None, None),
    ],
)
def test_what_a_name_means(text, id_, revision):
    repo = parse(text)
    assert (repo and (repo.id, repo.revision)) == (id_ and (id_, revision))


def test_pieces_cover_what_was_asked_for_and_nothing_else():
    extents = [("b", 100, 300), ("a", 0, 10), ("a", 10, 30), ("a", 40, 50), ("b", 300, 300 + 2 * PIECE + 5)]
    pieces = cut(extents)
    assert pieces[0] == ("b", 100, 300) and ("a", 0, 30) in pieces and ("a", 40, 50) in pieces
    assert sum(end - begin for _, begin, end in pieces) == sum(end - begin for _, begin, end in extents)
    assert max(end - begin for _, begin, end in pieces) <= PIECE


def test_cache_counts_and_cleans_up(tmp_path):
    cache = RangeCache(tmp_path, 100).open(overhead=10)
    key = Range("e" * 40, 5, 65)
    assert cache.reserve(60) and not cache.reserve(31)
    cache.publish(key, cache.write(key, lambda sink: sink(b"x" * 60)))
    (tmp_path / key.etag / "70-80.part").write_bytes(b"half")
    cache.close()
    again = RangeCache(tmp_path, 100).open()
    assert again.ranges() == [key] and again.used == 60 and len(list(tmp_path.glob("e*/*"))) == 1
    again.forget(key)
    assert again.used == 0
    again.close()
