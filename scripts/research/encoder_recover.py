"""Recovery of free parameters after encoding: superblock scales, norms and router tuned against the original.

    python scripts/research/encoder_recover.py MODEL CALIB.txt EVAL.txt --cache DIR --level expert layer model

Codes stay as they are; every superblock's d gets a factor, norms and router (F32 in the file) move freely: no byte is
added. `mats` moves the matrices outside the experts as well and encodes them again. Level `expert`: each expert's own
output; `layer`: the layer's output behind the recovered layers below; `model`: the divergence of the logits.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from encoder_harness import Harness, Variant, build, encode_tensor, evaluate, plan_types
from encoder_proxy import final, layer, positions, swiglu

SUPERBLOCK = 256
MATRICES = (
    "attn_q_a",
    "attn_q_b",
    "attn_kv_a_mqa",
    "attn_output",
    "attn_v_b",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
    "ffn_gate_shexp",
    "ffn_up_shexp",
    "ffn_down_shexp",
    "output",
)
NORMS = ("attn_norm", "ffn_norm", "attn_q_a_norm")


def parts(w: torch.Tensor) -> int:
    return w.shape[-1] // SUPERBLOCK if w.shape[-1] % SUPERBLOCK == 0 else 0


class Free:
    """The free parameters of some tensors, and the weights that they make."""

    def __init__(self, q: dict, names: list[str], what: list[str]):
        self.q, self.factor, self.shift = q, {}, {}
        for name in names:
            w, role = q[name], name.rpartition(".")[2]
            if "d" in what and w.ndim > 1 and parts(w) and role != "ffn_gate_inp":
                self.factor[name] = torch.zeros(*w.shape[:-1], parts(w), 1, device=w.device, requires_grad=True)
            elif "norms" in what and role in (*NORMS, "output_norm"):
                self.factor[name] = torch.zeros_like(w, requires_grad=True)
            elif "router" in what and role == "ffn_gate_inp":
                self.shift[name] = torch.zeros_like(w, requires_grad=True)
            if "mats" in what and w.ndim > 1 and role in MATRICES:
                self.factor.pop(name, None)
                self.shift[name] = torch.zeros_like(w, requires_grad=True)

    def weights(self) -> dict:
        out = dict(self.q)
        for name, t in self.factor.items():
            w = self.q[name]
            out[name] = w * t.exp() if w.ndim == 1 else (w.unflatten(-1, (-1, SUPERBLOCK)) * t.exp()).flatten(-2)
        for name, t in self.shift.items():
            out[name] = self.q[name] + t * self.q[name].std()
        return out

    def parameters(self):
        return [*self.factor.values(), *self.shift.values()]

    def groups(self, lr: float, lr_shift: float) -> list[dict]:
        return [{"params": list(self.factor.values()), "lr": lr}, {"params": list(self.shift.values()), "lr": lr_shift}]


def train(free: Free, loss, n: int, a) -> None:
    """loss(weights, indices of chunks) -> scalar; Adam with a cosine."""
    if not free.parameters():
        return
    adam = torch.optim.Adam(
        [g for g in free.groups(a.lr, getattr(a, "lr_shift", a.lr)) if g["params"]], betas=(0.9, 0.95)
    )
    steps = a.epochs * -(-n // a.batch)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    generator = torch.Generator().manual_seed(0)
    step = 0
    while step < steps:
        for pick in torch.randperm(n, generator=generator).split(a.batch):
            adam.zero_grad()
            loss(free.weights(), pick).backward()
            adam.step()
            plan.step()
            step += 1


def tune_model(h: Harness, q: dict, a, what) -> dict:
    """End to end: KL divergence of all positions of the calibration chunks."""
    if "mats" in what:  # moved in full precision, encoded again afterwards
        q = {n: h.w[n] if n.rpartition(".")[2] in MATRICES else t for n, t in q.items()}
    free = Free(q, list(q), what)

    def logits(w, ids):
        return F.log_softmax(final(h.config, w, ids) @ w["output"].T, -1)

    def loss(w, pick):
        ids = h.calib_ids[pick]
        with torch.no_grad():
            p = logits(h.w, ids)
        return F.kl_div(logits(w, ids), p, log_target=True, reduction="sum") / ids.numel()

    train(free, loss, len(h.calib_ids), a)
    with torch.no_grad():
        out = free.weights()
        if "mats" in what:
            types = plan_types(a.now, h.config)
            for n in out:
                if n.rpartition(".")[2] in MATRICES:
                    out[n] = encode_tensor(h.stats, n, out[n], types[n], Variant())
    return out


def tune_layers(h: Harness, q: dict, a, what) -> dict:
    """Layer after layer: the original's output behind the recovered layers below."""
    q, tables = dict(q), positions(h.calib_ids.shape[1], h.config, h.calib_ids.device)
    x, xq = h.w["token_embd"][h.calib_ids], q["token_embd"][h.calib_ids]

    def run(w, i, s):
        with torch.no_grad():
            return torch.cat([layer(h.config, w, i, part, tables) for part in s.split(8)])

    for i in range(h.config.n_layer):
        y = run(h.w, i, x)
        names = [n for n in q if n.startswith(f"blk.{i}.")]
        free = Free({n: q[n] for n in names}, names, what)
        start = xq if a.inputs == "quantized" else x

        def loss(w, pick, i=i, y=y, start=start):
            out, want = layer(h.config, w, i, start[pick], tables), y[pick]
            return ((out - want).square().mean(-1) / want.square().mean(-1)).mean()

        train(free, loss, len(x), a)
        with torch.no_grad():
            q |= free.weights()
        x, xq = y, run(q, i, xq)
    return q


def tune_experts(h: Harness, q: dict, a, what) -> dict:
    """Each expert's output on its own tokens, weighted by routing weight² / mean(resid²)."""
    q, tables = dict(q), positions(h.calib_ids.shape[1], h.config, h.calib_ids.device)
    x = h.w["token_embd"][h.calib_ids]
    for i in range(h.config.n_layer):
        seen, after = [], []
        with torch.no_grad():
            for base, part in enumerate(x.split(8)):
                out = layer(h.config, h.w, i, part, tables, lambda n, t, b=base, to=seen: to.append((b, n, t)))
                after.append(out)
        norm = [1 / o.flatten(0, 1).square().mean(-1) for o in after]
        x = torch.cat(after)
        b = f"blk.{i}."
        if b + "ffn_gate_exps" not in q:
            continue
        names = [f"{b}ffn_{r}_exps" for r in ("gate", "up", "down")]
        rows = {}
        for base, n, t in seen:
            if n.endswith(".exps"):
                rows.setdefault(t.expert, []).append((t.x, t.weight.square() * norm[base][t.tokens]))
        done = {n: q[n].clone() for n in names}
        for e, found in rows.items():
            xe, we = (torch.cat(t) for t in zip(*found, strict=True))
            free = Free({n: q[n][e] for n in names}, names, ["d"])
            with torch.no_grad():
                want = swiglu(xe, h.w[names[0]][e], h.w[names[1]][e]) @ h.w[names[2]][e].T
            unit = (want.square().mean(-1) * we).mean()

            def loss(w, pick, xe=xe, we=we, want=want, names=names, unit=unit):
                out = swiglu(xe[pick], w[names[0]], w[names[1]]) @ w[names[2]].T
                return ((out - want[pick]).square().mean(-1) * we[pick]).mean() / unit

            class b_:
                lr, epochs, batch = a.lr, a.epochs, max(256, a.batch * 128)

            train(free, loss, len(xe), b_)
            with torch.no_grad():
                for n, t in free.weights().items():
                    done[n][e] = t
        q |= done
    return q


TUNE = {"expert": tune_experts, "layer": tune_layers, "model": tune_model}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("calib", type=Path)
    p.add_argument("text", type=Path)
    p.add_argument("--plan", nargs="+", default=["dyn158"])
    p.add_argument("--level", nargs="+", default=["expert", "layer", "model"])
    p.add_argument("--what", nargs="+", default=["d", "d,norms", "d,norms,router"])
    p.add_argument("--gamma", type=float, nargs="+", default=[1.0, 1.06])
    p.add_argument("--inputs", choices=["quantized", "original"], default="quantized")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--lr-shift", type=float, default=3e-3)
    p.add_argument("--effort", default="normal")
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--batch", type=int, default=8, help="chunks a step")
    p.add_argument("--chunks", type=int, default=30)
    p.add_argument("--calib-chunks", type=int, default=120)
    p.add_argument("--cache", type=Path, required=True)
    p.add_argument("--device", default="cpu")
    a = p.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    h = Harness(a.model, a.calib, a.text, a.cache, a.chunks, a.calib_chunks, device=a.device)

    def show(label: str, w: dict, t: float) -> None:
        r = evaluate(h.config, w, h.ids, h.reference["reference"])
        scores = f"KLD {r['kld']:.5f}  top-1 {r['top1']:.2f}  PPL {r['ppl']:.4f}"
        print(f"{label:50s} {scores}  ({time.time() - t:.0f} s)", flush=True)

    for plan in a.plan:
        a.now = plan
        for gamma in a.gamma:
            pairs = tuple((t, gamma) for t in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "Q2_K"))
            t = time.time()
            q = build(a.cache, h.tag, h.stats, h.w, plan_types(plan, h.config), Variant(effort=a.effort, gamma=pairs))
            q = {n: v.clone() for n, v in q.items()}
            show(f"{plan} γ={gamma}", q, t)
            for level in a.level:
                for what in a.what[: 1 if level == "expert" else None]:
                    t = time.time()
                    show(
                        f"{plan} γ={gamma} {level} {what} lr {a.lr} {a.lr_shift} x{a.epochs} {len(h.calib_ids)}",
                        TUNE[level](h, q, a, what.split(",")),
                        t,
                    )


if __name__ == "__main__":
    main()
