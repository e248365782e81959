"""Decode image files, including those whose pixels do not fit into 8 bits of RGB; no other module decodes.

Networks take RGB with 8 bits per channel. Files may hold other pixels, and Pillow's conversion clips them: 16-bit gray
becomes white, floats between 0 and 1 become black.
"""

from __future__ import annotations

import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from widefield import _checks

Pixels = NDArray[np.integer[Any]]

# Pillow's errors for broken bytes. Unlike these, OSErrors of the system have an errno.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation (JEITA CP-3451, tag 0x0112) -> the operation that turns the image upright."""
_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""
_HALF = 0.5 / 255
"""Half a level of 8 bits, for floats from 0 to 1."""
_BACK = {**_UPRIGHT, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


class CorruptImageError(OSError):
    """A file that can be opened, but is not a complete image."""


class UnsupportedImageError(CorruptImageError):
    """An intact image that is not supported: too large, or with pixels of unknown range."""


class LabelError(ValueError):
    """A label image that can be read, but does not hold the classes of its image's pixels."""


def read(
    source: str | Path | BinaryIO,
    name: str | Path | None = None,
    *,
    exif_orientation: bool = True,
    max_pixels: int | None = None,
) -> Image.Image:
    """Return the image in a file as RGB with 8 bits per channel, decoded to the last byte.

    16-bit gray is scaled to 8 bits and rounded, and so are floats from 0 (black) to 1 (white). Other floats, signed
    integers and 32-bit integers are refused, because files do not state their range. Gray with 0 as white is inverted.
    Transparency is ignored, as timm and torchvision do. Pillow converts CMYK and other color models, without color
    profiles. The first of several images in a file is read.

    Args:
        source: a path, or a file opened for reading, which is closed.
        name: name of the file for errors; default: the path.
        exif_orientation: rotate the image by its EXIF orientation, as viewers do; False returns it as stored.
        max_pixels: refuse images with more pixels; None means Pillow's limit, twice ``PIL.Image.MAX_IMAGE_PIXELS``.

    Raises:
        CorruptImageError: the image cannot be fully decoded.
        UnsupportedImageError: it has too many pixels, or pixels of unknown range.
        OSError: the file cannot be opened or read.
        MemoryError: the image does not fit into memory. All of these messages name the file.
    """
    name = str(source if name is None else name)
    with _naming(name):
        if isinstance(source, (str, Path)):
            with _opened(source, name, max_pixels) as image:
                return _decoded(image, name, exif_orientation)
        with source, _opened(source, name, max_pixels) as image:
            return _decoded(image, name, exif_orientation)


def read_size(path: str | Path, *, exif_orientation: bool = True, max_pixels: int | None = None) -> tuple[int, int]:
    """Return (height, width) of the image that `read` would return, from the file's header.

    Args:
        path: the file.
        exif_orientation, max_pixels: as of `read`.

    Raises:
        CorruptImageError, UnsupportedImageError, OSError: as of `read`, as far as the header shows it.
    """
    name = str(path)
    with _naming(name), _opened(path, name, max_pixels) as image:
        # Pillow states the size of a TIFF file as it turns it; see _decoded.
        turned = exif_orientation != isinstance(image, TiffImagePlugin.TiffImageFile)
        sideways = turned and _orientation(image) in _SIDEWAYS
        return (image.width, image.height) if sideways else (image.height, image.width)


def read_labels(path: str | Path, *, form: str = "index", max_pixels: int | None = None) -> Pixels:
    """Return the values in a label image as they are stored, without scaling, colors or rotation.

    Args:
        path: the file.
        form: what the file must hold: ``"index"``, gray values; ``"palette"``, gray values or the indices of a palette;
            ``"color"``, colors.
        max_pixels: as of `read`.

    Returns:
        Integers (H, W), or for ``"color"`` uint8 (H, W, 3).

    Raises:
        LabelError: the file holds pixels of another form, or is a JPEG file.
        CorruptImageError, UnsupportedImageError, OSError, MemoryError: as of `read`.
    """
    name = str(path)
    with _naming(name), _opened(path, name, max_pixels) as image:
        if image.format in ("JPEG", "MPO"):
            raise LabelError(
                f"the label image {name} is a JPEG file, whose compression changes values. Write labels as PNG."
            )
        tiles = getattr(image, "tile", ())
        raw = str(getattr(tiles[0], "args", "")) if image.format == "PNG" and tiles else ""
        image.load()
        if form == "color":
            return _colors(image, name)
        _check_form(image, name, form)
        # Pillow stretches PNG's values of 2 and 4 bits to 0..255.
        return np.asarray(image).astype(np.int32) if image.mode == "I" else np.asarray(image) // _STRETCHED.get(raw, 1)


_STRETCHED = {"L;2": 85, "L;4": 17}


def _colors(image: Image.Image, name: str) -> Pixels:
    if image.mode not in ("RGB", "RGBA", "P"):
        raise LabelError(
            f"the label image {name} holds single values (Pillow's mode {image.mode}) where colors are expected. Set "
            f"label_format: index."
        )
    image.info.pop("transparency", None)
    return np.asarray(image.convert("RGB"))


def _check_form(image: Image.Image, name: str, form: str) -> None:
    if image.mode == "P" and form != "palette":
        raise LabelError(
            f"the label image {name} has a palette, so its values may be numbers of colors and not classes. Set "
            f"label_format: palette if they are classes, as in Pascal VOC, or label_format: color and a palette if the "
            f"colors stand for classes. Otherwise save it as gray values."
        )
    if len(image.getbands()) > 1:
        raise LabelError(
            f"the label image {name} has {len(image.getbands())} channels (Pillow's mode {image.mode}); a label image "
            f"holds one value per pixel. Save the values of the classes as gray, or set label_format: color and the "
            f"palette with the color of each class."
        )
    if image.mode == "F":
        raise LabelError(f"the label image {name} holds floats. Save the values of the classes as integers.")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Raise the errors of a block that decodes an image as errors that name the file."""
    try:
        yield
    except (CorruptImageError, LabelError):
        raise
    except _BOMBS as error:
        raise UnsupportedImageError(
            f"will not read the image {name}: {type(error).__name__}: {str(error).rstrip('.')}. If you trust the file, "
            f"{_REMEDY}. Otherwise shrink the image."
        ) from error
    except MemoryError as error:
        raise MemoryError(f"out of memory while reading the image {name}.") from error
    except UnidentifiedImageError as error:
        raise CorruptImageError(
            f"cannot read the image {name}: it is damaged, or in a format that Pillow does not know."
        ) from error
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the system, not from Pillow
            raise OSError(error.errno, error.strerror, name) from error
        if "MAX_TEXT_" in str(error):
            raise UnsupportedImageError(
                f"will not read the image {name}: its texts or color profile are larger than Pillow's limit ({error}). "
                f"If you trust the file, raise PIL.PngImagePlugin's constant of that name. Otherwise save it without."
            ) from error
        raise CorruptImageError(f"cannot read the image {name}: {type(error).__name__}: {error}.") from error


def decoding_options(exif_orientation: object, max_pixels: object) -> dict[str, Any]:
    """Check the options of `read` and return them by name; raises TypeError or ValueError."""
    limit = None if max_pixels is None else _checks.integer("max_pixels", max_pixels)
    return {"exif_orientation": _checks.boolean("exif_orientation", exif_orientation), "max_pixels": limit}


_LIMIT = threading.Lock()
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_REMEDY = "raise the limit by the option max_pixels of the data set, or by PIL.Image.MAX_IMAGE_PIXELS"


def _opened(source: str | Path | BinaryIO, name: str, max_pixels: int | None) -> Image.Image:
    """Open an image and check its number of pixels; raises UnsupportedImageError or Pillow's errors for large images.

    Pillow's own check is switched off, because its warning does not name the file.
    """
    with _LIMIT:  # Pillow's limit is a global variable
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(source)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    pixels = image.width * image.height
    try:
        if max_pixels is None:
            _check_pixels(pixels, limit, name)
        elif pixels > max_pixels:
            raise UnsupportedImageError(
                f"will not read the image {name}: it has {pixels:,} pixels, more than max_pixels={max_pixels:,}. Raise "
                f"max_pixels, or shrink the image."
            )
    except BaseException:
        image.close()
        raise
    return image


def _check_pixels(pixels: int, limit: int | None, name: str) -> None:
    """Warn above Pillow's limit and refuse above twice that, as Pillow does, in a message that names the file."""
    if limit is None or pixels <= limit:
        return
    twice = "twice " if pixels > 2 * limit else ""
    found = f"it has {pixels:,} pixels, more than {twice}Pillow's limit of {limit:,}"
    if twice:
        raise Image.DecompressionBombError(found)
    text = f"the image {name} is large: {found}. If you trust the file, {_REMEDY}."
    warnings.warn(text, Image.DecompressionBombWarning, stacklevel=2)


def _decoded(image: Image.Image, name: str, exif_orientation: bool) -> Image.Image:
    # Pillow turns TIFF files upright while it decodes them, and drops their orientation.
    is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    stored = _orientation(image) if is_tiff else 1
    image.load()
    image.info.pop("transparency", None)  # Pillow warns if it ignores the transparency of a palette
    rgb = _eight_bits(image, name).convert("RGB")
    if is_tiff:
        turn = None if exif_orientation else _BACK.get(stored)
    else:
        turn = _UPRIGHT.get(_orientation(image)) if exif_orientation else None
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except (*_BROKEN, Warning):  # the image itself may be intact
        return 1
    return found if isinstance(found, int) else 1


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Return ``image`` in a mode that Pillow converts to RGB without clipping; raises UnsupportedImageError."""
    tags = getattr(image, "tag_v2", {})
    if 2 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()):
        raise _without_range(name, "signed integers")
    if image.mode == "F":
        values: NDArray[np.floating[Any]] = np.asarray(image, dtype=np.float32)
        if not (values.min() >= -_HALF and values.max() <= 1 + _HALF):  # NaN is neither
            raise _without_range(name, f"floats from {values.min():.4g} to {values.max():.4g}")
        values = values.clip(0, 1)  # resampling and compression overshoot by rounding
    elif image.mode.startswith("I;16"):
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        values = np.asarray(image, dtype=np.float32) / ((1 << bits) - 1)
    elif image.mode == "I" and image.format in ("PPM", "PNG"):  # scaled to 16 bits, for any largest value of the file
        values = np.asarray(image, dtype=np.float32) / 65535
    elif image.mode == "I":
        raise _without_range(name, "32-bit integers")
    else:
        return image
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white; Pillow itself inverts 8-bit images only
        values = 1 - values
    return Image.fromarray(np.rint(255 * values).astype(np.uint8))


def _without_range(name: str, pixels: str) -> UnsupportedImageError:
    return UnsupportedImageError(
        f"will not read the image {name}: it holds {pixels}, and the file does not say which values are black and "
        f"white. Save it with 8 or 16 bits, or as floats from 0 to 1."
    )
