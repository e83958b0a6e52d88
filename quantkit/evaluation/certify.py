"""`quantkit certify`: is this file right for that engine?

Structure and metadata are judged by rule, weights by comparison with the original, and the engine by running it.

Every check ends in pass, fail, warn or skip, with its reason; the certificate has passed if nothing failed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from quantkit import __version__, bundle
from quantkit.errors import QuantkitError
from quantkit.evaluation import engine_checks
from quantkit.evaluation.weights import WeightCheck
from quantkit.formats.checkpoint import Checkpoint, open_source
from quantkit.formats.geometry import Geometry
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.models import family
from quantkit.models import tokenizer as tokenizers
from quantkit.models.config import Mla, ModelConfig, layouts_of
from quantkit.planning import targets
from quantkit.tensors import Imatrix

Status = Literal["pass", "fail", "warn", "skip"]
SHOWN = 6  # problems spelled out for each check
MOST_EXPERTS = 1 << 16
LONG_CONTEXT = 32768  # beyond this every DeepSeek model needs YaRN

REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "attention.layer_norm_rms_epsilon",
    "attention.kv_lora_rank",
    "expert_feed_forward_length",
    "expert_shared_count",
    "feed_forward_length",
    "attention.head_count",
    "leading_dense_block_count",
    "expert_count",
    "expert_used_count",
)
# What llama.cpp takes for a key that is absent (src/llama-model.cpp); vocab_size it counts in the tokenizer.
ABSENT: Mapping[str, Any] = {
    "expert_group_count": 1,
    "expert_group_used_count": 1,
    "expert_weights_norm": False,
    "expert_gating_func": 1,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "rope.freq_base": 10000.0,
}
CONSEQUENCE: Mapping[str, str] = {
    "expert_gating_func": "llama.cpp would take softmax",
    "expert_weights_norm": "llama.cpp would not normalise expert weights",
    "expert_weights_scale": "llama.cpp would not scale expert weights",
    "attention.key_length_mla": "llama.cpp would expect attn_kv_b",
    "attention.value_length_mla": "llama.cpp would expect attn_kv_b",
    "rope.scaling.type": "llama.cpp would compute without YaRN",
    "rope.scaling.yarn_log_multiplier": "llama.cpp would scale attention wrongly",
}
SAMPLES = (
    "It was the best of times, it was the worst of times; 12345 people said so.",
    "def f(x):\n    return {k: v for k, v in x.items() if v != 'no'}  # keep\n",
    "深度求索的模型有671B个参数。",
    "<｜User｜>What is 2+2?<｜Assistant｜><think>\n",
)


@dataclass(frozen=True)
class Check:
    name: str
    status: Status
    detail: str


@dataclass
class Certificate:
    """What certify.json holds. files: name -> bytes."""

    target: str
    files: dict[str, int]
    checks: list[Check] = field(default_factory=list)
    weights: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.status != "fail" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        out = {
            "passed": self.passed,
            "target": self.target,
            "quantkit": __version__,
            "files": self.files,
            "checks": [asdict(check) for check in self.checks],
        }
        return out | ({"weights": self.weights} if self.weights else {})

    def table(self) -> Table:
        colours = {"pass": "green", "fail": "red", "warn": "yellow", "skip": "dim"}
        table = Table("check", "", "reason", title=escape(f"{', '.join(self.files)} for {self.target}"))
        for check in self.checks:
            table.add_row(check.name, f"[{colours[check.status]}]{check.status}[/]", escape(check.detail))
        return table


def certify(
    path: Path,
    target: str,
    reference: Checkpoint | Geometry | None = None,
    imatrix: Imatrix | None = None,
    *,
    engine: bool = True,
    values: bool = True,
    device: str = "cpu",
) -> Certificate:
    """Run every check that can run. A file that cannot be opened fails the first one, and that is the result.

    reference: the original; without it, a bundled description of the same geometry stands in for its metadata.
    engine: load and run the file in the target's engine where it is installed. values: decode every tensor.
    """
    targets.get(target)
    try:
        file = GGUFFile.open(path)
    except QuantkitError as error:
        return Certificate(
            target, {path.name: path.stat().st_size if path.is_file() else 0}, [Check("files", "fail", str(error))]
        )
    made = Certificate(target, {part.name: part.stat().st_size for part in file.files})
    add = made.checks.append
    whole = f"{len(file.files)} file(s), {len(file.tensors)} tensors, nothing truncated"
    add(_check("files", files(file, target), whole))
    if warning := beside(file, target):
        add(Check("folder", "warn", warning))
    known, where = known_config(file, reference)
    add(
        _check(
            "metadata",
            metadata(file, known),
            f"as in {where}" if known else "consistent; not compared with the original (--reference)",
        )
    )
    add(_check("tensors", tensors(file, known), "names, shapes and fixed types"))
    add(_check("types", types(file, target), f"{target} computes all of them, by its table"))
    add(
        _check(
            "tokenizer",
            tokenizer(file, reference),
            "consistent" if _tokenizer_folder(reference) is None else "the original's vocabulary, merges and ids",
        )
    )
    config = _config(file)
    if values and config:
        add(
            _weights(
                made, file, known or config, reference if isinstance(reference, Checkpoint) else None, imatrix, device
            )
        )
    if any(check.status == "fail" and check.name != "types" for check in made.checks):
        add(Check("engine", "skip", "the file has failed already"))
    elif not engine:
        add(Check("engine", "skip", "not asked for"))
    else:
        made.checks += _engine(path, file, target, device)
    return made


def _engine(path: Path, file: GGUFFile, target: str, device: str) -> list[Check]:
    try:
        return [Check(*found) for found in engine_checks.run(path, file, target, device)]
    except (QuantkitError, RuntimeError, OSError, ValueError, KeyError) as error:
        return [Check("engine", "fail", f"{type(error).__name__}: {error}")]


def _check(name: str, problems: Iterable[str], otherwise: str) -> Check:
    """Pass with `otherwise`, or fail with the problems."""
    try:
        found = list(problems)
    except QuantkitError as error:
        found = [str(error)]
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        found = [f"metadata of the wrong kind: {type(error).__name__}: {error}"]  # anyone may have written the file
    if not found:
        return Check(name, "pass", otherwise)
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return Check(name, "fail", "; ".join(found[:SHOWN]) + more)


def _config(file: GGUFFile) -> ModelConfig | None:
    """The file's own numbers, if they can be those of a model at all."""
    try:
        config = family.from_gguf(file.metadata)
        whole = all(type(getattr(config, f.name)) is int for f in fields(config) if f.type is int)
        return config if whole and config.n_layer <= len(file.tensors) and config.n_expert <= MOST_EXPERTS else None
    except (QuantkitError, KeyError, TypeError, ValueError):
        return None


def known_config(file: GGUFFile, reference: Checkpoint | Geometry | None) -> tuple[ModelConfig | None, str]:
    """The numbers that the file must have, and whose they are: the reference's, or those of a bundled model."""
    if reference is not None:
        return family.from_hf(reference.config), f"{Path(reference.path).name}/config.json"
    keys = ("block_count", "embedding_length", "expert_count", "expert_feed_forward_length", "feed_forward_length")
    found = [file.metadata.get(f"deepseek2.{key}") for key in keys]
    for name in bundle.model_names():
        c = family.from_hf(open_source(bundle.models_dir() / name).config)
        if found == [c.n_layer, c.d, c.n_expert, c.n_ff_exp, c.n_ff]:
            return c, f"{name}'s config.json, a bundled model of this geometry"
    return None, ""


def files(file: GGUFFile, target: str) -> Iterator[str]:
    """Splits and headers were checked when the file was opened."""
    if targets.get(target).single_file and len(file.files) > 1:
        yield f"{len(file.files)} splits, but {target} takes a single file"
    for part in file.files:
        end = max((t.offset + t.n_bytes for t in file.tensors.values() if t.file == part), default=0)
        tail = part.stat().st_size - end
        if tail > 1 << 16:
            yield f"{part.name}: {tail:,} bytes after the last tensor belong to nothing"


def beside(file: GGUFFile, target: str) -> str | None:
    """What lies in the same folder and would disturb the engine."""
    if target != "ktransformers":
        return None
    others = {p.name for p in file.path.parent.iterdir() if p.suffix in (".gguf", ".safetensors")}
    others -= {part.name for part in file.files}
    return f"KTransformers reads everything in the folder, {', '.join(sorted(others))} too" if others else None


def _mla(file: GGUFFile) -> Mla:
    return "combined" if "combined" in layouts_of(file.tensors) else "split"


def metadata(file: GGUFFile, known: ModelConfig | None) -> Iterator[str]:
    """Keys that llama.cpp needs, that must fit each other, and that must be the original's."""
    meta = file.metadata
    if (architecture := meta.get("general.architecture")) != "deepseek2":
        yield f"general.architecture is {architecture!r}, not deepseek2"
        return
    missing = [key for key in REQUIRED if f"deepseek2.{key}" not in meta]
    yield from (f"deepseek2.{key} is missing: llama.cpp refuses the file" for key in missing)
    if any(key in missing for key in ("attention.head_count", "attention.kv_lora_rank", "block_count")):
        return
    if known is None:
        yield from _consistent(file, lambda key: meta.get(f"deepseek2.{key}"))
        return
    for key, wrapped in family.metadata(known, _mla(file), "").items():
        name, want = key.removeprefix("deepseek2."), getattr(wrapped, "value", wrapped)
        if key.startswith("general.") or (name == "vocab_size" and key not in meta) or name in missing:
            continue
        have = meta.get(key, ABSENT.get(name))
        if have is None or not _same(have, want):
            state = f"is {meta[key]}" if key in meta else "is missing"
            why = f": {CONSEQUENCE[name]}" if name in CONSEQUENCE and key not in meta else ""
            yield f"{key} {state}, must be {want}{why}"


def _consistent(file: GGUFFile, key: Callable[[str], Any]) -> Iterator[str]:
    """What can be seen without the original."""
    split, lora, rope = _mla(file) == "split", key("attention.kv_lora_rank"), key("rope.dimension_count")
    if rope is None:
        yield "deepseek2.rope.dimension_count is missing"
        return
    if split:
        wanted = {"attention.head_count_kv": 1, "attention.key_length": lora + rope, "attention.value_length": lora}
        for name in ("attention.key_length_mla", "attention.value_length_mla"):
            if key(name) is None:
                yield f"deepseek2.{name} is missing: {CONSEQUENCE[name]}"
    else:
        wanted = {"attention.head_count_kv": key("attention.head_count"), "attention.key_length_mla": None}
    for name, want in wanted.items():
        if key(name) != want:
            yield f"deepseek2.{name} is {key(name)}, must be {want} in the {_mla(file)} layout"
    has_bias = any(".exp_probs_b." in name for name in file.tensors)
    if has_bias and (key("expert_gating_func") != 2 or not key("expert_weights_norm")):
        yield "the router has a bias (V3, R1), so deepseek2.expert_gating_func must be 2 and expert_weights_norm true"
    yarn = key("rope.scaling.type") == "yarn"
    if not yarn and (key("context_length") or 0) > LONG_CONTEXT:
        yield f"deepseek2.rope.scaling.type is not yarn, with a context of {key('context_length'):,}"
    for name in ("factor", "original_context_length", "yarn_log_multiplier") if yarn else ():
        if not key(f"rope.scaling.{name}"):
            yield f"deepseek2.rope.scaling.{name} is missing"


def _same(have: Any, want: Any) -> bool:
    if isinstance(want, float) and isinstance(have, (int, float)):
        return math.isclose(have, want, rel_tol=1e-5)
    return type(have) is type(want) and have == want


def tensors(file: GGUFFile, known: ModelConfig | None) -> Iterator[str]:
    """Exactly the tensors of this architecture, each with its shape, and F32 where the format asks for it."""
    config = known or _config(file)
    if config is None:
        family.from_gguf(file.metadata)  # says what is wrong, unless it is a matter of size
        yield "a size in the metadata is no whole number, or more than the file can hold"
        return
    names = set(file.tensors)
    if len(layouts_of(names)) > 1:
        yield "attn_kv_b and attn_k_b/attn_v_b in one file: llama.cpp rejects tensors of both MLA layouts"
    for spec in family.specs(config, _mla(file)):
        names.discard(spec.name)
        found = file.tensors.get(spec.name)
        if found is None:
            if not (spec.name == "output.weight" and (config.tied or known is None)):
                yield f"{spec.name} is missing"
        elif tuple(found.shape) != spec.shape:
            yield f"{spec.name} has shape {tuple(found.shape)}, must be {spec.shape} (slowest first)"
        elif spec.fixed and found.qtype != spec.fixed:
            yield f"{spec.name} is {found.qtype}, must be {spec.fixed}"
    yield from (f"{name} belongs to no deepseek2 model: llama.cpp rejects extra tensors" for name in sorted(names))


def types(file: GGUFFile, target: str) -> Iterator[str]:
    """Types that the target is known not to compute."""
    for tensor in file.tensors.values():
        try:
            targets.check(target, tensor.name, tensor.shape, tensor.qtype)
        except QuantkitError as error:
            yield str(error)


def _tokenizer_folder(reference: Checkpoint | Geometry | None) -> Path | None:
    folder = Path(reference.path) if reference is not None else None
    return folder if folder and (folder / "tokenizer.json").is_file() else None


def tokenizer(file: GGUFFile, reference: Checkpoint | Geometry | None) -> Iterator[str]:
    """A tokenizer that cuts text as the original's does."""
    meta = file.metadata
    for key, want in (("model", "gpt2"), ("pre", "deepseek-v3")):
        if (have := meta.get(f"tokenizer.ggml.{key}")) != want:
            yield f"tokenizer.ggml.{key} is {have!r}, must be {want!r}: text would be cut wrongly"
    tokens, kinds, merges = (meta.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
    if not (isinstance(tokens, list) and isinstance(kinds, list) and isinstance(merges, list)):
        yield "tokenizer.ggml.tokens, token_type or merges is missing"
        return
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and len(tokens) != embedding.shape[0]:
        yield f"tokenizer.ggml.tokens has {len(tokens):,} tokens, token_embd {embedding.shape[0]:,} rows"
    if len(kinds) != len(tokens):
        yield f"tokenizer.ggml.token_type has {len(kinds):,} entries for {len(tokens):,} tokens"
    yield from _merges(tokens, merges)
    for key in ("bos", "eos"):
        if not 0 <= meta.get(f"tokenizer.ggml.{key}_token_id", -1) < len(tokens):
            yield f"tokenizer.ggml.{key}_token_id is missing or no token"
    if not meta.get("tokenizer.ggml.add_bos_token", False):
        yield "tokenizer.ggml.add_bos_token is not true: DeepSeek's models start every text with BOS"
    if (folder := _tokenizer_folder(reference)) is not None:
        yield from _like_original(meta, folder, len(tokens))


def _merges(tokens: Sequence[str], merges: Sequence[str]) -> Iterator[str]:
    """Merges must be of tokens; byte-level BPE numbers their results in order, in DeepSeek's vocabulary too."""
    ids = {token: i for i, token in enumerate(tokens)}
    last = -1
    for i, merge in enumerate(merges):
        parts = merge.split(" ", 1)
        if len(parts) != 2 or not all(part in ids for part in (*parts, "".join(parts))):
            yield f"tokenizer.ggml.merges[{i}] {merge!r} is not a merge of two tokens into a third"
            return
        if ids["".join(parts)] <= last:
            yield f"tokenizer.ggml.merges[{i}] {merge!r} is out of order: its token comes before the last merge's"
            return
        last = ids["".join(parts)]


def _like_original(meta: Mapping[str, Any], folder: Path, n_vocab: int) -> Iterator[str]:
    original = tokenizers.metadata(folder, n_vocab, family.PRE)
    for key, want in original.items():
        want, have = getattr(want, "value", want), meta.get(key)
        if isinstance(want, list):
            have = have if isinstance(have, list) else []
            if len(have) != len(want):
                yield f"{key} has {len(have):,} entries, the original {len(want):,}"
            elif have != want:
                i = next(i for i, (a, b) in enumerate(zip(have, want, strict=True)) if a != b)
                yield f"{key}[{i}] is {have[i]!r}, in the original {want[i]!r}"
        elif key.endswith("_token_id") and have != want and not (key.startswith("tokenizer.ggml.padding")):
            yield f"{key} is {have}, in the original {want}"
        elif key == "tokenizer.chat_template" and have != want:
            yield f"{key} {'is missing' if have is None else 'is not the original one'}"
    ours, theirs = _or_none(lambda: tokenizers.from_gguf(meta, family.PRE)), tokenizers.load(folder)
    for text in SAMPLES if ours else ():
        if tokenizers.tokenize(ours, text) != tokenizers.tokenize(theirs, text):
            yield f"{text[:24]!r} is cut into other tokens than by the original"
            return


def _or_none(make: Callable[[], Any]) -> Any:
    """What was wrong with it has been said by the checks before."""
    try:
        return make()
    except Exception:  # the Rust library raises bare Exception
        return None


def _weights(
    made: Certificate,
    file: GGUFFile,
    config: ModelConfig,
    checkpoint: Checkpoint | None,
    imatrix: Imatrix | None,
    device: str,
) -> Check:
    try:
        found = WeightCheck(file, config, checkpoint, imatrix, device).run()
    except QuantkitError as error:
        return Check("weights", "fail", str(error))
    made.weights = found.report()
    otherwise = "finite, no empty and no doubled matrix; not compared with the original (--reference)"
    if checkpoint is not None:
        otherwise = f"{len(found.errors)} tensors are the original's within what their types cost"
    return _check("weights", map(str, found.problems), otherwise)
