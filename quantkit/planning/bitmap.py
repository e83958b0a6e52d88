"""A plan as a picture: layers down, tensor classes across, colour by bits per weight."""

from pathlib import Path

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.planning import qtypes
from quantkit.planning.plan import Plan

LEAST_BITS, MOST_BITS = 1.5, 9.0


def draw(plan: Plan, path: Path) -> None:
    """Write PNG or SVG. Each cell carries its type's name if there is room; embeddings stand above and below."""
    if path.suffix not in (".png", ".svg"):
        raise QuantkitError(f"{path}: the bit map is a .png or .svg file")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    matrices = [tensor for tensor in plan.tensors if tensor.qtype != "F32"]
    roles = list(dict.fromkeys(tensor.role for tensor in matrices if tensor.layer is not None))
    roles.sort(key=lambda role: (not role.endswith("_exps"), not role.startswith("ffn_")))  # the most bytes first
    layers = sorted({tensor.layer for tensor in matrices if tensor.layer is not None})
    grid = np.full((len(layers), len(roles)), np.nan)
    figure, axes = plt.subplots(
        figsize=(3.2 + 0.62 * len(roles), 2.4 + 0.17 * len(layers)), layout="constrained", dpi=110
    )
    for tensor in matrices:
        if tensor.layer is not None:
            row, column = layers.index(tensor.layer), roles.index(tensor.role)
            bits = grid[row, column] = qtypes.get(tensor.qtype).bpw
            axes.text(column, row, tensor.qtype, ha="center", va="center", fontsize=5.5,
                      color="white" if bits < 3.6 else "black")  # fmt: skip
    image = axes.imshow(grid, aspect="auto", norm=LogNorm(LEAST_BITS, MOST_BITS), cmap="viridis")
    axes.set_xticks(range(len(roles)), roles, rotation=90, fontsize=7)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=6)
    axes.set_ylabel("layer")
    outside = " · ".join(f"{t.role} {t.qtype}" for t in matrices if t.layer is None)
    title = " · ".join(filter(None, (plan.model, plan.recipe, plan.target, f"{plan.bpw:.3f} bpw")))
    axes.set_title(f"{title}\n{outside}", fontsize=8)
    bar = figure.colorbar(image, label="bits per weight", ticks=[1.56, 2.06, 2.63, 3.44, 4.5, 6.56, 8.5])
    bar.ax.set_yticklabels(["1.56", "2.06", "2.63", "3.44", "4.5", "6.56", "8.5"])
    bar.ax.minorticks_off()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
