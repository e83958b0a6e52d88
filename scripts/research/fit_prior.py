"""The tables of quantkit/planning/prior.py from measured sensitivities.

python scripts/research/fit_prior.py tiny/sensitivity.json other/sensitivity.json

Least squares on log KLD = log gain of the tensor + log error of the type (Q4_K: 1), over entries above twice their
standard error. A role's gain is the sum over its tensors, and over models the geometric mean.
"""

import math
from collections import defaultdict
from pathlib import Path

import click
import numpy as np

from quantkit.codecs.types import QTYPES
from quantkit.formats.sensitivity import Sensitivity


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(files):
    """Fit and print."""
    rows = [
        (path, entry)
        for path in files
        for entry in Sensitivity.load(path).entries
        if entry.kld > max(2e-5, 2 * entry.kld_error)
    ]
    tensors = sorted({(str(path), entry.role, entry.tensor) for path, entry in rows})
    types = [name for name in QTYPES if any(entry.qtype == name for _, entry in rows)]
    design, target = np.zeros((len(rows) + 1, len(tensors) + len(types))), np.zeros(len(rows) + 1)
    at = {tensor: i for i, tensor in enumerate(tensors)} | {t: len(tensors) + i for i, t in enumerate(types)}
    for i, (path, entry) in enumerate(rows):
        design[i, at[str(path), entry.role, entry.tensor]] = design[i, at[entry.qtype]] = 1
        target[i] = math.log(entry.kld)
    design[-1, at["Q4_K"]] = 1  # fixes the scale: its error is 1
    found = np.linalg.lstsq(design, target, rcond=None)[0]
    rest = float(np.sqrt(np.mean((design @ found - target) ** 2)))
    click.echo(f"{len(rows)} entries, rms of what the model leaves of log KLD: {rest:.3f}")
    click.echo("ERROR " + "  ".join(f"{name} {math.exp(found[at[name]]):.3g}" for name in types))
    gains: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for tensor in tensors:
        gains[tensor[1]][tensor[0]] += math.exp(found[at[tensor]])
    for role, by_file in gains.items():
        mean = math.exp(np.mean([math.log(gain) for gain in by_file.values()]))
        click.echo(f"{role:<16} {mean:.5f}   " + "  ".join(f"{by_file.get(str(p), 0):.5f}" for p in files))


if __name__ == "__main__":
    main()
