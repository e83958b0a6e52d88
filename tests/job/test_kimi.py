"""Kimi-K2's two kinds of checkpoints, small and random, against transformers and llama.cpp."""

import shutil
from pathlib import Path

import gguf
import kimi_checkpoint
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import Calibration
from quantkit.errors import QuantkitError
from quantkit.evaluation.certify import certify
from quantkit.evaluation.configuration import divergence
from quantkit.evaluation.oracles import llama
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.job.hardware import hardware_report
from quantkit.job.make import make
from quantkit.job.options import MakeOptions
from quantkit.job.stages import VerifyOptions, verify_file
from quantkit.models import family
from quantkit.models.open import open_weights
from quantkit.models.tokenizer import PROBES, tokenize
from quantkit.models.tokenizer_metadata import read_tokenizer
from quantkit.planning.hardware import Machine
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.layers import rms_norm
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_gguf, open_source
from quantkit.runtime.stream import final_hidden

KINDS = [("fp8", False), ("fp8", True), ("int4", False)]
BETAS = (1.0, 1.0)
HEAD = 'name = "own"\ndescription = "own"\ntarget = "llama.cpp"\nmla = "split"\n'
TEXTS = {"calibration": Calibration(TextChoice(n_tokens=1024)), "evaluation": TextChoice(n_tokens=512)}


def rule(match: str, qtype: str) -> str:
    return f'[[rules]]\nmatch = "{match}"\nqtype = "{qtype}"\nwhy = "test"\n'


@torch.inference_mode()
def logits(source, tokens: torch.Tensor) -> torch.Tensor:
    norm, head = source.head()
    return head(rms_norm(final_hidden(source, tokens), norm, source.config.rms_eps)).float()


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(map(str, kind)))
def kimi(request, tmp_path_factory) -> tuple[Path, Path]:
    return kimi_checkpoint.write(tmp_path_factory.mktemp("kimi") / "kimi", *request.param)


@pytest.fixture(scope="module")
def int4(tmp_path_factory) -> Path:
    return kimi_checkpoint.write(tmp_path_factory.mktemp("int4") / "kimi", "int4")[0]


@pytest.fixture(scope="module")
def copied(int4, tmp_path_factory) -> Path:
    """Experts as Q4_0, the rest as it is: the file of the same numbers."""
    folder = tmp_path_factory.mktemp("copied")
    (folder / "r.toml").write_text(HEAD + rule("ffn_*_exps", "Q4_0") + rule("*", "F32"))
    return make(int4, folder / "out", MakeOptions(folder / "r.toml", encoder="ggml", **TEXTS))[0][0]


def test_reads_as_transformers_does(kimi):
    from transformers import DeepseekV3ForCausalLM

    folder, plain = kimi
    tokens = torch.randint(0, 700, (1, 96), generator=torch.Generator().manual_seed(1))
    model = DeepseekV3ForCausalLM.from_pretrained(plain, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(tokens, use_cache=False).logits
    with open_weights(folder) as checkpoint:
        ours = logits(CheckpointSource(checkpoint), tokens)
    assert theirs.std() > 0.3
    assert divergence(theirs, ours) < 1e-6


def test_a_copy_is_the_same_model_in_llama_cpp_with_its_flags(int4, copied, capsys):
    file = GGUFFile.open(copied)
    assert file.tensors["blk.1.ffn_up_exps.weight"].qtype == "Q4_0"
    tokens = torch.randint(0, 700, (1, 96), generator=torch.Generator().manual_seed(1))
    with open_weights(int4) as checkpoint:
        original = logits(CheckpointSource(checkpoint), tokens)
        for i in (0, 11):
            name = f"model.layers.1.mlp.experts.{i}.down_proj.weight"
            data = np.asarray(file.data("blk.1.ffn_down_exps.weight")).reshape(12, 256, -1)[i]
            decoded = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_0)
            assert np.array_equal(decoded, checkpoint.read(name).numpy())
    assert divergence(original, logits(open_source(copied), tokens)) < 1e-6
    if not llama.available():
        return
    theirs, without = (
        torch.from_numpy(llama.logits(copied, tokens.numpy(), cache="f32", flash_attention=0, yarn_betas=betas))
        for betas in (BETAS, None)
    )
    assert divergence(original, theirs) < 1e-4
    assert divergence(original, without) > 1e-3


def test_certify_compares_with_and_without_the_flags(int4, copied):
    found = {check.name: check for check in certify(copied, "llama.cpp", Checkpoint.open(int4)).checks}
    assert all(check.status != "fail" for check in found.values()), found
    assert "run it with --yarn-beta-fast 1 " in found["target"].detail
    assert found["config.json"].status == "pass" if "config.json" in found else True
    if llama.available():
        assert found["oracle llama.cpp --yarn-beta-fast 1 --yarn-beta-slow 1"].status == "pass"
        assert found["oracle llama.cpp"].detail.startswith("without --yarn-beta-fast 1")


def test_two_bits(kimi, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(HEAD + rule("ffn_*_exps", "IQ2_XXS") + rule("*", "Q8_0"))
    (path,), _ = make(kimi[0], tmp_path / "out", MakeOptions(recipe, **TEXTS))
    tokens = torch.randint(0, 700, (1, 64), generator=torch.Generator().manual_seed(1))
    ours = logits(open_source(path), tokens)
    if llama.available():
        theirs = torch.from_numpy(llama.logits(path, tokens.numpy(), yarn_betas=BETAS))
        assert divergence(ours, theirs) < 0.02


def test_bytes_of_its_layers_are_counted_once(int4):
    """A pass over INT4 reads what the shards hold, not a weight beside its words."""
    read = sum(CheckpointSource(Checkpoint.open(int4), "cpu", torch.float32).layer_bytes())
    held = (tensor for shard in int4.glob("*.safetensors") for tensor in load_file(shard).items())
    assert read == sum(tensor.nbytes for name, tensor in held if "model.layers." in name) > 0


def test_run_computes_as_the_original(int4, copied):
    """What `run` computes with: a prompt, then token by token, as a graph; and `verify` of the same file."""
    tokens = torch.randint(0, 700, (1, 48), generator=torch.Generator().manual_seed(2))
    engine = open_engine(open_gguf(copied, n_threads=1), 1, 64)
    rows = [engine.prefill(0, tokens[0, :40].tolist(), 0).clone()]
    rows += [engine.decode([0], [token])[0].clone() for token in tokens[0, 40:].tolist()]
    with open_weights(int4) as checkpoint:
        original = logits(CheckpointSource(checkpoint), tokens)[0, 39:]
        scores = verify_file(copied, checkpoint, "cpu", VerifyOptions(TEXTS["evaluation"]))
    assert divergence(original, torch.stack(rows)) < 1e-4  # activations of Q4_0 are rounded to 8 bits
    assert scores["kld_mean"] < 1e-6


def test_start_commands_have_the_flags(int4, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(HEAD + rule("*", "Q8_0"))
    report = hardware_report(int4, [str(recipe)], "llama.cpp", Machine(1 << 34), 512, 4)
    starts = [" ".join(line.split()) for line in report.replace("\\\n", " ").splitlines() if "llama-server" in line]
    assert starts and all(line.endswith("--yarn-beta-fast 1 --yarn-beta-slow 1") for line in starts)


def test_llama_cpp_cuts_texts_as_we_do(int4, copied):
    """Ours by Kimi's own expression, llama.cpp by its code for `kimi-k2`."""
    ours, rebuilt = read_tokenizer(int4, family.PRE), open_source(copied).tokenizer()
    texts = [
        *PROBES,
        "HelloWorld HTMLParser iPhone's I'LL we'Ve 1234567",
        "<|im_user|>hi<|im_end|>[EOS]x<|reserved_token_800|>",
    ]
    mine = [tokenize(ours, text) for text in texts]
    assert mine == [tokenize(rebuilt, text) for text in texts]
    assert mine[-1][0] == ours.token_to_id("<|im_user|>") and mine[-1][-1] == 800
    if llama.available():
        theirs = llama.tokenize(copied, texts)
        differ = [text for text, a, b in zip(texts, mine, theirs, strict=True) if a != b]
        assert not differ


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.splitlines()[:-3:2], r"ranks are not 0 to \d+, each once"),
        (lambda text: [text.replace(" 7\n", " 7 7\n")], r"line 8: '.*' is not base64 and a rank"),
        (lambda text: ["!" + text], r"line 1: '!.*' is not base64"),
    ],
)
def test_a_broken_vocabulary_is_named(change, words, int4, tmp_path):
    folder = Path(shutil.copytree(int4, tmp_path / "m"))
    path = folder / "tiktoken.model"
    path.write_text("\n".join(change(path.read_text())))
    with pytest.raises(QuantkitError, match=rf"tiktoken\.model: {words}"):
        open_weights(folder)
