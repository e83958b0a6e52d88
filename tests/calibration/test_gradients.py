"""The streamed backward pass equals autograd through the whole model, and goes on where it was stopped."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.gradients import GradientOptions, GradientPass, Recorder, Rows, calibrate_gradients, disk
from quantkit.calibration.spill import Spill
from quantkit.errors import QuantkitError
from quantkit.formats.gradients import DOWN, INNER, ExpertRows, LayerGradients, job_in, path_of
from quantkit.runtime.backward import Backward
from quantkit.runtime.layers import Router, rms_norm, route, router_scores, routing_weights
from quantkit.runtime.room import Room
from quantkit.runtime.rope import angles
from quantkit.runtime.rotation import rotate
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_source

SAMPLES, SHAPE = 2, (3, 48)


@pytest.fixture(scope="module")
def source(tiny):
    return CheckpointSource(tiny)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(10, 760, SHAPE, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def labels():
    return torch.randint(0, 768, (SAMPLES, *SHAPE), generator=torch.Generator().manual_seed(3))


def fixed(labels):
    """Draws these, whatever the probabilities."""
    left = labels.flatten(1)

    def draw(p):
        nonlocal left
        taken, left = left.split([len(p), left.shape[1] - len(p)], 1)
        return taken

    return draw


def derive(source, tokens, draw, folder):
    rows = Rows(tokens.numel(), SAMPLES, torch.float32)
    GradientPass(source, tokens, rows, Room(), Spill(folder / "state", "job"), folder).run(draw)
    return [LayerGradients.load(path_of(folder, layer)) for layer in range(source.config.n_layer)]


class Plain:
    """The whole model in one graph, written down from the checkpoint's own names. seen: (layer, role) -> input, output
    of every matrix, of routed experts (layer, role, expert)."""

    def __init__(self, source, through_routing=True):
        self.source, self.c, self.through_routing = source, source.config, through_routing
        self.seen = {}

    def matrix(self, key, name, x):
        z = x @ self.source.checkpoint.read(name).float().T
        z.retain_grad()
        self.seen[key] = (x.detach(), z)
        return z

    def vector(self, name):
        return self.source.checkpoint.read(name).float()

    def logits(self, tokens):
        x = self.source.embed(tokens).requires_grad_()
        for layer in range(self.c.n_layer):
            x = x + self.attention(layer, x)
            h = rms_norm(x, self.vector(f"model.layers.{layer}.post_attention_layernorm.weight"), self.c.rms_eps)
            x = x + self.feed_forward(layer, h.flatten(0, 1)).view_as(x)
        x = rms_norm(x, self.vector("model.norm.weight"), self.c.rms_eps)
        return x @ self.vector("lm_head.weight").T

    def attention(self, layer, x):
        c, p = self.c, f"model.layers.{layer}.self_attn."
        s, t, d = x.shape
        turn = angles(c, torch.arange(t))
        h = rms_norm(x, self.vector(f"model.layers.{layer}.input_layernorm.weight"), c.rms_eps).reshape(-1, d)
        low = self.matrix((layer, "attn_q_a"), p + "q_a_proj.weight", h)
        low = rms_norm(low, self.vector(p + "q_a_layernorm.weight"), c.rms_eps)
        q = self.matrix((layer, "attn_q_b"), p + "q_b_proj.weight", low).view(s, t, c.n_head, c.qk_head)
        q_nope, q_rope = q.split([c.qk_nope, c.qk_rope], -1)
        q = torch.cat((q_nope, rotate(q_rope, turn.cos[:, None], turn.sin[:, None])), -1)
        both = self.matrix((layer, "attn_kv_a_mqa"), p + "kv_a_proj_with_mqa.weight", h)
        latent, k_rope = both.view(s, t, -1).split([c.kv_lora, c.qk_rope], -1)
        latent = rms_norm(latent, self.vector(p + "kv_a_layernorm.weight"), c.rms_eps)
        kv = (latent @ self.vector(p + "kv_b_proj.weight").T).view(s, t, c.n_head, -1)
        k_nope, v = kv.split([c.qk_nope, c.v_head], -1)
        k_rope = rotate(k_rope, *turn)[:, :, None].expand(s, t, c.n_head, c.qk_rope)
        scores = torch.einsum("sihx,sjhx->shij", q, torch.cat((k_nope, k_rope), -1)) * c.softmax_scale
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf"))
        mixed = torch.einsum("shij,sjhv->sihv", scores.softmax(-1), v).reshape(s * t, -1)
        return self.matrix((layer, "attn_output"), p + "o_proj.weight", mixed).view_as(x)

    def swiglu(self, layer, x, prefix, suffix="", *expert):
        gate, up = (
            self.matrix((layer, f"ffn_{part}{suffix}", *expert), f"{prefix}{part}_proj.weight", x)
            for part in ("gate", "up")
        )
        return self.matrix((layer, f"ffn_down{suffix}", *expert), f"{prefix}down_proj.weight", F.silu(gate) * up)

    def feed_forward(self, layer, x):
        p = f"model.layers.{layer}.mlp."
        if not self.c.is_moe(layer):
            return self.swiglu(layer, x, p)
        router = Router(self.vector(p + "gate.weight"), self.vector(p + "gate.e_score_correction_bias"))
        expert, weight = route(x, router, self.c)
        out = self.swiglu(layer, x, p + "shared_experts.", "_shexp")
        for e in range(self.c.n_expert):
            n, slot = (expert == e).nonzero(as_tuple=True)
            if len(n):
                share = weight[n, slot] if self.through_routing else weight[n, slot].detach()
                made = self.swiglu(layer, x[n], f"{p}experts.{e}.", "_exps", e)
                out = out.index_add(0, n, made * share[:, None])
        return out

    def gradients(self, tokens, labels):
        """Key -> input, and the gradient at the output for each sample of labels."""
        logits = self.logits(tokens).flatten(0, 1)
        found = {}
        for y in labels.flatten(1):
            F.cross_entropy(logits, y, reduction="sum").backward(retain_graph=True)
            for key, (x, z) in self.seen.items():
                found.setdefault(key, (x, []))[1].append(z.grad.clone())
                z.grad = None
        return found


def h_o(x, gradients):
    """Σ mean(x²) g gᵀ over tokens and samples."""
    g = torch.cat(gradients)
    return (g * x.square().mean(-1).repeat(len(gradients))[:, None]).T @ g


def rows_of(x, gradients):
    return torch.cat([x.square().mean(-1).sqrt()[:, None] * g for g in gradients])


def differences(found, expected, source):
    """Relative difference of everything that a pass leaves, by (layer, role)."""
    c, out = source.config, {}

    def compare(key, a, b):
        assert a.shape == b.shape, key
        out[key] = max(out.get(key, 0), float((a - b).norm() / b.norm()))

    for layer, made in enumerate(found):
        for role, h in made.outputs.items():
            compare((layer, role), h, h_o(*expected[layer, role]))
        for e in range(c.n_expert if made.experts else 0):
            if (layer, "ffn_gate_exps", e) in expected:
                (x, gate), (_, up) = (expected[layer, f"ffn_{part}_exps", e] for part in ("gate", "up"))
                both = [torch.cat(pair, 1) for pair in zip(gate, up, strict=True)]
                compare((layer, INNER), made.experts[INNER].of(e), rows_of(x, both))
                compare((layer, DOWN), made.experts[DOWN].of(e), rows_of(*expected[layer, "ffn_down_exps", e]))
            else:
                assert len(made.experts[INNER].of(e)) == len(made.experts[DOWN].of(e)) == 0
    return out


@pytest.fixture(scope="module")
def expected(source, tokens, labels):
    return Plain(source).gradients(tokens, labels)


@pytest.fixture(scope="module")
def streamed(source, tokens, labels, tmp_path_factory):
    """The folder and what is in it."""
    folder = tmp_path_factory.mktemp("gradients")
    return folder, derive(source, tokens, fixed(labels), folder)


def test_every_matrix_has_the_gradients_of_the_whole_model(source, streamed, expected):
    found = differences(streamed[1], expected, source)
    attention = {"attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_output"}
    dense = {"ffn_gate", "ffn_up", "ffn_down"}
    moe = {f"{role}_shexp" for role in dense} | {INNER, DOWN}
    assert set(found) == {
        (layer, role)
        for layer in range(source.config.n_layer)
        for role in attention | (moe if source.config.is_moe(layer) else dense)
    }
    assert max(found.values()) < 1e-4, found


def test_the_gradient_of_the_routing_weights_is_included(source, tokens, labels, streamed, monkeypatch, tmp_path):
    """Without it neither the streamed pass nor the plain one would be what it is, and both would be the same."""
    without = Plain(source, through_routing=False).gradients(tokens, labels)
    assert differences(streamed[1], without, source)[0, "ffn_down"] > 1e-2
    monkeypatch.setattr(Backward, "_router", lambda *_: None)
    dropped = derive(source, tokens, fixed(labels), tmp_path)
    assert max(differences(dropped, without, source).values()) < 1e-4


def test_tiles_do_not_matter(source, tokens, labels, expected, monkeypatch, tmp_path):
    for name, size in {"ATTENTION_TOKENS": 1, "FEED_TOKENS": 50, "EXPERT_TOKENS": 7, "HEAD_ELEMENTS": 768 * 11}.items():
        monkeypatch.setattr(f"quantkit.runtime.backward.{name}", size)
    found = differences(derive(source, tokens, fixed(labels), tmp_path), expected, source)
    # Rows of an expert come tile by tile, then sample by sample.
    assert max(value for (_, role), value in found.items() if role not in (INNER, DOWN)) < 1e-4


def test_bfloat16_and_arrays_on_disk_change_little(source, tiny, tokens, labels, monkeypatch, tmp_path):
    """Backward in bfloat16 from the same inputs and by the same routes. Left to itself, rounding moves some tokens in a
    thousand to other experts, which changes H_O of a text as short as this by up to a fifth."""
    routes = []

    def noting(*args):
        routes.append(route(*args)[0])
        return route(*args)

    def repeating(x, router, c):
        expert = routes.pop(0)
        return expert, routing_weights(router_scores(x, router, c), expert, c)

    monkeypatch.setattr("quantkit.runtime.backward.route", noting)
    plain = derive(source, tokens, fixed(labels), tmp_path)
    monkeypatch.setattr("quantkit.runtime.backward.route", repeating)
    rows, room, spill = Rows(tokens.numel(), SAMPLES, torch.bfloat16), Room("disk", folder=tmp_path), tmp_path / "state"
    for path in spill.glob("gradient-*"):
        path.unlink()
    short = CheckpointSource(tiny, dtype=torch.bfloat16)
    GradientPass(short, tokens, rows, room, Spill(spill, "job"), tmp_path).run(fixed(labels))
    assert not routes
    for layer, exact in enumerate(plain):
        found = LayerGradients.load(path_of(tmp_path, layer))
        for role, h in exact.outputs.items():
            assert (found.outputs[role] - h).norm() < 0.03 * h.norm(), (layer, role)
        for key, of in exact.experts.items():
            assert found.experts[key].rows.dtype == torch.bfloat16
            for e in range(source.config.n_expert):
                assert (found.experts[key].of(e) - of.of(e)).norm() <= 0.03 * of.of(e).norm(), (layer, key, e)


def test_arrays_of_either_dtype_are_kept_as_they_are(tmp_path):
    spill = Spill(tmp_path / "state", "job")
    for dtype in (torch.float32, torch.bfloat16):
        array = torch.randn(3, 5, 7).to(dtype)
        spill.put("inputs-000", array)
        found = torch.empty_like(array)
        spill.read("inputs-000", found)
        assert torch.equal(found, array)
    with pytest.raises(QuantkitError, match=r"inputs-000: torch.bfloat16 \[3, 5, 7\], not \[2, 5, 7\]"):
        spill.read("inputs-000", torch.empty(2, 5, 7, dtype=torch.bfloat16))


def test_a_gguf_has_gradients_too(made, tokens, tmp_path):
    source = open_source(next(path for path in made.glob("*.gguf") if path.name != "imatrix.gguf"))
    labels = torch.zeros(SAMPLES, *SHAPE, dtype=torch.int64)
    found = derive(source, tokens, fixed(labels), tmp_path)
    assert all(h.isfinite().all() and h.any() for layer in found for h in layer.outputs.values())


@pytest.fixture(scope="module")
def how(tmp_path_factory):
    """Of a short text, which is tokenized at once."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join(f"The square of {i} is {i * i}, and {i} is {'odd' if i % 2 else 'even'}.\n" for i in range(60))
    )
    return GradientOptions(TextChoice((str(path),), n_tokens=256, chunk=64))


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(source, how, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "g"
    with torch.inference_mode():  # a caller may be in it
        calibrate_gradients(source, how, folder)
    return folder


class Stopped(Exception):
    pass


PLACES = [
    "inputs-000",
    "inputs-002",
    "inputs-004",
    "gradient-004",
    "gradient-002",
    "gradient-001",
    "layer 2",
    "layer 0",
]


@pytest.mark.parametrize("place", PLACES)
def test_stopped_pass_goes_on_to_the_same_bytes(source, how, whole, tmp_path, monkeypatch, place):
    """Before an array is saved, or in the middle of a layer's file."""
    folder, save, see = tmp_path / "g", Spill.put, Recorder.matrix
    visits = []

    def put(self, name, array):
        if name == place:
            raise Stopped
        save(self, name, array)

    def matrix(self, role, x, gradient):
        visits.append(role)
        if role == "attn_output" and place == f"layer {source.config.n_layer - visits.count(role) // 3}":
            raise Stopped
        see(self, role, x, gradient)

    with monkeypatch.context() as patch:
        patch.setattr(Spill, "put", put)
        patch.setattr(Recorder, "matrix", matrix)
        with pytest.raises(Stopped):
            calibrate_gradients(source, how, folder)
    assert not list(folder.rglob("*.tmp"))
    done = bytes_of(folder)
    calibrate_gradients(source, how, folder)
    assert done.items() <= bytes_of(whole).items()
    assert bytes_of(folder) == bytes_of(whole) and not (folder / "state").exists()


def test_another_pass_is_refused_and_a_finished_one_not_repeated(source, how, whole, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "g"
    shutil.copytree(whole, folder)
    monkeypatch.setattr(GradientPass, "run", lambda *_: pytest.fail("it ran"))
    assert calibrate_gradients(source, how, folder) == sorted(folder.glob("*.safetensors"))
    assert "the gradients are there" in capsys.readouterr().err
    with pytest.raises(QuantkitError, match="gradients of another pass"):
        calibrate_gradients(source, replace(how, seed=1), folder)
    path_of(folder, 0).unlink()
    (folder / "state").mkdir()
    (folder / "state" / "job").write_text(str(job_in(path_of(folder, 1)))[::-1])
    with pytest.raises(QuantkitError, match="state of another pass"):
        calibrate_gradients(source, how, folder)


def test_restart_forgets_the_other_pass(source, how, whole, tmp_path):
    folder = tmp_path / "g"
    shutil.copytree(whole, folder)
    calibrate_gradients(source, replace(how, seed=1, samples=1), folder, restart=True)
    assert not bytes_of(folder).items() & bytes_of(whole).items()


def test_samples_and_seeds_are_reproducible(source, how, whole, tmp_path):
    """Sample s of a pass is sample 0 of one whose seed is s higher."""
    calibrate_gradients(source, replace(how, seed=1, samples=1), tmp_path / "one")
    one, three = (LayerGradients.load(path_of(folder, 3)) for folder in (tmp_path / "one", whole))
    for e in range(source.config.n_expert):
        a, b = one.experts[INNER].of(e), three.experts[INNER].of(e)
        torch.testing.assert_close(a, b[len(b) // 3 : 2 * len(b) // 3], rtol=1e-3, atol=1e-5)


def test_what_does_not_fit_is_refused_before_any_work(source, how, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(GradientPass, "run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(QuantkitError, match=r"tokens need .* GB, .* GiB, but --memory is 1\.5 GB"):
        calibrate_gradients(source, replace(how, memory=1_500_000_000), tmp_path / "g")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    with pytest.raises(QuantkitError, match=r"bytes are needed, 10,000,000 are free"):
        calibrate_gradients(source, how, tmp_path / "g")
    assert "gradients of 256 tokens x 3 samples" in capsys.readouterr().err


def test_sizes_are_known_before(source, whole):
    rows = Rows.of(source.config, 256, 3)
    _, kept = disk(source.config, rows, torch.float32)
    headers = sum(8 + int.from_bytes(data[:8], "little") for data in bytes_of(whole).values())
    assert kept + headers == sum(map(len, bytes_of(whole).values()))
    assert Rows.of(source.config, 1 << 20, 3).dtype == torch.bfloat16


def test_a_file_of_gradients_is_what_was_saved(tmp_path):
    rows = torch.randn(4, 6).bfloat16()
    plain = ExpertRows(rows, torch.tensor([3, 0, 1]))
    scaled = ExpertRows(rows, torch.tensor([1, 0, 1]), torch.tensor([3, 0], dtype=torch.int32), torch.tensor([2.0, 3]))
    LayerGradients({INNER: plain, DOWN: scaled}, {"attn_q_a": torch.eye(3)}).save(tmp_path / "g.safetensors")
    found = LayerGradients.load(tmp_path / "g.safetensors")
    assert torch.equal(found.experts[INNER].of(2), rows[3:]) and torch.equal(found.outputs["attn_q_a"], torch.eye(3))
    assert torch.equal(found.experts[DOWN].of(0), rows[3:].float() * 2) and len(found.experts[DOWN].of(1)) == 0
    assert job_in(tmp_path / "g.safetensors") is None
    (tmp_path / "g.safetensors").write_bytes(b"junk")
    with pytest.raises(QuantkitError, match=r"g\.safetensors: damaged.*run the backward pass"):
        LayerGradients.load(tmp_path / "g.safetensors")
