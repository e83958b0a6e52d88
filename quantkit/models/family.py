"""Which family a model is of, chosen once by config.json's `architectures` or by GGUF's `general.architecture`.

From then on its `ModelConfig` carries the architecture, and the functions here ask the family whatever is its own.

A second family is two files beside deepseek2.py and deepseek2_config.py that define what `Family` and `ConfigFile`
list, and their names in FAMILIES and CONFIG_FILES. One with more numbers than `ModelConfig` has derives its own config
from it. Tried on paper:

V3.2 and GLM-5 (deepseek32, glm-dsa) take most specs from deepseek2 and add `indexer.*` to them and
`attention.indexer.*` to the metadata; GLM has `glm4` in PRE.
Kimi-K2 is deepseek2 with `kimi-k2` in PRE. K2.5 keeps its numbers under `text_config` and all names under
`language_model.`: `from_hf` notes the prefix in the config, one more field, and `specs` writes it before the sources.
V4 names all sources anew and has one layout; hyper-connections and compressors are more specs.

Not a family's business: how a stored matrix is decoded (FP8 with `_scale_inv`, V4's `.scale`, Kimi's INT4), which is
`formats`'; layer mathematics, which `runtime` chooses by the config; what a target can compute (`planning.targets`) and
what a role is worth (`planning.prior`), both by role.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Protocol

import torch

from quantkit.errors import QuantkitError
from quantkit.models import deepseek2, deepseek2_config
from quantkit.models.capabilities import refusal
from quantkit.models.config import Mla, ModelConfig
from quantkit.tensors import TensorSpec, Weights

SLICE_WEIGHTS = 16 << 20  # weights per job: 64 MB as float32, about R1's expert
NOT_NUMBERS = (TypeError, ValueError, AttributeError, IndexError, OverflowError)


class ConfigFile(Protocol):
    """What a module must define to know a family's config.json. HF_ARCHITECTURES: names in its `architectures`."""

    HF_ARCHITECTURES: tuple[str, ...]

    def from_hf(self, raw: Mapping[str, Any], /) -> ModelConfig:
        """Numbers from config.json; KeyError and the like for what is missing or no number."""
        ...

    def unknown_keys(self, raw: Mapping[str, Any], /) -> list[str]:
        """What config.json says and `from_hf` passes over without knowing it to be harmless: `key value`."""
        ...

    def to_hf(self, c: ModelConfig, /) -> dict[str, Any]:
        """The config.json of these numbers."""
        ...


class Family(Protocol):
    """What a module must define to be a family.

    ARCHITECTURE: GGUF's general.architecture.
    LAYOUTS: MLA layouts that it can be written in; in the last one every tensor is as the checkpoint has it.
    PRE: GGUF's name of a pre-tokenizer -> the regular expressions that it splits by.
    """

    ARCHITECTURE: str
    LAYOUTS: tuple[Mla, ...]
    PRE: Mapping[str, tuple[str, ...]]

    def from_gguf(self, metadata: Mapping[str, Any], /) -> ModelConfig:
        """Numbers from GGUF metadata, absent keys as llama.cpp reads them."""
        ...

    def metadata(self, c: ModelConfig, mla: Mla, /) -> dict[str, Any]:
        """The architecture's own GGUF keys, in file order."""
        ...

    def specs(self, c: ModelConfig, mla: Mla, /) -> list[TensorSpec]:
        """All tensors of the output file, in file order, each with the checkpoint tensors it is made from."""
        ...

    def assemble(
        self, weights: Weights, c: ModelConfig, spec: TensorSpec, matrix: int, rows: tuple[int, int], device: str, /
    ) -> torch.Tensor:
        """Rows of one matrix of a tensor that is neither copied nor stacked, float32 [rows, n_in]."""
        ...


FAMILIES: tuple[Family, ...] = (deepseek2,)
BY_ARCHITECTURE: Mapping[str, Family] = {family.ARCHITECTURE: family for family in FAMILIES}
CONFIG_FILES: Mapping[str, ConfigFile] = {deepseek2.ARCHITECTURE: deepseek2_config}
BY_HF_ARCHITECTURE: Mapping[str, ConfigFile] = {
    name: known for known in CONFIG_FILES.values() for name in known.HF_ARCHITECTURES
}
PRE: Mapping[str, tuple[str, ...]] = {name: splits for family in FAMILIES for name, splits in family.PRE.items()}


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The numbers in config.json. QuantkitError names the key that is missing or not supported."""
    known = _of_hf(raw)
    try:
        config = known.from_hf(raw)
    except KeyError as missing:
        raise QuantkitError(f"config.json: key {missing} is missing") from None
    except NOT_NUMBERS as error:
        raise QuantkitError(f"config.json: {error}") from None
    config.check("config.json")
    for key, token in (("bos_token_id", config.bos), ("eos_token_id", config.eos)):
        if not 0 <= token < config.n_vocab:
            raise QuantkitError(f"config.json: {key} {token} is not a token: vocab_size is {config.n_vocab:,}")
    return config


def unknown_keys(raw: Mapping[str, Any]) -> list[str]:
    """`key value` of what config.json says and nobody knows the meaning of."""
    return _of_hf(raw).unknown_keys(raw)


def _of_hf(raw: Mapping[str, Any]) -> ConfigFile:
    names = raw.get("architectures") or []
    named = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    known = [name for name in named if name in BY_HF_ARCHITECTURE]
    if not known:
        raise QuantkitError(f"config.json: {refusal(names, BY_HF_ARCHITECTURE, BY_ARCHITECTURE)}")
    return BY_HF_ARCHITECTURE[known[0]]


def from_gguf(metadata: Mapping[str, Any]) -> ModelConfig:
    """The numbers in a GGUF file's metadata. QuantkitError names the key that is missing or wrong."""
    name = metadata.get("general.architecture")
    if not knows(metadata):
        raise QuantkitError(f"architecture {name!r} is not {' or '.join(BY_ARCHITECTURE)}")
    try:
        config = BY_ARCHITECTURE[str(name)].from_gguf(metadata)
        config.check("GGUF metadata")
    except KeyError as missing:
        raise QuantkitError(f"GGUF metadata: {missing} is missing") from None
    except NOT_NUMBERS as error:
        raise QuantkitError(f"GGUF metadata: {name} keys are of the wrong type ({error})") from None
    return config


def knows(metadata: Mapping[str, Any]) -> bool:
    """Whether a GGUF file with this metadata is of a known family."""
    name = metadata.get("general.architecture")
    return isinstance(name, str) and name in BY_ARCHITECTURE


def of(config: ModelConfig) -> Family:
    """The family that these numbers are of."""
    return BY_ARCHITECTURE[config.architecture]


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json with all keys that modelling code reads."""
    return CONFIG_FILES[config.architecture].to_hf(config)


def metadata(config: ModelConfig, mla: Mla, name: str) -> dict[str, Any]:
    """`general.*` and the architecture's own keys of a GGUF file of this model, which is called `name`."""
    general = {"general.architecture": config.architecture, "general.type": "model", "general.name": name}
    return general | of(config).metadata(config, mla)


def specs(config: ModelConfig, mla: Mla = "split") -> list[TensorSpec]:
    """All tensors of the output file, in file order."""
    return of(config).specs(config, mla)


@cache
def sources(config: ModelConfig) -> Mapping[int | None, Mapping[str, tuple[str, ...]]]:
    """Layer (None: outside) -> role, like `attn_kv_b` -> the checkpoint tensors it is made from, one per expert."""
    found: dict[int | None, dict[str, tuple[str, ...]]] = {}
    for spec in _as_stored(config):
        found.setdefault(spec.layer, {})[spec.role] = spec.sources
    return found


def source_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every checkpoint tensor that the file is made from, with its shape (the MTP layer is not among them)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in _as_stored(config):
        for source in spec.sources:
            shapes[source] = spec.shape[1:] if spec.assembly == "stack" else spec.shape
    return shapes


def reading_order(config: ModelConfig) -> tuple[list[str], list[list[str]]]:
    """Checkpoint tensors in the order in which a pass reads them: those outside the layers, and those of each layer.

    Within a layer the experts come last, each with its matrices together.
    """
    kept: list[str] = []
    layers: list[list[str]] = [[] for _ in range(config.n_layer)]
    stacks: list[list[tuple[str, ...]]] = [[] for _ in range(config.n_layer)]
    for spec in _as_stored(config):
        if spec.layer is None:
            kept += spec.sources
        elif spec.assembly == "stack":
            stacks[spec.layer].append(spec.sources)
        else:
            layers[spec.layer] += spec.sources
    for names, experts in zip(layers, stacks, strict=True):
        names += [name for one in zip(*experts, strict=True) for name in one]
    return kept, layers


def _as_stored(config: ModelConfig) -> list[TensorSpec]:
    """The tensors in the layout in which each matrix is one of the checkpoint's."""
    return specs(config, of(config).LAYOUTS[-1])


def slices(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """Row ranges of a tensor's jobs: whole experts for a stack, whole heads for k_b and v_b, else about SLICE_WEIGHTS.

    Rows never cross a matrix, so each job has one importance vector.
    """
    per_matrix = spec.n_rows // spec.n_matrices
    step = max(1, min(per_matrix, SLICE_WEIGHTS // spec.n_in))
    for first in range(0, spec.n_rows, per_matrix):
        for start in range(first, first + per_matrix, step):
            yield start, min(start + step, first + per_matrix)


def read(
    weights: Weights, config: ModelConfig, spec: TensorSpec, start: int, stop: int, device: str = "cpu"
) -> torch.Tensor:
    """Rows start:stop of a tensor flattened to [n_rows, n_in], float32, from the original weights.

    The range must lie within one matrix, as `slices` makes it.
    """
    matrix, first = divmod(start, spec.n_rows // spec.n_matrices)
    last = first + stop - start
    if spec.assembly == "stack":
        return weights.read(spec.sources[matrix], first, last, device=device)
    if spec.assembly != "copy":
        return of(config).assemble(weights, config, spec, matrix, (first, last), device)
    if len(spec.shape) == 1:
        return weights.read(spec.sources[0], device=device).reshape(1, -1)
    return weights.read(spec.sources[0], start, stop, device=device)
