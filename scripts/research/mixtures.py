"""Presets of `quantkit.planning.mixtures` against llama-quantize itself, tensor by tensor.

    python scripts/research/mixtures.py LLAMA_BIN deepseek-r1 deepseek-v2-lite kimi-k2 tiny-r1

--snapshot FILE writes digests of what the program said (tests/planning/snapshots/llama-quantize.json has R1's,
V2-Lite's and V3.2's), of the tensors that a recipe has a choice in: `indexer.proj` stays F32 here, which llama-quantize
makes smaller. LLAMA_BIN: folder of llama.cpp's programs. For each model, by its geometry, and both layouts of kv_b a
sparse BF16 GGUF is written that has its header and no data, and `llama-quantize --dry-run` says what it would give each
tensor.
"""

import hashlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

import click
import numpy as np

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_layout import layout
from quantkit.formats.imatrix import save_imatrix
from quantkit.models import family
from quantkit.models.config import MLA, Mla, ModelConfig
from quantkit.models.open import open_model
from quantkit.planning import mixtures
from quantkit.planning.assign import make_plan
from quantkit.tensors import Importance, TensorSpec

LINE = re.compile(r"\] +([\w.]+) +- \[.*?\], type = +(\w+), size = .*?(?:\((\w+)\))?$")


def sparse(path: Path, config: ModelConfig, specs: list[TensorSpec], mla: Mla) -> None:
    """A BF16 file with a header and holes."""
    plan = make_plan(specs, mixtures.recipe("BF16", config, specs, mla), model="sparse")
    (file,) = layout(path, plan.tensors, family.metadata(config, mla, "sparse"), None)
    path.write_bytes(file.header)
    with open(path, "r+b") as out:
        out.truncate(file.size)


def theirs(program: Path, file: Path, imatrix: Path, name: str) -> dict[str, str]:
    """Tensor -> type, of those that are quantized."""
    command = [program, "--dry-run", "--imatrix", imatrix, file, name]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", check=False)
    found = {}
    for line in (done.stdout + done.stderr).splitlines():
        if said := LINE.search(line):
            found[said[1]] = (said[3] or said[2]).upper()
    if not found or done.returncode:
        raise click.ClickException((done.stdout + done.stderr)[-2000:])
    return found


def digest(types: dict[str, str]) -> str:
    """Of the types of all tensors that are quantized, by name."""
    lines = "".join(f"{name} {qtype}\n" for name, qtype in sorted(types.items()) if qtype != "F32")
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


@click.command()
@click.argument("binaries", type=click.Path(exists=True, path_type=Path))
@click.argument("models", nargs=-1, required=True)
@click.option("--snapshot", type=click.Path(path_type=Path), default=None)
def main(binaries: Path, models: tuple[str, ...], snapshot: Path | None) -> None:
    """Say how many tensors of how many presets agree; the first that do not."""
    wrong, said = 0, dict[str, dict[str, str]]()
    for model in models:
        config = family.from_hf(open_model(model).config)
        for mla in MLA:
            try:
                specs = family.specs(config, MLA[mla])
            except QuantkitError:
                continue
            with tempfile.TemporaryDirectory(dir=".") as folder:
                file, imatrix = Path(folder, "sparse.gguf"), Path(folder, "imatrix.gguf")
                sparse(file, config, specs, MLA[mla])
                entry = Importance(np.ones((1, config.d), np.float32), np.ones(1, np.float32))
                save_imatrix(
                    imatrix, {"blk.0.attn_output.weight": entry}, datasets=["none"], chunk_count=1, chunk_size=1
                )
                for name in mixtures.BASE:
                    plan = make_plan(specs, mixtures.recipe(name, config, specs, MLA[mla]))
                    found = theirs(binaries / "llama-quantize", file, imatrix, name)
                    ours = {t.name: t.qtype for t in plan.tensors if len(t.shape) > 1 and t.rule}
                    chosen = {key: qtype for key, qtype in found.items() if key in ours}
                    said.setdefault(f"{model} {mla}", {})[name] = digest(chosen)
                    different = {key: (ours[key], found.get(key)) for key in ours if found.get(key) != ours[key]}
                    wrong += len(different)
                    agree = f"{len(ours) - len(different)} of {len(ours)} agree"
                    click.echo(f"{model} {mla} {name}: {agree} {dict(list(different.items())[:4]) or ''}")
    if snapshot:
        snapshot.write_text(json.dumps(said, indent=1) + "\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
