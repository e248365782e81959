"""Draw docs/images/scenes.png: scenes, their masks, the visible parts of their objects with boxes, and key points.

python benchmarks/figures_scenes.py
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from widefield import report
from widefield.data import Scenes

ROOT = Path(__file__).parent.parent
TEXTURES, PHOTOS = (0, 1, 2), (4, 5)


def pixels(sample: dict, dataset: Scenes) -> np.ndarray:
    """Return the image as (H, W, 3) in [0, 1]."""
    return (sample["image"].movedim(0, -1).numpy() * dataset.std + dataset.mean).clip(0, 1)


def draw(column, dataset: Scenes, sample: dict) -> None:
    image, size = pixels(sample, dataset), dataset.image_size
    palette = np.array(dataset.palette) / 255
    colors = palette[1:]  # of objects: without the background
    gray = np.repeat(0.25 + 0.5 * image.mean(-1, keepdims=True), 3, -1)
    extent = (0, size, size, 0)
    column[0].imshow(image, extent=extent)
    column[1].imshow(palette[sample["mask"]], extent=extent)
    parts = gray.copy()
    for label, mask in zip(sample["labels"], sample["masks"], strict=True):
        parts[mask.numpy()] = 0.35 * parts[mask.numpy()] + 0.65 * colors[label]
    column[2].imshow(parts, extent=extent)
    for label, (left, top, right, bottom) in zip(sample["labels"], sample["boxes"].tolist(), strict=True):
        box = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colors[label], linewidth=1)
        column[2].add_patch(box)
    column[3].imshow(gray, extent=extent)
    for label, points in zip(sample["labels"], sample["keypoints"].numpy(), strict=True):
        color = colors[label]
        ring = points[[1, 2, 3, 4, 1], :2]
        column[3].plot(*ring.T, color=color, linewidth=0.6)
        for x, y, visibility in points[points[:, 2] > 0]:
            face = color if visibility == 2 else "none"
            column[3].plot(x, y, "o", markersize=2.6, markerfacecolor=face, markeredgecolor=color, markeredgewidth=0.6)
    for axis in column:
        axis.set(xticks=[], yticks=[], xlim=(0, size), ylim=(size, 0))


def main() -> None:
    figure = Figure(figsize=(9, 7.7), layout="constrained")
    axes = figure.subplots(4, len(TEXTURES) + len(PHOTOS))
    columns = [("textures", index) for index in TEXTURES] + [("photos", index) for index in PHOTOS]
    for column, (background, index) in zip(axes.T, columns, strict=True):
        dataset = Scenes("val", background=background)
        draw(column, dataset, dataset[index])
        column[0].set_title(f"background: {background}", fontsize=8)
    for axis, name in zip(axes[:, 0], ("image", "mask", "masks, boxes", "keypoints"), strict=True):
        axis.set_ylabel(name, fontsize=8)
    legend = [
        Patch(facecolor=np.array(color) / 255, label=name)
        for name, color in zip(dataset.classes, dataset.palette, strict=True)
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=9, fontsize=7, frameon=False)
    (ROOT / "docs/images/scenes.png").write_bytes(report.png(figure))


if __name__ == "__main__":
    main()
