"""Judge encoders end to end on a small DeepSeek-V3 checkpoint: same plan, same bytes, KLD / PPL / top-1 on other text.

    python scripts/research/encoder_harness.py MODEL CALIB.txt EVAL.txt --plan dyn158 --encoder ggml quantkit

Calibration (Hessians of every matrix) and encoded tensors are cached in --cache, so a repeated experiment takes the
seconds of its evaluation. Chunks of 512 tokens, the second half of each scored, against the FP8 original.
"""

import argparse
import hashlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from encoder_proxy import layer, load, logits, positions
from encoder_targets import encode_values
from tokenizers import Tokenizer

from quantkit.encoding.api import SUPPORTED
from quantkit.encoding.hessian import Hessian, blend, second_moment
from quantkit.ggml import quants
from quantkit.models.config import ModelConfig
from quantkit.runtime.layers import rms_norm

EXPERT_ROLES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
DYN158 = {
    "ffn_gate_exps": "IQ1_S",
    "ffn_up_exps": "IQ1_S",
    "ffn_down_exps": "IQ1_S",
    "attn_q_a": "Q4_K",
    "attn_q_b": "Q4_K",
    "attn_output": "Q4_K",
    "attn_kv_a_mqa": "Q6_K",
    "attn_v_b": "Q6_K",
    "ffn_gate": "Q4_K",
    "ffn_up": "Q4_K",
    "ffn_down": "Q6_K",
    "ffn_gate_shexp": "Q5_K",
    "ffn_up_shexp": "Q5_K",
    "ffn_down_shexp": "Q6_K",
    "token_embd": "Q4_K",
    "output": "Q6_K",
    "attn_k_b": "Q8_0",
}


def plan_types(name: str, config: ModelConfig) -> dict[str, str]:
    """Tensor name -> type. 'dyn158', 'experts:TYPE' (routed experts alone) or a type for all that can take it."""
    base = DYN158
    if name == "dyn158+f32":  # the experts of dyn158; the other matrices may be re-targeted, not rounded
        base = {role: t if role in EXPERT_ROLES else "F32" for role, t in DYN158.items()}
    elif name.startswith("experts"):
        base = dict.fromkeys(EXPERT_ROLES, name.split(":")[1].replace("dyn158", "IQ1_S"))
    elif name != "dyn158":
        base = {role: name for role in DYN158} | {"token_embd": "Q4_K", "output": "Q6_K", "attn_k_b": "Q8_0"}
    types, dense = {}, config.n_dense
    for role, qtype in base.items():
        if role in ("token_embd", "output"):
            types[role] = qtype
            continue
        for i in range(config.n_layer):
            ffn_dense = role in ("ffn_gate", "ffn_up", "ffn_down")
            if role.startswith("ffn") and ffn_dense != (i < dense):
                continue
            types[f"blk.{i}.{role}"] = qtype
    if "dyn158" in name:
        types[f"blk.{dense}.ffn_down_exps"] = "IQ2_XXS"
    return types


def chunks(model: Path, text: Path, n: int = 512, bos: int = 0) -> torch.Tensor:
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text.read_text(), add_special_tokens=False).ids
    ids = torch.tensor(ids[: len(ids) // n * n]).view(-1, n)
    ids[:, 0] = bos
    return ids


# -- calibration ------------------------------------------------------------------------------------------------------


class Moments:
    """Running weighted sums of x xᵀ, for several weightings of the tokens at once."""

    def __init__(self):
        self.sums: dict[tuple, list] = {}

    def add(self, name: str, kind: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        moment = second_moment(x, weight)
        if moment.matrix is None:
            return
        entry = self.sums.setdefault((name, kind), [torch.zeros_like(moment.matrix), 0.0, 0.0])
        entry[0] += moment.matrix * float(weight.sum())
        entry[1] += float(weight.sum())
        entry[2] += float(weight.square().sum())

    def result(self) -> dict[tuple, Hessian]:
        out = {}
        for key, (total, w, w2) in self.sums.items():
            matrix = total / w
            out[key] = Hessian(matrix, matrix.diagonal().clone(), w * w / w2)
        return out


def see_layer(moments: Moments, seen: list, after: torch.Tensor) -> None:
    """Add one batch of a layer. Kinds: 'plain' all tokens alike, 'norm' by 1/mean(resid²), for experts also × w²."""
    norm = 1 / after.flatten(0, 1).square().mean(-1)
    norm = norm / norm.mean()
    for name, inputs in seen:
        if not name.endswith(".exps"):
            moments.add(name, "plain", inputs, torch.ones(len(inputs), device=inputs.device))
            moments.add(name, "norm", inputs, norm)
            continue
        w = inputs.weight
        for role, t in (("gate", inputs.x), ("down", inputs.hidden)):
            key = f"{name[:-4]}ffn_{role}_exps.{inputs.expert}"
            for kind, weight in (
                ("plain", torch.ones(len(t), device=t.device)),
                ("w2", w**2),
                ("norm", w**2 * norm[inputs.tokens]),
            ):
                moments.add(key, kind, t, weight)


@torch.inference_mode()
def calibrate(config, w, ids, batch: int = 8) -> dict[tuple, Hessian]:
    """(matrix, kind) -> Hessian, of the model with weights w."""
    states, tables, moments = w["token_embd"][ids], positions(ids.shape[1], config, ids.device), Moments()
    for i in range(config.n_layer):
        states = calibrate_layer(config, w, i, states, tables, moments, batch)
    x = rms_norm(states, w["output_norm"], config.rms_eps).flatten(0, 1)
    for kind in ("plain", "norm"):
        moments.add("output", kind, x, torch.ones(len(x), device=x.device))
    return moments.result()


def calibrate_layer(config, w, i, states, tables, moments, batch: int = 8) -> torch.Tensor:
    out = torch.empty_like(states)
    for j in range(0, len(states), batch):
        seen = []
        out[j : j + batch] = layer(config, w, i, states[j : j + batch], tables, lambda n, x: seen.append((n, x)))  # noqa: B023
        see_layer(moments, seen, out[j : j + batch])
    return out


# -- variants ---------------------------------------------------------------------------------------------------------

SAME_INPUT = {"attn_kv_a_mqa": "attn_q_a", "ffn_up": "ffn_gate", "ffn_up_shexp": "ffn_gate_shexp"}
SAME_INPUT |= {"ffn_up_exps": "ffn_gate_exps"}


@dataclass(frozen=True)
class Variant:
    """How to encode: ggml or quantkit; which Hessian; γ by role group, applied to the decoded weights (γ commutes)."""

    encoder: str = "quantkit"
    effort: object = "normal"
    beta: float = 1.0  # share of the errors that is fed back
    kind: str = "norm"  # plain, w2, norm
    scope: str = "expert"  # expert or layer (one Hessian for gate/up of a layer)
    pseudo: float = 512.0  # pseudo tokens of the layer's Hessian blended into gate/up of an expert
    diagonal: float | None = None  # None: full matrix; else unused
    gamma: tuple = ()  # ((role or type, γ), …)
    damping: float = 1.0


def hessian_for(stats: dict, name: str, v: Variant, expert: int | None = None) -> Hessian | None:
    prefix, _, role = name.rpartition(".")
    source = SAME_INPUT.get(role, role)
    key = f"{prefix}.{source}" if prefix else source
    if expert is None:
        return stats.get((key, v.kind if v.kind != "w2" else "plain"))
    kind = "norm" if v.kind == "norm" else "plain"
    own = stats.get((f"{key}.{expert}", v.kind))
    if role == "ffn_down_exps":
        return own
    shared = stats[(f"{prefix}.ffn_gate_shexp", kind)]  # sees the same hidden states, all of them
    return shared if v.scope == "layer" else blend(own or Hessian(), shared, v.pseudo) if v.pseudo else own


def quantized(qtype: str, w: torch.Tensor, hessians: list, importances: list, v: Variant) -> torch.Tensor:
    """w [E, rows, n_in], a Hessian or None and an importance or None for each -> what the encoded bytes decode to."""
    if qtype == "F32":
        return w
    if qtype == "Q8_0":
        groups = w.reshape(-1, 32)
        d = (groups.abs().amax(1, keepdim=True) / 127).half().float()
        return ((groups / d.clamp_min(1e-12)).round().clamp(-127, 127) * d).view(w.shape)
    if v.encoder == "quantkit" and qtype in SUPPORTED:
        if v.damping != 1.0:
            hessians = [None if h is None else replace(h, tokens=h.tokens / v.damping) for h in hessians]
        return encode_values(qtype, w, hessians, effort=v.effort, beta=v.beta)
    out = []
    for matrix, importance in zip(w.cpu(), importances, strict=True):
        data = quants.quantize(qtype, matrix.numpy(), None if importance is None else importance.cpu().numpy())
        out.append(torch.from_numpy(quants.dequantize(qtype, data, w.shape[-1]).copy()))
    return torch.stack(out).to(w.device)


def encode_tensor(stats: dict, name: str, w: torch.Tensor, qtype: str, v: Variant) -> torch.Tensor:
    plain = replace(v, kind="plain", scope="expert", pseudo=0.0)
    if not name.endswith("_exps"):
        hessian, importance = None, None
        if name != "token_embd" and not name.endswith("attn_k_b"):
            hessian, importance = hessian_for(stats, name, v), hessian_for(stats, name, plain).diagonal
        return quantized(qtype, w.reshape(1, -1, w.shape[-1]), [hessian], [importance], v).view(w.shape)
    hessians = [hessian_for(stats, name, v, e) for e in range(len(w))]
    seen = [hessian_for(stats, name, plain, e) for e in range(len(w))]
    return quantized(qtype, w, hessians, [None if h is None else h.diagonal for h in seen], v)


def cached_tensor(cache: Path, tag: str, stats, name, w, qtype, v: Variant) -> torch.Tensor:
    if v.encoder == "ggml":
        v = Variant(encoder="ggml")
    key = hashlib.sha1(f"{tag}|{name}|{qtype}|{replace(v, gamma=())}".encode()).hexdigest()[:20]
    path = cache / f"{key}.pt"
    if not path.exists():
        torch.save(encode_tensor(stats, name, w, qtype, v), path)
    return torch.load(path, map_location=w.device)


def build(cache: Path, tag: str, stats, w: dict, types: dict[str, str], v: Variant) -> dict:
    gamma, out = dict(v.gamma), dict(w)
    for name, qtype in types.items():
        q = cached_tensor(cache, tag, stats, name, w[name], qtype, v)
        role = name.rpartition(".")[2]
        out[name] = q * gamma.get(role, gamma.get(qtype, 1.0))
    return out


# -- evaluation -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(config, w, ids, reference: list | None, batch: int = 2) -> dict:
    """Mean KLD and top-1 agreement against the reference logits (None: they are returned), and PPL."""
    kld, top, nll, count, kept = 0.0, 0, 0.0, 0, []
    for n, j in enumerate(range(0, len(ids), batch)):
        q = F.log_softmax(logits(config, w, ids[j : j + batch]), -1)
        target = ids[j : j + batch, ids.shape[1] // 2 + 1 :]
        nll -= float(q.gather(-1, target[..., None]).sum())
        count += target.numel()
        if reference is None:
            kept.append(q.half())
            continue
        p = reference[n].float()
        kld += float((p.exp() * (p - q)).sum())
        top += int((p.argmax(-1) == q.argmax(-1)).sum())
    if reference is None:
        return {"ppl": float(np.exp(nll / count)), "reference": kept}
    return {"kld": kld / count, "top1": 100 * top / count, "ppl": float(np.exp(nll / count))}


class Harness:
    """Model, Hessians, reference logits and the cache of encoded tensors."""

    def __init__(
        self,
        model: Path,
        calib: Path,
        text: Path,
        cache: Path,
        n_eval: int = 30,
        n_calib: int = 120,
        device: str = "cpu",
    ):
        self.cache = cache
        cache.mkdir(parents=True, exist_ok=True)
        self.config, w = load(model)
        self.w = {k: t.to(device) for k, t in w.items()}
        ids = chunks(model, text).to(device)
        self.ids = ids[:: max(1, len(ids) // n_eval)][:n_eval]
        all_calib = chunks(model, calib)
        pick = torch.linspace(0, len(all_calib) - 1, min(n_calib, len(all_calib))).round().long()
        self.calib_ids = all_calib[pick].to(device)
        self.tag = f"{model.name}-{calib.name}-{len(self.calib_ids)}"
        self.stats = self._cached(
            f"stats-{self.tag}-{device}.pt", lambda: calibrate(self.config, self.w, self.calib_ids)
        )
        self.reference = evaluate(self.config, self.w, self.ids, None)

    def _cached(self, name: str, make):
        path = self.cache / name
        if not path.exists():
            torch.save(make(), path)
        return torch.load(path, weights_only=False)

    def run(self, plan: str, v: Variant, label: str = "") -> dict:
        types = plan_types(plan, self.config)
        t = time.time()
        w = build(self.cache, self.tag, self.stats, self.w, types, v)
        t_encode = time.time() - t
        result = evaluate(self.config, w, self.ids, self.reference["reference"])
        result |= {"plan": plan, "label": label or v.encoder, "variant": str(v), "encode_s": round(t_encode, 1)}
        with open(self.cache / "results.jsonl", "a") as f:
            f.write(json.dumps(result) + "\n")
        print(
            f"{plan:16s} {result['label']:40s} KLD {result['kld']:.5f}  top-1 {result['top1']:.2f}  PPL "
            f"{result['ppl']:.4f}  ({t_encode:.0f} s to encode)",
            flush=True,
        )
        return result


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("calib", type=Path)
    p.add_argument("text", type=Path)
    p.add_argument("--plan", nargs="+", default=["dyn158"], help="dyn158, experts:TYPE or TYPE")
    p.add_argument("--encoder", nargs="+", default=["ggml", "quantkit"])
    p.add_argument("--effort", default="normal")
    p.add_argument("--kind", default="norm", choices=["plain", "w2", "norm"])
    p.add_argument("--scope", default="expert", choices=["expert", "layer"])
    p.add_argument("--pseudo", type=float, default=512.0)
    p.add_argument("--gamma", type=float, nargs="+", default=[1.0], help="factors on the IQ1/IQ2 scales to compare")
    p.add_argument("--chunks", type=int, default=30)
    p.add_argument("--calib-chunks", type=int, default=120)
    p.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "quantkit-encoder-harness")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--device", default="cpu")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    harness = Harness(a.model, a.calib, a.text, a.cache, a.chunks, a.calib_chunks, a.device)
    for plan in a.plan:
        for encoder in a.encoder:
            for gamma in a.gamma if encoder == "quantkit" else [1.0]:
                pairs = tuple((t, gamma) for t in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "Q2_K"))
                v = Variant(
                    encoder, a.effort, kind=a.kind, scope=a.scope, pseudo=a.pseudo, gamma=pairs if gamma != 1 else ()
                )
                label = "ggml" if encoder == "ggml" else f"{a.effort} {a.kind} {a.scope} γ={gamma}"
                harness.run(plan, v, label)


if __name__ == "__main__":
    main()
