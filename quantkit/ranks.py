"""The processes of one run on one host or several: `accelerate launch --multi_gpu --num_processes N -m quantkit make`.

Every rank runs the same program and reaches the same exchanges in the same order. They share a folder (on several
hosts: a network file system), the file being written included. Rank 0 alone decides, prints and gives names. Without a
launcher there is one rank, and everything here does nothing.

No rank waits for one that is gone: an error ends them all, and a thread in each watches the others' heartbeats through
the launcher's key-value store.
"""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError

if TYPE_CHECKING:  # torch takes a second to load
    import numpy as np
    import torch

BEAT = 1.0  # seconds between heartbeats
LOST = 90.0  # without one: a rank, or its host, is gone (compiling kernels may hold the interpreter for seconds)
GRACE = 15.0  # to save what is done, once another rank has failed; then this process ends, whatever it waits for
PATIENCE = timedelta(days=7)  # of one exchange: a rank may encode for hours; the watch finds those that are gone
FAILED, ALIVE = "quantkit/failed", "quantkit/alive/"
LAUNCHERS = {  # where torchrun (and with it accelerate), Intel MPI or MPICH, Open MPI and MVAPICH2 say who one is
    "rank": ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "count": ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "local rank": ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    "local count": ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
}


@dataclass
class _Team:
    index: int = 0
    count: int = 1
    local_count: int = 1
    store: Any = None
    gpus: Any = None  # the group that carries what lives on GPUs
    stop: threading.Event = field(default_factory=threading.Event)


_team = _Team()


def index() -> int:
    """This rank's number, 0 for the one that decides."""
    return _team.index


def count() -> int:
    """Ranks of this run, 1 without a launcher."""
    return _team.count


def local_count() -> int:
    """Ranks on this host, which share its cores and memory."""
    return _team.local_count


def launched_index() -> int:
    """This process among those that a launcher started, whether they have met or not."""
    return _launched()[0]


def _launched() -> tuple[int, int, int, int]:
    """(rank, ranks, rank on this host, ranks on this host) as the launcher says."""
    found = {what: _number(names) for what, names in LAUNCHERS.items()}
    asked = "MASTER_ADDR" in os.environ and any(key.startswith("ACCELERATE_") for key in os.environ)
    if asked and found["rank"] is None:
        raise QuantkitError(
            "accelerate launch was asked for several processes and started one; with --multi_gpu it "
            "starts them all, on CPUs too (then -m quantkit ... --device cpu)"
        )
    return found["rank"] or 0, found["count"] or 1, found["local rank"] or 0, found["local count"] or 1


def _number(names: Sequence[str]) -> int | None:
    for name in names:
        if name in os.environ:
            if not os.environ[name].isdecimal():
                raise QuantkitError(f"the environment's {name} is {os.environ[name]}, not a number: unset it")
            return int(os.environ[name])
    return None


def join() -> None:
    """Meet the other ranks, if a launcher started several. Each sees one GPU of its host, as the only one."""
    rank, world, local, local_count = _launched()
    if world == 1 or _team.count > 1:
        return
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    os.environ["CUDA_VISIBLE_DEVICES"] = (visible[local : local + 1] or [""])[0] if visible else str(local)
    os.environ.setdefault("MASTER_PORT", "29500")
    if world == local_count:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    import torch
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise QuantkitError(f"rank {rank} of {world} cannot meet the others: {str(error).splitlines()[0]}") from None
    store: Any = dist.distributed_c10d._get_default_store()  # torch's types know no `clone`
    _team.index, _team.count, _team.local_count = rank, world, local_count
    _team.store, _team.stop = store, threading.Event()
    store.set(f"{ALIVE}{rank}", "0")
    if all(gather(torch.cuda.is_available() and dist.is_nccl_available())):
        with _exchange():
            _team.gpus = dist.new_group(backend="nccl", timeout=PATIENCE)
    threading.Thread(target=_watch, args=(store.clone(), rank, world, _team.stop), daemon=True).start()


def leave() -> None:
    """When nothing is left to be done together: rank 0 goes on alone, the others have only to return."""
    if _team.count == 1:
        return
    barrier()
    _team.stop.set()
    import torch.distributed as dist

    dist.destroy_process_group()
    _team.count = _team.local_count = 1


def barrier() -> None:
    """Return when every rank has come here."""
    gather(None)


def agree(decide: Callable[[], Any]) -> Any:
    """What rank 0 finds, known to all: `decide` runs there only. Values as JSON has them."""
    if _team.count == 1:
        return decide()
    return gather(decide() if _team.index == 0 else None)[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value (as JSON has it), in the order of ranks, known to all."""
    if _team.count == 1:
        return [value]
    import torch

    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    with _exchange() as dist:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(_team.count)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        longest = int(max(sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(_team.count)]
        dist.all_gather(found, padded)
    return [json.loads(bytes(body[: int(size)].numpy())) for body, size in zip(found, sizes, strict=True)]


def total(array: "np.ndarray") -> "np.ndarray":
    """Sum over ranks of arrays of one shape. Exact where all but one of the addends are zero."""
    if _team.count == 1:
        return array
    import torch

    tensor = torch.from_numpy(array.copy())
    with _exchange() as dist:
        dist.all_reduce(tensor)
    return tensor.numpy()


def spread(tensor: "torch.Tensor", owner: int) -> "torch.Tensor":
    """The contiguous tensor of rank `owner`, in place on all ranks, wherever it lives."""
    import torch

    if _team.count > 1 and tensor.numel():
        with _exchange() as dist:
            dist.broadcast(tensor.view(-1).view(torch.uint8), owner, _team.gpus if tensor.is_cuda else None)
    return tensor


def same(value: Any, what: str) -> None:
    """QuantkitError unless all ranks have the same value (as JSON has it)."""
    found = gather(value)
    for other, theirs in enumerate(found):
        if theirs != found[0]:
            raise QuantkitError(f"rank {other} has another {what} than rank 0: {theirs}, not {found[0]}")


def may_speak() -> bool:
    """Whether this rank is the one that tells a person why the run ends: the first that asks. Warns the others."""
    if _team.count == 1:
        return True
    try:
        return _team.store.add(FAILED, 1) == 1
    except RuntimeError:  # the store's host is gone, and with it who might have spoken
        return True


def end(code: int) -> None:
    """After an error, end a rank among others at once: what torch would wait for at exit does not come."""
    if _team.count > 1:
        os._exit(code)


@contextmanager
def _exchange() -> Iterator[Any]:
    """torch.distributed; its errors mean that a rank is gone."""
    import torch.distributed as dist

    try:
        yield dist
    except RuntimeError as error:
        reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).split(". ")[0]  # without the place in its source
        raise QuantkitError(
            f"another rank was lost, so all end; run the same command again, with any number of ranks, "
            f"to go on ({reason})"
        ) from None


def _watch(store: Any, rank: int, world: int, stop: threading.Event) -> None:
    """Beat, and end this process when another has failed or fallen silent: its main thread may wait for that one."""
    others = [other for other in range(world) if other != rank]
    heard = dict.fromkeys(others, (b"", time.monotonic()))
    beat, silent = 0, None
    while not stop.wait(BEAT):
        try:
            store.set(f"{ALIVE}{rank}", str(beat := beat + 1))
            now = time.monotonic()
            for other in others:
                last = store.get(f"{ALIVE}{other}")
                if last != heard[other][0]:
                    heard[other] = last, now
            silent = next((other for other in others if now - heard[other][1] > LOST), None)
            if silent is None and not store.check([FAILED]):
                continue
            spoke = silent is not None and store.add(FAILED, 1) == 1
        except RuntimeError:
            spoke = False  # the store is gone, and its host with it
        if stop.wait(BEAT):  # this process is ending already
            return
        if spoke:
            os.write(
                2,
                f"quantkit: rank {silent} was not heard of for {LOST:.0f} s, so all end; run the same command "
                "again to go on\n".encode(),
            )
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        if not stop.wait(GRACE):
            os._exit(1)
        return
