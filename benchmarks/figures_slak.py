"""Draw docs/images/slak.png, or print the counts of docs/slak.md.

python benchmarks/figures_slak.py           trains a small network twice for the figure, three minutes on one core
python benchmarks/figures_slak.py counts    parameters and multiply-adds of the three networks, dense and sparse
"""

import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from widefield import report
from widefield.data import Scales
from widefield.models.slak import STATED
from widefield.surgery.sparsity import DynamicSparsity

ROOT = Path(__file__).parent.parent
NETWORK = {
    "depths": (1, 1), "widths": (24, 32), "kernel_sizes": (51, 49), "num_classes": 8, "layer_scale_init": 1.0
}  # fmt: skip
LAYER = "stages.0.0.large_kernel"
STEPS, BATCH, INTERVAL = 700, 16, 25


def loss(model, batch):
    return F.cross_entropy(model(batch["image"]), batch["label"])


def batches(images):
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for step in range(STEPS):
        chosen = [images[int(order[(step * BATCH + i) % len(order)])] for i in range(BATCH)]
        yield {
            "image": torch.stack([sample["image"] for sample in chosen]),
            "label": torch.tensor([sample["label"] for sample in chosen]),
        }


def trained(growth, images):
    """Return the share of active weights at each position of the first layer's two bands, before and after training."""
    torch.manual_seed(0)
    model = timm.create_model("slak_tiny", **NETWORK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    sparse = DynamicSparsity(model, interval=INTERVAL, growth=growth, end=STEPS)
    sparse.start([next(batches(images))], loss)
    before, losses = footprint(sparse), []
    for batch in batches(images):
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        sparse.step(optimizer)
        optimizer.zero_grad()
        losses.append(value.item())
    print(f"{growth}: loss {sum(losses[:20]) / 20:.2f} -> {sum(losses[-20:]) / 20:.2f}, {sparse.density():.3f} active")
    return before, footprint(sparse)


def footprint(sparse):
    down, across = (sparse.masks[f"{LAYER}.LoRA{i}.conv.weight"].float().mean((0, 1)) for i in (1, 2))
    size, width = down.shape
    margin = (size - width) // 2
    total, covered = torch.zeros(size, size), torch.zeros(size, size)
    for part, share in (
        ((slice(None), slice(margin, margin + width)), down),
        ((slice(margin, margin + width), slice(None)), across),
    ):
        total[part] += share
        covered[part] += 1
    return total / covered  # NaN outside the bands


def figure():
    images = Scales("train", size=128, count=1600, object_sizes=(64, 110), clutter=0.1)
    before, random = trained("random", images)
    _, gradient = trained("gradient", images)
    drawing = Figure(figsize=(8.6, 3.1), layout="constrained")
    axes = drawing.subplots(1, 3)
    titles = ("at the start, by SNIP", f"after {(STEPS - 1) // INTERVAL} moves, grown at random", "grown by gradient")
    for axis, title, share in zip(axes, titles, (before, random, gradient), strict=True):
        shown = axis.imshow(share, cmap="YlGnBu", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_xticks([0, 25, 50], ["-25", "0", "25"], fontsize=7)
        axis.set_yticks([0, 25, 50], ["-25", "0", "25"], fontsize=7)
    bar = drawing.colorbar(shown, ax=axes, shrink=0.8, pad=0.01, label="share of channels with a weight")
    bar.ax.tick_params(labelsize=7)
    (ROOT / "docs/images/slak.png").write_bytes(report.png(drawing))


def counts():
    rows = []
    for name, stated in STATED.items():
        torch.manual_seed(0)
        model = timm.create_model(name)
        at = positions(model)
        sparse = DynamicSparsity(model)
        sparse.start([{"image": torch.randn(2, 3, 224, 224), "label": torch.randint(1000, (2,))}], loss)
        weights = dict(model.named_parameters())
        dense = sum(weights[key].numel() * count for key, count in at.items())
        macs = sum(int(mask.sum()) * at[key] for key, mask in sparse.masks.items())
        total = sum(p.numel() for p in model.parameters())
        left = total - sum(int((~mask).sum()) for mask in sparse.masks.values())
        rows.append(
            {
                "": name,
                "dense": f"{total / 1e6:.1f}M, {dense / 1e9:.2f}G",
                "40 % sparse": f"{left / 1e6:.1f}M, {macs / 1e9:.2f}G",
                "the paper": f"{stated.parameters}, {stated.macs}",
            }
        )
    print(report.markdown(rows))


@torch.no_grad()
def positions(model):
    """Return how often each weight is used for one 224x224 image."""
    at, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):

            def note(module, args, out, key=f"{name}.weight"):
                at[key] = out.numel() // module.weight.shape[0]

            handles.append(module.register_forward_hook(note))
    model.eval()(torch.zeros(1, 3, 224, 224))
    for handle in handles:
        handle.remove()
    model.train()
    return at


if __name__ == "__main__":
    counts() if sys.argv[1:] == ["counts"] else figure()
