"""Read or generate images whose shape and texture belong to different classes.

The published images are those of Geirhos et al., "ImageNet-trained CNNs are biased towards texture" (ICLR 2019): 1,280
of 224 pixels, in one folder per shape class, with names ``SHAPEi-TEXTUREj.png`` such as ``cat7-elephant1.png``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from widefield import _checks
from widefield.data.base import Sample, collate
from widefield.data.decoding import read
from widefield.data.drawing import CELLS, OUTLINES, REACH, interpolate, step_colors
from widefield.data.listing import Skipped, counted, folders_in, images_in
from widefield.data.scales import Scales
from widefield.data.transforms import IMAGENET_MEAN, IMAGENET_STD, evaluation, statistics

_SIXTEEN = {
    "airplane": "404",
    "bear": "294-297",
    "bicycle": "444 671",
    "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145",
    "boat": "472 554 625 814 914",
    "bottle": "440 720 737 898-899 901 907",
    "car": "436 511 817",
    "cat": "281-286",
    "chair": "423 559 765 857",
    "clock": "409 530 892",
    "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268",
    "elephant": "385-386",
    "keyboard": "508 878",
    "knife": "499",
    "oven": "766",
    "truck": "555 569 656 675 717 734 864 867",
}


def _numbers(ranges: str) -> tuple[int, ...]:
    ends = [[int(end) for end in part.split("-")] for part in ranges.split()]
    return tuple(number for part in ends for number in range(part[0], part[-1] + 1))


SIXTEEN: dict[str, tuple[int, ...]] = {name: _numbers(ranges) for name, ranges in _SIXTEEN.items()}
"""Each of the sixteen classes of the published images -> its classes among ImageNet's 1,000, 207 in all.

From ``code/helper/human_categories.py`` in github.com/rgeirhos/texture-vs-shape; github.com/bethgelab/model-vs-human
has the same lists.
"""

_NAME = re.compile(r"(?P<shape>.*?\D)\d+-(?P<texture>.*?\D)\d+\.png")


class ConflictImages:
    """The images of a folder, as batches: ``image`` float32 (N, 3, size, size), normalized; ``shape`` and ``texture``.

    The last two are int64 (N,), indices into ``classes``. Images of another size are resized so that the shorter side
    fits, and cropped in the center. The batches can be iterated repeatedly.

    Attributes:
        classes: the names of the classes, sorted; the published sixteen if they suffice, otherwise the folders' names.
        files: the images' paths, in order.

    Args:
        folder: holds one folder per shape class, with files ``SHAPEi-TEXTUREj.png``.
        size: side of the images in pixels.
        mean, std: of each channel for pixels in [0, 1].
        batch_size: images in a batch.

    Raises:
        FileNotFoundError: the folder does not exist or holds no image.
        ValueError: a file name does not parse, or names an unknown class or another shape than its folder; or an
            argument is out of range.
        TypeError: an argument is of the wrong type.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        size: int = 224,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        batch_size: int = 32,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.size = _checks.integer("size", size)
        self.mean, self.std = statistics(tuple(mean), tuple(std))
        self.batch_size = _checks.integer("batch_size", batch_size)
        self._transform = evaluation(self.size, self.mean, self.std, crop_pct=1.0)
        layout = "Expected FOLDER/SHAPE/SHAPEi-TEXTUREj.png, such as cat/cat7-elephant1.png."
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder of images {str(self.folder)!r}. {layout}")
        self._skipped = Skipped()
        shapes = folders_in(self.folder, self._skipped)
        found = [Path(path) for shape in shapes for path in images_in(self.folder / shape, self._skipped)]
        self.files = [path for path in found if path.suffix == ".png" and path.parent.parent == self.folder]
        for path in set(found) - set(self.files):
            self._skipped.add("not FOLDER/SHAPE/*.png", str(path))
        if not self.files:
            raise FileNotFoundError(f"{str(self.folder)!r} holds no images. {layout}")
        folders = sorted({path.parent.name for path in self.files})
        self.classes = tuple(SIXTEEN if set(folders) <= set(SIXTEEN) else folders)
        self._labels = [self._parsed(path) for path in self.files]

    def found(self) -> str:
        """Return one line: images and classes, and what was left out and why."""
        shapes = {shape for shape, _ in self._labels}
        classes = counted(len(shapes), "class", "classes")
        return f"{counted(len(self), 'image')} in {self.folder}, {classes}{self._skipped.clause()}"

    def _parsed(self, path: Path) -> tuple[int, int]:
        """Return the labels of shape and texture in a file's name."""
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(f"the name of {path} is not SHAPEi-TEXTUREj.png, such as cat7-elephant1.png.")
        for cue, name in match.groupdict().items():
            if name not in self.classes:
                raise ValueError(
                    f"the name of {path} gives the {cue} {name!r}, which is none of {', '.join(self.classes)}."
                    f"{_checks.did_you_mean(name, self.classes)}"
                )
        if match["shape"] != path.parent.name:
            raise ValueError(
                f"{path} lies in the folder {path.parent.name!r}, and its name gives the shape {match['shape']!r}."
            )
        return self.classes.index(match["shape"]), self.classes.index(match["texture"])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def __iter__(self) -> Iterator[Sample]:
        """Yield the batches; raises OSError naming a file that cannot be read."""
        for start in range(0, len(self), self.batch_size):
            yield collate([self.sample(index) for index in range(start, min(start + self.batch_size, len(self)))])

    def sample(self, index: int) -> Sample:
        """Return one image (3, size, size) and its labels; raises OSError naming a file that cannot be read."""
        shape, texture = self._labels[index]
        return {"image": self._transform(read(self.files[index])), "shape": shape, "texture": texture}


def write_conflicts(folder: str | Path, *, size: int = 32, per_pair: int = 2, seed: int = 0) -> Path:
    """Draw conflict images for models trained on `Scales`, and write them in the published layout.

    Each image is one large shape with small holes in the form of another shape. Its global and local cues belong to
    different classes, like Navon's letters made of letters ("Forest before trees", Cognitive Psychology 9, 1977).
    Holes and ground have the same color, so that both cues have the same contrast. The large shape measures 28/32 of
    the image and a hole 5/32. At 32 pixels these are about the largest and the smallest sizes that `Scales` draws.
    Colors, rotations and the ground's texture are drawn as in `Scales`.

    An image depends on (seed, shape, texture, number) and on ``size``. Files with the same names are replaced.

    Args:
        folder: created if it does not exist.
        size: side of the images in pixels, at least 32.
        per_pair: number of images for each of the 56 pairs of different classes.
        seed: of all random choices.

    Returns:
        The folder.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type.
        OSError: the folder cannot be written.
    """
    folder = Path(folder).expanduser()
    size = _checks.integer("size", size, minimum=32)
    per_pair = _checks.integer("per_pair", per_pair)
    seed = _checks.integer("seed", seed, minimum=0)
    for s, shape in enumerate(Scales.classes):
        (folder / shape).mkdir(parents=True, exist_ok=True)
        for t, texture in enumerate(Scales.classes):
            for number in range(1, per_pair + 1) if s != t else ():
                pixels, _, _ = _draw(shape, texture, size, np.random.default_rng((seed, s, t, number)))
                name = f"{shape}{number}-{texture}{number}.png"
                Image.fromarray(pixels.movedim(0, -1).numpy()).save(folder / shape / name)
    return folder


_LARGE, _SMALL = 28 / 32, 5 / 32  # sides in units of the image's; a small shape fits into the rim of a large ring
_RIM = 0.5 / 32  # smallest distance between a hole and the outline
_APART = 1.15  # smallest distance of two holes' centers, in units of their side
_CLUTTER = 0.25  # amplitude of the ground's texture: the default of `Scales`


def _draw(shape: str, texture: str, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return an image uint8 (3, size, size), and the large shape and its holes, each bool (size, size)."""
    large, small = _LARGE * size, _SMALL * size
    room = size / 2 - REACH * large
    outer = _distances(shape, size, large, ((size - 1) / 2 + room * rng.uniform(-1, 1, 2)).tolist(), rng)
    inner = torch.full_like(outer, large)
    width = 2 * round(0.6 * small) + 3  # of a window that holds a hole and its edge
    step = max(1, size // 48)  # distance of candidate positions, small enough to pack the holes
    places = (outer[::step, ::step] < -0.3 * small).nonzero() * step
    taken = places[:0]
    for place in places[torch.from_numpy(rng.permutation(len(places)))]:
        if ((taken - place).square().sum(1) < (_APART * small) ** 2).any():
            continue
        hole = _distances(texture, width, small, ((width - 1) / 2,) * 2, rng)
        top, left = (place - width // 2).tolist()
        window = slice(top, top + width), slice(left, left + width)
        if min(top, left) >= 0 and max(top, left) + width <= size and outer[window][hole <= 0].max() <= -_RIM * size:
            taken = torch.cat([taken, place[None]])
            inner[window] = torch.minimum(inner[window], hole)
    field = (0.5 - outer).clamp(0, 1) - (0.5 - inner).clamp(0, 1) - 0.5
    for cell in CELLS:
        nodes = (size - 1) // cell + 2
        texture_of_ground = interpolate(_uniform(rng, 1, nodes, nodes), cell, size)[0]
        field += _CLUTTER * rng.uniform(-1, 1) * texture_of_ground
    middle, contrast = step_colors(_uniform(rng, 1, 7))
    pixels = (255 * (middle + contrast * field).clamp(0, 1)).round().to(torch.uint8)[0]
    return pixels, outer <= 0, inner <= 0


def _distances(name: str, size: int, side: float, middle: Sequence[float], rng: np.random.Generator) -> Tensor:
    """Return distances in pixels to a shape's outline, negative inside, float64 (size, size); turned at random."""
    angle = np.radians(30) * rng.uniform(-1, 1)
    pixels = torch.arange(size, dtype=torch.float64)
    x, y = (pixels - middle[1])[None, :] / side, (pixels - middle[0])[:, None] / side
    distances: Tensor = OUTLINES[name](np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x)
    return distances * side


def _uniform(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.uniform(-1, 1, shape).astype(np.float32))
