"""`quantkit verify` against llama-perplexity's two passes: same figures? wall time, CPU time and memory of both.

    python scripts/bench/perplexity.py CHECKPOINT ORIGINAL-bf16.gguf FILE.gguf TEXT --llama-bin llama.cpp/build/bin

Same chunks of 512 tokens from the start of the text, second half of each scored. The peer runs the original's GGUF and
writes its logits (--kl-divergence-base), then the file against them (--kl-divergence); quantkit reads the checkpoint
and the file once. Sides alternate; ratios are taken pair by pair. scripts/bench/make.py says how memory is measured.
"""

import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import click
from make import CHUNK, Cost, first_chunks, measure, row, together

PATTERNS = {
    "ppl": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
    "ppl_reference": r"Mean PPL\(base\)\s*:\s*([\d.]+)",
    "kld_mean": r"Mean\s+KLD:\s*([\d.]+)",
    "kld_median": r"Median\s+KLD:\s*([\d.]+)",
    "kld_p99": r"99\.0%\s+KLD:\s*([\d.]+)",
    "rms_dp": r"RMS Δp\s*:\s*([\d.]+)",
    "top1_agreement": r"Same top p:\s*([\d.]+)",
}


def peer(
    tool: str, original: Path, file: Path, text: Path, chunks: int, threads: int, folder: Path
) -> tuple[dict[str, Cost], dict[str, float], int]:
    """Costs of both passes, the figures that they print, and the bytes of the logits between them."""
    log, said, logits = folder / "peer.log", folder / "peer.out", folder / "base.kld"
    common = [tool, "-f", text, "-c", CHUNK, "--chunks", chunks, "-t", threads, "--kl-divergence-base", logits]
    steps = {"base": [*common, "-m", original], "quantized": [*common, "-m", file, "--kl-divergence"]}
    costs = {name: measure([str(part) for part in step], threads, log, said) for name, step in steps.items()}
    found = said.read_text(errors="replace")
    figures = {key: re.findall(pattern, found) for key, pattern in PATTERNS.items()}
    # On a busy machine llama-perplexity may end before its logging thread has written the last lines.
    figures = {key: float(values[-1]) for key, values in figures.items()} if all(figures.values()) else {}
    return costs, figures, logits.stat().st_size


def ours(
    checkpoint: Path, file: Path, text: Path, chunks: int, threads: int, folder: Path
) -> tuple[dict[str, Cost], dict[str, float]]:
    out = folder / "verify.json"
    command = [sys.executable, "-m", "quantkit", "verify", file, "--reference", checkpoint, "--data", text]
    command += ["--tokens", CHUNK * chunks, "--device", "cpu", "--json", out]
    cost = measure([str(part) for part in command], threads, folder / "ours.log")
    return {"verify": cost}, json.loads(out.read_text())


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("original", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--llama-bin", required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--chunks", default=200, show_default=True)
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--repeat", default=3, show_default=True)
def main(checkpoint, original, file, text, llama_bin, chunks, threads, repeat):
    tool = shutil.which("llama-perplexity", path=llama_bin)
    if not tool:
        raise click.ClickException(f"no llama-perplexity in {llama_bin}")
    ratios: dict[str, list[float]] = {key: [] for key in ("seconds", "cpu", "rss", "pss")}
    shown = False
    for turn in range(repeat):
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            job = (first_chunks(checkpoint, text, chunks, folder), chunks, threads, folder)
            if turn % 2 == 0:
                (mine, figures), (theirs, peers, size) = ours(checkpoint, file, *job), peer(tool, original, file, *job)
            else:
                (theirs, peers, size), (mine, figures) = peer(tool, original, file, *job), ours(checkpoint, file, *job)
        us, them = together(list(mine.values())), together(list(theirs.values()))
        if peers and not shown:
            shown = True
            print(
                f"{checkpoint.name}, {file.name}, {chunks} x {CHUNK} tokens, {threads} threads; logits {size:,} bytes"
            )
            print(f"{'':<16}{'peer':>12}{'quantkit':>12}{'difference':>12}")
            for key, value in peers.items():
                print(f"{key:<16}{value:>12.6g}{figures[key]:>12.6g}{difference(key, value, figures[key]):>12}")
        print(f"\npair {turn + 1}, load {load:.1f} before")
        print(f"{'':<12}{'seconds':>9}{'CPU s':>9}{'RSS MB':>10}{'PSS MB':>10}{'largest':>10}")
        for label, cost in (theirs | {"peer": them, "quantkit": us}).items():
            print(row(label, cost), flush=True)
        add(ratios, us, them)
    print("\nquantkit / peer, median of pairs")
    for key, values in ratios.items():
        print(f"{key:<12}{statistics.median(values):9.2f}   ({', '.join(f'{value:.2f}' for value in values)})")


def difference(key: str, theirs: float, ours: float) -> str:
    return f"{ours - theirs:+.2f} points" if key == "top1_agreement" else f"{100 * (ours / theirs - 1):+.2f} %"


def add(ratios: dict[str, list[float]], us: Cost, them: Cost) -> None:
    for key, values in ratios.items():
        values.append(getattr(us, key) / max(1, getattr(them, key)))


if __name__ == "__main__":
    main()
