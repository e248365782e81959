"""Classes as bars, and masks in colors, on their images and in files."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from widefield import report
from widefield.drawing.classes import ClassDrawing
from widefield.drawing.masks import MaskDrawing, colored, label_file, overlay, shares
from widefield.drawing.parts import preview
from widefield.tasks import ClassPrediction, MaskPrediction

MASK = np.array([[0, 0, 1, 1], [0, 2, 2, 255], [2, 2, 2, 255]], dtype=np.uint8)
PALETTE = ((10, 20, 30), (200, 0, 0), (0, 0, 250))


def test_label_files_hold_indices_under_the_palette() -> None:
    image = Image.open(io.BytesIO(label_file(MASK, PALETTE)))
    assert image.mode == "P"
    assert np.array_equal(np.asarray(image), MASK)
    assert image.getpalette()[:9] == [channel for color in PALETTE for channel in color]
    many = label_file(MASK.astype(np.int32) * 2, [(0, 0, 0)] * 600)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(many))), MASK.astype(int) * 2)


def test_overlays_keep_pixels_without_a_class() -> None:
    image = Image.new("RGB", (4, 3), (100, 100, 100))
    shown = np.asarray(overlay(image, MASK, PALETTE, opacity=0.5))
    assert shown[0, 0].tolist() == [55, 60, 65]
    assert shown[1, 3].tolist() == [100, 100, 100]
    assert np.array_equal(colored(MASK, PALETTE)[0, 3], (200, 0, 0))
    assert np.array_equal(colored(MASK, PALETTE)[2, 3], (128, 128, 128))


def test_previews_fit_a_page() -> None:
    sizes = {(64, 48): (640, 480), (320, 30): (640, 60), (330, 30): (330, 30), (1280, 960): (640, 480)}
    assert {size: preview(Image.new("RGB", size)).size for size in sizes} == sizes


def test_shares_count_every_pixel() -> None:
    assert shares(MASK, 3) == {2: 5 / 12, 0: 3 / 12, 1: 2 / 12}
    assert list(shares(MASK, 3)) == [2, 0, 1]
    assert 255 in shares(MASK, 256)


def test_equal_names_of_classes_are_told_apart() -> None:
    drawing = ClassDrawing(("crane", "crane", "owl"), (), 3)
    best = drawing.best(ClassPrediction(torch.tensor([0.2, 0.5, 0.3])))
    assert list(best) == ["crane (1)", "owl", "crane (0)"]


def test_masks_have_a_row_a_card_and_files() -> None:
    drawing = MaskDrawing(("sky", "sea", "land & sand"), PALETTE, 5)
    mask = MaskPrediction(torch.from_numpy(np.kron(MASK, np.ones((10, 10), np.uint8))))
    image = Image.new("RGB", (40, 30), (90, 90, 90))
    assert drawing.row(mask) == {"size": "40x30", "classes": "3", "largest": "land & sand 42 %, sky 25 %, sea 17 %"}
    card = report.fragment(drawing.card("a.png", image, mask))
    assert card.count("data:image") == 3
    assert "land &amp; sand 41.7 %" in card
    assert "no class" in card
    files = drawing.files(image, mask)
    assert set(files) == {"labels", "overlays"}
    assert Image.open(io.BytesIO(files["overlays"])).size == (40, 30)
