"""The script that renders emoji and composes data sets, on hand-written drawings in the form of iconify's packages."""

import csv
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import load_script
from widefield import data

TWO = ["--photographs", "china", "flower"]
DRAWINGS = {
    "disk": '<circle cx="8" cy="8" r="6" fill="#f00"/>',
    "bar": '<rect x="2" y="6" width="12" height="4" fill="#00f"/>',
    "line": '<rect x="8" y="0" width="0.2" height="16"/>',  # too thin
    "twin": '<circle cx="8" cy="8" r="6" fill="#fe0000"/>',  # looks like the disk
    "flag": '<rect width="16" height="16" fill="#0f0"/>',  # of no category of objects
    "hand": '<rect width="9" height="9" fill="#0f0"/>',  # several code points
}
CODES = {"disk": "1f534", "bar": "1f4cf", "line": "1f4cd", "twin": "1f535", "flag": "1f6a9", "hand": "1f44b-1f3fb"}


@pytest.fixture(scope="module")
def emoji():
    pytest.importorskip("resvg_py", reason="needs resvg-py")
    return load_script("experiments/emoji.py")


def pack(folder, style):
    files = {
        "icons": {"prefix": style, "width": 16, "height": 16, "icons": {n: {"body": b} for n, b in DRAWINGS.items()}},
        "chars": {code: name for name, code in CODES.items()},
        "info": {
            "name": style.title(),
            "author": {"name": "A", "url": "there"},
            "license": {"title": "MIT", "url": "x"},
        },
        "metadata": {"categories": {"Objects": [name for name in DRAWINGS if name != "flag"], "Flags": ["flag"]}},
    }
    path = folder / f"{style}.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            text = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}.json")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    return str(path)


@pytest.fixture(scope="module")
def rendered(emoji, tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    packs = [pack(folder, style) for style in ("one", "two", "three")]
    emoji.main(["render", *packs, "--out", str(folder / "out"), "--size", "32", "--classes", "2"])
    return folder / "out"


def test_drawings_fill_their_box_and_keep_their_holes_transparent(rendered):
    red, blue = sorted(Path(rendered, "one").iterdir(), key=lambda path: path.name == "bar.png")
    assert red.stem in ("disk", "twin")
    disk, bar = (np.asarray(Image.open(path)) for path in (red, blue))
    assert disk.shape == (32, 32, 4)
    assert bar.shape == (11, 32, 4)
    assert disk[16, 16].tolist()[3] == 255
    assert disk[0, 0, 3] == 0
    covered = (disk[..., 3] >= 128).mean()
    assert covered == pytest.approx(np.pi / 4, abs=0.02)
    assert (bar[2:-2, 2:-2] == [0, 0, 255, 255]).all()


def test_thin_twin_and_foreign_drawings_are_no_classes(emoji, rendered, tmp_path):
    classes = set((rendered / "classes.txt").read_text().split())
    assert classes in ({"disk", "bar"}, {"twin", "bar"})
    packs = [pack(tmp_path, style) for style in ("one", "two")]
    with pytest.raises(SystemExit, match="2 classes that differ enough, fewer than 3"):
        emoji.main(["render", *packs, "--out", str(tmp_path / "out"), "--classes", "3", "--size", "16"])
    with pytest.raises(SystemExit, match="at least two styles"):
        emoji.main(["render", packs[0], "--out", str(tmp_path / "out")])


def rows(folder):
    with (folder / "objects.csv").open() as file:
        return list(csv.DictReader(file))


def classified(emoji, rendered, out, *more):
    counts = ["--train", "6", "--val", "3", "--size", "48"]
    emoji.main(["classify", str(rendered), "--out", str(out), *counts, *TWO, *more])
    return out


def test_class_folders_have_one_object_of_the_asked_size_each(emoji, rendered, tmp_path):
    small = classified(emoji, rendered, tmp_path / "small", "--object-sizes", "small")
    large = classified(emoji, rendered, tmp_path / "large", "--object-sizes", "30", "40")
    train, val = data.create_both("folder", root=str(small), size=48)
    assert (len(train), len(val), len(train.classes)) == (12, 6, 2)
    for folder, (low, high) in ((small, (6, 12)), (large, (30, 40))):
        found = rows(folder)
        assert len(found) == 18
        for row in found:
            assert low <= int(row["side"]) <= high
            assert int(row["side"]) == max(int(row["width"]), int(row["height"]))
            assert (row["style"] == "three") == row["file"].startswith("val/")
            assert row["file"].split("/")[1] == row["class"]
    notice = (small / "NOTICE.txt").read_text()
    assert "Three (three): A, there. License: MIT" in notice
    assert "Photograph china: danielbuechele (Flickr). License: CC BY 2.0." in notice


def test_images_depend_on_seed_split_and_number_only(emoji, rendered, tmp_path):
    first, again, other = (
        classified(emoji, rendered, tmp_path / name, "--seed", seed)
        for name, seed in (("first", "1"), ("again", "1"), ("other", "2"))
    )
    files = [path.relative_to(first) for path in sorted(first.rglob("*.jpg"))]
    assert all((first / file).read_bytes() == (again / file).read_bytes() for file in files)
    assert not any((first / file).read_bytes() == (other / file).read_bytes() for file in files)
    longer = tmp_path / "longer"
    emoji.main(["classify", str(rendered), "--out", str(longer), "--train", "7", "--val", "3", "--size", "48", *TWO,
                "--seed", "1"])  # fmt: skip
    assert all((first / file).read_bytes() == (longer / file).read_bytes() for file in files)


def test_masks_are_the_visible_pixels_of_the_objects(emoji, rendered, tmp_path):
    out = tmp_path / "masks"
    words = ["--train", "4", "--val", "4", "--size", "64", "--objects", "3", "--val-style", "one", *TWO]
    emoji.main(["segment", str(rendered), "--out", str(out), *words])
    train, val = data.create_both("masks", root=str(out), classes=str(out / "classes.txt"), size=64)
    assert (len(train), len(val)) == (4, 4)
    assert train.classes[0] == "background"
    found = rows(out)
    assert {row["style"] for row in found if "/val/" in row["file"]} == {"one"}
    for path in sorted((out / "masks").rglob("*.png")):
        mask = np.asarray(Image.open(path))
        own = [row for row in found if row["file"] == f"images/{path.parent.name}/{path.stem}.jpg"]
        assert sum(int(row["visible"]) for row in own) == (mask > 0).sum() > 0
        for value, name in enumerate(train.classes[1:], start=1):
            assert (mask == value).sum() == sum(int(row["visible"]) for row in own if row["class"] == name)
        image = np.asarray(Image.open(out / "images" / path.parent.name / f"{path.stem}.jpg"), float)
        blue = train.classes.index("bar")
        if (mask == blue).sum() > 50:  # the bars are pure blue
            assert (image[mask == blue] @ [-1, 0, 1]).mean() > 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--object-sizes", "tiny"], "small, large, mixed, or two sides from 4 to 48"),
        (["--object-sizes", "20", "10"], "got 20 10"),
        (["--classes", "9"], "has 2 classes, fewer than 9"),
        (["--val-style", "four"], "--val-style must be one of one, two, three"),
    ],
)
def test_wrong_arguments_are_refused(emoji, rendered, tmp_path, words, message):
    with pytest.raises(SystemExit, match=message):
        classified(emoji, rendered, tmp_path / "out", *words)


def test_a_missing_renderer_is_named(emoji, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    packs = [pack(tmp_path, style) for style in ("one", "two")]
    with pytest.raises(SystemExit, match="pip install resvg-py"):
        emoji.main(["render", *packs, "--out", str(tmp_path / "out")])
