"""The task of segmentation: options, batches, loss, and outputs of images of several sizes."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tolerances import FLOAT64, NETWORK, close
from train.patches import Patches
from widefield import dense, tasks
from widefield.dense import SegmentationLogits
from widefield.tasks import Segmentation
from widefield.tasks.pixel_losses import cross_entropy, dice_loss, hard_pixels

NAMES = ("ground", "red", "green")


class Tiny(nn.Module):
    """Logits at half the size of the images; in training mode also auxiliary ones at a quarter."""

    align_corners = False

    def __init__(self, auxiliary: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.main = nn.Conv2d(3, 3, 3, 2, 1, dtype=torch.float64)
        self.second = nn.Conv2d(3, 3, 5, 4, 2, dtype=torch.float64) if auxiliary else None

    def forward(self, images: Tensor) -> Any:
        if self.training and self.second is not None:
            return SegmentationLogits(self.main(images), self.second(images))
        return self.main(images)


def batch(count: int = 3) -> dict[str, Any]:
    found = Segmentation(NAMES).collate([Patches("train")[i] for i in range(count)])
    return {**found, "image": found["image"].double()}


def test_the_loss_is_that_of_both_heads() -> None:
    model, given = Tiny(), batch()
    main, second = (F.interpolate(x, (32, 32), mode="bilinear") for x in model(given["image"]))
    mask = given["mask"]
    expected = cross_entropy(main, mask) + 0.4 * cross_entropy(second, mask)
    close(Segmentation(NAMES).loss(model, given), expected, FLOAT64)
    unweighted = Segmentation(NAMES, auxiliary_weight=0).loss(model, given)
    close(unweighted, cross_entropy(main, mask), FLOAT64)
    unweighted.backward()  # DistributedDataParallel waits for the gradient of every parameter
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_options_of_the_loss() -> None:
    model, given = Tiny(), batch()
    main, second = (F.interpolate(x, (32, 32), mode="bilinear") for x in model(given["image"]))
    mask, weights = given["mask"], [1.0, 2.0, 3.0]
    task = Segmentation(
        NAMES, auxiliary_weight=0.3, class_weights=weights, avg_non_ignore=True, dice=0.5,
        ohem={"threshold": 0.4, "min_kept": 20},
    )  # fmt: skip
    options: dict[str, Any] = {"class_weights": weights, "avg_non_ignore": True}
    chosen = hard_pixels(main, mask, threshold=0.4, min_kept=20)
    assert 0 < chosen.sum() < chosen.numel()
    expected = cross_entropy(main, mask, chosen=chosen, **options) + 0.5 * dice_loss(main, mask)
    close(task.loss(model, given), expected + 0.3 * cross_entropy(second, mask, **options), FLOAT64)


def test_a_model_without_auxiliary_logits_is_trained_on_its_own() -> None:
    model, given = Tiny(auxiliary=False), batch()
    main = F.interpolate(model(given["image"]), (32, 32), mode="bilinear")
    loss = Segmentation(NAMES).loss(model, given)
    close(loss, cross_entropy(main, given["mask"]), FLOAT64)
    loss.backward()
    assert model.main.weight.grad is not None


def test_batches_are_stacked_or_lists() -> None:
    task, train, val = Segmentation(NAMES), Patches("train"), Patches("val")
    stacked = task.collate([{**train[i], "path": "x"} for i in range(3)])
    assert {name: tuple(x.shape) for name, x in stacked.items()} == {
        "image": (3, 3, 32, 32), "mask": (3, 32, 32), "size_group": (3, 32, 32),
    }  # fmt: skip
    mixed = task.collate([val[i] for i in range(3)])
    assert all(isinstance(found, list) for found in mixed.values())
    with pytest.raises(ValueError, match=r"differ in size: let the data set crop or pad them to one size\.$"):
        task.loss(Tiny(), mixed)


@pytest.mark.parametrize(
    "options",
    [{}, {"scales": [0.5, 1.0], "flip": True}, {"test": "slide", "window": 16}, {"boundary": 0.05}],
    ids=["whole", "views", "slide", "boundary"],
)
def test_metrics_do_not_depend_on_how_images_are_batched(options: dict[str, Any]) -> None:
    """Each image is segmented at its own size, and compared at its mask's."""
    task, val, model = Segmentation.for_data(Patches("val"), **options), Patches("val", count=5), Tiny().float().eval()
    found = []
    for parts in ([range(5)], [range(2), range(2, 5)], [[i] for i in range(5)]):
        metrics = task.metrics()
        for part in parts:
            metrics.update(**task.outputs(model, task.collate([val[i] for i in part])))
        found.append(({name: float(value) for name, value in metrics.compute().items()}, task.scores(metrics)))
    names = {
        "miou",
        "macc",
        "aacc",
        "loss",
        "miou_small",
        "miou_large",
        *(["boundary_miou"] if "boundary" in options else []),
    }
    assert set(found[0][0]) == names
    for values, scores in found[1:]:
        assert values == pytest.approx(found[0][0], rel=1e-6)
        assert torch.equal(scores.counts, found[0][1].counts)
    views = {key: value for key, value in options.items() if key in ("scales", "flip", "window")}
    total, pixels = 0.0, 0
    for i in range(5):
        sample = val[i]
        scores = dense.segment(model, sample["image"][None], size=sample["mask"].shape, **views)
        logs = scores.log() if "scales" in views else scores.log_softmax(1)
        total += F.nll_loss(logs, sample["mask"][None], ignore_index=255, reduction="sum").item()
        pixels += int((sample["mask"] != 255).sum())
    assert found[0][0]["loss"] == pytest.approx(total / pixels, rel=1e-5)
    assert found[0][1].counts.sum() == pixels


def test_images_of_one_size_share_a_forward_pass_as_memory_permits() -> None:
    seen: list[tuple[int, ...]] = []

    class Watched(Tiny):
        def forward(self, images: Tensor) -> Any:
            seen.append(tuple(images.shape))
            return super().forward(images)

    def calls(*sizes: int, classes: int = 3, **options: Any) -> list[tuple[int, ...]]:
        task = Segmentation([str(index) for index in range(classes)], **options)
        mask = torch.zeros(16, 16, dtype=torch.int64)
        seen.clear()
        model = Watched(auxiliary=False).float().eval()
        found = task.outputs(model, task.collate([{"image": torch.rand(3, s, s), "mask": mask} for s in sizes]))
        assert [tuple(one.shape) for one in found["preds"]] == [(16, 16)] * len(sizes)
        assert len(found["value"]) == len(sizes)
        return [(shape[0], shape[2]) for shape in seen]

    assert calls(16, 16, 16, 16) == [(4, 16)]
    assert calls(16, 16, 24, 16, 16, 16) == [(2, 16), (1, 24), (3, 16)]
    assert calls(512, 512, 512) == [(2, 512), (1, 512)]  # 2^26 values: 128 for each pixel of two images
    assert calls(512, 512, scales=[1.5]) == [(1, 768), (1, 768)]
    assert calls(16, 16, test="slide", window=12, stride=4) == [(2, 12)] * 4


def test_an_image_without_a_labeled_pixel_changes_nothing() -> None:
    task, sample, model = Segmentation(NAMES), Patches("val")[0], Tiny().float().eval()
    empty = {**sample, "mask": torch.full_like(sample["mask"], 255)}
    found = []
    for samples in ([sample], [sample, empty]):
        metrics = task.metrics()
        metrics.update(**task.outputs(model, task.collate(samples)))
        found.append({name: float(value) for name, value in metrics.compute().items()})
    assert found[0] == pytest.approx(found[1])


@pytest.mark.parametrize("kind", ["upernet", "deeplabv3plus", "semantic_fpn"])
def test_it_builds_a_model_on_the_backbone(kind: str) -> None:
    task = Segmentation(NAMES, model=kind, head_args={"channels": 8})
    network = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), **task.model_args)
    model = task.model(network)
    task.check(model, (3, 40, 33))
    given = batch(2)
    task.loss(model, {**given, "image": given["image"].float()}).backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(parameter.grad is not None for parameter in learning.values())


def test_a_batch_of_one_trains_only_without_a_norm_of_one_pixel() -> None:
    given = {"image": torch.rand(1, 3, 64, 64), "mask": torch.zeros(1, 64, 64, dtype=torch.int64)}
    for kind in ("upernet", "deeplabv3plus", "semantic_fpn"):
        task = Segmentation(NAMES, model=kind, head_args={"channels": 8})
        network = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), **task.model_args)
        model = task.model(network)
        if kind == "semantic_fpn":
            assert task.loss(model, given).isfinite()
        else:
            with pytest.raises(ValueError, match=r"a batch of 1 is too small.*sync_batchnorm: true.*semantic_fpn"):
                task.loss(model, given)


def test_auxiliary_head_and_classes_are_checked() -> None:
    task = Segmentation(NAMES)
    with pytest.raises(ValueError, match=r"it gives 2 maps, and the data have 3 classes"):
        task.check(nn.Conv2d(3, 2, 1), (3, 8, 8))
    with pytest.raises(ValueError, match=r"it gives no logits \(N, classes, H, W\); it gives \(1, 192\)"):
        task.check(nn.Flatten(), (3, 8, 8))


def test_float16_logits_are_compared_in_float32() -> None:
    class Half(Tiny):
        def forward(self, images: Tensor) -> Any:
            return super().forward(images).bfloat16()

    given, model = batch(), Half(auxiliary=False)
    loss = Segmentation(NAMES).loss(model, given)
    assert loss.dtype == torch.float32
    logits = F.interpolate(model(given["image"]).float(), (32, 32), mode="bilinear")
    close(loss, cross_entropy(logits, given["mask"]), NETWORK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "upernett"}, r"model must be one of 'upernet', .* Did you mean 'upernet'"),
        ({"class_weights": [1.0]}, r"class_weights must be 3 numbers, one for each class; got \[1.0\]"),
        ({"ohem": {"thresh": 0.7}}, r"ohem has no option 'thresh'. Did you mean 'threshold'"),
        ({"ohem": {"threshold": 2}}, r"ohem.threshold must be from 0.0 to 1.0; got 2"),
        ({"test": "slide"}, r"test: slide needs a window"),
        ({"window": 512}, r"window and stride are for test: slide"),
        ({"test": "slide", "window": 8, "stride": 9}, r"stride must not exceed window"),
        ({"scales": []}, r"scales must be a tuple or list of numbers"),
        ({"boundary": 3}, r"boundary must be from 0.0 to 1.0; got 3"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        tasks.create("segmentation", Patches("val"), **options)


def test_head_args_that_the_model_does_not_have() -> None:
    task = Segmentation(NAMES, head_args={"chanels": 8})
    network = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), features_only=True)
    with pytest.raises(TypeError, match=r"chanels.*channels"):
        task.model(network)
