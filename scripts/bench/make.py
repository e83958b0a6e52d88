"""`quantkit make` against llama.cpp's three tools: wall time and peak memory of the whole process tree.

    python scripts/bench/make.py CHECKPOINT TEXT --llama-bin llama.cpp/build/bin \\
        --converter llama.cpp/convert_hf_to_gguf.py --repeat 3

Both sides read the same checkpoint, measure importance on the same first chunks of the text, and write a file of the
same types with the same number of threads. llama.cpp's side is convert_hf_to_gguf (BF16), llama-imatrix and
llama-quantize, one after the other; ours is `quantkit make --no-verify`. Runs alternate, and ratios are taken pair by
pair. Memory is sampled over the process tree (the sum of resident sets, which counts shared pages once a process, and
of proportional sets, which counts them once); `largest` is the kernel's own peak of the biggest single process.
The converter needs `transformers` in the Python that --converter-python names.
"""

import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
from tokenizers import Tokenizer

CHUNK = 512  # tokens, on both sides
SAMPLE_SECONDS = 0.02
PAGE = os.sysconf("SC_PAGE_SIZE")
# llama.cpp's converter knows tokenizers by a hash of what they make of a test string; a newly trained one is unknown.
CONVERT = """
import runpy, sys
from pathlib import Path
folder = Path(sys.argv[1]).parent
sys.path[:0] = [str(folder), str(folder / "gguf-py")]
try:
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
except ImportError:
    pass
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Cost:
    """seconds of wall time; cpu: seconds of all threads, which other load on the machine disturbs less; rss, pss: peak
    bytes of the process tree; largest: peak bytes of its biggest process."""

    seconds: float
    cpu: float
    rss: int
    pss: int
    largest: int


class Watch(threading.Thread):
    """Samples the memory of a process and all its descendants until it is told to stop."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.rss, self.pss, self.done = pid, 0, 0, threading.Event()

    def run(self) -> None:
        turn = 0
        while not self.done.wait(SAMPLE_SECONDS):
            pids = tree(self.pid)
            self.rss = max(self.rss, sum(map(resident, pids)))
            if turn % 10 == 0:  # smaps_rollup walks page tables: too slow for every sample
                self.pss = max(self.pss, sum(map(proportional, pids)))
            turn += 1


def tree(pid: int) -> list[int]:
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        for task in Path(f"/proc/{found[-1]}/task").glob("*/children"):
            try:
                waiting += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def proportional(pid: int) -> int:
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def measure(command: list[str], threads: int, log: Path, stdout: Path | None = None) -> Cost:
    """Run to the end. stdout: its own file, where lines must not be broken by what goes to stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    begin = time.perf_counter()
    with log.open("ab") as err, (stdout or log).open("ab") as out:
        child = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment)
        watch = Watch(child.pid)
        watch.start()
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begin
    watch.done.set()
    watch.join()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise click.ClickException(f"{command[0]} failed:\n{log.read_text(errors='replace')[-2000:]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, watch.rss, watch.pss, usage.ru_maxrss * 1024)


def together(costs: list[Cost]) -> Cost:
    """Steps that run one after the other."""
    peaks = (max(getattr(cost, key) for cost in costs) for key in ("rss", "pss", "largest"))
    return Cost(sum(cost.seconds for cost in costs), sum(cost.cpu for cost in costs), *peaks)


@dataclass(frozen=True)
class Job:
    """What both sides are asked to do. target: llama.cpp, or llama.cpp/combined."""

    checkpoint: Path
    text: Path
    chunks: int
    recipe: str
    target: str
    encoder: str
    threads: int

    def quantkit(self, command: str, *options: object) -> list[str]:
        """A command line of ours with the model, the recipe and the target."""
        fixed = [command, self.checkpoint, "--recipe", self.recipe, "--target", self.target]
        return [sys.executable, "-m", "quantkit", *map(str, [*fixed, *options])]


def first_chunks(checkpoint: Path, text: Path, n_chunks: int, folder: Path) -> Path:
    """A file with the first n_chunks * 512 tokens of the text and less than a chunk more: both sides read all of it.
    Cut in a child: a process starts with its parent's peak."""
    out = folder / "first-chunks.txt"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(cut, (checkpoint / "tokenizer.json", text, n_chunks * CHUNK + CHUNK // 4, out))
    return out


def cut(tokenizer: Path, text: Path, n_tokens: int, out: Path) -> None:
    """Write the characters of the first tokens."""
    whole = text.read_text(encoding="utf-8")
    found = Tokenizer.from_file(str(tokenizer)).encode(whole, add_special_tokens=False)
    out.write_text(whole[: found.offsets[n_tokens][0]] if n_tokens < len(found.ids) else whole, encoding="utf-8")


def ours(job: Job, folder: Path) -> dict[str, Cost]:
    text = ["--data", job.text, "--tokens", job.chunks * CHUNK, "--encoder", job.encoder]
    more = ["--threads", job.threads, "--device", "cpu", "--no-verify", "--output", folder / "ours"]
    return {"make": measure(job.quantkit("make", *text, *more), job.threads, folder / "ours.log")}


def types_file(job: Job, folder: Path) -> Path:
    """The recipe's types in llama-quantize's own words. Planned in a child: a process starts with its parent's peak."""
    plan, path = folder / "plan.json", folder / "types.txt"
    subprocess.run(job.quantkit("plan", "--output", plan), check=True, stdout=subprocess.DEVNULL)
    tensors = [t for t in json.loads(plan.read_text())["tensors"] if len(t["shape"]) > 1]
    path.write_text("".join(f"^{re.escape(t['name'])}$={t['qtype'].lower()}\n" for t in tensors))
    return path


def theirs(job: Job, folder: Path, tools: dict[str, str], types: Path) -> dict[str, Cost]:
    plain, imatrix, log, threads = folder / "plain.gguf", folder / "imatrix.gguf", folder / "theirs.log", job.threads
    convert = [tools["python"], "-c", CONVERT, tools["converter"], job.checkpoint, "--outtype", "bf16"]
    measured = [tools["llama-imatrix"], "-m", plain, "-f", job.text, "-o", imatrix, "-c", CHUNK]
    quantize = [tools["llama-quantize"], "--imatrix", imatrix, "--tensor-type-file", types, plain]
    steps: dict[str, list[object]] = {
        "convert": [*convert, "--outfile", plain],
        "imatrix": [*measured, "--chunks", job.chunks, "--no-ppl", "-t", threads],
        "quantize": [*quantize, folder / "theirs.gguf", "Q8_0", threads],
    }
    return {name: measure([str(part) for part in step], threads, log) for name, step in steps.items()}


def row(name: str, cost: Cost) -> str:
    megabytes = "".join(f"{size / 1e6:>10.0f}" for size in (cost.rss, cost.pss, cost.largest))
    return f"{name:<12}{cost.seconds:>9.1f}{cost.cpu:>9.1f}{megabytes}"


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--llama-bin", required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--converter", required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--converter-python", default=sys.executable, show_default=True)
@click.option("--recipe", default="1.58bit", show_default=True)
@click.option("--target", default="llama.cpp", show_default=True, help="Or llama.cpp/combined.")
@click.option("--encoder", default="ggml", show_default=True, help="ggml: llama.cpp's own encoders, on both sides.")
@click.option("--chunks", default=120, show_default=True)
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--repeat", default=3, show_default=True)
def main(checkpoint, text, llama_bin, converter, converter_python, recipe, target, encoder, chunks, threads, repeat):
    tools = {"converter": converter, "python": converter_python}
    for name in ("llama-imatrix", "llama-quantize"):
        tools[name] = shutil.which(name, path=llama_bin)
        if not tools[name]:
            raise click.ClickException(f"no {name} in {llama_bin}")
    ratios: dict[str, list[float]] = {key: [] for key in ("seconds", "cpu", "rss", "pss", "largest")}
    print(f"{checkpoint.name}, {recipe}, {chunks} x {CHUNK} tokens, {threads} threads, {repeat} pairs")
    for turn in range(repeat):
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            start = first_chunks(checkpoint, text, chunks, folder)
            job = Job(checkpoint, start, chunks, recipe, target, encoder, threads)
            types = types_file(job, folder)
            sides: list[Callable[[], dict[str, Cost]]] = [partial(ours, job, folder)]
            sides.append(partial(theirs, job, folder, tools, types))
            results = {i: sides[i]() for i in ((0, 1) if turn % 2 == 0 else (1, 0))}
        us, them = together(list(results[0].values())), together(list(results[1].values()))
        print(f"\npair {turn + 1}, load {load:.1f} before")
        print(f"{'':<12}{'seconds':>9}{'CPU s':>9}{'RSS MB':>10}{'PSS MB':>10}{'largest':>10}")
        for name, cost in (results[1] | {"llama.cpp": them, "quantkit": us}).items():
            print(row(name, cost), flush=True)
        for key, values in ratios.items():
            values.append(getattr(us, key) / max(1, getattr(them, key)))
    print("\nquantkit / llama.cpp, median of pairs")
    for key, values in ratios.items():
        print(f"{key:<12}{statistics.median(values):9.2f}   ({', '.join(f'{value:.2f}' for value in values)})")


if __name__ == "__main__":
    main()
