"""Draw boxes, masks and labels of objects into an image, so that many of them stay readable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

Color = tuple[int, int, int]
"""(red, green, blue), each from 0 to 255."""
Rectangle = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels."""

_OPACITY = 0.4
_MANY = 40
"""From this number of objects on, lines are thinner and labels shorter."""


@dataclass(frozen=True, eq=False)
class Marks:
    """What is drawn into an image: D objects, the most important first.

    Attributes:
        boxes: (D, 4), (left, top, right, bottom) in pixels of the image; parts outside of it are cut off.
        colors: of each object.
        texts: labels of each object, from the longest to the shortest: the first that finds a free place is drawn.
        masks: bool (D, H, W), or None. They may have another size than the image.
        dashed: whether the lines of each object are dashed; None: of none.
    """

    boxes: NDArray[np.floating[Any]]
    colors: Sequence[Color]
    texts: Sequence[Sequence[str]]
    masks: NDArray[np.bool_] | None = None
    dashed: Sequence[bool] | None = None


def annotated(image: Image.Image, marks: Marks) -> Image.Image:
    """Return a copy of an image with boxes, masks and labels.

    Labels do not overlap each other. Each stands at its box, above it if there is room; one without room is left out.
    With 40 objects or more, lines are thinner and only the short labels are drawn, so that the boxes stay visible.
    Lines have edges in black or white, whichever contrasts, so that they are seen on any background.
    """
    found = image.convert("RGB")
    boxes = _inside(marks.boxes, found.size)
    if marks.masks is not None:
        found = _masked(found, marks.masks, marks.colors)
    draw = ImageDraw.Draw(found)
    many = len(boxes) >= _MANY
    width = max(1, round(max(found.size) / 300) - many)
    dashes = marks.dashed if marks.dashed is not None else [False] * len(boxes)
    for box, color, dashed in reversed(list(zip(boxes.tolist(), marks.colors, dashes, strict=True))):
        _outline(draw, box, color, width, dashed=dashed)
    font = _font(max(9, round(max(found.size) / (62 if many else 48))))
    texts = [choices[-1:] for choices in marks.texts] if many else marks.texts
    for color, (text, place) in zip(marks.colors, _labels(boxes, texts, font, found.size), strict=True):
        if text:
            draw.rounded_rectangle(place, radius=max(1, font.size // 5), fill=color)
            draw.text(((place[0] + place[2]) / 2, (place[1] + place[3]) / 2), text, _ink(color), font, anchor="mm")
    return found


_BAR: Color = (173, 205, 233)


def with_bars(image: Image.Image, shares: Mapping[str, float]) -> Image.Image:
    """Return an image with names, bars and shares from 0 to 1 on white under it; long names are cut."""
    size = max(12, round(image.width / 30))
    font, line, gap = _font(size), round(1.5 * size), size // 2
    found = Image.new("RGB", (image.width, image.height + line * len(shares) + gap), "white")
    found.paste(image.convert("RGB"))
    draw, right = ImageDraw.Draw(found), image.width - gap
    for number, (name, share) in enumerate(shares.items()):
        top = image.height + gap // 2 + number * line
        text = f"{100 * share:.1f} %"
        draw.rectangle((gap, top + 1, gap + max(1, round((right - gap) * share)), top + line - 2), _BAR)
        draw.text((right, top + line / 2), text, (0, 0, 0), font, anchor="rm")
        room = right - 2 * gap - font.getlength(text) - gap
        draw.text((1.5 * gap, top + line / 2), _cut(name, font, room), (0, 0, 0), font, anchor="lm")
    return found


def _cut(text: str, font: FreeTypeFont, room: float) -> str:
    """Return as much of a text as there is room for."""
    while text and font.getlength(text) > room:
        text = text.removesuffix("…")[:-1].rstrip() + "…" if len(text) > 2 else ""
    return text


def _inside(boxes: NDArray[np.floating[Any]], size: tuple[int, int]) -> NDArray[np.float64]:
    """Return boxes (D, 4) cut off at the image's border, at least a pixel wide and high."""
    limits = np.array([*size, *size], dtype=np.float64)
    cut = np.clip(np.asarray(boxes, dtype=np.float64).reshape(-1, 4), 0, limits)
    cut[:, 2:] = np.maximum(cut[:, 2:], cut[:, :2] + 1)
    return cut


def _masked(image: Image.Image, masks: NDArray[np.bool_], colors: Sequence[Color]) -> Image.Image:
    """Return an image under the colors of the masks, the first mask on top, with lines around them."""
    pixels = np.array(image, dtype=np.float32)
    line = max(1, round(max(image.size) / 500))
    for mask, color in reversed(list(zip(masks, colors, strict=True))):
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        if not len(rows):
            continue
        # Only the part of the image with the mask: there may be a hundred of them.
        scale_y, scale_x = image.height / mask.shape[0], image.width / mask.shape[1]
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        y, x = int(top * scale_y), int(left * scale_x)
        height = min(max(1, round(bottom * scale_y) - y), image.height - y)
        width = min(max(1, round(right * scale_x) - x), image.width - x)
        inner = Image.fromarray(mask[top:bottom, left:right]).resize((width, height), Image.Resampling.NEAREST)
        inside = np.asarray(inner)
        part = pixels[y : y + height, x : x + width]
        part[inside] = (1 - _OPACITY) * part[inside] + _OPACITY * np.array(color, dtype=np.float32)
        part[inside & ~_eroded(inside, line)] = color
    return Image.fromarray(pixels.round().astype(np.uint8))


def _eroded(mask: NDArray[np.bool_], distance: int) -> NDArray[np.bool_]:
    """Return the pixels of a mask that are more than ``distance`` from its border, along rows and columns."""
    inner = np.pad(mask, distance)
    found = mask.copy()
    height, width = mask.shape
    for step in range(2 * distance + 1):
        found &= inner[step : step + height, distance : distance + width]
        found &= inner[distance : distance + height, step : step + width]
    return found


def _outline(draw: ImageDraw.ImageDraw, box: Sequence[float], color: Color, width: int, *, dashed: bool) -> None:
    """Draw the sides of a box, with edges in black or white."""
    for grow, ink in ((1, _ink(color)), (0, color)):
        for side in _sides(box, width, dashed=dashed):
            left, top, right, bottom = (round(value) for value in side)
            draw.rectangle((left - grow, top - grow, max(left, right - 1) + grow, max(top, bottom - 1) + grow), ink)


def _sides(box: Sequence[float], width: int, *, dashed: bool) -> Iterator[Rectangle]:
    """Yield the rectangles of which the outline of a box is made, ``width`` thick and inside of the box."""
    left, top, right, bottom = box
    dash, gap = (4 * width + 2, 3 * width + 2) if dashed else (1 << 30, 0)
    for start in np.arange(left, right, dash + gap).tolist():
        end = min(start + dash, right)
        yield start, top, end, top + width
        yield start, bottom - width, end, bottom
    for start in np.arange(top, bottom, dash + gap).tolist():
        end = min(start + dash, bottom)
        yield left, start, left + width, end
        yield right - width, start, right, end


@cache
def _font(size: int) -> FreeTypeFont:
    import matplotlib  # its font has more letters than Pillow's own

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _ink(color: Color) -> Color:
    """Return black or white, whichever is easier to read on a color."""
    red, green, blue = color
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else (255, 255, 255)


def _labels(
    boxes: NDArray[np.float64], texts: Sequence[Sequence[str]], font: FreeTypeFont, size: tuple[int, int]
) -> list[tuple[str, Rectangle]]:
    """Return text and place of each label; the text is empty if there is no room for it."""
    taken = np.zeros((0, 4))
    found: list[tuple[str, Rectangle]] = []
    for index, choices in enumerate(texts):
        text, place = next(
            (
                (choice, free)
                for choice in choices
                if (free := _free_place(index, boxes, _extent(choice, font), taken, size)) is not None
            ),
            ("", (0.0, 0.0, 0.0, 0.0)),
        )
        found.append((text, place))
        if text:
            taken = np.vstack([taken, place])
    return found


def _extent(text: str, font: FreeTypeFont) -> tuple[float, float]:
    """Return the width and the height of a label."""
    return font.getlength(text) + 0.5 * font.size, 1.3 * font.size


def _free_place(
    index: int,
    boxes: NDArray[np.float64],
    extent: tuple[float, float],
    taken: NDArray[np.float64],
    size: tuple[int, int],
) -> Rectangle | None:
    """Return a place in the image that no other label covers, the one that hides the least of other boxes."""
    width, height = extent
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    best: tuple[float, Rectangle] | None = None
    for left, top in _corners(boxes[index].tolist(), width, height):
        left = min(max(left, 0), size[0] - width)
        place = (left, top, left + width, top + height)
        if left < 0 or top < 0 or place[3] > size[1] or _overlaps(place, taken).any():
            continue
        hidden = _overlaps(place, boxes) / areas
        if areas[index] > 4 * width * height:  # a label may lie in its own box if that is large
            hidden[index] = 0
        cost = float(hidden.sum())
        if best is None or cost < best[0] - 0.02:  # among about equal ones, the first
            best = cost, place
    return None if best is None else best[1]


def _corners(box: Sequence[float], width: float, height: float) -> Iterator[tuple[float, float]]:
    """Yield upper left corners of labels at a box, the best first."""
    left, top, right, bottom = box
    yield left, top - height  # above
    yield left, top  # inside
    yield left, bottom  # below
    yield right - width, top - height
    yield right - width, bottom
    yield left, bottom - height
    yield right - width, top
    yield right, top  # next to it
    yield left - width, top
    yield right, bottom - height
    yield left - width, bottom - height


def _overlaps(place: Rectangle, others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the area that a rectangle shares with each of others (M, 4)."""
    shared = np.minimum(place[2:], others[:, 2:]) - np.maximum(place[:2], others[:, :2])
    area: NDArray[np.float64] = shared.clip(min=0).prod(1)
    return area
