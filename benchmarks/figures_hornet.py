"""Draw docs/images/hornet.png: which pixels one position of a recursive gated convolution reads, for several images.

python benchmarks/figures_hornet.py      (trains two small HorNets on `scales`: minutes on a CPU)
"""

import io
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from widefield import report
from widefield.data import Scales, collate
from widefield.models.hornet import HorNet
from widefield.nn.gnconv import GnConv

ROOT = Path(__file__).parent.parent
STEPS, BATCH, SHOWN = 700, 32, 5
PLACE = 8  # row and column of maps of 16x16
NETWORKS = {"7x7 kernel": None, "global filter": (16, 9)}


def images(split: str) -> Scales:
    """Return images with one shape that is at least half as large as the image."""
    return Scales(split, size=64, count=3200 if split == "train" else 500, object_sizes=(32, 58), clutter=0.1)


def trained(filters: tuple[int, int] | None) -> HorNet:
    """Return a network of one stage whose maps are 16x16."""
    torch.manual_seed(0)
    model = HorNet(
        depths=(2,), widths=(32,), orders=(3,), kernel_sizes=(7,), global_filters=(filters,), num_classes=8, scale=1.0,
        layer_scale_init=1.0,
    )  # fmt: skip
    batches = DataLoader(images("train"), BATCH, shuffle=True, collate_fn=collate, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for batch in islice(chain.from_iterable(repeat(batches)), STEPS):
        loss = cross_entropy(model(batch["image"]), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = [model(b["image"]).argmax(1) == b["label"] for b in DataLoader(images("val"), 50, collate_fn=collate)]
    print(f"{filters}: {torch.cat(right).float().mean():.1%} of the validation images", flush=True)
    return model


def weights(model: HorNet, image: Tensor) -> Tensor:
    """Return (16, 16): the norm of the last layer's derivatives, of one output position by each input position."""
    layer = [module for module in model.modules() if isinstance(module, GnConv)][-1]
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(image[None])
    handle.remove()
    x = seen[0].requires_grad_()
    outputs = layer(x)[0, :, PLACE, PLACE]
    rows = [torch.autograd.grad(output, x, retain_graph=True)[0] for output in outputs]
    return torch.stack(rows).square().sum((0, 1, 2)).sqrt()


def main() -> None:
    models = {name: trained(filters) for name, filters in NETWORKS.items()}
    samples = images("val")
    pictures = [samples[i]["image"] for i in range(SHOWN)]
    figure = Figure(figsize=(6.6, 4.0), layout="constrained")
    rows = figure.subplots(1 + len(models), SHOWN)
    for axis, picture in zip(rows[0], pictures, strict=True):
        low, high = picture.min(), picture.max()
        axis.imshow(((picture - low) / (high - low)).permute(1, 2, 0))
        axis.plot(4 * PLACE + 1.5, 4 * PLACE + 1.5, "+", color="white", markersize=8)
    for axes, (name, model) in zip(rows[1:], models.items(), strict=True):
        maps = [weights(model, picture) for picture in pictures]
        limit = max(float(drawn.max()) for drawn in maps)
        for axis, drawn in zip(axes, maps, strict=True):
            shown = axis.imshow(drawn / limit, cmap="YlGnBu", norm=PowerNorm(0.5, 0, 1))
        axes[0].set_ylabel(name, fontsize=9)
        bar = figure.colorbar(shown, ax=axes, fraction=0.02, pad=0.01, ticks=[0, 0.1, 0.25, 0.5, 1])
        bar.ax.tick_params(labelsize=7)
    for axis in rows.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    picture = Image.open(io.BytesIO(report.png(figure))).convert("RGB")
    colours = picture.quantize(128, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    colours.save(ROOT / "docs/images/hornet.png", optimize=True)


if __name__ == "__main__":
    main()
