"""Predictions for images in files: what is found, prepared, predicted, drawn and written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import ExifTags, Image

from tolerances import FLOAT32, close
from widefield.data.decoding import read
from widefield.dense import UPerNet
from widefield.loading import load
from widefield.predictions import predict, predict_each
from widefield.predictions.image_paths import find_images
from widefield.predictions.predict import predict_files
from widefield.tasks import ClassPrediction

CLASSIFIER = "test_resnet{num_classes: 7}"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of three images of different sizes, one of them gray, and one broken file."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, shape in {"a.png": (40, 60, 3), "b.jpg": (50, 30, 3), "more/a.jpg": (33, 47)}.items():
        Image.fromarray(generator.integers(256, size=shape, dtype=np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    return folder


# Which images


def test_files_folders_and_globs_are_found_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(*words: str | Path) -> list[str]:
        return [path.relative_to(photos).as_posix() for path, _ in find_images(list(words))]

    assert names(photos) == ["a.png", "b.jpg", "broken.png", "more/a.jpg"]
    assert names(f"{photos}/*.png") == ["a.png", "broken.png"]
    assert names(f"{photos}/**/*.jpg") == ["b.jpg", "more/a.jpg"]
    assert names(photos / "b.jpg", photos) == ["b.jpg", "a.png", "broken.png", "more/a.jpg"]
    (photos / "notes.txt").write_text("x")
    assert names(f"{photos}/[an]*") == ["a.png"]
    (photos / "x[1].png").write_bytes((photos / "a.png").read_bytes())
    assert names(photos / "x[1].png") == ["x[1].png"]  # a file with such a name is no glob


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("nowhere", FileNotFoundError, "there is no file or folder 'nowhere'"),
        ("photo", FileNotFoundError, "Did you mean 'photos'"),
        ("photos/*.gif", FileNotFoundError, "no image matches 'photos/*.gif' (.jpg, "),
        ("empty", FileNotFoundError, "'empty' holds no images (.jpg, "),
        ([], FileNotFoundError, "there are no images to predict"),
        (torch.zeros(1, 3, 8, 8), TypeError, "images must be paths"),
    ],
)
def test_what_is_not_there_is_said(
    images: Any, error: type, message: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    (photos.parent / "empty").mkdir()
    with pytest.raises(error, match=re.escape(message)):
        find_images(images)


# Classification


def test_classes_are_those_of_the_model_on_images_as_it_expects_them(photos: Path) -> None:
    found = predict(CLASSIFIER, photos, size=64, batch_size=2)
    model = timm.create_model("test_resnet", num_classes=7).eval()
    model.load_state_dict(load(CLASSIFIER).model.state_dict())
    config = timm.data.resolve_model_data_config(model, use_test_size=True)
    transform = timm.data.create_transform(**{**config, "input_size": (3, 64, 64)})
    assert [entry.name for entry in found.images] == ["a.png", "b.jpg", "more/a.jpg"]
    for entry in found.images:
        with torch.no_grad():
            expected = model(transform(Image.open(entry.path).convert("RGB"))[None]).softmax(1)[0]
        assert isinstance(entry.prediction, ClassPrediction)
        close(entry.prediction.probabilities, expected, FLOAT32)
    first = found.rows()[0]
    best = found[0].prediction.probabilities.argmax()
    assert (first["image"], first["class"]) == ("a.png", f"class {best}")


def test_unreadable_images_are_listed_and_not_fatal(photos: Path) -> None:
    found = predict(CLASSIFIER, photos, size=32)
    (lost,) = found.unreadable
    assert lost.path == photos / "broken.png"
    assert "cannot read the image" in lost.reason
    assert "1 image could not be read:" in str(found)
    assert "broken.png" in found._repr_html_()


def test_batches_and_workers_change_nothing(photos: Path) -> None:
    def probabilities(**options: int) -> torch.Tensor:
        found = predict(CLASSIFIER, photos, size=32, **options)
        return torch.stack([entry.prediction.probabilities for entry in found.images])

    one = probabilities(batch_size=1)
    close(probabilities(batch_size=3, workers=2), one, FLOAT32)


def test_a_network_for_gray_images_gets_gray_images(photos: Path) -> None:
    found = predict("test_resnet{num_classes: 3, in_chans: 1}", photos / "a.png", size=32)
    assert found[0].prediction.probabilities.shape == (3,)


def test_a_loaded_model_is_used_as_it_is(photos: Path) -> None:
    subject = load(CLASSIFIER)
    (found,) = predict_each(subject, photos / "a.png", size=32)
    assert torch.equal(
        found.prediction.probabilities, predict(subject, photos / "a.png", size=32)[0].prediction.probabilities
    )
    with pytest.raises(TypeError, match="loaded already; it takes no pretrained"):
        predict(subject, photos, pretrained=True)


def test_images_are_drawn_as_they_were_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photo on its side, for a model trained on photos as they are stored, and one above Pillow's limit of pixels."""
    segmenter = UPerNet("test_resnet", 3, channels=8, auxiliary=False)
    stored = replace(
        load(CLASSIFIER), model=segmenter.eval(), work="segmentation", preprocessing={"exif_orientation": False}
    )
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.png", exif=exif)
    found = predict(stored, tmp_path / "turned.png", size=32)
    assert found[0].prediction.mask.shape == (40, 60)
    assert found[0].image().size == (60, 40)
    found.save(tmp_path / "out")
    assert read(tmp_path / "out/overlays/turned.png").size == (60, 40)
    assert predict_files(stored, tmp_path / "turned.png", tmp_path / "all", size=32).images == 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    large = replace(stored, preprocessing={"max_pixels": 2400})
    assert predict(large, tmp_path / "turned.png", size=32).save(tmp_path / "page.html").is_file()


# Results


def test_predictions_save_themselves(photos: Path, tmp_path: Path) -> None:
    found = predict(CLASSIFIER, photos, size=32, top=3)
    for kind in ("png", "pdf", "svg", "json", "html"):
        assert found.save(tmp_path / "out" / f"p.{kind}").stat().st_size > 500
    stored = json.loads((tmp_path / "out/p.json").read_text())
    assert [len(image["classes"]) for image in stored["images"]] == [3, 3, 3]
    assert stored["images"][0]["classes"][0]["probability"] == found[0].prediction.probabilities.max().item()
    assert stored["about"]["size"] == 32
    assert stored["unreadable"][0]["path"].endswith("broken.png")
    page = (tmp_path / "out/p.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    with pytest.raises(ValueError, match="the suffix of path"):
        found.save(tmp_path / "p.gif")


# Drawings
