"""Speed of two-sided encoding at R1's shapes: seconds per expert, hours for R1; memory.

    python scripts/bench/two_sided.py --device cuda --experts 32          # gate|up 4096×7168, down 7168×2048
    python scripts/bench/two_sided.py --device cpu --experts 1 --shapes 64x512 --passes 1

Weights are random normals, inputs random correlated tokens, outputs random gradient rows. `factor` is of H_I; `encode`
the rest: H_O's factor, rows, packing, the copy to the host. Error: tr(H_O Δ H_I Δᵀ) against rows encoded one by one
(`one-sided`), which are timed too.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from encoders import moments

from quantkit.codecs.registry import FORMATS
from quantkit.encoding.api import Method, encode_batch
from quantkit.encoding.hessian import gram, prepare
from quantkit.encoding.state import EFFORTS
from quantkit.encoding.two_sided import FIRST, TwoSided, encode_two_sided
from quantkit.ggml import quants

R1_LAYERS, R1_EXPERTS = 58, 256
T = TypeVar("T")


def clock(device: torch.device) -> float:
    """Seconds, when all that was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def gradients(experts: int, n: int, rows: int, device: torch.device) -> list[torch.Tensor]:
    """H_O of random gradients, of which some move together and some are larger than others."""
    scale = torch.exp(0.5 * torch.randn(n, device=device))
    out = []
    for _ in range(experts):
        g = torch.randn(rows, n, device=device) * scale
        out.append(gram(g + g.roll(1, 1)) / rows)
    return out


def error(qtype, w, packed, h_in, h_out) -> float:
    """tr(H_O Δ H_I Δᵀ) of one matrix."""
    q = torch.from_numpy(quants.dequantize(qtype, packed, w.shape[-1])).to(w.device)
    return float(((h_out @ (w - q) @ h_in) * (w - q)).sum())


def timed(device: torch.device, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds that it takes, and what it returns."""
    before = clock(device)
    found = work()
    return clock(device) - before, found


def bench(qtype: str, shape: tuple[int, int, int], how: TwoSided, a: argparse.Namespace) -> float:
    """Prints one line; seconds per expert, all of it."""
    (experts, rows, n), device = shape, torch.device(a.device)
    w = torch.randn(shape, device=device) * 0.02
    hessians, outputs = moments(experts, n, device, a.tokens), gradients(experts, rows, a.gradients, device)
    method = Method.of(qtype, replace(EFFORTS[a.effort], tries=a.tries), device=device)
    t_factor, factor = timed(device, lambda: prepare(hessians, n, device))
    block = how.blocks(rows)
    corner = [h[:block, :block] for h in outputs]
    encode_two_sided(method, w[:, :block].contiguous(), factor, corner, replace(how, block=block))  # compiles
    t_one, one = timed(device, lambda: encode_batch(qtype, w, factor, effort=a.effort, device=device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if a.profile:
        few = [h[: 8 * block, : 8 * block] for h in outputs]
        with torch.profiler.profile() as profile:
            encode_two_sided(method, w[:, : 8 * block].contiguous(), factor, few, replace(how, block=block))
        print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60))
    t_two, two = timed(device, lambda: encode_two_sided(method, w, factor, outputs, how))
    ratio = error(qtype, w[0], two[0], factor.h[0], outputs[0]) / error(qtype, w[0], one[0], factor.h[0], outputs[0])
    line = f"{qtype:8s} {a.effort} {rows}x{n} x{experts}, blocks of {block}, {how.passes_over(rows)} passes: factor "
    line += f"{t_factor / experts:.3f} + encode {t_two / experts:.3f} s/expert (one-sided {t_one / experts:.3f}), "
    line += f"{w.numel() / t_two / 1e6:.1f} M weights/s, error {ratio:.3f}"
    if device.type == "cuda":
        line += f" | {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB"
    print(line, flush=True)
    return (t_factor + t_two) / experts


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--types", nargs="+", default=["IQ1_S", "IQ2_XXS"], choices=sorted(FORMATS))
    p.add_argument("--shapes", nargs="+", default=["4096x7168", "7168x2048"], help="ROWSxCOLUMNS")
    p.add_argument("--effort", default="normal")
    p.add_argument(
        "--tries", type=int, default=FIRST.tries, help="pairs of scale and shift of a block's first encoding"
    )
    p.add_argument("--experts", type=int, default=32, help="encoded together")
    p.add_argument("--tokens", type=int, default=1024, help="behind H_I")
    p.add_argument("--gradients", type=int, default=1024, help="rows behind H_O")
    p.add_argument("--block", type=int, nargs="+", default=[None], help="rows; each is timed; default: what suits")
    p.add_argument("--profile", action="store_true", help="print the kernels that 8 blocks take")
    p.add_argument("--passes", type=int, default=None)
    a = p.parse_args()
    for qtype, block in itertools.product(a.types, a.block):
        how, total = TwoSided(block=block, passes=a.passes), 0.0
        for shape in a.shapes:
            rows, n = map(int, shape.split("x"))
            total += bench(qtype, (a.experts, rows, n), how, a)
        layer = total * R1_EXPERTS
        print(f"{qtype}: {layer:.0f} s a layer of {R1_EXPERTS}, R1 {layer * R1_LAYERS / 3600:.1f} h", flush=True)


if __name__ == "__main__":
    main()
