"""What KTransformers needs beside a GGUF: optimize rules, `attn_kv_b` for old versions, config, tokenizer, commands.

Facts are from kvcache-ai/ktransformers at v0.2.3, v0.3.1 and v0.3.2: optimize/optimize.py (how rules are matched),
optimize/optimize_rules/DeepSeek-V3-Chat*.yaml (classes and options), util/utils.py (what becomes of kv_b),
util/custom_gguf.py and custom_loader.py (types, and which files are read).
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml

from quantkit import machine
from quantkit.errors import QuantkitError
from quantkit.evaluation.verify import check_target
from quantkit.formats.gguf_encode import PlainTensor
from quantkit.formats.gguf_reader import model_file_name
from quantkit.formats.gguf_writer import GGUFWriter
from quantkit.formats.lock import NAME as LOCK
from quantkit.formats.lock import locked
from quantkit.formats.whole_file import rename_folder
from quantkit.job.asked import check_new_folder
from quantkit.models import family
from quantkit.models.config import ModelConfig, mla_of
from quantkit.planning import targets
from quantkit.progress import say
from quantkit.runtime.sources.gguf import GGUFWeights, open_gguf
from quantkit.sizes import both_units

GGUF, MODEL, RULES, LAUNCH, README = "gguf", "model", "optimize.yaml", "launch.sh", "README.md"
SIDECAR = "attn_kv_b.gguf"
Linear = Literal["marlin", "torch"]
OPERATORS: Mapping[Linear, str] = {"marlin": "KLinearMarlin", "torch": "KLinearTorch"}

_V3 = "ktransformers.models.modeling_deepseek_v3."
_OPS = "ktransformers.operators."
_LINEARS = (
    r"(self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj)"
    r"|mlp\.(shared_experts\.)?(gate_proj|up_proj|down_proj))"
)

# transformers before 4.51 (ktransformers up to 0.2.x pins 4.43) knows no deepseek_v3; this class keeps every key of
# config.json as an attribute, which is all that ktransformers' own modelling code wants.
CONFIGURATION = """from transformers import PretrainedConfig


class DeepseekV3Config(PretrainedConfig):
    model_type = "deepseek_v3"
"""

LAUNCH_TEXT = """#!/bin/sh
usage="launch.sh chat|serve [options], or launch.sh sglang CHECKPOINT [options]"
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
python=$(command -v python || command -v python3) || {{ echo "launch.sh: no python on the PATH" >&2; exit 1; }}
mode=${{1:-chat}}
[ $# -eq 0 ] || shift
case $mode in -h|--help|help) echo "usage: $usage"; exit ;; esac
if [ "$mode" = sglang ]; then
    [ $# -gt 0 ] || {{ echo "launch.sh sglang CHECKPOINT: the rest comes from the original" >&2; exit 2; }}
    checkpoint=$1
    shift
    "$python" -c 'import sglang' >/dev/null 2>&1 || {{ echo "launch.sh: needs sglang and kt-kernel" >&2; exit 1; }}
    exec "$python" -m sglang.launch_server --host 127.0.0.1 --model "$checkpoint" --trust-remote-code \\
        --kt-method LLAMAFILE --kt-weight-path "$here/gguf" --kt-cpuinfer {threads} \\
        --kt-threadpool-count 1 --kt-num-gpu-experts 0 "$@"
fi
case $mode in chat|serve) ;; *) echo "launch.sh: $mode is unknown: $usage" >&2; exit 2 ;; esac
version=$("$python" -c 'import ktransformers; print(ktransformers.__version__)' 2>/dev/null) || version="none ($python)"
case $version in
0.2.3*) backend= ;;
0.2.[4-9]*|0.3|0.3[+.]*) backend="--backend_type ktransformers" ;; # 0.2.4's default, balance_serve, has other rules
*) echo "launch.sh: needs ktransformers 0.2.3 to 0.3.2, not $version (or launch.sh sglang)" >&2; exit 1 ;;
esac
set -- --model_path "$here/model" --gguf_path "$here/gguf" --optimize_config_path "$here/optimize.yaml" \\
    --cpu_infer {infer} "$@"
[ $mode = serve ] || exec "$python" -m ktransformers.local_chat "$@"
exec ktransformers --host 127.0.0.1 --port 10002 $backend "$@"
"""

README_TEXT = """# {name} in KTransformers

| version | command | reads |
|---|---|---|
| ktransformers 0.2.3 to 0.3.2 | `./launch.sh chat` or `./launch.sh serve` | this folder, and nothing else |
| kt-kernel with sglang | `./launch.sh sglang CHECKPOINT` | routed experts here, all else in CHECKPOINT (the original) |

Further options are handed on (`--max_new_tokens 1000`, ...).

- `gguf/`: links to the model's files. KTransformers reads every `.gguf` below it{sidecar}
- `optimize.yaml`: which class computes which module, and where: {devices}; routed experts on the
  CPU (threads: {threads}). {linear}
- `model/`: configuration and tokenizer, from the GGUF's metadata. No `.safetensors` may lie in `gguf/`.
"""


def default_output(path: Path) -> Path:
    """`X.gguf`, or one of its splits, -> `X-kt` beside it."""
    return path.with_name(model_file_name(path) + "-kt")


def export(path: Path, output: Path, *, gpus: int = 1, threads: int | None = None, linear: Linear = "marlin") -> Path:
    """A folder from which KTransformers starts; it appears when it is complete. Memory: one layer's kv_b as float32.

    QuantkitError if KTransformers cannot compute the file, saying which tensor and why, or if `output` exists.
    """
    source = open_gguf(path)
    check(source)
    c = source.config
    if not 1 <= gpus <= c.n_layer:
        raise QuantkitError(f"--gpus {gpus}: the model has {c.n_layer} layers to share out")
    check_new_folder(output)
    work = output.with_name(f".{output.name}.part")  # a name of its own: what a kill leaves there, the next run clears
    with locked(work):
        for left in work.iterdir():
            if left.name != LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            _fill(work, output, source, gpus, threads or machine.threads(), linear)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    rename_folder(work, output)
    if linear == "marlin":
        say(_of_marlin(source))
    return output


def _of_marlin(source: GGUFWeights) -> str:
    """What its 4 bits save and cost: it goes by none of the types that the file has."""
    kept = [t for t in source.file.tensors.values() if len(t.shape) == 2 and t.name != "token_embd.weight"]
    weights = sum(math.prod(t.shape) for t in kept if not t.name.endswith("ffn_gate_inp.weight"))
    return (
        "KTransformers rounds attention, shared experts and output to 4 bits when it loads them (Marlin), whatever "
        f"their types: {both_units(int(weights * 0.53))} of GPU memory; --linear torch keeps BF16, "
        f"{both_units(2 * weights)}, and on tiny-r1 spares 0.09 nats of KLD"
    )


def check(source: GGUFWeights) -> None:
    """QuantkitError for the first thing in the file that KTransformers does not compute."""
    file, c = source.file, source.config
    if not targets.knows("ktransformers", c):
        raise QuantkitError(f"{file.path}: KTransformers reads no {c.architecture} attention from a GGUF")
    check_target(file, "ktransformers")
    if c.scoring != "sigmoid" or not c.n_moe:
        raise QuantkitError(
            f"{file.path}: KTransformers' rules are for DeepSeek-V3 and R1: sigmoid routing and MoE "
            f"layers, not {c.scoring} and {c.n_moe} of them"
        )
    needed = ["output.weight", *(f"blk.{layer}.exp_probs_b.bias" for layer in range(c.n_dense, c.n_layer))]
    if missing := [name for name in needed if name not in file.tensors]:
        raise QuantkitError(f"{file.path}: KTransformers needs {missing[0]}, which the file lacks")
    if empty := [key for key, value in file.metadata.items() if value == []]:
        raise QuantkitError(f"{file.path}: KTransformers fails on the empty array {empty[0]}; write the file without")


def _fill(work: Path, output: Path, source: GGUFWeights, gpus: int, threads: int, linear: Linear) -> None:
    file, c = source.file, source.config
    (work / GGUF).mkdir()
    for part in file.files:
        (work / GGUF / part.name).symlink_to(os.path.relpath(part.resolve(), (output / GGUF).resolve()))
    split = mla_of(file.tensors) == "split"
    if split:
        write_sidecar(source, work / GGUF / SIDECAR)
    write_model(source, work / MODEL)
    text = yaml.safe_dump(rules(c, gpus, linear), sort_keys=False, width=1000)
    (work / RULES).write_text(text, encoding="utf-8")
    infer = targets.cpu_infer(threads)
    (work / LAUNCH).write_text(LAUNCH_TEXT.format(threads=threads, infer=infer), encoding="utf-8")
    (work / LAUNCH).chmod(0o755)
    (work / README).write_text(_readme(source, gpus, threads, linear, split), encoding="utf-8")


def _readme(source: GGUFWeights, gpus: int, threads: int, linear: Linear, split: bool) -> str:
    sidecar = (
        (
            f",\n  so `{SIDECAR}` adds the combined kv_b that versions up to 0.3.1 need: BF16, bit for bit what "
            "0.3.2\n  and later make of the file's `attn_k_b` and `attn_v_b`."
        )
        if split
        else "."
    )
    spans = (f"layers {a} to {b - 1} on cuda:{gpu}" for gpu, (a, b) in enumerate(spread(source.config.n_layer, gpus)))
    how = {
        "marlin": "Attention and shared experts are packed to 4 bits at load (Marlin); `--linear torch` keeps BF16.",
        "torch": "Attention and shared experts stay BF16 on the GPU; `--linear marlin` packs them to 4 bits.",
    }
    return README_TEXT.format(
        name=source.name, sidecar=sidecar, devices=", ".join(spans), threads=threads, linear=how[linear]
    )


def spread(n_layer: int, gpus: int) -> list[tuple[int, int]]:
    """First layer and end of each GPU's share; earlier ones are larger by at most one layer."""
    bounds = [-(-n_layer * i // gpus) for i in range(gpus + 1)]
    return list(pairwise(bounds))


def rules(c: ModelConfig, gpus: int = 1, linear: Linear = "marlin") -> list[dict[str, Any]]:
    """Injection rules: the first that matches a module decides. The last ones place what keeps its class."""
    operator, last = OPERATORS[linear], _on(f"cuda:{gpus - 1}")
    model: dict[str, Any] = {"per_layer_prefill_intput_threshold": 0}  # (sic); 0: prefill like decoding
    if gpus > 1:
        model["transfer_map"] = {a: f"cuda:{gpu}" for gpu, (a, _) in enumerate(spread(c.n_layer, gpus)) if gpu}
    return [
        _rule(r"^model$", _OPS + "models.KDeepseekV2Model", model),
        _rule(r"^model\.embed_tokens$", "default", _on("cpu")),
        *_layer_rules(c, gpus, operator),
        _rule(r"^lm_head$", _OPS + "linear.KTransformersLinear", _linear_on(last, operator), "torch.nn.Linear"),
        _rule(r"^model\.norm$", "default", last),
        *(
            _rule(rf"^model\.layers\.{_numbers(a, b)}(\.|$)", "default", _on(f"cuda:{gpu}"))
            for gpu, (a, b) in enumerate(spread(c.n_layer, gpus))
        ),
    ]


def _layer_rules(c: ModelConfig, gpus: int, operator: str) -> Iterator[dict[str, Any]]:
    rope = "RoPE.YarnRotaryEmbeddingV3" if c.yarn else "RoPE.RotaryEmbeddingV3"
    for gpu, (a, b) in enumerate(spread(c.n_layer, gpus)):
        here, layer = _on(f"cuda:{gpu}"), rf"^model\.layers\.{_numbers(a, b)}\."
        yield _rule(
            layer + r"self_attn$", _OPS + "attention.KDeepseekV2Attention", here | {"absorb_for_prefill": False}
        )
        yield _rule(layer + r"self_attn\.rotary_emb$", _OPS + rope, here, _V3 + "DeepseekV3RotaryEmbedding")
        yield _rule(
            layer + _LINEARS + "$", _OPS + "linear.KTransformersLinear", _linear_on(here, operator), "torch.nn.Linear"
        )
        if b <= c.n_dense:
            continue
        mlp = rf"^model\.layers\.{_numbers(max(a, c.n_dense), b)}\.mlp"
        yield _rule(mlp + "$", _OPS + "experts.KDeepseekV3MoE", here, _V3 + "DeepseekV3MoE")
        yield _rule(mlp + r"\.gate$", _OPS + "gate.KMoEGate", here, _V3 + "MoEGate")
        experts = {
            "prefill_device": f"cuda:{gpu}",
            "prefill_op": "KExpertsTorch",
            "generate_device": "cpu",
            "generate_op": "KExpertsCPU",
            "out_device": f"cuda:{gpu}",
        }
        yield _rule(mlp + r"\.experts$", _OPS + "experts.KTransformersExperts", experts) | {"recursive": False}


def _rule(name: str, replacement: str, kwargs: Mapping[str, Any], kind: str | None = None) -> dict[str, Any]:
    match = {"name": name} | ({"class": kind} if kind else {})
    return {"match": match, "replace": {"class": replacement, "kwargs": dict(kwargs)}}


def _on(device: str) -> dict[str, Any]:
    return {"generate_device": device, "prefill_device": device}


def _linear_on(here: Mapping[str, Any], operator: str) -> dict[str, Any]:
    return {**here, "generate_op": operator, "prefill_op": "KLinearTorch"}


def _numbers(first: int, end: int) -> str:
    return f"({'|'.join(map(str, range(first, end)))})"


def write_sidecar(source: GGUFWeights, path: Path) -> None:
    """`attn_kv_b` of every layer, which versions up to 0.3.1 read instead of k_b and v_b.

    BF16, because KTransformers holds kv_b in BF16 whatever its type was: rounding the decoded values once gives what
    0.3.2 joins by itself. (Q8_0 would be rounded again, along other rows; F32 would be twice the bytes for nothing.)
    """
    c = source.config
    shape = (c.n_head * (c.qk_nope + c.v_head), c.kv_lora)
    tensors = [PlainTensor(f"blk.{layer}.attn_kv_b.weight", shape, "BF16") for layer in range(c.n_layer)]
    metadata = {"general.architecture": c.architecture, "general.name": f"attn_kv_b of {source.name}"}
    identity = {"model": source.file.fingerprint()}
    with GGUFWriter.open(path, tensors, metadata, fingerprint=identity) as writer:
        for layer, tensor in enumerate(tensors):
            k_b, v_b = (source.dense(f"blk.{layer}.attn_{part}_b.weight") for part in "kv")
            writer.write(tensor.name, 0, _bytes(join_kv_b(k_b, v_b)))


def join_kv_b(k_b: torch.Tensor, v_b: torch.Tensor) -> torch.Tensor:
    """k_b [n_head, kv_lora, qk_nope], v_b [n_head, v_head, kv_lora] -> [n_head (qk_nope + v_head), kv_lora]."""
    return torch.cat((k_b.transpose(1, 2), v_b), dim=1).flatten(0, 1)


def _bytes(values: torch.Tensor) -> np.ndarray:
    return values.bfloat16().contiguous().view(torch.uint8).numpy()


def write_model(source: GGUFWeights, folder: Path) -> None:
    """config.json, generation_config.json and the tokenizer's files, from the GGUF's metadata alone."""
    c = source.config
    meta: Mapping[str, Any] = source.file.metadata
    folder.mkdir()
    auto = {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    tokenizer = json.loads(source.tokenizer().to_str())
    tokenizer["model"]["merges"] = meta["tokenizer.ggml.merges"]  # "a b": tokenizers before 0.20 read no pairs
    try:
        names = {
            key: meta["tokenizer.ggml.tokens"][meta.get(f"tokenizer.ggml.{label}_token_id", c.eos)]
            for key, label in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"))
        }
    except (LookupError, TypeError):
        raise QuantkitError(f"{source.file.path}: a tokenizer.ggml.*_token_id is no token of the vocabulary") from None
    settings = {
        "tokenizer_class": "LlamaTokenizerFast",
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": c.n_context,
        **names,
        "add_bos_token": bool(meta.get("tokenizer.ggml.add_bos_token", True)),
        "add_eos_token": bool(meta.get("tokenizer.ggml.add_eos_token", False)),
    }
    if template := meta.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    sampling = {"bos_token_id": c.bos, "eos_token_id": c.eos, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    for name, value in (
        ("config.json", family.to_hf(c) | auto),
        ("generation_config.json", sampling),
        ("tokenizer_config.json", settings),
        ("tokenizer.json", tokenizer),
    ):
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "configuration_deepseek.py").write_text(CONFIGURATION, encoding="utf-8")
