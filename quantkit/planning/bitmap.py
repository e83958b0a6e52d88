"""Where a plan spends its bits: one cell for every matrix, layers across, roles down, coloured by bits per weight."""

from pathlib import Path

from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from quantkit.codecs import types as qtypes
from quantkit.errors import QuantkitError
from quantkit.formats.whole_file import replacing
from quantkit.planning.plan import Plan

SHADES = ("#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725")


def bit_map(plan: Plan, width: float | None = None) -> Figure:
    """A figure of the plan's matrices; what has no layer (embeddings, output) stands in a column of its own. width: in
    inches; None: as wide as the layers need."""
    matrices = [tensor for tensor in plan.tensors if len(tensor.shape) > 1]
    roles = list(dict.fromkeys(tensor.role for tensor in matrices))
    layers = sorted({tensor.layer for tensor in matrices if tensor.layer is not None})
    used = sorted({tensor.qtype for tensor in matrices}, key=lambda name: (qtypes.get(name).bpw, name))
    shades = [SHADES[round(i * (len(SHADES) - 1) / max(1, len(used) - 1))] for i in range(len(used))]
    cells = [[float("nan")] * (len(layers) + 1) for _ in roles]
    for tensor in matrices:
        column = layers.index(tensor.layer) if tensor.layer is not None else len(layers)
        cells[roles.index(tensor.role)][column] = used.index(tensor.qtype)
    wide = width or max(6.4, 2.2 + 0.1 * len(layers))
    columns = max(1, int(wide / 1.6))
    height = 0.8 + 0.19 * (len(roles) + -(-len(used) // columns))
    figure = Figure(figsize=(wide, height), layout="constrained")
    axes = figure.subplots()
    norm = BoundaryNorm([i - 0.5 for i in range(len(used) + 1)], len(used))
    axes.pcolormesh(cells, cmap=ListedColormap(shades), norm=norm, edgecolors="white", linewidth=0.4)
    axes.set_yticks([i + 0.5 for i in range(len(roles))], roles, fontsize=8)
    step = max(1, len(layers) // (12 if width is None else 5))
    ticks = [
        i for i in range(0, len(layers), step) if len(layers) - i > step // 2
    ]  # the next label is the last column's
    axes.set_xticks([i + 0.5 for i in [*ticks, len(layers)]], [*(str(layers[i]) for i in ticks), "–"], fontsize=8)
    axes.set_xlabel("layer", fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    names = [f"{name} {qtypes.get(name).bpw:.4g} bpw" for name in used]
    legend = [Patch(color=shade, label=name) for shade, name in zip(shades, names, strict=True)]
    figure.legend(handles=legend, loc="outside lower left", ncols=columns, fontsize=8, frameon=False)
    return figure


def draw(plan: Plan, path: Path) -> None:
    """Write the bit map as PNG or SVG, whole or not at all. OSError, naming `path`, if it cannot be written."""
    if path.suffix not in (".png", ".svg"):
        raise QuantkitError(f"{path}: the bit map is a .png or .svg file")
    figure = bit_map(plan)
    title = " · ".join(filter(None, (plan.model, plan.recipe, plan.target, f"{plan.bpw:.3f} bpw")))
    figure.suptitle(title, fontsize=9, parse_math=False)  # a$x_{$b is a name
    with replacing(path) as out:
        figure.savefig(out, dpi=150, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
