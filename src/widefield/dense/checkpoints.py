"""Load and save segmenters, detectors and pose models in OpenMMLab's files, with the published key names.

The names of heads and necks in :mod:`widefield.dense` are the published ones, so only backbones need a map.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from widefield import _checks
from widefield.dense import _pose_fit
from widefield.dense._checkpoint_files import Checkpoint, meta_of, read_checkpoint, write_checkpoint
from widefield.dense._checkpoint_fit import (
    BACKBONE,
    Fit,
    Source,
    Weights,
    compared,
    differences,
    hints,
    segmenter_of,
    source_of,
    weights_of,
)
from widefield.dense._detector_fit import classes_of, detector_of, in_openmmlab_form, refusal
from widefield.dense._torchvision import COCO_CLASSES
from widefield.dense._trunk_keys import Family
from widefield.dense.backbone import FeatureMaps
from widefield.dense.heatmap import HeatmapPose
from widefield.dense.pose_convention import PoseConvention
from widefield.surgery.merged_forms import Select, merge_in_place, merged_forms

NAMES = ("published", "mmpretrain")
"""Whose names a saved backbone has: its family's own downstream code, or OpenMMLab's mmpretrain (ConvNeXt only)."""

MMPOSE = ("1.x", "0.x")
"""Versions of mmpose, which name the head differently."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What :func:`load_checkpoint` did.

    Attributes:
        path: the file.
        loaded: the model's keys that were loaded.
        fresh: the model's keys that kept their values.
        skipped: the file's keys that were not used.
        merged: whether the model was brought into the merged form of the file.
        classes: class names, if the file has them.
        palette: a color (red, green, blue) from 0 to 255 for each class, if the file has it.
        converted: what was changed in weights of another library, or None.
        convention: what the file says about images and heatmaps of a pose model, or None.
    """

    path: Path
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    skipped: tuple[str, ...]
    merged: bool
    classes: tuple[str, ...] | None
    palette: tuple[tuple[int, int, int], ...] | None
    converted: str | None = None
    convention: PoseConvention | None = None

    def __str__(self) -> str:
        """Return the counts of each part, one statement per line."""
        lines = [f"{self.path.name}: loaded {len(self.loaded)} weights ({_counts(self.loaded)})"]
        if self.converted:
            lines.append(self.converted)
        if self.merged:
            lines.append("the model was brought into the merged form of the file")
        if self.fresh:
            lines.append(f"{len(self.fresh)} weights of the model kept their values ({_counts(self.fresh)})")
        if self.skipped:
            lines.append(f"{len(self.skipped)} entries of the file were not used ({_counts(self.skipped)})")
        if self.convention is not None:
            lines.append(str(self.convention))
        return "\n".join(lines)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint file holds, by :func:`inspect_checkpoint`.

    Attributes:
        path: the file.
        parts: name of a part, such as "backbone" -> its number of weights. Weights of a classifier or a backbone alone,
            which have no common prefix, are in several parts.
        published: whether the backbone's weights have published names, after the prefix "backbone".
        backbone: the backbone's family, such as "ConvNeXt", or None if it is not known.
        segmenter: the class in :mod:`widefield.dense` with such a decode head, or None.
        detector: the class in :mod:`widefield.dense` with such heads, or None.
        num_classes: number of classes of the heads, without the background, or None. A file of torchvision with the 91
            outputs of COCO has 80.
        classes: class names, if the file has them.
        palette: a color (red, green, blue) from 0 to 255 for each class, if the file has it.
        pose: "HeatmapPose" if the file has such a head, or None.
        num_keypoints: number of heatmaps of a pose model, or None.
        convention: what the file says about images and heatmaps of a pose model, or None.
    """

    path: Path
    parts: dict[str, int]
    published: bool
    backbone: str | None
    segmenter: str | None
    detector: str | None
    num_classes: int | None
    classes: tuple[str, ...] | None
    palette: tuple[tuple[int, int, int], ...] | None
    pose: str | None = None
    num_keypoints: int | None = None
    convention: PoseConvention | None = None


def inspect_checkpoint(path: str | Path) -> CheckpointInfo:
    """Return what a checkpoint file holds, without a model.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no weights, or needs code to be read.
    """
    file = in_openmmlab_form(read_checkpoint(path), COCO_CLASSES)
    source = source_of(file)
    bias = source.shapes.get("decode_head.conv_seg.bias")
    own = any(key.startswith("backbone.body.") for key in file.weights)
    count = _pose_fit.keypoints_of(source.shapes)
    return CheckpointInfo(
        path=file.path,
        parts=dict(Counter(key.partition(".")[0] for key in file.weights)),
        published=not own and any(key.startswith(BACKBONE) for key in file.weights),
        backbone=source.family.name if source.family else None,
        segmenter=segmenter_of(source.shapes),
        detector=detector_of(source.shapes),
        num_classes=bias[0] if bias else classes_of(source.shapes),
        classes=file.classes,
        palette=file.palette,
        pose=None if count is None else HeatmapPose.__name__,
        num_keypoints=count,
        convention=None if count is None else _pose_fit.convention_of(file, count),
    )


def _counts(keys: Sequence[str]) -> str:
    counts = Counter(key.partition(".")[0] for key in keys if "." in key)
    others = sum("." not in key for key in keys)
    return ", ".join([f"{part} {count}" for part, count in counts.items()] + ([f"others {others}"] if others else []))


@_checks.guided
def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    parts: str | Sequence[str] | None = None,
    fresh_classifier: bool = False,
    pose: PoseConvention | None = None,
) -> LoadedCheckpoint:
    """Load a file of OpenMMLab's libraries into a model: every weight, or nothing.

    Files of mmsegmentation and mmpose 0.x and 1.x, of mmdetection 2.x and 3.x, of the families' own downstream code,
    and of torchvision's detectors fit, as ``torch.save`` or safetensors wrote them. Only tensors and plain values are
    unpickled. If the file's kernels were merged (RepLKNet, SLaK, UniRepLKNet), the model's are merged first.

    The classes of torchvision's files are brought into OpenMMLab's order. From its 91 outputs for COCO, a model of 80
    classes takes those with a category.

    Args:
        model: a segmenter, detector or pose model of :mod:`widefield.dense`, on any device.
        path: the file.
        parts: the parts to load, such as "backbone" or ("backbone", "decode_head"); the others keep their values. None
            for the whole model. "backbone" alone also takes files of other tasks; the norms after the stages keep their
            values if the file has none.
        fresh_classifier: whether the last layers (``conv_seg`` of segmenters; those with an output per class of
            detectors; ``final_layer`` of pose models) keep their values. The file may then have another number of
            classes or key points.
        pose: what images and heatmaps of a pose model are to mean. A file that says otherwise (other key points or
            another order, other mean and std) is refused. The kind of heatmaps is compared with the model's, image size
            and sigma are only reported.

    Returns:
        What was loaded and what was not, and the class names of the file.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the model is not a segmenter, detector or pose model.
        ValueError: a weight is missing, not known, or has another shape. The message has the first ones and the
            probable reason, and the model is unchanged. Or: the weights would fit and mean something else, such as
            those of mmdetection 1.x, or of heads that group or regress key points. Or: the file holds no weights, or
            needs code to be read.
    """
    segmenter = _segmenter(model)
    chosen = _parts(segmenter, parts)
    file = in_openmmlab_form(read_checkpoint(path), getattr(segmenter, "num_classes", None))
    source = source_of(file)
    convention = _checked(segmenter, file, source, chosen, fresh_classifier, pose)
    state, backbone = segmenter.state_dict(), segmenter.get_submodule("backbone")
    ours = weights_of(state, backbone, by_timm=source.by_timm)
    fit = compared(ours, source, chosen, fresh_classifier=fresh_classifier)
    select: Select | None = None
    if not _acceptable(fit, source, chosen):
        ours, fit, select = _merged(segmenter, source, chosen, fresh_classifier, (ours, fit))
    if not _acceptable(fit, source, chosen):
        reasons = " ".join(["", *hints(fit, ours, source, chosen)])
        found = differences(fit, ours, source) or "its parts differ"
        raise ValueError(f"{file.path.name} does not fit this {type(segmenter).__name__}: {found}. "
                         f"The model is unchanged.{reasons}")  # fmt: skip
    if select is not None:
        merge_in_place(backbone, select)
    report = _fill(segmenter, file, source, ours, fit, merged=select is not None)
    return replace(report, convention=convention)


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
    names: str = "published",
    pose: PoseConvention | None = None,
    mmpose: str = "1.x",
) -> None:
    """Save a model in OpenMMLab's format, so that their code, and the code of the backbone's family, can load it.

    Backbones of unknown families are named as mmsegmentation's ``TIMMBackbone`` does.

    Args:
        model: a segmenter, detector or pose model of :mod:`widefield.dense`.
        path: the file; safetensors if it ends so, otherwise what ``torch.save`` writes.
        classes: class names to store, which OpenMMLab's tools show.
        palette: a color (red, green, blue) from 0 to 255 for each class.
        names: "published": the backbone has the names of its family's own code; "mmpretrain": those of mmpretrain,
            which mmsegmentation 1.x and mmpose use. The two differ for ConvNeXt, and only for it "mmpretrain" is known.
        pose: what the heatmaps of a pose model mean, to store.
        mmpose: the version of mmpose that a pose model's head is named for: "1.x" or "0.x". Version 1.x loads both.

    Raises:
        OSError: the place cannot be written.
        TypeError, ValueError: the model is not a segmenter, detector or pose model, or has layers that the published
            code lacks; classes or colors do not fit its number of classes, or ``pose`` its number of key points.
    """
    segmenter = _segmenter(model)
    _checks.choice("names", names, NAMES)
    _checks.choice("mmpose", mmpose, MMPOSE)
    meta = meta_of(classes, palette, getattr(segmenter, "num_classes", None))
    if pose is not None:
        meta |= _pose_fit.stored(pose, _pose_model(segmenter).num_keypoints)
    state = segmenter.state_dict()
    ours = weights_of(state, segmenter.get_submodule("backbone"))
    family = ours.trunk.family
    lacking = ours.trunk.lacking
    if lacking:
        raise ValueError(
            f"the published code of {_name(family)} lacks {lacking[0].rpartition('.')[0]}, so it could not load this "
            f"model ({len(lacking)} such weights). Save the model before convert() or "
            "reparameterize(), or keep it as it is with torch.save(model.state_dict(), path)."
        )
    if names == "mmpretrain" and (family is None or not family.mmpretrain):
        raise ValueError(f"names='mmpretrain' is known for ConvNeXt only, not for {_name(family)}.")
    weights: dict[str, Tensor] = {}
    for name, key in ours.keys.items():
        inner, value = name.removeprefix(BACKBONE), state[key]
        if family is not None and name != inner:
            inner, value = family.stored(inner, value, names == "mmpretrain")
            name = BACKBONE + inner
        elif mmpose == "0.x" and isinstance(segmenter, HeatmapPose):
            name = _pose_fit.old_name(name)
        weights[name] = value
    write_checkpoint(path, weights, meta)


def _name(family: Family | None) -> str:
    return "this backbone" if family is None else family.name


def _segmenter(model: nn.Module) -> nn.Module:
    """Return the model in wrappers of data parallelism and ``torch.compile``."""
    while not isinstance(model._modules.get("backbone"), FeatureMaps):
        inner = model._modules.get("module") or model._modules.get("_orig_mod")
        if inner is None:
            raise TypeError(
                f"model must be a segmenter, detector or pose model, such as widefield.dense.UPerNet; got "
                f"{type(model).__name__}. Weights of classifiers load with timm.create_model(..., checkpoint_path=...)."
            )
        model = inner
    return model


def _pose_model(model: nn.Module) -> HeatmapPose:
    if not isinstance(model, HeatmapPose):
        raise TypeError(f"pose is what heatmaps mean, and a {type(model).__name__} has none: leave it out.")
    return model


def _checked(
    segmenter: nn.Module,
    file: Checkpoint,
    source: Source,
    chosen: Sequence[str] | None,
    fresh_classifier: bool,
    pose: PoseConvention | None,
) -> PoseConvention | None:
    """Return what a pose file says about its heatmaps; raise ValueError for weights that would mean something else."""
    if pose is not None:
        _pose_model(segmenter)
    convention = None
    reason = refusal(file, segmenter, chosen)
    if isinstance(segmenter, HeatmapPose):
        count = _pose_fit.keypoints_of(source.shapes)
        convention = None if count is None else _pose_fit.convention_of(file, count)
        loaded = {"backbone", "head"} if chosen is None else set(chosen)
        reason = reason or _pose_fit.refusal(
            file, convention, pose, loaded, kind=segmenter.kind, fresh_classifier=fresh_classifier
        )
    if reason is not None:
        raise ValueError(f"{file.path.name} is not loaded into this {type(segmenter).__name__}: {reason} The model is "
                         "unchanged.")  # fmt: skip
    return convention


def _parts(segmenter: nn.Module, parts: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if parts is None:
        return None
    known = list(dict.fromkeys(key.partition(".")[0] for key in segmenter.state_dict()))
    chosen = (parts,) if isinstance(parts, str) else tuple(parts)
    if not chosen:
        raise ValueError(f"parts is empty: give some of {', '.join(known)}, or None for all.")
    return tuple(_checks.choice("every entry of parts", part, known) for part in chosen)


def _acceptable(fit: Fit, source: Source, chosen: Sequence[str] | None) -> bool:
    """Return whether everything fits; a bare backbone is accepted only on request."""
    return fit.fits and bool(fit.pairs) and (not source.bare or (chosen is not None and set(chosen) == {"backbone"}))


def _merged(
    segmenter: nn.Module,
    source: Source,
    chosen: Sequence[str] | None,
    fresh_classifier: bool,
    plain: tuple[Weights, Fit],
) -> tuple[Weights, Fit, Select | None]:
    """Return the merged form of the model that the file fits, or else ``plain``."""
    family = plain[0].trunk.family
    if family is None or not family.merges or family is not source.family:
        return *plain, None
    for select, backbone in merged_forms(segmenter.get_submodule("backbone")):
        ours = weights_of(segmenter.state_dict(), backbone)
        fit = compared(ours, source, chosen, fresh_classifier=fresh_classifier)
        if _acceptable(fit, source, chosen):
            return ours, fit, select
    return *plain, None


def _fill(
    segmenter: nn.Module, file: Checkpoint, source: Source, ours: Weights, fit: Fit, *, merged: bool
) -> LoadedCheckpoint:
    values = {ours.keys[name]: file.weights[source.keys[name]].reshape(ours.shapes[name]) for name in fit.pairs}
    segmenter.load_state_dict(values, strict=False)
    fresh = tuple(ours.keys.get(name, name) for name in (*fit.fresh, *ours.others))
    skipped = (*(source.keys[name] for name in fit.left), *file.skipped)
    return LoadedCheckpoint(
        file.path, tuple(values), fresh, skipped, merged, file.classes, file.palette, file.converted
    )
