"""What a repository's JSON says of quantizations that are there: anyone may have written it, so each fact is taken only
if it is of its kind."""

import re
from collections.abc import Mapping
from typing import Any

from quantkit.models.config import is_finite
from quantkit.planning.targets import TARGETS

NUMBERS = (
    "bytes",
    "bpw",
    "bpw_routed",
    "ppl",
    "ppl_reference",
    "kld_mean",
    "kld_mean_error",
    "top1_agreement",
    "tokens",
)
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,63}")
COMMIT = re.compile(r"[0-9a-f]{7,64}")
LONGEST = 300  # of a name of text, or of a caveat
MOST_CAVEATS = 8


def figures(verify: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of verify.json that the card shows; nothing unless all are there and are figures."""
    found = {key: verify.get(key) for key in NUMBERS}
    right = all(_number(value) for value in found.values()) and _line(verify.get("text"))
    return found | {"text": verify["text"]} if right else {}


def made(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of provenance.json that the card and its commands are made from."""
    out: dict[str, Any] = {"target": "unknown", "quantkit": "unknown", "calibration": {}}
    if provenance.get("target") in TARGETS:
        out["target"] = provenance["target"]
    for key in ("quantkit", "mla", "effort", "packed_by"):
        if isinstance(value := provenance.get(key), str) and WORD.fullmatch(value):
            out[key] = value
    calibration = provenance.get("calibration")
    if isinstance(calibration, dict):
        kept = {
            key: calibration[key] for key in ("min_expert_tokens", "expert_tokens") if _number(calibration.get(key))
        }
        text = _text(calibration.get("text"))
        out["calibration"] = kept | ({"text": text} if text and "min_expert_tokens" in kept else {})
    if evaluation := _text(provenance.get("evaluation")):
        out["evaluation"] = evaluation
    source = provenance.get("source")
    if isinstance(source, dict) and isinstance(source.get("commit"), str) and COMMIT.fullmatch(source["commit"]):
        out["source"] = {"commit": source["commit"]}
    caveats = provenance.get("caveats")
    if isinstance(caveats, list) and len(caveats) <= MOST_CAVEATS and all(map(_line, caveats)):
        out["caveats"] = caveats
    if _number(provenance.get("split_max_bytes")):
        out["split_max_bytes"] = provenance["split_max_bytes"]
    return out


def _text(value: Any) -> dict[str, Any] | None:
    """A TextChoice as JSON has it."""
    if not isinstance(value, dict) or not _number(value.get("n_tokens")) or not _number(value.get("chunk")):
        return None
    data = value.get("data", [])
    if not isinstance(data, list) or not all(map(_line, data)):
        return None
    return {
        "n_tokens": value["n_tokens"],
        "chunk": value["chunk"],
        "data": data,
        "from_start": value.get("from_start") is True,
    }


def _number(value: Any) -> bool:
    return not isinstance(value, bool) and is_finite(value)


def _line(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST and value.isprintable()
