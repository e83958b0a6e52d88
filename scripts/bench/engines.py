"""What other programs compute from our files: does it load, how far is it from exact, which tokens does it write?

    python scripts/bench/engines.py WORK --bin "llama.cpp b11434=llama.cpp/build/bin" --bin "ik=ik_llama.cpp/build/bin"
    python scripts/bench/engines.py WORK --python other/venv/bin/python      # xllamacpp or llama-cpp-python of a venv
    python scripts/bench/engines.py WORK --bin "llama.cpp b11434 CUDA=build/bin" --gpu --jobs 6

Files of every target with exact answers are made in WORK first (scripts/bench/engine_files.py), 1,020 tokens scored and
4 × 63 greedy ones each. A folder of programs is asked by its llama-perplexity, which computes KLD from the
log-probabilities that we wrote, and by its llama-server, what it writes; without one, and of ik_llama.cpp, whose
server tells no ids, llama-perplexity says how many of the exact weights' choices it makes too. A package is asked by
the oracle of `quantkit certify`, and `quantkit run`'s own engine as well. Every file with default flags, then every
flag on four of them.

WORK/engines.json keeps what was found, so that a stopped run goes on, and further engines add their columns; --again
asks those that are named once more. --jobs asks programs several questions at once, each with OMP_NUM_THREADS threads;
figures are the same, but for what llama.cpp's threads add up in another order. Prints the tables of
docs/results/engines.md.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import click
import numpy as np
import torch
from engine_files import CASES, NEW, Case, prepare

from quantkit import machine
from quantkit.errors import QuantkitError
from quantkit.evaluation.oracles import llama
from quantkit.evaluation.oracles.child import OracleError
from quantkit.evaluation.oracles.llama_tool import read_base
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.generate import Engine, Sampling, generate
from quantkit.runtime.sources.gguf import open_gguf

WITH_OPTIONS = tuple(
    Case(model, recipe, target)
    for model, recipe in (("tiny-r1", "1.58bit"), ("wide-one-group", "F32"))
    for target in ("llama.cpp", "llama.cpp/combined")
)
FIGURES = (r"Mean\s+KLD:\s*(\S+)", r"Same top p:\s*(\S+)")
TRIES = 20  # of llama-perplexity, which may end before its logging thread has written the last lines
STOCK = (
    "-fa on",
    "-fa off",
    "-fa on -ctk q8_0 -ctv q8_0",
    "-ctk q8_0",
    "--no-repack",
    "-lm none",
    "-np 4",
)
IK = (
    *("-mla 0", "-mla 1", "-mla 2", "-fa off", "-mla 1 -fa off", "-no-fmoe", "-ger", "-rtr", "--no-mmap"),
    *("-ctk q8_0 -ctv q8_0", "-mla 1 -ctk q8_0"),
)
STOCK_GPU = ("-ngl 0", "-ot exps=CPU", "-nkvo", "-sm none", "-sm layer", "-sm row", "-sm tensor")
IK_GPU = ("-ngl 0", "-ot exps=CPU", "-nkvo", "-sm none", "-sm layer", "-sm graph")
PACKAGE: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "-fa on": {"flash_attention": 1},
    "-fa off": {"flash_attention": 0},
    "-fa on -ctk q8_0 -ctv q8_0": {"flash_attention": 1, "cache": "q8_0"},
    "token by token": {"step": 1},
}
SEQUENCES = "-np 4"
OLLAMA = "as ollama"
OLLAMA_FLAGS = (
    "--no-webui --offline --log-verbosity 4 --no-log-prefix --no-log-timestamps --no-jinja --chat-template chatml "
    "--flash-attn auto -b 512 -ub 512"
)
"""How ollama (fb30760, 21 August 2026) starts llama-server, after a copy by llama-quantize."""
Said = list[list[int]]
"""Tokens of an engine after each prompt."""


class Refused(Exception):
    """The engine gave no answer; the message says why, in a line."""


@dataclass
class Found:
    """Of one file with some flags. kld: mean, nats; top: share of equal top tokens, percent; same: for each prompt how
    many tokens are the exact ones, and by how many nats the exact one was likelier than the next where they end (0 if
    they do not). refused: why there is no answer."""

    kld: float | None = None
    top: float | None = None
    same: list[tuple[int, float]] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    refused: str = ""


@dataclass(frozen=True)
class Asked:
    """A file with its exact answers."""

    file: Path
    base: Path
    prompts: tuple[tuple[int, ...], ...]
    exact: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]

    @classmethod
    def load(cls, case: Case, work: Path) -> "Asked":
        """From WORK."""
        said = json.loads((work / f"{case.name}.json").read_text())
        parts = (tuple(tuple(one[key]) for one in said) for key in ("prompt", "tokens", "margins"))
        return cls(case.file(work), work / f"{case.name}.kld", *parts)

    def compared(self, said: Said) -> list[tuple[int, float]]:
        """As `Found.same`."""
        out = []
        for exact, margins, own in zip(self.exact, self.margins, said, strict=True):
            pairs = enumerate(zip(exact, own, strict=False))
            first = next((i for i, (a, b) in pairs if a != b), min(len(exact), len(own)))
            out.append((first, margins[first] if first < len(exact) else 0.0))
        return out


class Programs:
    """A folder with llama-perplexity, and perhaps llama-server, of llama.cpp or a fork."""

    def __init__(self, name: str, folder: Path, gpu: bool, limit: int) -> None:
        self.name, self.folder, self.always = name, folder.resolve(), ["-ngl", "99"] if gpu else []
        self.limit = limit  # seconds of one answer
        self.paths = os.environ | {"LD_LIBRARY_PATH": f"{self.folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
        said = subprocess.run([self.folder / "llama-perplexity", "--help"], capture_output=True, env=self.paths)
        self.ik = b"--mla-use" in said.stdout + said.stderr
        gpu_options = IK_GPU if self.ik else STOCK_GPU
        as_ollama = () if self.ik else (OLLAMA,)
        if as_ollama and not (self.folder / "llama-quantize").exists():
            print(f"{name}: no llama-quantize in {folder}, so nothing is asked {OLLAMA}", file=sys.stderr)
            as_ollama = ()
        self.options = ("", *(IK if self.ik else STOCK), *as_ollama, *(gpu_options if gpu else ()))

    def ask(self, asked: Asked, flags: str) -> Found:
        """With these flags."""
        found = Found()
        if flags == OLLAMA:
            asked, flags = self._as_ollama_keeps(asked), OLLAMA_FLAGS
        else:
            said = self._perplexity(asked, asked.base, "512", flags)
            found.kld, found.top = (float(re.findall(p, said)[-1]) for p in FIGURES)
        if self.ik or not (self.folder / "llama-server").exists():
            found.choices = self._choices(asked, flags)
        else:
            with self._server(asked, flags) as complete, ThreadPoolExecutor(4 if flags == SEQUENCES else 1) as pool:
                found.same = asked.compared(list(pool.map(complete, asked.prompts)))
        return found

    def _perplexity(self, asked: Asked, base: Path, context: str, flags: str) -> str:
        batch = ["-b", "2048"] if flags == SEQUENCES else ["-b", "512", *flags.split()]
        command = ["llama-perplexity", "-m", str(asked.file), "--kl-divergence", "--kl-divergence-base", str(base)]
        for left in reversed(range(TRIES)):
            said = self._run([*command, "-c", context, *self._common(), *batch], ends=not left)
            if all(re.search(pattern, said) for pattern in FIGURES):
                return said
        raise Refused(f"llama-perplexity said no figures: {_reason(said)}")

    def _choices(self, asked: Asked, flags: str) -> list[int]:
        """Its lines, one a chunk, end with the share of equal top tokens up to there."""
        n = len(asked.exact[0])
        said = self._perplexity(asked, asked.base.with_suffix(".greedy.kld"), str(len(asked.prompts[0]) + n), flags)
        shares = [float(share) for share in re.findall(r"^ +\d+ .* (\S+) ± +\S+ %$", said, re.MULTILINE)]
        sums = [round(share / 100 * n * (i + 1)) for i, share in enumerate(shares[: len(asked.prompts)])]
        return [own - before for before, own in zip([0, *sums], sums, strict=False)]

    def _as_ollama_keeps(self, asked: Asked) -> Asked:
        """What `ollama create` makes of a file: a copy by llama-quantize, which must hold the same tensors."""
        copy = asked.base.with_suffix(".copy.gguf")
        self._run(["llama-quantize", "--allow-requantize", str(asked.file), str(copy), "COPY"], ends=True)
        theirs, ours = GGUFFile.open(copy), GGUFFile.open(asked.file)
        for name, tensor in ours.tensors.items():
            if theirs.tensors[name].qtype != tensor.qtype or not np.array_equal(theirs.data(name), ours.data(name)):
                raise Refused(f"llama-quantize COPY changes {name}")
        return replace(asked, file=copy)

    def _common(self) -> list[str]:
        return ["-t", str(machine.threads()), *self.always]

    def _run(self, command: Sequence[str], ends: bool = False) -> str:
        """What it prints. ends: Refused if it does not end well, or at once by a line that says why."""
        program = [str(self.folder / command[0]), *command[1:]]
        try:
            done = subprocess.run(program, capture_output=True, timeout=self.limit, env=self.paths)
        except subprocess.TimeoutExpired:
            raise Refused(f"no answer in {self.limit} s") from None
        said = (done.stdout + b"\n" + done.stderr).decode(errors="replace")
        if done.returncode and (ends or _worst(said)):
            raise Refused(f"{_ended(done.returncode)}: {_reason(said)}")
        return said

    @contextmanager
    def _server(self, asked: Asked, flags: str) -> Iterator[Callable[[Sequence[int]], list[int]]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        n = 4 if flags == SEQUENCES else 1
        own = ["-c", str(512 * n), "-np", str(n), *self._common(), *(flags.split() if flags != SEQUENCES else ())]
        command = [str(self.folder / "llama-server"), "-m", str(asked.file), "--port", str(port), *own]
        log = asked.base.with_suffix(f".{port}.log")
        with log.open("wb") as out:
            child = subprocess.Popen(command, stdout=out, stderr=out, env=self.paths)
        where = f"http://127.0.0.1:{port}"

        def complete(prompt: Sequence[int]) -> list[int]:
            body = {"prompt": list(prompt), "n_predict": len(asked.exact[0]), "return_tokens": True, "temperature": 0}
            body |= {"cache_prompt": False, "samplers": ["top_k"], "top_k": 1}
            return _post(f"{where}/completion", body, self.limit)["tokens"]

        try:
            begun = time.monotonic()
            while not _healthy(where):
                if child.poll() is not None:
                    raise Refused(
                        f"llama-server, {_ended(child.returncode)}: {_reason(log.read_text(errors='replace'))}"
                    )
                if time.monotonic() - begun > self.limit:
                    raise Refused(f"llama-server: not ready in {self.limit} s")
                time.sleep(0.3)
            yield complete
        except (OSError, KeyError) as error:
            text = log.read_text(errors="replace")
            raise Refused(f"llama-server: {type(error).__name__} {error}: {_reason(text)}") from None
        finally:
            child.kill()
            child.wait()
            log.unlink()


class Package:
    """xllamacpp or llama-cpp-python, in this Python or another one."""

    options = tuple(PACKAGE)

    def __init__(self, python: str) -> None:
        self.python = python
        show = "from quantkit.evaluation.oracles import llama; print(llama.version() if llama.available() else '')"
        done = subprocess.run([python, "-c", show], capture_output=True, text=True, env=os.environ | _here())
        if not done.stdout.strip():
            raise click.ClickException(f"{python}: no {llama.WHEEL} and no llama-cpp-python\n{done.stderr[-500:]}")
        self.name = done.stdout.strip()

    def ask(self, asked: Asked, flags: str) -> Found:
        """With what these flags are called in Python."""
        how = PACKAGE[flags]
        tokens, exact = read_base(asked.base)
        continued = [[*prompt, *said] for prompt, said in zip(asked.prompts, asked.exact, strict=True)]
        before, sys.executable = sys.executable, self.python  # whose child the oracle is
        try:
            given = llama.logits(asked.file, tokens, **how)[:, tokens.shape[1] // 2 : -1]
            best = llama.logits(asked.file, np.array(continued), **how).argmax(-1)
        except OracleError as error:
            raise Refused(error.reason()) from None
        finally:
            sys.executable = before
        n = len(asked.prompts[0])
        return Found(*diverged(exact, given), asked.compared(best[:, n - 1 : -1].tolist()))


class Ours:
    """The engine of `quantkit run`."""

    options = ("",)

    def __init__(self, gpu: bool) -> None:
        self.device, self.name = "cuda" if gpu else "cpu", "quantkit run" + (" --device cuda" if gpu else "")

    def ask(self, asked: Asked, flags: str) -> Found:
        """As `run` opens it."""
        tokens, exact = read_base(asked.base)
        engine = open_engine(open_gguf(asked.file, self.device), 1, tokens.shape[1])
        given = np.stack([self._logits(engine, chunk.tolist())[len(chunk) // 2 : -1] for chunk in tokens])
        greedy = Sampling(temperature=0)
        said = [
            list(generate(engine, list(p), len(t), greedy)) for p, t in zip(asked.prompts, asked.exact, strict=True)
        ]
        return Found(*diverged(exact, given), asked.compared(said))

    @staticmethod
    def _logits(engine: Engine, tokens: list[int]) -> np.ndarray:
        rows: list[torch.Tensor] = []
        for at in range(0, len(tokens), engine.piece):
            engine.prefill(0, tokens[at : at + engine.piece], at, lambda part: rows.append(part.cpu().clone()))
        return torch.cat(rows).numpy()


def diverged(exact: np.ndarray, logits: np.ndarray) -> tuple[float, float]:
    """Mean KLD in nats of logits from exact log-probabilities, and percent of equal top tokens."""
    p = torch.from_numpy(exact.astype(np.float64))
    q = torch.from_numpy(logits.astype(np.float64)).log_softmax(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return float((p.exp() * (p - q)).sum(-1).mean()), 100 * float(same)


def _here() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])}


def _post(url: str, body: Mapping[str, Any], limit: int) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=limit) as answer:
        return json.load(answer)


def _healthy(where: str) -> bool:
    try:
        with urllib.request.urlopen(f"{where}/health", timeout=2) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


def _ended(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _worst(said: str) -> str:
    """The line of a log that says best what went wrong; empty if there is none."""
    lines = [re.sub(r"^[\d.]+ [EWID] ", "", line).strip() for line in said.splitlines()]
    for pattern in ("GGML_ASSERT|incompatible|requires|does not support", "unknown model|invalid", "error", "fail"):
        for line in lines:
            if re.search(pattern, line, re.IGNORECASE):
                return line
    return ""


def _reason(said: str) -> str:
    return _worst(said) or "it said nothing of it"


Results = dict[str, dict[str, dict[str, Any]]]
"""Engine -> flags -> name of a file -> `Found`."""


def question(engine: Programs | Package | Ours, asked: Asked, flags: str) -> Found:
    """A refusal is an answer."""
    try:
        return engine.ask(asked, flags)
    except (Refused, QuantkitError) as why:
        return Found(refused=str(why))


def cell(found: Mapping[str, Any] | None) -> str:
    """KLD, same top token; of the prompts how many go on as the exact weights do, where the others leave them first,
    and between tokens that are how far apart at most."""
    if not found:
        return "–"
    if found["refused"]:
        return "**refused**"
    parts = [f"{abs(found['kld']):.5f}, {found['top']:.1f} %"] if found["kld"] is not None else []
    if found["same"]:
        left = [(at, margin) for at, margin in found["same"] if margin]
        first, widest = min((at for at, _ in left), default=0), max((margin for _, margin in left), default=0)
        equal = f"{len(found['same']) - len(left)} of {len(found['same'])}"
        parts.append(equal + (f", from {first}, {widest:.2f}" if left else ""))
    if found["choices"]:
        parts.append(f"chooses {', '.join(map(str, found['choices']))} of {NEW}")
    return "; ".join(parts)


def tables(results: Results) -> str:
    """As Markdown: files by engines with default flags, flags by files of each engine, and what was refused."""
    engines, out = list(results), []
    out += [f"| file | {' | '.join(engines)} |", "|---|" + "---|" * len(engines)]
    for case in CASES:
        row = [cell(results[engine].get("", {}).get(case.name)) for engine in engines]
        out.append(f"| {case.name} | {' | '.join(row)} |")
    for engine in engines:
        if len(results[engine]) > 1:
            names = [case.name for case in WITH_OPTIONS]
            out += ["", f"| {engine} | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
            for flags, found in results[engine].items():
                out.append(f"| {flags or 'default'} | {' | '.join(cell(found.get(name)) for name in names)} |")
    return "\n".join([*out, "", *refusals(results)])


def refusals(results: Results) -> Iterator[str]:
    """A line for every engine and reason; files that are refused without flags are not named with them again."""
    for engine, by_flags in results.items():
        said: dict[str, list[str]] = {}
        for flags, files in by_flags.items():
            for name, found in files.items():
                if found["refused"] and not (flags and by_flags[""][name]["refused"]):
                    said.setdefault(found["refused"], []).append(f"{name} {flags}".strip())
        yield from (f"- {engine}: {reason} ({', '.join(names)})" for reason, names in said.items())


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--bin", "folders", multiple=True, metavar="NAME=DIR", help="Programs of llama.cpp or a fork.")
@click.option("--python", "pythons", multiple=True, help="A Python with xllamacpp or llama-cpp-python.")
@click.option("--gpu", is_flag=True, help="Everything on the GPU, and the flags that move parts of it.")
@click.option("--ours/--no-ours", default=True, help="Ask quantkit's own engine too.")
@click.option("--again", is_flag=True, help="Ask these engines once more.")
@click.option("--case", "names", multiple=True, help="Only files of these names.")
@click.option("--jobs", default=1, show_default=True, help="Questions that a folder of programs is asked at once.")
@click.option("--limit", default=300, show_default=True, help="Seconds of one answer of a program.")
def main(work: Path, folders: Sequence[str], pythons: Sequence[str], **how: Any) -> None:
    """Entry point."""
    names, gpu = how["names"], how["gpu"]
    prepare(work, names)
    engines: list[Programs | Package | Ours] = [Ours(gpu)] if how["ours"] else []
    for name, _, folder in (given.partition("=") for given in folders):
        engines.append(Programs(name, Path(folder), gpu, how["limit"]))
    engines += [Package(python) for python in pythons]
    kept = work / "engines.json"
    results: Results = json.loads(kept.read_text()) if kept.exists() else {}
    keeping = Lock()

    def answer(engine: Programs | Package | Ours, case: Case, flags: str) -> None:
        found = asdict(question(engine, Asked.load(case, work), flags))
        with keeping:
            results[engine.name][flags][case.name] = found
            kept.write_text(json.dumps(results, indent=1))
            print(f"{engine.name} | {case.name} | {flags} | {found}", file=sys.stderr, flush=True)

    for engine in engines:
        own = results.setdefault(engine.name, {})
        if how["again"]:
            own.clear()
        for flags in engine.options:
            own.setdefault(flags, {})
        with ThreadPoolExecutor(how["jobs"] if isinstance(engine, Programs) else 1) as pool:
            asked = [
                pool.submit(answer, engine, case, flags)
                for flags in engine.options
                for case in (WITH_OPTIONS if flags else CASES)
                if case.name not in own[flags] and (not names or case.name in names)
            ]
            for one in asked:
                one.result()
    print(tables(results))


if __name__ == "__main__":
    main()
