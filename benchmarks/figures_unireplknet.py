"""Draw docs/images/unireplknet.png: which taps the dilated branches reach, and the merged kernel.

python benchmarks/figures_unireplknet.py
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from widefield import report
from widefield.nn.large_kernel import DILATED_BRANCHES, DilatedReparamConv2d
from widefield.nn.reparam import merged
from widefield.ops import fold

ROOT = Path(__file__).parent.parent
CHANNELS = 256


def reach(size: int) -> Tensor:
    """Return how many of the kernels, including the large one, have a tap at each position."""
    count = torch.ones(size, size)
    for k, d in DILATED_BRANCHES[size]:
        count += fold.pad(fold.dilate(torch.ones(k, k), d), size)
    return count


@torch.no_grad()
def start(size: int) -> Tensor:
    """Return the root mean square of each tap of the merged kernel, before training, in units of the mean over taps.

    Kernels are drawn as UniRepLKNet draws them, and the batch norms have seen white noise.
    """
    layer = DilatedReparamConv2d(CHANNELS, CHANNELS, size)
    for conv, norm in layer.branches():
        torch.nn.init.trunc_normal_(conv.weight, std=0.02)
        norm.momentum = 1.0  # use the statistics of the one batch they see
    layer(torch.randn(4, CHANNELS, 64, 64))
    taps = merged(layer.eval()).weight.square().mean((0, 1)).sqrt()
    return taps / taps.mean()


def main() -> None:
    torch.manual_seed(0)
    sizes = list(DILATED_BRANCHES)
    figure = Figure(figsize=(9.0, 3.0), layout="constrained")
    rows = figure.subplots(2, len(sizes))
    quantities = (reach, "kernels at a tap"), (start, "merged, at the start")
    for (draw, label), axes in zip(quantities, rows, strict=True):
        for axis, size in zip(axes, sizes, strict=True):
            picture = axis.imshow(draw(size), cmap="YlGnBu", vmin=0, vmax=6)
            axis.set_xticks([])
            axis.set_yticks([])
            if draw is reach:
                axis.set_title(f"{size}x{size}", fontsize=9)
        axes[0].set_ylabel(label, fontsize=8)
        bar = figure.colorbar(picture, ax=axes, fraction=0.02, pad=0.01)
        bar.ax.tick_params(labelsize=7)
    (ROOT / "docs/images/unireplknet.png").write_bytes(report.png(figure))


if __name__ == "__main__":
    main()
