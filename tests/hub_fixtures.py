"""tiny-r1 in 24 shards, served by a loopback Hub: fixtures of tests/remote and tests/job/publish."""

import json
from pathlib import Path

import pytest
from loopback_hub import Hub
from safetensors import safe_open
from safetensors.torch import save

from quantkit import bundle

TINY = bundle.models_dir() / "tiny-r1"
N_SHARDS = 24


@pytest.fixture(scope="session")
def sharded(tmp_path_factory) -> Path:
    """A folder `tiny-r1`: the bundled model's tensors in N_SHARDS files of about equal size, in the index's order."""
    folder = tmp_path_factory.mktemp("sharded") / "tiny-r1"
    folder.mkdir()
    index = json.loads((TINY / "model.safetensors.index.json").read_text())
    files = {name: safe_open(TINY / name, "pt") for name in sorted(set(index["weight_map"].values()))}
    tensors = {name: files[file].get_tensor(name) for name, file in index["weight_map"].items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map, done, shards = {}, 0, {}
    for name, tensor in tensors.items():
        number = min(N_SHARDS - 1, done * N_SHARDS // total) + 1
        shard = f"model-{number:05}-of-{N_SHARDS:06}.safetensors"
        shards.setdefault(shard, {})[name] = tensor
        weight_map[name] = shard
        done += tensor.nbytes
    for shard, held in shards.items():
        (folder / shard).write_bytes(save(held, {"format": "pt"}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    assert len(shards) == N_SHARDS
    return folder


@pytest.fixture
def hub(sharded):
    with Hub() as server:
        server.add("user/tiny-r1", {path.name: path for path in sorted(sharded.iterdir())})
        yield server


@pytest.fixture
def env(hub, tmp_path, monkeypatch):
    """This process and its children talk to the loopback Hub, with an empty HF_HOME."""
    from huggingface_hub import constants

    home = tmp_path / "hf"
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    return home
