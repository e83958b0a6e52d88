"""What this process may use of its machine, in bytes and cores, and which device; and short measurements of how fast
memory, GPU and disk can be read, in bytes a second. All that ask for cores or memory ask here."""

import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit import progress, ranks
from quantkit.container import Container
from quantkit.errors import QuantkitError

if TYPE_CHECKING:  # torch takes a second to load
    import torch

RAM_BYTES = 1 << 30  # far beyond any cache
DISK_BYTES = 1 << 30
BLOCK = 8 << 20
DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # of CUDA, of CUDA in Windows' Linux, of ROCm
THREAD_VARIABLES = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")  # torch, BLAS and MKL; tokenizers

_told: int | None = None  # threads, by `use_threads`
_setting = threading.Lock()  # by `one_thread_here`


def ram() -> int:
    """What this process can have in all, bytes: the machine's, or less if a container or `ulimit` says so."""
    return Container().ram()


def free_ram() -> int:
    """Bytes that this process can take without swapping or being killed."""
    return Container().free_ram()


def free_disk(path: Path) -> int:
    """Bytes free where a file or folder is, or will be."""
    absolute = path.absolute()
    return shutil.disk_usage(next(parent for parent in (absolute, *absolute.parents) if parent.is_dir())).free


def cores() -> int:
    """Threads that this process can run at once."""
    return Container().cores()


def threads() -> int:
    """Threads that this process computes with, whatever the library: as `use_threads` or (of a process without other
    ranks, whose launcher sets it) OMP_NUM_THREADS says, else its share of the physical cores; at most `cores`."""
    if _told:
        return _told
    most, physical = _found()
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked) and ranks.count() == 1:
        return min(int(asked), most)
    return max(1, physical // ranks.local_count())


def cores_for(n: int) -> list[int]:
    """Hardware threads that n computing threads should keep to: one of each core, if there are enough of them; none
    if cores have no more than one, or n are too many."""
    one_each = Container().one_of_each_core()
    return one_each if n <= len(one_each) < len(os.sched_getaffinity(0)) else []


@cache
def _found() -> tuple[int, int]:
    """cores and physical cores, looked up once."""
    return cores(), Container().physical_cores()


def use_threads(n: int) -> None:
    """Compute with n threads from here on: torch, ggml, the compiled encoders, tokenizers, and child processes. More
    than there are cores for would wait for each other; it is said, and not done."""
    global _told
    if (most := cores()) < n:
        progress.say(f"--threads {n}: {most} are all that this process can run at once; computing with {most}")
    _told = min(n, most)
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(_told)))
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(_told)


def one_thread_here() -> None:
    """torch divides no product of the thread that calls this. What it sets is also what threads get that begin later:
    for them it is put back, by a thread of its own, since a thread that sets it takes it."""
    import torch

    with _setting:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        others = threading.Thread(target=torch.set_num_threads, args=(before,))
        others.start()
        others.join()


def bound_threads() -> None:
    """Before torch is loaded: no library starts more threads than there are physical cores for this process, where
    cores have hyperthreads, or a container a quota of CPU time. (They follow the affinity mask by themselves.)"""
    n = Container().physical_cores()
    if "OMP_NUM_THREADS" not in os.environ and n < len(os.sched_getaffinity(0)):
        os.environ["OMP_NUM_THREADS"] = str(n)


def chosen_device(asked: str | None = None) -> str:
    """torch's name of the device to compute on: `cpu`, or `cuda` for the one GPU that this process sees from here on.

    asked: as `known_device` takes it; None: a GPU if there is one. QuantkitError if the GPU is not there."""
    name, _, number = known_device(asked or "cuda").partition(":")
    if name == "cpu":
        return name
    if number:
        _show_only(int(number), str(asked))
    import torch

    with warnings.catch_warnings(record=True) as said:  # a driver that does not fit, say
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if found:
        return "cuda"
    why = "this build of torch is for CPUs" if torch.version.cuda is None else "torch sees no such GPU here"
    why = str(said[0].message).splitlines()[0] if said else why
    if asked:
        raise QuantkitError(f"--device {asked}: {why}; use --device cpu, or leave it out")
    if said:
        progress.say(f"computing on the CPU: {why}")
    return "cpu"


def known_device(asked: str) -> str:
    """`cpu`, `cuda` or `cuda:N`, and `gpu` for `cuda`; QuantkitError for anything else, without loading torch."""
    if asked != "cpu" and not re.fullmatch(r"(?:cuda|gpu)(?::\d{1,4})?", asked):
        raise QuantkitError(f"--device {asked}: unknown; choose cpu, cuda or cuda:N (gpu is cuda)")
    return asked.replace("gpu", "cuda")


def check_driver(asked: str) -> None:
    """QuantkitError, without loading torch, for a GPU where the system shows the driver of none."""
    if asked != "cpu" and sys.platform == "linux" and not any(map(os.path.exists, DRIVERS)):
        raise QuantkitError(f"--device {asked}: this machine shows no GPU; use --device cpu, or leave it out")


def _show_only(gpu: int, asked: str) -> None:
    """Hide all other GPUs from this process, which works until CUDA is first asked."""
    if ranks.count() > 1:
        raise QuantkitError(f"--device {asked}: each rank takes a GPU of its own; say cuda, and CUDA_VISIBLE_DEVICES")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",") if name.strip()] if visible is not None else None
    if names is not None and gpu >= len(names):
        raise QuantkitError(f"--device {asked}: no such GPU: CUDA_VISIBLE_DEVICES shows {len(names)}, counted from 0")
    os.environ["CUDA_VISIBLE_DEVICES"] = names[gpu] if names is not None else str(gpu)


def free_vram(device: "torch.device | None" = None) -> int:
    """Bytes of GPU memory that nothing holds, what torch's allocator keeps for reuse included; 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def ram_bandwidth(n_bytes: int = RAM_BYTES, repeats: int = 3) -> float:
    """Best of some sums over a buffer, one thread a core; numpy's sum of int64 is bound by reading."""
    import numpy as np

    n_threads = cores()
    buffer = np.ones(n_bytes // 8, np.int64)  # ones: pages of zeros could all be one page
    parts = np.array_split(buffer, n_threads)
    with ThreadPoolExecutor(n_threads) as pool:
        seconds = min(_timed(lambda: list(pool.map(np.sum, parts))) for _ in range(repeats))
    return buffer.nbytes / seconds


def gpu_bandwidth(n_bytes: int = RAM_BYTES, repeats: int = 5) -> float | None:
    """Best of some copies on the GPU (a byte read and a byte written each); None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    source = torch.ones(n_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    copy()
    return 2 * n_bytes / min(_timed(copy) for _ in range(repeats))


def gpu_name() -> str:
    """As its driver calls it; there is one."""
    import torch

    return torch.cuda.get_device_name()


def disk_bandwidth(path: Path, n_bytes: int = DISK_BYTES) -> float:
    """Reading the first bytes of a file past the page cache (O_DIRECT)."""
    import torch

    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        what = f"{path}: cannot be read past the page cache: {error.strerror}; give --bandwidth disk=GB/S"
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
        raise QuantkitError(f"{path}: {done} bytes are too few to measure the disk; give --bandwidth disk=GB/S")
    return done / (time.perf_counter() - begin)


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
