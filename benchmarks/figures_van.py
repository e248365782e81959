"""Draw docs/images/van.png: which pixels the two depthwise convolutions of large kernel attention reach together.

python benchmarks/figures_van.py
"""

from pathlib import Path

import torch
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from widefield import report
from widefield.nn.lka import LKA

ROOT = Path(__file__).parent.parent
KERNELS = (7, 2), (14, 3), (21, 3), (28, 4)  # the rows of the paper's table
SIDE = 35
MOST = 4


@torch.no_grad()
def paths(layer: LKA, *convs: nn.Conv2d) -> Tensor:
    """Return the number of paths from each pixel to the center pixel through the layer's convolutions."""
    x = torch.zeros(1, 1, SIDE, SIDE)
    x[..., SIDE // 2, SIDE // 2] = 1
    for conv in convs:
        nn.init.ones_(conv.weight)
        nn.init.zeros_(conv.bias)
        x = conv(x)
    return x[0, 0]


def main() -> None:
    figure = Figure(figsize=(8.4, 4.1), layout="constrained")
    rows = figure.subplots(2, len(KERNELS))
    colours = {"cmap": "YlGnBu", "norm": BoundaryNorm(range(MOST + 2), 256)}
    for column, (size, dilation) in zip(rows.T, KERNELS, strict=True):
        layer = LKA(1, size, dilation)
        first, second = paths(layer, layer.conv0), paths(layer, layer.conv_spatial)
        taps = layer.conv0.kernel_size[0], layer.conv_spatial.kernel_size[0]
        both = paths(layer, layer.conv0, layer.conv_spatial)
        middle = SIDE // 2
        pictures = 2 * second + first, both
        titles = (
            f"K = {size}, d = {dilation}: {taps[0]}x{taps[0]},\n{taps[1]}x{taps[1]} of dilation {dilation}",
            f"sees {layer.receptive_field}x{layer.receptive_field}",
        )
        for axis, picture, title in zip(column, pictures, titles, strict=True):
            drawn = axis.imshow(picture, **colours)
            corner = middle - size / 2
            axis.add_patch(Rectangle((corner, corner), size, size, fill=False, edgecolor="tab:red", linewidth=1))
            axis.set_title(title, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
    rows[0, 0].set_ylabel("taps", fontsize=8)
    rows[1, 0].set_ylabel("ways to the middle", fontsize=8)
    bar = figure.colorbar(
        drawn, ax=rows, ticks=[i + 0.5 for i in range(MOST + 1)], shrink=0.42, anchor=(0, 0.04), pad=0.01
    )
    bar.ax.set_yticklabels(range(MOST + 1), fontsize=7)
    (ROOT / "docs/images/van.png").write_bytes(report.png(figure))


if __name__ == "__main__":
    main()
