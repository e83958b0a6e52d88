"""Small GGUF models of which anything may be wrong that a header can say, and a forward pass through them.

What must hold for each: `compute` returns, or raises a QuantkitError. Anything else, the end of the process first of
all, is a finding. Used by fuzz.py, which computes in a child, and by tests.
"""

import json
import random
import resource
import selectors
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from quantkit.codecs.types import stored
from quantkit.errors import QuantkitError
from quantkit.evaluation.certify import certify
from quantkit.formats.gguf_encode import PlainTensor
from quantkit.formats.gguf_layout import layout
from quantkit.formats.gguf_values import F32, U32, I32List, Typed
from quantkit.models import family
from quantkit.models.config import Mla, ModelConfig
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.generate import Engine
from quantkit.runtime.sources.gguf import open_gguf, open_source
from quantkit.runtime.stream import final_hidden

CONFIG = ModelConfig(
    **{"architecture": "deepseek2", "n_layer": 2, "d": 256, "n_head": 2, "q_lora": 256, "kv_lora": 256},
    **{"qk_nope": 32, "qk_rope": 32, "v_head": 128, "n_ff": 256, "n_ff_exp": 256, "n_dense": 1, "n_expert": 4},
    **{"n_used": 2, "n_shared": 1, "n_group": 2, "n_group_used": 1, "scoring": "sigmoid", "norm_weights": True},
    **{"weights_scale": 2.5, "has_bias": True, "n_vocab": 300, "n_context": 512, "rms_eps": 1e-6},
    **{"rope_base": 10000.0, "yarn": None, "bos": 0, "eos": 1},
)
TYPES = tuple(gguf.GGMLQuantizationType.__members__)
NUMBERS = (0, 1, 2, 3, 4, 31, 32, 255, 256, 300, 301, 512, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
FLOATS = (0.0, -1.0, 1e-30, 1e30, float("inf"), float("nan"))


@dataclass
class Model:
    """A model to be written: tensors by name, metadata, and how its weights are drawn."""

    tensors: dict[str, PlainTensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    fill: Callable[[np.random.Generator, PlainTensor], bytes] = field(default_factory=lambda: sane)

    def retype(self, name: str, qtype: str) -> None:
        """Another type for a tensor, if its rows are whole blocks of it."""
        if stored(qtype).fits(self.tensors[name].shape[-1]):
            self.tensors[name] = replace(self.tensors[name], qtype=qtype)

    def write(self, path: Path, seed: int = 0) -> Path:
        """The file, with bytes for every tensor."""
        whole = layout(path, list(self.tensors.values()), self.metadata, None)[0]
        rng = np.random.default_rng(seed)
        with path.open("wb") as file:
            file.write(whole.header)
            for tensor in self.tensors.values():
                file.seek(whole.offsets[tensor.name])
                file.write(self.fill(rng, tensor))
            file.truncate(whole.size)
        return path


def sane(rng: np.random.Generator, tensor: PlainTensor) -> bytes:
    """Weights near 0.05 for floats; packed bytes of zeros."""
    n = int(np.prod(tensor.shape))
    values = rng.standard_normal(n).astype(np.float32) * 0.05 + (len(tensor.shape) == 1)
    if tensor.qtype == "F32":
        return values.tobytes()
    return values.astype(np.float16).tobytes() if tensor.qtype == "F16" else bytes(tensor.n_bytes)


def noise(rng: np.random.Generator, tensor: PlainTensor) -> bytes:
    """Any bytes: NaN and infinite scales, every code."""
    return rng.bytes(tensor.n_bytes)


def model(config: ModelConfig = CONFIG, mla: Mla = "split") -> Model:
    """A good one, of floats."""
    tensors = {s.name: PlainTensor(s.name, s.shape, s.fixed or "F16") for s in family.specs(config, mla)}
    letters = [*bytes_to_letters().values()]
    tokens = ["<bos>", "<eos>", *letters, *(f"<{i}>" for i in range(config.n_vocab - len(letters) - 2))]
    vocabulary = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": next(iter(family.PRE)),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": I32List([3, 3, *(1 for _ in tokens[2:])]),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": U32(config.bos),
        "tokenizer.ggml.eos_token_id": U32(config.eos),
    }
    vocabulary["tokenizer.ggml.tokens"][-1] = "ab"
    return Model(tensors, family.metadata(config, mla, "hostile") | vocabulary)


def bytes_to_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def mutated(rng: random.Random) -> Model:
    """A model with one to three things wrong, or none: types, shapes, names, numbers, tokens, bytes."""
    mla: Mla = rng.choice(("split", "split", "combined"))
    config = replace(CONFIG, q_lora=rng.choice((256, 256, None)), scoring=rng.choice(("sigmoid", "sigmoid", "softmax")))
    groups, used = rng.choice(((2, 1), (2, 1), (2, 2), (1, 1), (4, 2)))
    bias, top2 = config.scoring == "sigmoid", "top2" if config.scoring == "sigmoid" else "max"
    config = replace(config, n_group=groups, n_group_used=used, has_bias=bias, group_score=top2)
    out = model(config, mla)
    out.fill = rng.choice((sane, sane, noise))
    for _ in range(rng.randrange(4)):
        rng.choice((_type, _type, _type, _types_of_all, _shape, _name, _number, _number, _tokens))(out, rng)
    return out


def _type(out: Model, rng: random.Random) -> None:
    out.retype(rng.choice(list(out.tensors)), rng.choice(TYPES))


def _types_of_all(out: Model, rng: random.Random) -> None:
    qtype = rng.choice(TYPES)
    for name, tensor in out.tensors.items():
        if len(tensor.shape) > 1 and tensor.qtype != "F32":
            out.retype(name, qtype)


def _shape(out: Model, rng: random.Random) -> None:
    name = rng.choice(list(out.tensors))
    shape = list(out.tensors[name].shape)
    at, kind = rng.randrange(len(shape)), rng.randrange(4)
    if kind == 0:
        shape[at] = rng.choice((1, 2, 255, 256, 257, 299, 301))
    elif kind == 1:
        shape.insert(0, rng.choice((1, 2)))
    elif kind == 2 and len(shape) > 1:
        shape[at - 1], shape[at] = shape[at], shape[at - 1]
    elif len(shape) > 1:
        shape = [int(np.prod(shape[:-1])), shape[-1]]
    if len(shape) <= 4 and stored(out.tensors[name].qtype).fits(shape[-1]):
        out.tensors[name] = replace(out.tensors[name], shape=tuple(shape))


def _name(out: Model, rng: random.Random) -> None:
    name = rng.choice(list(out.tensors))
    kind = rng.randrange(3)
    if kind == 0:
        del out.tensors[name]
    else:
        new = rng.choice(("blk.7.attn_q.weight", "x", "output.weight", "blk.0.exp_probs_b.bias", name.upper()))
        if new not in out.tensors:
            out.tensors[new] = replace(out.tensors[name], name=new)
            if kind == 2:
                del out.tensors[name]


def _number(out: Model, rng: random.Random) -> None:
    key = rng.choice([key for key in out.metadata if key.startswith("deepseek2.") or key.endswith("_token_id")])
    kind = rng.randrange(6)
    old = out.metadata[key]
    if kind == 0:
        del out.metadata[key]
    elif kind == 1:
        out.metadata[key] = rng.choice(("", "x", [1], True))
    elif isinstance(old, F32) or kind == 2:
        out.metadata[key] = F32(rng.choice(FLOATS))
    elif isinstance(old, Typed):
        near = (int(old.value) - 1, int(old.value) + 1, 2 * int(old.value))
        out.metadata[key] = U32(max(0, rng.choice((*NUMBERS, *near))))


def _tokens(out: Model, rng: random.Random) -> None:
    tokens = out.metadata["tokenizer.ggml.tokens"]
    kind = rng.randrange(4)
    if kind == 0:
        tokens.extend(f"<more {i}>" for i in range(rng.choice((1, 500))))
        out.metadata["tokenizer.ggml.token_type"] = I32List([1] * len(tokens))
    elif kind == 1:
        del tokens[rng.randrange(len(tokens) + 1) :]
    elif kind == 2:
        out.metadata["tokenizer.ggml.token_type"] = I32List([rng.choice((0, 1, 3, 4, 99))] * len(tokens))
    else:
        tokens[-1:] = [rng.choice(("", *tokens[:1], "x" * 100_000))]


def ids(rng: random.Random) -> list[int]:
    """A few tokens, seldom one that does not exist."""
    return [rng.choice((-1, 300, 1 << 20)) if rng.random() < 0.02 else rng.randrange(300) for _ in range(4)]


@torch.inference_mode()
def compute(path: Path, tokens: list[int], text: str | None = "a b\n") -> Mapping[str, torch.Tensor]:
    """Logits of a few tokens through every way that a CPU takes: ggml's graph, tiles, and layers dequantized; and every
    weight decoded for a certificate, which is given for files that are not computed too."""
    certify(path, "llama.cpp", oracle=False)
    weights = open_gguf(path, n_threads=1)
    if text is not None and "tokenizer.ggml.model" in weights.file.metadata:
        tokens = [*tokens, *weights.tokenizer().encode(text, add_special_tokens=False).ids]
    engine: Engine = open_engine(weights, 2, 128)
    pieces = engine.prefill(0, tokens, 0).clone()
    step = engine.decode([0], [int(pieces.argmax())]).clone()
    engine.prefill(1, (64 * tokens)[:100], 0)  # so long that it goes layer by layer
    source = open_source(path)
    exact = source.head()[1](final_hidden(source, torch.tensor([tokens]))[0])
    return {"prefill": pieces, "decode": step, "exact": exact}


class Child:
    """A process that computes files one after the other, so that its end is a finding and not ours."""

    def __init__(self, memory: int = 3 << 30):
        """memory: bytes that the process may grow by."""
        self.memory = memory
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """A new process, unless one is there."""
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, __file__, str(self.memory)]
            pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing)
            self._answer(120)

    def compute(self, path: Path, tokens: list[int], seconds: float) -> None:
        """QuantkitError as the child raised it; RuntimeError if it raised something else, ended or took too long."""
        self.start()
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps([str(path), tokens]).encode() + b"\n")
        self.process.stdin.flush()
        kind, message = self._answer(seconds)
        if kind == "refused":
            raise QuantkitError(message)
        if kind != "computed":
            raise RuntimeError(message)

    def _answer(self, seconds: float) -> tuple[str, str]:
        process = self.process
        assert process is not None and process.stdout is not None
        try:
            with selectors.DefaultSelector() as waiting:  # select() ends at descriptor 1023
                waiting.register(process.stdout, selectors.EVENT_READ)
                if not waiting.select(seconds):
                    raise RuntimeError(f"computing took more than {seconds} s")
        except BaseException:  # an alarm too: what it says later would be taken for the next answer
            self.close()
            raise
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"computing ended the process ({process.wait(10)})")
        kind, message = json.loads(line)
        return kind, message

    def close(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def serve(memory: int) -> None:
    """Answer `Child`, a line for a line."""
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, -1))
    answers = sys.stdout
    sys.stdout = sys.stderr
    print('["ready", ""]', file=answers, flush=True)
    for line in sys.stdin:
        path, tokens = json.loads(line)
        try:
            compute(Path(path), tokens)
            answer = ("computed", "")
        except QuantkitError as error:
            answer = ("refused", str(error))
        except BaseException as error:
            place = error.__traceback__
            while place and place.tb_next:
                place = place.tb_next
            where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else "?"
            answer = ("failed", f"{type(error).__name__} at {where}: {error}"[:300])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
