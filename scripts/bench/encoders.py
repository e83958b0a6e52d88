"""Speed of the encoders: G weights/s, arithmetic and memory rates, GPU-minutes for R1; on the CPU also ggml's rate and
the output error against ggml's.

    python scripts/bench/encoders.py --device cuda --experts 256          # R1: gate 2048×7168 and down 7168×2048
    python scripts/bench/encoders.py --device cpu --rows 512 --columns 1024 --types IQ1_S Q2_K

Weights are random normals, Hessians of random correlated tokens. `factor` is forming H from tokens, damping and the
block-UDU factorisation, shared by gate and up; `encode` everything else, packing and the copy to the host included.
Output error: trace((W - Q) H (W - Q)') of both, ggml's with the diagonal of H as its imatrix.
"""

import argparse
import time

import numpy as np
import torch

from quantkit.codecs.registry import FORMATS
from quantkit.encoding.api import encode_batch
from quantkit.encoding.hessian import Hessian, prepare, second_moment
from quantkit.encoding.state import EFFORTS
from quantkit.ggml import quants

R1_ROUTED = 58 * 256 * 3 * 2048 * 7168
R1_FACTORS = {7168: 58 * 256, 2048: 58 * 256}  # matrices to factorise: gate and up share one


def moments(experts: int, n: int, device: torch.device, tokens: int = 1024) -> list[Hessian]:
    """Hessians of random correlated tokens."""
    scale = torch.exp(0.5 * torch.randn(n, device=device))
    out = []
    for _ in range(experts):
        x = torch.randn(tokens, n, device=device) * scale
        x += 0.3 * x.roll(1, 1)
        out.append(second_moment(x))
    return out


def clock(device: torch.device) -> float:
    """Seconds; on the CPU those of this process, so that other work on the machine counts less."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def search_flops(qtype: str, effort: str) -> float:
    """Multiply-adds ×2 of the codebook products per weight, by hypotheses; 0 for types without a codebook."""
    fmt = FORMATS[qtype]
    if fmt.grid is None:
        return 0.0
    how = EFFORTS[effort]
    tried = (how.tries or len(fmt.multipliers)) * len(fmt.shifts) + how.passes
    return tried * len(fmt.grid) * 2 * 16 / fmt.width


def bench(qtype: str, shape: tuple[int, int, int], effort: str, device: torch.device, repeat: int) -> None:
    experts, rows, n = shape
    w = torch.randn(shape, device=device) * 0.02
    t0 = clock(device)
    hessians = moments(experts, n, device)
    t1 = clock(device)
    factor = prepare(hessians, n, device, full=effort != "fast")
    t2 = clock(device)
    few = (w, factor) if device.type == "cuda" else (w[:1, :64].contiguous(), factor.of(slice(0, 1)))
    encode_batch(qtype, *few, effort=effort, device=device)  # compile; on a GPU also its memory, as from layer to layer
    seconds = float("inf")
    for _ in range(repeat):
        t3 = clock(device)
        packed = encode_batch(qtype, w, factor, effort=effort, device=device)
        seconds = min(seconds, clock(device) - t3)
    rate = w.numel() / seconds
    line = f"{qtype:8s} {effort:6s} {rows}x{n} x{experts}: {rate / 1e9:.4f} G weights/s"
    line += f" | H {(t1 - t0) / experts * 1e3:.1f} + factor {(t2 - t1) / experts * 1e3:.1f} ms/matrix"
    line += f" | search {search_flops(qtype, effort) * rate / 1e12:.1f} TFLOP/s"
    line += f" | in+out {(w.numel() * 4 + packed.nbytes) / seconds / 1e9:.2f} GB/s"
    factors = 0 if effort == "fast" else R1_FACTORS.get(n, 0) * (t2 - t1) / experts
    line += f" | R1 routed {R1_ROUTED / rate / 60:.1f} min + factors of this shape {factors / 60:.1f} min"
    if device.type == "cpu":
        line += " | " + against_ggml(qtype, w, hessians, packed, rate)
    print(line, flush=True)


def against_ggml(qtype: str, w: torch.Tensor, hessians: list[Hessian], packed: np.ndarray, rate: float) -> str:
    """ggml's rate on the same weights, and the ratios of speed and output error."""
    quants.prepare(qtype)
    t = time.process_time()
    theirs = [quants.quantize(qtype, m.numpy(), h.diagonal.numpy()) for m, h in zip(w, hessians, strict=True)]
    their_rate = w.numel() / (time.process_time() - t)
    mine, peer = (
        sum(output_error(qtype, m, h, data) for m, h, data in zip(w, hessians, side, strict=True))
        for side in (packed, theirs)
    )
    return f"ggml {their_rate / 1e6:.2f} M weights/s, ratio {rate / their_rate:.2f}, output error {mine / peer:.3f}"


def output_error(qtype: str, w: torch.Tensor, h: Hessian, packed: np.ndarray) -> float:
    """Energy of what the rounding adds to the outputs."""
    error = w - torch.from_numpy(quants.dequantize(qtype, packed, w.shape[-1]))
    return float(((error @ h.matrix) * error).sum())


def profile(qtype: str, shape: tuple[int, int, int], effort: str, device: torch.device) -> None:
    """Where the time of one encoding goes, by operator."""
    w = torch.randn(shape, device=device) * 0.02
    factor = prepare(moments(shape[0], shape[2], device), shape[2], device, full=effort != "fast")
    encode_batch(qtype, w, factor, effort=effort, device=device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as run:
        encode_batch(qtype, w, factor, effort=effort, device=device)
        torch.cuda.synchronize()
    print(run.key_averages().table(sort_by="cuda_time_total", row_limit=22, max_name_column_width=48))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--types", nargs="+", default=["IQ1_S", "IQ2_XXS", "Q2_K"])
    p.add_argument("--effort", nargs="+", default=["fast", "normal"])
    p.add_argument("--experts", type=int, default=1)
    p.add_argument("--rows", type=int, default=0, help="0 with --columns 0: R1's gate and down")
    p.add_argument("--columns", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--repeat", type=int, default=1, help="Time the fastest of so many calls.")
    p.add_argument("--profile", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    device = torch.device(a.device)
    shapes = [(2048, 7168), (7168, 2048)] if not a.rows else [(a.rows, a.columns)]
    for qtype in a.types:
        for rows, n in shapes:
            for effort in a.effort:
                if a.profile:
                    profile(qtype, (a.experts, rows, n), effort, device)
                bench(qtype, (a.experts, rows, n), effort, device, a.repeat)


if __name__ == "__main__":
    main()
