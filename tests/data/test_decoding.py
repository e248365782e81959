"""All readers return the pixels of the file."""

import io
import struct
import warnings

import numpy as np
import pytest
from made_sets import write_parquet, write_tar
from PIL import Image, PngImagePlugin

from widefield.data import ConflictImages, Pictures, UnsupportedImageError, create
from widefield.data.decoding import read, read_size

RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
SCALED = ((RAMP.astype(int) * 2 + 257) // 514).astype(np.uint8)  # to 8 bits, rounded


def saved(image, kind, **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def tiff(pixels, *, sample_format=1, photometric=1, **more):
    """Return an uncompressed little-endian TIFF file of gray pixels (TIFF 6.0, section 3)."""
    data, (height, width) = pixels.tobytes(), pixels.shape
    tags = {256: width, 257: height, 258: 8 * pixels.itemsize, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height}
    tags |= {279: len(data), 339: sample_format, **{int(key[1:]): value for key, value in more.items()}}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def pgm(largest, values):
    return b"P5 %d 1 %d\n" % (len(values), largest) + np.array(values, ">u2" if largest > 255 else np.uint8).tobytes()


def pixels(content, **options):
    return np.asarray(read(io.BytesIO(content), "x", **options))


SIXTEEN_BITS = {
    "PNG": saved(RAMP, "PNG"),
    "TIFF": saved(RAMP, "TIFF"),
    "TIFF, big-endian": saved(RAMP.astype(">u2"), "TIFF"),
    "TIFF, compressed": saved(RAMP, "TIFF", compression="tiff_lzw"),
    "PGM": saved(RAMP, "PPM"),
    "TIFF, white is 0": tiff(65535 - RAMP, photometric=0),
}


@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_gray_of_16_bits_is_scaled_to_8_and_rounded(kind):
    found = pixels(SIXTEEN_BITS[kind])
    assert found.dtype == np.uint8
    assert (found == SCALED[..., None]).all()


def test_gray_maps_with_other_largest_values_fill_the_range():
    assert pixels(pgm(1023, [0, 341, 682, 1023]))[0, :, 0].tolist() == [0, 85, 170, 255]
    assert pixels(pgm(15, [0, 5, 10, 15]))[0, :, 0].tolist() == [0, 85, 170, 255]


def test_floats_from_0_to_1_are_black_to_white():
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    for content in (
        saved(values, "TIFF"),
        tiff(values, sample_format=3),
        tiff(1 - values, sample_format=3, photometric=0),
    ):
        assert (pixels(content) == expected[..., None]).all()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (saved(np.full((4, 4), 1.5, np.float32), "TIFF"), "floats from 1.5 to 1.5"),
        (saved(np.full((4, 4), -0.1, np.float32), "TIFF"), "floats from -0.1 to -0.1"),
        (saved(np.full((4, 4), np.nan, np.float32), "TIFF"), "floats from nan to nan"),
        (saved(np.arange(16, dtype=np.int32).reshape(4, 4), "TIFF"), "signed integers"),
        (tiff(RAMP.astype(np.uint32)), "32-bit integers"),
        (tiff(RAMP.astype(np.int16), sample_format=2), "signed integers"),
        (tiff(RAMP.astype(np.int8), sample_format=2), "signed integers"),
    ],
)
def test_pixels_without_a_range_are_refused(content, text):
    with pytest.raises(
        UnsupportedImageError, match=f"will not read the image x: it holds {text}, .*Save it with 8 or 16"
    ):
        pixels(content)


def test_color_models_are_converted_and_transparency_is_ignored():
    colors = Image.new("RGB", (8, 8), (200, 100, 50))
    for image, kind in (
        (colors, "PNG"),
        (Image.new("RGBA", (8, 8), (200, 100, 50, 0)), "PNG"),
        (colors.convert("CMYK"), "TIFF"),
        (colors.quantize(4), "PNG"),
    ):
        assert pixels(saved(image, kind))[4, 4].tolist() == [200, 100, 50], image.mode
    assert abs(pixels(saved(colors.convert("CMYK"), "JPEG", quality=100))[4, 4].astype(int) - (200, 100, 50)).max() < 4
    assert pixels(saved(Image.new("LA", (8, 8), (70, 0)), "PNG"))[4, 4].tolist() == [70] * 3
    assert pixels(saved(Image.new("1", (8, 8), 1), "PNG"))[4, 4].tolist() == [255] * 3
    assert pixels(saved(Image.new("L", (8, 8), 70), "PNG", transparency=70))[4, 4].tolist() == [70] * 3
    for transparency in (0, b"\x00\x80"):  # Pillow warns about the second, and warnings are errors here
        palette = colors.quantize(4)
        assert pixels(saved(palette, "PNG", transparency=transparency))[4, 4].tolist() == [200, 100, 50]


UPRIGHT = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
AS_STORED = {  # UPRIGHT as a camera stores it (JEITA CP-3451, orientation)
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: UPRIGHT.T[::-1],
    7: UPRIGHT.T[::-1, ::-1],
    8: UPRIGHT.T[:, ::-1],
}


@pytest.mark.parametrize("orientation", AS_STORED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "TIFF of 16 bits"])
def test_images_are_turned_upright_unless_asked_not_to(orientation, kind):
    stored = AS_STORED[orientation]
    if kind.startswith("TIFF"):
        content = tiff(stored.astype(np.uint16) * 257 if "16" in kind else stored, _274=orientation)
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = saved(
            Image.fromarray(stored).convert("RGB"), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})
        )
    assert pixels(content)[..., 0].tolist() == UPRIGHT.tolist()
    assert pixels(content, exif_orientation=False)[..., 0].tolist() == stored.tolist()


def test_an_orientation_that_cannot_be_read_or_is_none_changes_nothing():
    picture = Image.fromarray(UPRIGHT).convert("RGB")
    beyond = Image.Exif()
    beyond[0x0112] = 9
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", beyond):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Pillow's own warning, about the second
            assert pixels(saved(picture, "PNG", exif=exif))[..., 0].tolist() == UPRIGHT.tolist()


def test_a_sound_image_beyond_pillows_limit_is_not_called_corrupt(monkeypatch, tmp_path):
    content = saved(Image.new("L", (30, 10), 9), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnsupportedImageError) as caught:
        pixels(content)
    message = str(caught.value)
    for part in ("image x", "DecompressionBombError", "300 pixels", "PIL.Image.MAX_IMAGE_PIXELS", "max_pixels"):
        assert part in message
    assert "corrupt" not in message
    assert pixels(content, max_pixels=300).shape == (10, 30, 3)
    with pytest.raises(UnsupportedImageError, match=r"it has 300 pixels, more than max_pixels=299. Raise max_pixels"):
        pixels(content, max_pixels=299)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)  # only a warning of Pillow, here an error
    with pytest.raises(UnsupportedImageError, match="DecompressionBombWarning"):
        pixels(content)
    assert Image.MAX_IMAGE_PIXELS == 299

    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "a.png").write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = create("folder", "val", root=tmp_path, size=8)
    with pytest.raises(UnsupportedImageError, match=r'cat.a.png.*Or pass corrupt="skip"') as caught:
        data[0]
    assert "delete" not in str(caught.value)
    assert create("folder", "val", root=tmp_path, size=8, max_pixels=300)[0]["image"].shape == (3, 8, 8)
    assert Pictures(tmp_path, size=8, max_pixels=300).tensor().shape == (2, 3, 8, 8)
    with pytest.raises(UnsupportedImageError, match="MAX_IMAGE_PIXELS"):
        Pictures(tmp_path, size=8).tensor()
    data = create("folder", "val", root=tmp_path, size=8, corrupt="skip", max_corrupt=1)
    with pytest.warns(UserWarning, match="It is left out.$"):
        assert data[0] is None


def test_the_warning_of_a_large_image_names_its_file(monkeypatch, tmp_path):
    Image.new("L", (30, 10), 9).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.warns(Image.DecompressionBombWarning, match=r"large.png is large: it has 300 pixels.* max_pixels"):
        read(tmp_path / "large.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path / "large.png", max_pixels=300).size == (30, 10)


def test_floats_may_leave_their_range_by_rounding():
    values = np.array([[-1e-3, 0, 0.5], [0.25, 1, 1.0019]], np.float32)
    assert pixels(saved(values, "TIFF"))[..., 0].tolist() == [[0, 0, 128], [64, 255, 255]]
    with pytest.raises(UnsupportedImageError, match=r"floats from -0.001 to 1.003"):
        pixels(saved(np.where(values > 1, 1.003, values).astype(np.float32), "TIFF"))


def test_long_texts_beside_a_sound_image_are_pillows_limit_too():
    text = PngImagePlugin.PngInfo()
    text.add_text("note", " " * (2 << 20), zip=True)
    with pytest.raises(UnsupportedImageError, match=r"PngImagePlugin.MAX_TEXT_CHUNK.*If you trust the file"):
        pixels(saved(Image.new("L", (8, 8)), "PNG", pnginfo=text))


@pytest.mark.parametrize("reader", ["folder", "shards", "hfds", "pictures", "conflict"])
def test_every_reader_decodes_alike(reader, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = saved(np.ascontiguousarray(RAMP.T[::-1]), "PNG", exif=exif)
    options = {"size": 16, "mean": (0, 0, 0), "std": (1, 1, 1)}
    if reader == "hfds":
        pytest.importorskip("datasets")
        write_parquet(tmp_path, "validation", {"cat": [("a.png", content)]})
        data = create("hfds", "val", path=tmp_path, cache=tmp_path / "cache", crop_pct=1.0, **options)
    elif reader == "shards":
        write_tar(tmp_path / "val" / "cat.tar", [("a.png", content)])
        data = create("shards", "val", root=tmp_path, crop_pct=1.0, **options)
    else:
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat" / "cat1-dog1.png").write_bytes(content)
        if reader == "folder":
            data = create("folder", "val", root=tmp_path, crop_pct=1.0, **options)
        elif reader == "conflict":
            data = ConflictImages(tmp_path, **options)
        else:
            data = Pictures(tmp_path, **options)
    found = (255 * (data[0] if reader != "conflict" else data.sample(0))["image"]).round().byte().numpy()
    if reader == "pictures":  # resizes, then crops
        assert found.min() < 25
        assert found.max() > 230
        assert (np.diff(found[0].mean(1)) > 0).all()  # brighter row by row: upright
    else:
        assert (found == SCALED).all()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"exif_orientation": "yes"}, TypeError, "exif_orientation must be True or False; got 'yes'"),
        ({"max_pixels": 0}, ValueError, "max_pixels must be at least 1; got 0"),
    ],
)
def test_bad_options_are_refused(options, error, text, tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(SIXTEEN_BITS["PNG"])
    for make in (lambda: create("folder", "val", root=tmp_path, **options), lambda: Pictures(tmp_path, **options)):
        with pytest.raises(error, match=text):
            make()


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("turn", [1, 3, 5, 6, 8])
def test_the_size_of_a_file_is_that_of_the_image_it_gives(tmp_path, kind, turn):
    path, exif = tmp_path / f"a.{kind}", Image.Exif()
    exif[0x0112] = turn
    Image.new("RGB", (20, 12)).save(path, exif=exif)
    for upright in (True, False):
        assert read_size(path, exif_orientation=upright) == read(path, exif_orientation=upright).size[::-1]
