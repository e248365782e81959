"""Photographs that come with packages, as images for analyses and as backgrounds."""

import sys

import numpy as np
import pytest
import torch
from finding import places
from PIL import Image
from sklearn.datasets import load_sample_images

from widefield import data
from widefield.data import PHOTOGRAPH_NAMES, Pictures, Scenes

LICENSES = {"CC BY 2.0", "CC0 1.0", "public domain"}
TWO = ("china", "flower")


@pytest.fixture
def skimage():
    pytest.importorskip("skimage", reason="needs the extra [photographs]")


def test_scikit_learns_two_are_those_of_its_loader():
    for one, theirs in zip(data.photographs(TWO), load_sample_images().images, strict=True):
        assert torch.equal(one.pixels, torch.from_numpy(theirs.copy()).movedim(-1, 0))
        assert (one.package, one.license) == ("scikit-learn", "CC BY 2.0")


def test_all_have_pixels_a_license_and_a_credit(skimage):
    found = data.photographs()
    assert [one.name for one in found] == list(PHOTOGRAPH_NAMES)
    for one in found:
        assert one.pixels.dtype == torch.uint8
        assert one.pixels.shape[0] == 3
        assert min(one.pixels.shape[1:]) >= 300
        assert one.license in LICENSES
        assert one.credit
        gray = torch.equal(one.pixels[0], one.pixels[1])
        assert gray == (one.name in PHOTOGRAPH_NAMES[-4:]), one.name
    from skimage import data as theirs

    assert np.array_equal(data.photographs(["cat"])[0].pixels.movedim(0, -1).numpy(), theirs.cat())


def test_the_parts_of_the_splits_are_the_whole():
    (one,) = data.photographs(["china"])
    assert torch.equal(torch.cat([one.part("train"), one.part("val")], 2), one.pixels)
    assert one.part("train").shape == (3, 427, 427)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    data.photographs(TWO)
    monkeypatch.setitem(sys.modules, "skimage", None)
    data.photo_files._photograph.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"'coffee' comes with scikit-image.*widefield\[photographs\]"):
        data.photographs(["coffee"])
    with pytest.raises(ModuleNotFoundError, match="scikit-image"):
        Scenes("val", background="photos", photographs=["china", "coffee"])
    Scenes("val", photographs=["coffee"])  # not used without background="photos"
    assert len(data.photographs(TWO)) == 2


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("china", TypeError, "a list of names"),
        ([], ValueError, "name at least one"),
        (["chinq"], ValueError, "Did you mean 'china'?"),
    ],
)
def test_wrong_names_are_refused(names, error, message):
    with pytest.raises(error, match=message):
        data.photographs(names)


def test_pictures_of_whole_photographs():
    pictures = Pictures("photographs:flower, china", size=64)
    assert [pictures.name(k) for k in range(2)] == ["flower", "china"]
    assert pictures.found() == "2 photographs: flower, china"
    assert pictures.about["source"] == "photographs:flower, china"
    assert len(Pictures("photographs:flower,china", count=1, size=64)) == 1
    plain = Pictures("photographs:china", size=64, mean=(0, 0, 0), std=(1, 1, 1))[0]["image"]
    (whole,) = data.photographs(["china"])
    middle = whole.pixels[:, 40:387, 146:494].float() / 255  # the central square after resizing to 64 / 0.875
    assert (plain.mean((1, 2)) - middle.mean((1, 2))).abs().max() < 0.02
    with pytest.raises(ValueError, match="Did you mean 'china'"):
        Pictures("photographs:chyna")


def test_all_photographs_by_one_word(skimage):
    assert len(Pictures("photographs:all", size=32)) == len(PHOTOGRAPH_NAMES)


def test_they_are_written_as_files_with_their_credits(tmp_path):
    paths = data.write_photographs(tmp_path / "photos", TWO)
    assert [path.name for path in paths] == ["china.png", "flower.png"]
    pixels = np.asarray(Image.open(paths[0]))
    assert np.array_equal(pixels, data.photographs(TWO)[0].pixels.movedim(0, -1).numpy())
    credits = (tmp_path / "photos/CREDITS.txt").read_text()
    assert "china.png: CC BY 2.0, danielbuechele" in credits
    assert Pictures(tmp_path / "photos", size=32).found().startswith("2 of 2 images")


def test_scenes_in_front_of_chosen_photographs(skimage):
    """The object is 4 pixels wide, so nearly all pixels of the scene are those of the photograph."""
    options = {"count": 3, "objects": (1, 1), "object_sizes": (4, 4), "size": 64, "background": "photos"}
    scenes = Scenes("val", photographs=["gravel"], **options)
    part = data.photographs(["gravel"])[0].part("val")
    for index in range(3):
        image = scenes.pixels(index)
        corners = [image[:, r : r + 16, c : c + 16] for r in (0, 48) for c in (0, 48)]
        assert sum(bool(places(part, patch) or places(part, patch.flip(-1))) for patch in corners) >= 3
    poses = data.create("scene_poses", "val", count=1, size=64, background="photos", photographs=["gravel"])
    assert poses.scenes.background == "photos"
