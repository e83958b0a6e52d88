"""What can be done with each family, in words for people, and what to say of models that are of none.

A family in `family.FAMILIES` has an entry in CAPABILITIES (tests/models/test_capabilities.py); what is not in FAMILIES
is not supported, whatever is written here.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

YES = "yes"


@dataclass(frozen=True)
class Capability:
    """How well a family is supported. title: models of it; each other field says `yes` or what the limit is.

    calibrate: with gradients and one-pass encoding. encode: all types. verify: against the original. cpu, gpu: `run`
    and `serve`. llama_cpp, ktransformers: what `certify` finds in these engines.
    """

    title: str
    calibrate: str
    encode: str
    verify: str
    cpu: str
    gpu: str
    llama_cpp: str
    ktransformers: str


SPARSE = "up to index_topk (2,048) tokens of context by the graph; beyond by torch, slower"
DENSE = "up to index_topk (2,048) tokens of context, written but never run; beyond refused"
NO_GGUF = "no: it reads no such model from a GGUF"
CAPABILITIES: Mapping[str, Capability] = {
    "deepseek2": Capability(
        "DeepSeek-V2 to V3.1, R1, Kimi-K2 to K2.6 (text)",
        YES,
        YES,
        YES,
        YES,
        YES,
        "yes; V2 and V2.5: it routes groups wrongly; Kimi-K2: with --yarn-beta-fast 1",
        "yes, with the types that its kernels compute; V2-Lite: no, its experts are not multiples of 256",
    ),
    "deepseek32": Capability("DeepSeek-V3.2", YES, YES, YES, SPARSE, DENSE, YES, NO_GGUF),
    "glm-dsa": Capability("GLM-5 to 5.2", YES, YES, YES, SPARSE, DENSE, YES, NO_GGUF),
    "deepseek4": Capability(
        "DeepSeek-V4-Flash and Pro",
        "yes; no gradients, no measured sensitivity, no recovery",
        "all types, MXFP4 as copies of FP4 experts; not --effort best",
        YES,
        "yes, in torch, slower than llama.cpp",
        "no: refused; llama.cpp runs the file",
        YES,
        "no: it reads the original only",
    ),
}
"""GGUF architecture -> what is known of it."""

UNSUPPORTED: Mapping[str, tuple[str, str, str]] = {
    "DeepseekForCausalLM": ("DeepSeek-MoE", "its attention is not MLA", "deepseek2"),
    "Glm4MoeForCausalLM": ("GLM-4.5 to 4.7", "its attention is not MLA", "deepseek2"),
    "Glm4MoeLiteForCausalLM": ("GLM-4.7-Flash", "nobody has tried it, though it is much like DeepSeek-V3", "deepseek2"),
    "Qwen3MoeForCausalLM": ("Qwen3-MoE", "its attention is not MLA", "deepseek2"),
    "MiniMaxM2ForCausalLM": ("MiniMax-M2", "its attention is not MLA", "deepseek2"),
    "GptOssForCausalLM": ("gpt-oss", "its attention is not MLA, and its experts have biases", "deepseek2"),
}
"""`architectures` of config.json -> its name, why it is not supported, the architecture that is nearest."""


def refusal(names: object, supported: Collection[str], architectures: Collection[str]) -> str:
    """One line for a model of no family. names: its `architectures`; supported: those that are known, by the same name;
    architectures: the families there are."""
    listed = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    for name in listed:
        if name in UNSUPPORTED:
            title, why, nearest = UNSUPPORTED[name]
            near = nearest if nearest in architectures else min(architectures)
            return f"{name} ({title}) is not supported: {why}; nearest is {near} ({CAPABILITIES[near].title})"
    return (
        f"architecture {names or 'missing'} is not one of {sorted(supported)}; `quantkit families` lists what is known"
    )
