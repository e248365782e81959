"""Show what a pretrained network says about photographs, what it looks at, and how far one of its units looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

from widefield import analysis, data, report
from widefield.analysis import ClassActivation, ReceptiveField
from widefield.demo.chapter import Chapter
from widefield.drawing.parts import encoded
from widefield.loading import load
from widefield.models import packaged

MODEL = "efficientnet_lite0_pip"
SHOWN = ("cat", "coffee", "rocket", "china", "flower", "camera", "astronaut", "retina")
_TOP = 3
_LISTED = 4  # first answers in the headline
_SAID = (
    f"{MODEL} is EfficientNet-Lite0 with weights of ImageNet, which come with a package of 17 MB. Bars: its {_TOP} "
    "likeliest classes. Right half of each picture: Grad-CAM, which is bright where pixels speak for the first answer. "
    "ImageNet has no class for an astronaut or a retina, and the network must name something all the same."
)
_DEPTHS = {"block 2": "blocks.1", "block 3": "blocks.2", "block 5": "blocks.4", "block 7": "blocks.6"}
"""Part of the network -> the layer whose map ends it; the maps have strides of 4, 8, 16 and 32 pixels."""
_FAR = (
    "By how much does each pixel of the photographs change the unit in the middle of a map? The field grows with "
    "depth: half of all contributions come from the central {first} of the image's area after block 2, and from {last} "
    "after the last one."
)
_FIELDS = (
    "Effective receptive fields on one logarithmic scale. Dashed: the theoretical field, where it fits into the image."
)


def missing() -> str:
    """Return which packages with photographs or weights are missing, and how to install them; "" for none."""
    reasons = []
    for needed in (packaged.read_weights, data.photographs):
        try:
            needed()
        except ModuleNotFoundError as error:
            reasons.append(str(error))
    return " ".join(reasons)


@dataclass(frozen=True)
class Seen:
    """What the network says about the photographs, and what it looks at."""

    names: tuple[str, ...]
    """Of the photographs."""
    pixels: np.ndarray
    """(N, H, W, 3) in [0, 1], as the network gets them."""
    answers: tuple[dict[str, float], ...]
    """Of each photograph: class -> probability, the likeliest first."""
    maps: ClassActivation
    fields: dict[str, ReceptiveField]
    """By depth, the first one first."""


def look(names: Sequence[str] = SHOWN) -> Seen:
    """Run the network on photographs.

    Args:
        names: of photographs; see :func:`widefield.data.photographs`.

    Raises:
        ModuleNotFoundError: a package is missing; see :func:`missing`.
    """
    subject = load(MODEL, pretrained=True)
    prepare = subject.prepare()
    photographs = data.photographs(names)
    images = torch.stack([prepare(Image.fromarray(one.pixels.movedim(0, -1).numpy())) for one in photographs])
    with torch.no_grad():
        values, labels = subject.model(images).softmax(1).topk(_TOP)
    answers = tuple(
        dict(zip((subject.class_names[k] for k in best), shares, strict=True))
        for best, shares in zip(labels.tolist(), values.tolist(), strict=True)
    )
    about: dict[str, Any] = {"about": {"images": len(images), "source": "photographs", "size": subject.size}}
    maps = analysis.class_activation(subject.model, images, classes=subject.class_names, name=MODEL, **about)
    fields = {
        name: analysis.effective_receptive_field(subject.model, images, layer=layer, name=name, **about)
        for name, layer in _DEPTHS.items()
    }
    mean, std = (torch.tensor(v)[:, None, None] for v in (subject.mean, subject.std))
    pixels = (images * std + mean).clamp(0, 1).movedim(1, -1).numpy()
    return Seen(tuple(names), pixels, answers, maps, fields)


def chapter(seen: Seen) -> Chapter:
    """Return the chapter about the photographs."""
    first = [next(iter(answer.items())) for answer in seen.answers]
    listed = ", ".join(
        f"{name}: {label} ({100 * share:.0f} %)"
        for name, (label, share) in list(zip(seen.names, first, strict=True))[:_LISTED]
    )
    fields = seen.fields
    cards = [
        report.Card(name, [report.Photo(picture, "jpeg", f"what speaks for “{label}”"), report.Bars(answer)])
        for name, picture, (label, _), answer in zip(seen.names, _pictures(seen), first, seen.answers, strict=True)
    ]
    rows = tuple(
        {
            "photograph": name,
            **{
                f"{place}.": f"{label} {100 * share:.0f} %"
                for place, (label, share) in enumerate(answer.items(), start=1)
            },
        }
        for name, answer in zip(seen.names, seen.answers, strict=True)
    )
    shares = [f"{100 * field.area_ratio[0.5]:.2g} %" for field in fields.values()]
    far: list[report.Part] = [
        _FAR.format(first=shares[0], last=shares[-1]),
        report.Plot(ReceptiveField.draw(fields), _FIELDS),
    ]
    credits = "; ".join(f"{one.name}: {one.credit}, {one.license}" for one in data.photographs(seen.names))
    said: list[report.Part] = [_SAID, report.Cards(cards), f"Photographs: {credits}."]
    return Chapter(
        headline=f"A network with weights of ImageNet names photographs ({listed}).",
        sections=(
            report.Section("What the network says, and what it looks at", said),
            report.Section("How far it looks", far),
        ),
        numbers={
            "answers": dict(zip(seen.names, seen.answers, strict=True)),
            "area_ratio": {name: {f"{k:g}": v for k, v in field.area_ratio.items()} for name, field in fields.items()},
        },
        tables=((f"What {MODEL} sees", rows),),
    )


def _pictures(seen: Seen) -> list[bytes]:
    """Return each photograph next to its class activation map, as JPEG."""
    found = []
    for pixels, scores in zip(seen.pixels, seen.maps.upsampled(), strict=True):
        colors = colormaps["inferno"](scores)[..., :3]
        mixed = 0.4 * pixels.mean(-1, keepdims=True) + 0.6 * colors
        both = np.concatenate([pixels, mixed], axis=1)
        found.append(encoded(Image.fromarray((255 * both).round().astype(np.uint8)), "jpeg"))
    return found
