"""Runs of masked pre-training: metrics, exact resume, fine-tuning of what was pre-trained, and pictures."""

from __future__ import annotations

import io
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from train.helpers import QUIET, log, same_weights
from widefield import data, tasks
from widefield.loading import load, load_trained
from widefield.masking import MaskedAutoencoder
from widefield.predictions import predict
from widefield.tasks import MaskedImage, ReconstructionPrediction
from widefield.train import ConversionSpec, DataSpec, EmaSpec, ModelSpec, OptimizerSpec, Recipe, TaskSpec, train
from widefield.train.model import build_model

ARGS = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "patch_size": 1}
SEMANTIC_FPN = {"model": "semantic_fpn", "head_args": {"neck_channels": 8, "channels": 8}}
FASTER_RCNN = {"neck_channels": 8, "box_channels": 8}
POSES = DataSpec("scene_poses", {"size": 64, "crop_size": [32, 32], "count": 4})
OPTIONS = {"patch": 8, "neighbors": 5, "decoder_args": {"width": 16}}


def recipe(output: Path, **changes: Any) -> Recipe:
    """Return a recipe of six steps on digits of 32 pixels."""
    return replace(
        Recipe(
            name="masked",
            model=ModelSpec("convnextv2_atto", ARGS),
            data=DataSpec("digits", {"size": 32, "augment": True}),
            task=TaskSpec("masked_image", OPTIONS),
            output=str(output),
            optimizer=OptimizerSpec(lr=1e-3),
            ema=EmaSpec(0.5),
            max_steps=4,
            evaluate_every=2,
            batch_size=32,
            workers=0,
            log_every=1,
            trackers=[],
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run."""
    return train(recipe(tmp_path_factory.mktemp("masked"), trackers=["tensorboard"]), console=QUIET).folder


def pictures(run: Path) -> dict[int, bytes]:
    """Return the picture of each step in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert board.Tags()["images"] == ["reconstructions"]
    return {entry.step: entry.encoded_image_string for entry in board.Images("reconstructions")}


def test_it_trains_and_resumes_exactly(tmp_path: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(log(pretrained)[-1]) >= {"loss", "knn_top1", "train_loss", "ema_loss"}
    losses, calls = MaskedImage.losses, iter(range(1, 100))

    def interrupted(*args: Any) -> dict[str, torch.Tensor]:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return losses(*args)

    monkeypatch.setattr(MaskedImage, "losses", interrupted)
    part = train(recipe(tmp_path, trackers=["tensorboard"]), console=QUIET)
    assert (part.steps, part.interrupted) == (3, signal.SIGINT)
    rest = train(recipe(tmp_path, trackers=["tensorboard"], workers=1), resume=part.folder, console=QUIET)
    assert log(rest.folder) == log(pretrained)
    assert same_weights(rest.model, load_trained(pretrained, "last"))
    shown = pictures(rest.folder)
    assert list(shown) == [2, 4]
    assert shown == pictures(pretrained)
    with Image.open(io.BytesIO(shown[4])) as picture:  # six rows of image, visible part and prediction
        assert picture.size == (3 * 32 + 2 * 4, 6 * 32 + 5 * 4)


@pytest.mark.parametrize(
    ("task", "source", "args"),
    [
        ("classification", DataSpec("digits", {"size": 32}), {}),
        ("segmentation", DataSpec("scenes", {"size": 32, "count": 8}), SEMANTIC_FPN),
        ("detection", DataSpec("scenes", {"size": 32, "count": 8}), {"model": "faster_rcnn", "head_args": FASTER_RCNN}),
        ("pose", POSES, {"channels": [8], "sigma": 1.0}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_other_tasks_start_from_its_encoder(
    task: str, source: DataSpec, args: dict[str, Any], pretrained: Path, tmp_path: Path
) -> None:
    spec = ModelSpec("convnextv2_atto", ARGS, pretrained=str(pretrained))
    rate = OptimizerSpec("sgd", lr=0.0, weight_decay=0.0)
    plan = recipe(
        tmp_path, model=spec, data=source, task=TaskSpec(task, args), ema=None, max_steps=1, evaluate_every=1,
        optimizer=rate, batch_size=8,
    )  # fmt: skip
    result = train(plan, console=QUIET)
    encoder = load_trained(pretrained).encoder.body.state_dict()
    own = {key.replace("_", "."): value for key, value in result.model.state_dict().items()}
    found = [
        name for name in encoder if any(key.endswith(name.replace("_", ".").removeprefix("model.")) for key in own)
    ]
    assert len(found) == len(encoder) > 20
    for name, value in encoder.items():
        key = next(key for key in own if key.endswith(name.replace("_", ".").removeprefix("model.")))
        assert torch.equal(own[key], value)


def test_it_goes_on_from_a_run(pretrained: Path, tmp_path: Path) -> None:
    spec = ModelSpec("convnextv2_atto", ARGS, pretrained=str(pretrained))
    rate = OptimizerSpec("sgd", lr=0.0, weight_decay=0.0)
    result = train(recipe(tmp_path, model=spec, ema=None, max_steps=1, evaluate_every=1, optimizer=rate), console=QUIET)
    assert same_weights(result.model, load_trained(pretrained))
    other = recipe(
        tmp_path / "x", model=spec, task=TaskSpec("masked_image", {**OPTIONS, "decoder_args": {"width": 24}})
    )
    with pytest.raises(ValueError, match=r"model\.pretrained: the decoder of .* is not that of this model"):
        train(other, console=QUIET)


CONVERSIONS = {
    "MoRFConv2d": ConversionSpec("morf", "*conv_dw", {"kernel_sizes": [3, 7], "routing": "soft"}),
    "GMConv2d": ConversionSpec("gmconv", "*conv_dw"),
    "LargeKernelConv2d": ConversionSpec("large_kernel", "*conv_dw", {"kernel_sizes": 9}),
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_converted_networks_are_pretrained_and_fine_tuned(kind: str, pretrained: Path, tmp_path: Path) -> None:
    """A converted encoder learns without leaks, and starts classifiers; so does one that is converted afterwards."""
    converted = recipe(tmp_path, conversion=CONVERSIONS[kind])
    task = tasks.create("masked_image", data.create("digits", "train", size=32), **OPTIONS)
    model: Any = build_model(converted, task).train()
    task.check(model, (3, 32, 32))  # nothing leaks
    batch = {"image": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    task.loss(model, batch).backward()
    layers = [module for module in model.encoder.modules() if type(module).__name__ == kind]
    assert len(layers) == 4
    assert all(p.grad is not None and p.grad.isfinite().all() for layer in layers for p in layer.parameters())
    torch.save(model.state_dict(), tmp_path / "start.pt")
    classify: Any = tasks.create("classification", data.create("digits", "train", size=32))
    for start in (tmp_path / "start.pt", pretrained):
        spec = ModelSpec("convnextv2_atto", ARGS, pretrained=str(start))
        found = build_model(replace(converted, model=spec, task=TaskSpec("classification")), classify)
        assert sum(type(module).__name__ == kind for module in found.modules()) == 4
        own = found.state_dict()
        encoder = (model if start != pretrained else load_trained(pretrained)).encoder.body.state_dict()
        names = [name for name in encoder if start != pretrained or "conv_dw" not in name]
        assert all(torch.equal(own[name.removeprefix("model.")], encoder[name]) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_conversions_before_and_after(when: str, pretrained: Path, tmp_path: Path) -> None:
    mixture = CONVERSIONS["MoRFConv2d"]
    start = pretrained
    if when == "before":
        start = train(recipe(tmp_path / "start", conversion=mixture, ema=None), console=QUIET).folder
    spec = ModelSpec("convnextv2_atto", ARGS, pretrained=str(start))
    plan = recipe(
        tmp_path, model=spec, task=TaskSpec("classification"), conversion=mixture, ema=None, max_steps=1,
        evaluate_every=1, optimizer=OptimizerSpec("sgd", lr=0.0, weight_decay=0.0),
    )  # fmt: skip
    model = train(plan, console=QUIET).model
    assert any(type(module).__name__ == "MoRFConv2d" for module in model.modules())
    if when == "before":
        body = load_trained(start).encoder.body.state_dict()
        own = model.state_dict()
        assert all(torch.equal(own[key.removeprefix("model.")], value) for key, value in body.items())


def test_reconstructions_are_drawn(pretrained: Path, tmp_path: Path) -> None:
    for name, size in (("a", (40, 32)), ("b", (32, 50))):
        Image.new("RGB", size, (200, 80, 40)).save(tmp_path / f"{name}.png")
    subject = load(str(pretrained))
    assert isinstance(subject.model, MaskedAutoencoder)
    found = predict(subject, tmp_path)
    assert all(isinstance(one.prediction, ReconstructionPrediction) for one in found.images)
    first = found.images[0].prediction
    assert first.masked.float().mean() == 10 / 16
    assert first.reconstruction.shape == first.image.shape == (3, 32, 32)
    assert found.rows()[0]["masked"] == "62 %"
    found.save(tmp_path / "out")
    with Image.open(tmp_path / "out" / "reconstructions" / "a.png") as picture:
        assert picture.size == (3 * 32 + 2 * 4, 32)
    page = found.save(tmp_path / "page.html").read_text()
    assert all(caption in page for caption in ("image", "visible", "prediction"))
