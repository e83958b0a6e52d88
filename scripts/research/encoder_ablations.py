"""The ablations of docs/results/encoders.md: one factor changed at a time, 1.58-bit experts, γ swept for each.

python scripts/research/encoder_ablations.py MODEL CALIB.txt EVAL.txt --cache DIR [--only kind scope …]
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from encoder_harness import Harness, Variant

from quantkit.encoding.state import EFFORTS

NORMAL = EFFORTS["normal"]
CASES = {
    "gamma by role": [
        ("γ down 1.19", Variant(gamma=(("ffn_down_exps", 1.19),))),
        ("γ gate, up 1.06", Variant(gamma=(("ffn_gate_exps", 1.06), ("ffn_up_exps", 1.06)))),
        ("γ up, down 1.08", Variant(gamma=(("ffn_up_exps", 1.08), ("ffn_down_exps", 1.08)))),
        (
            "γ gate 1.04, up 1.08, down 1.1",
            Variant(gamma=(("ffn_gate_exps", 1.04), ("ffn_up_exps", 1.08), ("ffn_down_exps", 1.1))),
        ),
    ],
    "kind": [("w² without token norm", Variant(kind="w2")), ("plain", Variant(kind="plain"))],
    "scope": [("shared H for gate/up", Variant(scope="layer")), ("own H, no blend", Variant(pseudo=0.0))],
    "damping": [("damping × 4", Variant(damping=4.0)), ("damping × 16", Variant(damping=16.0))],
    "effort": [("best", Variant(effort="best"))],
    "passes": [
        ("0 CD passes", Variant(effort=replace(NORMAL, passes=0))),
        ("2 CD passes", Variant(effort=replace(NORMAL, passes=2))),
    ],
    "no feedback": [("exhaustive, diagonal", Variant(effort="fast"))],
}
TYPES = ("IQ1_S", "IQ2_XXS")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("calib", type=Path)
    p.add_argument("text", type=Path)
    p.add_argument("--plan", default="experts:dyn158")
    p.add_argument("--only", nargs="*", default=list(CASES))
    p.add_argument("--gamma", type=float, nargs="+", default=[1.0, 1.06, 1.1])
    p.add_argument("--chunks", type=int, default=30)
    p.add_argument("--cache", type=Path, required=True)
    a = p.parse_args()
    torch.set_num_threads(1)
    harness = Harness(a.model, a.calib, a.text, a.cache, a.chunks)
    for case in a.only:
        for label, v in CASES[case]:
            for gamma in a.gamma if not v.gamma else [1.0]:
                pairs = v.gamma or tuple((t, gamma) for t in TYPES)
                harness.run(a.plan, replace(v, gamma=pairs), f"{label} γ={gamma}" if not v.gamma else label)


if __name__ == "__main__":
    main()
