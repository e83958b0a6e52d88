"""Triton's kernels as the engines launch them, or many of them compiled at once before.

Triton compiles a kernel when it is first launched, which takes a second. Here work is done once without launching
anything: what it would launch is noted, and compiled meanwhile by threads. They hold Python's lock only while they walk
through the kernel's source; MLIR, LLVM and ptxas work without it.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from subprocess import CalledProcessError
from typing import Any

import torch
import triton

Note = Callable[..., object]
"""Told of a launch that is not made: the kernel, its grid, then its arguments."""

REFUSED = (triton.TritonError, CalledProcessError, RuntimeError)  # Triton's, ptxas' and the C compiler's; without one

_here = threading.local()


class Kernel:
    """A function of Triton that is launched: `kernel[grid](...)`. options: `triton.jit`'s."""

    def __init__(self, function: Callable, options: dict[str, Any]):
        self.options, self.jit = options, triton.jit(**options)(function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        note = getattr(_here, "note", None)
        return self.jit[grid] if note is None else partial(note, self, grid)

    def compiled(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
        """For such arguments, not launched: Triton's kernel, or within its `AsyncCompileMode` the future of one."""
        return self.jit.warmup(*args, grid=grid, **kwargs)


def jit_kernel(function: Callable | None = None, **options: Any) -> Any:
    """As `triton.jit`, of functions that are launched."""
    return partial(jit_kernel, **options) if function is None else Kernel(function, options)


@contextmanager
def noting(note: Note) -> Iterator[None]:
    """Within it this thread launches no kernel; what they should have written is whatever memory held."""
    before, _here.note = getattr(_here, "note", None), note
    try:
        yield
    finally:
        _here.note = before


def compile_at_once(work: Callable[[], object], n_threads: int, device: torch.device) -> int:
    """Compile and load the kernels that `work` launches, without launching them, by so many threads; how many there
    are. What a compiler refuses is raised as it comes: one of REFUSED."""
    current = (torch.cuda.set_device, (torch.cuda.current_device(),)) if device.type == "cuda" else (None, ())
    pool = ThreadPoolExecutor(n_threads, "quantkit-compile", *current)
    try:  # in a context of its own: after an error Triton 3.6 leaves its mode switched on there
        return copy_context().run(_compile, work, pool)
    finally:
        pool.shutdown(cancel_futures=True)


def _compile(work: Callable[[], object], pool: ThreadPoolExecutor) -> int:
    found: dict[int, Any] = {}

    def note(kernel: Kernel, *launch: Any, **kwargs: Any) -> None:
        compiled = kernel.compiled(*launch, **kwargs)
        if compiled is not None:  # None: interpreted
            found[id(compiled)] = compiled

    with triton.AsyncCompileMode(pool), noting(note):
        work()
    kernels = [kernel.result() if isinstance(kernel, triton.FutureKernel) else kernel for kernel in found.values()]
    # What launches a kernel is compiled too, by a C compiler, once for each signature.
    _load(pool, {str(kernel.src.signature): kernel for kernel in kernels}.values())
    _load(pool, kernels)
    return len(kernels)


def _load(pool: ThreadPoolExecutor, kernels: Iterable[Any]) -> None:
    list(pool.map(lambda kernel: kernel.run, kernels))  # which loads it
