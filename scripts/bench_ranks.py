"""The one-pass job with 1, 2, 4 ... ranks: the same bytes? How much sooner? On CPUs or on as many GPUs.

    python scripts/make_synthetic.py /dev/shm/r1 --dense 1 --moe 2
    python scripts/make_synthetic.py /dev/shm/small --dense 1 --moe 2 --experts 16
    python scripts/bench_ranks.py /dev/shm/r1 --ranks 1 --ranks 2 --warm /dev/shm/small --out /dev/shm/out
    python scripts/bench_ranks.py models/tiny-r1 --ranks 1 --ranks 2 --tokens 4096 --device cpu --out /tmp/out

Each run is `scripts/bench_onepass.py` (random tokens, the real recipe and writer), started by `accelerate launch` if it
has several ranks. --warm: run a smaller model first, so that no run that counts compiles kernels.
"""

import hashlib
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import click

ONEPASS = Path(__file__).with_name("bench_onepass.py")


def run(model: Path, out: Path, n: int, more: list[str]) -> dict:
    """Figures of one run of n ranks, and the sha256 of its file, which is removed."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port),
                "--num_processes", str(n)] if n > 1 else [sys.executable]  # fmt: skip
    figures = out / "figures.json"
    subprocess.run([*launcher, str(ONEPASS), str(model), "--out", str(out), "--json", str(figures), *more], check=True)
    with (out / "synthetic.gguf").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    found = json.loads(figures.read_text()) | {"sha256": digest}
    shutil.rmtree(out)
    return found


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A scratch folder; its files are removed.")
@click.option("--ranks", "counts", type=click.IntRange(1), multiple=True, default=(1, 2), show_default=True)
@click.option("--warm", type=click.Path(exists=True, path_type=Path), default=None)
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def main(model: Path, out: Path, counts: tuple[int, ...], warm: Path | None, more: tuple[str, ...]) -> None:
    """Options that are not named here go to bench_onepass.py."""
    if warm:
        print("# warming up", flush=True)
        run(warm, out / "warm", 1, list(more))
    found = {}
    for n in counts:
        print(f"# {n} rank{'s' * (n > 1)}", flush=True)
        found[n] = run(model, out / str(n), n, list(more))
    base = found[counts[0]]
    print(f"\n{'ranks':>5} {'layers':>24} {'last layer':>16} {'whole run':>16}  sha256")
    for n, one in found.items():
        seconds = " ".join(f"{took:.1f}" for took in one["layers"])
        last, whole = (f"{b:.1f} s ({a / b:.2f} x)" for a, b in
                       ((base["layers"][-1], one["layers"][-1]), (base["whole"], one["whole"])))  # fmt: skip
        print(f"{n:>5} {seconds:>24} {last:>16} {whole:>16}  {one['sha256'][:16]}")
    same = len({one["sha256"] for one in found.values()}) == 1
    print("same bytes" if same else "THE BYTES DIFFER")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
