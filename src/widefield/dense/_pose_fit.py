"""Tell pose models in checkpoint files apart, and explain why one does not fit a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Size

from widefield.dense import _pose_config
from widefield.dense._checkpoint_files import Checkpoint
from widefield.dense.pose_convention import PoseConvention

CLASSIFIER = r"head\.final_layer\."
"""Weights whose shape depends on the number of key points."""

_OLD = "keypoint_head."
"""The prefix of the head in mmpose 0.x."""

_OTHERS = (
    (r"head\.(?:mlp_head_[xy]|cls_[xy]|gau|deconv_head)\.", "classifies coordinates (SimCC, RTMPose)"),
    (r"head\.(?:final_layers\.|deconv_layers\.\d+\.\d)", "groups key points by associative embedding (bottom-up)"),
    (r"head\.(?:multi_(?:deconv|final)_layers|predict_layers)\.", "has several stages (hourglass, MSPN, RSN, CPM)"),
    (r"head\.(?:loss|loss_module)\.flow|head\.simplebaseline_head\.", "regresses coordinates (RLE, integral)"),
    (r"head\.fc\.", "is one linear layer: it classifies images, or regresses coordinates (DeepPose)"),
)  # fmt: skip
"""(start of weights, what such a head does) of heads that are not here."""

_PLAIN_HEADS = ("HeatmapHead", "TopdownHeatmapSimpleHead", "TopDownSimpleHead")
"""Names of the head in mmpose 1.x, 0.x, and before 0.10."""


def usual_name(name: str) -> str:
    """Return the name in mmpose 1.x."""
    return f"head.{name.removeprefix(_OLD)}" if name.startswith(_OLD) else name


def old_name(name: str) -> str:
    """Return the name in mmpose 0.x."""
    return _OLD + name.removeprefix("head.") if name.startswith("head.") else name


def is_pose(shapes: Mapping[str, Size]) -> bool:
    """Return whether weights, by their usual names, have a head as pose models here have it."""
    last = shapes.get("head.final_layer.weight")
    others = any(re.match(pattern, name) for name in shapes for pattern, _ in _OTHERS)
    return last is not None and len(last) == 4 and not others


def keypoints_of(shapes: Mapping[str, Size]) -> int | None:
    """Return the number of key points of a pose model, or None if it is not known."""
    return shapes["head.final_layer.weight"][0] if is_pose(shapes) else None


def convention_of(file: Checkpoint, count: int | None) -> PoseConvention | None:
    """Return what a file says about its heatmaps, or None if it says nothing.

    Args:
        file: the file.
        count: number of heatmaps. Names of another number of key points are not those of the heatmaps.
    """
    found = _pose_config.convention(file.config)
    names, swapped = file.keypoints or (found.keypoints, found.swapped)
    if names is None or len(names) != count:
        names = swapped = None
    found = replace(found, keypoints=names, swapped=swapped)
    return None if found == PoseConvention() else found


# Refusals of weights that would fit


def refusal(
    file: Checkpoint,
    found: PoseConvention | None,
    expected: PoseConvention | None,
    parts: Collection[str],
    *,
    kind: str,
    fresh_classifier: bool,
) -> str | None:
    """Return why a file must not be loaded into a pose model although its weights may fit, or None.

    Args:
        file: the file.
        found: see :func:`convention_of`.
        expected: what images and heatmaps of the model mean; None for no expectation. Its codec is not compared.
        parts: the parts to load.
        kind: of the model's heatmaps.
        fresh_classifier: whether the last layer stays as it is.
    """
    reasons = [_of_images(file, found, expected)] if "backbone" in parts else []
    if "head" in parts and not fresh_classifier:
        reasons += [_of_head(file.config), _of_kind(found, kind), _of_keypoints(found, expected)]
    return next((reason for reason in reasons if reason is not None), None)


def _of_images(file: Checkpoint, found: PoseConvention | None, expected: PoseConvention | None) -> str | None:
    if _pose_config.is_bgr(file.config):
        return (
            "its images have the channels blue, green, red, those here red, green, blue. Reverse the input channels of "
            "its first convolution, and save the weights without their configuration."
        )
    for name in ("mean", "std"):
        theirs, ours = getattr(found, name, None), getattr(expected, name, None)
        if theirs and ours and any(abs(one - other) > 2e-3 for one, other in zip(theirs, ours, strict=True)):
            return f"its images have the {name} {theirs}, and {ours} is expected. Normalize images as the file says."
    return None


def _of_head(config: str) -> str | None:
    head = _pose_config.head_type(config)
    if head is not None and head not in _PLAIN_HEADS:
        return (
            f"its head is a {head}, whose outputs are read in another way than those of HeatmapHead. "
            "parts='backbone' loads its backbone."
        )
    coding = _pose_config.other_coding(config)
    if coding is not None:
        return f"its heatmaps are {coding}, which no codec here reads. parts='backbone' loads its backbone."
    return None


def _of_kind(found: PoseConvention | None, kind: str) -> str | None:
    codec = None if found is None else found.codec
    if codec is None or codec.kind == kind:
        return None
    return (
        f"its heatmaps are of the kind {codec.kind!r}, and this model has kind={kind!r}: build the model with "
        f"kind={codec.kind!r}, sigma={codec.sigma:g}, blur={codec.blur}, or keep its own last layer with "
        "fresh_classifier=True."
    )


def _of_keypoints(found: PoseConvention | None, expected: PoseConvention | None) -> str | None:
    if found is None or expected is None:
        return None
    theirs, ours = found.keypoints, expected.keypoints
    if theirs is not None and ours is not None and theirs != ours:
        place = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), None)
        differs = (
            f"has {len(theirs)} key points, and {len(ours)} are expected"
            if place is None
            else f"has the key point {theirs[place]!r} at place {place}, and {ours[place]!r} is expected"
        )
        return (
            f"it {differs}. Use a skeleton with the file's key points in their order, or keep the model's last layer "
            "with fresh_classifier=True."
        )
    return None


def stored(convention: PoseConvention, count: int) -> dict[str, Any]:
    """Return the ``meta`` of a file in which mmpose 1.x and :func:`convention_of` find a convention.

    Args:
        convention: what to store.
        count: number of heatmaps of the model.

    Raises:
        ValueError: the convention has another number of key points.
    """
    meta: dict[str, Any] = {}
    names, swapped = convention.keypoints, convention.swapped
    for name, values in (("keypoints", names), ("swapped", swapped)):
        if values is not None and len(values) != count:
            raise ValueError(f"{name} must have one entry for each of the model's {count} key points; got "
                             f"{len(values)}.")  # fmt: skip
    if names is not None:
        pairs = [] if swapped is None else [[i, j] for i, j in enumerate(swapped) if i < j]
        meta["dataset_meta"] = {
            "dataset_name": "widefield",
            "num_keypoints": count,
            "keypoint_id2name": dict(enumerate(names)),
            "keypoint_name2id": {name: index for index, name in enumerate(names)},
            "flip_indices": list(range(count) if swapped is None else swapped),
            "flip_pairs": pairs,
            "keypoint_colors": [[255, 128, 0]] * count,
            "num_skeleton_links": 0,
            "skeleton_links": [],
            "skeleton_link_colors": [],
        }
    text = _pose_config.written(convention)
    return {**meta, "cfg": text} if text else meta


# Explaining differences


def other_head(names: Iterable[str]) -> str | None:
    """Return what the head of a file does if it is not one of heatmaps, or None."""
    names = list(names)
    return next((what for pattern, what in _OTHERS if any(re.match(pattern, name) for name in names)), None)


def details(
    missing: Iterable[str], unknown: Iterable[str], model: Mapping[str, Size], file: Mapping[str, Size]
) -> list[str]:
    """Return sentences that say why two pose models differ, and what to do.

    Args:
        missing: the model's names that the file lacks.
        unknown: the file's names that the model lacks.
        model, file: their names and shapes.
    """
    if not is_pose(model):
        return []
    unknown = list(unknown)
    found = []
    if any(re.match(r"backbone\.stage2\.0\.branches\.", name) for name in file):
        found.append("The file's backbone is an HRNet, whose files do not load here.")
    if "backbone.conv2.conv.weight" in unknown:
        found.append(
            "The file's MobileNetV2 ends with a 1x1 convolution to 1280 channels, which feature maps here do not have; "
            "parts='backbone' loads the rest."
        )
    other = other_head(file)
    if other is not None:
        return [*found, f"The file's head {other}; models here have heatmaps."]
    if any(re.match(r"head\.(?:conv_layers|final_layer)\.\d", name) for name in unknown):
        found.append("The file's head has convolutions between the deconvolutions and the last layer, ours has none.")
    return found + _of_layers(model, file)


def _of_layers(model: Mapping[str, Size], file: Mapping[str, Size]) -> list[str]:
    found = []
    ours, theirs = _deconvolutions(model), _deconvolutions(file)
    kernels = {tuple(shape[2:]) for shape in theirs}
    widths = [tuple(shape[1] for shape in shapes) for shapes in (ours, theirs)]
    if kernels - {(4, 4)}:
        found.append(f"The file's deconvolutions have kernels of {_sides(kernels)}, those here of 4x4.")
    elif widths[0] != widths[1] and is_pose(file):
        found.append(f"The file has other deconvolutions: build the model with channels={widths[1]}.")
    last = [shapes.get("head.final_layer.weight") for shapes in (model, file)]
    if last[0] is not None and last[1] is not None and len(last[1]) == 4:
        if last[1][2:] != last[0][2:]:
            found.append(f"The file's last layer has kernels of {_sides([tuple(last[1][2:])])}, ours of 1x1.")
        if last[1][0] != last[0][0]:
            count = last[1][0]
            found.append(
                f"The file has {count} key points, the model {last[0][0]}: build the model with num_keypoints={count}, "
                "or keep its own last layer with fresh_classifier=True."
            )
    return found


def _deconvolutions(shapes: Mapping[str, Size]) -> list[Size]:
    """Return the shapes of the deconvolutions' kernels, in their order."""
    found = [(int(match[1]), shape) for name, shape in shapes.items() if len(shape) == 4
             and (match := re.fullmatch(r"head\.deconv_layers\.(\d+)\.weight", name))]  # fmt: skip
    return [shape for _, shape in sorted(found, key=lambda entry: entry[0])]


def _sides(kernels: Iterable[tuple[int, ...]]) -> str:
    return " and ".join("x".join(map(str, kernel)) for kernel in sorted(kernels))
