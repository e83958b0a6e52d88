"""Ways in which a GGUF file goes wrong, applied to a good one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.formats.gguf_encode import PlainTensor
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.gguf_values import F32, U32, I32List
from quantkit.formats.gguf_writer import GGUFWriter
from quantkit.ggml import quants


@dataclass(frozen=True)
class Tensor(PlainTensor):
    """A tensor to be written: data uint8 [rows, row_bytes]."""

    data: np.ndarray

    @property
    def matrices(self) -> np.ndarray:
        """A copy of the data, [n_matrices, rows, row_bytes]."""
        return self.data.reshape(self.shape[0], -1, self.row_bytes).copy()

    def values(self) -> np.ndarray:
        return quants.dequantize(self.qtype, self.data, self.shape[-1]).reshape(self.shape)

    def with_data(self, data: np.ndarray) -> "Tensor":
        return replace(self, data=np.ascontiguousarray(data).reshape(-1, self.row_bytes))

    def with_values(self, values: np.ndarray, qtype: str | None = None) -> "Tensor":
        made = replace(self, qtype=qtype or self.qtype, shape=values.shape)
        rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]), dtype=np.float32)
        weights = np.ones(rows.shape[1], np.float32) if quants.requires_importance(made.qtype) else None
        return made.with_data(quants.quantize(made.qtype, rows, weights))


class Model:
    """A file in memory: metadata and tensors, to be changed and written again."""

    def __init__(self, path: Path):
        file = GGUFFile.open(path)
        self.metadata: dict[str, Any] = {key: _typed(value) for key, value in file.metadata.items()}
        self.tensors = {
            name: Tensor(name, tuple(t.shape), t.qtype, file.data(name).reshape(-1, t.row_bytes).copy())
            for name, t in file.tensors.items()
        }

    def write(self, path: Path, split_max_bytes: int | None = None) -> Path:
        tensors = list(self.tensors.values())
        with GGUFWriter.open(path, tensors, self.metadata, fingerprint={}, split_max_bytes=split_max_bytes) as out:
            for tensor in tensors:
                out.write(tensor.name, 0, tensor.data)
        return out.files[0]

    def key(self, name: str, value: Any = None) -> None:
        """Set `deepseek2.name`, or drop it."""
        self.metadata.pop(f"deepseek2.{name}") if value is None else self.metadata.update({f"deepseek2.{name}": value})

    def change(self, name: str, how: Callable[[Tensor], Tensor]) -> None:
        self.tensors[name] = how(self.tensors[name])

    def rename(self, old: str, new: str) -> None:
        self.tensors = {
            new if name == old else name: replace(t, name=new) if name == old else t for name, t in self.tensors.items()
        }


def _typed(value: Any) -> Any:
    """Plain ints are written as u32 and floats as f32, which is what these files hold; token types are i32."""
    return I32List(value) if isinstance(value, list) and value and type(value[0]) is int else value


def swap(a: int, b: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        data = tensor.matrices
        data[[a, b]] = data[[b, a]]
        return tensor.with_data(data)

    return change


def on_matrix(index: int, how: Callable[[np.ndarray], None]) -> Callable[[Tensor], Tensor]:
    """how changes the bytes [rows, row_bytes] of one matrix in place."""

    def change(tensor: Tensor) -> Tensor:
        data = tensor.matrices
        how(data[index])
        return tensor.with_data(data)

    return change


def nan_scale(data: np.ndarray) -> None:
    """The fp16 d of the first IQ1_S block becomes NaN."""
    data[0, :2] = np.array([np.nan], "<f2").view(np.uint8)


def zero(data: np.ndarray) -> None:
    data[:] = 0


def on_values(how: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.with_values(how(tensor.values()))


def from_value(index: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values.flat[index] = value
        return values

    return change


def untransposed_k_b(values: np.ndarray) -> np.ndarray:
    """k_b [n_head, kv_lora, qk_nope] as a converter that forgets to transpose would fill it."""
    return values.transpose(0, 2, 1).reshape(values.shape)


def swap_tensors(model: Model, a: str, b: str) -> None:
    one, two = model.tensors[a], model.tensors[b]
    model.tensors[a], model.tensors[b] = replace(two, name=a), replace(one, name=b)


def swap_merges(model: Model) -> None:
    merges = list(model.metadata["tokenizer.ggml.merges"])
    merges[10], merges[200] = merges[200], merges[10]
    model.metadata["tokenizer.ggml.merges"] = merges


def looping(model: Model) -> None:
    """All tokens look alike to it, so that each is followed by the same."""
    same = model.tensors["token_embd.weight"].values()
    same[:] = same[50]
    model.change("token_embd.weight", lambda tensor: tensor.with_values(same))


def dropped_experts(model: Model) -> None:
    """One expert gives zeros, another one is never chosen."""
    model.change("blk.2.ffn_down_exps.weight", on_matrix(3, zero))
    bias = model.tensors["blk.1.exp_probs_b.bias"]
    values = bias.values()
    values[5] = -100
    model.change("blk.1.exp_probs_b.bias", lambda tensor: tensor.with_values(values))


def combined_too(model: Model) -> None:
    """Both MLA layouts in one file."""
    shape = model.tensors["blk.0.attn_k_b.weight"].shape
    rows = np.zeros((shape[0] * shape[2] * 2, shape[1]), np.float32)
    tensor = Tensor("blk.0.attn_kv_b.weight", rows.shape, "Q8_0", np.empty(0, np.uint8))
    model.tensors[tensor.name] = tensor.with_values(rows)


DOWN, GATE, UP = (f"blk.2.ffn_{part}_exps.weight" for part in ("down", "gate", "up"))


def _meta(key: str, value: Any = None) -> Callable[[Model], None]:
    return lambda model: model.key(key, value)


def _tokens(key: str, value: Any) -> Callable[[Model], None]:
    return lambda model: model.metadata.update({f"tokenizer.ggml.{key}": value})


def _change(name: str, how: Callable[[Tensor], Tensor]) -> Callable[[Model], None]:
    return lambda model: model.change(name, how)


# What is done, the check that must fail, and what its reason must name.
MUTATIONS: dict[str, tuple[Callable[[Model], Any], str, str]] = {
    "swapped experts": (_change(DOWN, swap(3, 5)), "weights", f"{DOWN} expert 3: holds the weights of 5: wrong order"),
    "experts shifted by one": (
        _change(GATE, lambda t: t.with_data(np.roll(t.matrices, 1, 0))),
        "weights",
        f"{GATE} expert 1: holds the weights of 0",
    ),
    "zeroed expert": (_change(UP, on_matrix(7, zero)), "weights", f"{UP} expert 7: all zeros"),
    "NaN scale": (_change(DOWN, on_matrix(2, nan_scale)), "weights", f"{DOWN} expert 2: 256 weights are NaN"),
    "infinite norm": (
        _change("blk.1.attn_norm.weight", on_values(from_value(5, np.inf))),
        "weights",
        "blk.1.attn_norm.weight: 1 weights are NaN or infinite",
    ),
    "doubled expert": (
        _change(UP, on_matrix(1, lambda d: d.__setitem__((slice(None), slice(0, 2)), _doubled(d)))),
        "weights",
        f"{UP} expert 1: scaled by",
    ),
    "k_b not transposed": (
        _change("blk.1.attn_k_b.weight", on_values(untransposed_k_b)),
        "weights",
        "blk.1.attn_k_b.weight head 0: stored transposed",
    ),
    "heads of v_b swapped": (
        _change("blk.0.attn_v_b.weight", swap(0, 1)),
        "weights",
        "blk.0.attn_v_b.weight head 0: holds the weights of 1",
    ),
    "gate and up swapped": (
        lambda m: swap_tensors(m, GATE, UP),
        "weights",
        f"{GATE} expert 0: holds the weights of {UP}",
    ),
    "layers swapped": (
        lambda m: swap_tensors(m, "blk.1.attn_output.weight", "blk.3.attn_output.weight"),
        "weights",
        "blk.1.attn_output.weight: holds the weights of blk.3.attn_output.weight",
    ),
    "router rows permuted": (
        _change("blk.2.ffn_gate_inp.weight", on_values(lambda v: np.roll(v, 1, 0))),
        "weights",
        "blk.2.ffn_gate_inp.weight: rows in wrong order: row 0 holds row 15",
    ),
    "embeddings shifted by a row": (
        _change("token_embd.weight", on_values(lambda v: np.roll(v, 1, 0))),
        "weights",
        "token_embd.weight: rows in wrong order",
    ),
    "router bias lost": (
        _change("blk.2.exp_probs_b.bias", on_values(np.zeros_like)),
        "weights",
        "blk.2.exp_probs_b.bias: all zeros",
    ),
    "FP8 scales forgotten": (
        _change("blk.1.attn_q_a.weight", on_values(lambda v: v * 30)),
        "weights",
        "blk.1.attn_q_a.weight: scaled by 30",
    ),
    "softmax gating": (_meta("expert_gating_func", U32(1)), "metadata", "expert_gating_func is 1, must be 2"),
    "gating key missing": (
        _meta("expert_gating_func"),
        "metadata",
        "expert_gating_func is missing, must be 2: llama.cpp would",
    ),
    "YaRN multiplier missing": (
        _meta("rope.scaling.yarn_log_multiplier"),
        "metadata",
        "yarn_log_multiplier is missing",
    ),
    "YaRN missing": (_meta("rope.scaling.type"), "metadata", "rope.scaling.type is missing, must be yarn"),
    "expert weights not normalised": (_meta("expert_weights_norm", False), "metadata", "expert_weights_norm is False"),
    "expert scale of another model": (
        _meta("expert_weights_scale", F32(16.0)),
        "metadata",
        "expert_weights_scale is 16",
    ),
    "groups missing": (_meta("expert_group_used_count"), "metadata", "expert_group_used_count is missing"),
    "key lengths of the old layout": (_meta("attention.key_length_mla"), "metadata", "key_length_mla is missing"),
    "heads of the old layout": (_meta("attention.head_count_kv", U32(4)), "metadata", "head_count_kv is 4, must be 1"),
    "rope base": (_meta("rope.freq_base", F32(50000.0)), "metadata", "rope.freq_base is 50000"),
    "expert count missing": (_meta("expert_count"), "metadata", "expert_count is missing: llama.cpp refuses"),
    "tensor missing": (lambda m: m.tensors.pop(DOWN), "tensors", f"{DOWN} is missing"),
    "tensor misnamed": (lambda m: m.rename(UP, UP.replace("_exps", "_experts")), "tensors", "belongs to no deepseek2"),
    "both MLA layouts": (combined_too, "tensors", "attn_kv_b and attn_k_b/attn_v_b in one file"),
    "matrix stored transposed": (
        _change("blk.0.attn_kv_a_mqa.weight", lambda t: t.with_values(t.values().T, "F16")),
        "tensors",
        "blk.0.attn_kv_a_mqa.weight has shape",
    ),
    "square matrix stored transposed": (
        _change("blk.0.attn_q_a.weight", on_values(np.transpose)),
        "weights",
        "blk.0.attn_q_a.weight: stored transposed",
    ),
    "router quantized": (
        _change("blk.1.ffn_gate_inp.weight", lambda t: t.with_values(t.values(), "Q8_0")),
        "tensors",
        "blk.1.ffn_gate_inp.weight is Q8_0, must be F32",
    ),
    "IQ2_XXS experts": (
        _change(GATE, lambda t: t.with_values(t.values(), "IQ2_XXS")),
        "types",
        f"{GATE}: IQ2_XXS is refused",
    ),
    "IQ3_S experts": (
        _change(DOWN, lambda t: t.with_values(t.values(), "IQ3_S")),
        "types",
        f"{DOWN}: IQ3_S is refused",
    ),
    "merges in another order": (swap_merges, "tokenizer", "merges[10]"),
    "merges cut off": (
        lambda m: m.metadata.update({"tokenizer.ggml.merges": m.metadata["tokenizer.ggml.merges"][:-50]}),
        "tokenizer",
        "tokenizer.ggml.merges has",
    ),
    "another pre-tokenizer": (_tokens("pre", "llama-bpe"), "tokenizer", "tokenizer.ggml.pre is 'llama-bpe'"),
    "BOS is another token": (_tokens("bos_token_id", U32(7)), "tokenizer", "bos_token_id is 7, in the original 0"),
    "no BOS": (_tokens("add_bos_token", False), "tokenizer", "add_bos_token is False, in the original True"),
    "lost template": (
        lambda m: m.metadata.pop("tokenizer.chat_template"),
        "tokenizer",
        "tokenizer.chat_template is missing",
    ),
    "lost end of turn": (
        lambda m: m.metadata.pop("tokenizer.ggml.eos_token_id"),
        "tokenizer",
        "tokenizer.ggml.eos_token_id is missing or no token",
    ),
    "token renamed": (
        lambda m: m.metadata["tokenizer.ggml.tokens"].__setitem__(5, "?!"),
        "tokenizer",
        "tokenizer.ggml.tokens[5]",
    ),
    "a file that loops": (looping, "weights", "token_embd.weight: "),
    "dropped experts": (dropped_experts, "weights", "blk.2.ffn_down_exps.weight expert 3: all zeros"),
}


def _doubled(data: np.ndarray) -> np.ndarray:
    """Twice the fp16 d of every row's first block, as bytes."""
    return (np.ascontiguousarray(data[:, :2]).view("<f2") * np.float16(2)).view(np.uint8)
