"""Poses drawn into images: where skeletons lie, what is left out, and colors that everybody can tell apart."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from colorblind import DICHROMATS, color_distance
from widefield import report
from widefield.data import object_palette
from widefield.data.skeleton import Skeleton
from widefield.drawing.poses import PoseDrawing
from widefield.drawing.skeletons import COLORS, Figure, sides, with_skeletons
from widefield.tasks import PosePrediction

SCENES = Skeleton.load("scenes")  # center, top, right, bottom, left
CROSS = np.array([[400.0, 400], [400, 160], [640, 400], [400, 640], [160, 400]])


def drawn(figure: Figure, background: Any = "gray", size: tuple[int, int] = (800, 800)) -> np.ndarray:
    return np.asarray(with_skeletons(Image.new("RGB", size, background), [figure], SCENES))


def changed(found: np.ndarray, background: int = 128) -> np.ndarray:
    return (found != background).any(2)


def whole(**changes: Any) -> Figure:
    return Figure(**{"points": CROSS, "shown": np.ones(5, bool), **changes})


def test_points_and_links_are_where_they_should_be_in_the_color_of_their_side() -> None:
    found = drawn(whole())
    assert tuple(found[400, 520]) == COLORS["right"]  # halfway from the center to the right end
    assert tuple(found[400, 280]) == COLORS["left"]
    assert tuple(found[280, 400]) == COLORS["middle"]
    assert tuple(found[400, 640]) == COLORS["right"]
    rows, columns = changed(found).nonzero()
    assert (abs(np.array([rows.min(), columns.min(), 799 - rows.max(), 799 - columns.max()]) - 151) < 4).all()
    assert not changed(found)[200:320, 200:320].any()


def test_unsure_points_are_left_out_with_their_links() -> None:
    found = drawn(whole(shown=np.array([True, True, False, True, True])))
    assert not changed(found)[:, 420:].any()
    assert changed(found)[280, 400]
    alone = changed(drawn(whole(shown=np.array([False, False, True, False, False]))))
    rows, columns = alone.nonzero()
    assert max(rows.max() - rows.min(), columns.max() - columns.min()) < 20
    assert abs(np.array([rows.mean(), columns.mean()]) - [400, 640]).max() < 1
    assert not changed(drawn(whole(shown=np.zeros(5, bool)))).any()


def test_covered_points_have_a_dark_center() -> None:
    full, hollow = drawn(whole()), drawn(whole(hollow=np.array([False, False, True, False, False])))
    assert hollow[400, 640].max() < 40
    assert np.array_equal(full[:, :600], hollow[:, :600])


def test_lines_lead_to_where_points_should_be() -> None:
    targets = np.full((5, 2), np.nan)
    targets[2] = [760, 400]
    found = drawn(whole(targets=targets))
    assert found[396:404, 700].min(1).max() > 200  # white
    assert not changed(found)[:, 780:].any()
    assert not changed(drawn(whole()))[:, 660:].any()


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (200, 4), (5000, 4000)])
def test_poses_fit_images_of_any_size(size: tuple[int, int]) -> None:
    points = np.array([[0.5, 0.5], [-500, 30], [6000, 2], [3, 5000], [np.nan, 2]])
    found = with_skeletons(Image.new("RGB", size), [whole(points=points), whole(points=points + 1e6)], SCENES)
    assert found.size == size


def test_lines_are_as_wide_as_suits_image_and_figure() -> None:
    def width(figure: Figure, size: tuple[int, int], column: int) -> int:
        return int(changed(drawn(figure, size=size))[:, column].sum())

    small = width(whole(), (800, 800), 520)
    large = width(whole(points=CROSS * 3), (2400, 2400), 1560)
    assert 2.5 < large / small < 3.5
    tiny = whole(points=CROSS / 20 + 100)
    assert width(tiny, (2400, 2400), 126) <= 5


def test_sides_are_those_of_the_names_or_of_the_pairs() -> None:
    people = Skeleton.load("coco")
    for name, side in zip(people.names, sides(people), strict=True):
        assert side == (name.split("_")[0] if "_" in name else "middle")
    assert sides(SCENES) == ("middle", "middle", "right", "middle", "left")
    plain = Skeleton(("a", "b", "c"), (2, 1, 0), (0.1, 0.1, 0.1))
    assert sides(plain) == ("left", "middle", "right")


@pytest.mark.parametrize("kind", [None, *DICHROMATS])
def test_color_blind_people_can_tell_the_sides_apart(kind: str | None) -> None:
    dark = (20, 20, 20)
    for first, second in itertools.combinations([*COLORS.values(), dark], 2):
        assert color_distance(first, second, kind) > 25  # ten times what is just noticeable


@pytest.mark.parametrize("background", ["white", "black"])
def test_skeletons_are_seen_on_light_and_dark_images(background: str) -> None:
    base = 255 if background == "white" else 0
    found = drawn(whole(), background)
    for row, column in ((400, 520), (400, 280), (280, 400)):
        around = found[max(row - 4, 0) : row + 5, column - 4 : column + 5].astype(int)
        assert abs(around - base).max(2).max() > 175


def prediction(**changes: Any) -> PosePrediction:
    points = torch.tensor(CROSS).float()[None] / 40
    given = {
        "scores": torch.tensor([[0.9, 0.8, 0.1, 0.3, 0.2]]),
        "pose_scores": torch.tensor([0.6]),
        "boxes": torch.tensor([[2.0, 2, 18, 18]]),
        "labels": torch.tensor([1]),
        "skeleton": SCENES,
        "size": (20, 20),
        **changes,
    }
    return PosePrediction(points, **given)


TRUE = {"scores": torch.ones(1, 5), "pose_scores": None, "visible": torch.tensor([[2, 1, 2, 0, 2]])}
DRAWING = PoseDrawing(("disk", "square"), object_palette("ab"))


def test_numbers_hold_all_points_and_pictures_the_sure_ones() -> None:
    found = prediction()
    assert DRAWING.row(found) == {
        "size": "20x20", "poses": "1", "key points": "4 of 5", "found": "1 square", "best": "square 0.60",
    }  # fmt: skip
    (pose,) = DRAWING.data(found)["poses"]
    assert (pose["name"], pose["box"]) == ("square", [2, 2, 18, 18])
    assert pose["score"] == pytest.approx(0.6)
    assert list(pose["keypoints"]) == list(SCENES.names)
    assert pose["keypoints"]["right"] == pytest.approx([16, 10, 0.1])
    image = DRAWING.drawn(Image.new("RGB", (800, 800), "gray"), found)
    assert tuple(np.asarray(image)[420, 300]) == COLORS["left"]  # points are at the centers of pixels
    assert not (np.asarray(image)[380:440, 480:660] != 128).any()  # right is unsure


def test_cards_show_label_and_prediction() -> None:
    image = Image.new("RGB", (20, 20))
    card = report.fragment(DRAWING.card("x", image, prediction(), prediction(**TRUE)))
    assert "label: 4 key points, 1 of them covered" in card
    assert "prediction, with lines to the labels; sure of 3 of " in card
    assert "left (round)" in card
    plain = report.fragment(DRAWING.card("x", image, prediction()))
    assert plain.count("<img") == 2
    assert "1 pose" in plain
    nobody = prediction()
    nobody = PosePrediction(
        nobody.keypoints[:0], torch.zeros(0, 5), torch.zeros(0), torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64), skeleton=SCENES, size=(20, 20),
    )  # fmt: skip
    assert "0 poses" in report.fragment(DRAWING.card("x", image, nobody))
    assert DRAWING.row(nobody)["best"] == "-"
    for one in (prediction(), nobody):
        DRAWING.panel(report.blank(2, 2).subplots(), image, one)
    (file,) = DRAWING.files(image, prediction()).values()
    assert file.startswith(b"\x89PNG")


def test_a_box_that_is_the_whole_image_is_not_drawn() -> None:
    image = Image.new("RGB", (200, 200), "gray")
    hidden = prediction(boxes=torch.tensor([[0.0, 0, 20, 20]]))
    found = np.asarray(DRAWING.drawn(image, hidden))
    assert not (found[:15] != 128).any()
    assert (np.asarray(DRAWING.drawn(image, prediction()))[:25] != 128).any()
