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

from quantkit.evaluation.oracles.child import OracleError, run_program

FOLDER = "QUANTKIT_LLAMA_BIN"  # an environment variable: where a build's programs lie
PROGRAM = "llama-perplexity"
TIMEOUT = 3600
MAGIC = b"_logits_"
WIDEST = ("AMX_INT8", "AVX512_BF16", "AVX512_VNNI", "AVX512", "AVX_VNNI", "AVX2", "AVX", "SVE", "DOTPROD", "NEON")
"""What llama.cpp says that its CPU kernels were compiled for, the fastest first."""


@dataclass(frozen=True)
class Scored:
    """tokens: int64 [n]. log_probs: float32 [n - 1 - n // 2, n_vocab], after tokens n // 2 to n - 2; those under e^-16
    of the likeliest are raised to it. build: its number, commit and compiler. cpu: variant of its kernels."""

    tokens: np.ndarray
    log_probs: np.ndarray
    build: str
    cpu: str


def program() -> Path | None:
    """llama-perplexity of the folder in QUANTKIT_LLAMA_BIN, else of PATH; None if there is none."""
    found = shutil.which(PROGRAM, path=os.environ.get(FOLDER))
    return Path(found) if found else None


def widest(system_info: str) -> str:
    """`AVX2` of llama.cpp's `CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | REPACK = 1`; `plain` if nothing is said."""
    has = set(re.findall(r"(\w+) = 1\b", system_info))
    return next((name for name in WIDEST if name in has), "plain")


def score(where: Path, model: Path, text: str, n: int, *, flags: str, n_threads: int) -> Scored:
    """The first n tokens of a text that has twice as many, by the CPU alone. flags: as on its command line.

    OracleError if it dies, IllegalInstruction if it was built for another CPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        given, answer = work / "text.txt", work / "logits"
        given.write_text(text, encoding="utf-8")
        said = run_program(
            [
                *[str(where.resolve()), "-m", str(model.resolve()), "-f", str(given)],
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
        version = run_program([str(where.resolve()), "--version"], PROGRAM, TIMEOUT, {}, work)
    return Scored(tokens, log_probs, build_of(version), cpu_of(said))


def _read(path: Path, n: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    rows = n - 1 - n // 2
    n_ctx, n_vocab, n_chunk = np.frombuffer(data[:20].ljust(20, b"\0"), "<i4", 3, len(MAGIC)).tolist()
    width = 2 * ((n_vocab + 1) // 2) + 4
    if data[:8] != MAGIC or (n_ctx, n_chunk) != (n, 1) or len(data) < 20 + 4 * n + 2 * width * rows:
        raise OracleError(f"{PROGRAM} left no log-probabilities of {n} tokens")
    tokens = np.frombuffer(data, "<i4", n, 20).astype(np.int64)
    packed = np.frombuffer(data, "<u2", rows * width, 20 + 4 * n).reshape(rows, width)
    scale, least = np.ascontiguousarray(packed[:, :4]).view("<f4").T
    return tokens, (packed[:, 4 : 4 + n_vocab] * scale[:, None] + least[:, None]).astype(np.float32)


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
