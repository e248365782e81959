"""Evaluations of segmentation: single images, scores per class, and the page that shows them."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tolerances import FLOAT64
from train.patches import Patches
from widefield import data
from widefield.data import Sample
from widefield.loading import Subject, Weights
from widefield.loading.inputs import Selection
from widefield.runs import Evaluation, evaluate_model
from widefield.runs.evaluation_page import draw_confusion, rows_by_size, write_evaluation
from widefield.tasks import MaskPrediction, Segmentation, SegmentationScores, create


class Brightness(nn.Module):
    """Predict the class of the brightest channel: red and green rectangles, ground elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([torch.full_like(images[:, 0], 0.5), images[:, 0], images[:, 1]], 1) * self.scale


class Lost(Patches):
    """Patches of which one cannot be read."""

    def sample(self, index: int) -> Sample | None:  # type: ignore[override]
        return None if index == 1 else super().sample(index)


def evaluation(examples: int = 0, **options: object) -> tuple[Evaluation, Patches, Segmentation]:
    dataset = Lost("val", count=9)
    task = create("segmentation", dataset)
    assert isinstance(task, Segmentation)
    settings = {"workers": 0, "batch_size": 4, "device": "cpu", "examples": examples, **options}
    return evaluate_model(Brightness(), dataset, task, **settings), dataset, task  # type: ignore[arg-type]


def test_scores_and_ratings_are_those_of_a_plain_loop() -> None:
    found, dataset, _ = evaluation(examples=2)
    model, rated = Brightness().eval(), {}
    counts = torch.zeros(3, 3, dtype=torch.int64)
    for index in (0, 2, 3, 4, 5, 6, 7, 8):
        sample = dataset[index]
        logits = model(sample["image"][None])
        mask = sample["mask"]
        mine = nn.functional.interpolate(logits, mask.shape, mode="bilinear").argmax(1)[0]
        kept = mask != 255
        own = torch.bincount(3 * mask[kept] + mine[kept], minlength=9).view(3, 3)
        counts += own
        union = own.sum(0) + own.sum(1) - own.diagonal()
        rated[index] = (own.diagonal().double() / union)[union > 0].mean().item()
    assert isinstance(found.scores, SegmentationScores)
    assert torch.equal(found.scores.confusion, counts)
    assert (found.images, found.size) == (8, None)
    order = sorted(rated, key=lambda index: -rated[index])
    assert [one.index for one in found.examples] == [*order[:2], *order[-2:]]
    for one in found.examples:
        assert one.rating == pytest.approx(rated[one.index], rel=FLOAT64)
        sample = dataset[one.index]
        assert isinstance(one.truth, MaskPrediction)
        assert torch.equal(one.truth.mask.long(), sample["mask"])
        assert isinstance(one.prediction, MaskPrediction)
        assert one.prediction.mask.shape == sample["mask"].shape
        assert one.image.size == tuple(sample["image"].shape[:0:-1])
    json.dumps(found.to_dict(), allow_nan=False)


def test_few_images_are_all_examples_once() -> None:
    found, _, _ = evaluation(examples=20)
    assert sorted(one.index for one in found.examples) == [0, 2, 3, 4, 5, 6, 7, 8]
    assert evaluation()[0].examples == ()


def test_predictions_are_those_that_are_evaluated() -> None:
    _, dataset, _ = evaluation()
    sample = dataset[0]
    for options in ({}, {"flip": True, "scales": (0.75, 1.0)}, {"test": "slide", "window": 24}):
        task = create("segmentation", dataset, **options)
        size = tuple(sample["mask"].shape)
        (found,) = task.predict(Brightness(), sample["image"][None], [size])
        (expected,) = task.outputs(Brightness(), task.collate([sample]))["preds"]
        assert torch.equal(found.mask.long(), expected)


def _process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    found, _, _ = evaluation(examples=2)
    assert isinstance(found.scores, SegmentationScores)
    content = {"confusion": found.scores.confusion.tolist(), "examples": [one.index for one in found.examples]}
    Path(folder, f"{rank}.json").write_text(json.dumps(content))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_the_scores_and_examples_of_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, str(tmp_path)), nprocs=2)
    alone, _, _ = evaluation(examples=2)
    assert isinstance(alone.scores, SegmentationScores)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["confusion"] == alone.scores.confusion.tolist()
        assert found["examples"] == [one.index for one in alone.examples]


def subject(dataset: Patches) -> Subject:
    return Subject("bright", Brightness(), 32, dataset.mean, dataset.std, Weights("random"), work="segmentation")


def test_the_page_names_every_class_and_shows_the_images(tmp_path: Path) -> None:
    found, dataset, _ = evaluation(examples=2)
    page = write_evaluation({"bright": (found, subject(dataset), "patches")}, tmp_path / "page.html")
    text = page.read_text()
    assert re.findall("<h2>(.*?)</h2>", text) == [
        "Metrics", "Classes", "Classes by object size", "What is mistaken for what", "Best images", "Worst images",
    ]  # fmt: skip
    assert "8 images of patches" in text
    assert "<dt>macc</dt><dd>mean over the classes of the share of their pixels that are right</dd>" in text
    assert text.count("data:image") == 2 + 4 * 4  # the confusion matrix and its color bar


def test_several_evaluations_are_compared_and_folded(tmp_path: Path) -> None:
    found, dataset, _ = evaluation(examples=2)
    one = (found, subject(dataset), "patches")
    text = write_evaluation({"first": one, "second": one}, tmp_path / "page.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", text) == ["Evaluation"]
    assert "first and second were compared on the same 8 images of patches." in text
    assert "have the same result on every image: a tie." in text
    assert text.count("<tr>") >= 3
    assert "<summary>second: worst images</summary>" in text


def test_rows_by_size_have_the_classes_that_have_objects() -> None:
    counts = torch.zeros(3, 3, 3, dtype=torch.int64)
    counts[0, 0, 0], counts[1, 1, 1], counts[1, 1, 0], counts[2, 2, 2] = 10, 3, 1, 5
    scores = SegmentationScores(("ground", "red", "green"), counts, ("small", "large"))
    assert rows_by_size(scores) == [
        {"class": "red", "small": "75.00%", "large": "-"},
        {"class": "green", "small": "-", "large": "100.00%"},
    ]


def test_of_many_classes_the_most_mistaken_are_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(50, (1, 60, 60), generator=generator)
    counts[0, 7] += 1000
    counts[0, :, 9] = counts[0, 9] = 0  # a class that does not occur
    scores = SegmentationScores(tuple(f"class {k}" for k in range(60)), counts)
    axis = draw_confusion(scores).axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert len(names) == 30
    assert "class 7" in names
    assert "class 9" not in names
    assert axis.get_title() == "the 30 of 59 classes with the most wrong pixels"
    small = draw_confusion(SegmentationScores(("a", "b"), torch.tensor([[[8, 2], [0, 0]]])))
    values = np.asarray(small.axes[0].images[0].get_array())
    assert values[0].tolist() == [80, 20]
    assert np.isnan(values[1].astype(float)).all()


def test_a_selection_has_the_samples_and_names_of_the_whole() -> None:
    whole = Patches("val", count=20)
    some = Selection(whole, 6)
    assert len(some) == 6
    assert Selection(whole, 100)._indices == list(range(20))
    for index in range(6):
        place = int(some.name(index).removeprefix("image "))
        assert torch.equal(some[index]["mask"], whole[place]["mask"])


def test_a_choice_of_poses_has_whole_files() -> None:
    """The first sample of a file brings its people: without it, there is nothing to measure the others on."""
    whole = data.create("scene_poses", "val", count=6, size=64)
    files = whole.boxes.files.tolist()
    for count in (1, 9, 20, 10**6):
        some = Selection(whole, count, complete=True)
        chosen = [int(sample["image_id"]) for sample in some]
        assert len(some) >= min(count, len(whole))
        assert len(some) - chosen.count(max(set(chosen), key=chosen.count)) < count  # not a file too many
        for file in set(chosen):
            assert chosen.count(file) == files.count(file)
        assert sum(len(sample["people"]) for sample in some) >= len(some)
    assert len(Selection(whole, 9)) == 9
