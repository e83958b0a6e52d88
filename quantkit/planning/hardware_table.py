"""The hardware view as text: what fits, where it lies, how fast it can be and should be, and how to start it. No line
is wider than a terminal of 80 columns; commands go on in the next line."""

import re
from collections.abc import Iterator, Sequence
from textwrap import wrap

from quantkit.errors import QuantkitError
from quantkit.models.config import ModelConfig
from quantkit.planning import elsewhere, hardware
from quantkit.planning.arithmetic import cpu_line
from quantkit.planning.expected import PROMPT, expected
from quantkit.planning.hardware import Machine, Placement
from quantkit.planning.plan import Plan
from quantkit.sizes import both_units

GB, GIB, WIDTH = 10**9, 1 << 30, 80
FORMULA = "tok/s ≤ 1 / (gpu bytes / gpu bandwidth + ram bytes / ram bandwidth + disk bytes / disk bandwidth)"
CARDS = (24, 80, 160)  # GiB
Sized = tuple[Plan, int, str]


def report(
    plans: Sequence[Sized], config: ModelConfig, machine: Machine, context: int, original: str, threads: int
) -> str:
    """plans: each with the bytes of its file(s) and the first one's name. original: the checkpoint folder. All commands
    are those of the first plan that fits in memory, else of the first one that can be placed at all; of the others
    llama.cpp's."""
    machine = machine.completed()
    name = max(len("recipe"), *(len(plan.recipe) for plan, _, _ in plans))
    lines = [*_machine(machine), ""]
    lines.append(
        f"{'recipe':<{name}} {'file':>14} {'VRAM':>5} {'RAM':>6} {'disk':>6} {'experts':>7} {'at most':>7} "
        f"{'expected':>8} {'prompt':>6}"
    )
    lines.append(
        f"{'':<{name}} {'GB (GiB)':>14} {'GiB':>5} {'GiB':>6} {'GiB':>6} {'on GPU':>7} {'tok/s':>7} {'tok/s':>8} "
        f"{'tok/s':>6}"
    )
    lines.append("─" * len(lines[-1]))
    placed: list[tuple[Plan, int, str, Placement]] = []
    for plan, n_bytes, file in plans:
        try:
            where = hardware.place(plan, config, machine, context)
        except QuantkitError as error:
            why = str(error).removeprefix(f"{plan.recipe}: ")
            lines += wrap(f"{plan.recipe:<{name}} does not fit: {why}", WIDTH, subsequent_indent=" " * (name + 1))
            continue
        placed.append((plan, n_bytes, file, where))
        lines.append(f"{plan.recipe:<{name}} {_row(plan, n_bytes, config, machine, where)}")
    lines += ["", *_legend(plans[0][0], config, context)]
    for plan, n_bytes, file, where in sorted(placed, key=lambda one: one[-1].disk > 0):
        lines += ["", f"To start {plan.recipe} ({both_units(n_bytes)}):"]
        found = hardware.commands(plan, where, machine, context, file, original, threads)
        started = hardware.for_model(found, config)
        if len([line for line in lines if line.startswith("To start")]) > 1:
            started = {"llama.cpp": started["llama.cpp"][:1]}
        for program, commands in started.items():
            lines += [f"  {program}"]
            lines += [part for command in commands for part in folded(command)]
    return "\n".join([*lines, "", *_offload(plans, config, context), *elsewhere.lines(config)])


def folded(command: str) -> Iterator[str]:
    """A shell command on several lines, none of them wider than WIDTH if its words are not."""
    line = "   "
    for word in re.findall(r"-\S+ (?:'[^']*'|[^-'\s]\S*)|(?:'[^']*'|\S)+", command):  # an option with its value
        if len(line) + len(word) + len("  \\") > WIDTH and line.strip():
            yield line + " \\"
            line = "      "
        line += f" {word}"
    yield line


def _machine(machine: Machine) -> list[str]:
    def said(part: str, what: str) -> str:
        return f"{what} ({machine.how[part]})" if part in machine.how else what

    def rate(part: str, bandwidth: float | None) -> str:
        return said(part, f"{(bandwidth or 0) / GB:,.0f} GB/s")

    gpu = f"{both_units(machine.vram)}, {rate('gpu', machine.gpu_bandwidth)}" if machine.vram else "no GPU"
    disk = said("disk", f"{(machine.disk_bandwidth or 0) / GB:.1f} GB/s")
    return [
        f"VRAM  {gpu}",
        f"RAM   {both_units(machine.ram)}, {rate('ram', machine.ram_bandwidth)}",
        f"CPU   {said('cpu', cpu_line(machine.arithmetic))}",
        f"disk  {disk}",
    ]


def _row(plan: Plan, n_bytes: int, config: ModelConfig, machine: Machine, where: Placement) -> str:
    bound, found = hardware.speed(plan, config, machine, where).tokens_per_second, None
    if bound is not None:
        found = expected(plan, config, machine, where)
    assert bound is not None and found is not None  # the machine is complete
    layers = f"{len(where.gpu_layers)}/{len(where.gpu_layers) + len(where.cpu_layers)}"
    file, disk = f"{n_bytes / GB:.1f} ({n_bytes / GIB:.1f})", f"{where.disk / GIB:.1f}" if where.disk else "–"
    vram = f"{where.gpu / GIB:.1f}" if where.gpu else "–"
    return (
        f"{file:>14} {vram:>5} {where.ram / GIB:>6.1f} {disk:>6} {layers:>7} {_few(bound):>7} {_few(found.decode):>8} "
        f"{_few(found.prompt):>6}"
    )


def _few(rate: float) -> str:
    """With as many digits as mean something."""
    return f"{rate:.0f}" if rate >= 20 else f"{rate:.1f}"


def _legend(plan: Plan, config: ModelConfig, context: int) -> list[str]:
    cache = hardware.kv_bytes(config, plan.mla)
    paragraphs = (
        f"at most: {FORMULA}, with the bytes of a token: all tensors but the embedding, the KV cache of {context:,} "
        f"tokens ({cache:,} bytes each, {both_units(cache * context)}), and {config.n_used} of {config.n_expert} "
        "experts of each layer, all of them equally often used. VRAM and RAM hold cache and "
        f"{both_units(hardware.WORKSPACE)} of buffers too.",
        "expected: of quantkit, one sequence; arithmetic by type, launches and transfers count as well, at the "
        f"rates above. prompt: of {PROMPT:,} tokens, after the first one.",
    )
    return [line for paragraph in paragraphs for line in wrap(paragraph, WIDTH)]


def _offload(plans: Sequence[Sized], config: ModelConfig, context: int) -> list[str]:
    """Whole layers on the GPU, by Unsloth's rule and by the bytes of this plan."""
    name = max(len("recipe"), *(len(plan.recipe) for plan, _, _ in plans))
    lines = wrap(
        f"Whole layers on the GPU (-ngl, {config.n_layer} layers) by Unsloth's floor(VRAM / file × layers - 4) | by "
        f"bytes with a context of {context:,}:",
        WIDTH,
    )
    lines.append(f"{'recipe':<{name}}" + "".join(f" {f'{card} GiB':>12}" for card in CARDS))
    for plan, n_bytes, _ in plans:
        cells = [
            (
                hardware.unsloths_layers(card << 30, n_bytes, config.n_layer),
                hardware.whole_layers(plan, config, card << 30, context),
            )
            for card in CARDS
        ]
        lines.append(f"{plan.recipe:<{name}}" + "".join(f" {f'{a} | {b}':>12}" for a, b in cells))
    return lines
