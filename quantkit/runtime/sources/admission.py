"""Which GGUF files are computed here: everything that ggml would answer by ending the process is refused before.

ggml takes types, shapes and ids on trust: a matrix of a type without a kernel is a call of address 0, a norm that is
not F32 and a token beyond the embedding's rows abort. `check_model` is asked once, when a file is opened as a model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.codecs import types as qtypes
from quantkit.codecs.foreign import FOREIGN
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_header import GGUFTensor
from quantkit.models.config import ModelConfig
from quantkit.tensors import TensorSpec

READ_ONLY = ("Q4_1", "TQ1_0", "TQ2_0", "NVFP4", "Q1_0")
MATRICES = frozenset((*qtypes.QTYPES, *READ_ONLY))
"""Types of matrices: what ggml 0.20 has a decoder and a product for (ggml-cpu.c, type_traits_cpu), and llama.cpp
loads. Not among them: Q8_1 and Q8_K (of activations only), integers and F64. Vectors and routers have one type,
`TensorSpec.fixed`: llama.cpp adds and multiplies them as F32."""
HEAD = "output.weight"


def allowed(spec: TensorSpec) -> frozenset[str]:
    """The types in which a tensor of a model can be computed."""
    return frozenset((spec.fixed,)) if spec.fixed else MATRICES


def check_model(
    where: str, tensors: Mapping[str, GGUFTensor], config: ModelConfig, specs: Sequence[TensorSpec], vocabulary: Any
) -> None:
    """where: the file's name. specs: of its model. vocabulary: its metadata's tokens.

    QuantkitError naming the first tensor of the model that the file lacks, has in another shape or in a type that is
    not computed; or a tensor, a token or a group of experts that does not belong to this model.
    """
    expected = {spec.name: spec for spec in specs}
    for spec in expected.values():
        found = tensors.get(spec.name)
        if found is None:
            if spec.name == HEAD:  # tied to the embedding
                continue
            raise QuantkitError(f"{where}: tensor {spec.name} is missing")
        if tuple(found.shape) != spec.shape:
            raise QuantkitError(f"{where}: tensor {spec.name} has shape {tuple(found.shape)}, not {spec.shape}")
        if found.qtype not in (types := allowed(spec)):
            if found.qtype in FOREIGN:
                raise QuantkitError(
                    f"{where}: tensor {spec.name} is {found.qtype}, a type of {FOREIGN[found.qtype].program} that "
                    "cannot be decoded here; `quantkit compare` shows types and bytes"
                )
            known = " ".join(name for name in (*qtypes.QTYPES, *READ_ONLY) if name in types)
            raise QuantkitError(
                f"{where}: tensor {spec.name} is {found.qtype}, which is not computed; it may be {known}"
            )
    if strange := tensors.keys() - expected.keys():
        raise QuantkitError(
            f"{where}: tensor {min(strange)} belongs to no {config.architecture} model of these numbers"
            f" (llama.cpp refuses the file too)"
        )
    _check_tokens(where, config, vocabulary)
    if config.group_score == "top2" and 1 < config.n_group == config.n_expert:
        raise QuantkitError(f"{where}: groups of one expert each: a group is judged by its two best")


def _check_tokens(where: str, config: ModelConfig, vocabulary: Any) -> None:
    """The tokenizer names no row that the embedding does not have."""
    rows = config.n_vocab
    if isinstance(vocabulary, list) and len(vocabulary) > rows:
        raise QuantkitError(f"{where}: the tokenizer has {len(vocabulary):,} tokens, the embedding {rows:,} rows")
    others = [("eot or eom", token) for token in config.more_ends]
    for name, value in (("bos", config.bos), ("eos", config.eos), *others):
        if not 0 <= value < rows:
            raise QuantkitError(f"{where}: {name}_token_id {value} is beyond the embedding's {rows:,} rows")
