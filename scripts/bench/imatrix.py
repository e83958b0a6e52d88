"""`quantkit calibrate` against llama-imatrix: wall time and peak RSS on the same tokens, alternating in one run.

    convert_hf_to_gguf.py MODEL --outtype bf16 --outfile MODEL.gguf
    python scripts/bench/imatrix.py MODEL MODEL.gguf calib.txt --llama-imatrix PATH --chunks 120 --runs 3

Both use --threads threads and read the first chunks of the text. quantkit reads the FP8 checkpoint; its peer needs the
BF16 file, whose conversion is not counted. Startup of the interpreter is.
"""

import resource
import statistics
import sys
import tempfile
from pathlib import Path

import click
from make import first_chunks, measure


@click.command(help=__doc__.split("\n\n")[0])
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cut = first_chunks(model, text, chunks, folder)
        ours = [sys.executable, "-m", "quantkit", "calibrate", model, "--data", cut, "--tokens", chunks * 512]
        ours += ["--device", "cpu", "--restart", "-o", folder / "ours.gguf"]
        theirs = [llama_imatrix, "-m", gguf, "-f", cut, "-o", folder / "theirs.gguf", "-c", 512, "--chunks", chunks]
        theirs += ["-t", threads, "-ngl", 0]
        results: dict[str, list[tuple[float, float]]] = {"quantkit": [], "llama-imatrix": []}
        for run in range(runs):
            for side, command in (("quantkit", ours), ("llama-imatrix", theirs)):
                cost = measure(list(map(str, command)), threads, folder / f"{side}.log")
                results[side].append((cost.seconds, cost.largest / 1e9))
                print(f"run {run + 1}: {side:14s} {cost.seconds:7.1f} s  {cost.largest / 1e9:6.3f} GB", flush=True)
    middle = {side: [statistics.median(column) for column in zip(*rows, strict=True)] for side, rows in results.items()}
    wall, rss = (a / b for a, b in zip(middle["quantkit"], middle["llama-imatrix"], strict=True))
    print(f"quantkit / llama-imatrix: wall {wall:.2f}, peak RSS {rss:.2f}")


if __name__ == "__main__":
    main()
