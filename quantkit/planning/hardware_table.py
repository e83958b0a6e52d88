"""The hardware view as text: what fits, where it lies, how fast it can be, and how to start it."""

from collections.abc import Sequence

from quantkit.errors import QuantkitError
from quantkit.models.config import ModelConfig
from quantkit.planning import hardware, targets
from quantkit.planning.hardware import Machine, Placement
from quantkit.planning.plan import Plan
from quantkit.sizes import both_units, gib

GB = 10**9
FORMULA = "tok/s ≤ 1 / (gpu bytes / gpu bandwidth + ram bytes / ram bandwidth + disk bytes / disk bandwidth)"


def report(
    plans: Sequence[tuple[Plan, int, str]],
    config: ModelConfig,
    machine: Machine,
    context: int,
    original: str,
    threads: int,
) -> str:
    """plans: each with the bytes of its file(s) and the first one's name. original: the checkpoint folder. The commands
    are those of the first plan that fits in memory, else of the first one that can be placed at all."""
    lines = [_machine(machine), ""]
    lines += [
        f"{'recipe':<12} {'file':>20} {'resident':>9} {'KV':>8} {'experts on GPU':>15} {'RAM':>9} "
        f"{'from disk':>9} {'GB a token gpu/ram/disk':>24} {'tok/s':>7}"
    ]
    lines.append("─" * len(lines[-1]))
    placed: list[tuple[Plan, int, str, Placement]] = []
    for plan, n_bytes, file in plans:
        try:
            where = hardware.place(plan, config, machine, context)
        except QuantkitError as error:
            lines.append(f"{plan.recipe:<12} {both_units(n_bytes):>20} does not fit: {error}")
            continue
        placed.append((plan, n_bytes, file, where))
        lines.append(_row(plan, n_bytes, config, machine, where))
    lines += [
        "",
        FORMULA,
        f"per token: all tensors but the embedding, the KV cache of {context:,} tokens "
        f"({hardware.kv_bytes(config, plans[0][0].mla):,} bytes each), and {config.n_used} of {config.n_expert} "
        "experts of each layer;",
        "a bound: experts equally often used, no time for kernels or transfers; "
        f"{both_units(hardware.WORKSPACE)} of buffers are set aside",
    ]
    if placed:
        plan, n_bytes, file, where = next((one for one in placed if one[-1].disk == 0), placed[0])
        lines += ["", f"To start {plan.recipe} ({both_units(n_bytes)}):"]
        for program, commands in hardware.commands(plan, where, machine, context, file, original, threads).items():
            if program == "quantkit" and config.compression is not None:  # `run` refuses the file
                continue
            flags = targets.start_flags("llama.cpp", config) if program == "llama.cpp" else ""
            lines += [f"  {program}", *(f"    {command}{flags}" for command in commands)]
    return "\n".join([*lines, "", *_offload(plans, config, context)])


def _machine(machine: Machine) -> str:
    def rate(bandwidth: float | None) -> str:
        return f"{bandwidth / GB:.1f} GB/s" if bandwidth else "bandwidth unknown"

    gpu = f" · VRAM {both_units(machine.vram)}, {rate(machine.gpu_bandwidth)}" if machine.vram else " · no GPU"
    return f"RAM {both_units(machine.ram)}, {rate(machine.ram_bandwidth)}{gpu} · disk {rate(machine.disk_bandwidth)}"


def _row(plan: Plan, n_bytes: int, config: ModelConfig, machine: Machine, where: Placement) -> str:
    speed = hardware.speed(plan, config, machine, where)
    layers = f"{len(where.gpu_layers)} of {len(where.gpu_layers) + len(where.cpu_layers)}"
    token = "/".join(f"{n / GB:.2f}" for n in (speed.gpu, speed.ram, speed.disk))
    rate = f"{speed.tokens_per_second:.1f}" if speed.tokens_per_second else "?"
    return (
        f"{plan.recipe:<12} {both_units(n_bytes):>20} {gib(where.resident):>9} {gib(where.kv_cache):>8} {layers:>15} "
        f"{gib(where.ram):>9} {gib(where.disk) if where.disk else '–':>9} {token:>24} {rate:>7}"
    )


def _offload(plans: Sequence[tuple[Plan, int, str]], config: ModelConfig, context: int) -> list[str]:
    """Whole layers on the GPU, by Unsloth's rule and by the bytes of this plan."""
    cards = (24, 80, 160)
    lines = [
        f"Whole layers on the GPU (-ngl, {config.n_layer} layers): Unsloth's floor(VRAM / file × layers - 4), and "
        f"by bytes with a context of {context:,}",
        f"{'recipe':<12} {'file':>20}" + "".join(f" {f'{card} GiB: rule':>14} {'by bytes':>9}" for card in cards),
    ]
    for plan, n_bytes, _ in plans:
        cells = [
            (
                hardware.unsloths_layers(card << 30, n_bytes, config.n_layer),
                hardware.whole_layers(plan, config, card << 30, context),
            )
            for card in cards
        ]
        lines.append(f"{plan.recipe:<12} {both_units(n_bytes):>20}" + "".join(f" {a:>14} {b:>9}" for a, b in cells))
    return lines
