"""Images with label images in any folders or in a CSV file, and the forms of label images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_segmentation import draw, write_cityscapes, write_image, write_labels, write_masks
from PIL import Image

from widefield.data import LabelError, Masks, create, default_palette

THREE = ("sky", "sea", "ship")
RED, GREEN, BLUE = (200, 0, 0), (0, 180, 0), (0, 0, 160)


def write_one(root, picture, split="val", name="a"):
    """Write a label image, given as a Pillow image, and an image of its size."""
    size = picture.size[::-1]
    write_image(root / f"images/{split}/{name}.jpg", np.zeros(size, dtype=np.uint8), np.random.default_rng(0))
    (root / f"masks/{split}").mkdir(parents=True, exist_ok=True)
    picture.save(root / f"masks/{split}/{name}.png")
    return str(root / f"masks/{split}/{name}.png")


VALUES = np.array([[0, 1, 2, 255], [2, 1, 0, 0], [1, 1, 1, 1]], dtype=np.uint8)


def read(root, **options):
    return Masks("val", **{"root": root, "classes": THREE, **options})[0]["mask"]


def test_folders_may_have_any_names_and_suffixes(tmp_path):
    masks = write_cityscapes(tmp_path, train_ids=True)
    options = {
        "root": tmp_path,
        "classes": [f"class {i}" for i in range(19)],
        "images": "leftImg8bit/{split}",
        "labels": "gtFine/{split}",
        "image_suffix": "_leftImg8bit",
        "label_suffix": "_gtFine_labelTrainIds",
    }
    for split in ("train", "val"):
        data = create("masks", split, size=16, **options)
        assert len(data) == len(masks[split])
    for sample, expected in zip(data, masks["val"], strict=True):
        assert torch.equal(sample["mask"], torch.from_numpy(expected).long())
    assert "without '_gtFine_labelTrainIds' in their names" in data.found()


def test_splits_may_have_other_names(tmp_path):
    write_masks(tmp_path)
    (tmp_path / "images/val").rename(tmp_path / "images/test")
    (tmp_path / "masks/val").rename(tmp_path / "masks/test")
    assert len(Masks("val", root=tmp_path, classes=THREE, val="test")) == 2
    with pytest.raises(FileNotFoundError, match=r"no folder '.*images/val'. Set images and labels"):
        Masks("val", root=tmp_path, classes=THREE)


def test_data_without_splits_are_split_by_name(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(20):
        mask = draw(rng, 8, 8, 3)
        write_image(tmp_path / f"images/{number}.png", mask, rng)
        write_labels(tmp_path / f"masks/{number}.png", mask)
    both = [Masks(split, root=tmp_path, classes=THREE, val_fraction=0.2) for split in ("train", "val")]
    names = [{data.name(i) for i in range(len(data))} for data in both]
    assert [len(found) for found in names] == [16, 4]
    assert not names[0] & names[1]
    assert Masks("val", root=tmp_path, classes=THREE, val_fraction=0.001).found().startswith("val: 1 image ")
    assert len(Masks("train", root=tmp_path, classes=THREE, val_fraction=1.0)) == 1
    with pytest.raises(ValueError, match=r"must name the split.*got 'images' and 'masks'.*val_fraction, such as 0.2"):
        Masks("val", root=tmp_path, classes=THREE, images="images", labels="masks")
    with pytest.raises(ValueError, match="Leave out one of the two"):
        Masks("val", root=tmp_path, classes=THREE, images="images/{split}", val_fraction=0.2)


def write_csv(root, text):
    (root / "pairs.csv").write_text(text, encoding="utf-8")


def test_a_csv_file_lists_the_pairs(tmp_path):
    masks = write_masks(tmp_path)
    lines = ["image, mask ,split,weather"]
    for split, found in masks.items():
        for number in range(len(found)):
            name = f"{split}/{number % 2}/{split}{number}"
            lines.append(f"images/{name}.jpg,{tmp_path}/masks/{name}.png,{split},rain")
    lines.append("images/x.jpg,masks/x.png,test,sun")
    write_csv(tmp_path, "\n".join(lines))
    data = Masks("val", root=tmp_path, classes=THREE, csv="pairs.csv")
    assert torch.equal(data[1]["mask"], torch.from_numpy(masks["val"][1]).long())
    assert "1 of other splits ('images/x.jpg')" in data.found()
    assert len(Masks("train", root=tmp_path, classes=THREE, csv=tmp_path / "pairs.csv", size=8)) == 4


def test_a_csv_file_without_splits_needs_val_fraction(tmp_path):
    write_masks(tmp_path)
    rows = [f"images/train/{i % 2}/train{i}.jpg,masks/train/{i % 2}/train{i}.png" for i in range(4)]
    write_csv(tmp_path, "image,mask\n" + "\n".join(rows))
    with pytest.raises(ValueError, match="no column split: add one, or set val_fraction"):
        Masks("val", root=tmp_path, classes=THREE, csv="pairs.csv")
    sizes = [len(Masks(s, root=tmp_path, classes=THREE, csv="pairs.csv", val_fraction=0.25)) for s in ("train", "val")]
    assert sizes == [3, 1]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("image,label\na,b", ValueError, "no column 'mask'; it has 'image', 'label'. Its first line must name"),
        ("", ValueError, "no column 'image'; it has none"),
        ("image,mask,split\na.jpg,,val", ValueError, "lacks an image or a mask in row 2"),
        ("image,mask,split\na.jpg,a.png,train", FileNotFoundError, "lists no images of the split 'val'"),
        ("image,mask,split\na.jpg,a.png,val", FileNotFoundError, "1 of 1 images are missing; the first is .*a.jpg"),
    ],
)
def test_wrong_csv_files_are_refused(tmp_path, text, error, message):
    write_csv(tmp_path, text)
    with pytest.raises(error, match=message):
        Masks("val", root=tmp_path, classes=THREE, csv="pairs.csv")


def test_a_missing_csv_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*pairs.csv'"):
        Masks("val", root=tmp_path, classes=THREE, csv="pairs.csv")


def test_classes_may_come_from_a_file_with_or_without_colors(tmp_path):
    write_masks(tmp_path)
    (tmp_path / "names.txt").write_text("sky\nsea\n\nship\n")
    data = Masks("val", root=tmp_path, classes="names.txt")
    assert (data.classes, data.palette) == (THREE, default_palette(3))
    (tmp_path / "colored.txt").write_text("sky,1,2,3\nopen, sea,4,5,6\nship,7,8,9\n")
    data = Masks("val", root=tmp_path, classes=tmp_path / "colored.txt")
    assert (data.classes, data.palette) == (("sky", "open, sea", "ship"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))
    assert Masks("val", root=tmp_path, classes=THREE, palette=[RED, GREEN, BLUE]).palette == (RED, GREEN, BLUE)


# Forms of label images


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(VALUES),
        Image.fromarray(VALUES.astype(np.uint16)),
        Image.fromarray(VALUES.astype(np.int32)),
    ],
    ids=["8 bits", "16 bits", "32 bits"],
)
def test_gray_values_are_read_as_they_are(tmp_path, picture):
    path = write_one(tmp_path, picture if picture.mode != "I" else Image.fromarray(VALUES))
    if picture.mode == "I":  # 32-bit integers exist in TIFF only
        Path(path).unlink()
        picture.save(Path(path).with_suffix(".tif"))
    assert torch.equal(read(tmp_path), torch.from_numpy(VALUES).long())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_png_files_of_few_bits_keep_their_values(tmp_path, bits):
    values = VALUES.copy()
    values[values == 255] = 0
    values = values.clip(max=2**bits - 1)
    path = write_one(tmp_path, Image.fromarray(values))
    write_gray_png(path, values, bits)
    assert torch.equal(read(tmp_path), torch.from_numpy(values).long())


def write_gray_png(path, values, bits):
    """Write a gray PNG file of 1, 2 or 4 bits, which Pillow cannot."""
    import struct
    import zlib

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape
    rows = b""
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def with_palette(values, colors):
    picture = Image.fromarray(values)
    picture.putpalette([value for color in colors for value in color])
    return picture


def test_a_palette_is_refused_unless_it_is_expected(tmp_path):
    path = write_one(tmp_path, with_palette(VALUES, default_palette(256)))
    with pytest.raises(LabelError, match=r"has a palette.*label_format: palette if they are classes") as e:
        read(tmp_path)
    assert path in str(e.value)
    assert torch.equal(read(tmp_path, label_format="palette"), torch.from_numpy(VALUES).long())


def test_colors_are_refused_unless_they_are_expected(tmp_path):
    colors = np.array([RED, GREEN, BLUE, *[(0, 0, 0)] * 252, (255, 255, 255)], dtype=np.uint8)[VALUES]
    path = write_one(tmp_path, Image.fromarray(colors))
    with pytest.raises(LabelError, match=r"has 3 channels.*label_format: color") as e:
        read(tmp_path)
    assert path in str(e.value)
    options = {"label_format": "color", "palette": [RED, GREEN, BLUE]}
    found = read(tmp_path, **options, ignore_color=(255, 255, 255))
    assert torch.equal(found, torch.from_numpy(VALUES).long())
    with pytest.raises(LabelError, match=r"stand for no class: \(255, 255, 255\) \(8.3% of the pixels\). Correct"):
        read(tmp_path, **options)


def test_a_palette_of_colors_is_read_by_color(tmp_path):
    order = np.array([2, 0, 1, *range(3, 256)], dtype=np.uint8)  # the file numbers its colors in another order
    colors = [GREEN, BLUE, RED, *default_palette(256)[3:]]
    write_one(tmp_path, with_palette(order[np.minimum(VALUES, 2)], colors))
    found = read(tmp_path, label_format="color", palette=[RED, GREEN, BLUE])
    assert torch.equal(found, torch.from_numpy(np.minimum(VALUES, 2)).long())


@pytest.mark.parametrize(
    ("save", "text"),
    [
        (lambda path: Image.fromarray(VALUES).save(path, "JPEG"), "is a JPEG file, whose compression changes values"),
        (lambda path: Image.fromarray(VALUES).convert("LA").save(path), r"has 2 channels \(Pillow's mode LA\)"),
        (lambda path: Image.fromarray(VALUES).convert("RGBA").save(path), "has 4 channels"),
        (lambda path: Image.fromarray(VALUES.astype(np.float32)).save(path, "TIFF"), "holds floats"),
    ],
)
def test_other_pixels_are_refused_by_name(tmp_path, save, text):
    path = write_one(tmp_path, Image.fromarray(VALUES))
    save(path)
    with pytest.raises(LabelError, match=text) as e:
        read(tmp_path)
    assert path in str(e.value)


def test_values_are_refused_where_colors_are_expected(tmp_path):
    write_one(tmp_path, Image.fromarray(VALUES))
    with pytest.raises(LabelError, match=r"holds single values .*Set label_format: index"):
        read(tmp_path, label_format="color")


# Values


def test_values_outside_the_classes_are_refused_when_the_set_is_built(tmp_path):
    values = VALUES.astype(np.uint16)
    values[0, :3] = 3, 300, 65535
    path = write_one(tmp_path, Image.fromarray(values))
    with pytest.raises(
        LabelError, match=r"no class: 3, 300, 65535 \(25.0% of the pixels\). Values of classes: 0 to 2;"
    ):
        Masks("val", root=tmp_path, classes=THREE)
    with pytest.raises(LabelError, match=r"name all classes, set values.* or ignore_index") as e:
        Masks("val", root=tmp_path, classes=THREE)
    assert path in str(e.value)
    found = read(tmp_path, ignore_index=[3, 255, 300, 65535])
    assert (found == 255).sum() == 4


def test_zero_may_mean_no_class(tmp_path):
    write_one(tmp_path, Image.fromarray(np.array([[0, 1, 2, 3, 255]], dtype=np.uint8)))
    assert read(tmp_path, reduce_zero_label=True).tolist() == [[255, 0, 1, 2, 255]]
    with pytest.raises(ValueError, match="leave out reduce_zero_label"):
        read(tmp_path, reduce_zero_label=True, values=[1, 2, 3])


def test_all_255_classes_from_one_are_read(tmp_path):
    values = np.arange(256, dtype=np.uint8)[None]
    write_one(tmp_path, Image.fromarray(values))
    names = [f"class {i}" for i in range(255)]
    found = read(tmp_path, classes=names, reduce_zero_label=True)
    assert found[0, 1:].tolist() == list(range(255))
    assert found[0, 0] == 255
    assert read(tmp_path, classes=names).tolist() == [list(range(256))]


def test_each_class_may_have_a_value_of_its_own(tmp_path):
    write_one(tmp_path, Image.fromarray(np.array([[0, 255, 0]], dtype=np.uint8)))
    found = read(tmp_path, classes=("ground", "cell"), values=[0, 255])
    assert found.tolist() == [[0, 1, 0]]


def test_0_and_255_for_two_classes_are_not_taken_for_ignored_pixels(tmp_path):
    write_one(tmp_path, Image.fromarray(np.array([[0, 255, 0]], dtype=np.uint8)))
    for names in (("ground", "cell"), ("cell",)):
        with pytest.raises(LabelError, match=r"only the values 0 and 255.*set values: \[0, 255\].*ignore_index: 255"):
            Masks("val", root=tmp_path, classes=names)
    assert read(tmp_path, classes=("ground", "cell"), ignore_index=255).tolist() == [[0, 255, 0]]


def test_a_class_may_be_ignored(tmp_path):
    write_one(tmp_path, Image.fromarray(np.minimum(VALUES, 2)))
    expected = torch.from_numpy(np.where(np.minimum(VALUES, 2) == 1, 255, np.minimum(VALUES, 2))).long()
    assert torch.equal(read(tmp_path, ignore_index=1), expected)


# Options


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"classes": []}, ValueError, "classes must be from 1 to 255"),
        ({"classes": [str(i) for i in range(256)]}, ValueError, "from 1 to 255, as 255 marks ignored pixels; got 256"),
        ({"classes": ["a", "a"]}, ValueError, "classes has 'a' more than once"),
        ({"classes": 3}, TypeError, "classes must be a list of names, or a text file"),
        ({"classes": "nowhere.txt"}, FileNotFoundError, "there is no file 'nowhere.txt'"),
        ({"palette": [RED]}, ValueError, "palette must have one color per class: 3"),
        ({"palette": [RED, RED, 7]}, TypeError, r"the color of 'ship' must be a color \[red, green, blue\]; got 7"),
        ({"palette": [RED, RED, (0, 0, 256)]}, ValueError, "must be from 0 to 255; got 256"),
        ({"palette": [RED, RED, BLUE], "label_format": "color"}, ValueError, r"the color \(200, 0, 0\) twice"),
        ({"label_format": "colors"}, ValueError, "Did you mean 'color'"),
        ({"label_format": "color", "values": [1, 2, 3]}, ValueError, "values is for label images of values"),
        ({"ignore_color": RED}, ValueError, "ignore_color is for label_format: color; with 'index'"),
        ({"values": [0, 1]}, ValueError, r"values must have one entry per class: 3; got 2, \[0, 1\]"),
        ({"values": [0, 1, 1]}, ValueError, "values has an entry twice"),
        ({"values": 3}, TypeError, "values must be a list with the value of each class; got 3"),
        ({"ignore_index": -1}, ValueError, "ignore_index must be from 0 to 65535; got -1"),
        ({"reduce_zero_label": 1}, TypeError, "reduce_zero_label must be True or False; got 1"),
        ({"val_fraction": 1.5}, ValueError, "val_fraction must be from 0.0 to 1; got 1.5"),
        ({"root": "nowhere"}, FileNotFoundError, "root is not a folder: 'nowhere'"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, error, text):
    write_masks(tmp_path)
    with pytest.raises(error, match=text):
        Masks("val", **{"root": tmp_path, "classes": THREE, **options})


def test_required_options_are_named(tmp_path):
    with pytest.raises(TypeError, match="'masks' needs the option classes, the names of the classes"):
        create("masks", "val", root=tmp_path)


def test_two_images_of_one_name_are_refused(tmp_path):
    write_masks(tmp_path)
    (tmp_path / "images/val/0/val0.png").write_bytes((tmp_path / "images/val/0/val0.jpg").read_bytes())
    with pytest.raises(ValueError, match=r"two files named '0/val0': '0/val0.jpg' and '0/val0.png'. Remove one"):
        Masks("val", root=tmp_path, classes=THREE)


def test_folders_without_images_are_refused(tmp_path):
    write_masks(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no images. Left out: 2 without '_left' in their names"):
        Masks("val", root=tmp_path, classes=THREE, image_suffix="_left")
