"""Checks of the fixtures of pose estimation: the heatmap head, targets, decoding, flips, and units.

:data:`UNITS` has a check for each field of a file of units.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dense.oks_checks import check_nms, check_oks
from dense.rules import Differences, features, published_fill
from widefield.data import crops
from widefield.dense import HeatmapCodec, HeatmapHead, flipped_heatmaps

Document = Mapping[str, Any]

SINGLE = 1e-5
"""The reference computes targets and decoding in float32."""
NEWTON = 1e-4
"""DARK divides small differences of logarithms, so that rounding in float32 moves flat peaks by up to a thousandth of a
pixel. The reference's own steps in other orders differ as much."""

KINDS = {"msra": "msra", "msra_unbiased": "unbiased", "udp": "udp"}
"""Name in the file -> ``HeatmapCodec.kind``."""
_READ = {
    "decoded_dark_of_abs_image0": "unbiased",
    "decoded_udp_of_abs_image0": "udp",
}


def codec(config: Document, kind: str) -> HeatmapCodec:
    """Return the codec of a configuration; sizes there are (width, height)."""
    image, heatmap = (tuple(reversed(config[key])) for key in ("input_size_wh", "heatmap_size_wh"))
    blur = config.get("blur_kernel_size", 11)
    return HeatmapCodec(image, heatmap, config["sigma"], kind, blur)


def check_heatmap_head(document: Document, differences: Differences) -> None:
    """Check the head on made features, its targets, losses and decoding."""
    config, prefix = document["config"], document["prefix"]
    known = ("in_channels", "out_channels", "deconv_out_channels", "input_size_wh", "heatmap_size_wh", "sigma",
             "blur_kernel_size", "deconv_kernel", "stride", "padding")  # fmt: skip
    differences.fields("config", config, known)
    for key, value in (("deconv_kernel", 4), ("stride", 2), ("padding", 1)):
        differences.equal(f"config.{key}", config.get(key, value), value)
    head = HeatmapHead(config["in_channels"], config["out_channels"], channels=config["deconv_out_channels"])
    differences.state({prefix + key: value.shape for key, value in head.state_dict().items()}, document["state_dict"])
    differences.equal("params", sum(p.numel() for p in head.parameters()), document["params"])
    published_fill(head, lambda key: prefix + key)
    with torch.no_grad():
        output = head(features([document["feature_shape"]])[0])
    differences.summary("output", output, document["output"])
    for key, shift in (("flipped", False), ("flipped_shifted", True)):
        differences.summary(key, flipped_heatmaps(output, document["flip_indices"], shift=shift), document[key])
    _check_targets(document, output, differences)
    found = codec(config, "msra").decode(output)
    for image, entry in enumerate(document["decoded_msra_quarter_pixel"]):
        where = f"decoded_msra_quarter_pixel[{image}]"
        differences.numbers(f"{where}.keypoints", found.points[image].tolist(), entry["keypoints"], SINGLE)
        differences.numbers(f"{where}.scores", found.scores[image].tolist(), entry["scores"], SINGLE)
        differences.fields(where, entry, ("keypoints", "scores"))
    for key, kind in _READ.items():
        points = codec(config, kind).decode(output[:1].abs()).points[0]
        differences.numbers(key, points.tolist(), document[key], NEWTON)
    known = ("config", "prefix", "fill", "input", "features", "feature_shape", "params", "output", "fp32_max_abs_diff",
             "keypoints", "visible", "targets", "mse_loss_target_weight", "mse_loss_no_weight", "flip_indices",
             "decoded_msra_quarter_pixel", *_READ, "flipped", "flipped_shifted", "state_dict")  # fmt: skip
    differences.fields("file", document, known)


def _check_targets(document: Document, output: Tensor, differences: Differences) -> None:
    points = torch.tensor(document["keypoints"], dtype=torch.float64)
    visible = torch.tensor(document["visible"], dtype=torch.float64)
    differences.fields("targets", document["targets"], tuple(KINDS))
    for name, kind in KINDS.items():
        entry, where = document["targets"][name], f"targets.{name}"
        rule = codec(document["config"], kind)
        heatmaps, weights = rule.encode(points, visible)
        differences.numbers(f"{where}.weights", weights.tolist(), entry["weights"])
        expected = entry["heatmaps"]
        for key, value in (("l2", heatmaps.norm()), ("mean", heatmaps.mean()), ("max_abs", heatmaps.max())):
            differences.numbers(f"{where}.heatmaps.{key}", value.item(), expected[key], SINGLE)
        first = heatmaps.flatten()[: len(expected["first"])]
        differences.numbers(f"{where}.heatmaps.first", first.tolist(), expected["first"], SINGLE)
        for index, peak in enumerate(entry["per_keypoint"]):
            heatmap, here = heatmaps[index], f"{where}.per_keypoint[{index}]"
            y, x = divmod(int(heatmap.argmax()), heatmap.shape[1])
            differences.numbers(f"{here}.sum", heatmap.sum().item(), peak["sum"], SINGLE)
            differences.numbers(f"{here}.max", heatmap.max().item(), peak["max"], SINGLE)
            differences.equal(f"{here}.argmax_xy", [x, y], peak["argmax_xy"])
        found = rule.decode(heatmaps[None])
        decoded = (
            torch.where(found.scores[0, :, None] > 0, found.points[0], torch.nan) if kind == "udp" else found.points[0]
        )
        differences.numbers(f"{where}.decoded", decoded.tolist(), _numbers(entry["decoded"]), NEWTON)
        differences.numbers(f"{where}.decoded_scores", found.scores[0].tolist(), entry["decoded_scores"], SINGLE)
        if kind == "msra":
            both = heatmaps.expand_as(output)
            loss = ((output - both) ** 2 * weights[:, None, None]).mean().item()
            differences.numbers("mse_loss_target_weight", loss, document["mse_loss_target_weight"], SINGLE)


def _numbers(rows: Any) -> list[list[float]]:
    """Return rows with not a number in place of None."""
    return [[float("nan") if value is None else value for value in row] for row in rows]


def check_crops(document: Document, differences: Differences) -> None:
    """Check the rectangle of each box, and the matrices to its crop; the reference computes some in float32."""
    found = re.search(r"aspect = (\d+)/(\d+)", document["aspect_fix"])
    if found is None:
        differences.lines.append(f"aspect_fix names no size of the crop: {document['aspect_fix']!r}")
        return
    width, height = map(int, found.groups())
    for number, case in enumerate(document["warp_cases"]):
        where = f"warp_cases[{number}]"
        box = torch.tensor(case["bbox_xyxy"], dtype=torch.float64)
        center, scale = crops.crop_box(box, (height, width), case["padding"])
        differences.numbers(f"{where}.center", center.tolist(), case["center"])
        differences.numbers(f"{where}.scale", scale.tolist(), case["scale"])
        padded = (box[2:] - box[:2]) * case["padding"]
        differences.numbers(f"{where}.scale_before", padded.tolist(), case["scale_before"])
        matrices = {name: re.fullmatch(r"warp(_udp)?(?:_rot(-?\d+))?", name) for name in case}
        for name, parts in matrices.items():
            if parts:
                matrix = crops.crop_matrix(center, scale, (height, width), float(parts[2] or 0), udp=bool(parts[1]))
                differences.numbers(f"{where}.{name}", matrix.tolist(), case[name], SINGLE)
        known = ("bbox_xyxy", "padding", "center", "scale_before", "scale")
        differences.fields(where, case, (*known, *(name for name, parts in matrices.items() if parts)))


UNITS: Mapping[str, Callable[[Document, Differences], None]] = {
    "warp_cases": check_crops,
    "oks": check_oks,
    "oks_nms": check_nms,
}
"""Field of a file -> check, which gets the whole file."""


def check_units(document: Document, differences: Differences) -> None:
    """Check every field of a file of units."""
    for name, check in UNITS.items():
        if name in document:
            check(document, differences)
    differences.fields("the file", document, (*UNITS, "what", "source", "aspect_fix"))


CHECKS = {"HeatmapHead": check_heatmap_head, "pose_units": check_units}
"""Kind -> check."""
