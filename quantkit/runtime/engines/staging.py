"""Moving expert bytes from the mapped file to a device, ahead of their use."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from math import prod

import numpy as np
import torch

from quantkit.runtime.engines.stacks import Part, Stack, Stacks, Wanted, runs
from quantkit.runtime.workers import Workers

CHUNK = 4  # experts moved and dequantized at once: at R1's size 34 MB of IQ1_S, 352 MB dequantized
SLOTS = 3
SLICE = 64 << 20
ALIGN = 256


def copy_bytes(pairs: list[tuple[np.ndarray, np.ndarray]], workers: Workers, n_threads: int | None = None) -> None:
    """Fill the first of each pair, uint8 [n], from the second: shared out among threads, since one alone is slower than
    the bus."""
    step = -(-sum(len(data) for _, data in pairs) // (n_threads or workers.n))
    spans = [(to[i : i + step], data[i : i + step]) for to, data in pairs for i in range(0, len(data), step)]
    list(workers.pool.map(lambda span: np.copyto(*span), spans))


def fill(jobs: list[tuple[Stack, int, np.ndarray]], workers: Workers, n_threads: int | None = None) -> None:
    """Bytes of experts, each from its first on, to uint8 [n * n_out * row_bytes], by all threads or about so many."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    reads: list[tuple[Callable[[int, np.ndarray], None], int, np.ndarray]] = []
    for stack, begin, to in jobs:
        size = stack.data[0].nbytes
        if stack.read is None:
            pairs.append((to, stack.data[begin : begin + len(to) // size].reshape(-1)))
        else:
            reads += [(stack.read, begin + i, to[i * size : (i + 1) * size]) for i in range(len(to) // size)]
    if pairs:
        copy_bytes(pairs, workers, n_threads)
    list(workers.pool.map(lambda job: job[0](*job[1:]), reads))


def jobs_of(stack: Stack, experts: Sequence[int], to: np.ndarray) -> list[tuple[Stack, int, np.ndarray]]:
    """For `fill`: the matrices of these experts one after the other."""
    size, at, jobs = stack.data[0].nbytes, 0, []
    for first, n in runs(experts):
        jobs.append((stack, first, to[at : at + n * size]))
        at += n * size
    return jobs


def upload_experts(stack: Stack, device: torch.device, workers: Workers, experts: Sequence[int]) -> torch.Tensor:
    """A copy of these experts' bytes on a device, uint8 [len(experts), n_out, row_bytes]."""
    out = torch.empty((len(experts), *stack.data.shape[1:]), dtype=torch.uint8, device=device)
    n = max(CHUNK, SLICE // stack.data[0].nbytes)
    buffer = torch.empty(min(n, len(out)) * stack.data[0].nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for begin, part in zip(range(0, len(out), n), out.split(n), strict=True):
        fill(jobs_of(stack, experts[begin : begin + n], buffer[: part.numel()].numpy()), workers)
        part.view(-1).copy_(buffer[: part.numel()])
    return out


def upload(data: np.ndarray, device: torch.device, workers: Workers) -> torch.Tensor:
    """A copy of mapped bytes on a device."""
    flat = data.reshape(-1)
    out = torch.empty(flat.shape, dtype=torch.uint8, device=device)
    buffer = torch.empty(min(SLICE, len(flat)), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for begin in range(0, len(flat), SLICE):
        part = buffer[: len(flat) - begin]
        copy_bytes([(part.numpy(), flat[begin : begin + SLICE])], workers)
        out[begin : begin + len(part)].copy_(part)
    return out.view(data.shape)


class Ring:
    """Buffers through which chunks of experts reach the device: while one is computed with, the next is on its way and
    the one after that is read. A thread moves them, in order."""

    def __init__(self, largest: Stacks, device: torch.device, workers: Workers):
        """largest: the layer with most bytes."""
        size = sum(CHUNK * stack.data[0].nbytes + ALIGN for stack in largest)
        self.on_gpu, self.workers = device.type == "cuda", workers
        self.host = [torch.empty(size, dtype=torch.uint8, pin_memory=self.on_gpu) for _ in range(SLOTS)]
        self.there = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        if self.on_gpu:
            self.stream = torch.cuda.Stream(device)
            self.copied, self.used = ([torch.cuda.Event() for _ in range(SLOTS)] for _ in range(2))

    def chunks(
        self, wanted: Sequence[Wanted], n_threads: int | None = None
    ) -> Generator[tuple[int, list[Part]], None, None]:
        """Experts of these layers in order: (what is told of the first, gate, up and down of CHUNK experts or fewer).
        They are valid until the next is asked for. n_threads: about so many fill the buffers; None: all."""
        plan = [(w, begin) for w in wanted for begin in range(0, len(w.experts), CHUNK)]

        def move(i: int) -> Future:
            w, begin = plan[i]
            return mover.submit(self._move, i, w.stacks, w.experts[begin : begin + CHUNK], n_threads)

        with ThreadPoolExecutor(1) as mover:
            ahead: deque[Future] = deque(move(i) for i in range(min(SLOTS, len(plan))))
            try:
                for i, (w, begin) in enumerate(plan):
                    matrices = ahead.popleft().result()
                    if self.on_gpu:
                        torch.cuda.current_stream().wait_event(self.copied[i % SLOTS])
                    yield w.first + begin, matrices
                    if self.on_gpu:
                        self.used[i % SLOTS].record()
                    if i + SLOTS < len(plan):
                        ahead.append(move(i + SLOTS))
            finally:
                for future in ahead:
                    future.cancel()

    @torch.inference_mode()  # of each thread its own, and the buffers may have been made in it
    def _move(self, i: int, stacks: Stacks, experts: Sequence[int], n_threads: int | None) -> list[Part]:
        slot, at, spans, jobs = i % SLOTS, 0, [], []
        if self.on_gpu:
            self.copied[slot].synchronize()  # the buffer's last transfer
        host = self.host[slot].numpy()
        for stack in stacks:
            n_bytes, shape = len(experts) * stack.data[0].nbytes, (len(experts), *stack.data.shape[1:])
            jobs += jobs_of(stack, experts, host[at : at + n_bytes])
            spans.append((stack.qtype, at, shape, stack.n_in))
            at += -(-n_bytes // ALIGN) * ALIGN
        fill(jobs, self.workers, n_threads)
        with torch.cuda.stream(self.stream) if self.on_gpu else nullcontext():
            if self.on_gpu:
                self.stream.wait_event(self.used[slot])
            self.there[slot][:at].copy_(self.host[slot][:at], non_blocking=True)
            if self.on_gpu:
                self.copied[slot].record(self.stream)
        return [
            Part(qtype, self.there[slot][at : at + prod(shape)].view(shape), n_in) for qtype, at, shape, n_in in spans
        ]
