"""kt-kernel as the engine of routed experts: equal to ggml, never trusted with a type that it computes wrongly.

    pip install --no-deps kt-kernel==0.7.2
    pytest tests/oracles/test_kt_experts.py -s

Without kt-kernel only the choosing is tested.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from quantkit.__main__ import main
from quantkit.errors import QuantkitError
from quantkit.ggml.graph import Experts as GgmlExpertStack
from quantkit.runtime.engines.graph import GraphEngine
from quantkit.runtime.engines.open import TorchEngine, open_engine
from quantkit.runtime.experts import kt as kt_experts
from quantkit.runtime.experts.kt import KtExperts, Trial
from quantkit.runtime.sources import GGUFSource

installed = pytest.mark.skipif(not kt_experts.available(), reason=f"needs {kt_experts.INSTALL}")


@pytest.fixture(scope="module")
def path(quantized: Callable[..., Path]) -> Path:
    return quantized("1.58bit", "ktransformers")


def open_source(path: Path) -> GGUFSource:
    return GGUFSource(path, n_threads=1)


def times(kt: float, other: float) -> Trial:
    return Trial("amx", {"IQ1_S": 0.02}, {"kt": kt, "ggml": other})


@pytest.mark.parametrize(
    ("found", "on_cpu", "engine", "says"),
    [
        (times(5.0, 10.0), True, "kt", "5.00 ms a layer and token, ggml 10.00"),
        (times(9.5, 10.0), False, "ggml", "ggml 10.00"),  # too little won
        (times(0.5, 2.0), True, "ggml", "one graph"),  # less than the graph saves
        (times(0.5, 2.0), False, "kt", ""),
        (Trial("amx", {}, {}, "it fails"), False, "ggml", "because it fails"),
    ],
)
def test_verdict(found, on_cpu, engine, says):
    assert kt_experts.verdict(found, on_cpu)[0] == engine
    assert says in kt_experts.verdict(found, on_cpu)[1]


def test_what_the_child_said():
    lines = ['{"variant": "avx2"}', "TP MOE layer 0", "7", '{"trying": "IQ1_S"}', '{"error": {"IQ1_S": 0.02}}']
    assert kt_experts._read("\n".join([*lines, '{"ms": {"ggml": 2, "kt": 1}}']), 0, "").problem is None
    died = kt_experts._read("\n".join([*lines, '{"trying": "IQ3_S"}']), -6, "terminate called")
    assert died.problem == "kt-kernel (avx2) ended with SIGABRT on IQ3_S"
    assert "SIGILL" in kt_experts._read("", -4, "").problem
    assert "no module x" in kt_experts._read("", 1, "Traceback\nno module x").problem
    for wrong in ("0.86", "NaN"):
        found = kt_experts._read("\n".join([*lines, f'{{"error": {{"IQ2_XXS": {wrong}}}}}']), 0, "")
        assert "computes IQ2_XXS wrongly" in found.problem
        assert "IQ1_S" not in found.problem


def test_not_installed(path, monkeypatch, capfd):
    monkeypatch.setattr(kt_experts, "available", lambda: False)
    source = open_source(path)
    kt_experts.select(source)  # nothing to choose, nothing to say
    assert source.make_experts is GgmlExpertStack
    assert capfd.readouterr() == ("", "")
    with pytest.raises(QuantkitError, match="pip install --no-deps kt-kernel"):
        kt_experts.select(source, "kt")


def test_sizes_that_kt_kernel_cannot_split(path, monkeypatch):
    monkeypatch.setattr(kt_experts, "BLOCK", 512)
    assert "multiples of 512, not 256" in kt_experts.trial(open_source(path)).problem


@installed
def test_agrees_with_ggml(path, capfd):
    """Both round activations to 8 bits in the same way; kt-kernel also rounds its results to BF16."""
    source = open_source(path)
    c, random = source.config, torch.Generator().manual_seed(0)
    for layer in range(c.n_dense, c.n_layer):
        stacks = source.expert_stacks(layer)
        pair = [make(stacks, c.d, c.n_ff_exp, c.n_expert, c.n_used, 1) for make in (GgmlExpertStack, KtExperts)]
        for n in (1, 9, kt_experts.ROWS + 5):
            x = torch.randn((n, c.d), generator=random).bfloat16().float()
            expert = torch.stack([torch.randperm(c.n_expert, generator=random)[: c.n_used] for _ in range(n)]).int()
            weight = torch.rand((n, c.n_used), generator=random)
            want, got = (experts(x, expert, weight) for experts in pair)
            error = float((got - want).norm() / want.norm())
            print(f"layer {layer}, {n} tokens: relative difference {error:.4f}", file=sys.stderr)
            assert error < 0.005
    assert capfd.readouterr().out == ""  # standard output is the model's


def logits(engine: TorchEngine, tokens: list[int], n_prompt: int) -> torch.Tensor:
    first = engine.prefill(0, tokens[:n_prompt], 0)
    return torch.stack([first.clone(), *(engine.decode([0], [token])[0].clone() for token in tokens[n_prompt:])])


@installed
def test_whole_model(path, chunks):
    tokens = chunks(1, 256)[0].tolist()
    found = []
    for make in (GgmlExpertStack, KtExperts):
        source = open_source(path)
        source.make_experts = make
        engine = open_engine(source, 1, 300)
        assert isinstance(engine, GraphEngine if make is GgmlExpertStack else TorchEngine)
        found.append(logits(engine, tokens, 192))
    p, q = (each.log_softmax(-1) for each in found)
    kld = float((p.exp() * (p - q)).sum(-1).mean())
    print(f"KLD {kld:.5f} over {len(p)} tokens")
    assert kld < 0.02  # llama.cpp's own flags move it by 0.007 (docs/engines.md)


@installed
def test_auto_measures_and_says_so(path, capfd):
    source = open_source(path)
    kt_experts.select(source)
    said = capfd.readouterr().err
    assert "ms a layer and token" in said
    assert (source.make_experts is KtExperts) == said.startswith("experts: kt-kernel:")


@installed
def test_silently_wrong_type_is_seen(quantized, capfd, monkeypatch):
    """IQ2_XXS is right with AVX2 and plain AVX-512, and wrong with every later variant."""
    source = open_source(quantized("1.58bit", "llama.cpp"))
    found = kt_experts.trial(source, timed=False)
    print(found)
    if found.variant in ("avx2", "avx512_base"):
        assert found.problem is None
        return
    assert 0.3 < found.errors["IQ2_XXS"]
    assert "computes IQ2_XXS wrongly" in found.problem
    assert max(error for qtype, error in found.errors.items() if qtype != "IQ2_XXS") < 0.04
    monkeypatch.setattr(kt_experts, "trial", lambda *_, **__: found)
    kt_experts.select(source)
    assert source.make_experts is GgmlExpertStack
    assert "experts: ggml, because kt-kernel" in capfd.readouterr().err
    with pytest.raises(QuantkitError, match="IQ2_XXS wrongly"):
        kt_experts.select(source, "kt")


@installed
def test_type_that_ends_the_process(plain):
    found = kt_experts.trial(open_source(plain("IQ4_NL")), timed=False)
    print(found)
    assert "IQ4_NL" in found.problem


@installed
def test_run(path):
    arguments = ["run", path, "-p", "It was", "-n", "4", "--device", "cpu", "--temperature", "0"]
    command = [sys.executable, "-m", "quantkit", *map(str, arguments), "--experts"]
    kt, other = (
        subprocess.run([*command, which], capture_output=True, text=True, check=True) for which in ("kt", "ggml")
    )
    assert "experts: kt-kernel (" in kt.stderr
    assert kt.stdout.strip()
    assert len(kt.stdout.splitlines()) == len(other.stdout.splitlines())  # kt-kernel printed nothing into it


def test_run_without_it(path, monkeypatch):
    monkeypatch.setattr(kt_experts, "available", lambda: False)
    result = CliRunner().invoke(main, ["run", str(path), "-p", "It", "--device", "cpu", "--experts", "kt"])
    assert result.exit_code == 1
    assert "needs kt-kernel" in result.output
