"""Checks of the fixture of detection's units: box coders, anchors, points, assignment, NMS, features of RoIs.

:data:`SECTIONS` has a check for each field of such a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dense.rules import Differences, features
from widefield.dense import anchors, boxes
from widefield.dense.roi import roi_features, roi_levels

Document = Mapping[str, Any]

REMARKS = ("meaning", "rule", "name", "wh_ratio_clip")


def tensor(rows: Any, columns: int = 4) -> Tensor:
    """Return rows of numbers as float64 (N, columns), also if there are none."""
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, columns)


def clipped_sizes(entry: Document, plain: str) -> dict[str, tuple[int, int] | None]:
    """Return the size in the name of each field of decoded boxes, such as decoded_max_shape_96x128; None for plain."""
    found: dict[str, tuple[int, int] | None] = {plain: None} if plain in entry else {}
    for name in entry:
        size = re.fullmatch(r"decoded_max_shape_(\d+)x(\d+)", name)
        if size:
            found[name] = int(size[1]), int(size[2])
    return found


def check_coder(entry: Document, differences: Differences) -> None:
    """Check box coders of several scales."""
    references, objects = tensor(entry["proposals"]), tensor(entry["gts"])
    differences.fields("delta_xywh", entry, ("proposals", "gts", "cases", *REMARKS))
    for number, case in enumerate(entry["cases"]):
        where = f"delta_xywh.cases[{number}]"
        coder = boxes.BoxCoder(tuple(case["stds"]))
        encoded, deltas = coder.encode(references, objects), tensor(case["deltas"])
        differences.numbers(f"{where}.encoded", encoded.tolist(), case["encoded"])
        decoded = clipped_sizes(case, "decoded_no_clip")
        for name, size in decoded.items():
            differences.numbers(f"{where}.{name}", coder.decode(references, deltas, size).tolist(), case[name])
        gap = (coder.decode(references, encoded) - objects).abs().max().item()
        differences.numbers(f"{where}.round_trip_max_abs", gap, case["round_trip_max_abs"])
        known = ("stds", "encoded", "deltas", *decoded, "round_trip_max_abs")
        differences.fields(where, case, known)


def check_distances(entry: Document, differences: Differences) -> None:
    """Check boxes by their distances from points."""
    points, distances = tensor(entry["points"], 2), tensor(entry["ltrb"])
    decoded = clipped_sizes(entry, "decoded")
    for name, size in decoded.items():
        found = boxes.from_distances(points, distances, size).tolist()
        differences.numbers(f"distance_point.{name}", found, entry[name])
    differences.fields("distance_point", entry, ("points", "ltrb", *decoded))


def built_anchors(config: Document) -> anchors.Anchors:
    """Return the anchors of an OpenMMLab configuration."""
    known = {"type", "strides", "ratios", "scales", "octave_base_scale", "scales_per_octave"}
    defaults = {"center_offset": 0.0, "scale_major": True, "base_sizes": None, "centers": None}
    config = {name: value for name, value in config.items() if name not in defaults or value != defaults[name]}
    if set(config) - known:
        raise ValueError(f"unknown settings of anchors: {sorted(set(config) - known)}")
    if "scales" in config:
        return anchors.Anchors(config["strides"], config["scales"], config["ratios"])
    octaves = {"base": config["octave_base_scale"], "per_octave": config["scales_per_octave"]}
    return anchors.Anchors.octaves(config["strides"], ratios=config["ratios"], **octaves)


def check_anchors(entry: list[Document], differences: Differences) -> None:
    """Check anchors of several pyramids, and which of their cells lie within the padded image."""
    for number, case in enumerate(entry):
        where = f"anchors[{number}]"
        built = built_anchors(case["config"])
        maps = [torch.empty(1, 1, *size, dtype=torch.float64) for size in case["feature_sizes"]]
        grids = built.grid(maps)
        for level, (grid, expected) in enumerate(zip(grids, case["anchors"], strict=True)):
            differences.summary(f"{where}.anchors[{level}]", grid, expected)
            differences.numbers(f"{where}.base_anchors[{level}]", built.shapes(level), case["base_anchors"][level])
        differences.equal(f"{where}.counts", [len(grid) for grid in grids], case["counts"])
        fields = ["config", "feature_sizes", "base_anchors", "anchors", "counts"]
        for name in case:
            if name.startswith("valid_flags_pad_shape_"):
                height, width = map(int, name.rpartition("_")[2].split("x"))
                found = [int(flags.sum()) for flags in built.covered(maps, (height, width))]
                differences.equal(f"{where}.{name}", found, case[name])
                fields.append(name)
        differences.fields(where, case, fields)


def check_points(entry: Document, differences: Differences) -> None:
    """Check the points of FCOS."""
    maps = [torch.empty(1, 1, *size, dtype=torch.float64) for size in entry["sizes"]]
    found = [level.tolist() for level in anchors.points(maps, entry["strides"])]
    for level, expected in enumerate(entry["points"]):
        differences.numbers(f"points_fcos.points[{level}]", found[level], expected)
    differences.fields("points_fcos", entry, ("sizes", "strides", "points"))


def built_assigner(config: Document) -> boxes.Assigner:
    """Return the assigner of an OpenMMLab configuration."""
    given = dict(config)
    crowd = given.pop("ignore_iof_thr", -1)
    given.pop("type", None)
    built = boxes.Assigner(
        positive=given.pop("pos_iou_thr"),
        negative=given.pop("neg_iou_thr"),
        minimum=given.pop("min_pos_iou", 0.0),
        low_quality=given.pop("match_low_quality", True),
        crowd=crowd if crowd > 0 else None,
    )
    if given:
        raise ValueError(f"unknown settings of an assigner: {given}")
    return built


def check_assigner(entry: Document, differences: Differences) -> None:
    """Check which objects boxes are assigned to."""
    for number, case in enumerate(entry["cases"]):
        where = f"max_iou_assigner.cases[{number}] ({case['name']})"
        crowd = None if case["ignore"] is None else tensor(case["ignore"])
        assign = built_assigner(case["config"])
        found = assign(tensor(case["priors"]), tensor(case["gt_bboxes"]), crowd)
        published = found.objects + 1  # the background is 0, ignored boxes are -1
        differences.equal(f"{where}.gt_inds", published.tolist(), case["gt_inds"])
        differences.numbers(f"{where}.max_overlaps", found.overlaps.tolist(), case["max_overlaps"])
        labels = [case["gt_labels"][place] if place >= 0 else -1 for place in found.objects.tolist()]
        differences.equal(f"{where}.labels", labels, case["labels"])
        known = ("config", "priors", "gt_bboxes", "gt_labels", "ignore", "gt_inds", "max_overlaps", "labels")
        differences.fields(where, case, known)
    differences.fields("max_iou_assigner", entry, ("cases", *REMARKS))


def check_nms(entry: Document, differences: Differences) -> None:
    """Check NMS per class, on the boxes that the file describes in words."""
    text = entry["boxes"]
    generator = np.random.Generator(np.random.PCG64(int(re.findall(r"PCG64\((\d+)\)", text)[0])))
    draws = re.findall(r"uniform\(([\d.]+),([\d.]+),\((\d+),(\d+)\)\)", text)
    corners, sides, values = (generator.uniform(float(a), float(b), (int(n), int(k))) for a, b, n, k in draws)
    given = torch.from_numpy(np.round(np.concatenate((corners, corners + sides), 1), 3))
    scores = torch.from_numpy(np.round(values, 4))
    differences.numbers("multiclass_nms.boxes_first", given[:3].tolist(), entry["boxes_first"])
    differences.numbers("multiclass_nms.scores_first", scores[:3].tolist(), entry["scores_first"])
    limits = {"nms_threshold": entry["iou"], "max_per_image": entry["max"]}
    kept = boxes.nms_per_class(given, scores[:, :-1], score_threshold=entry["score_thr"], **limits)
    found = torch.cat((kept.boxes, kept.scores[:, None]), 1)
    differences.numbers("multiclass_nms.dets", found.tolist(), entry["dets"])
    differences.equal("multiclass_nms.labels", kept.labels.tolist(), entry["labels"])
    differences.equal("multiclass_nms.flat_indices", kept.places.tolist(), entry["flat_indices"])
    known = ("boxes_first", "scores_first", "score_thr", "iou", "max", "dets", "labels", "flat_indices")
    differences.fields("multiclass_nms", entry, known)


def check_roi_features(entry: Document, differences: Differences) -> None:
    """Check levels and RoIAlign."""
    rois, maps = tensor(entry["rois"], 5), features(entry["feature_shapes"])
    strides = (4, 8, 16, 32)
    differences.equal("roi_extractor.levels", roi_levels(rois, strides).tolist(), entry["levels"])
    differences.equal("roi_extractor: aligned", (True, 0), (entry["aligned"], entry["sampling_ratio"]))
    names = [name for name in entry if name.startswith("per_roi_")]
    for name in names:
        side = int(name.rpartition("x")[2])
        for number, (found, wanted) in enumerate(
            zip(roi_features(maps, rois, strides, side), entry[name], strict=True)
        ):
            differences.summary(f"roi_extractor.{name}[{number}]", found, wanted)
    known = ("feature_shapes", "rois", "levels", "aligned", "sampling_ratio", *names)
    differences.fields("roi_extractor", entry, known)


SECTIONS: Mapping[str, Callable[[Any, Differences], None]] = {
    "delta_xywh": check_coder,
    "distance_point": check_distances,
    "anchors": check_anchors,
    "points_fcos": check_points,
    "max_iou_assigner": check_assigner,
    "multiclass_nms": check_nms,
    "roi_extractor": check_roi_features,
}
"""Field of a file -> check."""


def check_units(document: Document, differences: Differences) -> None:
    """Check every field of a file of units."""
    for name, check in SECTIONS.items():
        if name in document:
            check(document[name], differences)
    differences.fields("the file", document, SECTIONS)


CHECKS = {"detection_units": check_units}
"""Kind of file -> check."""
