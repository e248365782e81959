"""What the name of a metric tells about it, for the metrics of every task."""

from __future__ import annotations

from typing import Any

import pytest

from widefield import data, tasks
from widefield.tasks.metric_names import HEADLINES, is_share, lower_is_better, meaning, shown


def test_values_as_text() -> None:
    values = {"ema_top1": 0.98765, "real_top5": 1.0, "loss": 0.123456, "lr": 1e-5}
    assert [shown(name, value) for name, value in values.items()] == ["98.77%", "100.00%", "0.1235", "1e-05"]
    assert shown("loss", None) == "-"


SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "classification": ("digits", {}),
    "multilabel": ("scene_labels", {"size": 32, "count": 2}),
    "segmentation": ("scenes", {"size": 32, "count": 2}),
    "detection": ("scenes", {"size": 32, "count": 2}),
    "pose": ("scene_poses", {"size": 32, "count": 2, "crop_size": [32, 32]}),
    "masked_image": ("digits", {}),
}
"""Data of each task."""


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_metrics_of_every_task_are_ranked_and_shown_as_what_they_are(name: str) -> None:
    source, options = SMALL[name]
    task = tasks.create(name, data.create(source, "val", **options))
    metrics = list(task.metrics().compute())
    assert task.headline in metrics
    for prefix in ("", "ema_"):
        assert lower_is_better(prefix + task.headline) is not task.higher_is_better
        for metric in metrics:
            # All that is not a loss or a distance is a share, of which more is better.
            other = metric in ("loss", "epe")
            assert lower_is_better(prefix + metric) is other
            assert is_share(prefix + metric) is not other
            assert shown(prefix + metric, 0.0006199) == ("0.0006199" if other else "0.06%")
    for other in ("lr", "epoch", "experts", "seconds", "depe", "auction"):
        assert not lower_is_better(other)
        assert not is_share(other)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("top5", "among the 5 likeliest"),
        ("miou_small", "among the small objects"),
        ("box_ap75", "an overlap of 0.75"),
        ("mask_ap_large", "of large objects"),
        ("oks_ar50", "a similarity of 0.50"),
        ("pck20", "within 20 %"),
        ("knn_top1", "nearest neighbors"),
    ],
)
def test_metrics_have_a_meaning(metric: str, words: str) -> None:
    assert words in meaning(metric)
    assert not meaning("loss")


def test_headlines_have_a_meaning() -> None:
    assert all(meaning(headline) for headline in HEADLINES.values() if headline != "loss")
