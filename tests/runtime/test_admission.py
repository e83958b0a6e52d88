"""What ggml would answer by ending the process is refused when a file is opened, in one line that names the tensor."""

import ctypes
import random

import gguf
import hostile_gguf
import pytest
import torch
from hostile_gguf import CONFIG, TYPES, noise

from quantkit.errors import QuantkitError
from quantkit.evaluation.certify import certify
from quantkit.formats.gguf_values import U32, I32List
from quantkit.ggml.library import library
from quantkit.ggml.quants import dequantize
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.sources.admission import MATRICES
from quantkit.runtime.sources.gguf import open_gguf, open_source

VECTORS = ("blk.0.attn_norm.weight", "blk.1.exp_probs_b.bias", "output_norm.weight", "blk.1.ffn_gate_inp.weight")


class CpuTraits(ctypes.Structure):
    """struct ggml_type_traits_cpu."""

    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


def test_the_table_is_what_ggml_has_kernels_for():
    cpu = ctypes.CDLL(str(library().folder / "libggml-cpu.so")).ggml_get_type_traits_cpu
    cpu.restype, cpu.argtypes = ctypes.POINTER(CpuTraits), [ctypes.c_int]
    for qtype in gguf.GGMLQuantizationType:
        decodes = qtype.name == "F32" or bool(library().ggml_get_type_traits(int(qtype)).contents.to_float)
        multiplies = bool(cpu(int(qtype)).contents.vec_dot)
        assert (qtype.name in MATRICES) == (decodes and multiplies), qtype.name


@pytest.mark.parametrize("qtype", TYPES)
def test_matrices_of_every_type_are_computed_or_refused(tmp_path, qtype):
    model = hostile_gguf.model()
    changed = [name for name, tensor in model.tensors.items() if tensor.qtype == "F16"]
    for name in changed:
        model.retype(name, qtype)
    path = model.write(tmp_path / "m.gguf")
    if qtype in MATRICES:
        assert {logits.shape[-1] for logits in hostile_gguf.compute(path, [5, 6, 7]).values()} == {CONFIG.n_vocab}
    else:
        with pytest.raises(QuantkitError, match=rf"m.gguf: tensor token_embd.weight is {qtype}, .* it may be IQ1_S"):
            open_gguf(path)
        weights = next(check for check in certify(path, "llama.cpp", oracle=False).checks if check.name == "weights")
        assert weights.status == "fail" and "no decoder" in weights.detail


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("qtype", ["F16", "BF16", "F64"])
def test_vectors_and_routers_are_f32(tmp_path, name, qtype):
    model = hostile_gguf.model()
    model.retype(name, qtype)
    with pytest.raises(QuantkitError, match=f"{name} is {qtype}, which is not computed; it may be F32"):
        open_source(model.write(tmp_path / "m.gguf"))


def test_any_bytes_are_computed(tmp_path):
    """NaN and infinite scales, every code: nonsense, but no crash."""
    model = hostile_gguf.model()
    model.fill = noise
    for qtype in ("IQ1_S", "IQ2_XXS", "IQ3_S", "Q4_K", "BF16"):
        for name in model.tensors:
            if len(model.tensors[name].shape) > 1 and model.tensors[name].qtype != "F32":
                model.retype(name, qtype)
        hostile_gguf.compute(model.write(tmp_path / "m.gguf"), [5, 6, 7])


@pytest.mark.parametrize("bad", [-1, CONFIG.n_vocab, 1 << 20])
def test_ids_beyond_the_embedding_are_refused_by_every_engine(tmp_path, bad):
    path = hostile_gguf.model().write(tmp_path / "m.gguf")
    engine = open_engine(open_gguf(path, n_threads=1), 1, 128)
    for ids in ([5, bad], [5, bad] * 40):
        with pytest.raises(QuantkitError, match=f"token id {bad} is beyond the model's 300 tokens"):
            engine.prefill(0, ids, 0)
    engine.prefill(0, [5, 6], 0)
    with pytest.raises(QuantkitError, match="token id"):
        engine.decode([0], [bad])
    with pytest.raises(QuantkitError, match="token id"):
        open_source(path).embed(torch.tensor([[5, bad]]))


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    model = hostile_gguf.model()
    model.metadata["tokenizer.ggml.tokens"] += ["<one more>"]
    model.metadata["tokenizer.ggml.token_type"] = I32List([1] * 301)
    with pytest.raises(QuantkitError, match="the tokenizer has 301 tokens, the embedding 300 rows"):
        open_gguf(model.write(tmp_path / "m.gguf"))
    model = hostile_gguf.model()
    model.metadata["tokenizer.ggml.bos_token_id"] = U32(300)
    with pytest.raises(QuantkitError, match="bos_token_id 300 is beyond"):
        open_gguf(model.write(tmp_path / "m.gguf"))


def test_what_belongs_to_no_model_is_refused(tmp_path):
    model = hostile_gguf.model()
    model.tensors["blk.9.attn_q.weight"] = hostile_gguf.PlainTensor("blk.9.attn_q.weight", (2, 2, 2, 2), "F32")
    with pytest.raises(QuantkitError, match=r"blk\.9\.attn_q\.weight belongs to no deepseek2 model"):
        open_gguf(model.write(tmp_path / "m.gguf"))
    config = hostile_gguf.replace(CONFIG, n_group=4, n_group_used=2)
    with pytest.raises(QuantkitError, match="groups of one expert"):
        open_gguf(hostile_gguf.model(config).write(tmp_path / "m.gguf"))


def test_types_without_a_decoder_are_an_error_of_their_own():
    with pytest.raises(QuantkitError, match="no decoder for Q8_K"):
        dequantize("Q8_K", hostile_gguf.np.zeros((1, 292), "u1"), 256)


def test_the_end_of_the_process_is_a_finding(tmp_path):
    child = hostile_gguf.Child()
    good = hostile_gguf.model().write(tmp_path / "m.gguf")
    child.compute(good, [5, 6], 60)
    with pytest.raises(QuantkitError, match="token id 300"):
        child.compute(good, [300], 60)
    with pytest.raises(RuntimeError, match=r"TypeError|ValueError"):
        child.compute(good, "no ids", 60)
    child.process.kill()
    child.process.wait()
    child.compute(good, hostile_gguf.ids(random.Random(1)), 60)  # a new one
    child.close()
