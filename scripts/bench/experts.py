"""Routed experts of one layer in ggml and in kt-kernel, in turns, and a whole model with either.

    python scripts/bench/experts.py [--types IQ1_S,IQ1_S,IQ1_S] [--experts 256] [--threads N] [--rounds 5] [--rows 1,16]
    python scripts/bench/experts.py FILE [--tokens 64] ...

Without a FILE: R1's geometry (7168 x 2048, 8 of --experts), the same 64 encoded rows over and over. Prints medians and
fastest times of all calls, and the GB/s of expert bytes at the fastest; with a FILE also tok/s of the layer-by-layer
engine with either, and the mean KLD between the two. kt-kernel pins its threads to the first cores of the first NUMA
node, whatever taskset says.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from quantkit.ggml.codec import quantize
from quantkit.ggml.graph import Experts as GgmlExperts
from quantkit.runtime.engines.open import TorchEngine
from quantkit.runtime.experts import kt as kt_experts
from quantkit.runtime.generate import Model
from quantkit.runtime.sources import GGUFSource

MAKERS = {"ggml": GgmlExperts, "kt": kt_experts.KtExperts}


def repeated(qtype: str, n_expert: int, n_out: int, n_in: int) -> tuple[str, np.ndarray]:
    rows = np.random.default_rng(0).standard_normal((64, n_in)).astype(np.float32)
    packed = quantize(qtype, rows, np.ones(n_in, np.float32))
    data = np.empty((n_expert, n_out, packed.shape[1]), np.uint8)
    data.reshape(-1, *packed.shape)[:] = packed
    return qtype, data


def compare(stacks, d: int, n_ff: int, n_expert: int, n_used: int, args) -> None:
    made = {name: make(stacks, d, n_ff, n_expert, n_used, args.threads) for name, make in MAKERS.items()}
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


def decode(args) -> None:
    """tok/s of the same engine with either, in turns, and KLD between what they predict."""
    engines = {}
    for name, make in MAKERS.items():
        source = GGUFSource(args.file, n_threads=args.threads)
        source.make_experts = make
        engines[name] = TorchEngine(Model(source), 1, 64 + args.tokens)
    prompt = torch.randint(300, source.config.n_vocab - 100, (64 + args.tokens,)).tolist()
    speeds: dict[str, list[float]] = {name: [] for name in MAKERS}
    logits: dict[str, torch.Tensor] = {}
    for _ in range(args.rounds):
        for name, engine in engines.items():
            engine.prefill(0, prompt[:64], 0)
            start = time.perf_counter()
            logits[name] = torch.stack([engine.decode([0], [token])[0] for token in prompt[64:]]).log_softmax(-1)
            speeds[name].append(args.tokens / (time.perf_counter() - start))
    kld = (logits["ggml"].exp() * (logits["ggml"] - logits["kt"])).sum(-1).mean()
    other, kt = (statistics.median(speeds[name]) for name in MAKERS)
    fastest = ", ".join(f"{name} {max(speeds[name]):.1f}" for name in MAKERS)
    print(
        f"decode, layer by layer: ggml {other:.1f} tok/s, kt-kernel {kt:.1f} tok/s (medians; fastest rounds: {fastest})"
    )
    print(f"KLD between them {kld:.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?")
    parser.add_argument("--types", default="IQ1_S,IQ1_S,IQ1_S", help="gate, up, down")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", default="1,16,256")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.file:
        source = GGUFSource(args.file, n_threads=args.threads)
        c = source.config
        compare(source.expert_stacks(c.n_dense), c.d, c.n_ff_exp, c.n_expert, c.n_used, args)
        decode(args)
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
