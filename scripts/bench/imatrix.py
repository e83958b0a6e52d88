"""`quantkit calibrate` against llama-imatrix: wall time and peak RSS on the same tokens, alternating in one run.

    convert_hf_to_gguf.py MODEL --outtype bf16 --outfile MODEL.gguf
    python scripts/bench/imatrix.py MODEL MODEL.gguf calib.txt --llama-imatrix PATH --chunks 120 --runs 3

Both use --threads threads. quantkit reads the FP8 checkpoint; its peer needs the BF16 file, whose conversion is not
counted. Startup of the interpreter is.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click


def measured(command: list[str], threads: int) -> tuple[float, float]:
    """Wall seconds and peak RSS in GB of a child; its output is shown only if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            sys.exit(f"{command[0]} failed:\n{log.read().decode(errors='replace')[-2000:]}")
    return time.perf_counter() - started, usage.ru_maxrss / 1e6


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("gguf", type=click.Path(exists=True, path_type=Path))
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--llama-imatrix", required=True, type=click.Path(exists=True))
@click.option("--chunks", default=120, show_default=True)
@click.option("--runs", default=3, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(model: Path, gguf: Path, text: Path, llama_imatrix: str, chunks: int, runs: int, threads: int) -> None:
    """Print each run, then the medians and their ratios."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as folder:
        ours = [
            sys.executable,
            "-m",
            "quantkit",
            "calibrate",
            str(model),
            "--data",
            str(text),
            "--tokens",
            str(chunks * 512),
            "--from-start",
            "--device",
            "cpu",
            "--restart",
            "-o",
            f"{folder}/ours.gguf",
        ]
        theirs = [
            llama_imatrix,
            "-m",
            str(gguf),
            "-f",
            str(text),
            "-o",
            f"{folder}/theirs.gguf",
            "-c",
            "512",
            "--chunks",
            str(chunks),
            "-t",
            str(threads),
            "-ngl",
            "0",
        ]
        results: dict[str, list[tuple[float, float]]] = {"quantkit": [], "llama-imatrix": []}
        for run in range(runs):
            for name, command in (("quantkit", ours), ("llama-imatrix", theirs)):
                wall, rss = measured(command, threads)
                results[name].append((wall, rss))
                print(f"run {run + 1}: {name:14s} {wall:7.1f} s  {rss:6.3f} GB", flush=True)
    middle = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in results.items()}
    wall, rss = (a / b for a, b in zip(middle["quantkit"], middle["llama-imatrix"], strict=True))
    print(f"quantkit / llama-imatrix: wall {wall:.2f}, peak RSS {rss:.2f}")


if __name__ == "__main__":
    main()
