"""Provide the photographs that installed packages ship: two of scikit-learn, and ten of scikit-image.

Of scikit-image only those are used whose documentation states CC0 or the public domain. The files stay in the packages.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import torch
from PIL import Image
from torch import Tensor

from widefield import _checks
from widefield.data.decoding import read

_TRAIN_PART = 2 / 3  # of the width

_SKLEARN, _SKIMAGE = "scikit-learn", "scikit-image"
_FOLDERS = MappingProxyType({_SKLEARN: ("sklearn", "datasets/images"), _SKIMAGE: ("skimage", "data")})
"""Package -> the module that it installs, and the folder of the images in it."""
_CC_BY, _CC0, _PUBLIC = "CC BY 2.0", "CC0 1.0", "public domain"
_FILES = MappingProxyType(
    {
        "china": (_SKLEARN, "china.jpg", _CC_BY, "danielbuechele (Flickr)"),
        "flower": (_SKLEARN, "flower.jpg", _CC_BY, "vultilion (Flickr)"),
        "astronaut": (_SKIMAGE, "astronaut.png", _PUBLIC, "NASA"),
        "cat": (_SKIMAGE, "chelsea.png", _CC0, "Stefan van der Walt"),
        "coffee": (_SKIMAGE, "coffee.png", _CC0, "Rachel Michetti"),
        "galaxies": (_SKIMAGE, "hubble_deep_field.jpg", _PUBLIC, "NASA"),
        "retina": (_SKIMAGE, "retina.jpg", _CC0, "Mikael Häggström"),
        "rocket": (_SKIMAGE, "rocket.jpg", _PUBLIC, "SpaceX"),
        "camera": (_SKIMAGE, "camera.png", _CC0, "Lav Varshney"),
        "brick": (_SKIMAGE, "brick.png", _CC0, "CC0Textures"),
        "grass": (_SKIMAGE, "grass.png", _CC0, "linolafett (DeviantArt)"),
        "gravel": (_SKIMAGE, "gravel.png", _CC0, "CC0Textures"),
    }
)

PHOTOGRAPH_NAMES = tuple(_FILES)
"""Names of all photographs. The first two come with scikit-learn, the others with scikit-image. The last four are gray.
"""
TWO_PHOTOGRAPHS = PHOTOGRAPH_NAMES[:2]
"""Names of those that are always installed."""


@dataclass(frozen=True, eq=False)
class Photograph:
    """A photograph that comes with a package."""

    name: str
    pixels: Tensor
    """uint8 (3, H, W); gray ones have three equal channels."""
    license: str
    credit: str
    """Author or source, which CC BY requires to be named."""
    package: str
    """The package on PyPI that ships it."""

    def part(self, split: str) -> Tensor:
        """Return the pixels for one split: the left two thirds for ``"train"``, the rest for ``"val"``."""
        border = round(_TRAIN_PART * self.pixels.shape[2])
        return self.pixels[:, :, :border] if split == "train" else self.pixels[:, :, border:]


def photographs(names: Sequence[str] | None = None) -> tuple[Photograph, ...]:
    """Return photographs by name; the pixels are decoded once in a process.

    Args:
        names: some of ``PHOTOGRAPH_NAMES``; default: all twelve.

    Raises:
        TypeError, ValueError: ``names`` is not a sequence of names, is empty, or has an unknown one.
        ModuleNotFoundError: scikit-image is not installed, and a photograph of it is asked for.
        FileNotFoundError: the installed package lacks the file.
    """
    return tuple(_photograph(name) for name in photograph_names(names))


def write_photographs(folder: str | Path, names: Sequence[str] | None = None) -> list[Path]:
    """Write photographs as ``NAME.png`` into a folder, and their licenses and authors as ``CREDITS.txt``.

    Args:
        folder: is created if there is none; files of these names are replaced.
        names: as of `photographs`, which also states the errors.

    Returns:
        The paths of the images.

    Raises:
        OSError: a file cannot be written.
    """
    chosen = photographs(names)
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{one.name}.png" for one in chosen]
    for one, path in zip(chosen, paths, strict=True):
        Image.fromarray(one.pixels.movedim(0, -1).numpy()).save(path)
    lines = [f"{one.name}.png: {one.license}, {one.credit}; from the package {one.package}\n" for one in chosen]
    (folder / "CREDITS.txt").write_text("".join(lines), encoding="utf-8")
    return paths


def photograph_names(names: Sequence[str] | None) -> tuple[str, ...]:
    """Return ``names`` as a checked tuple, all for None; arguments and errors as of `photographs`."""
    if names is None:
        return PHOTOGRAPH_NAMES
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"photographs are asked for by a list of names, such as {[*TWO_PHOTOGRAPHS]}; got {names!r}.")
    if not names:
        raise ValueError("the list of photographs is empty: name at least one.")
    return tuple(_checks.choice("every photograph", name, PHOTOGRAPH_NAMES) for name in names)


@cache
def _photograph(name: str) -> Photograph:
    from torchvision.transforms.functional import pil_to_tensor  # slow to import

    package, file, license, credit = _FILES[name]
    module, folder = _FOLDERS[package]
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            f"the photograph {name!r} comes with {package}, which is not installed: "
            "pip install 'widefield[photographs]'. Commands also take images of yours, with --images."
        )
    pixels = pil_to_tensor(read(Path(found.origin).parent / folder / file))
    return Photograph(name, torch.as_tensor(pixels), license, credit, package)
