"""The scores of verify.json in a few lines."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.sizes import both_units


def layer_line(result: Mapping[str, Any]) -> str:
    """One line about the layers: how the error grows, and which layer stands out."""
    layers = result["layers"]
    middle = statistics.median(layer["own"] for layer in layers)
    bad = [layer for layer in layers if layer["layer"] in result["bad_layers"]]
    named = "; ".join(f"layer {layer['layer']} stands out with {layer['own']:.3f}" for layer in bad)
    return f"error {layers[-1]['error']:.3f} after the last, own {middle:.3f} (median); {named or 'none stands out'}"


def baseline_line(result: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The file against the same types by ggml's encoder."""
    ratio = result["kld_mean"] / other["kld_mean"] if other["kld_mean"] else 1.0
    return f"{ratio:.2f} of the KLD of ggml's encoder in the same bytes ({other['kld_mean']:.5f})"


def short_table(result: Mapping[str, Any], path: Path) -> str:
    """The lines that `make` and `verify` end with."""
    rows = [
        ("file", f"{path}"),
        ("size", f"{result['bytes']:,} bytes ({both_units(result['bytes'])})"),
        ("bpw", f"{result['bpw']:.3f} (routed experts {result['bpw_routed']:.3f})"),
        ("perplexity", f"{result['ppl']:.4f} (original {result['ppl_reference']:.4f})"),
        (
            "KLD",
            f"mean {result['kld_mean']:.5f} ± {result['kld_mean_error']:.5f}, median {result['kld_median']:.5f}, "
            f"99 % {result['kld_p99']:.4f}",
        ),
        ("same top-1", f"{result['top1_agreement']:.2f} %"),
        ("tokens", f"{result['tokens']:,} scored"),
    ]
    if len(domains := result["domains"]) > 1:
        rows.append(("by domain", ", ".join(f"{name} {d['kld_mean']:.3f}" for name, d in domains.items())))
    if other := result.get("baseline"):
        rows.append(("baseline", baseline_line(result, other)))
    if result["layers"]:
        rows.append(("layers", layer_line(result)))
    if read := result.get("configuration"):
        rows.append(("config.json ", "FAILED: " * (read["status"] == "fail") + read["detail"]))
    if mode := result.get("runtime"):
        klds = [mode[key]["kld_mean"] for key in ("original", "agreement")]
        how = "agreeing with" if mode["agree"] else "DISAGREEING with"
        rows.append(("runtime", f"KLD {klds[0]:.5f} token by token, {how} the streamed mode ({klds[1]:.5f})"))
    if written := result.get("generation"):
        rows.append(("generation", written["summary"]))
    return "\n".join(f"{key:<12}{value}" for key, value in rows)
