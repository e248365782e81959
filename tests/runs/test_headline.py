"""What a report says in words about one run or several: who is ahead, by how much, and what is not decided."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import torch

from widefield.runs.accuracy import EachImage, Evaluation
from widefield.runs.headline import Found, evaluated_words, logged_words
from widefield.runs.records import RunRecord
from widefield.tasks import ClassificationScores

HALF = np.arange(400) % 2


def found(
    values: np.ndarray, *, share: bool = True, headline: str = "top1", places: np.ndarray | None = None,
    confusion: list[list[int]] | None = None,
) -> Found:  # fmt: skip
    """Return an evaluation with these numbers of each image: parts of the headline, or ratings alone."""
    places = np.arange(len(values)) if places is None else places
    each = EachImage(places, values.astype(float), values.astype(float) if share else None)
    scores = None if confusion is None else ClassificationScores(("cat", "dog"), torch.tensor(confusion))
    evaluation = Evaluation(
        metrics={headline: float(values.mean())}, images=len(values), seconds=1.0, size=32, batch_size=8,
        mixed_precision="no", channels_last=False, device="cpu", processes=1, scores=scores, each=each,
        rating="its mean IoU",
    )  # fmt: skip
    return Found(evaluation, "animals", headline)


def words(**runs: Found) -> str:
    return "\n".join(evaluated_words(runs))


def test_one_run_is_told_with_its_interval_and_its_weakest_class() -> None:
    text = words(a=found(HALF, confusion=[[150, 50], [150, 50]]))
    assert (
        "a classifies 200 of 400 validation images of animals correctly: 50.0 % (95 % interval 45.1 to 54.9 %)." in text
    )
    assert "The class with the lowest accuracy is dog: 25.0% of 200 (95 % interval 19.5 to 31.4 %)" in text
    assert "mistaken most often for cat" in text
    assert "another training with another seed" in text
    assert "ahead" not in text


def test_a_clear_win_names_the_winner_and_by_how_much() -> None:
    text = words(weak=found(HALF), strong=found(np.maximum(HALF, np.arange(400) < 200)))
    assert "weak and strong were compared on the same 400 validation images of animals. strong is the best." in text
    assert "strong 75.0 % (95 % interval" in text
    assert "strong is ahead of weak by 25.0 points (95 % interval of the difference 20" in text
    assert "not decided" not in text


def test_a_difference_that_may_be_chance_is_not_decided() -> None:
    luckier = HALF.copy()
    luckier[[0, 2, 4]], luckier[[1, 3]] = 1, 0
    text = words(a=found(HALF), b=found(luckier))
    assert "None of them is shown to be better than the others." in text
    assert "b is ahead of a by 0.2 points" in text
    assert "that may be chance, so it is not decided" in text


def test_ties_are_called_ties() -> None:
    assert "a and b have the same result on every image: a tie." in words(a=found(HALF), b=found(HALF))
    assert "have the same mean (95 % interval of the difference" in words(a=found(HALF), b=found(1 - HALF))


def test_of_three_the_decided_and_the_undecided_are_told_apart() -> None:
    better = np.maximum(HALF, np.arange(400) < 200)
    nearly = better.copy()
    nearly[300] = 1
    text = words(low=found(HALF), nearly=found(nearly), better=found(better))
    assert "nearly has the highest result, and is better than low." in text
    assert "nearly is ahead of better by 0.2 points" in text


def test_other_tasks_compare_the_ratings_of_images() -> None:
    generator = np.random.default_rng(0)
    ratings = generator.uniform(0.4, 0.6, 50)
    text = words(a=found(ratings, share=False, headline="miou"), b=found(ratings + 0.1, share=False, headline="miou"))
    assert "b is the best. Each image is rated by its mean IoU; mean rating: b 60." in text
    assert "with miou 60." in text
    assert "b is ahead of a by 10.0 points (95 % interval of the difference 10.0 to 10.0)." in text


def test_one_run_of_another_task_has_the_interval_of_its_ratings() -> None:
    text = words(a=found(np.linspace(0.4, 0.6, 50), share=False, headline="miou"))
    assert (
        "a has miou 50.00% on 50 validation images of animals. Each image is rated by its mean IoU; mean rating" in text
    )
    assert "50.0 % (95 % interval 48" in text


def test_smaller_losses_are_better() -> None:
    losses = np.random.default_rng(0).uniform(0.4, 0.6, 50)
    runs = {name: found(-values, share=False, headline="loss") for name, values in (("a", losses), ("b", losses - 0.1))}
    text = words(**runs)
    assert "b is the best" in text
    assert "b is ahead of a by 0.1 (95 % interval of the difference 0.1 to 0.1)." in text
    assert "b 0.4" in text.replace("b 0.39", "b 0.4")  # the loss, not the negative rating


def test_runs_on_different_images_are_not_ranked() -> None:
    text = words(a=found(HALF), b=found(HALF, places=np.arange(400) + 1))
    assert "so none is ahead" in text
    assert text.count("classifies 200 of 400") == 2
    assert evaluated_words({}) == []


def test_without_images_the_log_speaks() -> None:
    def record(name: str, value: float) -> RunRecord:
        now = datetime.datetime.now(datetime.UTC)
        return RunRecord(Path(name), "finished", now, log=[{"top1": value, "epoch": 0, "step": 1}])

    (text,) = logged_words([record("a", 0.5), record("b", 0.25)])
    assert "a: top1 50.00%; b: top1 25.00%" in text
    assert "cannot be said without the images" in text
    assert "cannot" not in logged_words([record("a", 0.5)])[0]
