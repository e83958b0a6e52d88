"""The one-pass job with 1, 2, 4 ... ranks: the same bytes? How much sooner? On CPUs or on as many GPUs.

    python scripts/bench/synthetic.py /dev/shm/r1 --dense 1 --moe 2
    python scripts/bench/ranks.py /dev/shm/r1 --ranks 1 --ranks 2 --warm --out /dev/shm/out
    python scripts/bench/ranks.py models/tiny-r1 --ranks 1 --ranks 2 --tokens 4096 --device cpu --out /tmp/out

Each run is `scripts/bench/onepass.py` (random tokens, the real recipe and writer), started by `accelerate launch` if it
has several ranks, which share the cores. --warm: a run before the others, whose time does not count, because it
compiles kernels. A number of ranks may be repeated, to see whether one number always gives the same bytes.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import click

from quantkit.formats.gguf_reader import GGUFFile

ONEPASS = Path(__file__).with_name("onepass.py")


def run(model: Path, out: Path, n: int, more: list[str]) -> dict:
    """Figures of one run of n ranks, and the sha256 of its file, whole and by tensor. The file is removed."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable]
    if n > 1:
        fixed = "--multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
        cores = max(1, (os.cpu_count() or 1) // n)
        shares = f"--main_process_port {port} --num_processes {n} --num_cpu_threads_per_process {cores}"
        launcher += ["-m", "accelerate.commands.launch", *f"{fixed} {shares}".split()]
    figures = out / "figures.json"
    subprocess.run([*launcher, str(ONEPASS), str(model), "--out", str(out), "--json", str(figures), *more], check=True)
    with (out / "synthetic.gguf").open("rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest()
    made = GGUFFile.open(out / "synthetic.gguf")
    tensors = {name: hashlib.sha256(made.data(name)).hexdigest() for name in made.tensors}
    found = json.loads(figures.read_text()) | {"ranks": n, "sha256": whole, "tensors": tensors}
    shutil.rmtree(out)
    return found


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A scratch folder; its files are removed.")
@click.option("--ranks", "counts", type=click.IntRange(1), multiple=True, default=(1, 2), show_default=True)
@click.option("--warm", is_flag=True, help="Run the first number once more before.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def main(model: Path, out: Path, counts: tuple[int, ...], warm: bool, more: tuple[str, ...]) -> None:
    """Options that are not named here go to scripts/bench/onepass.py."""
    found = []
    for n in (*counts[:warm], *counts):
        print(f"# {n} rank{'s' * (n > 1)}", flush=True)
        found.append(run(model, out / str(n), n, list(more)))
    base = found[int(warm)]
    print(f"\n{'ranks':>5} {'seconds a layer':>24} {'last layer':>16} {'whole run':>18}  sha256")
    for one in found:
        layers = " ".join(f"{took:.1f}" for took in one["layers"])
        last = f"{one['layers'][-1]:.1f} s ({base['layers'][-1] / one['layers'][-1]:.2f} x)"
        whole = f"{one['whole']:.1f} s ({base['whole'] / one['whole']:.2f} x)"
        print(f"{one['ranks']:>5} {layers:>24} {last:>16} {whole:>18}  {one['sha256'][:16]}")
    differ = [name for name in base["tensors"] if any(one["tensors"][name] != base["tensors"][name] for one in found)]
    print(f"{len(differ)} TENSORS DIFFER: {', '.join(differ[:8])}" if differ else "same bytes")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
