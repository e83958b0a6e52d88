"""Fuzz everything that quantkit reads: only a QuantkitError may come out, soon and without much memory.

    python scripts/torture/fuzz.py --cases 120000 --seed 1

Each target takes valid bytes (made here from models/tiny-r1) and mutates them: bits, words, lengths and pieces of the
text; for JSON also nodes of the tree. Besides, hypothesis invents whole JSON documents and puts invented values into
valid ones; and small models of which anything may be wrong are computed, in a process of its own (hostile_gguf.py).
A case fails if anything but a QuantkitError is raised, if its message is not one line, if it takes longer than
--seconds, if a shard lies outside of the folder, or if the process would grow by more than --memory. Failing inputs are
kept in --keep.
"""

import argparse
import contextlib
import copy
import faulthandler
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile_gguf
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from quantkit import bundle
from quantkit.calibration.state import PassState
from quantkit.errors import QuantkitError
from quantkit.formats import sealed
from quantkit.formats.checkpoint import INDEX, Checkpoint
from quantkit.formats.gguf_layout import layout
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.imatrix import load_imatrix, save_imatrix
from quantkit.formats.ledger import Ledger
from quantkit.formats.model_folder import open_source
from quantkit.formats.safetensors_header import load_json, parse_header
from quantkit.formats.sensitivity import Entry, Sensitivity
from quantkit.job.folder import PROVENANCE, claim
from quantkit.job.plan import plan_model
from quantkit.models import family
from quantkit.models.family import PRE
from quantkit.models.tokenizer_metadata import read_tokenizer, tokenizer_metadata
from quantkit.planning.metadata import file_metadata
from quantkit.planning.plan import Plan
from quantkit.planning.recipe import Recipe
from quantkit.runtime.sources.gguf import open_gguf
from quantkit.serving import requests
from quantkit.serving.chat import tokenize_prompt
from quantkit.serving.markers import Markers, Prompt
from quantkit.serving.prompts import chat_prompt
from quantkit.serving.refusals import Refused
from quantkit.serving.requests import ChatBody, CompletionBody
from quantkit.serving.template import ChatTemplate, apply_template

HOSTILE = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    1 << 31,
    (1 << 32) - 1,
    1 << 53,
    1 << 63,
    (1 << 64) - 1,
    1 << 70,
    -(1 << 63),
    10**400,
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("inf"),
    float("nan"),
    "",
    " ",
    "a",
    "\0",
    "\ud800",
    "../x",
    "/etc/passwd",
    "..",
    "a/b",
    "C:\\x",
    "é" * 300,
    "x" * 100_000,
    "{0..9}" * 5,
    "{0..9999999}",
    "[" * 50,
    [],
    {},
    [[]],
    [None],
    [1],
    [-1, 1],
    [1 << 62, 1 << 62],
    ["a", "a"],
    {"a": 1},
    {"": {}},
    [[[[[[[[]]]]]]]],
    "BF16",
    "F8_E4M3",
    "yarn",
    "BPE",
    "IQ1_S",
]
WORDS = [
    0,
    1,
    2,
    3,
    8,
    9,
    12,
    31,
    127,
    128,
    255,
    1 << 15,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
]
TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"=",
    b"\n",
    b"\0",
    b"\xff",
    b"\\u0000",
    b"\\ud800",
    b"1e999",
    b"NaN",
    b"-1",
    b"null",
    b"true",
    b"99999999999999999999",
    b"../",
    b"/",
    b"[[rules]]",
    b'"""',
    b"#",
    b"[" * 3000,
]


SAMPLING = {
    "model": "",
    "stream": False,
    "n": 2,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "typical_p": 1.0,
    "seed": -1,
    "max_tokens": 16,
    "min_tokens": 1,
    "stop": ["a", "b"],
    "stop_token_ids": [1, 2],
    "bad_words": ["x"],
    "logit_bias": {"5": -100},
    "presence_penalty": 0.0,
    "user": "me",
}
CONTEXT = 4096  # tokens of a sequence
CHAT = SAMPLING | {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [], "reasoning_content": "hm"},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
        {"role": "user", "content": "go on"},
    ],
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [],
    "chat_template_kwargs": {},
    "thinking": {"type": "enabled"},
    "reasoning_effort": "medium",
    "stream_options": None,
}
COMPLETION = SAMPLING | {"prompt": ["Once", "upon"], "echo": False, "logprobs": 0}


@dataclass
class Target:
    """seed: valid bytes. parse: bytes -> anything, QuantkitError for bad ones. json: mutate the tree as well. invent:
    how to make a case, if not by mutating the bytes."""

    name: str
    seed: bytes
    parse: Callable[[bytes], object]
    json: bool = False
    invent: Callable[[random.Random], bytes] | None = None


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(out) + 1) if rng.random() < 0.5 else rng.randrange(min(len(out), 400) + 1)
        kind = rng.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 2:
            out[at:at] = rng.choice(TOKENS)
        elif kind == 3:
            del out[at : at + rng.choice((1, 1, 4, 8, 100))]
        elif kind == 4:
            size = rng.choice((4, 8))
            out[at : at + size] = (rng.choice(WORDS) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        elif kind == 5:
            other = rng.randrange(len(out) + 1)
            out[at:at] = out[other : other + rng.choice((1, 8, 64))]
        elif kind == 6:
            del out[at:]
        else:
            out += bytes(rng.choice((1, 8, 4096)))
    return bytes(out)


def nodes(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from nodes(value, (*path, key))


def mutate_tree(tree: Any, paths: list[tuple], rng: random.Random) -> bytes:
    """One to three nodes replaced, removed, renamed or repeated. Written by json, so NaN and lone surrogates occur."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        path = rng.choice(paths)
        if not path:
            if rng.random() < 0.05:
                return json.dumps(rng.choice(HOSTILE)).encode()
            continue
        try:
            parent = tree
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier step took it away
        if not isinstance(parent, dict | list):
            continue
        kind, value = rng.randrange(5), copy.deepcopy(rng.choice(HOSTILE))
        if kind == 0 and isinstance(parent, dict):
            del parent[path[-1]]
        elif kind == 1 and isinstance(parent, dict):
            parent[str(value)[:1000]] = parent.pop(path[-1])
        elif kind == 2 and isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), value)
        else:
            parent[path[-1]] = value
    return json.dumps(tree).encode()


class Files:
    """Targets over real files in a scratch folder; each writes its mutated file, parses, and puts the good back."""

    def __init__(self, folder: Path):
        self.folder = folder
        tiny = Checkpoint.open(bundle.models_dir() / "tiny-r1")
        self.config = family.from_hf(tiny.config)
        self.plan = plan_model("tiny-r1", "1.58bit")
        metadata = file_metadata(tiny.path, self.config, self.plan)
        whole = layout(folder / "m.gguf", self.plan.tensors, metadata, None)[0]
        self.header, self.size = whole.header, whole.size
        self.words = {key: getattr(value, "values", getattr(value, "value", value)) for key, value in metadata.items()}
        self.markers = Markers(self.words, read_tokenizer(tiny.path, PRE))
        self.child = hostile_gguf.Child()
        self.good = hostile_gguf.model().write(folder / "good.gguf").read_bytes()
        self.model = folder / "model"
        self.model.mkdir()
        self.small_checkpoint()

    def small_checkpoint(self) -> None:
        """Two shards of plain and FP8 tensors; config and tokenizer are tiny-r1's."""
        source = bundle.models_dir() / "tiny-r1"
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (self.model / name).write_bytes((source / name).read_bytes())
        settings = json.loads((self.model / "tokenizer_config.json").read_bytes())
        added = json.loads((self.model / "tokenizer.json").read_bytes())["added_tokens"]
        settings["added_tokens_decoder"] = {
            str(token["id"]): token for token in (*added, {"id": 768, "content": "[A]"})
        }
        (self.model / "tokenizer_config.json").write_text(json.dumps(settings))
        weight_map = {}
        for i, shard in enumerate(("a-1.safetensors", "a-2.safetensors")):
            table = {
                f"{i}.w.weight": {"dtype": "F8_E4M3", "shape": [130, 64], "data_offsets": [0, 8320]},
                f"{i}.w.weight_scale_inv": {"dtype": "F32", "shape": [2, 1], "data_offsets": [8320, 8328]},
                f"{i}.norm.weight": {"dtype": "BF16", "shape": [32], "data_offsets": [8328, 8392]},
            }
            head = json.dumps(table | {"__metadata__": {"format": "pt"}}).encode()
            (self.model / shard).write_bytes(len(head).to_bytes(8, "little") + head + bytes(8392))
            weight_map |= dict.fromkeys(table, shard)
        (self.model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    @contextlib.contextmanager
    def replaced(self, name: str, data: bytes) -> Iterator[None]:
        path = self.model / name
        good = path.read_bytes()
        path.write_bytes(data)
        try:
            yield
        finally:
            path.write_bytes(good)

    def checkpoint(self, name: str) -> Callable[[bytes], object]:
        def parse(data: bytes) -> None:
            with self.replaced(name, data), Checkpoint.open(self.model) as found:
                for tensor in list(found.tensors):
                    if found.entry(tensor).n_bytes < 1 << 20:
                        with contextlib.suppress(QuantkitError):
                            found.read(tensor)
                outside = [e.file for e in found.tensors.values() if (self.model / str(e.file)).parent != self.model]
                assert not outside, f"a shard outside of the folder: {outside}"

        return parse

    def config_json(self, data: bytes) -> None:
        with self.replaced("config.json", data):
            config = family.from_hf(open_source(self.model).config)
            specs = family.specs(config)
            assert len(specs) < 1 << 20
            family.source_shapes(config)
            family.metadata(config, "split", "x")
            plan_model(self.model, "1.58bit")

    def tokenizer_file(self, name: str) -> Callable[[bytes], object]:
        def parse(data: bytes) -> None:
            with self.replaced(name, data):
                tokenizer_metadata(self.model, self.config.n_vocab, family.PRE)
                read_tokenizer(self.model, family.PRE)

        return parse

    def gguf(self, data: bytes) -> None:
        """The header of a whole model, its tensors a hole in the file; opened as `quantkit run` does."""
        path = self.folder / "x.gguf"
        with path.open("wb") as file:
            file.write(data)
            file.truncate(max(len(data), self.size) if data.startswith(b"GGUF") else len(data))
        found = GGUFFile.open(path)
        for name in found.tensors:
            found.data(name)[:1].sum()
        open_gguf(path).tokenizer()

    def imatrix(self, data: bytes) -> None:
        path = self.folder / "i.gguf"
        path.write_bytes(data)
        load_imatrix(path)

    def ledger(self, data: bytes) -> None:
        path = self.folder / "l.ledger"
        path.write_bytes(data)
        ledger = Ledger(path)
        try:
            ledger.load()
        finally:
            ledger.close()

    def state(self, data: bytes) -> None:
        path = self.folder / "state" / "hidden.safetensors"
        path.write_bytes(data)
        sealed._known.clear()  # by time, which does not tell two cases apart
        with sealed.reading(path) as file:
            file.get_tensor("hidden")

    def computed(self, data: bytes) -> None:
        """A few tokens through a whole model."""
        path = self.folder / "computed.gguf"
        path.write_bytes(data)
        tokens = [5, 6, 7] if data == self.good else hostile_gguf.ids(random.Random(zlib.crc32(data)))
        self.child.compute(path, tokens, 20)

    def invented_model(self, rng: random.Random) -> bytes:
        """The bytes of a model with something wrong; seldom one that cannot be written: then another."""
        while True:
            with contextlib.suppress(QuantkitError):
                return hostile_gguf.mutated(rng).write(self.folder / "invented.gguf", rng.getrandbits(32)).read_bytes()

    def body(self, kind: type[ChatBody] | type[CompletionBody]) -> Callable[[bytes], object]:
        """A request as `serve` reads it, up to the tokens of its prompt; only 4xx may come out."""

        def parse(data: bytes) -> None:
            try:
                body = requests.parse(data, kind, CONTEXT)
                if isinstance(body, ChatBody):
                    texts: list = [chat_prompt(ChatTemplate(self.words), self.markers, body).prompt]
                else:
                    texts = [Prompt(text) if isinstance(text, str) else text for text in body.prompts()]
                for text in texts:
                    if isinstance(text, Prompt):
                        tokenize_prompt(self.markers, text, self.config.bos, CONTEXT)
                body.sampling(), body.stops(), body.biases(), body.n_logprobs(), body.n_tokens()
            except Refused as error:
                assert 400 <= error.status_code < 500, error.status_code
                raise QuantkitError(error.detail) from None

        return parse

    def template(self, data: bytes) -> None:
        """A file's chat template is a stranger's program."""
        words = self.words | {"tokenizer.chat_template": data.decode(errors="replace")}
        turns = [message.plain() for message in requests.parse(json.dumps(CHAT).encode(), ChatBody, CONTEXT).messages]
        apply_template(words, turns, thinking=True)

    def path_target(self, name: str, load: Callable[[Path], object]) -> Callable[[bytes], object]:
        def parse(data: bytes) -> None:
            (self.folder / name).write_bytes(data)
            load(self.folder / name)

        return parse

    def provenance(self, data: bytes) -> None:
        folder = self.folder / "claim"
        folder.mkdir(exist_ok=True)
        (folder / PROVENANCE).write_bytes(data)
        claim(folder, {"recipe": "1.58bit"}, False)

    def geometry(self, data: bytes) -> None:
        folder = self.folder / "geometry"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_bytes((self.model / "config.json").read_bytes())
        (folder / "tensors.json").write_bytes(data)
        open_source(folder).validate({"model.layers.3.mlp.experts.15.up_proj.weight": (64, 256)})


def targets(folder: Path) -> list[Target]:
    import numpy as np
    import torch

    from quantkit.tensors import Importance

    files = Files(folder)
    shard = (files.model / "a-1.safetensors").read_bytes()
    header = shard[8 : 8 + int.from_bytes(shard[:8], "little")]
    entries = {f"blk.{i}.w": Importance(np.ones((n, 32), "f4"), np.ones(n, "f4")) for i, n in ((0, 1), (1, 4))}
    save_imatrix(folder / "i.gguf", entries, datasets=["text"], chunk_count=2, chunk_size=512)
    PassState(folder / "state", "job").save(0, torch.zeros(2, 4, 8), entries)
    rows = tuple(Entry(f"blk.{i}.w", "w", i, "Q4_K", 144, 0.5, 0.1) for i in range(4))
    measured = Sensitivity("tiny-r1", "full", 512, rows).to_json().encode()
    ledger = b'{"plan": "p", "layout": "l"}\n["a", 0, 5, 1]\n["b", 3, 9, 2]\n'
    geometry = json.dumps(
        {
            "model.embed_tokens.weight": {"shape": [512, 256], "dtype": "BF16"},
            "model.layers.{0..3}.mlp.experts.{0..15}.{gate,up}_proj.weight": {"shape": [64, 256], "dtype": "BF16"},
        }
    ).encode()
    read = {
        name: (files.model / name).read_bytes()
        for name in (INDEX, "config.json", "tokenizer.json", "tokenizer_config.json")
    }

    def safetensors(data: bytes) -> None:
        parse_header(data, 8 + len(data) + 8392, "s", "s")

    return [
        Target("safetensors header", header, safetensors, json=True),
        Target("safetensors shard", shard, files.checkpoint("a-1.safetensors")),
        Target("shard index", read[INDEX], files.checkpoint(INDEX), json=True),
        Target("config.json", read["config.json"], files.config_json, json=True),
        Target("tensors.json", geometry, files.geometry, json=True),
        Target("tokenizer.json", read["tokenizer.json"], files.tokenizer_file("tokenizer.json"), json=True),
        Target(
            "tokenizer_config.json",
            read["tokenizer_config.json"],
            files.tokenizer_file("tokenizer_config.json"),
            json=True,
        ),
        Target("GGUF", files.header, files.gguf),
        Target(
            "GGUF, computed",
            files.good,
            files.computed,
            invent=files.invented_model,
        ),
        Target("imatrix", (folder / "i.gguf").read_bytes(), files.imatrix),
        Target("chat body", json.dumps(CHAT).encode(), files.body(ChatBody), json=True),
        Target("completion body", json.dumps(COMPLETION).encode(), files.body(CompletionBody), json=True),
        Target("chat template", files.words["tokenizer.chat_template"].encode(), files.template),
        Target("recipe", (bundle.recipes_dir() / "1.58bit.toml").read_bytes(), lambda data: Recipe.parse(data, "r")),
        Target("plan.json", files.plan.to_json().encode(), lambda data: Plan.from_json(data), json=True),
        Target("sensitivity.json", measured, files.path_target("s.json", Sensitivity.load), json=True),
        Target("provenance.json", b'{"recipe": "1.58bit", "calibration": {"a": [1]}}', files.provenance, json=True),
        Target("ledger", ledger, files.ledger),
        Target("state of a pass", (folder / "state" / "hidden.safetensors").read_bytes(), files.state),
    ]


class TooSlow(Exception):
    """A case ran into the time limit."""


def _alarm(*_: object) -> None:
    raise TooSlow


def attempt(target: Target, data: bytes, seconds: float) -> tuple[str, str]:
    """("accepted" | "refused", "") or ("finding", what went wrong)."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        target.parse(data)
        return "accepted", ""
    except QuantkitError as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        text = str(error)
        if not text or "\n" in text or len(text) > 4000:
            return "finding", f"message of {len(text)} characters or several lines: {text[:200]!r}"
        return "refused", ""
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if isinstance(error, KeyboardInterrupt):
            raise
        places = [f for f in traceback.extract_tb(error.__traceback__) if "fuzz.py" not in f.filename]
        where = f"{Path(places[-1].filename).name}:{places[-1].lineno}" if places else "?"
        return "finding", f"{type(error).__name__} at {where}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def mutations(target: Target, rng: random.Random) -> Iterator[bytes]:
    tree = load_json(target.seed, target.name) if target.json else None
    paths = list(nodes(tree)) if target.json else []
    while True:
        if target.invent:
            yield target.invent(rng)
        elif target.json and rng.random() < 0.6:
            yield mutate_tree(tree, paths, rng)
        else:
            yield mutate_bytes(target.seed, rng)


def invented(target: Target, count: int, seed: int, check: Callable[[bytes], None]) -> None:
    """Documents from hypothesis: any JSON at all, and the seed with one node replaced by any JSON."""
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    value = st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
        max_leaves=8,
    )
    tree = load_json(target.seed, target.name)
    paths = [path for path in nodes(tree) if path]

    @hypothesis_seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(-1, len(paths) - 1), value)
    def run(at: int, new: Any) -> None:
        whole = new
        if at >= 0:
            whole = parent = copy.deepcopy(tree)
            for key in paths[at][:-1]:
                parent = parent[key]
            parent[paths[at][-1]] = new
        check(json.dumps(whole).encode())

    run()


def fuzz(
    folder: Path, cases: int, seed: int, seconds: float, memory: int, keep: Path | None = None, only: str = ""
) -> tuple[dict[str, Counter], dict[str, bytes], float]:
    """Run about `cases` over all targets whose name contains `only`. Returns counts per target, findings (what ->
    input), and the time in s."""
    todo = [target for target in targets(folder) if only in target.name]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    counts: dict[str, Counter] = {}
    findings: dict[str, bytes] = {}
    previous = signal.signal(signal.SIGALRM, _alarm)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, old[1]))
    faulthandler.dump_traceback_later(3600, exit=True)
    started = time.monotonic()
    try:
        for number, target in enumerate(todo):
            counts[target.name] = tally = Counter()

            def check(data: bytes, number=number, target=target, tally=tally) -> None:
                began = time.monotonic()
                verdict, what = attempt(target, data, seconds)
                took = time.monotonic() - began
                if verdict != "finding" and took > seconds:  # an alarm inside a callback of the interpreter is lost
                    verdict, what = "finding", "TooSlow"
                tally[verdict] += 1
                tally["slowest ms"] = max(tally["slowest ms"], int(1000 * took))
                if verdict == "finding" and f"{target.name}: {what}" not in findings:
                    findings[f"{target.name}: {what}"] = data
                    if keep:
                        keep.mkdir(parents=True, exist_ok=True)
                        (keep / f"{number}-{len(findings)}").write_bytes(data)

            assert attempt(target, target.seed, 60) == ("accepted", "") or target.name == "provenance.json", (
                target.name,
                attempt(target, target.seed, 60),
            )
            share = cases // len(todo)
            by_hypothesis = share // 10 if target.json else 0
            source = mutations(target, random.Random(f"{seed} {target.name}"))
            for _ in range(share - by_hypothesis):
                check(next(source))
            if by_hypothesis:
                invented(target, by_hypothesis, seed, check)
    finally:
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, old)
        signal.signal(signal.SIGALRM, previous)
    return counts, findings, time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="limit of one case")
    parser.add_argument("--memory", type=int, default=1 << 30, help="bytes that the process may grow by")
    parser.add_argument("--only", default="", help="targets whose name contains this")
    parser.add_argument("--keep", type=Path, help="folder for inputs that fail")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        counts, findings, took = fuzz(
            Path(scratch), options.cases, options.seed, options.seconds, options.memory, options.keep, options.only
        )
    print(f"{'target':<24}{'cases':>9}{'refused':>9}{'accepted':>10}{'findings':>10}{'slowest':>10}")
    for name, tally in counts.items():
        n = tally["refused"] + tally["accepted"] + tally["finding"]
        print(
            f"{name:<24}{n:>9,}{tally['refused']:>9,}{tally['accepted']:>10,}{tally['finding']:>10,}"
            f"{tally['slowest ms']:>7} ms"
        )
    total = sum(t["refused"] + t["accepted"] + t["finding"] for t in counts.values())
    print(
        f"{total:,} cases in {took:.0f} s; {len(findings)} different findings; peak memory "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MB"
    )
    for what in findings:
        print("  " + what)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
