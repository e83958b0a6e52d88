"""What each engine can compute, as data: a plan with a type its target gets wrong is refused before any work.

Every refusal carries its reason and every table its source. Types quantkit does not encode are in no table.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from quantkit.codecs import types as qtypes
from quantkit.errors import QuantkitError

TensorClass = Literal["routed experts", "k_b", "other matrices"]
EXPERTS: TensorClass = "routed experts"
K_B: TensorClass = "k_b"
OTHER: TensorClass = "other matrices"


class Typed(Protocol):
    """What check() looks at; a PlannedTensor is one."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def qtype(self) -> str: ...


@dataclass(frozen=True)
class Allowed:
    """Types that work for one class of tensors, in the order to suggest them, and why each other one does not."""

    types: tuple[str, ...]
    source: str
    refused: Mapping[str, str] = field(default_factory=dict)
    otherwise: str = "not known to work there"

    def why_not(self, qtype: str) -> str:
        return self.refused.get(qtype, self.otherwise)


@dataclass(frozen=True)
class Target:
    """mla: layouts of kv_b that it reads; expert_multiple: must divide hidden size and expert FFN size;
    single_file: it cannot load split files; notes: what a user of the file should know."""

    name: str
    allowed: Mapping[TensorClass, Allowed]
    mla: tuple[str, ...]
    expert_multiple: int
    single_file: bool
    notes: tuple[str, ...]


ALL = tuple(qtypes.QTYPES)

MEASURED = "kt-kernel 0.7.2 wheel, LLAMAFILE backend, run on AVX-512 and AMX machines against files quantized by ggml"
NO_KERNEL = "kt-kernel 0.7.2 aborts when it is the gate's type and silently returns zeros when it is up's or down's"
LEGACY = "type table of legacy ktransformers 0.2.3 to 0.3.x, which reads these tensors from the GGUF"

KTRANSFORMERS = Target(
    name="ktransformers",
    allowed={
        EXPERTS: Allowed(
            types=("IQ1_S", "Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16"),
            source=MEASURED,
            refused={
                "IQ2_XXS": "kt-kernel 0.7.2 computes it silently wrong in its AVX512 and AMX variants"
                " (relative error 0.7 to 1.1); only its avx2 and avx512_base variants are right",
                **dict.fromkeys(("IQ1_M", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL"), NO_KERNEL),
                "F32": "not among the types measured with kt-kernel 0.7.2",
            },
        ),
        K_B: Allowed(
            types=("Q8_0", "BF16", "F16", "F32"),
            source=LEGACY,
            otherwise="its rows are qk_nope long (128 in R1), too short for blocks of 256, and legacy ktransformers"
            " does not read the other short-block types",
        ),
        OTHER: Allowed(
            types=("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16", "F32"),
            source=LEGACY,
            otherwise="legacy ktransformers has no dequantizer for it ('ggml_type not implemented')",
        ),
    },
    mla=("split", "combined"),
    expert_multiple=256,
    single_file=False,
    notes=(
        "kt-kernel with sglang reads only the routed experts from the GGUF, the rest from the HF checkpoint",
        "legacy ktransformers up to 0.3.1 needs --target ktransformers/combined; from 0.3.2 either layout works",
        "legacy ktransformers reads every *.gguf in the folder: keep one model per folder, and no *.safetensors",
        "IQ4_XS experts carry 2 to 6 % relative error, the other types 0.2 to 2.2 % (8-bit activations)",
    ),
)

LLAMA_CPP = Target(
    name="llama.cpp",
    allowed={c: Allowed(types=ALL, source="ggml has encoder and kernels for each") for c in (EXPERTS, K_B, OTHER)},
    mla=("split", "combined"),
    expert_multiple=1,
    single_file=False,
    notes=(
        "it takes the layout from attention.key_length_mla and rejects a file with tensors of both layouts",
        "combined is the layout of files made before split MLA; it needs far more memory for the KV cache",
    ),
)

OLLAMA = Target(
    name="ollama",
    allowed={
        c: Allowed(types=ALL, source="Ollama computes with ggml, and does not re-encode imported files")
        for c in (EXPERTS, K_B, OTHER)
    },
    mla=("split", "combined"),
    expert_multiple=1,
    single_file=True,
    notes=(
        "imports one file only (ollama/ollama#5245): write it without splits",
        "its own deepseek2 engine reads either layout, requires tokenizer.ggml.pre deepseek-v3, and skips"
        " group-limited routing (model/models/deepseek2/model.go)",
    ),
)

TARGETS = {target.name: target for target in (KTRANSFORMERS, LLAMA_CPP, OLLAMA)}


def get(name: str) -> Target:
    try:
        return TARGETS[name]
    except (KeyError, TypeError):
        raise QuantkitError(f"unknown target {name!r}; known: {' '.join(TARGETS)}") from None


def tensor_class(role: str) -> TensorClass:
    if role in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
        return EXPERTS
    return K_B if role == "attn_k_b" else OTHER


def suggest(target: str, role: str, n_in: int) -> tuple[str, ...]:
    """Types that the target computes for this role and that divide its rows, fewest bits first."""
    allowed = get(target).allowed[tensor_class(role)].types
    return tuple(name for name in qtypes.QTYPES if name in allowed and qtypes.fits(name, n_in))


def check(tensors: Iterable[Typed], target: str) -> None:
    """Refuse the first tensor that the target cannot compute, saying why and what to use instead."""
    engine = get(target)
    for tensor in tensors:
        kind = tensor_class(tensor.role)
        allowed = engine.allowed[kind]
        if tensor.qtype not in allowed.types:
            use = " ".join(suggest(target, tensor.role, tensor.shape[-1]))
            why = allowed.why_not(tensor.qtype)
            raise QuantkitError(f"{tensor.name}: {tensor.qtype} is refused for {target} ({kind}): {why}; use {use}")
        if kind == EXPERTS and any(n % engine.expert_multiple for n in tensor.shape[-2:]):
            raise QuantkitError(
                f"{tensor.name}: {target} needs hidden and expert FFN sizes that are multiples of"
                f" {engine.expert_multiple}, not {tensor.shape[-2]} × {tensor.shape[-1]}; use another target"
            )


def check_mla(mla: str, target: str) -> None:
    if mla not in get(target).mla:
        raise QuantkitError(f"{target} does not read the {mla} MLA layout; use {' or '.join(get(target).mla)}")
