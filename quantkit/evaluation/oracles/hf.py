"""transformers as an oracle: its own class makes a small random model of a config.json, in a process of its own.

Run as a module, this file is the child: `python -m quantkit.evaluation.oracles.hf REQUEST.json`, the request as
described at `_serve`. What a config.json means is then said by code that has nothing in common with ours.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.evaluation.oracles.child import OracleError, run_module

TIMEOUT = 600
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}


def available() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


def version() -> str:
    """Its name and version."""
    return f"transformers {importlib.metadata.version('transformers')}"


def random_model(config: Mapping[str, Any], folder: Path, tokens: np.ndarray) -> np.ndarray:
    """float32 logits [n_chunk, t, n_vocab] of a random model of this config.json, whose weights it leaves in the folder
    as a checkpoint. tokens: int [n_chunk, t]. OracleError if transformers has no such model or does not take the
    config."""
    with tempfile.TemporaryDirectory() as work:
        given, answer, request = (Path(work) / name for name in ("tokens.npy", "logits.npy", "request.json"))
        np.save(given, np.ascontiguousarray(tokens, dtype=np.int64))
        paths = {"folder": str(folder), "tokens": str(given), "logits": str(answer)}
        request.write_text(json.dumps({"config": config, **paths}), encoding="utf-8")
        run_module(__name__, str(request), "transformers", TIMEOUT, QUIET)
        return np.load(answer)


# The child.

PUBLISHED: Mapping[str, Sequence[tuple[str, str]]] = {
    "DeepseekV4ForCausalLM": (
        (r"^model\.", ""),
        (r"^embed_tokens\.", "embed."),
        (r"^hc_head\.hc_", "hc_head_"),
        (r"\.attn\.norm\.", ".attn.kv_norm."),
    ),
}
"""Class -> what its checkpoints' names have where transformers writes something else."""


def _rename(path: Path, rules: Sequence[tuple[str, str]]) -> None:
    from safetensors.torch import load_file, save_file

    renamed = {}
    for name, tensor in load_file(path).items():
        for found, published in rules:
            name = re.sub(found, published, name)
        renamed[name] = tensor
    save_file(renamed, path, metadata={"format": "pt"})


def _serve(path: Path) -> None:
    """Request: config (what config.json holds), and the paths tokens, logits and folder (to be filled)."""
    import torch
    import transformers

    request = json.loads(path.read_text(encoding="utf-8"))
    name = request["config"]["architectures"][0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise OracleError(f"{version()} has no {name}")
    config = model_class.config_class.from_dict(request["config"])
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for key, weight in [*model.named_parameters(), *model.named_buffers()]:
            if not weight.is_floating_point():  # a table of experts, none twice in a row
                experts = torch.rand(len(weight), config.n_routed_experts).argsort(1)
                weight.copy_(experts[:, : weight.shape[1]])
            elif weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) * 1.5 / weight.shape[-1] ** 0.5)
            elif "norm" in key:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            elif "correction_bias" in key:
                weight.copy_(0.1 * torch.randn_like(weight))
            elif key.endswith(("sinks", "base")):
                weight.copy_(0.5 * torch.randn_like(weight))
        logits = model(torch.from_numpy(np.load(request["tokens"])), use_cache=False).logits
    np.save(request["logits"], logits.float().numpy())
    model.save_pretrained(request["folder"])
    if name in PUBLISHED:
        _rename(Path(request["folder"]) / "model.safetensors", PUBLISHED[name])
    sys.stdout.flush()
    os._exit(0)  # its threads may not join


if __name__ == "__main__":
    try:
        _serve(Path(sys.argv[1]))
    except OracleError as problem:
        sys.exit(f"oracle: {problem}")
