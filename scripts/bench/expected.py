"""What `quantkit hardware` expects of this machine for the file that peers.py measures: experts on the CPU, and all in
GPU memory.

    python scripts/bench/expected.py --dense 1 --moe 4 --threads 16
    python scripts/bench/synthetic_gguf.py /dev/shm/r1.gguf --dense 1 --moe 4
    python scripts/bench/peers.py /dev/shm/r1.gguf --llama LLAMA --threads 16

The machine is measured first, as `quantkit hardware` does it.
"""

import argparse
from dataclasses import replace

from synthetic import R1_EXPERTS, layout

from quantkit import machine
from quantkit.job.hardware import Named, machine_of
from quantkit.models import family
from quantkit.planning import hardware
from quantkit.planning.assign import make_plan
from quantkit.planning.expected import expected
from quantkit.planning.recipe import Recipe

PLENTY = 1 << 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=int, default=1)
    parser.add_argument("--moe", type=int, default=4)
    parser.add_argument("--recipe", default="1.58bit")
    parser.add_argument("--target", default="llama.cpp")
    parser.add_argument("--threads", type=int, default=machine.threads())
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    config = family.from_hf(layout(args.dense, args.moe, R1_EXPERTS)[0])
    plan = make_plan(family.specs(config), Recipe.load(args.recipe), args.target, "r1")
    here = machine_of(Named(threads=args.threads), {}, None).completed()
    for part, rate in (("RAM", here.ram_bandwidth), ("GPU", here.gpu_bandwidth)):
        print(f"{part} {rate / 1e9:,.0f} GB/s" if rate else f"{part}: none")
    print({qtype: round(rate / 1e9, 1) for qtype, rate in here.arithmetic.cpu.items()}, "G weights/s")
    routed = sum(tensor.n_bytes for tensor in plan.tensors if tensor.role.endswith("_exps"))
    all_else = plan.n_bytes - routed + 3 * 10**9  # and buffers, but no layer of experts
    places = {"experts on the CPU": min(all_else, here.vram), "all in GPU memory": here.vram}
    print("\n| tok/s | at most | expected | prompt of 1,024 |\n|---|---|---|---|")
    for place, vram in places.items():
        own = replace(here, ram=PLENTY, vram=vram)
        placed = hardware.place(plan, config, own, args.context)
        found, most = expected(plan, config, own, placed), hardware.speed(plan, config, own, placed)
        assert found
        where = f"{place} ({len(placed.gpu_layers)} of {args.moe} layers there)"
        print(f"| {where} | {most.tokens_per_second:,.1f} | {found.decode:,.1f} | {found.prompt:,.1f} |")


if __name__ == "__main__":
    main()
