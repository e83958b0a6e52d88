"""Expected speed against what was measured: docs/results/runtime.md."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.errors import QuantkitError
from quantkit.job.hardware import Named, machine_of
from quantkit.job.plan import plan_model
from quantkit.models import family
from quantkit.models.open import open_model
from quantkit.planning import hardware, presets
from quantkit.planning.arithmetic import GPU_RATES, OF_IQ1_S, ON_XEON, Arithmetic
from quantkit.planning.assign import make_plan
from quantkit.planning.expected import TILED, expected
from quantkit.planning.hardware import Machine
from quantkit.planning.recipe import Recipe
from quantkit.runtime.native import probe

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
from synthetic import layout

H200 = presets.GPUS["h200"]
RATES = {qtype: 255e9 * share for qtype, share in ON_XEON.items()}  # 16 threads
MEASURED = Arithmetic(RATES, 8.0, H200.pace, H200.products, H200.bus)
RAM, GPU = 142e9, 4.125e12  # bytes/s


@pytest.fixture(scope="module")
def config():
    """R1's geometry with one dense and four MoE layers."""
    return family.from_hf(layout(1, 4, 256)[0])


@pytest.fixture(scope="module")
def plan(config):
    return make_plan(family.specs(config), Recipe.load("1.58bit"), "llama.cpp", "r1")


@pytest.mark.parametrize("vram, layers, decode, prompt", [(5, 0, 133, 1050), (140, 4, 731, 20_200)])
def test_the_machine_that_was_measured(plan, config, vram, layers, decode, prompt):
    """One H200 beside 16 threads: experts on the CPU, and all in GPU memory."""
    machine = Machine(100 * 10**9, vram * 10**9, RAM, GPU, 3e9, MEASURED)
    placed = hardware.place(plan, config, machine, 1024)
    assert len(placed.gpu_layers) == layers
    found = expected(plan, config, machine, placed)
    assert 1 / 1.2 < found.decode / decode < 1.2 and 1 / 1.5 < found.prompt / prompt < 1.5
    assert found.decode < hardware.speed(plan, config, machine, placed).tokens_per_second


@pytest.mark.parametrize("vram, layers, decode, prompt", [(5, 0, 264.8, 2576), (140, 2, 1087, 37_144)])
def test_other_types_on_it(vram, layers, decode, prompt):
    """KTransformers' Q2_K and Q3_K, of two MoE layers. Bytes and arithmetic of the CPU bind them alike."""
    config = family.from_hf(layout(1, 2, 256)[0])
    plan = make_plan(family.specs(config), Recipe.load("2.51bit"), "ktransformers", "r1")
    machine = Machine(100 * 10**9, vram * 10**9, RAM, GPU, 3e9, MEASURED)
    placed = hardware.place(plan, config, machine, 1024)
    assert len(placed.gpu_layers) == layers
    found = expected(plan, config, machine, placed)
    assert 1 / 1.5 < found.decode / decode < 1.5 and 1 / 1.5 < found.prompt / prompt < 1.5


@pytest.mark.parametrize(
    "row, n_weights",
    [
        ("8 experts' gate and up (in GPU memory)", 8 * 2 * 2048 * 7168),
        ("8 experts' down", 8 * 7168 * 2048),
        ("output 7,168 × 16,384", 7168 * 16384),
        ("shared gate and up 2 × 2,048 × 7,168", 2 * 2048 * 7168),
        ("logits 129,280 × 7,168, once a token", 129280 * 7168),
    ],
)
def test_a_gpu_s_rates_are_those_of_the_table(row, n_weights):
    """Where a decoding step's time goes: its last column is today's."""
    page = (Path(__file__).parents[2] / "docs" / "results" / "runtime.md").read_text(encoding="utf-8")
    (cells,) = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith(f"| {row} |")]
    assert GPU_RATES[cells[1].strip()] == pytest.approx(n_weights / (float(cells[-1].strip(" *")) * 1e-6))


@pytest.mark.parametrize(
    "matrix", ["IQ1_S 32,768 × 7,168", "IQ2_XXS 57,344 × 2,048", "Q2_K 32,768 × 7,168", "Q3_K 57,344 × 2,048"]
)
def test_experts_of_a_prompt_are_as_fast_as_some_tokens(matrix):
    """R1's of 1,024 tokens have 32 each: the column of 32 of "Some tokens at once", by that of one; there the rates of
    one token of Q2_K and Q3_K stand, too."""
    page = (Path(__file__).parents[2] / "docs" / "results" / "runtime.md").read_text(encoding="utf-8")
    head, *rows = [
        line.split("|")[1:-1] for line in page.splitlines() if line.startswith(("| matrix |", f"| {matrix} |"))
    ]
    (cells,) = rows
    one, some = (float(cells[[name.strip() for name in head].index(column)]) for column in ("1 token", "to 32"))
    qtype, rows_of, _, columns = matrix.replace(",", "").split()
    assert 1 / 1.3 < TILED / (one / some) < 1.3
    assert GPU_RATES[qtype] == pytest.approx(int(rows_of) * int(columns) / (one * 1e-6), rel=0.05)


def test_many_tokens_of_an_expert_are_multiplied_by_all_of_it_dequantized(plan, config):
    """16 experts in place of 256: each of them gets half of the tokens."""
    few = replace(config, n_expert=16)
    machine = Machine(100 * 10**9, 140 * 10**9, RAM, GPU, 3e9, MEASURED)
    tiled, dequantized = (expected(plan, c, machine, hardware.place(plan, c, machine, 1024)) for c in (config, few))
    assert dequantized.prompt < 0.8 * tiled.prompt


def test_an_mtp_layer_is_not_read():
    """It lies in the file, and neither a token of the main model nor its prompt passes it."""
    config = family.from_hf(open_model("deepseek-v3.2").config)
    machine, speeds = Machine(400 * 10**9, 24 * 10**9, 91e9, 4.136e12, 3e9, MEASURED), []
    for mtp in (True, False):
        plan = plan_model("deepseek-v3.2", "unsloth-1.58bit", mtp=mtp)
        speeds.append(expected(plan, config, machine, hardware.place(plan, config, machine, 1024)))
    assert speeds[0] == pytest.approx(speeds[1])


def test_arithmetic_binds_where_bytes_do_not(plan, config):
    """Cores that are half as fast take nearly twice as long, whatever the memory gives; a GPU's bandwidth does not
    matter to experts on the CPU."""

    def decode(share: float, ram: float) -> float:
        slow = Arithmetic({qtype: share * rate for qtype, rate in RATES.items()}, 8.0, H200.pace)
        machine = Machine(100 * 10**9, 5 * 10**9, ram, 4.136e12, 3e9, slow)
        return expected(plan, config, machine, hardware.place(plan, config, machine, 1024)).decode

    assert decode(1, 91e9) == decode(1, 910e9) > 1.5 * decode(0.5, 91e9)
    assert decode(100, 9e9) < decode(100, 91e9)
    machine = Machine(100 * 10**9, 5 * 10**9)
    assert expected(plan, config, machine, hardware.place(plan, config, machine, 1024)) is None


def test_machines_by_name():
    assert presets.gpu("NVIDIA RTX_4090") is presets.GPUS["4090"] and presets.gpu("a100").vram == 80 << 30
    assert presets.like("NVIDIA A100-SXM4-80GB") is presets.GPUS["a100"] and presets.like("TITAN V") is None
    assert presets.like("NVIDIA RTX 6000 Ada Generation") is presets.GPUS["rtx-6000-ada"]
    for wrong in (presets.gpu, presets.cpu):
        with pytest.raises(QuantkitError, match=r"not known; choose .*, or give --bandwidth"):
            wrong("abacus")
    found = machine_of(Named(ram=1 << 38, gpu="4090", cpu="EPYC 9004", threads=96), {"gpu": 1e12}, None)
    assert (found.vram, found.gpu_bandwidth, found.ram_bandwidth) == (24 << 30, 1e12, 0.8 * 460.8e9)
    assert found.how == {"ram": "0.8 of published", "cpu": "96 cores, assumed"} and found.threads == 96
    half = machine_of(Named(ram=1, vram=0, cpu="epyc-9004", threads=48), {}, None).arithmetic
    assert found.arithmetic.on_cpu("IQ1_S") == 2 * half.on_cpu("IQ1_S")
    old = machine_of(Named(ram=1, vram=0, cpu="core-14"), {}, None).arithmetic  # without AVX-512's permutations
    for slower, than, qtype in ((old, half, "IQ2_XXS"), (old, half, "Q4_K")):
        assert slower.on_cpu(qtype) / slower.on_cpu("IQ1_S") < than.on_cpu(qtype) / than.on_cpu("IQ1_S")
    complete = machine_of(Named(ram=1, vram=1), {"ram": 1e9}, None).completed()
    assert complete.how == dict.fromkeys(("gpu", "disk", "cpu"), "assumed")


def test_some_cores_of_a_host_have_their_share_of_its_memory():
    """16 of a Xeon read 142 GB/s; of a desktop's two channels few cores get all."""

    def of(cpu: str, threads: int, **given: float) -> tuple[float, str]:
        found = machine_of(Named(ram=1, vram=0, cpu=cpu, threads=threads), given, None)
        return found.ram_bandwidth, found.how.get("ram", "given")

    assert of("xeon-5", 16) == (pytest.approx(142e9, rel=0.02), "share of 16 of 32 cores, assumed")
    assert of("xeon-5", 32) == of("xeon-5", 64) == (0.8 * 358.4e9, "0.8 of published")
    assert of("ryzen-9000", 12) == (0.8 * 89.6e9, "0.8 of published")
    assert of("xeon-5", 16, ram=5e10) == (5e10, "given")


def test_probe():
    rates = probe.rates(1)
    assert set(OF_IQ1_S) - set(rates) == {"IQ3_S", "IQ4_NL", "F16", "BF16", "F32"}
    assert all(1e8 < rate < 1e12 for rate in rates.values())
    assert probe.matrix() in (2.0, 4.0, 8.0)
