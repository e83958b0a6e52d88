"""Recovery on tiny-r1: gradients are the whole model's, the divergence falls, sizes stay, and a stopped run ends at the
same bytes."""

import os
import socket
import subprocess
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from quantkit.calibration.corpus import TextChoice, cut
from quantkit.calibration.spill import Spill
from quantkit.encoding.jobs import GgmlEncoder, Output, quantize
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.job.recovery.options import RecoverOptions, Sizes
from quantkit.job.recovery.recover import Recovery, open_original, recover
from quantkit.job.recovery.step import TrainingStep
from quantkit.job.recovery.text import Split
from quantkit.job.recovery.tuned import Tuned, is_norm, moving
from quantkit.job.recovery.twin import Twin
from quantkit.job.recovery.values import Update, Values
from quantkit.models import family
from quantkit.planning.assign import make_plan
from quantkit.planning.recipe import Recipe
from quantkit.runtime.experts.streamed import expert_names
from quantkit.runtime.layers import attention, rms_norm, route
from quantkit.runtime.rope import angles
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import Dequantized
from quantkit.runtime.stream import final_hidden, head_logits

HOW = RecoverOptions(steps=4, tokens=512, lr=3e-3, every=2)
SHORT = replace(HOW, steps=2, every=1)


@pytest.fixture(scope="module")
def source(tiny):
    return CheckpointSource(tiny)


COARSE = """
name = "coarse"
description = "Coarse types outside of the experts too."
target = "llama.cpp"
rules = [
    { match = "token_embd", qtype = "Q4_K", why = "to test" },
    { match = "output", qtype = "Q6_K", why = "to test" },
    { match = "attn_k_b", qtype = "Q8_0", why = "to test" },
    { match = "*", qtype = "Q2_K", why = "to test" },
]
"""


def plan_for(source, target="llama.cpp", recipe=None):
    mla = "combined" if "combined" in target else "split"
    return make_plan(family.specs(source.config, mla), recipe or Recipe.load("2.51bit"), target, model="tiny")


@pytest.fixture(scope="module")
def base(tiny, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("base") / "tiny.gguf"
    quantize(tiny, plan_for(source), {}, Output(out, split_max_bytes=2_000_000), GgmlEncoder())
    return out.with_name("tiny-00001-of-00003.gguf")


@pytest.fixture(scope="module")
def chunks(source):
    choice = TextChoice(n_tokens=24 * 64, chunk=64)
    return cut(choice.corpus("calibration"), source, choice)


@pytest.fixture(scope="module")
def recovered(base, source, chunks, tmp_path_factory):
    return recover(base, tmp_path_factory.mktemp("out"), source, chunks, "job", HOW)


def plain_gradients(student, original, tokens):
    """Of the mean divergence, by everything that moves, in one graph; routed experts written down once more."""
    c, wanted = student.config, {}
    turns, h = angles(c, torch.arange(tokens.shape[1])), student.embed(tokens)
    for layer in range(c.n_layer):
        weights, leaves = student.opened(layer)
        wanted |= leaves
        h = h + attention(h, weights, c, turns)
        x = rms_norm(h, weights.ffn_norm, c.rms_eps).flatten(0, 1)
        out = 0 if weights.feed is None else weights.feed(x)
        if weights.router is not None:
            expert, share = route(x, weights.router, c)
            for e in range(c.n_expert):
                gate, up, down = matrices = [t.detach().requires_grad_() for t in weights.experts.read(e)]
                wanted |= dict(zip(((name, e) for name in expert_names(layer)), matrices, strict=True))
                made = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
                out = out + made * (share * (expert == e)).sum(1, keepdim=True)
        h = h + out.view_as(h)
    head, leaves = student.opened_head()
    wanted |= leaves
    log_q = head_logits(student, head, h).log_softmax(-1)
    log_p = head_logits(original, original.head(), final_hidden(original, tokens)).log_softmax(-1).detach()
    loss = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    found, by_delta = torch.autograd.grad(loss, list(wanted.values())), {}
    for (name, made), gradient in zip(wanted.items(), found, strict=True):
        of_log, of_expert = (gradient * made.detach()), isinstance(name, tuple)
        if of_expert or name in student.tuned.values.scales:
            gradient = of_log.unflatten(-1, (-1, 256)).sum(-1)
        elif is_norm(student.tuned.specs[name]):
            gradient = of_log
        if of_expert:
            by_delta.setdefault(name[0], []).append(gradient)
        else:
            by_delta[name] = gradient
    stacks = {name: torch.stack(parts) for name, parts in by_delta.items() if isinstance(parts, list)}
    return float(loss.detach()), by_delta | stacks


@pytest.mark.parametrize(
    ("target", "recipe"), [("llama.cpp", None), ("llama.cpp/combined", None), ("llama.cpp", Recipe.parse(COARSE, ""))]
)
def test_gradients_are_those_of_the_whole_model(tiny, source, chunks, tmp_path, monkeypatch, target, recipe):
    """In the second step, when everything has moved; in tiles that do not divide the text."""
    path = tmp_path / "tiny.gguf"
    quantize(tiny, plan_for(source, target, recipe), {}, Output(path), GgmlEncoder())
    work = Recovery(path, source, chunks, replace(SHORT, tokens=256), tmp_path / "state", "job")
    aim, seen, losses, update = work._target(), {}, [], Values.update
    monkeypatch.setattr(Values, "update", lambda v, layer, g, how: (seen.update(g), update(v, layer, g, how)))
    for name, size in {"ATTENTION_TOKENS": 1, "FEED_TOKENS": 50, "EXPERT_TOKENS": 7, "HEAD_ELEMENTS": 768 * 11}.items():
        monkeypatch.setattr(f"quantkit.runtime.backward.{name}", size)
    for number, batch in enumerate(work.batches):
        now = work._chunks(batch)
        loss, expected = plain_gradients(work.student, source, work.tokens[now])
        step = TrainingStep(work.student, work.tokens[now], now, aim, work.room, Spill(tmp_path / str(number), "job"))
        losses.append((step.run(work.how.update(number), lambda amount=1, at="", before=False: None), loss))
    assert set(seen) == set(work.values.layer_of) == set(expected)
    assert {"ffn_gate_inp", "attn_q_a_norm", "ffn_norm", "output"} <= {work.student.tuned.specs[n].role for n in seen}
    assert any("attn_output" in name for name in work.values.scales) == bool(recipe)
    assert {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"} <= {work.student.tuned.specs[n].role for n in seen}
    assert any("attn_kv_b" in name if "combined" in target else "attn_v_b" in name for name in seen)
    errors = {n: float(((seen[n].view_as(g) - g).norm() / g.norm()).detach()) for n, g in expected.items()}
    assert max(errors.values()) < 1e-4, errors
    for found, loss in losses:
        assert found == pytest.approx(loss, rel=1e-4)
    assert losses[1][1] != losses[0][1]


def test_scales_of_coarse_matrices_move_and_their_codes_stay(tiny, source, chunks, tmp_path):
    base = tmp_path / "tiny.gguf"
    quantize(tiny, plan_for(source, recipe=Recipe.parse(COARSE, "")), {}, Output(base), GgmlEncoder())
    (tmp_path / "out").mkdir()
    files, gained = recover(base, tmp_path / "out", source, chunks, "job", HOW)
    assert gained["kld_after"] < 0.98 * gained["kld_before"]
    before, after = GGUFFile.open(base), GGUFFile.open(files[0])
    name = "blk.1.attn_output.weight"
    old, new = (np.asarray(file.data(name)).reshape(-1, 84) for file in (before, after))  # Q2_K: codes; d, dmin
    assert not np.array_equal(old[:, 80:], new[:, 80:]) and np.array_equal(old[:, :80], new[:, :80])
    experts = "blk.1.ffn_down_exps.weight"
    old, new = (np.asarray(file.data(experts)).reshape(-1, 84) for file in (before, after))
    assert not np.array_equal(old[:, 80:], new[:, 80:]) and np.array_equal(old[:, :80], new[:, :80])


def test_experts_stay_where_the_disk_has_no_room_for_their_scales(tiny, source, base, chunks, tmp_path, monkeypatch):
    """And go on staying when it has."""
    plan, text = plan_for(source), TextChoice(n_tokens=4096)
    sizes = Sizes.of(source.config, plan.by_name, SHORT)
    least = sizes.needs(2 * SHORT.steps * SHORT.tokens, plan.n_bytes, tmp_path) - 1
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=least))
        how = open_original(tiny, plan, "cpu", text, tmp_path, SHORT)[1]
        assert how == replace(SHORT, moves="matrices")
        stop(patch, *PLACES["best"])
        with pytest.raises(Stopped):
            recover(base, tmp_path, source, chunks, "job", how)
    assert open_original(tiny, plan, "cpu", text, tmp_path, SHORT)[1] == SHORT
    files, gained = recover(base, tmp_path, source, chunks, "job", SHORT)
    assert gained["moves"] == "matrices"
    before, after = GGUFFile.open(base), GGUFFile.open(files[0])
    changed = {name for name in before.tensors if not np.array_equal(before.data(name), after.data(name))}
    assert changed and not any("_exps" in name for name in changed)


def test_divergence_falls_and_not_a_byte_is_added(base, recovered):
    files, gained = recovered
    assert gained["kld_after"] < 0.98 * gained["kld_before"] and gained["steps"] > 0
    before, after = GGUFFile.open(base), GGUFFile.open(files[0])
    assert [file.name for file in after.files] == [file.name for file in before.files]
    assert [file.stat().st_size for file in after.files] == [file.stat().st_size for file in before.files]
    assert before.metadata == after.metadata
    changed = {name for name in before.tensors if not np.array_equal(before.data(name), after.data(name))}
    config = family.from_gguf(before.metadata)
    specs = [spec for some in moving(config, before.tensors, "experts").values() for spec in some]
    assert changed == {spec.name for spec in specs} and "token_embd.weight" not in changed
    expected = {"attn_norm", "ffn_gate_inp", "attn_output", "attn_k_b", "ffn_down_shexp", "ffn_up_exps", "output"}
    assert expected <= {spec.role for spec in specs}


def test_only_vectors_move_if_that_is_asked_for(base, source, chunks, tmp_path):
    how = replace(HOW, steps=3, moves="vectors")
    files, gained = recover(base, tmp_path, source, chunks, "job", how)
    assert gained["kld_after"] < gained["kld_before"]
    before, after = GGUFFile.open(base), GGUFFile.open(files[0])
    changed = {name for name in before.tensors if not np.array_equal(before.data(name), after.data(name))}
    assert changed == {n for n in before.tensors if n.endswith(("_norm.weight", "ffn_gate_inp.weight"))}


class Stopped(Exception):
    pass


def stop(monkeypatch, owner, method, matches, late):
    """The first call that matches stops the run, before or after it does its work."""
    original = getattr(owner, method)

    def stopping(self, *args):
        if late:
            original(self, *args)
        if matches(self, *args):
            raise Stopped
        if not late:
            original(self, *args)

    monkeypatch.setattr(owner, method, stopping)


def spilled(folder, name):
    return lambda spill, found, _: spill.folder.name == folder and found == name


def in_step(value, name):
    """A layer of the second step: its first left values."""
    return lambda values, layer, *_: layer == value and (values.folder / name).exists()


PLACES = {
    "original": (Spill, "put", spilled("original", "inputs-002"), False),
    "forward": (Spill, "put", spilled("step-001", "inputs-002"), True),
    "head": (Spill, "put", spilled("step-000", "gradient-004"), False),
    "moved, gradient not saved": (Spill, "put", spilled("step-001", "gradient-002"), False),
    "gradient saved, values not in place": (Values, "commit", in_step(2, "delta-002"), False),
    "values in place": (Values, "commit", in_step(0, "delta-000"), True),
    "best": (Values, "keep", lambda values: (values.folder / "delta-000").exists(), True),
    "encode": (Spill, "put", spilled("encode", "inputs-003"), False),
    "copied": (Twin, "copy", lambda _: True, True),
    "published": (Twin, "publish", lambda *_: True, True),
}


@pytest.fixture(scope="module")
def whole(base, source, chunks, tmp_path_factory):
    return recover(base, tmp_path_factory.mktemp("whole"), source, chunks, "job", SHORT)


STOPS = [  # in the order in which a run comes to them; from one to the next it goes on
    ("original", "best", "moved, gradient not saved", "values in place", "copied"),
    ("head", "forward", "gradient saved, values not in place", "encode", "published"),
]


@pytest.mark.parametrize("places", STOPS, ids=[places[0] for places in STOPS])
def test_stopped_recovery_goes_on_to_the_same_bytes(base, source, chunks, whole, tmp_path, monkeypatch, capsys, places):
    for place in places:
        with monkeypatch.context() as patch:
            stop(patch, *PLACES[place])
            with pytest.raises(Stopped):
                recover(base, tmp_path, source, chunks, "job", SHORT)
        assert place == "published" or not list(tmp_path.glob("*.gguf"))
    files, gained = recover(base, tmp_path, source, chunks, "job", SHORT)
    assert gained == whole[1] and "begins anew" not in capsys.readouterr().err
    for ours, theirs in zip(files, whole[0], strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in files)


def test_state_of_another_job_is_begun_anew(base, source, chunks, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop(patch, *PLACES["best"])
        with pytest.raises(Stopped):
            recover(base, tmp_path, source, chunks, "another", SHORT)
    files, _ = recover(base, tmp_path, source, chunks, "job", SHORT)
    assert "begins anew" in capsys.readouterr().err
    assert files[0].read_bytes() == whole[0][0].read_bytes()


def test_without_a_gain_the_file_stays_as_it_was(base, source, chunks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Recovery, "_measure", lambda *_: 0.1)
    files, gained = recover(base, tmp_path, source, chunks, "job", SHORT)
    for file in files:
        assert file.read_bytes() == base.with_name(file.name).read_bytes()
    assert "no gain" in capsys.readouterr().err
    assert gained["steps"] == 0 and list(gained["measured"]) == [0, 1, 2]


def test_it_stops_when_three_measurements_bring_nothing(base, source, chunks, tmp_path, monkeypatch):
    """The state that is taken is that of the best measurement."""
    measured = iter([0.9, 0.8, 0.5, 0.6, 0.7, 0.6, 0.4])
    monkeypatch.setattr(Recovery, "_measure", lambda *_: next(measured))
    kept, keep = [], Values.keep
    monkeypatch.setattr(Values, "keep", lambda values: (kept.append(1), keep(values)))
    _, gained = recover(base, tmp_path, source, chunks, "job", replace(SHORT, steps=9))
    assert gained["steps"] == 1 and list(gained["measured"]) == [0, 1, 2, 3, 4] and len(kept) == 2
    assert (gained["kld_before"], gained["kld_after"]) == (0.9, 0.4)


def test_no_more_than_a_layer_is_in_memory(base, source, chunks, tmp_path, monkeypatch):
    """Of what was read of the student, at any time: three experts (used, read, being read), two layers' matrices."""
    experts, matrices, peaks = weakref.WeakSet(), weakref.WeakKeyDictionary(), {"experts": 0, "layers": 0}
    read, make = Dequantized._expert, Tuned.make

    def reading(self, name, data):
        experts.add(made := read(self, name, data))
        peaks["experts"] = max(peaks["experts"], len(experts))
        return made

    def making(self, name, dtype):
        matrices[made := make(self, name, dtype)] = self.specs[name].layer
        peaks["layers"] = max(peaks["layers"], len(set(matrices.values())))
        return made

    monkeypatch.setattr(Dequantized, "_expert", reading)
    monkeypatch.setattr(Tuned, "make", making)
    recover(base, tmp_path, source, chunks, "job", replace(SHORT, steps=1))
    assert 3 <= peaks["experts"] <= 9 and peaks["layers"] <= 3  # the third: the head


def test_packed_experts_are_the_files(base, source, chunks, tmp_path):
    """What a GPU decodes itself; here by torch."""
    work = Recovery(base, source, chunks, HOW, tmp_path / "state", "job")
    for name in ("blk.1.ffn_gate_exps.weight", "blk.3.ffn_down_exps.weight"):
        expected = work.student.weights.dense(name)[5]
        torch.testing.assert_close(work.student.products.packed_expert(name, 5), expected, rtol=1e-6, atol=1e-8)


RANK = """
import sys
from pathlib import Path
from quantkit import bundle, ranks
from quantkit.calibration.corpus import TextChoice, cut
from quantkit.formats.checkpoint import Checkpoint
from quantkit.job.recovery.options import RecoverOptions
from quantkit.job.recovery.recover import recover
from quantkit.runtime.sources.checkpoint import CheckpointSource
ranks.join()
source = CheckpointSource(Checkpoint.open(bundle.models_dir() / "tiny-r1"))
choice = TextChoice(n_tokens=24 * 64, chunk=64)
chunks = cut(choice.corpus("calibration"), source, choice)
how = RecoverOptions(steps=2, tokens=512, lr=3e-3, every=1)
recover(Path(sys.argv[1]), Path(sys.argv[2]), source, chunks, "job", how)
ranks.leave()
"""


def test_two_ranks_make_the_bytes_of_one(base, whole, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    (tmp_path / "out").mkdir()
    started = [
        subprocess.Popen(
            [sys.executable, script, base, tmp_path / "out"],
            env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=400) for process in started] == [0, 0]
    for theirs in whole[0]:
        assert (tmp_path / "out" / theirs.name).read_bytes() == theirs.read_bytes()


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bytes_twice(tiny, base, chunks, tmp_path):
    """In bfloat16, with experts that it decodes itself."""
    original, found = CheckpointSource(tiny, "cuda", torch.bfloat16), []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files, gained = recover(base, tmp_path / name, original, chunks, "job", HOW)
        found.append(([file.read_bytes() for file in files], gained))
    assert found[0] == found[1]
    assert found[0][1]["kld_after"] < 0.98 * found[0][1]["kld_before"]


def test_adam(tmp_path, source, base):
    """Two updates by hand, of a vector (its mean squares are whole) and of a matrix (they are factored); the values on
    disk are those that the student is made of."""
    specs = moving(source.config, GGUFFile.open(base).tensors, "vectors")
    values, layer = Values(tmp_path, specs, torch.float32), specs[2]
    assert values.delta(layer[0], 0, 1) is None
    assert {len(spec.shape) for spec in layer} == {1, 2}
    delta, m, v = ({spec.name: torch.zeros(spec.n_rows, spec.n_in) for spec in layer} for _ in range(3))
    for number, rate in ((1, 0.01), (2, 0.003)):
        g = {spec.name: torch.randn(spec.shape) * 10 ** torch.randn(spec.shape[:1]).unsqueeze(-1) for spec in layer}
        g = {spec.name: g[spec.name].view(-1)[: spec.n_weights].view(spec.shape) for spec in layer}
        values.update(2, g, Update(number, rate, (0.9, 0.99)))
        for name in delta:
            found = g[name].view_as(m[name])
            m[name] = 0.9 * m[name] + 0.1 * found
            v[name] = 0.99 * v[name] + 0.01 * found.square()
            squares = v[name].mean(1, keepdim=True) * v[name].mean(0, keepdim=True) / v[name].mean()
            delta[name] -= rate * (m[name] / (1 - 0.9**number)) / (squares / (1 - 0.99**number)).sqrt()
        values.commit(2)

    def hold(values):
        for spec in layer:
            torch.testing.assert_close(values.delta(spec, 0, spec.n_rows), delta[spec.name])

    hold(values)
    values.keep()
    values.update(2, g, Update(3, 0.5, (0.9, 0.99)))
    values.settle(3)  # layer 2 was not finished
    hold(values)
    values.update(2, g, Update(3, 0.5, (0.9, 0.99)))
    values.settle(2)
    assert not torch.equal(values.delta(layer[0], 0, 1)[0], delta[layer[0].name][0])
    hold(values.best())


def test_bfloat16_values_do_too(base, source, chunks, recovered, tmp_path, monkeypatch):
    """As for large models: values and hidden states in half the bytes."""
    monkeypatch.setattr("quantkit.job.recovery.options.HIDDEN_BYTES", 0)
    _, gained = recover(base, tmp_path, source, chunks, "job", HOW)
    assert gained["kld_after"] < 0.98 * gained["kld_before"] and gained["kld_after"] != recovered[1]["kld_after"]


def test_whole_domains_are_held_back():
    domains = ["prose"] * 60 + ["code"] * 25 + ["dialogue"] * 1 + ["math"] * 5 + ["chinese"] * 9
    split = Split.of(domains)
    assert {domains[i] for i in split.held} == {"math"} and len(split.held) + len(split.train) == 100
    few = Split.of(["prose"] * 20 + ["code"] * 8 + ["math"] * 1 + ["chinese"] * 3)
    assert few.held == (28, 29, 30, 31) and "chinese and math" in few.about
    for same in (["text"] * 40, ["code", "math"] * 20):
        split = Split.of(same)
        assert len(split.held) == 2 and split.held[1] - split.held[0] > 10 and "no other domain" in split.about
    assert Split.of(["text"]).about.startswith("the only chunk")


def test_the_rate_suits_the_text():
    plain = RecoverOptions()
    assert plain.on(123_000, 30).lr == plain.on(10_000_000, 30).lr == 3e-3 and plain.on(123_000, 30).every == 5
    short = plain.on(14_336, 8)
    assert short.lr == pytest.approx(1.136e-3, rel=1e-3) and (short.steps, short.every) == (8, 1)
    assert replace(plain, lr=0.1).on(100, 30).lr == 0.1
    assert short.update(0).rate == short.lr and short.update(4).rate == pytest.approx(short.lr / 2)


def test_a_short_text_is_used_again():
    split = Split((0,), tuple(range(1, 8)), "")
    batches = split.batches(5, 3)
    assert [len(batch) for batch in batches] == [3] * 5
    assert set(torch.cat(batches)[:7].tolist()) == set(torch.cat(batches)[7:14].tolist()) == set(range(1, 8))
    assert all(len(batch) == 7 for batch in split.batches(5, 100))
    assert len(split.batches(30, 100)) == 8 and len(split.batches(30, 2)) == 28  # it is seen 8 times at most


def test_what_does_not_fit_is_refused_before_any_work(tiny, source, tmp_path, monkeypatch, capsys):
    plan = plan_for(source)
    with pytest.raises(QuantkitError, match=r"tokens need .*, but --memory is 1\.5 GB"):
        open_original(tiny, plan, "cpu", TextChoice(n_tokens=4096), tmp_path, replace(HOW, memory=1_500_000_000))
    said = capsys.readouterr().err
    assert "36,864 scales of routed experts move too: 0.4 MB of state" in said
    assert "recovery moves 2,511,104 weights and scales: 35.1 MB of state" in said
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    with pytest.raises(QuantkitError, match=r"bytes more, 10,000,000 are free; leave --recover out"):
        open_original(tiny, plan, "cpu", TextChoice(n_tokens=4096), tmp_path, HOW)


def test_sizes_are_known_before(base, source, chunks, tmp_path, monkeypatch):
    """What lies on disk at the end of a step is what was said, but for headers and the twin."""
    file, peak = GGUFFile.open(base), []
    state = tmp_path / (base.name + ".state-recovery")
    monkeypatch.setattr(
        Twin, "copy", lambda _: peak.append([p.stat().st_size for p in state.rglob("*") if p.is_file()])
    )
    monkeypatch.setattr("quantkit.job.recovery.recover.encode_again", lambda *_: pytest.fail("enough"))
    with pytest.raises(pytest.fail.Exception):
        recover(base, tmp_path, source, chunks, "job", SHORT)
    sizes = Sizes.of(source.config, file.tensors, SHORT)
    assert 3 * 4 * sizes.n_values < sum(peak[0]) < sum(sizes.disk(chunks.tokens.numel()))
