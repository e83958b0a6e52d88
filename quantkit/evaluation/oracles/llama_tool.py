"""llama-perplexity of a llama.cpp that was built for this machine, as an oracle.

A wheel's library is compiled for any x86 CPU of the last ten years; a build by `-DGGML_NATIVE=ON`, or the variant that
a release loads, may multiply by other kernels in another layout of the weights. Asked is the tool and not its library,
whose structs change between builds: `--kl-divergence-base FILE` leaves tokens and log-probabilities, 16 bits each
(b11434, tools/perplexity/perplexity.cpp).
"""

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.evaluation.oracles.child import OracleError, run_program

FOLDER = "QUANTKIT_LLAMA_BIN"  # an environment variable: where a build's programs lie
PROGRAM = "llama-perplexity"
TIMEOUT, STARTS = 3600, 60  # s to answer; to say what it is
IK = "--mla-use"  # an option of ik_llama.cpp's program of the same name
MAGIC = b"_logits_"
WIDEST = ("AMX_INT8", "AVX512_BF16", "AVX512_VNNI", "AVX512", "AVX_VNNI", "AVX2", "AVX", "SVE", "DOTPROD", "NEON")
"""What llama.cpp says that its CPU kernels were compiled for, the fastest first."""


@dataclass(frozen=True)
class Build:
    """A llama-perplexity that starts. version: number, commit and compiler."""

    path: Path
    version: str


@dataclass(frozen=True)
class Scored:
    """tokens: int64 [n]. log_probs: float32 [n - 1 - n // 2, n_vocab], after tokens n // 2 to n - 2; those under e^-16
    of the likeliest are raised to it. cpu: variant of its kernels."""

    tokens: np.ndarray
    log_probs: np.ndarray
    cpu: str


def program() -> Build | None:
    """llama-perplexity of the folder in QUANTKIT_LLAMA_BIN, else of PATH; None if PATH has none.

    QuantkitError if that folder has none, or if what is found does not start or is not llama.cpp's: a fault of the
    program, of which no file can be accused.
    """
    folder = os.environ.get(FOLDER)
    found = shutil.which(PROGRAM, path=folder or None)
    if not found:
        if folder:
            raise QuantkitError(f"{FOLDER}={folder}: no {PROGRAM} there that can be executed")
        return None
    try:
        said, options = (run_program([found, word], PROGRAM, STARTS, {}) for word in ("--version", "--help"))
    except OracleError as error:
        raise QuantkitError(f"{found} does not start: {error.reason()}") from None
    if IK in options:
        raise QuantkitError(f"{found} is ik_llama.cpp's, which computes otherwise; set {FOLDER} to one of llama.cpp")
    return Build(Path(found), build_of(said))


def widest(system_info: str) -> str:
    """`AVX2` of llama.cpp's `CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | REPACK = 1`; `plain` if nothing is said."""
    has = set(re.findall(r"(\w+) = 1\b", system_info))
    return next((name for name in WIDEST if name in has), "plain")


def score(where: Build, model: Path, text: str, n: int, *, flags: str, n_threads: int) -> Scored:
    """The first n tokens of a text that has twice as many, by the CPU alone. flags: as on its command line.

    OracleError if it dies, IllegalInstruction if it was built for another CPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        given, answer = work / "text.txt", work / "logits"
        given.write_text(text, encoding="utf-8")
        said = run_program(
            [
                *[str(where.path.resolve()), "-m", str(model.resolve()), "-f", str(given)],
                *["--kl-divergence-base", str(answer), "-c", str(n), "-b", str(n), "--chunks", "1"],
                *["-t", str(n_threads), "-ngl", "0", "-dev", "none"],
                *flags.split(),
            ],
            PROGRAM,
            TIMEOUT,
            {"GGML_NO_BACKTRACE": "1"},  # a debugger would be attached to what aborts
            work,  # ik_llama.cpp's and older ones leave a llama.log
        )
        tokens, log_probs = _read(answer, n)
    return Scored(tokens, log_probs, cpu_of(said))


def _read(path: Path, n: int) -> tuple[np.ndarray, np.ndarray]:
    tokens, log_probs = read_base(path)
    if tokens.shape != (1, n):
        raise OracleError(f"{PROGRAM} left no log-probabilities of {n} tokens")
    return tokens[0], log_probs[0]


def read_base(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int64 [n_chunk, t] and log-probabilities float32 [n_chunk, t - 1 - t // 2, n_vocab] of a file as
    `--kl-divergence-base` has them; no chunks if it is not there, cut short or none."""
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    t, n_vocab, n_chunk = np.frombuffer(data[:20].ljust(20, b"\0"), "<i4", 3, len(MAGIC)).tolist()
    rows, width = t - 1 - t // 2, 2 * ((n_vocab + 1) // 2) + 4
    whole = data[:8] == MAGIC and min(t, n_vocab, n_chunk) > 0
    if not whole or len(data) < 20 + n_chunk * (4 * t + 2 * width * rows):
        return np.empty((0, 0), np.int64), np.empty((0, 0, 0), np.float32)
    tokens = np.frombuffer(data, "<i4", n_chunk * t, 20).reshape(n_chunk, t)
    packed = np.frombuffer(data, "<u2", n_chunk * rows * width, 20 + tokens.nbytes).reshape(n_chunk, rows, width)
    scale, least = np.split(np.ascontiguousarray(packed[..., :4]).view("<f4"), 2, -1)
    return tokens.astype(np.int64), (packed[..., 4 : 4 + n_vocab] * scale + least).astype(np.float32)


def build_of(said: str) -> str:
    """Of `--version`: `0.6.0-dev (build 11434, commit 0c1e570), GNU 12.2.0`."""
    version, compiler = (
        re.search(r"^version: (.+)$", said, re.MULTILINE),
        re.search(r"^built with (.+?) for ", said, re.M),
    )
    return ", ".join(found[1] for found in (version, compiler) if found) or "of unknown build"


def cpu_of(said: str) -> str:
    """Of what a run prints: the variant that it loaded, if it has several, and the fastest kernels compiled in."""
    variant = re.search(r"loaded CPU backend from \S*libggml-cpu-(\w+)", said)
    info = re.search(r"system_info: .*", said)
    cpu = widest(info[0]) if info else "plain"
    return f"{variant[1]}: {cpu}" if variant else cpu
