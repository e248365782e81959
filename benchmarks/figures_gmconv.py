"""Draw docs/images/gmconv.png: the masks of an 11x11 kernel, circles above and ellipses below.

python benchmarks/figures_gmconv.py
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from widefield import report
from widefield.nn.gmconv import gaussian_mask

TARGET = Path(__file__).parent.parent / "docs/images/gmconv.png"
SIZE = (11, 11)
CIRCLES = (0.25, 1.0, 2.0, 3.0, 5.0, 20.0)
ELLIPSES = ((1.0, 4.0), (2.0, 1.5), (2.0, 3.0), (4.0, 0.25), (5.0, 0.6), (5.0, 4.0))


def main() -> None:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(2, len(CIRCLES))
    for axis, sigma in zip(axes[0], CIRCLES, strict=True):
        image = axis.imshow(gaussian_mask(SIZE, torch.tensor(sigma)), vmin=0, vmax=1, cmap="viridis")
        axis.set_title(f"$\\sigma$ = {sigma:g}", fontsize=9)
    for axis, (sigma, ratio) in zip(axes[1], ELLIPSES, strict=True):
        mask = gaussian_mask(SIZE, torch.tensor(sigma), torch.tensor(sigma * ratio))
        axis.imshow(mask, vmin=0, vmax=1, cmap="viridis")
        axis.set_title(f"$\\sigma_1$ = {sigma:g}, $r_\\sigma$ = {ratio:g}", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(image, ax=axes, shrink=0.8)
    TARGET.write_bytes(report.png(figure))


if __name__ == "__main__":
    main()
