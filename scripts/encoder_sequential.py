"""Sequential targets: each layer's Hessians come from activations that went through the quantized layers below.

    python scripts/encoder_sequential.py MODEL CALIB.txt EVAL.txt --cache DIR --plan dyn158 --targets none down all

targets: `none` keeps each matrix's own output on the quantized inputs as its target; `down` re-targets the down
projections to the original hidden activations (W E[m m̂ᵀ] E[m̂ m̂ᵀ]⁻¹, m̂ through the quantized gate and up); `all` does
so for every matrix with the original inputs, so that a layer also repairs the damage below it.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from encoder_harness import Harness, Variant, evaluate, plan_types, quantized
from encoder_proxy import attention, moe, nothing, rms_norm, route, swiglu, yarn_tables

from quantkit.encoders import Hessian, blend, second_moment
from quantkit.encoders.hessian import damp


def cross_moment(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean of x yᵀ."""
    share = (weight / weight.sum())[:, None]
    return (x * share).T @ y


def retarget(w: torch.Tensor, cross: torch.Tensor, hessian: Hessian) -> torch.Tensor:
    """The weights that give the original outputs from the quantized inputs, damped towards w."""
    damped = damp(hessian).matrix
    added = torch.diag(damped.diagonal() - hessian.matrix.diagonal())
    return torch.linalg.solve(damped.double(), ((cross + added).T @ w.T).double()).T.float().contiguous()


class Sequential:
    """One pass over the layers with two streams of hidden states: the original's and the quantized model's."""

    def __init__(self, harness: Harness, plan: str, v: Variant, targets: str):
        self.h, self.v, self.targets = harness, v, targets
        self.config, self.w = harness.config, harness.w
        self.types = plan_types(plan, self.config)
        self.q = dict(self.w)
        for name in ("token_embd", "output"):
            hessian = harness.stats[("output", "norm")] if name == "output" else None
            self.q[name] = self.encode([name], self.w[name][None], [hessian], [None])[0]

    def encode(self, names: list[str], w: torch.Tensor, hessians: list, crosses: list) -> torch.Tensor:
        """w [E, rows, n_in]: the rows of the matrices `names` (of one type), stacked; a Hessian and cross for each E."""
        qtype = self.types.get(names[0])
        if qtype is None:
            return w
        pairs = zip(w, hessians, crosses, strict=True)
        w = torch.stack([m if c is None else retarget(m, c, h) for m, h, c in pairs])
        gamma = dict(self.v.gamma)
        q = quantized(qtype, w, hessians, [None if h is None else h.diagonal for h in hessians], self.v)
        return q * gamma.get(names[0].rpartition(".")[2], gamma.get(qtype, 1.0))

    def pair(self, x, xq, weight):
        """Hessian of the quantized inputs and, for `all`, the cross moment with the original ones."""
        return second_moment(xq, weight), cross_moment(x, xq, weight) if self.targets == "all" else None

    @torch.inference_mode()
    def run(self) -> dict:
        ids = self.h.calib_ids
        tables = yarn_tables(self.config, ids.shape[1], ids.device)
        x, xq = self.w["token_embd"][ids], self.q["token_embd"][ids]
        for i in range(self.config["num_hidden_layers"]):
            x, xq = self.block(i, x, xq, tables)
        return self.q

    def block(self, i, x, xq, tables):
        b = f"blk.{i}."
        mid, norm = self.attention_matrices(b, x, xq, tables)
        midq = self.attend(self.q, b, xq, tables)
        h, hq = (rms_norm(t, self.w[b + "ffn_norm"]).flatten(0, 1) for t in (mid, midq))
        if i < self.config["first_k_dense_replace"]:
            self.mlp(b, "", [h], [hq], [norm], None)
            y, yq = (swiglu(t, w[b + "ffn_gate"], w[b + "ffn_up"]) @ w[b + "ffn_down"].T
                     for w, t in ((self.w, h), (self.q, hq)))  # fmt: skip
        else:
            self.experts(b, h, hq, norm)
            y, yq = (moe(self.config, w, b, t, nothing) for w, t in ((self.w, h), (self.q, hq)))
        return mid + y.view_as(mid), midq + yq.view_as(mid)

    def attention_matrices(self, b, x, xq, tables):
        """Encode one layer's attention; returns the original stream after it, and each token's weight."""
        seen, seen_q = {}, {}
        mid = self.attend(self.w, b, x, tables, seen)
        self.attend(self.w, b, xq, tables, seen_q)
        norm = 1 / mid.flatten(0, 1).square().mean(-1)
        for name, parts in seen.items():
            hessian, cross = self.pair(torch.cat(parts), torch.cat(seen_q[name]), norm)
            w = self.w[name]
            self.q[name] = self.encode([name], w.reshape(1, -1, w.shape[-1]), [hessian], [cross]).view(w.shape)
        w = self.w[b + "attn_k_b"]
        self.q[b + "attn_k_b"] = self.encode([b + "attn_k_b"], w, [None] * len(w), [None] * len(w))
        return mid, norm

    def attend(self, w, b, x, tables, seen: dict | None = None):
        out = []
        for part in x.split(8):

            def see(name, t):
                if seen is not None:
                    seen.setdefault(name, []).append(t.flatten(0, 1))

            out.append(part + attention(self.config, w, b, rms_norm(part, w[b + "attn_norm"]), tables, see))
        return torch.cat(out)

    def mlp(self, b, suffix, h, hq, weight, shared: Hessian | None) -> None:
        """gate and up, then down on what the quantized ones give. h, hq, weight: one entry for each expert."""
        names = {r: f"{b}ffn_{r}{suffix}" for r in ("gate", "up", "down")}
        w = {r: self.w[n] if suffix == "_exps" else self.w[n][None] for r, n in names.items()}
        hessians, crosses = zip(*(self.pair(*t) for t in zip(h, hq, weight, strict=True)), strict=True)
        if shared is not None and self.v.pseudo:
            hessians = [blend(x, shared, self.v.pseudo) for x in hessians]
            crosses = [None] * len(hessians)  # a blended Hessian has no matching cross moment
        both = self.encode([names["gate"]], torch.cat([w["gate"], w["up"]], 1), list(hessians), list(crosses))
        gate, up = both.chunk(2, 1)
        hessians, crosses = [], []
        for e in range(len(gate)):
            m = swiglu(h[e] if self.targets == "all" else hq[e], w["gate"][e], w["up"][e])
            mq = swiglu(hq[e], gate[e], up[e])
            hessians.append(second_moment(mq, weight[e]))
            crosses.append(None if self.targets == "none" else cross_moment(m, mq, weight[e]))
        down = self.encode([names["down"]], w["down"], hessians, crosses)
        for n, q in zip(names.values(), (gate, up, down), strict=True):
            self.q[n] = q if suffix == "_exps" else q[0]

    def experts(self, b, h, hq, norm) -> None:
        self.mlp(b, "_shexp", [h], [hq], [norm], None)
        ids, weights = route(self.config, self.w, b, hq)
        tokens, slots = zip(
            *((ids == e).nonzero(as_tuple=True) for e in range(self.config["n_routed_experts"])), strict=True
        )
        each = [norm[t] * weights[t, s] ** 2 for t, s in zip(tokens, slots, strict=True)]
        self.mlp(b, "_exps", [h[t] for t in tokens], [hq[t] for t in tokens], each, second_moment(hq, norm))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("calib", type=Path)
    p.add_argument("text", type=Path)
    p.add_argument("--plan", nargs="+", default=["dyn158"])
    p.add_argument("--targets", nargs="+", default=["none", "down", "all"])
    p.add_argument("--effort", default="normal")
    p.add_argument("--gamma", type=float, nargs="+", default=[1.0])
    p.add_argument("--pseudo", type=float, default=0.0)
    p.add_argument("--chunks", type=int, default=30)
    p.add_argument("--cache", type=Path, required=True)
    p.add_argument("--device", default="cpu")
    a = p.parse_args()
    torch.set_num_threads(1)
    harness = Harness(a.model, a.calib, a.text, a.cache, a.chunks, device=a.device)
    for plan in a.plan:
        for targets in a.targets:
            for gamma in a.gamma:
                v = Variant(effort=a.effort, pseudo=a.pseudo)
                v = replace(v, gamma=tuple((t, gamma) for t in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "Q2_K")))
                t = time.time()
                q = Sequential(harness, plan, v, targets).run()
                r = evaluate(harness.config, q, harness.ids, harness.reference["reference"])
                print(f"{plan:16s} sequential, targets {targets:5s} γ={gamma} {a.effort} pseudo={a.pseudo}: KLD "
                      f"{r['kld']:.5f}  top-1 {r['top1']:.2f}  PPL {r['ppl']:.4f}  ({time.time() - t:.0f} s)", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
