"""Recipes that people know by llama-quantize's names: Q4_K_M, Q2_K, IQ2_XXS, IQ1_S, Q8_0 and their like.

Which tensors llama-quantize (llama.cpp b11434, src/llama-quant.cpp, with an imatrix) gives more bits than the type in
the name follows from their roles, the number of layers and the number of experts, so a preset becomes rules only for a
model. `scripts/research/mixtures.py` compares them with the program, tensor by tensor.
Presets whose types quantkit does not encode (Q4_1, TQ1_0, MXFP4) are not here, nor Q4_0 and Q5_0, which need them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from quantkit.errors import QuantkitError
from quantkit.models.config import Mla, ModelConfig
from quantkit.planning.recipe import Recipe, Rule
from quantkit.tensors import TensorSpec, mtp_layers

SOURCE = "llama-quantize b11434"
BASE: Mapping[str, str] = {
    **{name: name for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")},
    **{
        "IQ2_S": "IQ2_XS",
        "IQ2_M": "IQ2_S",
        "IQ3_XXS": "IQ3_XXS",
        "IQ3_XS": "IQ3_S",
        "IQ3_S": "IQ3_S",
        "IQ3_M": "IQ3_S",
    },
    **{"Q2_K_S": "Q2_K", "Q2_K": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "IQ4_XS": "IQ4_XS"},
    **{"IQ4_NL": "IQ4_NL", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K"},
    **{"Q8_0": "Q8_0", "F16": "F16", "BF16": "BF16"},
}
"""Preset -> the type of most of its tensors, from the fewest bits to the most."""
ALSO = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Other names that llama-quantize takes for them."""
PLAIN = ("F16", "BF16")
COARSE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **{"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}
"""What it takes where a type's blocks do not divide the rows (Q4_0 for Q2_K and Q3_K: older versions had IQ4_NL)."""


@dataclass(frozen=True)
class Place:
    """What the choice goes by besides the role. layer: block number, 0 outside; of: so many; downs: ffn_down tensors
    before this one in the file; experts: routed ones a layer; tied: there is no output matrix."""

    layer: int
    of: int
    downs: int
    experts: int
    tied: bool

    @property
    def early(self) -> bool:
        """In the first eighth."""
        return self.layer < self.of // 8

    @property
    def favoured(self) -> bool:
        """In the first or last eighth, or every third layer between them."""
        return self.early or self.layer >= 7 * self.of // 8 or (self.layer - self.of // 8) % 3 == 2


Choice = Callable[[str, Place], str | None]
"""Preset and place -> another type than the base; None: the base."""


def _output(name: str, at: Place) -> str | None:
    if name in (*COARSE, "IQ3_XXS"):
        return "Q5_K"
    return None if BASE[name] == "Q8_0" else "Q6_K"


def _token_embd(name: str, at: Place) -> str | None:
    if at.tied:
        return _output(name, at)
    if name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"):
        return "Q2_K"
    return "IQ3_S" if name in ("IQ2_S", "IQ2_M", "IQ3_XXS") else None


def _kv_b(name: str, at: Place) -> str | None:
    """In the combined layout, in which every head has keys of its own."""
    if name in COARSE:
        return "Q4_K" if at.experts >= 4 else "IQ3_S" if name in ("IQ2_S", "IQ2_M") else "Q2_K"
    if at.experts == 8:
        return "Q8_0"
    by_name = {"Q2_K": "Q3_K", "IQ3_M": "Q4_K", "Q3_K_L": "Q5_K", "Q3_K_M": "Q5_K" if at.layer < 2 else "Q4_K"}
    if name in ("Q4_K_M", "Q5_K_M") and at.favoured:
        return "Q6_K"
    return "Q5_K" if name == "Q4_K_S" and at.layer < 4 else by_name.get(name)


def _down(name: str, at: Place) -> str | None:
    if name in COARSE:
        return None if at.downs >= at.of // 8 else "IQ3_S" if name in ("IQ2_S", "IQ2_M") else "Q2_K"
    if name in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if at.favoured else None
    if name == "Q3_K_M":
        return "Q5_K" if at.layer < at.of // 16 else "Q4_K"
    if name == "IQ3_M":
        return "Q4_K" if at.early or (at.experts == 8 and at.favoured) else None
    if name in ("Q2_K_S", "Q4_K_S"):
        return {"Q2_K_S": "Q4_K", "Q4_K_S": "Q5_K"}[name] if at.early else None
    return {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}.get(name)


def _attn_output(name: str, at: Place) -> str | None:
    coarse = {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}
    finer = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
    if at.experts == 8:
        more = (
            "Q2_K",
            "IQ3_XS",
            "IQ3_XXS",
            "Q3_K_S",
            "Q3_K_M",
            "IQ4_NL",
            "Q4_K_S",
            "Q4_K_M",
            "IQ3_S",
            "IQ3_M",
            "IQ4_XS",
        )
        return "Q5_K" if name in (*COARSE, *more) else None
    return {**coarse, **finer}.get(name)


def _query(name: str, at: Place) -> str | None:
    """attn_q, where it is one matrix."""
    return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(name)


def _key(name: str, at: Place) -> str | None:
    """The indexer's attn_k, by the end of its name."""
    if at.experts == 8:
        return "Q4_K" if name in COARSE else "Q8_0"
    return _query(name, at)


def _gate_and_up(name: str, at: Place) -> str | None:
    middle = at.of // 8 <= at.layer < 7 * at.of // 8
    return "IQ3_XXS" if name == "IQ3_XS" and middle else None


CHOICES: Mapping[str, Choice] = {
    "output": _output,
    "token_embd": _token_embd,
    "attn_kv_b": _kv_b,
    "attn_q": _query,
    "attn_output": _attn_output,
    "indexer.attn_k": _key,
    **{f"ffn_down{part}": _down for part in ("", "_exps", "_shexp")},
    **{f"ffn_{half}{part}": _gate_and_up for half in ("gate", "up") for part in ("", "_exps", "_shexp")},
}
"""Roles that may get another type than the base."""
NAMED = {
    "ffn_down": "down",
    "ffn_up": "gate and up",
    "attn_output": "attention output",
    "token_embd": "embedding",
    "output": "output",
}


def known(name: str) -> str | None:
    """The preset that a person means, in capitals or not; None if it is none."""
    upper = name.upper()
    upper = ALSO.get(upper, upper)
    return upper if upper in BASE else None


def describe(name: str) -> str:
    """A line about a preset: its base, and what else models like R1 get."""
    if BASE[name] in PLAIN:
        return f"{BASE[name]}, every matrix."
    others = []
    for role, words in NAMED.items():
        places = [Place(layer, 61, 2 * layer - 3, 256, False) for layer in range(61)]
        found = dict.fromkeys(CHOICES[role](name, at) for at in places)
        if kinds := " or ".join(kind for kind in found if kind):
            others.append(f"{words} {kinds}" + (" in some layers" if None in found else ""))
    return f"{BASE[name]}; {', '.join(others)}." if others else f"{BASE[name]}."


def types(name: str, config: ModelConfig, specs: Sequence[TensorSpec]) -> dict[str, str]:
    """The type that llama-quantize assigns each tensor of this model, before it falls back for short rows. specs: in
    any order; QuantkitError for a name that is no preset."""
    if name not in BASE:
        raise QuantkitError(f"no preset {name!r}; known: {' '.join(BASE)}")
    tied = all(spec.role != "output" for spec in specs)
    found, downs, of = {}, 0, config.n_layer + len(mtp_layers(specs))
    for spec in sorted((s for s in specs if not s.fixed), key=lambda s: (-1 if s.layer is None else s.layer, s.name)):
        at = Place(spec.layer or 0, of, downs, max(1, config.n_expert), tied)
        choose = None if BASE[name] in PLAIN else CHOICES.get(spec.role)
        found[spec.name] = (choose(name, at) if choose else None) or BASE[name]
        downs += spec.role.startswith("ffn_down")
    return found


def recipe(name: str, config: ModelConfig, specs: Sequence[TensorSpec], mla: Mla) -> Recipe:
    """A preset as rules for this model: one for each role and type, by layers where a role has several."""
    assigned = types(name, config, specs)
    layers: dict[tuple[str, str], set[int | None]] = {}
    for spec in specs:
        if not spec.fixed:
            layers.setdefault((spec.role, assigned[spec.name]), set()).add(spec.layer)
    several = {role for role, _ in layers if sum(role == other for other, _ in layers) > 1}
    rules = []
    for number, ((role, qtype), at) in enumerate(layers.items(), 1):
        only = frozenset(layer for layer in at if layer is not None) if role in several else None
        fallback = "Q8_0" if role == "output" else FALLBACK.get(qtype)
        rules.append(Rule(number, (role,), qtype, f"{name} of {SOURCE}", only, fallback=fallback))
    return Recipe(name, f"As {SOURCE}: {describe(name)}", "llama.cpp", mla, tuple(rules), f"preset {name}")


def text(found: Recipe) -> str:
    """The rules of a preset as a recipe file, to be read and changed."""
    head = [
        f"# {found.name} as {SOURCE} assigns it, written out for one model: layers and fallbacks are that model's.",
        f'name = "{found.name}"',
        f'description = "{found.description}"',
        f'target = "{found.target}"',
        f'mla = "{found.mla}"',
    ]
    rules = []
    for rule in found.rules:
        lines = ["", "[[rules]]", f'match = "{rule.match[0]}"']
        lines += [f'layers = "{_ranges(rule.layers)}"'] if rule.layers is not None else []
        lines += [f'qtype = "{rule.qtype}"', *([f'fallback = "{rule.fallback}"'] if rule.fallback else [])]
        rules += [*lines, f'why = "{rule.why}"']
    return "\n".join([*head, *rules, ""])


def _ranges(layers: Iterable[int]) -> str:
    """`0-2,60`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
