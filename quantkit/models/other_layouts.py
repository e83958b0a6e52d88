"""Files of others seen as ours: the same bytes under the names and in the shapes that `family.specs` lists.

What other programs write into files of these architectures, and how it is read here:

- `ffn_gate_up_exps` (n_expert, 2 n_ff, d), of llama.cpp's converter if it is asked to fuse them: the first half of
  each expert's rows is gate, the other up (llama-graph.cpp, build_moe_ffn). Two tensors with a `stride`.
- attn_kv_b beside attn_k_b and attn_v_b, these without a dimension for heads, of ik_llama.cpp's converter: attn_kv_b is
  left out, as it holds the same weights.
- Layers behind the last, which draft the token after the next (MTP): their own embedding and output matrix are left
  out, and all of a layer that is not whole or of which the metadata do not speak.
- Names of older converters, as ik_llama.cpp's loader knows them.

Nothing else is forgiven: what is then missing or left over is refused by whoever opens the file as a model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_header import GGUFTensor
from quantkit.models import family
from quantkit.models.config import ModelConfig, layouts_of
from quantkit.sizes import both_units
from quantkit.tensors import NEXTN, ROUTED_ROLES, split_name

if TYPE_CHECKING:  # the reader is what opens files, this only looks at what it found
    from quantkit.formats.gguf_reader import GGUFFile

FUSED = "ffn_gate_up_exps"
OWN_HEADS = (f"{NEXTN}.embed_tokens", f"{NEXTN}.shared_head_head")
"""Of an MTP layer that does not share the model's."""
COMPRESSOR = ("kv", "gate", "ape", "norm")
OLDER: Mapping[str, str] = {
    "exp_probs_b.bias": "exp_probs_b.weight",
    "output_hc_fn.weight": "hc_head_fn.weight",
    "output_hc_base.weight": "hc_head_base.weight",
    "output_hc_scale.weight": "hc_head_scale.weight",
    "attn_kv.weight": "attn_kv_latent.weight",
    **{f"attn_compressor_{part}.weight": f"attn_compress_{part}.weight" for part in COMPRESSOR},
    **{f"indexer_compressor_{part}.weight": f"indexer.compress_{part}.weight" for part in COMPRESSOR},
}
"""A tensor's name without its layer -> what older converters called it."""

Tensors = dict[str, GGUFTensor]
Step = Callable[[ModelConfig, Tensors], tuple[ModelConfig, Tensors, str]]


@dataclass(frozen=True)
class Seen:
    """A file with the tensors of its architecture, its numbers, and what is read otherwise than it is stored: a line
    each, none of a file that is as we write them."""

    file: "GGUFFile"
    config: ModelConfig
    notes: tuple[str, ...]


def as_ours(file: "GGUFFile") -> Seen:
    """QuantkitError for a family that is not known."""
    try:
        config = family.from_gguf(file.metadata)
    except QuantkitError as error:
        raise QuantkitError(f"{file.path}: {error}") from None
    tensors, notes = dict(file.tensors), list[str]()
    steps: tuple[Step, ...] = (_apart, _one_layout, _renamed, _without_drafts)
    for step in steps:
        config, tensors, note = step(config, tensors)
        notes += [note] if note else []
    return Seen(file.seen(tensors) if notes else file, config, tuple(notes))


def apart(tensors: Mapping[str, GGUFTensor]) -> Tensors:
    """Tensors with gate and up of experts that lie together as two each, at their place; not where the file has one of
    the two as well."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        taken = any(name.replace(FUSED, role) in tensors for role in ROUTED_ROLES[:2])
        if split_name(name)[0] != FUSED or len(tensor.shape) != 3 or tensor.shape[1] % 2 or taken:
            out[name] = tensor
            continue
        n_expert, rows, n_in = tensor.shape
        stride = tensor.n_bytes // n_expert
        for i, role in enumerate(ROUTED_ROLES[:2]):
            half, offset = name.replace(FUSED, role), tensor.offset + i * stride // 2
            shape = (n_expert, rows // 2, n_in)
            out[half] = replace(
                tensor, name=half, shape=shape, offset=offset, n_bytes=tensor.n_bytes // 2, stride=stride
            )
    return out


def _apart(config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, Tensors, str]:
    found = apart(tensors)
    note = f"gate and up of each expert lie together ({FUSED}): read as two"
    return config, found, note if len(found) > len(tensors) else ""


def _one_layout(config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, Tensors, str]:
    """attn_k_b and attn_v_b with a dimension for heads; no attn_kv_b beside them."""
    c, notes = config, []
    shapes = {"attn_k_b": (c.n_head, c.kv_lora, c.qk_nope), "attn_v_b": (c.n_head, c.v_head, c.kv_lora)}
    out = dict(tensors)
    for name, tensor in tensors.items():
        heads = shapes.get(split_name(name)[0])
        if heads and tensor.shape == (heads[0] * heads[1], heads[2]):
            out[name] = replace(tensor, shape=heads)
    if out != tensors:
        notes.append("attn_k_b and attn_v_b have no dimension for heads")
    twice = [name for name in out if ".attn_kv_b." in name and _parts(name) <= out.keys()]
    if twice and len(layouts_of(out.keys() - set(twice))) == 1:
        size = sum(out.pop(name).n_bytes for name in twice)
        notes.append(f"attn_kv_b ({both_units(size)}) lies beside attn_k_b and attn_v_b, which are read")
    return config, out, "; ".join(notes)


def _parts(kv_b: str) -> set[str]:
    return {kv_b.replace("attn_kv_b", part) for part in ("attn_k_b", "attn_v_b")}


def _renamed(config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, Tensors, str]:
    """Where a tensor is missing, and one of its older name is there."""
    missing = [name for name in _expected(config, tensors) if name not in tensors and _bare(name) in OLDER]
    new = {old: name for name in missing if (old := name.replace(_bare(name), OLDER[_bare(name)])) in tensors}
    if not new:
        return config, tensors, ""
    out = {new.get(name, name): replace(t, name=new.get(name, name)) for name, t in tensors.items()}
    old = next(iter(new))
    return config, out, f"{len(new)} tensors have older names ({old} is {new[old]})"


def _without_drafts(config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, Tensors, str]:
    """What no computation needs of layers behind the last."""
    behind = {name for name in tensors if (layer := split_name(name)[1]) is not None and layer >= config.n_layer}
    drafts = {split_name(name)[1] for name in behind if split_name(name)[0].startswith(NEXTN)}
    if (
        config.n_mtp
        and not {n for n in _expected(config, tensors) if (split_name(n)[1] or 0) >= config.n_layer} <= behind
    ):
        config = replace(config, n_mtp=0)
    whole = config.n_mtp > 0
    rest = {n for n in behind if (split_name(n)[0] in OWN_HEADS if whole else split_name(n)[1] in drafts)}
    if not rest:
        return config, tensors, ""
    size = both_units(sum(tensors[name].n_bytes for name in rest))
    where = ", ".join(str(layer) for layer in sorted({split_name(name)[1] or 0 for name in rest}))
    what = "an embedding and output matrix of its own" if whole else "all of it"
    note = f"layer {where} drafts the token after the next: {what} ({len(rest)} tensors, {size}) not read"
    return config, {name: tensor for name, tensor in tensors.items() if name not in rest}, note


def _expected(config: ModelConfig, tensors: Tensors) -> set[str]:
    """Names of all tensors of the model, in the file's layout; none if it has two."""
    layouts = layouts_of(tensors) or {"split"}
    known = len(layouts) == 1 and layouts <= set(family.of(config).LAYOUTS)
    return {spec.name for spec in family.specs(config, layouts.pop())} if known else set()


def _bare(name: str) -> str:
    """A name without its layer, with its suffix."""
    parts = name.split(".", 2)
    return parts[2] if parts[0] == "blk" else name
