#!/usr/bin/env python3
"""Give tiny-r1 a trained indexer: DeepSeek-V3.2's architecture at a thousandth of its width.

    python scripts/tiny_v32/train.py --data FILE.txt.xz --state STATE [--seconds 560]     # again, until it says done
    python scripts/tiny_v32/train.py --state STATE --out models/tiny-v3.2

The indexer of each layer learns the distribution of its attention over earlier positions, summed over the heads, while
all other weights stay as they are: the first stage of V3.2's own training (arXiv 2512.02556, 2.1.1). FILE holds
documents separated by NUL bytes. Steps are counted, not time: a run of --seconds stops between two and the next goes
on; in the last quarter the two matrices are rounded as the file rounds them (E4M3 in 128x128 blocks).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts" / "tiny_r1"))
import data  # noqa: E402
from export import load_checkpoint  # noqa: E402
from model import (  # noqa: E402  # noqa: E402
    TinyConfig,
    dequantize_fp8,
    feed_forward,
    prepare,
    quantize_fp8,
    rms_norm,
    rope_tables,
    rotate,
    yarn_mscale,
)
from tokenizers import Tokenizer  # noqa: E402

TINY_R1 = ROOT / "models" / "tiny-r1"
HEADS, WIDTH, TOP_K = 16, 64, 64
NAMES = {  # of a layer's indexer in the checkpoint
    "wq_b": "wq_b.weight",
    "wk": "wk.weight",
    "proj": "weights_proj.weight",
    "k_norm": "k_norm.weight",
    "k_norm_b": "k_norm.bias",
}
FP8 = ("wq_b", "wk")
Params = dict[str, Tensor]


def init(cfg: TinyConfig, seed: int) -> Params:
    """Random parameters `N.<part>` of every layer, the MTP layer among them."""
    gen = torch.Generator().manual_seed(seed)
    out: Params = {}
    for n in range(cfg.n_layers):
        out |= {
            f"{n}.wq_b": torch.randn(HEADS * WIDTH, cfg.q_lora_rank, generator=gen) * cfg.q_lora_rank**-0.5,
            f"{n}.wk": torch.randn(WIDTH, cfg.hidden_size, generator=gen) * cfg.hidden_size**-0.5,
            f"{n}.proj": torch.randn(HEADS, cfg.hidden_size, generator=gen) * cfg.hidden_size**-0.5,
            f"{n}.k_norm": torch.ones(WIDTH),
            f"{n}.k_norm_b": torch.zeros(WIDTH),
        }
    return {name: p.requires_grad_() for name, p in out.items()}


def stored(name: str, p: Tensor) -> dict[str, Tensor]:
    """What the checkpoint holds of one parameter: suffix -> tensor."""
    if name.split(".")[1] in FP8:
        values, scales = quantize_fp8(p)
        return {"": values, "_scale_inv": scales}
    return {"": p.bfloat16()}


def rounded(name: str, p: Tensor) -> Tensor:
    """The value that the checkpoint will hold, with a straight-through gradient."""
    with torch.no_grad():
        kept = stored(name, p)
        value = dequantize_fp8(kept[""], kept["_scale_inv"]) if len(kept) > 1 else kept[""].float()
        delta = value - p
    return p + delta


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first numbers of a head turn, halves against each other; x [..., width], cos [..., half]."""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), -1)


def scores(x: Tensor, low: Tensor, rows: Tensor, p: Params, n: int, rope: tuple[Tensor, Tensor]) -> Tensor:
    """I[t, s] of the queries `rows` [r] for all positions: [batch, r, length]. x, low [batch, length, ...], normed."""
    cos, sin = rope
    q = F.linear(low[:, rows], p[f"{n}.wq_b"]).unflatten(-1, (HEADS, WIDTH))
    q = turned(q, cos[rows][:, None], sin[rows][:, None])
    k = F.layer_norm(F.linear(x, p[f"{n}.wk"]), (WIDTH,), p[f"{n}.k_norm"], p[f"{n}.k_norm_b"], 1e-6)
    k = turned(k, cos, sin)
    share = F.linear(x[:, rows], p[f"{n}.proj"]) * (HEADS * WIDTH) ** -0.5
    by_head = (q.flatten(1, 2) @ k.transpose(1, 2)).relu().unflatten(1, (len(rows), HEADS))
    return (share.unsqueeze(-2) @ by_head).squeeze(-2)


def later(rows: Tensor, length: int) -> Tensor:
    """Whether a position [r, length] comes after the query."""
    return torch.arange(length) > rows[:, None]


class Model:
    """tiny-r1, whose attention can be seen and masked."""

    def __init__(self, dtype: torch.dtype) -> None:
        params, self.bias, self.cfg = load_checkpoint(TINY_R1)
        self.w = prepare(params, dtype, False)

    def attention(self, x: Tensor, n: int, rope: tuple[Tensor, Tensor], mask: Tensor | None = None):
        """Output for normed x [batch, length, d], what queries come from, and the probabilities [batch, heads, t, s].
        mask: bool [batch, t, s], positions that are seen."""
        w, cfg = self.w, self.cfg
        heads, nope, rdim, vdim = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
        dtype, eps = w[f"{n}.o"].dtype, cfg.rms_norm_eps
        x = x.to(dtype)
        low = rms_norm(F.linear(x, w[f"{n}.q_a"]), w[f"{n}.q_a_norm"], eps).to(dtype)
        q = F.linear(low, w[f"{n}.q_b"]).unflatten(-1, (heads, nope + rdim))
        q = torch.cat((q[..., :nope], rotate(q[..., nope:], *rope)), -1)
        latent, k_rope = F.linear(x, w[f"{n}.kv_a"]).split((cfg.kv_lora_rank, rdim), -1)
        latent = rms_norm(latent, w[f"{n}.kv_a_norm"], eps).to(dtype)
        k_nope, v = F.linear(latent, w[f"{n}.kv_b"]).unflatten(-1, (heads, nope + vdim)).split((nope, vdim), -1)
        k = torch.cat((k_nope, rotate(k_rope.unsqueeze(-2), *rope).expand(-1, -1, heads, -1)), -1)
        scale = (nope + rdim) ** -0.5 * yarn_mscale(cfg.rope_factor, cfg.mscale_all_dim) ** 2
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        logits = (q @ k.transpose(-1, -2)).float() * scale
        length = x.shape[1]
        hidden = later(torch.arange(length), length)
        hidden = hidden if mask is None else hidden | ~mask[:, None]
        probs = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        out = F.linear((probs.to(dtype) @ v).transpose(1, 2).flatten(-2), w[f"{n}.o"])
        return out, low, probs

    def layers(self, tokens: Tensor, rope: tuple[Tensor, Tensor], visit):
        """All layers of tokens [batch, length + 1]; visit(n, x, low, probs) sees each and may return a mask, with which
        its attention is then made anew. Returns the main model's hidden states, normed for the head."""
        w, cfg, eps = self.w, self.cfg, self.cfg.rms_norm_eps
        embedded = F.embedding(tokens, w["embed"]).float()
        x, final = embedded[:, :-1], None
        for n in range(cfg.n_layers):
            if n == cfg.num_hidden_layers:
                final = rms_norm(x, w["norm"], eps)
                parts = (rms_norm(embedded[:, 1:], w[f"{n}.enorm"], eps), rms_norm(final, w[f"{n}.hnorm"], eps))
                x = F.linear(torch.cat(parts, -1).to(w[f"{n}.eh_proj"].dtype), w[f"{n}.eh_proj"]).float()
            normed = rms_norm(x, w[f"{n}.attn_norm"], eps)
            out, low, probs = self.attention(normed, n, rope)
            mask = visit(n, normed, low.float(), probs)
            if mask is not None:
                out = self.attention(normed, n, rope, mask)[0]
            x = x + out
            x = x + feed_forward(rms_norm(x, w[f"{n}.ffn_norm"], eps), w, n, self.bias, cfg)[0]
        return final


def load_tokens(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Training and held-out tokens of a sample of the corpus; kept beside the state."""
    cache = args.state.with_suffix(".npz")
    if not cache.exists():
        train, held_out = data.split_documents(data.read_documents(args.data))
        tokenizer = Tokenizer.from_file(str(TINY_R1 / "tokenizer.json"))
        share = list(data.sample_text(train, args.characters))
        print(f"{len(train)} documents, {len(held_out)} passages held out", flush=True)
        np.savez(
            cache,
            train=data.tokenize(tokenizer, share, 0.05),
            held_out=data.tokenize(tokenizer, held_out, 0.0),
        )
    with np.load(cache) as z:
        return {name: z[name] for name in z.files}


def windows(tokens: np.ndarray, batch: int, length: int, gen: torch.Generator) -> Tensor:
    """Random windows [batch, length + 1], the first token BOS."""
    starts = torch.randint(len(tokens) - length - 1, (batch,), generator=gen).tolist()
    out = torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))
    out[:, 0] = 0
    return out


def train(args: argparse.Namespace) -> None:
    """Steps until --seconds are over or all are done; the state is kept."""
    begun = time.time()
    tokens = load_tokens(args)["train"]
    model = Model(torch.bfloat16)
    params = init(model.cfg, args.seed)
    adam = torch.optim.Adam(params.values(), lr=args.lr, betas=(0.9, 0.98))
    done, curve = 0, []
    if args.state.exists():
        kept = torch.load(args.state)
        done, curve = kept["done"], kept["curve"]
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(kept["params"][name])
        adam.load_state_dict(kept["adam"])
    rope = rope_tables(model.cfg, args.length, "cpu")
    while done < args.steps and time.time() - begun < args.seconds:
        gen = torch.Generator().manual_seed(args.seed * 1_000_003 + done)
        progress = done / args.steps
        rate = min(1.0, (done + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 0.01
        for group in adam.param_groups:
            group["lr"] = args.lr * rate
        losses = step(model, params, windows(tokens, args.batch, args.length, gen), rope, progress >= 0.75, gen)
        adam.step()
        adam.zero_grad(set_to_none=True)
        done += 1
        if done % 20 == 0 or done == args.steps:
            curve.append({"step": done, "kl": [round(x, 4) for x in losses]})
            print(f"{time.time() - begun:.0f} s  {curve[-1]}", flush=True)
    plain = {name: p.detach() for name, p in params.items()}
    torch.save({"done": done, "curve": curve, "params": plain, "adam": adam.state_dict()}, args.state)
    print("done" if done >= args.steps else f"{done} of {args.steps} steps", flush=True)


def step(model: Model, params: Params, tokens: Tensor, rope, round_weights: bool, gen: torch.Generator) -> list[float]:
    """Gradients of one batch; the mean KL of each layer's indexer from its attention, in nats."""
    length = tokens.shape[1] - 1
    rows = torch.randperm(length - TOP_K, generator=gen)[:QUERIES] + TOP_K  # earlier ones see all there is
    found = []

    def visit(n: int, x: Tensor, low: Tensor, probs: Tensor) -> None:
        target = probs[:, :, rows].mean(1)
        with torch.enable_grad():
            own = {k: rounded(k, p) if round_weights else p for k, p in params.items() if k.startswith(f"{n}.")}
            guess = scores(x, low, rows, own, n, rope).masked_fill(later(rows, length), -torch.inf).log_softmax(-1)
            kl = (torch.special.xlogy(target, target) - target * guess.masked_fill(target == 0, 0)).sum(-1).mean()
            kl.backward()
        found.append(kl.item())

    with torch.no_grad():
        model.layers(tokens, rope, visit)
    return found


QUERIES = 160


@torch.no_grad()
def evaluate(params: Params, tokens: np.ndarray, length: int, n_windows: int) -> dict:
    """Held-out perplexity with dense attention, with the indexer's choice, with the last TOP_K positions and with the
    TOP_K that get most attention; and how much of the attention each layer's choice sees (queries beyond TOP_K)."""
    model = Model(torch.float32)
    rope = rope_tables(model.cfg, length, "cpu")
    starts = np.linspace(0, len(tokens) - length - 1, n_windows).astype(np.int64)
    spans = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    spans[:, 0] = 0
    rows, hidden = torch.arange(length), later(torch.arange(length), length)
    seen: dict[int, list[float]] = {}

    def best(values: Tensor) -> Tensor:
        index = values.masked_fill(hidden, -torch.inf).topk(TOP_K, -1).indices
        return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, index, True)

    def chosen(n: int, x: Tensor, low: Tensor, probs: Tensor) -> Tensor:
        mask = best(scores(x, low, rows, params, n, rope))
        seen.setdefault(n, []).append((probs.mean(1) * mask)[:, TOP_K:].sum(-1).mean().item())
        return mask

    ways = {
        "dense": lambda *_: None,
        "indexer": chosen,
        "last": lambda n, x, low, probs: (rows[:, None] - rows < TOP_K).expand(len(x), -1, -1),
        "most attended": lambda n, x, low, probs: best(probs.mean(1)),
    }
    out: dict = {"tokens": n_windows * length}
    for way, visit in ways.items():
        total = 0.0
        for part in torch.from_numpy(spans).split(8):
            hidden_states = model.layers(part, rope, visit)
            logits = F.linear(hidden_states, model.w["head"])
            total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
        out[way] = round(math.exp(total / out["tokens"]), 4)
    out["attention seen"] = [round(sum(x) / len(x), 4) for x in seen.values()]
    return out


def main() -> None:
    """Entry point."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, help="documents separated by NUL bytes, plain or .xz")
    p.add_argument("--state", type=Path, required=True, help="file that keeps what was trained so far")
    p.add_argument("--out", type=Path, help="write the trained indexer into this folder")
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--seconds", type=float, default=math.inf, help="stop after these, to be continued")
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--characters", type=int, default=8_000_000, help="of the corpus, to train on")
    p.add_argument("--windows", type=int, default=64, help="held-out windows to evaluate on, evenly spread")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    if args.out is None:
        train(args)
    else:
        export(args)


def export(args: argparse.Namespace) -> None:
    """The indexer as a checkpoint has it, and what was measured on it as it is read back."""
    from safetensors.torch import save_file

    kept = torch.load(args.state)
    tensors, read_back = {}, {}
    for name, p in kept["params"].items():
        n, part = name.split(".")
        full = f"model.layers.{n}.self_attn.indexer.{NAMES[part]}"
        tensors |= {full + suffix: value.contiguous() for suffix, value in stored(name, p).items()}
        read_back[name] = rounded(name, p)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out / "indexer.safetensors", metadata={"format": "pt"})
    report = {"steps": kept["done"], "tokens": kept["done"] * args.batch * args.length}
    report["parameters"] = sum(p.numel() for p in read_back.values())
    report["held_out_perplexity"] = evaluate(read_back, load_tokens(args)["held_out"], args.length, args.windows)
    report["kl_curve"] = kept["curve"][:: max(1, len(kept["curve"]) // 15)] + kept["curve"][-1:]
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "kl_curve"}, indent=1))


if __name__ == "__main__":
    main()
