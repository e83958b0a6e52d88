"""Which family a model is of, chosen once by config.json's `architectures` or by GGUF's `general.architecture`.

From then on its `ModelConfig` carries the architecture, and the functions here ask the family whatever is its own.

A family is a module that defines what `Family` and `ConfigFile` list (deepseek2's is two files, by length), and its
name in FAMILIES and CONFIG_FILES. deepseek32.py and glm_dsa.py show it: most specs and keys from deepseek2, `indexer.*`
added to them. Numbers that only some families have are fields of `ModelConfig` that are None in the others.

Kimi-K2 is deepseek2 with `kimi-k2` in PRE. K2.5 keeps its numbers under `text_config` and all names under
`language_model.`: `from_hf` notes the prefix in the config, one more field, and `specs` writes it before the sources.
DeepSeek-V4 (deepseek4.py) names all sources anew and has one layout; its numbers are `compression` and `streams` of
`ModelConfig`. What its layers compute is another kind of layer to the runtime (runtime/compressed.py).

Not a family's business: how a stored matrix is decoded (FP8 with `_scale_inv`, V4's `.scale`, Kimi's INT4), which is
`formats`'; layer mathematics, which `runtime` chooses by the config; what a target can compute (`planning.targets`) and
what a role is worth (`planning.prior`), both by role.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from quantkit.errors import QuantkitError
from quantkit.models.capabilities import refusal
from quantkit.models.config import MTP, Mla, ModelConfig, mla_of
from quantkit.tensors import NEXTN, TensorSpec, Weights

if TYPE_CHECKING:  # names and shapes need no torch, which takes two seconds to load
    import torch

SLICE_WEIGHTS = 16 << 20  # weights per job: 64 MB as float32, about R1's expert
NOT_NUMBERS = (TypeError, ValueError, AttributeError, IndexError, OverflowError)


class ConfigFile(Protocol):
    """What a module must define to know a family's config.json.

    HF_ARCHITECTURES: names in its `architectures`.
    ALSO: other GGUF architectures that the same weights, or most of them, can be written as -> config.json read so.
    """

    HF_ARCHITECTURES: tuple[str, ...]
    ALSO: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]]

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
    LAYOUTS: MLA layouts that its files can be written in.
    PRE: GGUF's name of a pre-tokenizer -> the regular expressions that it splits by.
    CHAT_TEMPLATE: for checkpoints that come without one; None where they have their own.
    """

    ARCHITECTURE: str
    LAYOUTS: tuple[Mla, ...]
    PRE: Mapping[str, tuple[str, ...]]
    CHAT_TEMPLATE: str | None

    def from_gguf(self, metadata: Mapping[str, Any], /) -> ModelConfig:
        """Numbers from GGUF metadata, absent keys as llama.cpp reads them."""
        ...

    def metadata(self, c: ModelConfig, mla: Mla, /) -> dict[str, Any]:
        """The architecture's own GGUF keys, in file order."""
        ...

    def specs(self, c: ModelConfig, mla: Mla, /) -> list[TensorSpec]:
        """All tensors of the output file, in file order, each with the checkpoint tensors it is made from. In the
        layout `combined`, asked for also where no file can have it, every matrix is one of the checkpoint's."""
        ...

    def assemble(
        self, weights: Weights, c: ModelConfig, spec: TensorSpec, matrix: int, rows: tuple[int, int], device: str, /
    ) -> "torch.Tensor":
        """Rows of one matrix of a tensor that is neither copied nor stacked, float32 [rows, n_in]."""
        ...


def _modules(*names: str) -> tuple[Any, ...]:
    """By name, so that families may build on one another and this module is below none of them."""
    return tuple(import_module(f"quantkit.models.{name}") for name in names)


FAMILIES = cast(tuple[Family, ...], _modules("deepseek2", "deepseek32", "glm_dsa", "deepseek4"))
BY_ARCHITECTURE: Mapping[str, Family] = {family.ARCHITECTURE: family for family in FAMILIES}
CONFIG_FILES = cast(
    Mapping[str, ConfigFile],
    dict(zip(BY_ARCHITECTURE, _modules("deepseek2_config", "deepseek32", "glm_dsa", "deepseek4_config"), strict=True)),
)
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


def is_known(raw: Mapping[str, Any]) -> bool:
    """Whether the model of this config.json is of a family that is supported."""
    return bool(_known_names(raw))


def unknown_keys(raw: Mapping[str, Any]) -> list[str]:
    """`key value` of what config.json says and nobody knows the meaning of."""
    return _of_hf(raw).unknown_keys(raw)


def _of_hf(raw: Mapping[str, Any]) -> ConfigFile:
    known = _known_names(raw)
    if not known:
        names = raw.get("architectures") or []
        raise QuantkitError(f"config.json: {refusal(names, BY_HF_ARCHITECTURE, BY_ARCHITECTURE)}")
    return BY_HF_ARCHITECTURE[known[0]]


def _known_names(raw: Mapping[str, Any]) -> list[str]:
    names = raw.get("architectures")
    return [n for n in names if isinstance(n, str) and n in BY_HF_ARCHITECTURE] if isinstance(names, list) else []


def written_as(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """GGUF architectures that the model of this config.json can be written as, its own first."""
    return from_hf(raw).architecture, *_of_hf(raw).ALSO


def seen_as(raw: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """config.json of the model as one of another architecture, or its own. QuantkitError if it cannot be written so."""
    own, *others = written_as(raw)
    if architecture not in (own, *others):
        raise QuantkitError(f"this model is {' or '.join((own, *others))}; it cannot be written as {architecture}")
    return dict(raw) if architecture == own else _of_hf(raw).ALSO[architecture](raw)


def seen_like(raw: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """config.json of the model in the architecture whose tensors have these GGUF names, its own if none has; and
    without MTP layers if no tensor is of one."""
    mla = mla_of(names, "split")
    for view in (also(raw) for also in _of_hf(raw).ALSO.values()):
        if {spec.name for spec in specs(from_hf(view), mla)} == set(names):
            return view
    return dict(raw) if any(f".{NEXTN}." in name for name in names) else without_mtp(raw)


def without_mtp(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model as files hold it that leave out its MTP layers."""
    return {**raw, MTP: 0} if from_hf(raw).n_mtp else dict(raw)


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
    """All tensors of the output file, in file order. QuantkitError for a layout that the family has not."""
    if mla not in (known := of(config).LAYOUTS):
        raise QuantkitError(
            f"{config.architecture} files are not written in the MLA layout {mla}, only in {' or '.join(known)}; "
            "llama.cpp refuses them"
        )
    return list(_specs(config, mla))


@cache  # R1's are asked for several times by each command, and name 45,000 tensors of the checkpoint
def _specs(config: ModelConfig, mla: Mla) -> Sequence[TensorSpec]:
    return tuple(of(config).specs(config, mla))


@cache
def sources(config: ModelConfig) -> Mapping[int | None, Mapping[str, tuple[str, ...]]]:
    """Layer (None: outside) -> role, like `attn_kv_b` -> the checkpoint tensors it is made from, one per expert."""
    found: dict[int | None, dict[str, tuple[str, ...]]] = {}
    for spec in _as_stored(config):
        found.setdefault(spec.layer, {})[spec.role] = spec.sources
    return found


def source_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every checkpoint tensor that the file is made from, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in _as_stored(config):
        for source in spec.sources:
            shapes[source] = spec.shape[1:] if spec.assembly == "stack" else spec.shape
    return shapes


def reading_order(config: ModelConfig) -> tuple[list[str], list[list[str]]]:
    """Checkpoint tensors in the order in which a pass reads them: those outside the layers, and those of each layer.

    MTP layers are the last. Within a layer the experts come last, each with its matrices together.
    """
    kept: list[str] = []
    layers: list[list[str]] = [[] for _ in range(config.n_block)]
    stacks: list[list[tuple[str, ...]]] = [[] for _ in range(config.n_block)]
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
    return of(config).specs(config, "combined")


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
) -> "torch.Tensor":
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
