"""Importance equals sums taken by hand, and every quantizable tensor has it."""

import gc

import numpy as np
import pytest
import torch

from quantkit.calibration.collect import Accumulator, collect
from quantkit.calibration.state import PassState
from quantkit.encoding.jobs import GgmlEncoder, Output, quantize
from quantkit.errors import QuantkitError
from quantkit.models import family
from quantkit.planning.assign import make_plan
from quantkit.planning.recipe import Recipe
from quantkit.runtime.layers import feed_forward, rms_norm, route
from quantkit.runtime.room import Room
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_source
from quantkit.runtime.stream import stream


@pytest.fixture(scope="module")
def source(tiny):
    return CheckpointSource(tiny)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(10, 760, (3, 64), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def imatrix(source, tokens):
    with torch.inference_mode():
        return collect(source, tokens)


def test_every_matrix_of_both_layouts_is_measured(source, imatrix):
    for mla in ("split", "combined"):
        for spec in family.specs(source.config, mla):
            if len(spec.shape) > 1 and spec.layer is not None:
                entry = imatrix[spec.name]
                assert entry.in_sum2.shape == (spec.n_matrices, spec.n_in), spec.name
                assert np.isfinite(entry.in_sum2).all() and (entry.in_sum2 >= 0).all()


def test_experts_count_what_was_routed_to_them(source, tokens, imatrix):
    """Recompute the first MoE layer by hand: inputs, routing, and each expert's sums."""
    c = source.config
    with torch.inference_mode():
        steps = stream(source, tokens)
        next(steps).compute()
        before = []
        original = feed_forward.__globals__["route"]

        def spy(x, router, config, tokens=None):
            before.append(x.clone())
            return original(x, router, config, tokens)

        feed_forward.__globals__["route"] = spy
        try:
            next(steps).compute()
        finally:
            feed_forward.__globals__["route"] = original
        x = before[0]
        expert, _ = route(x, source.layer(1).router, c)
    entry = imatrix["blk.1.ffn_gate_exps.weight"]
    for e in range(c.n_expert):
        rows = x[(expert == e).any(1)].double()
        assert entry.counts[e] == len(rows)
        np.testing.assert_allclose(entry.in_sum2[e], rows.square().sum(0).numpy(), rtol=1e-4, atol=1e-6)
    assert entry.counts.sum() == tokens.numel() * c.n_used


def test_dense_counts_are_tokens(imatrix, tokens):
    assert imatrix["blk.0.attn_q_a.weight"].counts.tolist() == [tokens.numel()]
    assert imatrix["blk.2.attn_k_b.weight"].counts.tolist() == [tokens.numel()]


def test_a_step_that_was_left_out_is_noticed(source, tokens):
    steps = stream(source, tokens)
    next(steps)
    with pytest.raises(RuntimeError, match="layer 0 was not computed"):
        next(steps)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_stopped_pass_resumes_at_its_layer_with_identical_output(source, tokens, imatrix, tmp_path, layers):
    def stop(done: int) -> None:
        if done == layers:
            raise Stopped

    ran = []
    with torch.inference_mode():
        with pytest.raises(Stopped):
            collect(source, tokens, PassState(tmp_path / "state", "job"), progress=stop)
        resumed = collect(source, tokens, PassState(tmp_path / "state", "job"), progress=ran.append)
    assert ran[0] == layers and ran[1] == layers + 1
    assert list(resumed) == list(imatrix)
    for name, entry in imatrix.items():
        assert np.array_equal(resumed[name].in_sum2, entry.in_sum2), name
        assert np.array_equal(resumed[name].counts, entry.counts), name


def test_state_of_another_job_is_refused(source, tokens, tmp_path):
    with torch.inference_mode():
        collect(source, tokens, PassState(tmp_path / "state", "job"))
        with pytest.raises(QuantkitError, match="another calibration"):
            collect(source, tokens, PassState(tmp_path / "state", "another job"))


@pytest.mark.parametrize("file", ["hidden.safetensors", "layer-1.safetensors"])
@pytest.mark.parametrize("damage", [lambda data: b"junk", lambda data: data[:-8], lambda data: zeroed(data)])
def test_a_damaged_state_is_computed_again(source, tokens, tmp_path, capsys, file, damage):
    state = PassState(tmp_path / "state", "job")
    with torch.inference_mode():
        calm = collect(source, tokens, state)
        path = tmp_path / "state" / file
        path.write_bytes(damage(path.read_bytes()))
        again = collect(source, tokens, state)
    assert f"{file}: damaged" in capsys.readouterr().err
    assert all(np.array_equal(again[name].in_sum2, entry.in_sum2) for name, entry in calm.items())


def zeroed(data: bytes) -> bytes:
    """With a page that a crash left empty."""
    return data[: len(data) // 2] + bytes(512) + data[len(data) // 2 + 512 :]


def test_observing_changes_nothing(source, tokens):
    """A pass with observers takes the absorbed attention; its hidden states must be those of the plain pass."""
    with torch.inference_mode():
        plain = [step.compute().clone() for step in stream(source, tokens)]
        seen = [step.compute(Accumulator(step.layer, 16)).clone() for step in stream(source, tokens)]
    for a, b in zip(plain, seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_norm_is_what_experts_see(source):
    h = torch.randn(4, source.config.d) * 3
    x = rms_norm(h, torch.ones(source.config.d), 1e-6)
    torch.testing.assert_close(x.square().mean(-1), torch.ones(4), rtol=1e-4, atol=1e-4)


def test_hidden_states_on_disk_give_the_same_imatrix(source, tokens, imatrix, tmp_path):
    room = Room("disk", folder=tmp_path)
    with torch.inference_mode():
        found = collect(source, tokens, room=room)
    assert list(tmp_path.iterdir())  # the arrays were there
    for name, entry in imatrix.items():
        np.testing.assert_array_equal(found[name].in_sum2, entry.in_sum2, err_msg=name)
    del room
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_gguf_is_measured_as_its_checkpoint_is(tiny, source, tokens, imatrix, tmp_path):
    """A file of 8-bit weights: its own inputs differ from the original's by what 8 bits cost, and no more."""
    rules = tmp_path / "eight.toml"
    head = 'name = "eight"\ndescription = "d"\ntarget = "llama.cpp"\nmla = "split"\n'
    rules.write_text(head + '[[rules]]\nmatch = "*"\nqtype = "Q8_0"\nwhy = "w"\n')
    eight = make_plan(family.specs(source.config), Recipe.load(rules), model="tiny")
    out = tmp_path / "tiny.gguf"
    quantize(tiny, eight, {}, Output(out), GgmlEncoder())
    with torch.inference_mode():
        found = collect(open_source(out), tokens)
    assert found.keys() == imatrix.keys()
    for name, entry in imatrix.items():
        whole = found[name].in_sum2.sum(), entry.in_sum2.sum()
        assert whole[0] == pytest.approx(whole[1], rel=0.02), name
