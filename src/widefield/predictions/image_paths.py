"""Find the image files that paths, folders and globs mean, and name them."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from widefield import _checks
from widefield.data.listing import IMAGE_ENDINGS, Skipped, images_in, is_image

Picture = Image.Image | NDArray[np.uint8]
"""An image in memory: PIL's, or an array uint8 (H, W, 3) or (H, W)."""
Images = str | Path | Picture | Sequence[str | Path] | Sequence[Picture]
"""Files, folders that are searched at any depth, and globs such as ``photos/*.jpg``; or images in memory."""


class Source(NamedTuple):
    """An image to predict: where it is, what it is called, and its pixels if it is in memory."""

    path: Path
    name: str
    pixels: Image.Image | None = None


def find_sources(images: Images) -> list[Source]:
    """Return the images that are meant, with a different name for each; errors as of :func:`find_images`."""
    several = images if isinstance(images, (list, tuple)) else [images]
    if several and all(isinstance(one, (Image.Image, np.ndarray)) for one in several):
        named = [(f"image-{number:0{len(str(len(several)))}d}", one) for number, one in enumerate(several, start=1)]
        return [Source(Path(name), name, _picture(one)) for name, one in named]
    files = find_images(images)  # type: ignore[arg-type]
    return [Source(path, name) for (path, _), name in zip(files, names_of(files), strict=True)]


def _picture(image: Picture) -> Image.Image:
    """Return an image in memory as RGB; raises TypeError or ValueError for another array."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"arrays of images must be uint8, from 0 to 255; got {image.dtype}.")
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or 0 in image.shape:
            raise ValueError(f"arrays of images must be (H, W, 3) or (H, W); got shape {image.shape}.")
        image = Image.fromarray(image)
    return ImageOps.exif_transpose(image).convert("RGB")


def find_images(images: str | Path | Sequence[str | Path]) -> list[tuple[Path, Path]]:
    """Return the files that are meant, and for each the folder that its name is relative to; no file twice.

    Raises:
        FileNotFoundError: there is no such file or folder, or no image.
        TypeError: something else than paths.
    """
    if isinstance(images, (str, Path)):
        images = [images]
    if not isinstance(images, Sequence) or not all(isinstance(one, (str, Path)) for one in images):
        raise TypeError(f"images must be paths of files or folders, or globs, or images in memory; got {images!r}.")
    found: dict[Path, Path] = {}
    for one in images:
        for path, root in _found(Path(one).expanduser()):
            found.setdefault(path, root)
    if not found:
        raise FileNotFoundError("there are no images to predict: give files, folders or globs.")
    return list(found.items())


def _found(path: Path) -> Iterable[tuple[Path, Path]]:
    if path.is_dir():
        skipped = Skipped()
        inside = images_in(path, skipped)
        if not inside:
            left_out = f" Left out: {skipped}." if skipped else ""
            raise FileNotFoundError(f"{str(path)!r} holds no images ({', '.join(IMAGE_ENDINGS)}).{left_out}")
        return [(Path(name), path) for name in sorted(inside)]
    if path.is_file():
        return [(path, path.parent)]
    if any(character in str(path) for character in "*?["):
        matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (any path)
        files = [(match, match.parent) for match in matches if match.is_file() and is_image(match.name)]
        if files:
            return files
        raise FileNotFoundError(f"no image matches {str(path)!r} ({', '.join(IMAGE_ENDINGS)}).")
    near = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
    raise FileNotFoundError(f"there is no file or folder {str(path)!r}.{_checks.did_you_mean(str(path), near)}")


def names_of(files: Sequence[tuple[Path, Path]]) -> list[str]:
    """Return a different name for each file, which also differs without its ending."""
    taken: set[str] = set()
    names = []
    for path, root in files:
        relative = path.relative_to(root)
        name, number = relative, 1
        while str(name.with_suffix("")).lower() in taken:
            number += 1
            name = relative.with_name(f"{relative.stem}-{number}{relative.suffix}")
        taken.add(str(name.with_suffix("")).lower())
        names.append(name.as_posix())
    return names


def matched_names(names: Sequence[str], known: Collection[str], source: str) -> dict[str, str]:
    """Return the entry of a file for each image: that of its name, or of its name without the folder.

    Args:
        names: of all images. The name without the folder counts only if no other image has it.
        known: names in the file.
        source: the file, for messages.

    Raises:
        ValueError: images have no entry; the message counts them and names the first.
    """
    entries, bases = set(known), Counter(PurePosixPath(name).name for name in names)
    found = {}
    for name in names:
        base = PurePosixPath(name).name
        if name in entries:
            found[name] = name
        elif base in entries and bases[base] == 1:
            found[name] = base
    missing = [name for name in names if name not in found]
    if not missing:
        return found
    first = missing[0]
    base = PurePosixPath(first).name
    more = f" and {len(missing) - 1} more of the {len(names)}" if len(missing) > 1 else ""
    if base in entries:
        why = f" It lists {base!r}, and {bases[base]} of the images are called so: list them with their folders."
    else:
        why = f"{_checks.did_you_mean(first, known)} Add the images to the file, or leave them out."
    raise ValueError(f"{source} has no image {first!r}{more}.{why}")
