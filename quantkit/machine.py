"""Short measurements of this machine: how fast memory, GPU and disk can be read, in bytes a second."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from quantkit.errors import QuantkitError

RAM_BYTES = 1 << 30  # far beyond any cache
DISK_BYTES = 1 << 30
BLOCK = 8 << 20


def default_device() -> str:
    """torch's name of a GPU if there is one, else of the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_ram() -> int:
    """Bytes that a new process can take without swapping (MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_vram(device: torch.device | None = None) -> int:
    """Bytes of GPU memory that nothing holds, what torch's allocator keeps for reuse included; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def ram_bandwidth(n_bytes: int = RAM_BYTES, repeats: int = 3) -> float:
    """Best of some sums over a buffer, one thread a core; numpy's sum of int64 is bound by reading."""
    cores = len(os.sched_getaffinity(0))
    buffer = np.ones(n_bytes // 8, np.int64)  # ones: pages of zeros could all be one page
    parts = np.array_split(buffer, cores)
    with ThreadPoolExecutor(cores) as pool:
        seconds = min(_timed(lambda: list(pool.map(np.sum, parts))) for _ in range(repeats))
    return buffer.nbytes / seconds


def gpu_bandwidth(n_bytes: int = RAM_BYTES, repeats: int = 5) -> float | None:
    """Best of some copies on the GPU (a byte read and a byte written each); None without one."""
    if not torch.cuda.is_available():
        return None
    source = torch.ones(n_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    copy()
    return 2 * n_bytes / min(_timed(copy) for _ in range(repeats))


def disk_bandwidth(path: Path, n_bytes: int = DISK_BYTES) -> float:
    """Reading the first bytes of a file past the page cache (O_DIRECT)."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        what = f"{path}: cannot be read past the page cache: {error.strerror}; give --disk-bandwidth"
        raise QuantkitError(what) from None
    buffer = torch.empty(BLOCK + 4096, dtype=torch.uint8).numpy()
    start = -buffer.ctypes.data % 4096  # O_DIRECT wants aligned memory
    view = buffer.data[start : start + BLOCK]
    done, begin = 0, time.perf_counter()
    try:
        while done < n_bytes and (got := os.preadv(file, [view], done)):
            done += got
    finally:
        os.close(file)
    if done < BLOCK:
        raise QuantkitError(f"{path}: {done} bytes are too few to measure the disk; give --disk-bandwidth")
    return done / (time.perf_counter() - begin)


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
