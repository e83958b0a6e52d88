"""Assembly of GGUF tensors from the checkpoint, piece by piece as jobs read it."""

import pytest
import torch

from quantkit.models import family
from quantkit.models.config import ModelConfig


@pytest.fixture(scope="module")
def config(tiny) -> ModelConfig:
    return family.from_hf(tiny.config)


def whole(tiny, config, spec) -> torch.Tensor:
    parts = [family.read(tiny, config, spec, start, stop) for start, stop in family.slices(spec)]
    return torch.cat(parts).view(spec.shape)


def by_name(config, mla="split"):
    return {spec.name: spec for spec in family.specs(config, mla)}


def test_k_b_is_transposed_per_head_and_v_b_is_not(tiny, config):
    specs = by_name(config)
    kv_b = tiny.read("model.layers.2.self_attn.kv_b_proj.weight")
    heads = kv_b.view(config.n_head, config.qk_nope + config.v_head, config.kv_lora)
    k_b, v_b = (whole(tiny, config, specs[f"blk.2.attn_{name}.weight"]) for name in ("k_b", "v_b"))
    for head in range(config.n_head):
        assert torch.equal(k_b[head], heads[head, : config.qk_nope].T)
        assert torch.equal(v_b[head], heads[head, config.qk_nope :])


def test_experts_are_stacked_in_order(tiny, config):
    spec = by_name(config)["blk.3.ffn_down_exps.weight"]
    stack = whole(tiny, config, spec)
    for expert in (0, 7, 15):
        assert torch.equal(stack[expert], tiny.read(f"model.layers.3.mlp.experts.{expert}.down_proj.weight"))


def test_slices_cover_every_row_once_and_stay_in_a_matrix(config):
    for spec in family.specs(config):
        per_matrix = spec.n_rows // spec.n_matrices
        slices = list(family.slices(spec))
        assert [start for start, _ in slices] == [0, *(stop for _, stop in slices[:-1])]
        assert slices[-1][1] == spec.n_rows
        assert all(start // per_matrix == (stop - 1) // per_matrix for start, stop in slices)


def test_slices_of_a_large_matrix_are_bounded(config):
    spec = family.specs(config)[0]
    big = type(spec)("token_embd.weight", (129280, 7168), "token_embd", None, spec.sources)
    assert max((stop - start) * 7168 for start, stop in family.slices(big)) <= family.SLICE_WEIGHTS


def test_mtp_layer_is_not_read(tiny, config):
    used = family.source_shapes(config)
    assert any(name.startswith("model.layers.4.") for name in tiny.tensors)
    assert not any(name.startswith("model.layers.4.") for name in used)
