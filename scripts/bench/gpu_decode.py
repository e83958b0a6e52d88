"""A file on a GPU: decoding and prefill with experts on the CPU and in VRAM, in the same run llama-bench with either.

    python scripts/bench/synthetic_gguf.py /dev/shm/r1.gguf --dense 1 --moe 4
    python scripts/bench/gpu_decode.py /dev/shm/r1.gguf --llama-bench llama-bench --check tiny-r1.gguf
    python scripts/bench/gpu_decode.py --check tiny-r1.gguf --check other.gguf      # correctness alone

llama-bench should be a build with CUDA, or the comparison says nothing: --llama-cpu-experts and --llama-vram are its
options for the two cases. Prints as it goes: correctness and speed of the kernels, bandwidths, then each engine.
--check: a small file whose logits are compared with those of the exactly dequantized one: after a prompt of 600 tokens,
then 40 times after one more.
"""

import argparse
import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from quantkit.codecs import types as qtypes
from quantkit.codecs.registry import codec
from quantkit.runtime import kernels, step_kernels
from quantkit.runtime.engines import gpu_memory
from quantkit.runtime.engines.gpu import GpuEngine
from quantkit.runtime.engines.gpu_layers import GpuLayer
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.engines.staging import copy_bytes
from quantkit.runtime.engines.torch import TorchEngine
from quantkit.runtime.experts.cpu import GgmlExperts
from quantkit.runtime.experts.native import threads
from quantkit.runtime.experts.streamed import expert_names
from quantkit.runtime.native.library import native
from quantkit.runtime.sources.gguf import open_gguf, open_source
from quantkit.runtime.workers import Workers

GB = 1e9
BEGUN = time.perf_counter()


def say(*parts) -> None:
    print(f"[{time.perf_counter() - BEGUN:5.1f}s]", *parts, flush=True)


def timed(work, repeats: int) -> float:
    """Seconds of one call on the GPU, after one to warm up."""
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def kld(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Mean KLD, share of equal most probable tokens."""
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean()), float((a.argmax(-1) == b.argmax(-1)).float().mean())


def kernel_report(types: list[str]) -> None:
    """Each type: greatest error against torch, and the rates of decoding in registers and of dequantizing."""
    for qtype in types:
        sizes, n, n_out, n_in = qtypes.stored(qtype), 16, 4096, 7168
        shape = (n, n_out, n_in // sizes.block_size, sizes.type_size)
        data = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
        if qtype == "IQ1_M":
            data[..., 49::2] &= 0x3F
        for field in {"d", "dmin"}.intersection(codec(qtype).block.names):
            data[..., codec(qtype).block.fields[field][1] + 1] &= 0x3B  # finite
        data = data.view(n, n_out, -1)
        x = torch.randn(1, n_in, device="cuda")
        ids = torch.tensor([3, 0, 15, 7, 8, 1, 12, 5], dtype=torch.int32, device="cuda")
        rows = step_kernels.gated(x, None)
        few = codec(qtype).dequantize(data[:, :64])
        expected = torch.einsum("poi,i->po", few[ids.long()].double(), x[0].double())
        error = float((kernels.products(qtype, data, rows, ids)[:, :64] - expected).abs().max() / expected.abs().max())
        out = torch.empty(n_out, n_in, dtype=torch.bfloat16, device="cuda")
        rounded = kernels.dequantize(qtype, data[1], out)[:64].float()
        worst = float((rounded - few[1]).abs().max() / few[1].abs().max())
        begin, rates = [0], []

        def one(matrices=data, begin=begin, rows=rows, ids=ids, qtype=qtype) -> None:
            begin[0] ^= 8  # other matrices each time: they do not stay in the cache
            kernels.products(qtype, matrices[begin[0] : begin[0] + 8], rows, ids % 8)

        product = timed(one, 20)
        rates = (8 * data[0].nbytes / product / GB, 8 * n_out * n_in / product / 1e12)
        dense = timed(lambda data=data, out=out, qtype=qtype: kernels.dequantize(qtype, data[1], out), 20)
        say(
            f"{qtype:8} product error {error:.1e}, {rates[0]:6.0f} GB/s, {rates[1]:.2f} Tweights/s; dequantize error "
            f"{worst:.1e}, {n_out * n_in / dense / 1e12:.2f} Tweights/s"
        )


def bandwidths(workers: Workers) -> float:
    """GB/s that all threads read; also printed: the bus, and the GPU's own memory."""
    data = np.ones(2 << 30, np.uint8)
    spans = np.array_split(data.view(np.int64), workers.n)
    total = 0.0
    for _ in range(3):
        start = time.perf_counter()
        list(workers.pool.map(np.add.reduce, spans))
        total = max(total, data.nbytes / (time.perf_counter() - start) / GB)
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    bus = host.nbytes / timed(lambda: there.copy_(host, non_blocking=True), 5) / GB
    own = 2 * there.nbytes / timed(lambda: there.clone(), 20) / GB
    start = time.perf_counter()
    for _ in range(4):
        copy_bytes([(host.numpy(), data[: host.nbytes])], workers)
    staging = 4 * host.nbytes / (time.perf_counter() - start) / GB
    say(
        f"memory: {workers.n} threads read {total:.0f} GB/s, copy to pinned {staging:.0f} GB/s; bus {bus:.0f} GB/s; "
        f"GPU copy {own:.0f} GB/s"
    )
    return total


class Watch:
    """Seconds in the CPU's experts, of so many threads: those that ours say, and of calls of ggml's."""

    def __init__(self, n_threads: int):
        self.ours, self.by_ggml, self.begun = threads(n_threads) if native() else None, 0.0, 0.0
        call = GgmlExperts.__call__

        def watched(experts, *arguments):
            start = time.perf_counter()
            out = call(experts, *arguments)
            self.by_ggml += time.perf_counter() - start
            return out

        GgmlExperts.__call__ = watched

    def begin(self) -> None:
        self.begun += self.seconds()

    def seconds(self) -> float:
        """Since it was begun."""
        return self.by_ggml + (self.ours.busy() if self.ours else 0.0) - self.begun


def measure(
    engine: GpuEngine, name: str, prompt: list[int], n_tokens: int, watch: Watch, read: int
) -> dict[str, float]:
    """tok/s of decoding and prefill. read: bytes of experts that a token needs on the CPU."""
    n_layer = engine.config.n_layer
    torch.cuda.reset_peak_memory_stats()

    def decode(n: int) -> float:
        engine.prefill(0, prompt[:1], 0)
        start = time.perf_counter()
        for token in prompt[:n]:
            engine.decode([0], [token])  # as llama-bench: which token is likely is nobody's question
        return n / (time.perf_counter() - start)

    decode(4)
    watch.begin()
    tg = decode(n_tokens)
    inside = watch.seconds() / (n_tokens + 1)
    rest = (1 / tg - inside) / n_layer
    say(
        f"{name}: decode {tg:.2f} tok/s; experts on the CPU {1e3 * inside:.2f} ms a token"
        + (f" ({read / inside / GB:.1f} GB/s)" if read else "")
        + f", all else {1e6 * rest:.0f} us per layer"
    )
    found = {"decode": tg}
    for round_ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for at in range(0, len(prompt), engine.piece):
            engine.prefill(0, prompt[at : at + engine.piece], at)
        found["prefill"] = len(prompt) / (time.perf_counter() - start)
        say(f"{name}: prefill {len(prompt)}, round {round_}: {found['prefill']:.1f} tok/s")
    for n in range(2, engine.n_slots + 1, 2):
        slots = list(range(n))
        for slot in slots:
            engine.prefill(slot, prompt[:8], 0)
        for _ in range(2):
            engine.decode(slots, prompt[:n])
        start = time.perf_counter()
        for _ in range(10):
            engine.decode(slots, prompt[:n])
        say(f"{name}: {n} sequences {10 * n / (time.perf_counter() - start):.2f} tok/s in all")
    say(
        f"{name}: peak of torch's GPU memory {torch.cuda.max_memory_allocated() / GB:.2f} GB allocated, "
        f"{torch.cuda.max_memory_reserved() / GB:.2f} reserved"
    )
    return found


def profile(engine: GpuEngine, prompt: list[int]) -> None:
    """Where the GPU's time goes, while decoding and in a prompt."""
    for what, work in (
        ("decode 5", lambda: [engine.decode([0], [token]) for token in prompt[:5]]),
        ("prefill", lambda: engine.prefill(0, prompt[: engine.piece], 0)),
    ):
        engine.prefill(0, prompt[:1], 0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            work()
            torch.cuda.synchronize()
        rows = sorted(found.key_averages(), key=lambda row: -row.device_time_total)[:14]
        say(f"{what}: {sum(row.device_time_total for row in found.key_averages()) / 1e3:.2f} ms of kernels and copies")
        for row in rows:
            print(f"    {row.device_time_total / 1e3:9.3f} ms {row.count:6} x {row.key[:90]}", flush=True)


def layer_bytes(layer: GpuLayer) -> int:
    parts = [layer.k_b, layer.v_b, layer.kv_a, layer.output, *(layer.feed or ())]
    query = layer.q if isinstance(layer.q, tuple) else (layer.q,)
    return sum(part.n_bytes for part in (*parts, *query) if not isinstance(part, torch.Tensor))


def theirs(binary: str, file: str, options: str, n_prompt: int, n_tokens: int) -> dict[str, float]:
    """tok/s of llama-bench with these options of its own; nothing if it fails."""
    command = [binary, "-m", file, *f"{options} -p {n_prompt} -n {n_tokens} -r 1 -o json".split()]
    paths = os.environ | {"LD_LIBRARY_PATH": str(Path(binary).resolve().parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=paths)
    if done.returncode:
        say("llama-bench failed:", done.stderr[-500:])
        return {}
    return {"decode" if row["n_gen"] else "prefill": row["avg_ts"] for row in json.loads(done.stdout)}


def agreement(engine, other, tokens: list[int], n_prompt: int) -> tuple[float, float]:
    found = []
    for one in (engine, other):
        rows = [one.prefill(0, tokens[:n_prompt], 0).clone()]
        rows += [one.decode([0], [token])[0].clone() for token in tokens[n_prompt:]]
        found.append(torch.stack(rows))
    return kld(found[1], found[0])


def check(file: str, threads: int) -> None:
    """A small file: engines on the GPU against the exactly dequantized file."""
    source = open_source(file)
    exact = TorchEngine(source, 1, 700)
    tokens = torch.randint(300, source.config.n_vocab - 100, (640,)).tolist()
    text = source.tokenizer().encode("The ship went down in the storm, and nobody came home. " * 80).ids
    for what, ids in (("text", [0, *text[:639]]), ("random tokens", tokens)):
        for layers in (0, source.config.n_moe):
            engine = GpuEngine(open_gguf(file, "cuda", threads), 1, 700, layers)
            d, same = agreement(engine, exact, ids, 600)
            say(
                f"{Path(file).name}, {what}, {layers} layers' experts in VRAM: KLD from exact {d:.5f}, top-1 {same:.3f}"
            )
        d, same = agreement(open_engine(open_gguf(file, n_threads=threads), 1, 700), exact, ids, 600)
        say(f"{Path(file).name}, {what}, CPU graph: KLD from exact {d:.5f}, top-1 {same:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--llama-bench", default=None)
    parser.add_argument("--llama-cpu-experts", default="-ngl 99 -fa 1 -ot exps=CPU", help="llama-bench's options.")
    parser.add_argument("--llama-vram", default="-ngl 99 -fa 1", help="The same, with experts in GPU memory.")
    parser.add_argument("--check", action="append", default=[])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--types", default="IQ1_S,IQ2_XXS,Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,Q8_0,IQ4_XS")
    parser.add_argument("--profile", action="store_true", help="Also list the kernels that take longest.")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    say(torch.cuda.get_device_name(), "torch", torch.__version__, "threads", args.threads)
    if args.file:
        kernel_report(args.types.split(","))
    for file in args.check:
        check(file, args.threads)
    if not args.file:
        return
    weights = open_gguf(args.file, "cuda", args.threads)
    c, watch = weights.config, Watch(args.threads)
    prompt = torch.randint(300, min(8000, c.n_vocab), (args.prompt,)).tolist()
    speed = bandwidths(weights.workers)
    names = [name for i in range(c.n_dense, c.n_layer) for name in expert_names(i)]
    read = sum(weights.file.tensors[name].n_bytes for name in names) * c.n_used // c.n_expert
    for layers in (0, c.n_moe):
        name = f"{layers} of {c.n_moe} layers' experts in VRAM"
        before = torch.cuda.memory_allocated()
        engine = GpuEngine(weights, 4, args.prompt + 256, layers)
        say(
            f"{name}: loaded, {(torch.cuda.memory_allocated() - before) / GB:.3f} GB on the GPU, piece {engine.piece}; "
            f"planned {gpu_memory.fixed_bytes(weights.file.tensors, c, 4 * engine.rows)}, workspace "
            f"{gpu_memory.workspace(c, engine.piece) / GB:.2f} GB"
        )
        for i in (0, c.n_layer - 1):
            say(f"  layer {i}: {layer_bytes(engine.layers[i]) / 1e6:.1f} MB of matrices beside routed experts")
        found = measure(engine, name, prompt, args.tokens, watch, 0 if layers else read)
        if not layers:
            say(f"experts: {read / GB:.3f} GB a token; the CPU's memory gives {speed:.0f} GB/s")
        if args.llama_bench:
            options = f"{args.llama_vram if layers else args.llama_cpu_experts} -t {args.threads}"
            peer = theirs(args.llama_bench, args.file, options, args.prompt, args.tokens)
            say(f"{name}: llama-bench {options}", {what: round(rate, 2) for what, rate in peer.items()})
            say(f"{name}: ratio to llama-bench", {what: round(found[what] / rate, 2) for what, rate in peer.items()})
        if layers:
            graph = open_engine(open_gguf(args.file, n_threads=args.threads), 1, 512)
            d, same = agreement(engine, graph, prompt[:72], 64)
            say(f"logits against the CPU graph, same file: KLD {d:.5f}, top-1 {same:.3f}")
        if args.profile:
            profile(engine, prompt)
        del engine
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
