"""Draw docs/images/large_kernels.png: the two branches of a trained 13x13 layer and the merged kernel.

python benchmarks/figures_large_kernels.py      (trains a small RepLKNet on `scales`: minutes on a CPU)
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from widefield import data, report
from widefield.models.replknet import RepLKNet
from widefield.nn import LargeKernelConv2d
from widefield.nn.fusing import fold_norm
from widefield.nn.reparam import merged
from widefield.ops import fold

ROOT = Path(__file__).parent.parent
EPOCHS, BATCH = 4, 64


def trained() -> RepLKNet:
    """Return a network of one stage whose maps are 16x16."""
    model = RepLKNet(depths=(2,), widths=(32,), kernel_sizes=(13,), num_classes=8)
    images = DataLoader(data.create("scales", "train", size=64), BATCH, shuffle=True, collate_fn=data.collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=EPOCHS * len(images))
    for epoch in range(EPOCHS):
        right = 0
        for batch in images:
            logits = model(batch["image"])
            optimizer.zero_grad()
            cross_entropy(logits, batch["label"]).backward()
            optimizer.step()
            schedule.step()
            right += int((logits.argmax(1) == batch["label"]).sum())
        print(f"epoch {epoch + 1}: {right / len(images.dataset):.1%} of the training images", flush=True)
    return model.eval()


def kernels(layer: LargeKernelConv2d) -> dict[str, Tensor]:
    """Return title -> (C, K, K): the branches, each scaled by its norm, and their sum."""
    large, small = (fold_norm(conv, norm).weight.detach()[:, 0] for conv, norm in layer.branches())
    whole = merged(layer).weight.detach()[:, 0]
    size = whole.shape[-1]
    assert torch.allclose(large + fold.pad(small, size), whole, atol=1e-6)  # noqa: S101
    return {
        f"{size}x{size} kernel": large,
        f"{small.shape[-1]}x{small.shape[-1]} kernel": fold.pad(small, size),
        "merged": whole,
    }


def main() -> None:
    torch.manual_seed(0)
    model = trained()
    layer = [module for module in model.modules() if isinstance(module, LargeKernelConv2d)][-1]
    parts = kernels(layer)
    channel = int(parts["merged"].abs().amax((1, 2)).argmax())
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    rows = figure.subplots(2, 3)
    one = {title: kernel[channel] for title, kernel in parts.items()}
    mean = {title: kernel.abs().mean(0) for title, kernel in parts.items()}
    for axes, drawn, label, colours in (
        (rows[0], one, "one channel", "RdBu_r"),
        (rows[1], mean, f"mean magnitude\nof {len(parts['merged'])} channels", "YlGnBu"),
    ):
        limit = max(float(kernel.abs().max()) for kernel in drawn.values())
        for axis, (title, kernel) in zip(axes, drawn.items(), strict=True):
            picture = axis.imshow(kernel, cmap=colours, vmin=-limit if drawn is one else 0, vmax=limit)
            axis.set_xticks([])
            axis.set_yticks([])
            if drawn is one:
                axis.set_title(title, fontsize=9)
        axes[0].set_ylabel(label, fontsize=8)
        figure.colorbar(picture, ax=axes, fraction=0.02, pad=0.01).ax.tick_params(labelsize=7)
    (ROOT / "docs/images/large_kernels.png").write_bytes(report.png(figure))


if __name__ == "__main__":
    main()
