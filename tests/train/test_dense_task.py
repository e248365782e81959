"""A task other than classification: masks of images of several sizes, in lists, with the real engine."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from train.helpers import QUIET, log, same_weights
from widefield import data, tasks
from widefield.data import Sample, SampleSet, seeded
from widefield.loading import load_trained
from widefield.tasks import Batch, Labeled, Task
from widefield.train import ConversionSpec, DataSpec, EmaSpec, ModelSpec, OptimizerSpec, Recipe, TaskSpec, train

MORF = ConversionSpec("morf", "*.conv_dw", {"kernel_sizes": [3, 7]})


class Disks(SampleSet):
    """A bright disk on noise. Size, position and image size differ in every epoch; there are no classes."""

    mean, std = (0.5,) * 3, (0.25,) * 3

    def __init__(self, split: str, *, count: int = 48, seed: int = 0) -> None:
        super().__init__(split, seed + (split == "val"))
        self.count = count

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        with seeded(self.key(index)):
            height, width = (int(side) for side in torch.randint(24, 33, (2,)))
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            (top, left), radius = torch.randint(6, 18, (2,)), torch.randint(5, 10, ())
            mask = (y - top) ** 2 + (x - left) ** 2 < radius**2
            image = data.base.normalize((mask + 0.5 * torch.rand(3, height, width)) / 1.5, self.mean, self.std)
        return {"image": image, "mask": mask}


class Masks(nn.Module):
    """Turn the backbone's first map into one logit per pixel."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(backbone.feature_info.channels()[0], 1, 1)  # type: ignore[operator, union-attr]

    def forward(self, image: Tensor) -> Tensor:
        return F.interpolate(self.head(self.backbone(image)[0]), image.shape[2:], mode="bilinear")[:, 0]


class Overlap(Metric):
    """Accumulate the intersection over union of all masks."""

    full_state_update = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("inter", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("union", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: list[Tensor], target: list[Tensor]) -> None:
        for mine, true in zip(preds, target, strict=True):
            self.inter += (mine & true).sum()
            self.union += (mine | true).sum()

    def compute(self) -> Tensor:
        return self.inter / self.union


class Segmentation(Task):
    """Binary masks: images are padded to one size, masks stay a list."""

    headline = "iou"
    higher_is_better = True
    model_args = {"features_only": True, "out_indices": (0,)}  # noqa: RUF012

    def __init__(self, *, weight: float = 1.0) -> None:
        self.weight = weight

    @classmethod
    def for_data(cls, dataset: Labeled, **options: Any) -> Self:
        return cls(**options)

    def model(self, backbone: nn.Module) -> nn.Module:
        return Masks(backbone)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        assert all(set(sample) == {"image", "mask"} for sample in samples)
        images = [F.pad(s["image"], (0, 32 - s["image"].shape[2], 0, 32 - s["image"].shape[1])) for s in samples]
        return {"image": torch.stack(images), "masks": [sample["mask"] for sample in samples]}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        losses = [
            F.binary_cross_entropy_with_logits(logits[: mask.shape[0], : mask.shape[1]], mask.float())
            for logits, mask in zip(model(batch["image"]), batch["masks"], strict=True)
        ]
        return self.weight * torch.stack(losses).mean()

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        found = zip(model(batch["image"]), batch["masks"], strict=True)
        return {
            "preds": [logits[: mask.shape[0], : mask.shape[1]] > 0 for logits, mask in found],
            "target": batch["masks"],
        }

    def metrics(self) -> MetricCollection:
        return MetricCollection({"iou": Overlap(sync_on_compute=False)})


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Return a recipe of three epochs of six steps, with the names of a user's registrations."""
    monkeypatch.setitem(data.SETS, "disks", Disks)
    monkeypatch.setitem(tasks.TASKS, "segmentation", Segmentation)
    return Recipe(
        name="run",
        model=ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "patch_size": 2}),
        conversion=MORF,
        data=DataSpec("disks", {"count": 48}),
        task=TaskSpec("segmentation", {"weight": 2.0}),
        output=str(tmp_path / "runs"),
        optimizer=OptimizerSpec(lr=1e-2),
        ema=EmaSpec(0.5),
        epochs=3,
        batch_size=8,
        workers=0,
        log_every=1,
        channels_last=True,
        gradient_checkpointing=True,
        trackers=[],
    )


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Send a signal to this process in the n-th training step."""
    loss = Segmentation.loss

    def arrange(n: int) -> None:
        calls = iter(range(1, 1000))

        def counted(*args: Any) -> Tensor:
            if next(calls) == n:
                signal.raise_signal(signal.SIGINT)
            return loss(*args)

        monkeypatch.setattr(Segmentation, "loss", counted)

    return arrange


def test_it_learns_and_its_run_is_loaded(recipe: Recipe) -> None:
    result = train(recipe, console=QUIET)
    entries = [entry for entry in log(result.folder) if entry["kind"] == "epoch"]
    assert set(result.metrics) >= {"train_loss", "iou", "ema_iou", "router_entropy"}  # the routers are checked as well
    assert entries[-1]["iou"] > 0.8
    assert entries[-1]["train_loss"] < 0.5 * entries[0]["train_loss"]
    assert result.best["ema_iou"] == max(entry["ema_iou"] for entry in entries)
    trained = load_trained(result.folder, "last")
    assert isinstance(trained, Masks)
    assert any("router" in name for name, _ in trained.backbone.named_parameters())
    assert same_weights(trained, result.model)
    val = Disks("val")
    assert result.metrics["ema_iou"] == pytest.approx(
        _iou(trained, [val[index] for index in range(len(val))]), abs=1e-6
    )


def _iou(model: nn.Module, samples: Sequence[Sample]) -> float:
    """Process one image at a time, in the batch's size."""
    inter = union = 0
    for sample in samples:
        height, width = sample["mask"].shape
        image = F.pad(sample["image"], (0, 32 - width, 0, 32 - height))
        with torch.no_grad():
            mine = model(image[None])[0, :height, :width] > 0
        inter += int((mine & sample["mask"]).sum())
        union += int((mine | sample["mask"]).sum())
    return inter / union


@pytest.mark.parametrize("stop", [4, 12])
def test_it_resumes_exactly(recipe: Recipe, stop_at: Callable[[int], None], stop: int) -> None:
    """Stop in the middle of an epoch and at its end; resume with another number of workers."""
    whole = train(replace(recipe, name="whole"), console=QUIET)
    stop_at(stop)
    part = train(recipe, console=QUIET)
    assert (part.steps, part.interrupted) == (stop, signal.SIGINT)
    rest = train(replace(recipe, workers=1), resume=part.folder, console=QUIET)
    assert rest.interrupted is None
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)
    assert (rest.metrics, rest.best) == (whole.metrics, whole.best)


def test_it_starts_from_a_classifiers_weights_or_from_its_own(recipe: Recipe, tmp_path: Path) -> None:
    from widefield.train import build_model

    plain = replace(recipe, conversion=None)
    classifier = build_model(plain, tasks.Classification(5))
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    for start in (plain, recipe):  # the conversion keeps the function of plain weights
        model = build_model(
            replace(start, model=replace(start.model, pretrained=str(tmp_path / "classifier.pth"))), Segmentation()
        ).eval()
        image = torch.randn(1, 3, 32, 32)
        stage = classifier.eval().stages[0](classifier.stem(image))
        assert torch.allclose(model.backbone(image)[0], stage, atol=1e-5)
    torch.save(model.state_dict(), tmp_path / "masks.pth")
    again = build_model(
        replace(recipe, model=replace(recipe.model, pretrained=str(tmp_path / "masks.pth"))), Segmentation()
    )
    assert same_weights(again, model)


def test_what_does_not_fit_is_an_error_of_one_line(recipe: Recipe) -> None:
    with pytest.raises(TypeError, match=r"the task 'segmentation' has no option 'wieght'. Did you mean 'weight'"):
        train(replace(recipe, task=TaskSpec("segmentation", {"wieght": 1.0})), console=QUIET)
    decided = replace(recipe.model, args={**recipe.model.args, "out_indices": [1]})
    with pytest.raises(ValueError, match=r"model.args.out_indices is decided by the task \(\(0,\)\); leave it out"):
        train(replace(recipe, model=decided), console=QUIET)
