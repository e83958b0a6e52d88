"""What scripts/bench/engines.py asks other programs about: small files for every target, with exact answers.

    python scripts/bench/engine_files.py WORK [NAME ...]     # of some files only

Models: the bundled tiny-r1; tiny-v3.2; and two with random weights whose attention has R1's widths (512 + 64, heads of
128), because a program may know those alone: `wide`, routed in groups as R1 is, and `wide-one-group`, as Kimi-K2 is.
Random weights magnify every rounding, so that these are not quantized. The others are encoded by ggml after 8,192
tokens of calibration, as llama-quantize would: programs are asked here, not encoders.

Several processes may make files in one WORK, each other ones: what is being made lies in a folder of its own.

Beside FILE.gguf lie FILE.kld, log-probabilities of its decoded weights in float32 as llama-perplexity's
--kl-divergence-base takes them; FILE.json, what these weights continue four prompts with, greedily; and
FILE.greedy.kld, the same for --kl-divergence-base.
"""

import json
import os
import shutil
import sys
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantkit import bundle
from quantkit.__main__ import main as quantkit
from quantkit.calibration import corpus
from quantkit.evaluation.oracles import hf
from quantkit.runtime.engines.torch import TorchEngine
from quantkit.runtime.generate import read
from quantkit.runtime.sources.gguf import GGUFSource, open_source
from quantkit.runtime.stream import final_hidden, head_tiles

sys.path.append(str(Path(__file__).parents[1] / "tiny_v32"))
from assemble import assemble

TINY_R1 = bundle.models_dir() / "tiny-r1"
CHUNK, CHUNKS = 512, 4
PROMPT, NEW = 64, 63  # tokens; the second half of both together, which llama-perplexity scores, is what is new
DYNAMIC_RANGE = 24.0  # nats below the most probable token, in a .kld file
PLAIN = """name = "F32"
description = "every matrix as the original has it"
target = "llama.cpp"
mla = "split"

[[rules]]
match = "*"
qtype = "F32"
why = "what differs is not rounding"
"""
WIDE = {
    "num_hidden_layers": 3,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_nextn_predict_layers": 0,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class Case:
    """A file as `--recipe` and `--target` say. split_max: of one part, as --split-max-size takes it."""

    model: str
    recipe: str
    target: str
    split_max: str = "0"

    @property
    def name(self) -> str:
        """Of the file, without suffix."""
        parts = "-parts" if self.split_max != "0" else ""
        return f"{self.model}-{self.recipe}-{self.target.replace('/', '-')}{parts}"

    def file(self, work: Path) -> Path:
        """The GGUF, or its first part."""
        found = sorted(work.glob(f"{self.name}-00001-of-*.gguf"))
        return found[0] if found else work / f"{self.name}.gguf"


TARGETS = ("llama.cpp", "llama.cpp/combined")
CASES = (
    *(Case("tiny-r1", recipe, target) for recipe in ("F32", "1.58bit", "Q4_K_M") for target in TARGETS),
    *(Case("tiny-r1", recipe, "llama.cpp") for recipe in ("2.51bit", "IQ1_S")),
    *(Case("tiny-r1", "1.58bit", target) for target in ("ktransformers", "ktransformers/combined", "ollama")),
    Case("tiny-r1", "1.58bit", "llama.cpp", split_max="1600000"),
    *(Case("tiny-v3.2", "1.58bit", target) for target in ("llama.cpp", "llama.cpp/deepseek2")),
    *(Case(model, "F32", target) for model in ("wide", "wide-one-group") for target in TARGETS),
)


def prepare(work: Path, names: Collection[str] = ()) -> None:
    """Files of these names, else all, with their answers; what is there already is kept."""
    work.mkdir(parents=True, exist_ok=True)
    if not (recipe := work / "F32.toml").exists() or recipe.read_text() != PLAIN:  # another process may be reading it
        recipe.write_text(PLAIN)
    for case in (case for case in CASES if not names or case.name in names):
        if not case.file(work).exists():
            _make(case, work)
        if not (work / f"{case.name}.json").exists():
            _answer(case, work)


def _run(*arguments: object) -> None:
    with redirect_stdout(StringIO()):
        quantkit([str(argument) for argument in arguments], standalone_mode=False)


def _make(case: Case, work: Path) -> None:
    """Commands refuse a folder that another process writes to, so each case has one, and is moved when it is whole."""
    model, made = _model(case.model, work), work / f"{case.name}.part"
    made.mkdir(exist_ok=True)
    imatrix, plan = work / f"{case.model}.imatrix.gguf", work / f"{case.name}.plan.json"
    if not imatrix.exists():
        _run("calibrate", model, "--tokens", 8192, "--device", "cpu", "--output", made / imatrix.name)
        (made / imatrix.name).replace(imatrix)
    recipe = work / "F32.toml" if case.recipe == "F32" else case.recipe
    _run("plan", model, "--recipe", recipe, "--target", case.target, "--output", plan)
    where = ("--output", made / f"{case.name}.gguf", "--split-max-size", case.split_max)
    _run("quantize", model, "--plan", plan, "--imatrix", imatrix, *where)
    for file in sorted(made.glob("*.gguf"), reverse=True):  # the first part says that all are there
        file.replace(work / file.name)
    shutil.rmtree(made)


def _model(name: str, work: Path) -> Path:
    folder = work / "models" / name
    if name == "tiny-r1":
        return TINY_R1
    if folder.exists():
        return folder
    made = folder.with_name(f"{name}.{os.getpid()}.part")
    if name == "tiny-v3.2":
        assemble(made)
    else:
        groups = {"n_group": 1, "topk_group": 1} if name == "wide-one-group" else {}
        _random(made, json.loads((TINY_R1 / "config.json").read_text()) | WIDE | groups)
    try:
        made.rename(folder)
    except OSError:  # another process was first, with the same weights
        if not folder.exists():
            raise
        shutil.rmtree(made)
    return folder


def _random(folder: Path, config: Mapping[str, Any]) -> None:
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    folder.mkdir(parents=True, exist_ok=True)
    hf.random_model(plain, folder, np.zeros((1, 8), np.int64))
    (folder / "config.json").write_text(json.dumps(plain))  # transformers writes one of its own
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_R1 / name, folder)


@torch.inference_mode()
def _answer(case: Case, work: Path) -> None:
    """What the file's weights, decoded, give in float32."""
    source = open_source(case.file(work))
    text, tokenizer = corpus.default("evaluation"), source.tokenizer()
    tokens = corpus.chunk(text, tokenizer, source.config.bos, CHUNK, CHUNK * CHUNKS).tokens
    hidden = final_hidden(source, tokens).flatten(0, 1)
    logits = torch.cat(list(head_tiles(source, source.head(), hidden))).view(CHUNKS, CHUNK, -1)
    write_base(work / f"{case.name}.kld", tokens.numpy(), logits.numpy())
    answers = [greedy(source, prompt) for prompt in tokens[:, :PROMPT].tolist()]
    rows = np.stack([[*prompt, *said] for prompt, said, _, _ in answers])
    write_base(work / f"{case.name}.greedy.kld", rows, np.stack([logits for *_, logits in answers]))
    said = [{"prompt": prompt, "tokens": new, "margins": margins} for prompt, new, margins, _ in answers]
    (work / f"{case.name}.json").write_text(json.dumps(said))


def write_base(path: Path, tokens: np.ndarray, logits: np.ndarray) -> None:
    """As llama-perplexity writes it: tokens int [n_chunk, t], then of every token in the second half of each chunk, but
    the last, log-probabilities in 16 bits under a scale and a least value."""
    n_chunk, t, n_vocab = logits.shape
    rows = logits[:, t // 2 : -1].astype(np.float64)
    top = rows.max(-1, keepdims=True)
    low = np.maximum(rows.min(-1, keepdims=True), top - DYNAMIC_RANGE)
    least = low - top - np.log(np.exp(rows - top).sum(-1, keepdims=True))
    scale = (top - low) / 65535
    packed = np.zeros((*rows.shape[:2], 4 + 2 * ((n_vocab + 1) // 2)), "<u2")
    packed[..., :4] = np.concatenate([scale, least], -1).astype("<f4").view("<u2")
    packed[..., 4 : 4 + n_vocab] = np.rint((np.maximum(rows, low) - low) / scale)
    with path.open("wb") as out:
        out.write(b"_logits_" + np.array([t, n_vocab, n_chunk], "<i4").tobytes())
        out.write(np.ascontiguousarray(tokens, "<i4").tobytes() + packed.tobytes())


def greedy(source: GGUFSource, prompt: list[int]) -> tuple[list[int], list[int], list[float], np.ndarray]:
    """The prompt, NEW tokens after it, by how many nats each was likelier than the second best, and float32 logits
    [PROMPT + NEW, n_vocab], zeros where none is scored."""
    engine, tokens, margins = TorchEngine(source, 1, len(prompt) + NEW), [], []
    rows = np.zeros((len(prompt) + NEW, source.config.n_vocab), np.float32)
    logits = read(engine, prompt)
    for at in range(len(prompt) - 1, len(rows) - 1):
        rows[at] = logits.numpy()
        best = logits.topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(round(float(best.values[0] - best.values[1]), 4))
        logits = engine.decode([0], tokens[-1:])[0]
    return prompt, tokens, margins, rows


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), sys.argv[2:])
