"""Placement, KV cache, the speed formula, Unsloth's rule, and what is printed."""

import os
import re
from dataclasses import replace

import pytest

from quantkit import machine
from quantkit.errors import QuantkitError
from quantkit.job.hardware import hardware_report
from quantkit.job.plan import plan_model
from quantkit.models import family
from quantkit.models.open import open_model
from quantkit.planning import bitmap, hardware, hardware_table, presets, table
from quantkit.planning.arithmetic import Arithmetic
from quantkit.planning.assign import make_plan
from quantkit.planning.budget import BudgetOptions
from quantkit.planning.hardware import Machine
from quantkit.planning.recipe import Recipe

GIB = 1 << 30


@pytest.fixture(scope="module")
def config():
    return family.from_hf(open_model("deepseek-r1").config)


@pytest.fixture(scope="module")
def plan(config):
    return make_plan(family.specs(config), Recipe.load("1.58bit"), model="deepseek-r1")


def test_kv_cache(config):
    """Split: (512 + 64) × 2 bytes × 61 layers. Combined: 128 heads × (192 + 128)."""
    assert hardware.kv_bytes(config, "split") == 70_272
    assert hardware.kv_bytes(config, "combined") == 128 * 320 * 2 * 61


# Unsloth's table of layers to offload, for 24, 80 and 160 GB of VRAM.
@pytest.mark.parametrize(
    "file_gb, layers", [(131, (7, 33, 61)), (158, (5, 26, 57)), (183, (4, 22, 49)), (212, (2, 19, 42))]
)
def test_unsloths_rule(file_gb, layers):
    assert tuple(hardware.unsloths_layers(vram, file_gb, 61) for vram in (24, 80, 160)) == layers


def test_place_adds_up(plan, config):
    machine = Machine(256 * GIB, 80 * GIB)
    placed = hardware.place(plan, config, machine, 16384)
    assert placed.resident + placed.gpu_experts + placed.cpu_experts == plan.n_bytes
    assert placed.gpu <= machine.vram and placed.ram == placed.cpu_experts and placed.disk == 0
    assert sorted(placed.gpu_layers + placed.cpu_layers) == list(range(3, 61))
    assert placed.gpu_layers == tuple(range(61 - len(placed.gpu_layers), 61))
    room = machine.vram - placed.gpu
    assert 0 <= room < plan.by_name["blk.20.ffn_up_exps.weight"].n_bytes * 3


def test_sixty_and_fourteen(plan, config):
    """60 GB of RAM and 14 of VRAM hold the 1.58-bit file only in part: the rest is read from the disk."""
    machine = Machine(60 * GIB, 14 * GIB, 80e9, 900e9, 3e9)
    placed = hardware.place(plan, config, machine, 4096)
    assert placed.gpu <= machine.vram and placed.ram == machine.ram
    assert placed.disk == placed.cpu_experts - machine.ram > 59 * GIB
    speed = hardware.speed(plan, config, machine, placed)
    by_hand = speed.gpu / 900e9 + speed.ram / 80e9 + speed.disk / 3e9
    assert speed.tokens_per_second == pytest.approx(1 / by_hand)
    assert speed.ram + speed.disk == pytest.approx(placed.cpu_experts / 32, rel=1e-6)
    assert 1 < speed.tokens_per_second < 2  # published: 3 to 5; see docs/results/allocation.md


def test_a_file_beyond_memory_is_planned_for_the_disk(config, capsys):
    """What every token needs fits the GPU; half of the experts stay on the disk, and it is said."""
    machine = Machine(60 * 10**9, 14 * 10**9)
    plan = plan_model("deepseek-r1", budget=BudgetOptions(ram=machine.ram, vram=machine.vram, context=4096))
    placed = hardware.place(plan, config, machine, 4096)
    assert placed.gpu <= machine.vram and placed.ram == machine.ram and placed.disk > 50 * 10**9
    assert 130e9 < plan.n_bytes < 145e9 and "experts beyond it on the disk" in plan.outlook.limit
    assert "of experts stay on the disk" in capsys.readouterr().err
    with pytest.raises(QuantkitError, match="that stay on the GPU"):
        plan_model("deepseek-r1", budget=BudgetOptions(ram=machine.ram, vram=4 * 10**9, context=4096))


def test_a_file_beyond_the_memory_of_a_machine_without_gpu(config, capsys):
    """RAM must hold what every token needs; of the experts what it can."""
    plan = plan_model("deepseek-r1", budget=BudgetOptions(ram=60 * 10**9, context=4096))
    placed = hardware.place(plan, config, Machine(60 * 10**9, 0), 4096)
    assert 0 < placed.disk < placed.cpu_experts and 130e9 < plan.n_bytes < 145e9
    assert "fits 60.0 GB, 55.9 GiB of RAM: " in capsys.readouterr().err
    with pytest.raises(QuantkitError, match="is too small"):
        plan_model("deepseek-r1", budget=BudgetOptions(ram=8 * 10**9, context=4096))


def test_without_gpu_everything_is_ram(plan, config):
    machine = Machine(200 * GIB, 0, 100e9)
    placed = hardware.place(plan, config, machine, 4096)
    assert placed.gpu == 0 and placed.gpu_layers == () and placed.disk == 0
    assert placed.ram == plan.n_bytes + placed.kv_cache + hardware.WORKSPACE
    assert hardware.speed(plan, config, machine, placed).tokens_per_second < 100e9 / (placed.cpu_experts / 32)
    unknown = Machine(100 * GIB, 0, 100e9)  # some experts come from the disk, whose speed nobody gave
    partly = hardware.place(plan, config, unknown, 4096)
    assert partly.disk > 0 and hardware.speed(plan, config, unknown, partly).tokens_per_second is None


def test_ram_too_small_for_what_every_token_needs(plan, config):
    machine = Machine(8 * GIB, 0, 100e9, None, 3e9)
    placed = hardware.place(plan, config, machine, 4096)
    speed = hardware.speed(plan, config, machine, placed)
    assert placed.disk > placed.cpu_experts and speed.disk > placed.cpu_experts / 32
    assert 0 <= speed.ram < 8 * GIB and speed.tokens_per_second < 0.5


def test_vram_too_small_is_refused(plan, config):
    with pytest.raises(QuantkitError, match="more than the GPU has"):
        hardware.place(plan, config, Machine(60 * GIB, 8 * GIB), 4096)
    with pytest.raises(QuantkitError, match="lower --context"):
        hardware.place(plan, config, Machine(60 * GIB, 8 * GIB), 131072)


@pytest.mark.parametrize("ram, vram, context", [(128, 24, 16384), (96, 48, 4096), (160, 0, 8192), (64, 192, 32768)])
def test_a_machines_plan_fits_it(config, ram, vram, context):
    budget = BudgetOptions(ram=ram * GIB, vram=vram * GIB or None, context=context)
    plan = plan_model("deepseek-r1", target="llama.cpp", budget=budget)
    machine = Machine(ram * GIB, vram * GIB)
    placed = hardware.place(plan, config, machine, context)
    assert placed.disk == 0 and placed.gpu <= machine.vram
    assert placed.gpu + placed.ram > 0.97 * (machine.ram + machine.vram)


def test_commands_name_the_layers(plan, config):
    machine = Machine(256 * GIB, 80 * GIB)
    placed = hardware.place(plan, config, machine, 4096)
    lines = hardware.commands(plan, placed, machine, 4096, "r1/r1-00001-of-00003.gguf", "R1", 32)
    first = placed.gpu_layers[0]
    assert f"--n-cpu-moe {first}" in lines["llama.cpp"][0]
    blocks = re.search(r"-ot '(.*)=CPU'", lines["llama.cpp"][1])[1]
    on_cpu = {t.layer for t in plan.tensors if t.is_routed and re.search(blocks, t.name)}
    assert on_cpu == set(range(3, first)) and not any(
        re.search(blocks, t.name) for t in plan.tensors if not t.is_routed
    )
    assert "--kt-weight-path r1 " in lines["KTransformers (kt-kernel with sglang)"][0]
    alone = hardware.place(plan, config, Machine(256 * GIB), 4096)
    assert hardware.commands(plan, alone, Machine(256 * GIB), 4096, "x.gguf", "R1", 8)["llama.cpp"][0].endswith(
        "-ngl 0"
    )
    xeon = Machine(256 * GIB, arithmetic=Arithmetic(matrix=presets.cpu("xeon-4").matrix))
    (start,) = hardware.commands(plan, alone, xeon, 4096, "x.gguf", "R1", 8)["llama.cpp"]
    assert start.endswith("-ngl 0 --no-repack")
    kimi = replace(config, yarn=replace(config.yarn, beta_fast=1.0))
    told = hardware.for_model({"llama.cpp": ["llama-server"], "ollama": ["ollama run"], "quantkit": []}, kimi)
    assert told["llama.cpp"] == ["llama-server --yarn-beta-fast 1 --yarn-beta-slow 1"]
    assert told["ollama"] == ["LLAMA_ARG_YARN_BETA_FAST=1 LLAMA_ARG_YARN_BETA_SLOW=1 ollama serve", "ollama run"]
    short = Machine(60 * GIB, 14 * GIB)
    placed = hardware.place(plan, config, short, 4096)
    (run,) = hardware.commands(plan, placed, short, 4096, "x.gguf", "R1", 8)["quantkit"]
    assert placed.disk and run.startswith("quantkit run x.gguf -c 4096 --ram 64424MB")
    ollama = plan_model("deepseek-r1", "1.58bit", "ollama")
    assert any(
        "Modelfile" in line for line in hardware.commands(ollama, placed, machine, 4096, "x.gguf", "R1", 8)["ollama"]
    )


def test_numbers_up_to():
    for n in range(100):
        found = re.compile(hardware.up_to(n))
        assert [i for i in range(100) if found.fullmatch(str(i))] == list(range(n + 1))


def test_commands_stay_whole():
    command = "llama-server -m a/b.gguf --no-mmap -ot 'a b|c' -p 'Hello  you' " + "--option value " * 9
    lines = list(hardware_table.folded(command))
    assert len(lines) > 2 and max(map(len, lines)) <= 80
    assert " ".join(line.strip().removesuffix("\\").strip() for line in lines) == command.strip()


def test_report(plan):
    machine = Machine(60 * GIB, 14 * GIB, 80e9, 900e9, 3e9)
    text = hardware_report("deepseek-r1", (), None, machine, 4096, 32)
    assert "tok/s ≤ 1 / (gpu bytes / gpu bandwidth" in text
    assert max(map(len, text.splitlines())) <= 80 and "?" not in text
    assert all(name in text for name in ("1.58bit", "2.51bit", "--n-cpu-moe", "--kt-method LLAMAFILE", "quantkit run"))
    assert "does not fit" in hardware_report("deepseek-r1", ("1.58bit",), None, Machine(GIB, 4 * GIB), 512, 1)


def test_bandwidths_are_given_by_part(tmp_path):
    from quantkit.cli.making import _machine

    given = _machine(ram=1, vram=1, bandwidths=("ram=80", "gpu=900", "disk=3.5"))
    assert (given.ram_bandwidth, given.gpu_bandwidth, given.disk_bandwidth) == (80e9, 900e9, 3.5e9)
    for wrong in ("80", "ram", "ram=", "ram=-1", "ram=nan", "bus=3", "disk=none.gguf", "gpu=80GB"):
        with pytest.raises(QuantkitError, match=f"--bandwidth {wrong}: write ram=80"):
            _machine(ram=1, vram=1, bandwidths=(wrong,))


def test_compare_and_bit_map(plan, tmp_path):
    other = plan_model("deepseek-r1", "unsloth-2.22bit")
    text = table.compare(plan, other, 0.5, 0.25)
    assert "A: 1.58bit" in text and "-0.2500" in text and "B blk 3-5 Q3_K · 6-60 Q2_K" in text
    assert max(map(len, text.splitlines())) <= 100
    for name, magic in (("map.png", b"\x89PNG"), ("map.svg", b"<?xml")):
        bitmap.draw(plan_model("tiny-r1", "1.58bit"), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(magic)
    with pytest.raises(QuantkitError, match=r"\.png or \.svg"):
        bitmap.draw(plan, tmp_path / "map.gif")


def test_probes(tmp_path):
    assert machine.free_ram() > 1 << 28
    assert 1e8 < machine.ram_bandwidth(1 << 26, 2) < 1e13
    path = tmp_path / "file"
    path.write_bytes(os.urandom(16 << 20))
    try:
        assert 1e6 < machine.disk_bandwidth(path) < 1e12
    except QuantkitError as error:  # a RAM disk has no O_DIRECT
        assert "--bandwidth disk=" in str(error)
    path.write_bytes(b"short")
    with pytest.raises(QuantkitError, match="--bandwidth disk="):
        machine.disk_bandwidth(path)
    with pytest.raises(QuantkitError, match="--bandwidth disk="):
        machine.disk_bandwidth(tmp_path / "none")
