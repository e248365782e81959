"""State what the heatmaps of a pose model mean: which key points they are, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from widefield import _checks
from widefield.dense.heatmap_codec import HeatmapCodec


@dataclass(frozen=True)
class PoseConvention:
    """What weights of a pose model do not say: the meaning of its images and heatmaps. None: not known.

    :func:`widefield.dense.inspect_checkpoint` reads it from files, :func:`widefield.dense.load_checkpoint` compares it
    with the one that is expected, and :func:`widefield.dense.save_checkpoint` stores it.

    Attributes:
        keypoints: names of the key points, in the order of the heatmaps.
        swapped: the key point that each one becomes in a mirrored image.
        codec: sizes, standard deviation and kind of the heatmaps.
        shift_heatmaps: whether heatmaps of mirrored images move by one pixel; see
            :func:`widefield.dense.flipped_heatmaps`.
        mean, std: of the images' red, green and blue values, which are from 0 to 1 before.

    Raises:
        TypeError, ValueError: names are not strings or not unique; ``swapped`` does not fit them; mean or std do not
            have three numbers.
    """

    keypoints: Sequence[str] | None = None
    swapped: Sequence[int] | None = None
    codec: HeatmapCodec | None = None
    shift_heatmaps: bool | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check the values, and turn sequences into tuples."""
        names = self.keypoints
        if names is not None:
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"keypoints must be a sequence of names; got {names!r}.")
            twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
            if twice is not None:
                raise ValueError(f"keypoints must be unique; {twice!r} appears twice.")
            object.__setattr__(self, "keypoints", tuple(names))
        if self.swapped is not None:
            object.__setattr__(self, "swapped", _involution(self.swapped, names))
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None:
                found = tuple(_checks.number(f"every number of {name}", float(value)) for value in values)
                if len(found) != 3:
                    raise ValueError(f"{name} must have three numbers, for red, green and blue; got {values!r}.")
                object.__setattr__(self, name, found)

    def __str__(self) -> str:
        """Return what is known, one statement per line."""
        lines = []
        if self.keypoints is not None:
            lines.append(f"{len(self.keypoints)} key points: {', '.join(self.keypoints)}")
        if self.codec is not None:
            codec = self.codec
            (height, width), (rows, columns) = codec.image_size, codec.heatmap_size
            lines.append(f"images of {height}x{width}, heatmaps of {rows}x{columns}, kind={codec.kind!r}, "
                         f"sigma={codec.sigma:g}, blur={codec.blur}")  # fmt: skip
        if self.shift_heatmaps is not None:
            lines.append(f"heatmaps of mirrored images {'move by one pixel' if self.shift_heatmaps else 'stay'}")
        if self.mean is not None and self.std is not None:
            mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
            lines.append(f"images: mean {mean}, std {std}")
        return "\n".join(lines)


def _involution(swapped: Sequence[int], names: Sequence[str] | None) -> tuple[int, ...]:
    """Return ``swapped`` as a tuple, if swapping twice changes nothing."""
    found = tuple(_checks.integer("every entry of swapped", value, minimum=0) for value in swapped)
    if names is not None and len(found) != len(names):
        raise ValueError(f"swapped must have one entry for each of {len(names)} key points; got {len(found)}.")
    for index, other in enumerate(found):
        if other >= len(found) or found[other] != index:
            raise ValueError(f"swapped must pair key points: {index} becomes {other}, and {other} does not become "
                             f"{index}.")  # fmt: skip
    return found
