"""Both models side by side: figures equal to separate passes, a damaged layer is named, memory does not grow."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from mutations import Model
from safetensors.torch import load_file, save_file

from quantkit.__main__ import main
from quantkit.calibration import corpus
from quantkit.calibration.corpus import TextChoice
from quantkit.errors import QuantkitError
from quantkit.evaluation import configuration
from quantkit.evaluation.divergence import HeldLogits, diverge, scored, scored_targets
from quantkit.evaluation.oracles import hf
from quantkit.evaluation.runtime_mode import runtime_mode
from quantkit.evaluation.side_by_side import LayerError, bad_layers
from quantkit.evaluation.summary import short_table
from quantkit.evaluation.verify import verify
from quantkit.formats.checkpoint import Checkpoint
from quantkit.job.stages import VerifyOptions, verify_file
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_gguf, open_source
from quantkit.runtime.stream import final_hidden, head_tiles


@pytest.fixture(scope="module")
def good(made) -> Path:
    return made / "tiny-r1-1.58bit.gguf"


@pytest.fixture(scope="module")
def reference(tiny) -> CheckpointSource:
    return CheckpointSource(tiny)


@pytest.fixture(scope="module")
def chunks(reference) -> corpus.Chunks:
    return corpus.chunk(corpus.default("evaluation"), reference.tokenizer(), reference.config.bos, 128, 16 * 128)


@pytest.fixture(scope="module")
@torch.inference_mode()
def result(good, reference, chunks) -> dict:
    found = verify(open_source(good), reference, chunks)
    runtime = partial(open_engine, open_gguf(good), 1)
    return found.figures | {"runtime": runtime_mode(runtime, found.heads, chunks, "half", 384)}


@torch.inference_mode()
def test_equals_two_separate_passes(result, good, reference, chunks):
    """The copies of probe chunks in the quantized stream must not change the figures."""
    models = (reference, open_source(good))
    tiles = [head_tiles(model, model.head(), scored(final_hidden(model, chunks.tokens))) for model in models]
    held = [HeldLogits(torch.cat(list(each))) for each in tiles]
    plain = diverge(*held, scored_targets(chunks.targets), reference.config.n_vocab).summary()
    for key, value in plain.items():
        assert result[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_domains_make_up_the_whole(result, chunks):
    assert set(result["domains"]) == set(chunks.domains) and len(result["domains"]) >= 3
    domains = result["domains"].values()
    assert sum(d["tokens"] for d in domains) == result["tokens"]
    mean = sum(d["kld_mean"] * d["tokens"] for d in domains) / result["tokens"]
    assert mean == pytest.approx(result["kld_mean"])
    assert sum(result["kld_histogram"]["counts"]) == result["tokens"]
    low, high = result["ci95"]["kld_mean"]
    assert low < result["kld_mean"] < high


def test_modes_agree(result):
    """Token by token through the cache and ggml's products: what is left is the rounding of activations."""
    mode = result["runtime"]
    assert mode["agree"] and mode["original"]["tokens"] == 3 * 63
    assert mode["agreement"]["kld_mean"] < 0.1 * mode["streamed"]["kld_mean"]
    assert "agree" in short_table(result, Path("x.gguf"))


@torch.inference_mode()
def test_a_bad_layer_is_named(good, reference, chunks, tmp_path):
    """One matrix of layer 2 is damaged: later layers carry its error on, but the own error is layer 2's alone."""
    model = Model(good)
    model.change("blk.2.attn_output.weight", lambda t: t.with_values(-t.values()))
    source = open_source(model.write(tmp_path / "bad.gguf"))
    found = verify(source, reference, chunks).figures
    assert found["bad_layers"] == [2]
    assert found["layers"][3]["error"] > 0.5 and found["layers"][3]["own"] < 0.5
    assert "layer 2 stands out" in short_table(found, Path("x.gguf"))


def test_a_good_file_has_no_bad_layer(result):
    assert result["bad_layers"] == []
    assert [layer["layer"] for layer in result["layers"]] == [0, 1, 2, 3]


def test_layers_that_stand_out():
    def errors(*own: float) -> list[LayerError]:
        return [LayerError(i, 1.0, value) for i, value in enumerate(own)]

    assert bad_layers(errors(0.02, 0.2, 0.21, 0.2)) == []
    assert bad_layers(errors(0.02, 0.2, 0.21, 0.6)) == [3]
    assert bad_layers(errors(0.0001, 0.0001, 0.01)) == []  # nearly lossless: no layer is worth a name
    assert bad_layers(errors(0.9, 0.96, 0.9)) == [1]
    assert bad_layers([]) == []


@torch.inference_mode()
def test_numbers_that_are_not_finite_name_their_layer(good, reference, chunks, tmp_path):
    model = Model(good)
    model.change("blk.1.ffn_norm.weight", lambda t: t.with_values(t.values() * float("nan")))
    source = open_source(model.write(tmp_path / "nan.gguf"))
    with pytest.raises(QuantkitError, match=r"layer 1 computes numbers that are not finite"):
        verify(source, reference, chunks)


def test_all_tokens_can_be_scored(good, tiny, tmp_path):
    choice = TextChoice(n_tokens=1024, chunk=256)
    half = verify_file(good, tiny, "cpu", VerifyOptions(choice), tmp_path / "v.json")
    whole = verify_file(good, tiny, "cpu", VerifyOptions(choice, score="all"))
    assert (half["tokens"], whole["tokens"]) == (4 * 127, 4 * 255)
    assert json.loads((tmp_path / "v.json").read_text())["score"] == "half"


@pytest.mark.parametrize("misread", [False, True])
def test_verify_asks_another_program_about_the_configuration(good, tmp_path, monkeypatch, misread):
    """Scores by a misread config.json are of another model: it is said, recorded, and the command fails."""
    pytest.importorskip("transformers")
    logits = configuration._logits

    def of_another_theta(source: CheckpointSource, tokens):
        source.config = replace(source.config, rope_base=5e4)
        return logits(source, tokens)

    configuration._check.cache_clear()
    if misread:
        monkeypatch.setattr(configuration, "_logits", of_another_theta)
    out = tmp_path / "v.json"
    done = CliRunner().invoke(main, ["verify", str(good), "--tokens", "1024", "--json", str(out)])
    configuration._check.cache_clear()
    found = json.loads(out.read_text())["configuration"]
    expected = ("fail", 1, "FAILED: ") if misread else ("pass", 0, "transformers ")
    assert (found["status"], done.exit_code) == expected[:2], done.output
    assert f"config.json {expected[2]}" in done.stdout and found["detail"] in done.stdout


def test_verify_says_that_nobody_was_asked(good, tiny, monkeypatch):
    monkeypatch.setattr(hf, "available", lambda: False)
    found = verify_file(good, tiny, "cpu", VerifyOptions(TextChoice(n_tokens=1024), configuration=True))
    assert found["configuration"]["status"] == "warn"
    assert "config.json unchecked: only quantkit has read it" in short_table(found, good)


def test_too_little_memory_is_refused_before_work(good, tiny):
    with pytest.raises(QuantkitError, match="but half of --memory is"):
        verify_file(good, tiny, "cpu", VerifyOptions(TextChoice(n_tokens=1024), ram=10_000_000))


def deeper(folder: Path, n_layer: int) -> Path:
    """The bundled model with its last layer repeated: n_layer layers."""
    config = json.loads((folder / "config.json").read_text())
    last = config["num_hidden_layers"] - 1
    weights = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights |= load_file(shard)
        shard.unlink()
    pattern = re.compile(rf"model\.layers\.{last}\.(.*)")
    for name, tensor in list(weights.items()):
        if found := pattern.fullmatch(name):
            weights |= {f"model.layers.{i}.{found[1]}": tensor.clone() for i in range(last + 1, n_layer)}
    (folder / "model.safetensors.index.json").unlink()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": n_layer}))
    return folder


def peak_anonymous(folder: Path, file: Path) -> int:
    """Largest anonymous memory, in bytes, of a `verify` of its own. Pages of the mapped file can be dropped at any
    time and do not count."""
    program = """
import sys, threading
from quantkit.__main__ import main
peak, done = 0, threading.Event()
def anonymous():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())
before = None
import quantkit.job.stages
from quantkit.evaluation.oracles import hf
hf.available = lambda: False  # it would have a process of its own
thread = threading.Thread(target=watch, daemon=True); thread.start()
main(sys.argv[1:], standalone_mode=False)
done.set(); thread.join()
print(f"peak {peak}")
"""
    command = [
        sys.executable,
        "-c",
        program,
        "verify",
        file,
        "--reference",
        folder,
        "--tokens",
        "512",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, check=True, env=environment
    )
    return int(re.search(r"peak (\d+)", done.stdout)[1])


def test_memory_does_not_grow_with_the_number_of_layers(made, good, tiny, tmp_path):
    """12 more layers hold 105 MB as float32; the pass that visits them needs no more than the one that does not."""
    n_layer = 16
    folder = deeper(Path(shutil.copytree(tiny.path, tmp_path / "deep")), n_layer)
    model, config = Model(good), Checkpoint.open(folder).config
    assert config["num_hidden_layers"] == n_layer
    for name, tensor in list(model.tensors.items()):
        if name.startswith("blk.3."):
            for i in range(4, n_layer):
                new = name.replace("blk.3.", f"blk.{i}.")
                model.tensors[new] = type(tensor)(new, tensor.shape, tensor.qtype, tensor.data)
    model.key("block_count", n_layer)
    file = model.write(tmp_path / "deep.gguf")
    deep = peak_anonymous(folder, file)
    shallow = peak_anonymous(Path(tiny.path), good)
    if deep - shallow >= 25e6:  # what is compiled on a new machine takes 24 MB, once
        deep = peak_anonymous(folder, file)
    print(f"4 layers {shallow / 1e6:.0f} MB, {n_layer} layers {deep / 1e6:.0f} MB")
    assert deep - shallow < 25e6
