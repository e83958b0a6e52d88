"""R1's true index and shard headers, 163 shards without weights: everything that needs no weights is quick."""

import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from loopback_hub import Sparse

from quantkit import bundle
from quantkit.__main__ import main
from quantkit.formats.geometry import Geometry

N_SHARDS, SHARD_BYTES = 163, 4_300_000_000


def shards(geometry: Geometry) -> dict[str, Sparse]:
    """Tensors dealt out in order to shards of about SHARD_BYTES, as in the release; scales beside their weights."""
    held: list[dict[str, dict]] = [{}]
    position = 0
    order = sorted(geometry.tensors, key=natural)
    for name in order:
        entry = geometry.tensors[name]
        if position + entry.n_bytes > SHARD_BYTES and len(held) < N_SHARDS:
            held.append({})
            position = 0
        held[-1][name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.n_bytes],
        }
        position += entry.n_bytes
    out = {}
    for number, header in enumerate(held, 1):
        text = json.dumps(header).encode()
        end = max(value["data_offsets"][1] for value in header.values())
        name = f"model-{number:05}-of-{len(held):06}.safetensors"
        out[name] = Sparse(len(text).to_bytes(8, "little") + text, 8 + len(text) + end)
    return out


def natural(name: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]


@pytest.fixture(scope="module")
def r1() -> dict:
    folder = Path(bundle.models_dir() / "deepseek-r1")
    files: dict = shards(Geometry.load(folder))
    names = {}
    for shard, sparse in files.items():
        names |= dict.fromkeys(json.loads(sparse.header[8:]), shard)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": names}).encode()
    files["config.json"] = (folder / "config.json").read_bytes()
    return files


def test_inspect_and_plan_in_seconds(hub, env, r1, capsys):
    hub.add("deepseek-ai/DeepSeek-R1", r1)
    assert abs(len([name for name in r1 if name.endswith(".safetensors")]) - N_SHARDS) <= 3
    timings = {}
    for command in ("inspect", "plan"):
        hub.reset()
        begin, used = time.perf_counter(), time.process_time()
        done = CliRunner().invoke(main, [command, "deepseek-ai/DeepSeek-R1"])
        seconds, timings[command] = time.perf_counter() - begin, time.process_time() - used
        assert done.exit_code == 0, done.output
        sent, asked = sum(hub.sent.values()), len(hub.log)
        with capsys.disabled():
            print(
                f"\n{command}: {seconds:.2f} s ({timings[command]:.2f} s of CPU, server included), {asked} requests, "
                f"{sent:,} bytes"
            )
        if command == "inspect":
            assert "688,574,839,360" in done.output and sent < 30_000_000
        else:
            assert "140,182,988,800" in done.output and not hub.sent
    assert max(timings.values()) < 10  # of CPU, so that a busy machine fails no test
