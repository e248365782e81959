"""Learning from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tolerances import FLOAT32, close
from train.helpers import log, same_weights
from widefield.loading import load_trained
from widefield.tasks import Classification
from widefield.train import DataSpec, DistillationSpec, ModelSpec, Recipe, RunResult, TaskSpec
from widefield.train.distillation import Teacher

Run = Callable[..., RunResult]


class Linear(nn.Module):
    """Computes logits from the mean color."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(3, 5)

    def forward(self, image: Tensor) -> Tensor:
        self.seen = image
        logits: Tensor = self.fc(image.mean((2, 3)))
        return logits


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"image": torch.rand(6, 3, 4, 4), "label": torch.tensor([0, 1, 2, 3, 4, 0])}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_hintons(temperature: float) -> None:
    student, teacher, data = Linear(), Linear(1), batch()
    task = Classification(5)
    plain = task.loss(student, data)
    task.learn_from(teacher, weight=0.3, temperature=temperature)
    parts = task.losses(student, data)
    p = (teacher(data["image"]).double() / temperature).softmax(1)
    q = (student(data["image"]).double() / temperature).softmax(1)
    expected = 0.3 * temperature**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(parts["labels"], 0.7 * plain)
    torch.testing.assert_close(parts["teacher"].double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(task.loss(student, data), sum(parts.values()))


def test_a_hard_teacher_names_a_class() -> None:
    student, teacher, data = Linear(), Linear(1), batch()
    task = Classification(5)
    task.learn_from(teacher, weight=1.0, hard=True)
    expected = F.cross_entropy(student(data["image"]), teacher(data["image"]).argmax(1))
    torch.testing.assert_close(task.loss(student, data), expected)


def test_the_teacher_sees_mixed_images() -> None:
    student, teacher = Linear(), Linear(1)
    task = Classification(5, mixup=0.8)
    task.learn_from(teacher, weight=0.5)
    np.random.seed(0)
    task.loss(student, batch())
    assert torch.equal(student.seen, teacher.seen)
    assert not torch.equal(student.seen, batch()["image"])


def test_images_reach_the_teacher_as_it_knows_them() -> None:
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    own, given = ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3)), ((0.5, 0.5, 0.5), (0.25, 0.5, 1.0))

    def normalized(statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in statistics)
        return (pixels - mean) / std

    teacher = Teacher(nn.Identity(), own, given, nullcontext).double()
    close(teacher.model(normalized(given) * teacher.scale + teacher.shift), normalized(own), FLOAT32)
    assert not teacher(normalized(given)).requires_grad
    assert not Teacher(Linear(), own, given, nullcontext).model.training


def test_a_run_learns_from_a_run(run: Run, recipe: Recipe, stop_at: Any) -> None:
    teacher = run(name="teacher", epochs=1)
    taught = {"distillation": DistillationSpec(str(teacher.folder), weight=0.4, temperature=2.0)}
    whole = run(name="whole", **taught)
    entries = [entry for entry in log(whole.folder) if entry["kind"] == "step"]
    assert all(e["labels"] + e["teacher"] == pytest.approx(e["loss"]) for e in entries)
    stop_at(5)
    part = run(**taught)
    rest = run(resume=part.folder, **taught)
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)
    assert same_weights(load_trained(teacher.folder), teacher.model)


def test_a_teacher_alone_at_weight_one_ignores_the_labels(run: Run) -> None:
    teacher = run(name="teacher", epochs=1)
    spec = DistillationSpec(str(teacher.folder), weight=1.0)
    smooth = run(name="a", epochs=1, distillation=spec, task=TaskSpec(args={"label_smoothing": 0.5}))
    plain = run(name="b", epochs=1, distillation=spec)
    assert same_weights(smooth.model, plain.model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation": DistillationSpec("test_resnet")}, "test_resnet does not fit: it gives 1000 outputs"),
        (
            {"distillation": DistillationSpec("TEACHER"), "data": DataSpec("digits", {"size": 32})},
            "has other classes than",
        ),
        (
            {"distillation": DistillationSpec("TEACHER"), "task": TaskSpec(args={"loss": "binary"})},
            "distillation needs loss: cross_entropy",
        ),
    ],
)
def test_teachers_that_do_not_fit(
    run: Run, recipe: Recipe, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if changes["distillation"].teacher == "TEACHER":
        teacher = run(name="teacher", epochs=1)
        changes = {**changes, "distillation": replace(changes["distillation"], teacher=str(teacher.folder))}
    else:  # without the download
        from widefield.train import distillation

        build = distillation.create_model
        monkeypatch.setattr(
            distillation, "create_model", lambda spec: build(ModelSpec(spec.name, spec.args, pretrained=False))
        )
    with pytest.raises(ValueError, match=message):
        run(**changes)


def test_values_are_checked() -> None:
    with pytest.raises(ValueError, match=r"distillation.weight must be from 0.0 to 1.0; got 2"):
        DistillationSpec("x", weight=2.0)
    with pytest.raises(ValueError, match=r"distillation.temperature must be above 0"):
        DistillationSpec("x", temperature=0.0)
    with pytest.raises(ValueError, match="leave it out with hard"):
        DistillationSpec("x", temperature=2.0, hard=True)
