"""What a person calls a model, and opening it: a folder, the name of a bundled model, a model on a Hub, or a GGUF."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import bundle
from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.geometry import Geometry
from quantkit.formats.model_folder import open_source
from quantkit.formats.model_names import REPO_ID, is_gguf, no_weights
from quantkit.models import family
from quantkit.models.config import MTP
from quantkit.models.gguf_checkpoint import GGUFCheckpoint
from quantkit.models.tokenizer_metadata import special_ids, tokenizer_metadata
from quantkit.progress import say_once
from quantkit.sizes import parse_size

CACHE_SIZE = "QUANTKIT_CACHE_SIZE"
CACHE_BYTES = 60 * 10**9
LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(\w+)")
ATTENTION = {"self_attn", "attn"}
OF_MTP = {"eh_proj", "enorm", "hnorm", "shared_head", "embed_tokens"}
"""What a layer that predicts the token after the next has besides what others have."""
SHARED_BY_MTP = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


@dataclass(frozen=True)
class ModelRef:
    """name: a folder, a bundled name, `user/name`, or an address. revision: branch, tag or commit of a model on a Hub,
    None: its main branch, or the one in the address. cache_bytes: disk for weights that are downloaded."""

    name: str
    revision: str | None = None
    cache_bytes: int = CACHE_BYTES

    @classmethod
    def parse(cls, text: str | Path) -> "ModelRef":
        """`user/name@revision` is taken apart; any other text is the name. The size of the cache is in the environment,
        $QUANTKIT_CACHE_SIZE; QuantkitError, naming it, if it is not a size."""
        size = os.environ.get(CACHE_SIZE)
        cache = CACHE_BYTES if size is None else parse_size(size, f"${CACHE_SIZE}")
        text = os.path.expanduser(text)  # a shell leaves the ~ of --reference=~/model
        name, at, revision = text.rpartition("@")
        if at and REPO_ID.fullmatch(text):
            return cls(name, revision, cache)
        return cls(text, None, cache)

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def open_model(model: ModelRef | Path | str) -> Checkpoint | Geometry:
    """Config and headers only; weights come when they are read, and a bare description has none.

    A folder of that name comes first. QuantkitError if it is none of these, or broken.
    """
    found = _opened(model if isinstance(model, ModelRef) else ModelRef.parse(model))
    _check_depth(found)
    if unknown := family.unknown_keys(found.config):
        say_once(f"warning: {found.path}: config.json has keys that quantkit passes over: {', '.join(unknown)}")
    if why := _why_no_mtp(found):
        say_once(f"{found.path}: {why}: the file will have no layer that predicts the token after the next (MTP)")
        found.config = family.without_mtp(found.config)
    return found


def _check_depth(model: Checkpoint | Geometry) -> None:
    """QuantkitError if layers are there that config.json does not count: they would be left out, and what remains is
    another model. MTP layers lie behind the last, counted or not."""
    n_layer, behind = family.from_hf(model.config).n_layer, dict[int, set[str]]()
    for name in model.tensors:
        if (found := LAYER.match(name)) and int(found[1]) >= n_layer:
            behind.setdefault(int(found[1]), set()).add(found[2])
    if more := [layer for layer, parts in behind.items() if parts & ATTENTION and not parts & OF_MTP]:
        raise QuantkitError(
            f"{model.path}: config.json says num_hidden_layers {n_layer}, but {max(more) + 1} layers are there, "
            "without MTP: the others would be left out; correct config.json, or take their tensors out"
        )


def _why_no_mtp(model: Checkpoint | Geometry) -> str | None:
    """Why the MTP layer that config.json speaks of must be left out. transformers does not save it; and it shares the
    model's embedding and output matrix, which some checkpoints store twice: a few rows show whether they are the same.
    """
    config = family.from_hf(model.config)
    if not config.n_mtp:
        return None
    prefix = f"model.layers.{config.n_layer}."
    if not any(name.startswith(prefix) for name in model.tensors):
        return f"no tensor of layer {config.n_layer} is there"
    for copy, name in SHARED_BY_MTP.items():
        entry = model.tensors.get(prefix + copy)
        if entry is None or isinstance(model, Geometry):
            continue
        from torch import equal  # two seconds to load, which most models do without

        last = entry.shape[0] - 1
        for row in dict.fromkeys((0, last // 2, last)):
            rows = (model.read_raw(each, row, row + 1)[0] for each in (prefix + copy, name))
            if entry.shape != model.entry(name).shape or not equal(*rows):
                return f"{prefix + copy} is not {name}"
    return None


def _opened(ref: ModelRef) -> Checkpoint | Geometry:
    path = Path(str(ref))
    if path.is_dir():
        return open_source(path, _needed)
    if str(ref) in bundle.model_names():
        return open_source(bundle.models_dir() / str(ref), _needed)
    if not path.exists():
        from quantkit.remote import repo

        if remote := repo.parse(str(ref)):
            return repo.open_remote(remote, ref.cache_bytes, _needed)
    if is_gguf(path):
        return GGUFCheckpoint.of(path)
    if path.is_file():
        raise QuantkitError(f"{ref} is a file, neither a GGUF nor the folder of a model with config.json")
    raise QuantkitError(bundle.no_model(str(ref)))


def open_weights(model: ModelRef | Path | str) -> Checkpoint:
    """The model as a checkpoint with weights, all of its family's tensors there, and a tokenizer that a GGUF can hold;
    a bare description is refused. Its config has the BOS and EOS of its tokenizer."""
    found = open_model(model)
    if isinstance(found, Geometry):
        raise QuantkitError(no_weights(model))
    config = family.from_hf(found.config)
    found.validate(family.source_shapes(config))
    if config.compression and found.config.get(MTP):
        say_once(f"{found.path}: mtp.0, which predicts the token after the next (MTP), is left out")
    words = tokenizer_metadata(found.path, config.n_vocab, family.PRE, family.of(config).CHAT_TEMPLATE)
    found.config = found.config | _agreed_ids(found, special_ids(words))
    found.schedule(*family.reading_order(config))
    return found


def see_like(checkpoint: Checkpoint, names: Collection[str]) -> None:
    """Have the checkpoint seen as of the architecture whose GGUF tensors have these names; its others are not read."""
    view = family.seen_like(checkpoint.config, names)
    if view != checkpoint.config:
        checkpoint.config = view
        checkpoint.schedule(*family.reading_order(family.from_hf(view)))


def _needed(config: Mapping[str, Any]) -> Collection[str]:
    return family.source_shapes(family.from_hf(config)).keys()


def _agreed_ids(model: Checkpoint, ids: dict[str, int]) -> dict[str, int]:
    """The tokenizer's, with a line if config.json has others."""
    for key, token in ids.items():
        given = model.config.get(key)
        if given is not None and token not in (given if isinstance(given, list) else [given]):
            say_once(f"warning: {model.path}: {key} is {given} in config.json; the tokenizer's is used, {token}")
    return ids
