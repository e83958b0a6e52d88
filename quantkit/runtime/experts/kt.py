"""Routed experts by KTransformers' CPU kernels (kt-kernel, LLAMAFILE backend), and whether a file gets them.

kt-kernel computes some types silently wrong on some CPU variants (IQ2_XXS with AVX512-VNNI and up), returns zeros for
others, and ends the process on a gate of a type that it does not know. So nothing is believed: a child process (this
file, run as a script) multiplies a few blocks of every type that the file's experts have, on this CPU, and times both
engines on the file's first MoE layer. kt-kernel 0.7.2 reads the mapped file in place, as ggml does; it copies nothing.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from quantkit.codecs.types import row_bytes
from quantkit.errors import QuantkitError
from quantkit.ggml.codec import dequantize
from quantkit.ggml.graph import Experts as GgmlExperts
from quantkit.ggml.library import type_id
from quantkit.progress import say
from quantkit.runtime.sources import GGUFSource

Choice = Literal["auto", "ggml", "kt"]
INSTALL = "pip install --no-deps kt-kernel==0.7.2"
BLOCK = 256  # hidden and expert FFN sizes must be multiples of it
ROWS = 256  # tokens computed at once: bounds kt-kernel's buffers
# Activations are rounded to 8 bits (2 %, with IQ4_XS 6 %) and results to BF16; a wrong kernel is off by 30 % and more.
MOST_ERROR = 0.08
WINS = 0.9  # kt-kernel is taken if it needs less than this share of ggml's time ...
# ... and on the CPU if it also saves what the one-graph engine saves: layer by layer in torch costs 1.8 ms more a layer
# and token (docs/runtime.md: 73 against 231 tok/s with 5 layers, 109 against 525 with 4).
GRAPH_SAVES = 1.8
SAMPLE, SAMPLE_EXPERTS, SAMPLE_ROWS = 512, 2, 16  # size, experts and tokens of the self-test; > 10 rows: both kernels
WARM, TIMED = 4, 16  # tokens
IDLE = 0.1  # seconds after which the other engine's threads sleep: kt-kernel's spin for 50 ms
TIMEOUT = 300


def available() -> bool:
    return importlib.util.find_spec("kt_kernel") is not None


class KtExperts:
    """As ggml.Experts: routed experts of one layer from their quantized bytes, which stay where they are."""

    def __init__(self, stacks, d: int, n_ff: int, n_expert: int, n_used: int, n_threads: int):
        self.stacks, self.n_expert = stacks, n_expert
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
            config.gate_type, config.up_type, config.down_type = (type_id(qtype) for qtype, _ in self.stacks)
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
    """kt-kernel's C++ prints to standard output, which is the model's answer."""
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


@dataclass
class Trial:
    """What the child saw. variant: of kt-kernel for this CPU. errors: type -> relative error of its product.
    ms: engine -> milliseconds that one token takes in the first MoE layer. problem: why kt-kernel cannot be used."""

    variant: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    ms: dict[str, float] = field(default_factory=dict)
    problem: str | None = None


def select(source: GGUFSource, wanted: Choice = "auto") -> None:
    """Let `source` make the experts of the wanted engine; says on stderr what auto chose and why, if it had a choice.

    QuantkitError if kt-kernel is wanted and not installed, or computes one of the file's types wrongly.
    """
    if wanted == "ggml" or not source.hybrid or not source.config.n_moe:
        return
    if source.residency:
        if wanted == "kt":
            raise QuantkitError("--experts kt reads the whole mapped file: leave out --ram, or use --experts ggml")
        return
    if not available():
        if wanted == "kt":
            raise QuantkitError(f"--experts kt needs kt-kernel: {INSTALL}")
        return
    found = trial(source, timed=wanted == "auto")
    if found.problem and wanted == "kt":
        raise QuantkitError(f"--experts kt: {found.problem}; use --experts ggml")
    taken, why = ("kt", "") if wanted == "kt" else verdict(found, on_cpu=source.device.type == "cpu")
    if taken == "kt":
        source.make_experts = KtExperts
    say(f"experts: {why}" if why else f"experts: kt-kernel ({found.variant})")


def verdict(found: Trial, on_cpu: bool) -> tuple[str, str]:
    """("kt" or "ggml", the reason)."""
    if found.problem:
        return "ggml", f"ggml, because {found.problem}"
    kt, other = found.ms["kt"], found.ms["ggml"]
    figures = f"kt-kernel ({found.variant}) takes {kt:.2f} ms a layer and token, ggml {other:.2f}"
    if kt >= WINS * other:
        return "ggml", f"ggml: {figures}"
    if on_cpu and kt + GRAPH_SAVES >= other:
        return "ggml", f"ggml: {figures}, and the one graph with all layers saves {GRAPH_SAVES} more"
    return "kt", f"kt-kernel: {figures}"


def trial(source: GGUFSource, timed: bool = True) -> Trial:
    """kt-kernel on this CPU with this file's types, in a child that may crash; and the times of both engines."""
    c = source.config
    if c.d % BLOCK or c.n_ff_exp % BLOCK:
        return Trial(
            problem=f"kt-kernel needs hidden and expert FFN sizes that are multiples of {BLOCK}, not {c.d}, "
            f"{c.n_ff_exp}"
        )
    request = {"path": str(source.file.path), "threads": source.n_threads, "timed": timed}
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    try:
        child = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(request)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return Trial(problem=f"kt-kernel did not answer in {TIMEOUT} s")
    return _read(child.stdout, child.returncode, child.stderr)


def _read(output: str, code: int, errors: str) -> Trial:
    """The child's lines, as far as it came."""
    found, trying = Trial(), ""
    for line in output.splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            continue  # kt-kernel prints too
        if not isinstance(told, dict):
            continue
        found.variant = told.get("variant", found.variant)
        trying = told.get("trying", "")
        found.errors |= told.get("error", {})
        found.ms |= told.get("ms", {})
        # Written so that an answer that is not a number is a problem.
        wrong = [
            f"{qtype} wrongly (relative error {error:.2g})"
            for qtype, error in found.errors.items()
            if not error <= MOST_ERROR
        ]
        if wrong:
            found.problem = f"kt-kernel ({found.variant}) computes {', '.join(wrong)}"
    if code and not found.problem:
        died = signal.Signals(-code).name if code < 0 else f"status {code}"
        last = (errors.strip().splitlines() or ["no message"])[-1]
        found.problem = f"kt-kernel ({found.variant or 'not loaded'}) ended with {died} " + (
            f"on {trying}" if trying else f"({last:.200})"
        )
    return found


# The child.


def _serve(request: dict[str, Any]) -> None:
    with _silent():
        import kt_kernel
    _tell(variant=kt_kernel.__cpu_variant__)
    source = GGUFSource(request["path"], n_threads=request["threads"])
    torch.set_num_threads(request["threads"])
    c = source.config
    stacks = {layer: source.expert_stacks(layer) for layer in range(c.n_dense, c.n_layer)}
    types = {qtype: data for layer in stacks.values() for qtype, data in layer}
    for qtype, data in sorted(types.items()):
        _tell(trying=qtype)
        _tell(error={qtype: self_test(qtype, data, request["threads"])})
    if request["timed"]:
        shape = (c.d, c.n_ff_exp, c.n_expert, c.n_used, request["threads"])
        _tell(trying=f"layer {c.n_dense}")
        made = {name: maker(stacks[c.n_dense], *shape) for name, maker in (("ggml", GgmlExperts), ("kt", KtExperts))}
        ms = dict.fromkeys(made, float("inf"))
        for _ in range(2):
            for name, experts in made.items():
                time.sleep(IDLE)
                ms[name] = min(ms[name], measure(experts, c.d, c.n_expert, c.n_used))
        _tell(ms=ms)
    sys.stdout.flush()
    os._exit(0)  # worker threads may not join


def _tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def self_test(qtype: str, data: np.ndarray, n_threads: int) -> float:
    """Relative error of kt-kernel from the decoded weights, the worse of its kernels for one and for many tokens, with
    the first blocks of a tensor taken for two experts of 512 x 512."""
    width = row_bytes(qtype, SAMPLE)
    values = data.reshape(-1)[: 3 * SAMPLE_EXPERTS * SAMPLE * width]
    parts = np.resize(values, (3, SAMPLE_EXPERTS, SAMPLE, width))  # repeated if the tensor is small
    random = torch.Generator().manual_seed(0)
    x = torch.randn((SAMPLE_ROWS, SAMPLE), generator=random).bfloat16().float()
    weight = torch.rand((SAMPLE_ROWS, SAMPLE_EXPERTS), generator=random) + 0.5
    expert = torch.tensor([[0, 1], [1, 0]]).repeat(SAMPLE_ROWS // 2, 1)
    decoded = torch.from_numpy(dequantize(qtype, parts, SAMPLE)).view(3, SAMPLE_EXPERTS, SAMPLE, SAMPLE)
    want = torch.zeros_like(x)
    for e in range(SAMPLE_EXPERTS):
        gate, up, down = decoded[:, e]
        share = (weight * (expert == e)).sum(1, keepdim=True)
        want += share * ((F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    experts = KtExperts([(qtype, part) for part in parts], SAMPLE, SAMPLE, SAMPLE_EXPERTS, SAMPLE_EXPERTS, n_threads)
    together = experts(x, expert, weight)
    alone = torch.cat([experts(*row) for row in zip(*(v[:4].split(1) for v in (x, expert, weight)), strict=True)])
    errors = [float((got - wanted).norm() / wanted.norm()) for got, wanted in ((together, want), (alone, want[:4]))]
    return max(errors, key=lambda error: (error != error, error))  # not a number counts as the worst


def measure(experts: Callable[..., torch.Tensor], d: int, n_expert: int, n_used: int) -> float:
    """Milliseconds for one token, median over tokens that each go to other experts, as decoding does."""
    random = torch.Generator().manual_seed(0)
    weight, seconds = torch.full((1, n_used), 1 / n_used), []
    for _ in range(WARM + TIMED):
        x = torch.randn((1, d), generator=random)
        expert = torch.randperm(n_expert, generator=random)[None, :n_used].int()
        start = time.perf_counter()
        experts(x, expert, weight)
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds[WARM:]))


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
