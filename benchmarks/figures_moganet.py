"""Draw docs/images/moganet.png: how far each group of channels sees in a layer of MogaNet, before and after training.

python benchmarks/figures_moganet.py      (trains a small MogaNet on `scales`: minutes on a CPU)
"""

import copy
from pathlib import Path

import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from widefield import data, report
from widefield.models.moganet import MogaNet
from widefield.nn.moga import MultiOrderDWConv

ROOT = Path(__file__).parent.parent
EPOCHS, BATCH, SIDE = 6, 32, 27


def networks() -> tuple[MogaNet, MogaNet]:
    """Return a network of one stage whose maps are 16x16, before and after training."""
    model = MogaNet(depths=(2,), widths=(32,), ffn_ratios=(2,), num_classes=8)
    before = copy.deepcopy(model)
    shapes = data.create("scales", "train", size=64, count=4096, object_sizes=(16, 56))
    images = DataLoader(shapes, BATCH, shuffle=True, collate_fn=data.collate)
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
        print(f"epoch {epoch + 1}: {right / len(shapes):.1%} of the training images", flush=True)
    return before, model


@torch.no_grad()
def kernels(layer: MultiOrderDWConv) -> list[Tensor]:
    """Return (SIDE, SIDE) for each group of channels: the root mean square of its composed kernels."""
    layer = copy.deepcopy(layer)
    layer.PW_conv = nn.Identity()
    for conv in (layer.DW_conv0, layer.DW_conv1, layer.DW_conv2):
        conv.bias.zero_()
    impulse = torch.zeros(1, layer.channels, SIDE, SIDE)
    impulse[..., SIDE // 2, SIDE // 2] = 1
    shares = layer(impulse).flip(2, 3).split(layer.splits, 1)  # what a pixel sees, not where it is seen
    return [share.square().mean((0, 1)).sqrt() for share in shares]


def main() -> None:
    torch.manual_seed(0)
    figure = Figure(figsize=(6.6, 4.3), layout="constrained")
    rows = figure.subplots(2, 3)
    titles = "an eighth: 5x5", "three eighths: + 5x5, dilated by 2", "a half: + 7x7, dilated by 3"
    for axes, model, label in zip(rows, networks(), ("new", "trained"), strict=True):
        layers = [module for module in model.modules() if isinstance(module, MultiOrderDWConv)]
        for axis, title, kernel in zip(axes, titles, kernels(layers[-1]), strict=True):
            picture = axis.imshow(kernel / kernel.max(), cmap="YlGnBu", norm=PowerNorm(0.5, 0, 1))
            axis.set_xticks([])
            axis.set_yticks([])
            if label == "new":
                axis.set_title(title, fontsize=8)
        axes[0].set_ylabel(label, fontsize=9)
    bar = figure.colorbar(picture, ax=rows, fraction=0.03, pad=0.01, label="of the largest")
    bar.ax.tick_params(labelsize=7)
    (ROOT / "docs/images/moganet.png").write_bytes(report.png(figure))


if __name__ == "__main__":
    main()
