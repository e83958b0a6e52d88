"""What each target can compute, as data: a plan with a type its target gets wrong is refused before any work.

Every refusal carries its reason and every table its source. Types quantkit does not encode are in no table.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from quantkit.codecs import types as qtypes
from quantkit.errors import QuantkitError
from quantkit.models.config import MLA, Mla, ModelConfig
from quantkit.tensors import ROUTED_ROLES, split_name

TensorClass = Literal["routed experts", "k_b", "other matrices", "ids"]
EXPERTS: TensorClass = "routed experts"
K_B: TensorClass = "k_b"
OTHER: TensorClass = "other matrices"
IDS: TensorClass = "ids"


@dataclass(frozen=True)
class Allowed:
    """Types that work for one class of tensors, in the order to suggest them, and why each other one does not."""

    types: tuple[str, ...]
    source: str
    refused: Mapping[str, str] = field(default_factory=dict)
    otherwise: str = "not known to work there"

    def why_not(self, qtype: str) -> str:
        """Why a type that is not among them is refused."""
        return self.refused.get(qtype, self.otherwise)


@dataclass(frozen=True)
class Target:
    """mla: layouts of kv_b that it reads; expert_multiple: must divide hidden size and expert FFN size;
    single_file: not every version of it loads split files."""

    name: str
    allowed: Mapping[TensorClass, Allowed]
    mla: tuple[Mla, ...]
    expert_multiple: int
    single_file: bool


@dataclass(frozen=True)
class TargetChoice:
    """A target as a person asked for it. mla: None for the layout that the recipe says. architecture: GGUF's, None for
    the model's own."""

    name: str
    mla: Mla | None = None
    architecture: str | None = None


ALL = tuple(qtypes.QTYPES)
TABLES: Mapping[TensorClass, Allowed] = {
    IDS: Allowed(types=(qtypes.TABLE.name,), source="llama.cpp's converter writes them so")
}

MEASURED = "kt-kernel 0.7.2 wheel, LLAMAFILE backend, run on AVX-512 and AMX machines against files quantized by ggml"
NO_KERNEL = "kt-kernel 0.7.2 aborts when it is the gate's type and silently returns zeros when it is up's or down's"
LEGACY = "type table of legacy ktransformers 0.2.3 to 0.3.2, which reads these tensors from the GGUF"

KTRANSFORMERS = Target(
    name="ktransformers",
    allowed={
        EXPERTS: Allowed(
            types=("IQ1_S", "Q2_K", "Q3_K", "IQ4_XS", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16"),
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
        **TABLES,
    },
    mla=("split", "combined"),
    expert_multiple=256,
    single_file=False,
)

LLAMA_CPP = Target(
    name="llama.cpp",
    allowed={c: Allowed(types=ALL, source="ggml has encoder and kernels for each") for c in (EXPERTS, K_B, OTHER)}
    | dict(TABLES),
    mla=("split", "combined"),
    expert_multiple=1,
    single_file=False,
)

OLLAMA = Target(
    name="ollama",
    allowed={
        c: Allowed(types=ALL, source="Ollama runs llama.cpp's llama-server, and copies imported files as they are")
        for c in (EXPERTS, K_B, OTHER)
    }
    | dict(TABLES),
    mla=("split", "combined"),
    expert_multiple=1,
    single_file=True,
)

WRITTEN_AS = ("deepseek2",)
"""Architectures that models of others can be written as (`family.written_as` says of which)."""
TARGETS = {target.name: target for target in (KTRANSFORMERS, LLAMA_CPP, OLLAMA)}


def get(name: str) -> Target:
    """The target of this name; QuantkitError if there is none."""
    try:
        return TARGETS[name]
    except (KeyError, TypeError):
        raise QuantkitError(f"unknown target {name!r}; known: {' '.join(TARGETS)}") from None


def parse(text: str) -> TargetChoice:
    """`llama.cpp`; `llama.cpp/combined` for another MLA layout than the recipe's; `llama.cpp/deepseek2` for a model
    written as another architecture than its own; or both."""
    name, *more = text.split("/")
    layouts = [part for part in more if part in MLA]
    architectures = [part for part in more if part in WRITTEN_AS]
    if len(layouts) + len(architectures) < len(more) or max(len(layouts), len(architectures)) > 1:
        raise QuantkitError(
            f"--target {text}: after the slash stands an MLA layout, {' or '.join(MLA)}, or an architecture, "
            f"{' or '.join(WRITTEN_AS)}"
        )
    mla = MLA[layouts[0]] if layouts else None
    return TargetChoice(get(name).name, mla, architectures[0] if architectures else None)


def tensor_class(role: str) -> TensorClass:
    """Which of a target's tables speaks of this role."""
    if role in ROUTED_ROLES:
        return EXPERTS
    if role == "ffn_gate_tid2eid":
        return IDS
    return K_B if role == "attn_k_b" else OTHER


def suggest(target: str, role: str, n_in: int) -> tuple[str, ...]:
    """Types that the target computes for this role and that divide its rows, fewest bits first."""
    allowed = get(target).allowed[tensor_class(role)].types
    return tuple(name for name in qtypes.QTYPES if name in allowed and qtypes.fits(name, n_in))


FALLS_BACK = "its blocks do not divide rows of"
STAND_IN = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama-quantize takes for a type whose blocks do not divide the rows (src/llama-quant.cpp, tensor_type_fallback):
these, and IQ4_NL for all that are coarser and have blocks of 256 (b11434 itself takes Q4_0 for Q2_K and Q3_K)."""
NOT_BY_ITSELF = ("Q4_0", "MXFP4", "Q5_0", "Q5_1")
"""What a budget chooses only if its rule names it: stand-ins, whose damage to a model was not measured, and Q4_0 and
MXFP4, which are for copies of INT4 and FP4 weights."""


def fitting(target: str, role: str, n_in: int, qtype: str, fallback: str | None = None) -> str:
    """The type, or what stands in for it where its blocks do not divide the rows: V2-Lite's 10,944, Moonlight's 1,408.

    fallback, if that divides them; else as llama-quantize falls back: to STAND_IN, or Q8_0 where the target does not
    compute that; F16 where no block of 32 fits.
    """
    if qtypes.fits(qtype, n_in):
        return qtype
    if fallback and qtypes.fits(fallback, n_in):
        return fallback
    known = suggest(target, role, n_in)
    return next((name for name in (STAND_IN.get(qtype, "IQ4_NL"), "Q8_0", "F16") if name in known), qtype)


YARN_BETAS = (32, 1)
"""llama.cpp's own, whatever a deepseek2 file says."""


def caveats(target: str, c: ModelConfig) -> list[str]:
    """What this target is known to compute wrongly in such a model, whatever the file holds: a line each."""
    found = []
    if not knows(target, c) and c.compression is not None:
        found.append(
            f"{target} does not compute such a file: its kernels for a GGUF's experts do not cut gate and up off, as "
            f"{c.architecture} does; it reads DeepSeek-V4 from the original only; make it for llama.cpp"
        )
    elif not knows(target, c):
        found.append(
            f"{target} has no {c.architecture} attention that reads a GGUF: at best its experts can be used, which "
            f"nobody has tested; make it for llama.cpp, or V3.2 for {target}/deepseek2"
        )
    if routes_wrongly(target, c):
        found.append(
            f"{target} chooses experts wrongly in this model: it scores a group by its best two experts, and V2 by its "
            "best one (KLD 0.1 on a random model; llama.cpp b11434, src/llama-graph.cpp). No file can repair it; the "
            "scores here are of the right routing"
        )
    if flags := start_flags(target, c):
        how = f"run it with{flags}"
        if target == "ollama":
            how = f"start it as `{environment(flags)} ollama serve` (older than June 2026 it has no setting for them)"
        found.append(
            f"{target} reads no yarn_beta_fast and _slow in deepseek2 files and takes 32 and 1: {how}, else it attends "
            "wrongly (KLD 0.06 on a random model)"
        )
    return found


def environment(flags: str) -> str:
    """Flags of llama-server with their values, as variables that it reads: `LLAMA_ARG_YARN_BETA_FAST=1`. ollama hands
    its own environment on to it (9db4bdb, 29 May 2026, has it in place of engines of its own)."""
    pairs = (flag.split() for flag in flags.strip().removeprefix("--").split(" --"))
    return " ".join(f"LLAMA_ARG_{name.upper().replace('-', '_')}={value}" for name, value in pairs)


def routes_wrongly(target: str, c: ModelConfig) -> bool:
    """Whether the target gives tokens to other experts than the model does, whatever a file says: in V2 and V2.5."""
    return runs_llama_cpp(target) and c.n_group > 1 and c.group_score == "max"


def start_flags(target: str, c: ModelConfig) -> str:
    """What llama.cpp must be told besides the file, each with a space before it; empty for most models.

    It reads `yarn_beta_fast` for two other architectures only (b11434, src/llama-hparams.h), and Kimi-K2's is 1.
    """
    if not runs_llama_cpp(target) or not c.yarn or (c.yarn.beta_fast, c.yarn.beta_slow) == YARN_BETAS:
        return ""
    return f" --yarn-beta-fast {c.yarn.beta_fast:g} --yarn-beta-slow {c.yarn.beta_slow:g}"


NO_REPACK = " --no-repack"
"""Tells llama.cpp to multiply weights as they lie in the file."""
AS_OLLAMA = "LLAMA_ARG_REPACK=0"
"""The same in the environment of ollama, which builds llama-server with all of llama.cpp's variants since June 2026."""
AMX_TYPES = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "F16")
"""Types that llama.cpp lays out anew for AMX where a CPU has it and no GPU does (b11434, ggml-cpu/amx/amx.cpp)."""


HEADS = ("attn_k_b", "attn_v_b", "attn_output_a")  # multiplied by head, or V4's by group


def aborts_on_amx(types: Iterable[tuple[str, str]]) -> str:
    """Why llama.cpp does not start with tensors of these names and types on a CPU with AMX, "" if it does.

    It lays matrices out for AMX when it loads them, finds no kernel for a product by head or group when it builds its
    graph, and ends (docs/results/amx.md). `NO_REPACK` helps, and so does any other type for them.
    """
    heads = sorted(
        {f"{role} is {qtype}" for name, qtype in types if qtype in AMX_TYPES and (role := split_name(name)[0]) in HEADS}
    )
    if not heads:
        return ""
    return (
        f"on an Intel CPU with AMX (Xeon of the 4th generation and later), without a GPU, start it with{NO_REPACK}: "
        f"{', '.join(heads)}, and llama.cpp b11434 ends with GGML_ASSERT(*cur_backend_id != -1) otherwise"
    )


def knows(target: str, c: ModelConfig) -> bool:
    """Whether the target's programs read such a model from a GGUF at all."""
    return runs_llama_cpp(target) or c.indexer is None


def check_model(target: str, c: ModelConfig) -> None:
    """Refuse a model that the target's programs cannot load."""
    # llama.cpp takes V2-Lite for what has its depth, and then reads no q_lora_rank (src/models/deepseek2.cpp).
    lite = c.n_layer in (26, 27) or (c.n_layer == 48 and c.n_vocab == 128256)
    if runs_llama_cpp(target) and lite and c.q_lora is not None:
        raise QuantkitError(
            f"{target} takes any model of {c.n_layer} layers for one without q_lora_rank and does not load this one, "
            f"which has {c.q_lora}; use --target ktransformers"
        )

    if runs_llama_cpp(target) and c.compression and c.indexer:
        # It counts widths of keys until it finds another one (b11434, src/llama-kv-cache.cpp, n_rot_k), and ends there.
        if not any(c.indexer.full) or c.indexer.width == c.qk_head:
            raise QuantkitError(
                f"{target} does not load a {c.architecture} model without a layer that compresses by 4, or whose "
                f"indexer's heads are as wide as the attention's ({c.qk_head})"
            )


def cpu_infer(threads: int) -> int:
    """KTransformers' option for so many threads. One of them hands out: of one its pool is empty, and it divides by
    zero (docs/results/engines-ktransformers.md)."""
    return max(threads, 2)


def runs_llama_cpp(target: str) -> bool:
    """Whether llama.cpp's graphs compute it."""
    return target in ("llama.cpp", "ollama")


def computes_experts(target: str, c: ModelConfig) -> bool:
    """Whether the sizes of this model's experts are such that the target's kernels take."""
    return not any(n % get(target).expert_multiple for n in (c.d, c.n_ff_exp))


def check(target: str, name: str, shape: tuple[int, ...], qtype: str) -> None:
    """Refuse a tensor that the target cannot compute in this type, saying why and what to use instead."""
    made_for, (role, _) = get(target), split_name(name)
    kind = tensor_class(role)
    allowed = made_for.allowed[kind]
    if qtype not in allowed.types:
        use = " ".join(suggest(target, role, shape[-1]))
        raise QuantkitError(f"{name}: {qtype} is refused for {target} ({kind}): {allowed.why_not(qtype)}; use {use}")
    if kind == EXPERTS and any(n % made_for.expert_multiple for n in shape[-2:]):
        raise QuantkitError(
            f"{name}: {target} needs hidden and expert FFN sizes that are multiples of"
            f" {made_for.expert_multiple}, not {shape[-2]} × {shape[-1]}; use another target"
        )


def check_mla(mla: Mla, target: str) -> None:
    """Refuse a layout that the target does not read."""
    if mla not in get(target).mla:
        raise QuantkitError(f"{target} does not read the {mla} MLA layout; use {' or '.join(get(target).mla)}")


def check_forms(target: str, names: Iterable[str]) -> None:
    """Refuse tensors, by their names in the file, of a form that the target does not read: gate and up in one."""
    fused = next((name for name in names if ".ffn_gate_up_exps." in name), None)
    if fused and target == KTRANSFORMERS.name:
        raise QuantkitError(f"{fused}: {target} reads gate and up of experts only as two tensors; convert them so")
