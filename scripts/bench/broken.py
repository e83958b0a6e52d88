"""Files broken on purpose, and what `certify` and `evaluate` say of each: a table.

    quantkit make --recipe 1.58bit --target ktransformers --no-verify
    python scripts/bench/broken.py tiny-r1-1.58bit/tiny-r1-1.58bit.gguf

The ways to break one are those of tests/evaluation/mutations.py. `certify` runs no other program here; the table has
what it says of the check that should fail, and which others failed too. `evaluate` writes 119 continuations of 40
tokens.
"""

import sys
import tempfile
from pathlib import Path

import click
from click.testing import CliRunner

from quantkit.__main__ import main as quantkit
from quantkit.evaluation.certify import certify
from quantkit.formats.checkpoint import Checkpoint
from quantkit.models.open import open_model

sys.path.append(str(Path(__file__).parents[2] / "tests" / "evaluation"))
from mutations import MUTATIONS, Model

EVALUATED = ("a file that loops", "dropped experts")
AMOUNT = ("-n", "16", "--tokens", "40", "-c", "256", "--device", "cpu", "--parallel", "16")


def evaluated(file: Path, reference: str) -> str:
    """What `evaluate` finds worse than the original, a line each."""
    out = file.with_suffix(".json")
    done = CliRunner().invoke(quantkit, ["evaluate", str(file), "--reference", reference, *AMOUNT, "--json", str(out)])
    worse = [line.removeprefix("worse: ") for line in done.output.splitlines() if line.startswith("worse: ")]
    return "<br>".join(worse) or "nothing"


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--reference", default="tiny-r1", show_default=True)
def main(file: Path, reference: str) -> None:
    """Entry point."""
    original, missed = open_model(reference), []
    assert isinstance(original, Checkpoint)
    print("| what is broken | check | what it says | also failed | `evaluate` |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, (change, check, says)) in enumerate(MUTATIONS.items()):
            model = Model(file)
            change(model)
            broken = model.write(Path(folder, f"{i}.gguf"))
            made = certify(broken, "ktransformers", original, oracle=False)
            failed = {one.name: one.detail for one in made.checks if one.status == "fail"}
            detail = failed.pop(check, "")
            if says not in detail:
                missed.append(name)
            behaviour = evaluated(broken, reference) if name in EVALUATED else ""
            first = detail.split("; ")[0].replace("|", "\\|")
            print(f"| {name} | {check} | {first or '**missed**'} | {', '.join(failed)} | {behaviour} |", flush=True)
            broken.unlink()
    print(f"\n{len(MUTATIONS)} ways, {len(missed)} missed{': ' + ', '.join(missed) if missed else ''}")


if __name__ == "__main__":
    main()
