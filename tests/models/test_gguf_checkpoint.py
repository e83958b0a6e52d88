"""A GGUF file as the original: the checkpoint that it was converted from, to the bit."""

import os
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.job.make import order_of
from quantkit.job.options import MakeOptions
from quantkit.job.plan import plan_model
from quantkit.job.stages import QuantizeOptions, quantize_model
from quantkit.models import family
from quantkit.models.gguf_checkpoint import GGUFCheckpoint
from quantkit.models.open import open_model, open_weights
from quantkit.models.tokenizer_metadata import read_tokenizer, tokenizer_metadata

RULE = '[[rules]]\nmatch = "*"\nqtype = "{}"\n'


@pytest.fixture(scope="module")
def plain(made, tmp_path_factory):
    """Makes a file of tiny-r1 in one type: in splits of 20 MB, or one file."""
    folder = tmp_path_factory.mktemp("plain")

    @cache
    def make(qtype: str, target: str = "llama.cpp", split: int | None = 20_000_000) -> Path:
        recipe = folder / f"{qtype}-{target.replace('/', '-')}.toml"
        recipe.write_text(RULE.format(qtype))
        plan = plan_model("tiny-r1", recipe, target)
        out = recipe.with_suffix(".gguf")
        how = QuantizeOptions(split_max_bytes=split, overwrite=True)
        return quantize_model(open_weights("tiny-r1"), plan, made / "imatrix.gguf", out, how)[0]

    return make


@pytest.mark.parametrize(("target", "split"), [("llama.cpp", 20_000_000), ("llama.cpp/combined", None)])
def test_all_weights_are_the_originals(target, split, plain, tiny, capsys):
    path = plain("F32", target, split)
    found = open_weights(str(path))
    assert isinstance(found, GGUFCheckpoint) and len(found.file.files) == (3 if split else 1)
    assert family.from_hf(found.config) == family.from_hf(open_weights("tiny-r1").config)
    shapes = family.source_shapes(family.from_hf(tiny.config))
    for name, shape in shapes.items():
        assert torch.equal(found.read(name), tiny.read(name)), name
        if len(shape) == 2:
            first, last = shape[0] // 3, shape[0] // 3 + 7
            assert torch.equal(found.read(name, first, last), tiny.read(name, first, last)), name
    assert "already" not in capsys.readouterr().err
    words, own = (tokenizer_metadata(folder, 768, family.PRE) for folder in (path, tiny.path))
    assert words.keys() == own.keys()
    text = "It was a dark and stormy night; 12345 !"
    encoded = [read_tokenizer(folder, family.PRE).encode(text).ids for folder in (path, tiny.path)]
    assert encoded[0] == encoded[1]


def test_it_makes_the_same_file(plain, made, tmp_path):
    """Name and plan of the original: nothing of the file depends on what the weights were read from."""
    path = plain("F32")
    assert open_model(str(path)).name == "F32-llama.cpp"
    plan = replace(plan_model(str(path), "1.58bit"), model="tiny-r1")
    assert plan.digest() == plan_model("tiny-r1", "1.58bit").digest()
    (file,) = quantize_model(open_weights(str(path)), plan, made / "imatrix.gguf", tmp_path / "tiny-r1-1.58bit.gguf")
    assert file.read_bytes() == (made / "tiny-r1-1.58bit.gguf").read_bytes()


def test_the_original_is_not_replaced(plain, made, tmp_path):
    """A file of its name in its folder, or fewer splits of it."""
    path = plain("F32")
    splits, how = GGUFFile.open(path).files, QuantizeOptions(overwrite=True)
    stats = [file.stat() for file in splits]
    plan, out = plan_model(str(path), "1.58bit"), path.with_name("F32-llama.cpp.gguf")
    with pytest.raises(
        QuantkitError, match=r"F32-llama.cpp-00001-of-00003.gguf is the original, which this file would"
    ):
        quantize_model(open_weights(str(path)), plan, made / "imatrix.gguf", out, how)
    assert len(splits) == 3 and [file.stat() for file in splits] == stats
    link = tmp_path / "m-BF16.gguf"
    link.symlink_to(made / "tiny-r1-1.58bit.gguf")
    with pytest.raises(QuantkitError, match=r"m-BF16.gguf is the original, which this file would replace; choose"):
        order_of(str(link), tmp_path, MakeOptions("BF16", device="cpu"))


def test_a_quantized_source_is_said_and_a_broken_one_refused(plain, capsys):
    path = plain("Q8_0")
    found = open_weights(str(path))
    assert "its weights are Q8_0 already: what that lost of the original stays lost" in capsys.readouterr().err
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    original = open_weights("tiny-r1").read(name)
    assert 0 < (found.read(name) - original).abs().max() < 0.02 * original.abs().max()
    with pytest.raises(QuantkitError, match=r"has 256 rows, 250:260 were asked for"):
        found.read(name, 250, 260)
    file = GGUFFile.open(path)
    del file.tensors["blk.2.ffn_up_exps.weight"]
    with pytest.raises(QuantkitError, match=r"no tensor 'blk.2.ffn_up_exps.weight': not a whole model"):
        GGUFCheckpoint(file, family.from_gguf(file.metadata))
    with pytest.raises(QuantkitError, match="neither a GGUF nor the folder of a model"):
        open_model(__file__)


def test_an_original_that_is_changed_is_noticed(plain, tmp_path):
    """While it is read, and by the next run: it is another original then."""
    path = Path(shutil.copy(plain("Q8_0", split=None), tmp_path / "original.gguf"))
    found, name = open_weights(str(path)), "model.layers.1.mlp.experts.3.down_proj.weight"
    found.read(name)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(QuantkitError, match=r"original.gguf: was changed since it was opened"):
        found.read(name)
    assert open_weights(str(path)).fingerprint() != found.fingerprint()
