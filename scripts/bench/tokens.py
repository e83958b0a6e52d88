"""Products of a quantized matrix with 1 to 128 tokens on a GPU: microseconds in a CUDA graph, other bytes each time.

    python scripts/bench/tokens.py
    python scripts/bench/tokens.py --matrix Q4_K 7168 16384 --tokens 1 8 64

As the engine multiplies them (`Packed`); beyond 64 tokens that is dequantizing. Also the time that reading takes at
--memory TB/s, and the largest difference from float64 by the largest result, of the first row.
"""

import argparse

import torch

from quantkit.codecs import types as qtypes
from quantkit.codecs.registry import codec
from quantkit.runtime.packed import Packed

BYTES, REPLAYS = 200 << 20, 5  # of matrices: more than a GPU's cache; the shortest of so many
MATRICES = (
    ("Q4_K", 7168, 16384),
    ("Q6_K", 129280, 7168),
    ("Q4_K", 24576, 1536),
    ("Q6_K", 576, 7168),
    ("IQ1_S", 32768, 7168),
    ("IQ2_XXS", 57344, 2048),
    ("Q2_K", 32768, 7168),
    ("Q3_K", 57344, 2048),
)


def random_matrices(qtype: str, n_out: int, n_in: int) -> list[Packed]:
    """Of random bytes, with scales that are finite and small."""
    sizes, block = qtypes.stored(qtype), codec(qtype).block
    row_bytes = n_in // sizes.block_size * sizes.type_size
    n = max(1, BYTES // (n_out * row_bytes))
    data = torch.randint(0, 256, (n, n_out, row_bytes // sizes.type_size, sizes.type_size), dtype=torch.uint8)
    for field in {"d", "dmin"}.intersection(block.names):
        data[..., block.fields[field][1] + 1] &= 0x2B
    data = data.view(n, n_out, row_bytes).cuda()
    return [Packed(qtype, one[None], n_in, torch.bfloat16) for one in data]


def microseconds(matrices: list[Packed], x: torch.Tensor) -> float:
    """Of one product, after each has been made once without a graph."""
    for matrix in matrices:
        matrix(x)
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        for matrix in matrices:
            matrix(x)
        graph.capture_end()
    found = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(1e3 * begin.elapsed_time(end) / len(matrices))
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", nargs=3, metavar=("QTYPE", "N_OUT", "N_IN"), help="Only this one.")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 2, 8, 16, 32, 64, 128])
    parser.add_argument("--memory", type=float, default=4.1, help="TB/s.")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"| matrix | reading | {' | '.join(map(str, args.tokens))} |")
    print("|" + "---|" * (2 + len(args.tokens)))
    for qtype, n_out, n_in in [args.matrix] if args.matrix else MATRICES:
        matrices = random_matrices(qtype, int(n_out), int(n_in))
        exact, cells = codec(qtype).dequantize(matrices[0].data[0]).double(), []
        for n in args.tokens:
            x = torch.randn(n, int(n_in), device="cuda")
            expected, found = exact @ x[0].double(), matrices[0](x)[0]
            error = float((found - expected).abs().max() / expected.abs().max())
            cells.append(f"{microseconds(matrices, x):.1f} ({error:.0e})")
        floor = matrices[0].n_bytes / args.memory / 1e6
        print(f"| {qtype} {n_out} × {n_in} | {floor:.1f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
