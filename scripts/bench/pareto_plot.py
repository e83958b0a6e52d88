"""Pareto curves of scripts/bench/pareto.py: KLD against bytes, and predicted against measured KLD, one panel a model.

python scripts/bench/pareto_plot.py tiny-r1=tiny/pareto-llama.cpp.json -o pareto.png
"""

import json
from pathlib import Path

import click
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLES = {"allocated": ("o-", "tab:blue"), "hand": ("s--", "tab:orange"), "llama": ("^:", "tab:gray")}
LABELS = {"allocated": "allocated (--size)", "hand": "hand-made recipe", "llama": "llama-quantize's own mixes"}


@click.command()
@click.argument("results", nargs=-1, required=True, metavar="NAME=JSON...")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(results, output):
    """Draw and save."""
    figure, rows = plt.subplots(
        2, len(results), figsize=(4.6 * len(results), 6.6), layout="constrained", dpi=100, squeeze=False
    )
    for column, result in enumerate(results):
        name, _, path = result.partition("=")
        points = json.loads(Path(path).read_text())
        top, bottom = rows[0][column], rows[1][column]
        for family, (style, color) in STYLES.items():
            mine = sorted((p for p in points if p["family"] == family), key=lambda p: p["n_bytes"])
            if not mine:
                continue
            mib, kld = [p["n_bytes"] / 2**20 for p in mine], [p["kld"] for p in mine]
            top.plot(mib, kld, style, color=color, label=LABELS[family], markersize=4)
            bottom.plot([p["predicted"] for p in mine], kld, style[0], color=color, markersize=4)
        top.set(yscale="log", title=name, xlabel="whole file, MiB", ylabel="measured KLD, nats a token")
        low, high = min(p["kld"] for p in points), max(p["kld"] for p in points)
        bottom.plot([low, high], [low, high], color="black", linewidth=0.6)
        bottom.set(xscale="log", yscale="log", xlabel="predicted KLD", ylabel="measured KLD")
        for axes in (top, bottom):
            axes.grid(True, which="both", alpha=0.2)
    rows[0][0].legend(fontsize=8)
    figure.savefig(output)


if __name__ == "__main__":
    main()
