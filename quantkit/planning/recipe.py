"""A recipe says what is intended: ordered TOML rules, of which the first that matches a tensor gives its type.

Of a rule only `match` and a type are required. All that is wrong with the rules is said at once.

name = "1.58bit"               # default: the file's
description = "one line"       # optional
target = "ktransformers"       # what the file is made for; default llama.cpp
mla = "split"                  # or "combined": how kv_b is stored; --target TARGET/combined overrides both
published = "published"        # the bundled recipe that spends these bytes on models whose damage was published

[[rules]]
match = "ffn_down_exps"        # a glob with {a,b} on the role or the GGUF name, or a list of them
moe_layers = "first 6/58"      # that share of the layers with experts; or layers = "3-8,60", absolute
target = "llama.cpp"           # only for this target, or a list of them
qtype = "IQ2_XXS"
optional = true                # may match nothing
why = "the reason"             # for plan.json; optional

Instead of a qtype a rule can leave the choice to the budget, among all types of the target or fewer:

[[rules]]
match = "*"
allocate = { types = ["IQ1_S", "Q2_K"], floor = "IQ1_S", ceiling = "Q6_K" }
why = "the reason"

[budget]                       # --size and its like override it
size = "131GiB"                # the whole file (131GB is 10^9); or bpw = 1.6: bits of tensor data per weight
gpu = "12GiB"                  # all but the routed experts
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import translate
from functools import cache
from pathlib import Path
from typing import Any

from quantkit import bundle
from quantkit.codecs import types as qtypes
from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import read_text, read_whole
from quantkit.models.config import MLA, Mla
from quantkit.planning import targets
from quantkit.planning.fields import Fields
from quantkit.planning.targets import TARGETS
from quantkit.sizes import parse_size
from quantkit.tensors import TensorSpec

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
SHARE = re.compile(r"(first|last) ([0-9]{1,4})/([0-9]{1,4})")
LAYERS = re.compile(r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*")


@dataclass(frozen=True)
class Share:
    """A share of the MoE layers, counted from one end, so that a recipe means the same in a model of any depth."""

    end: str
    part: int
    whole: int

    def of(self, moe_layers: Sequence[int]) -> tuple[int, ...]:
        """The nearest whole number of layers (a half counts up), at least one."""
        count = max(1, (2 * len(moe_layers) * self.part + self.whole) // (2 * self.whole))
        return tuple(moe_layers[:count] if self.end == "first" else moe_layers[-count:])


@dataclass(frozen=True)
class Candidates:
    """Types that the budget may choose from. types None: all that the target computes, but for `targets.NOT_BY_ITSELF`;
    floor, ceiling: bounds."""

    types: tuple[str, ...] | None = None
    floor: str | None = None
    ceiling: str | None = None

    def of(self, spec: TensorSpec, target: str) -> tuple[str, ...]:
        """The types for one tensor, fewest bits first: within the bounds, computed by the target, fitting its rows; and
        none with as many bits as one that says the original's numbers, but that."""
        low = qtypes.get(self.floor).bpw if self.floor else 0.0
        high = qtypes.get(self.ceiling).bpw if self.ceiling else float("inf")
        blind = spec.role == "token_embd"  # embeddings have no importance
        known = targets.suggest(target, spec.role, spec.n_in)
        exact = spec.exact if self.types is None and spec.exact in known else None
        if exact and low <= qtypes.get(exact).bpw <= high:
            coarser = self.of(replace(spec, exact=None), target)
            return (*(name for name in coarser if qtypes.get(name).bpw < qtypes.get(exact).bpw), exact)
        return tuple(
            name
            for name in known
            if (name not in targets.NOT_BY_ITSELF if self.types is None else name in self.types)
            and low <= qtypes.get(name).bpw <= high
            and not (blind and qtypes.needs_importance(name))
        )


@dataclass(frozen=True)
class Budget:
    """Limits in bytes. size: the whole file, headers included. bpw: bits of tensor data per weight of the whole model.
    gpu: data of all tensors but the routed experts. words: what the person called it, for the record."""

    size: int | None = None
    bpw: float | None = None
    gpu: int | None = None
    words: str | None = None

    def __str__(self) -> str:
        """In words: `131,000,000,000 bytes, all but the routed experts in 12,000,000,000 bytes`."""
        if self.words:
            return self.words
        whole = f"{self.size:,} bytes" if self.size else f"{self.bpw:g} bpw" if self.bpw else "any size"
        return whole + (f", all but the routed experts in {self.gpu:,} bytes" if self.gpu else "")


@dataclass(frozen=True)
class Rule:
    """number: position in the file, from 1; layers and targets: None means any. qtype None: `allocate` says from what
    the budget may choose."""

    number: int
    match: tuple[str, ...]
    qtype: str | None
    why: str
    layers: frozenset[int] | None = None
    share: Share | None = None
    targets: tuple[str, ...] | None = None
    optional: bool = False
    allocate: Candidates | None = None

    def matches(self, spec: TensorSpec, moe_layers: Sequence[int]) -> bool:
        """Whether it speaks of this tensor, in a model with these layers of routed experts."""
        if self.layers is not None and spec.layer not in self.layers:
            return False
        if self.share is not None and spec.layer not in self.share.of(moe_layers):
            return False
        return any(p.fullmatch(spec.role) or p.fullmatch(spec.name) for p in map(_glob, self.match))


@dataclass(frozen=True)
class Recipe:
    """source: the file it came from, for messages. published: the open bundled recipe that spends the bytes of these
    rules on a model whose damage was published (`planning.published`)."""

    name: str
    description: str
    target: str
    mla: Mla
    rules: tuple[Rule, ...]
    source: str
    budget: Budget | None = None
    published: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether a budget has to choose types."""
        return any(rule.allocate for rule in self.rules)

    @classmethod
    def load(cls, name_or_path: str | Path) -> "Recipe":
        """A bundled recipe by name (`1.58bit`), else a TOML file."""
        path = _find(name_or_path)
        return cls.parse(read_whole(path, "recipe"), str(path))

    @staticmethod
    def text(name_or_path: str | Path) -> str:
        """The TOML text of a recipe that `load` accepts."""
        return read_text(_find(name_or_path), "recipe")

    @classmethod
    def parse(cls, data: bytes | str, source: str) -> "Recipe":
        """A recipe in TOML. source: what errors call it."""
        try:
            table = tomllib.loads(data if isinstance(data, str) else data.decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise QuantkitError(f"{source}: not TOML: {error}") from None
        except (RecursionError, ValueError) as error:
            raise QuantkitError(f"{source}: not usable TOML: {type(error).__name__}") from None
        return _recipe(table, source)

    def aimed(self, target: str | None) -> "Recipe":
        """The same for another target, given as a person writes it: `llama.cpp` or `llama.cpp/combined`."""
        if target is None:
            return self
        chosen = targets.parse(target)
        return replace(self, target=chosen.name, mla=chosen.mla or self.mla)

    def rules_for(self, target: str) -> tuple[Rule, ...]:
        """The rules that speak of this target, in order."""
        return tuple(rule for rule in self.rules if rule.targets is None or target in rule.targets)


def _find(name_or_path: str | Path) -> Path:
    name = str(name_or_path)
    path = Path(name)
    if path.is_file():
        return path
    if name in bundle.recipe_names():
        return bundle.recipes_dir() / f"{name}.toml"
    raise QuantkitError(f"no recipe {name!r}: not a file, and the bundled ones are {' '.join(bundle.recipe_names())}")


@cache
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile("|".join(translate(p) for p in _braces(pattern)))


def _braces(pattern: str) -> list[str]:
    """`a{b,c}` -> ab, ac. Braces do not nest; several pairs multiply."""
    head, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    inside, _, tail = rest.partition("}")
    return [head + choice + end for choice in inside.split(",") for end in _braces(tail)]


def _recipe(table: dict[str, Any], source: str) -> Recipe:
    field = Fields(table, source)
    field.known("name", "description", "target", "mla", "rules", "budget", "published")
    name = field.text("name") if "name" in table else Path(source).stem
    if not NAME.fullmatch(name):
        raise field.error(f"name {name!r} must be letters, digits and . _ + - (64 at most)")
    rules = field.required("rules")
    if not isinstance(rules, list) or not rules or not all(isinstance(rule, dict) for rule in rules):
        raise field.error("rules must be one or more [[rules]] tables")
    return Recipe(
        name=name,
        description=field.text("description") if "description" in table else "",
        target=field.choice("target", TARGETS) if "target" in table else targets.LLAMA_CPP.name,
        mla=MLA[field.choice("mla", MLA)] if "mla" in table else "split",
        rules=_rules(rules, source),
        source=source,
        budget=_budget(table["budget"], f"{source}: budget") if "budget" in table else None,
        published=field.choice("published", bundle.recipe_names()) if "published" in table else None,
    )


def _rules(tables: Sequence[dict[str, Any]], source: str) -> tuple[Rule, ...]:
    """QuantkitError that names what is wrong with each of them."""
    rules, wrong = [], []
    for number, table in enumerate(tables, 1):
        try:
            rules.append(_rule(table, number, source))
        except QuantkitError as error:
            wrong.append(str(error))
    if wrong:
        raise QuantkitError("; ".join([wrong[0], *(text.removeprefix(f"{source}: ") for text in wrong[1:])]))
    return tuple(rules)


def _budget(table: Any, where: str) -> Budget:
    if not isinstance(table, dict):
        raise QuantkitError(f"{where} must be a table")
    field = Fields(table, where)
    field.known("size", "bpw", "gpu")
    if ("size" in table) == ("bpw" in table):
        raise field.error("give size or bpw")
    bits = table.get("bpw")
    if bits is not None and (type(bits) not in (int, float) or not 0 < bits <= 32):
        raise field.error(f"bpw must be a number of bits, not {bits!r}")
    size, gpu = (parse_size(field.text(key), f"{where}: {key}") if key in table else None for key in ("size", "gpu"))
    return Budget(size, bits, gpu)


def _rule(table: dict[str, Any], number: int, source: str) -> Rule:
    field = Fields(table, f"{source}: rule {number}")
    field.known("match", "layers", "moe_layers", "target", "qtype", "allocate", "optional", "why")
    if "layers" in table and "moe_layers" in table:
        raise field.error("has both layers and moe_layers; give one")
    optional = table.get("optional", False)
    if not isinstance(optional, bool):
        raise field.error(f"optional must be true or false, not {optional!r}")
    if ("qtype" in table) == ("allocate" in table):
        raise field.error("needs either qtype, the type, or allocate, what the budget may choose from")
    match = field.texts("match")
    for pattern in match:
        if not re.fullmatch(r"([^{}]|\{[^{}]*\}){1,200}", pattern) or pattern.count("{") > 4:
            raise field.error(f"match {pattern!r}: braces must pair and not nest (4 pairs at most)")
    return Rule(
        number=number,
        match=match,
        qtype=field.choice("qtype", qtypes.QTYPES) if "qtype" in table else None,
        why=field.text("why") if "why" in table else f"rule {number} of {source}",
        layers=_layers(field) if "layers" in table else None,
        share=_share(field) if "moe_layers" in table else None,
        targets=tuple(field.choice_of("target", t, TARGETS) for t in field.texts("target"))
        if "target" in table
        else None,
        optional=optional,
        allocate=_candidates(table["allocate"], f"{source}: rule {number}: allocate") if "allocate" in table else None,
    )


def _candidates(table: Any, where: str) -> Candidates:
    if not isinstance(table, dict):
        raise QuantkitError(f'{where} must be a table such as {{ floor = "Q4_K" }}, or {{}} for any type')
    field = Fields(table, where)
    if table.get("per_expert"):
        raise field.error("per_expert: a GGUF holds the experts of a layer in one tensor of one type, for every target")
    field.known("types", "floor", "ceiling", "per_expert")
    types = field.texts("types") if "types" in table else None
    for name in types or ():
        field.choice_of("type", name, qtypes.QTYPES)
    floor, ceiling = (field.choice(key, qtypes.QTYPES) if key in table else None for key in ("floor", "ceiling"))
    if floor and ceiling and qtypes.get(floor).bpw > qtypes.get(ceiling).bpw:
        raise field.error(f"floor {floor} has more bits than ceiling {ceiling}")
    return Candidates(types, floor, ceiling)


def _layers(field: Fields) -> frozenset[int]:
    text = field.text("layers")
    if not LAYERS.fullmatch(text):
        raise field.error(f'layers {text!r} must be block numbers such as "3-8" or "0-2,60"')
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise field.error(f"layers {text!r}: {part} runs backwards")
        layers.update(range(int(first), int(last or first) + 1))
    return frozenset(layers)


def _share(field: Fields) -> Share:
    text = field.text("moe_layers")
    found = SHARE.fullmatch(text)
    if not found or not 0 < int(found[2]) <= int(found[3]):
        raise field.error(f'moe_layers {text!r} must be a share such as "first 6/58" or "last 2/58"')
    return Share(found[1], int(found[2]), int(found[3]))
