"""Segmentation models in 8 bits: agreement for each pixel, mean IoU, and images of several sizes."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from widefield import deploy
from widefield.surgery import compare

CLASSES = 4


class Segmenter(nn.Module):
    """Colors to classes, with pooled context: a network whose logits depend on every pixel."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.context, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        y = self.mix(self.stem(x).relu()).relu()
        pooled = self.context(F.adaptive_avg_pool2d(y, 2))
        y = y + F.interpolate(pooled, size=y.shape[2:], mode="bilinear", align_corners=False)
        return F.interpolate(self.head(y), size=x.shape[2:], mode="bilinear", align_corners=False)


def batch(model, *sizes):
    """Return images and the masks that the model itself predicts, with some pixels changed and some ignored."""
    images = [torch.randn(3, *size) for size in sizes]
    with torch.no_grad():
        masks = [model(image[None])[0].argmax(0) for image in images]
    for mask in masks:
        mask[:3], mask[-2:] = 255, 1
    return {"image": images, "mask": masks}


def test_mean_iou_before_and_after_on_images_of_several_sizes(tmp_path):
    model = Segmenter().eval()
    loader = [batch(model, (24, 40), (24, 40), (33, 17)) for _ in range(2)]
    held_out = [batch(model, (24, 40), (31, 23))]
    done = deploy.quantize(model, tmp_path / "int8.onnx", loader, images=held_out, dynamic=("batch", "size"))
    change = compare(model, deploy.load(tmp_path / "int8.onnx"), held_out)
    assert done.change == change
    assert done.input["dynamic"] == ["batch", "size"]
    assert change.images == 2
    assert change.pixels == 24 * 40 + 31 * 23
    assert 0.5 < change.miou_before < 1
    assert abs(change.miou_after - change.miou_before) < 0.1
    assert change.agreement > 0.9
    told = json.loads((tmp_path / "int8.onnx.json").read_text())["change"]
    assert (told["miou_before"], told["miou_after"]) == change.scores
    assert f"mIoU {change.miou_before:.2%} -> {change.miou_after:.2%}" in done.summary()


def test_images_of_several_sizes_need_a_dynamic_size(tmp_path):
    model = Segmenter().eval()
    loader = [batch(model, (24, 40)), batch(model, (33, 17))]
    with pytest.raises(ValueError, match=r"images must all be 24x40, as in the first batch; got 33x17.*dynamic="):
        deploy.quantize(model, tmp_path / "int8.onnx", loader)
    with pytest.raises(ValueError, match=r"images must all be 24x40"):
        deploy.quantize(model, tmp_path / "int8.onnx", loader[:1], images=loader[1:])
    with pytest.raises(ValueError, match="dynamic must contain 'batch'"):
        deploy.quantize(model, tmp_path / "int8.onnx", loader, dynamic="size")
    assert not list(tmp_path.iterdir())


def test_the_export_reports_mean_iou_of_labeled_images(tmp_path):
    model = Segmenter().eval()
    held_out = [batch(model, (24, 40), (31, 23))]
    done = deploy.export(model, tmp_path / "net.onnx", (2, 3, 24, 40), dynamic=("batch", "size"), loader=held_out)
    labeled = [check for check in done.checks if check.miou_before is not None]
    assert [(check.shape, check.images) for check in labeled] == [((1, 3, 24, 40), 2), ((1, 3, 31, 23), 1)]
    for check in labeled:
        assert check.agreement > 0.99
        assert check.miou_after == pytest.approx(check.miou_before, abs=0.01)
        assert check.miou_before > 0.3
    assert {row["mIoU"] for row in done.rows()} > {"-"}
