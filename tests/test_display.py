"""Every record that a public function returns displays itself in notebooks."""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import widefield
from analysis.known_fields import Blurred, Counter, person, sample
from displays import assert_displays
from tasks.detections import random_case as random_boxes
from tasks.detections import updated as measured_boxes
from tasks.poses import random_case as random_poses
from tasks.test_pose_metric import updated as measured_poses
from widefield import analysis, bench, deploy, loading, masking, ops, predictions, report, runs, surgery, tasks, train
from widefield.analysis.registry import ANALYSES
from widefield.report import Report

NAME = "<b>net</b> & co"
"""A name of models and classes that must be escaped."""
ROOMS = (
    "ops",
    "surgery",
    "deploy",
    "tasks",
    "analysis",
    "train",
    "loading",
    "predictions",
    "runs",
    "fitting",
    "bench",
    "masking",
    "report",
)
ELSEWHERE = {"Costs": "fitting", "FitResult": "fitting", "Groups": "fitting"}
"""Records whose test is among those of a package, as they take long to make."""
BASES = {"Deployed", "Report", "Result"}


def net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3, **options).eval()


def mixed() -> nn.Module:
    return widefield.convert(net(), widefield.MoRF((3, 5)), "layer4.*").eval()


def images(count: int = 2, side: int = 33) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def reported(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return the record that a function gives to its argument ``report``."""
    found: list[Any] = []
    function(*args, report=found.append, **options)
    return found[0]


def cam() -> analysis.ClassActivation:
    return analysis.class_activation(net(), images(), name=NAME)


def found_shape_bias() -> analysis.ShapeBias:
    half = np.array([0.5])
    return analysis.ShapeBias(NAME, {}, (NAME,), np.array([4]), half, half, 0.5, (0.2, 0.8), 0.9, 0)


def deployed() -> dict[str, Any]:
    return {
        "path": NAME, "files": {}, "bytes": 1, "input": {}, "outputs": (), "classes": None, "environment": {},
    }  # fmt: skip


def exported() -> deploy.Export:
    check = deploy.Check((1, 3, 8, 8), 1, 1e-6, 1e-6, None)
    return deploy.Export(
        **deployed(), model=NAME, format="onnx", routing=None, operators={}, checks=(check,), tolerance=1e-4,
        images="noise", throughput=(),
    )  # fmt: skip


def quantized() -> deploy.Quantization:
    kernel = deploy.QuantizedKernel(NAME, (1, 1, 3, 3), 30.0, 1.0, 0.0, False)
    return deploy.Quantization(
        **deployed(), bytes_before=4, calibration="minmax", change=widefield.compare(net(), net(), images()), flips=(),
        kernels=(kernel,), layers=(),
    )  # fmt: skip


def boxes() -> tasks.DetectionScores:
    return measured_boxes(random_boxes(3, images=4, masks=True), masks=True).scores()


def poses() -> tasks.PoseScores:
    return measured_poses(random_poses(8, images=6, classes=2)).scores()


def record() -> runs.RunRecord:
    log = [{"kind": "eval", "step": 1, "epoch": 0, "top1": 0.5, "seconds": 1.0}]
    recipe = {"model.name": NAME, "data.name": "digits", "epochs": 2}
    return runs.RunRecord(Path("runs/a"), "finished", datetime.datetime.now(datetime.UTC), NAME, recipe, log, "top1")


def evaluation() -> runs.Evaluation:
    scores = tasks.ClassificationScores((NAME, "b"), torch.tensor([[3, 1], [0, 2]]))
    return runs.Evaluation({"top1": 0.5}, 6, 1.0, 33, 2, "no", False, "cpu", 1, scores=scores)


def dry() -> train.DryRun:
    return train.DryRun(
        Path("runs/a"), "train: 4 images", NAME, {}, (1, 2), {"image": (2, 3, 8, 8)}, 2, "1 epoch", 2, "a remark"
    )


MAKERS: Mapping[str, Callable[[], Report]] = MappingProxyType(
    {
        "Anatomy": lambda: surgery.anatomy(net()),
        "BlockContributions": lambda: analysis.block_contributions(net(), images(), name=NAME),
        "ClassActivation": cam,
        "ClassificationScores": lambda: tasks.ClassificationScores((NAME, "b"), torch.tensor([[3, 1], [0, 2]])),
        "Cost": lambda: bench.cost(net(), images()),
        "CropTable": lambda: analysis.crop_table(torch.randn(2, 1, 5, 5)),
        "DetectionErrors": lambda: boxes().kinds["box"].errors,
        "DetectionScores": boxes,
        "Difference": lambda: widefield.compare(net(), mixed(), [(images(), torch.tensor([0, 1]))]),
        "DryRun": dry,
        "Evaluation": evaluation,
        "Explanation": lambda: ops.explain(ops.depthwise_conv2d, torch.randn(1, 4, 9, 9), torch.randn(4, 1, 5, 5)),
        "Export": exported,
        "Faithfulness": lambda: analysis.faithfulness(net(), images(), cam(), steps=2),
        "Field": lambda: analysis.theoretical_receptive_field(net(), 33),
        "Interactions": lambda: analysis.interactions(
            net(), images(), grid=2, pairs=1, contexts=2, orders=(0.0, 1.0), name=NAME
        ),
        "KernelMaps": lambda: analysis.kernel_energy(net(), name=NAME),
        "KeypointFields": lambda: analysis.keypoint_receptive_fields(Blurred().eval(), [person()], name=NAME),
        "LearningRates": lambda: train.LearningRates((0.1, 0.2, 0.4, 0.8), (1.0, 0.8, 0.5, 0.6)),
        "Listing": lambda: report.Listing([record(), record()]),
        "Masks": lambda: analysis.masks(widefield.convert(net(), widefield.GMConv(), "layer4.*"), name=NAME),
        "MaskingPlan": lambda: masking.plan("test_resnet"),
        "MultiLabelScores": lambda: tasks.MultiLabelScores(
            (NAME, "b"), torch.tensor([0.9, 0.4]).double(), torch.tensor([[3, 4, 5], [1, 2, 2]]), 6, 0.5
        ),
        "ObjectFields": lambda: analysis.object_receptive_fields(
            Counter().eval(), [sample([[4, 8, 12, 16]])], classes=(NAME, "b", "c"), name=NAME
        ),
        "Plan": lambda: widefield.plan(net(), widefield.MoRF((3, 5))),
        "PoseErrors": lambda: poses().errors,
        "PoseScores": poses,
        "Predictions": lambda: predictions.predict(net(), np.zeros((40, 40, 3), np.uint8)),
        "Quantization": quantized,
        "ReceptiveField": lambda: analysis.effective_receptive_field(net(), images(), name=NAME),
        "Reparameterization": lambda: reported(widefield.reparameterize, mixed(), images()),
        "RoutingStatistics": lambda: analysis.routing_statistics(mixed(), images(), name=NAME),
        "Rows": lambda: bench.measure({NAME: lambda: None}, repeats=2),
        "RunRecord": record,
        "RunResult": lambda: train.RunResult(Path(f"runs/{NAME[:6]}"), {"top1": 1.0}, {}, 1, 2, None, net()),
        "SegmentationScores": lambda: tasks.SegmentationScores((NAME, "b"), torch.tensor([[[8, 2], [1, 4]]])),
        "ShapeBias": found_shape_bias,
        "Specialization": lambda: reported(widefield.specialize, mixed(), [(images(),)]),
        "Subject": lambda: loading.Subject(NAME, net(), 33, (0.5,) * 3, (0.5,) * 3, loading.Weights("random")),
        "TranslationStability": lambda: analysis.translation_stability(net(), images(), shifts=(1,), name=NAME),
        "Trimming": lambda: reported(widefield.trim, net(), example_input=images()),
    }
)


def public() -> Iterator[type]:
    """Yield all public classes."""
    for room in ROOMS:
        module = importlib.import_module(f"widefield.{room}")
        for name in getattr(module, "__all__", dir(module)):
            if isinstance(found := getattr(module, name), type) and not name.startswith("_"):
                yield found


def test_every_public_record_is_displayed_by_a_test():
    records = {found.__name__ for found in public() if issubclass(found, Report)} - BASES
    assert records == set(MAKERS) | set(ELSEWHERE)
    results = {entry.function.__annotations__["return"] for entry in ANALYSES.values()}
    assert results <= set(MAKERS)
    for name, room in ELSEWHERE.items():
        tests = (path.read_text() for path in (Path(__file__).parent / room).glob("test_*.py"))
        assert any("assert_displays" in text and f'"{name}"' in text for text in tests)


@pytest.mark.parametrize("name", MAKERS)
def test_a_record_displays_a_table_or_a_picture(name):
    found = MAKERS[name]()
    assert type(found).__name__ == name
    assert_displays(found)
    if getattr(found, "name", "") == NAME:
        assert_displays(found, NAME)
    if isinstance(found, analysis.Result):
        assert "data:image/png;base64," in found._repr_html_()


def test_lists_of_records_stay_lists():
    found = report.Listing([record()])
    assert len(found) == 1
    assert sorted(found, key=lambda run: run.name)[0].name == "a"
    assert report.Listing([])._repr_html_() == "<p>None.</p>"
    assert_displays(runs.comparison([record(), record()]), "last top1")
    mixtures = analysis.routing_weights(mixed(), [images()])
    assert_displays(mixtures, mixtures[0].name)


def test_figures_display_themselves_sharply():
    data, about = report.curves({"a": ([1, 2], [3, 4])}, "x", "y")._repr_png_()
    assert data.startswith(b"\x89PNG")
    assert about["width"] == pytest.approx(0.75 * int.from_bytes(data[16:20], "big"), abs=1)
