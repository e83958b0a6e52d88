"""Sequential targets: each layer's Hessians come from activations that went through the quantized layers below.

    python scripts/research/encoder_sequential.py MODEL CALIB.txt EVAL.txt --cache DIR --plan dyn158 --targets none down

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
from encoder_proxy import Telling, positions, swiglu, weights_of
from encoder_targets import cross_moment, retarget

from quantkit.encoding.hessian import blend, second_moment
from quantkit.encoding.state import EFFORTS, Effort
from quantkit.runtime.layers import attention, feed_forward, rms_norm, route


def sensitivity(x, gate, up, down) -> torch.Tensor:
    """How much an error in gate's and up's outputs on each token moves the expert's output: [tokens]."""
    g, u = x @ gate.T, x @ up.T
    sigmoid = torch.sigmoid(g)
    slope = sigmoid * (1 + g * (1 - sigmoid))
    return ((u * slope).square() + (g * sigmoid).square()) @ down.square().sum(0)


class Sequential:
    """One pass over the layers with two streams of hidden states: the original's and the quantized model's."""

    def __init__(self, harness: Harness, plan: str, v: Variant, targets: str, options: tuple = (), share: float = 0.0):
        """options: 'sens' weights gate/up tokens by sensitivity; 'repair' lets attn_output, dense and shared down
        make good what the residual stream lacks; share: the part of it that each routed expert's down takes."""
        self.h, self.v, self.targets, self.options, self.share = harness, v, targets, options, share
        self.config, self.w = harness.config, harness.w
        self.types = plan_types(plan, self.config)
        self.q = dict(self.w)
        for name in ("token_embd", "output"):
            hessian = harness.stats[("output", "norm")] if name == "output" else None
            self.q[name] = self.encode([name], self.w[name][None], [hessian])[0]

    def encode(self, names: list[str], w: torch.Tensor, hessians: list, crosses=None, extras=None) -> torch.Tensor:
        """w [E, rows, n_in]: the rows of the matrices `names` (of one type), stacked; a Hessian for each E."""
        qtype = self.types.get(names[0])
        if qtype is None:
            return w
        crosses, extras = crosses or [None] * len(w), extras or [None] * len(w)
        if "damp" in self.options:
            hessians = [None if h is None else replace(h, tokens=h.tokens / 16) for h in hessians]
        parts = zip(w, crosses, extras, hessians, strict=True)
        w = torch.stack([m if c is None and x is None else retarget(m, h, c, x) for m, c, x, h in parts])
        gamma = dict(self.v.gamma)
        q = quantized(qtype, w, hessians, [None if h is None else h.diagonal for h in hessians], self.v)
        return q * gamma.get(names[0].rpartition(".")[2], gamma.get(qtype, 1.0))

    def pair(self, x, xq, weight):
        """Hessian of the quantized inputs and, for `all`, the cross moment with the original ones."""
        return second_moment(xq, weight), cross_moment(x, xq, weight) if self.targets == "all" else None

    @torch.inference_mode()
    def run(self) -> dict:
        ids = self.h.calib_ids
        tables = positions(ids.shape[1], self.config, ids.device)
        x, xq = self.w["token_embd"][ids], self.q["token_embd"][ids]
        for i in range(self.config.n_layer):
            x, xq = self.block(i, x, xq, tables)
        return self.q

    def block(self, i, x, xq, tables):
        b = f"blk.{i}."
        mid, norm = self.attention_matrices(i, x, xq, tables)
        midq = self.attend(self.q, i, xq, tables)
        h, hq = (rms_norm(t, self.w[b + "ffn_norm"], self.config.rms_eps).flatten(0, 1) for t in (mid, midq))
        owed = (mid - midq).flatten(0, 1) if "repair" in self.options else None
        if self.config.is_moe(i):
            self.experts(i, h, hq, norm, owed)
        else:
            self.mlp(b, "", [h], [hq], [norm], None, None if owed is None else [owed])
        y, yq = self.ffn(self.w, i, h), self.ffn(self.q, i, hq)
        return mid + y.view_as(mid), midq + yq.view_as(mid)

    def ffn(self, w, i, x):
        return feed_forward(x, weights_of(self.config, w, i), self.config)

    def attention_matrices(self, i, x, xq, tables):
        """Encode one layer's attention; returns the original stream after it, and each token's weight."""
        b, seen, seen_q = f"blk.{i}.", {}, {}
        mid = self.attend(self.w, i, x, tables, seen)
        self.attend(self.w, i, xq, tables, seen_q)
        norm = 1 / mid.flatten(0, 1).square().mean(-1)
        for name, parts in seen.items():
            if name.endswith("attn_output"):
                seen_q = {}
                self.attend(self.q, i, xq, tables, seen_q)  # now through the quantized q, k and v
            xs, xqs = torch.cat(parts), torch.cat(seen_q[name])
            hessian, cross = self.pair(xs, xqs, norm)
            extra = None
            if name.endswith("attn_output") and "repair" in self.options:
                extra = [cross_moment((x - xq).flatten(0, 1), xqs, norm)]
            w = self.w[name]
            self.q[name] = self.encode([name], w.reshape(1, -1, w.shape[-1]), [hessian], [cross], extra).view(w.shape)
        w = self.w[b + "attn_k_b"]
        self.q[b + "attn_k_b"] = self.encode([b + "attn_k_b"], w, [None] * len(w))
        return mid, norm

    def attend(self, w, i, x, tables, seen: dict | None = None):
        watcher = None if seen is None else Telling(i, lambda name, t: seen.setdefault(name, []).append(t))
        now = weights_of(self.config, w, i)
        return torch.cat([part + attention(part, now, self.config, tables, watcher=watcher) for part in x.split(8)])

    def mlp(self, b, suffix, h, hq, weight, shared, owed=None) -> None:
        """gate and up, then down on what the quantized ones give. h, hq, weight, owed: one entry for each expert;
        shared: the layer's (Hessian, cross) to blend into gate's and up's."""
        names = {r: f"{b}ffn_{r}{suffix}" for r in ("gate", "up", "down")}
        w = {r: self.w[n] if suffix == "_exps" else self.w[n][None] for r, n in names.items()}
        first = weight
        if "sens" in self.options:
            first = [t * sensitivity(hq[e], w["gate"][e], w["up"][e], w["down"][e]) for e, t in enumerate(weight)]
        hessians, crosses = (
            list(t) for t in zip(*(self.pair(*t) for t in zip(h, hq, first, strict=True)), strict=True)
        )
        if shared is not None and self.v.pseudo:
            for e, own in enumerate(hessians):
                part = self.v.pseudo / (own.tokens + self.v.pseudo)
                crosses[e] = None if crosses[e] is None else torch.lerp(crosses[e], shared[1], part)
                hessians[e] = blend(own, shared[0], self.v.pseudo)
        both = self.encode([names["gate"]], torch.cat([w["gate"], w["up"]], 1), hessians, crosses)
        gate, up = both.chunk(2, 1)
        hessians, crosses, extras = [], [], []
        for e in range(len(gate)):
            m = swiglu(h[e] if self.targets == "all" else hq[e], w["gate"][e], w["up"][e])
            mq = swiglu(hq[e], gate[e], up[e])
            hessians.append(second_moment(mq, weight[e]))
            crosses.append(None if self.targets == "none" else cross_moment(m, mq, weight[e]))
            extras.append(None if owed is None else cross_moment(owed[e], mq, weight[e]))
        down = self.encode([names["down"]], w["down"], hessians, crosses, extras)
        for n, q in zip(names.values(), (gate, up, down), strict=True):
            self.q[n] = q if suffix == "_exps" else q[0]

    def experts(self, i, h, hq, norm, owed) -> None:
        """The routed experts, then the shared one, which can make good what they owe."""
        b = f"blk.{i}."
        ids, weights = route(hq, weights_of(self.config, self.w, i).router, self.config)
        each = range(self.config.n_expert)
        tokens, slots = zip(*((ids == e).nonzero(as_tuple=True) for e in each), strict=True)
        gates = [weights[t, s] for t, s in zip(tokens, slots, strict=True)]
        scale = [norm[t] * g**2 for t, g in zip(tokens, gates, strict=True)]
        part = None
        if owed is not None and self.share:
            part = [self.share * owed[t] / g[:, None] for t, g in zip(tokens, gates, strict=True)]
        self.mlp(b, "_exps", [h[t] for t in tokens], [hq[t] for t in tokens], scale, self.pair(h, hq, norm), part)
        if owed is not None:
            without = {f"{b}ffn_down_shexp": torch.zeros_like(self.w[f"{b}ffn_down_shexp"])}
            owed = owed + self.ffn(self.w | without, i, h)
            owed = [owed - self.ffn(self.q | without, i, hq)]
        self.mlp(b, "_shexp", [h], [hq], [norm], None, owed)


def effort(text: str):
    """A named effort, or one from its numbers."""
    if text in EFFORTS:
        return text
    tries, passes, block_passes = (int(t) for t in text.split(","))
    return Effort(True, tries, 1, passes, block_passes)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("calib", type=Path)
    p.add_argument("text", type=Path)
    p.add_argument("--plan", nargs="+", default=["dyn158"])
    p.add_argument("--targets", nargs="+", default=["none", "down", "all"])
    p.add_argument("--effort", default="normal", help="fast, normal, best or tries,passes,block passes")
    p.add_argument("--gamma", type=float, nargs="+", default=[1.0])
    p.add_argument("--pseudo", type=float, default=0.0)
    p.add_argument("--chunks", type=int, default=30)
    p.add_argument("--cache", type=Path, required=True)
    p.add_argument("--options", nargs="*", default=[], choices=["sens", "repair", "damp"])
    p.add_argument("--share", type=float, default=0.0)
    p.add_argument("--device", default="cpu")
    a = p.parse_args()
    torch.set_num_threads(1)
    harness = Harness(a.model, a.calib, a.text, a.cache, a.chunks, device=a.device)
    for plan in a.plan:
        for targets in a.targets:
            for gamma in a.gamma:
                v = Variant(effort=effort(a.effort), pseudo=a.pseudo)
                v = replace(v, gamma=tuple((t, gamma) for t in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "Q2_K")))
                t = time.time()
                q = Sequential(harness, plan, v, targets, tuple(a.options), a.share).run()
                r = evaluate(harness.config, q, harness.ids, harness.reference["reference"])
                label = f"{plan} sequential {targets} {a.options} share={a.share} γ={gamma} {a.effort} {a.pseudo}"
                scores = f"KLD {r['kld']:.5f}  top-1 {r['top1']:.2f}  PPL {r['ppl']:.4f}"
                print(f"{label}: {scores}  ({time.time() - t:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
