"""A file larger than the RAM it may take gives the same tokens, and keeps to its limit."""

import ctypes
import json
import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from quantkit import bundle
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_writer import GGUFWriter
from quantkit.ggml import quants
from quantkit.models import family
from quantkit.models.tokenizer_metadata import tokenizer_metadata
from quantkit.planning.assign import make_plan
from quantkit.planning.recipe import Recipe
from quantkit.runtime.engines.gpu import GpuEngine
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.engines.prompts import Costs
from quantkit.runtime.generate import Sampling, generate
from quantkit.runtime.residency import Residency
from quantkit.runtime.sources.gguf import GGUFWeights, open_gguf
from quantkit.serving.chat import Conversation

TINY = bundle.models_dir() / "tiny-r1"
RULES = """name = "random"
description = "all in one type"
target = "llama.cpp"
[[rules]]
match = "*"
qtype = "Q8_0"
why = "fast to make"
"""
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """tiny-r1 with 32 experts four times as wide, random: 90 MB, of which experts are 95 %."""
    return random_file(tmp_path_factory.mktemp("wide"), n_routed_experts=32, moe_intermediate_size=1024)


def random_file(folder: Path, **changes: int) -> Path:
    """tiny-r1 with another configuration and random weights."""
    config = json.loads((TINY / "config.json").read_text()) | changes
    c = family.from_hf(config)
    (folder / "rules.toml").write_text(RULES)
    plan = make_plan(family.specs(c), Recipe.load(str(folder / "rules.toml")), model="random")
    metadata = family.metadata(c, plan.mla, "random") | tokenizer_metadata(TINY, c.n_vocab, family.PRE)
    rng = np.random.default_rng(0)
    with GGUFWriter.open(folder / "random.gguf", plan.tensors, metadata, fingerprint={}) as out:
        for tensor in plan.tensors:
            n_in, n_rows = tensor.shape[-1], tensor.n_bytes // tensor.row_bytes
            rows = rng.standard_normal((n_rows, n_in), np.float32) / np.float32(n_in**0.5)
            if len(tensor.shape) == 1:
                rows[:] = "norm" in tensor.name
            packed = rows.view(np.uint8) if tensor.qtype == "F32" else quants.quantize(tensor.qtype, rows)
            out.write(tensor.name, 0, packed)
    return folder / "random.gguf"


def resident(weights: GGUFWeights) -> int:
    """Bytes of the file in this process's memory: of its mapping, and of experts that were read."""
    file, total, inside = weights.file, 0, False
    base = file.data("output.weight").ctypes.data - file.tensors["output.weight"].offset
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(" ", 1)[0].endswith(":"):
            start = int(line.split("-", 1)[0], 16)
            inside = base <= start < base + file.n_bytes
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    for stack in weights.residency.stacks.values():
        pages = (ctypes.c_ubyte * -(-stack.nbytes // mmap.PAGESIZE))()
        assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(stack.ctypes.data), ctypes.c_size_t(stack.nbytes), pages)
        total += mmap.PAGESIZE * sum(page & 1 for page in pages)
    return total


@pytest.mark.parametrize("n_prompt", [5, 40, 200])
def test_same_tokens_within_the_limit(path, n_prompt):
    """Prompts through the graph, in one part and in several, and through whole layers; then decoding."""
    prompt = [0, *range(100, 100 + n_prompt)]
    free = open_gguf(path, n_threads=1)
    expected = list(generate(open_engine(free, 1, 512), prompt, 24, GREEDY))
    limit = path.stat().st_size // 3
    weights = open_gguf(path, n_threads=1, ram=limit)
    engine = open_engine(weights, 1, 512)
    found, most = [], 0
    for token in generate(engine, prompt, 24, GREEDY):
        found.append(token)
        most = max(most, resident(weights))
    assert found == expected and len(set(found)) > 2
    assert 0 < most <= limit
    assert weights.residency.held <= weights.residency.room < weights.residency.read


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("gpu_layers", [0, 1])
@pytest.mark.parametrize("n_prompt", [40, 200])
def test_the_rest_on_a_gpu(path, device, gpu_layers, n_prompt, caplog):
    """Prompts whose experts the CPU computes, and such that send all of them to the GPU; then decoding."""
    caplog.set_level("INFO")
    prompt = [0, *range(100, 100 + n_prompt)]
    costs = Costs(0, 0, 1, 1, 1) if n_prompt < 100 else Costs(1, 1, 0, 1, 1)
    free = GpuEngine(open_gguf(path, device, n_threads=2), 1, 512, gpu_layers)
    free.prompts.costs = costs
    expected = list(generate(free, prompt, 12, GREEDY))
    del free
    limit = path.stat().st_size // 3
    weights = open_gguf(path, device, n_threads=2, ram=limit)
    engine = GpuEngine(weights, 1, 512, gpu_layers)
    engine.prompts.costs = costs
    assert "read for each token" in caplog.text and len(weights.residency.elsewhere) == gpu_layers
    found, most = [], resident(weights)
    for token in generate(engine, prompt, 12, GREEDY):
        found.append(token)
        most = max(most, resident(weights))
    assert found == expected and len(set(found)) > 2
    assert 0 < most <= limit
    assert weights.residency.held <= weights.residency.room and weights.residency.read > 0


def test_several_sequences(path):
    weights, free = open_gguf(path, n_threads=1, ram=path.stat().st_size // 3), open_gguf(path, n_threads=1)
    ours, theirs = open_engine(weights, 12, 64), open_engine(free, 12, 64)
    for engine in (ours, theirs):
        for slot in range(12):
            engine.prefill(slot, [0, 100 + slot], 0)
    slots = list(range(12))
    assert (ours.decode(slots, slots) == theirs.decode(slots, slots)).all()


@pytest.mark.parametrize("n_prompt", [5, 200])
def test_a_read_that_fails_fails_the_step_and_no_later_one(path, n_prompt, monkeypatch):
    prompt = [0, *range(100, 100 + n_prompt)]
    weights = open_gguf(path, n_threads=1, ram=path.stat().st_size // 3)
    engine = open_engine(weights, 1, 512)
    expected = list(generate(engine, prompt, 12, GREEDY))
    real, left = weights.file.read_into, [20]

    def failing(*where):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("the disk is gone")
        real(*where)

    monkeypatch.setattr(weights.file, "read_into", failing)
    for _ in range(3):
        with pytest.raises(OSError, match="the disk is gone"):
            list(generate(engine, prompt, 12, GREEDY))
        left[0] = 20
    left[0] = 1 << 30
    assert list(generate(engine, prompt, 12, GREEDY)) == expected
    assert weights.residency.held <= weights.residency.room


def test_copies_beside_reads(path):
    """Threads copy experts, some of which others drop meanwhile."""
    weights = open_gguf(path, n_threads=1, ram=path.stat().st_size // 3)
    residency, name = weights.residency, "blk.1.ffn_up_exps.weight"
    size = residency.stacks[name][0].nbytes

    def copied(i: int) -> bool:
        out = np.empty(size, np.uint8)
        residency.copy(name, i % 32, out)
        return bool((out == weights.file.matrix(name, i % 32).reshape(-1)).all())

    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(copied, i) for i in range(200)]
        for i in range(60):
            residency.need(1 + i % 2, [i % 32, (i + 7) % 32])
        assert all(future.result() for future in found)


def test_a_file_without_experts(tmp_path):
    file = random_file(tmp_path, num_hidden_layers=1, first_k_dense_replace=1)
    tokens = [
        list(generate(open_engine(open_gguf(file, n_threads=1, ram=ram), 1, 256), [0, 200, 201], 8, GREEDY))
        for ram in (None, 30 << 20)
    ]
    assert tokens[0] == tokens[1]


def test_experts_used_last_stay(path):
    weights = open_gguf(path, n_threads=1, ram=path.stat().st_size // 3)
    residency: Residency = weights.residency
    most = residency.most
    residency.need(1, range(most))
    read = residency.read
    residency.need(1, [0, 1])
    assert residency.read == read and read == most * residency.size[1]
    residency.need(2, [5])  # makes room by dropping expert 2
    residency.need(1, [0, 1, *range(3, most)])
    assert residency.read == read + residency.size[2]
    residency.need(1, [2])
    assert residency.read == read + residency.size[2] + residency.size[1]


def test_too_little_is_refused_and_the_cost_is_said(path, capsys):
    with pytest.raises(QuantkitError, match=r"--ram 2.1 MB, 2.0 MiB is too little for random.gguf: every token needs"):
        open_gguf(path, ram=2 << 20)
    weights = open_gguf(path, ram=30 << 20)
    talk = Conversation(weights, open_engine(weights, 1, 64), GREEDY)
    assert "RAM limit 31.5 MB, 30.0 MiB" in (said := capsys.readouterr().err) and "read for each token" in said
    list(talk.complete("abc", 4))
    assert talk.speed.endswith("of experts read")
