"""Routed experts of one layer in ggml and in kt-kernel, in turns: why kt-kernel is no engine of ours.

    python scripts/bench/experts.py [--types IQ1_S,IQ1_S,IQ1_S] [--experts 256] [--threads N] [--rounds 5] [--rows 1,16]
    python scripts/bench/experts.py FILE ...

Without a FILE: R1's geometry (7168 x 2048, 8 of --experts), the same 64 encoded rows over and over. Prints medians and
fastest times of all calls, and the GB/s of expert bytes at the fastest; with a FILE its first MoE layer. kt-kernel pins
its threads to the first cores of the first NUMA node, whatever taskset says.

    pip install --no-deps kt-kernel==0.7.2
"""

import argparse
import contextlib
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch

from quantkit.ggml import library as ggml
from quantkit.runtime.sources.weights import open_gguf

ROWS = 256  # tokens computed at once: bounds kt-kernel's buffers


class KtExperts:
    """As ggml.Experts: routed experts of one layer from their quantized bytes, which stay where they are."""

    def __init__(self, gate, up, down, d: int, n_ff: int, n_expert: int, n_used: int, n_threads: int):
        self.stacks, self.n_expert = (gate, up, down), n_expert
        self.on_gpu = torch.zeros(n_expert, dtype=torch.bool)
        self.order = torch.arange(n_expert, dtype=torch.int32)
        with _silent():
            from kt_kernel_ext.kvcache import ggml_type
            from kt_kernel_ext.moe import MOE, MOEConfig

            self.cpu = _workers(n_threads)
            config = MOEConfig(n_expert, n_used, d, n_ff, self.on_gpu.data_ptr())
            config.layer_idx, config.pool = 0, self.cpu.backend_
            config.m_block, config.group_min_len = 32, 10  # kt-kernel's own
            config.max_len = config.group_max_len = ROWS
            config.gate_proj, config.up_proj, config.down_proj = (data.ctypes.data for _, data in self.stacks)
            config.gate_type, config.up_type, config.down_type = (ggml.type_id(qtype) for qtype, _ in self.stacks)
            config.hidden_type = ggml_type.BF16
            self.moe = MOE(config)
            self._run(self.moe.load_weights_task(self.order.data_ptr()))

    def _run(self, task) -> None:
        self.cpu.submit(task)
        self.cpu.sync()

    def __call__(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x float32 [n, d], expert int [n, n_used], weight float32 [n, n_used] -> float32 [n, d]; rounded to BF16."""
        x, expert, weight = x.bfloat16().contiguous(), expert.long().contiguous(), weight.float().contiguous()
        out = torch.empty_like(x)
        for part in zip(*(value.split(ROWS) for value in (x, expert, weight, out)), strict=True):
            n = torch.tensor([len(part[0])], dtype=torch.int32)
            x_at, expert_at, weight_at, out_at = (value.data_ptr() for value in part)
            self._run(self.moe.forward_task(n.data_ptr(), expert.shape[1], expert_at, weight_at, x_at, out_at, False))
        return out.float()


@cache
def _workers(n_threads: int):
    """One pool of threads for the process, on the first NUMA node."""
    import kt_kernel_ext

    config = kt_kernel_ext.WorkerPoolConfig()
    config.subpool_count, config.subpool_numa_map, config.subpool_thread_count = 1, [0], [n_threads]
    workers = kt_kernel_ext.CPUInfer(config)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(workers))  # its destructor prints, and waits for its threads
    return workers


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """kt-kernel's C++ prints to standard output."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        import kt_kernel  # noqa: F401  (prints, and makes kt_kernel_ext importable)

        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


MAKERS = {"ggml": ggml.Experts, "kt": KtExperts}


def repeated(qtype: str, n_expert: int, n_out: int, n_in: int) -> tuple[str, np.ndarray]:
    rows = np.random.default_rng(0).standard_normal((64, n_in)).astype(np.float32)
    packed = ggml.quantize(qtype, rows, np.ones(n_in, np.float32))
    data = np.empty((n_expert, n_out, packed.shape[1]), np.uint8)
    data.reshape(-1, *packed.shape)[:] = packed
    return qtype, data


def compare(stacks, d: int, n_ff: int, n_expert: int, n_used: int, args) -> None:
    made = {name: make(*stacks, d, n_ff, n_expert, n_used, args.threads) for name, make in MAKERS.items()}
    for n in map(int, args.rows.split(",")):
        random = torch.Generator().manual_seed(n)
        tokens = []
        for _ in range(8):
            expert = torch.stack([torch.randperm(n_expert, generator=random)[:n_used] for _ in range(n)]).int()
            tokens.append((torch.randn((n, d), generator=random).bfloat16().float(), expert, torch.ones(n, n_used)))
        found = {name: [experts(*token) for token in tokens[:2]] for name, experts in made.items()}
        a, b = (torch.cat(found[name]) for name in MAKERS)
        ms: dict[str, list[float]] = {name: [] for name in MAKERS}
        for _ in range(args.rounds):
            for name, experts in made.items():
                time.sleep(0.05)  # the other's threads go to sleep
                for token in tokens:
                    start = time.perf_counter()
                    experts(*token)
                    ms[name].append(1000 * (time.perf_counter() - start))
        used = len(torch.unique(tokens[0][1])) * sum(data[0].nbytes for _, data in stacks)
        for name, all_ms in ms.items():
            best = min(all_ms)
            print(
                f"{n:4} tokens, {name:4}: median {statistics.median(all_ms):9.3f} ms, fastest {best:9.3f} ms "
                f"({used / best / 1e6:6.2f} GB/s)"
            )
        median, best = (f(ms["kt"]) / f(ms["ggml"]) for f in (statistics.median, min))
        print(
            f"{n:4} tokens, kt/ggml: {median:.2f} by medians, {best:.2f} by the fastest; relative difference "
            f"{float((a - b).norm() / a.norm()):.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?")
    parser.add_argument("--types", default="IQ1_S,IQ1_S,IQ1_S", help="gate, up, down")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", default="1,16,256")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.file:
        weights = open_gguf(args.file, n_threads=args.threads)
        c = weights.config
        compare(weights.expert_stacks(c.n_dense), c.d, c.n_ff_exp, c.n_expert, c.n_used, args)
    else:
        d, n_ff = 7168, 2048
        gate, up, down = args.types.split(",")
        stacks = [
            repeated(qtype, args.experts, n_out, n_in)
            for qtype, n_out, n_in in ((gate, n_ff, d), (up, n_ff, d), (down, d, n_ff))
        ]
        compare(stacks, d, n_ff, args.experts, 8, args)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
