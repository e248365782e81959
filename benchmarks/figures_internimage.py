"""Draw docs/images/internimage.png from a small network trained on `scales` (three minutes on one core).

python benchmarks/figures_internimage.py
"""

import io
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

from widefield import report
from widefield.data import Scales

ROOT = Path(__file__).parent.parent
NETWORK = {
    "depths": (1, 2, 2), "widths": (32, 64, 96), "groups": (2, 4, 6), "num_classes": 8, "drop_path_rate": 0.0
}  # fmt: skip
STEPS, BATCH = 1500, 16
SIZE, STRIDE = 64, 8
DRAWN = {"size": SIZE, "object_sizes": (10, 56), "clutter": 0.1}
LEVEL, BLOCK = 1, 1
"""The layer shown, on maps of 8x8."""
SHOWN = (12, 22, 36, 54)
"""Sides of the objects, in pixels."""


def trained():
    images = Scales("train", count=6000, **DRAWN)
    torch.manual_seed(0)
    model = timm.create_model("internimage_t", **NETWORK).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=STEPS, pct_start=0.1)
    order = torch.randint(len(images), (STEPS, BATCH), generator=torch.Generator().manual_seed(0)).tolist()
    losses = []
    for chosen in order:
        samples = [images[i] for i in chosen]
        x, labels = torch.stack([s["image"] for s in samples]), torch.tensor([s["label"] for s in samples])
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    print(f"loss {sum(losses[:20]) / 20:.2f} -> {sum(losses[-20:]) / 20:.2f}")
    return model.eval()


def points_of(model, image):
    """Return positions (G, K, 2) in image pixels and weights (G, K) of the layer for every pixel of its map."""
    layer, found = model.levels[LEVEL].blocks[BLOCK].dcn, []
    handle = layer.register_forward_pre_hook(lambda module, inputs: found.append(module.points(inputs[0])))
    with torch.no_grad():
        model(image[None])
    handle.remove()
    places, weights = found[0]
    return STRIDE * (places[0] + 0.5) - 0.5, weights[0]


def panel(axis, model, images, index):
    sample = images[index]
    picture = sample["image"] * torch.tensor(images.std)[:, None, None] + torch.tensor(images.mean)[:, None, None]
    places, weights = points_of(model, sample["image"])
    rows, columns = sample["mask"].nonzero(as_tuple=True)
    row, column = (int(at.float().mean() / STRIDE) for at in (rows, columns))
    shades = (16 * picture.clamp(0, 1)).round() / 16  # fewer shades keep the file small
    axis.imshow(0.45 + 0.55 * shades.permute(1, 2, 0))
    grid = [STRIDE * (at + tap + 0.5) - 0.5 for at in (column, row) for tap in (-1, 0, 1)]
    axis.scatter([x for x in grid[:3] for _ in range(3)], 3 * grid[3:], s=46, marker="s", fc="none", ec="black", lw=0.9)
    for group in range(places.shape[2]):
        at, size = places[row, column, group], 300 * weights[row, column, group]
        axis.scatter(at[:, 0], at[:, 1], s=size, color=f"C{group}", alpha=0.75, lw=0, label=f"group {group + 1}")
    axis.set(xlim=(-0.5, SIZE - 0.5), ylim=(SIZE - 0.5, -0.5), xticks=[], yticks=[])
    axis.set_title(f"object of {sample['size']:.0f} pixels", fontsize=9)


def main():
    model = trained()
    images = Scales("val", count=1000, **DRAWN)
    right = 0
    with torch.no_grad():
        for start in range(0, 1000, 50):
            samples = [images[i] for i in range(start, start + 50)]
            guess = model(torch.stack([s["image"] for s in samples])).argmax(1)
            right += (guess == torch.tensor([s["label"] for s in samples])).sum().item()
    print(f"{right / 10:.1f} % of the validation images")
    sizes = torch.tensor([float(images[i]["size"]) for i in range(1000)])
    drawing = Figure(figsize=(8.6, 2.6), layout="constrained")
    axes = drawing.subplots(1, len(SHOWN))
    for axis, side in zip(axes, SHOWN, strict=True):
        panel(axis, model, images, int((sizes - side).abs().argmin()))
    drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    path = ROOT / "docs/images/internimage.png"
    picture = Image.open(io.BytesIO(report.png(drawing))).convert("RGB")
    picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
