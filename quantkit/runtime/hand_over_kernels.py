"""Triton: how a decoding step on a GPU passes to the CPU and back without ending.

Both sides write into pinned memory of the host, and then the number of the step into a flag there, which the other side
looks at until it sees it. A write to the flag comes after those before it: by a fence of the whole system on the GPU;
by a release in compiled code of the CPU; those of numpy keep their order on x86-64.
"""

import torch
import triton
import triton.language as tl

from quantkit.codecs.triton_decode import INTERPRETED
from quantkit.runtime.launches import jit_kernel


@jit_kernel
def _send(x, weights, ids, to_x, to_weights, to_ids, flags, step, d, n_used, width: tl.constexpr, slots: tl.constexpr):
    """Row program_id(0) of each into the host's memory; when all of it is there, the row's flag gets the number `step`
    points to."""
    token = tl.program_id(0).to(tl.int64)
    column, k = tl.arange(0, width), tl.arange(0, slots)
    for begin in range(0, d, width):
        at, inside = token * d + begin + column, begin + column < d
        tl.store(to_x + at, tl.load(x + at, mask=inside, other=0.0), mask=inside)
    at = token * n_used + k
    tl.store(to_weights + at, tl.load(weights + at, mask=k < n_used, other=0.0), mask=k < n_used)
    tl.store(to_ids + at, tl.load(ids + at, mask=k < n_used, other=0), mask=k < n_used)
    number = tl.load(step).to(tl.int32)
    if INTERPRETED:
        tl.store(flags + token, number)
    else:
        tl.debug_barrier()
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; st.relaxed.sys.global.u32 [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [flags + token, number],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@jit_kernel
def _receive(got, to, flag, step, size, width: tl.constexpr):
    """Wait until the flag has the number that `step` points to, then fetch what the host has written."""
    column = tl.program_id(0) * width + tl.arange(0, width)
    number = tl.load(step).to(tl.int32)
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "{ .reg .pred there; .reg .u32 seen; look: ld.acquire.sys.global.u32 seen, [$1];"
            " setp.eq.u32 there, seen, $2; @!there bra look; mov.u32 $0, seen; }",
            "=r,l,r",
            [flag, number],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.debug_barrier()
    v = tl.load(got + column, mask=column < size, other=0.0, volatile=True)
    tl.store(to + column, v, mask=column < size)


Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def send(rows: Three, to: Three, flags: torch.Tensor, step: torch.Tensor) -> None:
    """x float32 [n, d], weights float32 and experts int32 [n, k] to the same in pinned memory of the host; then n flags
    int32 there get step, int64 [1]."""
    (n, d), k = rows[0].shape, rows[1].shape[1]
    slots = triton.next_power_of_2(k)
    _send[(n,)](*rows, *to, flags, step, d, k, 1024, slots, num_warps=8)


def receive(got: torch.Tensor, to: torch.Tensor, flag: torch.Tensor, step: torch.Tensor) -> None:
    """Pinned memory of the host, float32 [n, d], to the same on the GPU, once flag [1 or more] there says step."""
    size, width = got.numel(), 1024
    _receive[(triton.cdiv(size, width),)](got, to, flag, step, size, width, num_warps=4)
