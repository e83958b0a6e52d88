"""Triton: how the kernels of a decoding step follow each other.

On a GPU of compute capability 9.0 or more a kernel's programs are put into place, and ask for their weights, while the
kernel before is still at work (programmatic dependent launch); they wait before they read what that one writes. Each of
them does, so that whatever is two kernels back is complete too.
"""

from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # without inline assembly


def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device may begin before the one ahead has ended."""
    able = device.type == "cuda" and not INTERPRETED.value and torch.version.cuda is not None
    return able and torch.cuda.get_device_capability(device) >= (9, 0)


def launching(device: torch.device) -> dict[str, Any]:
    """Options of a launch whose kernel has `overlap: tl.constexpr` and begins with `follow` or its parts."""
    return {"overlap": True, "launch_pdl": True} if overlaps(device) else {"overlap": False}


@triton.jit
def follow(overlap: tl.constexpr):
    """The next kernel may get its programs into place; what the ones before have written is there."""
    if overlap:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch(p, size, lanes: tl.constexpr):
    """Ask for `size` bytes from p on, that they be in the L2 cache when they are read: by so many threads."""
    first = p.to(tl.int64) & -16
    size = (p.to(tl.int64) + size - first) & -16
    part = (((size + 15) // lanes + 15) // 16 * 16).to(tl.int32)
    at = first + tl.minimum(tl.arange(0, lanes) * part, tl.maximum(size - part, 0))
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [at, tl.minimum(part, size.to(tl.int32)) + tl.arange(0, lanes) * 0],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
