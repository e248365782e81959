"""Compare the weights of a checkpoint file with those of a model, and explain differences."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Size, Tensor, nn

from widefield.dense import _detector_fit, _pose_fit
from widefield.dense._checkpoint_files import Checkpoint
from widefield.dense._trunk_keys import Family, TrunkNames, depths, family_of_file, trunk_names

BACKBONE = "backbone."
"""The prefix of a backbone's weights, in OpenMMLab's files and in our models."""

CLASSIFIER = rf"(?:decode_head|auxiliary_head)\.conv_seg\.|{_detector_fit.CLASSIFIER}|{_pose_fit.CLASSIFIER}"
"""Weights whose shape depends on the number of classes or key points."""

_AGNOSTIC = 4
"""Rows of the layer of a box head that predicts one box for all classes."""

_STAGE_NORM = re.compile(r"backbone\.(?:norm|stages\.)(\d)(?:\.norm)?\.(?:weight|bias|running_\w+|num_\w+)")
"""A norm after a stage of the backbone."""

_HEADS = {
    "UPerNet": "decode_head.psp_modules.",
    "DeepLabV3Plus": "decode_head.sep_bottleneck.",
    "SemanticFPN": "decode_head.scale_heads.",
}
"""Segmenter -> a prefix of weights that only its decode head has."""

_UNMERGED = r".*\.(?:origin_bn|lkb_origin|small_conv|LoRA[12])\."


@dataclass(frozen=True)
class Weights:
    """The weights of a model, by their names in published files.

    Attributes:
        keys: published name -> the model's key.
        shapes: published name -> shape.
        others: the model's keys without a published name.
        trunk: the names of the backbone.
    """

    keys: dict[str, str]
    shapes: dict[str, Size]
    others: tuple[str, ...]
    trunk: TrunkNames


def weights_of(state: Mapping[str, Tensor], backbone: nn.Module, *, by_timm: bool = False) -> Weights:
    """Return a model's weights by their published names.

    Args:
        state: the model's state dict.
        backbone: the model's :class:`widefield.dense.FeatureMaps`, or a merged copy of it.
        by_timm: name the backbone's weights as mmsegmentation's ``TIMMBackbone`` does.
    """
    trunk = trunk_names(backbone)
    names = {BACKBONE + key: BACKBONE + name for key, name in (trunk.by_timm if by_timm else trunk.names).items()}
    names |= {key: key for key in state if not key.startswith(BACKBONE)}
    shapes = {BACKBONE + key: value.shape for key, value in backbone.state_dict().items()}
    shapes |= {key: value.shape for key, value in state.items() if not key.startswith(BACKBONE)}
    keys = {name: key for key, name in names.items()}
    others = () if by_timm else tuple(BACKBONE + key for key in trunk.others)
    return Weights(keys, {name: shapes[key] for name, key in keys.items()}, others, trunk)


@dataclass(frozen=True)
class Source:
    """The weights of a file under their usual published names.

    Attributes:
        keys: usual name -> the key in the file.
        shapes: usual name -> shape.
        family: the family of the backbone, or None if it is not known.
        bare: whether the file holds a backbone or a classifier alone, without the prefix.
        by_timm: whether it was written with mmsegmentation's ``TIMMBackbone``.
    """

    keys: dict[str, str]
    shapes: dict[str, Size]
    family: Family | None
    bare: bool
    by_timm: bool


def source_of(file: Checkpoint) -> Source:
    """Return the weights of a file under their usual published names."""
    bare = not any(key.startswith((BACKBONE, "decode_head.")) for key in file.weights)
    full = {(BACKBONE if bare else "") + key: key for key in file.weights}
    family = family_of_file(key.removeprefix(BACKBONE) for key in full if key.startswith(BACKBONE))
    keys = {_usual(name, family): key for name, key in full.items()}
    shapes = {name: file.weights[key].shape for name, key in keys.items()}
    return Source(keys, shapes, family, bare, any(name.startswith(f"{BACKBONE}timm_model.") for name in keys))


def _usual(name: str, family: Family | None) -> str:
    if not name.startswith(BACKBONE):
        return _pose_fit.usual_name(_detector_fit.usual_name(name))
    if family is None:
        return name
    return BACKBONE + family.common(name.removeprefix(BACKBONE))


@dataclass
class Fit:
    """How a file's weights and a model's go together, by published names.

    Attributes:
        pairs: names that both have.
        missing: the model's names that the file lacks.
        unknown: the file's names that the model lacks.
        shapes: names with other shapes.
        fresh: the model's names that are not loaded by request.
        left: the file's names that are not used by request.
    """

    pairs: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Return whether there are no differences."""
        return not (self.missing or self.unknown or self.shapes)


def compared(model: Weights, file: Source, parts: Collection[str] | None, *, fresh_classifier: bool) -> Fit:
    """Compare a model's weights with a file's.

    Args:
        model, file: the two.
        parts: first components of the names to load; None for all.
        fresh_classifier: whether the last layers stay as they are.
    """
    fit = Fit()
    alone = parts is not None and set(parts) == {"backbone"}
    for name, shape in model.shapes.items():
        optional = alone and model.keys[name].startswith("backbone.norm")
        if not _wanted(name, shape, parts, fresh_classifier) or (optional and name not in file.shapes):
            fit.fresh.append(name)
        elif name not in file.shapes:
            fit.missing.append(name)
        elif not _alike(shape, file.shapes[name], name):
            fit.shapes.append(name)
        else:
            fit.pairs.append(name)
    fit.missing += [name for name in model.others if parts is None or "backbone" in parts]
    classifier = file.family.classifier if alone and file.family else r"(?!)"
    first = min((stage for name in model.shapes if (stage := _normed_stage(name)) is not None), default=0)
    for name, shape in file.shapes.items():
        if (
            not _wanted(name, shape, parts, fresh_classifier)
            or re.match(BACKBONE + classifier, name)
            or _below(_normed_stage(name), first)
        ):
            fit.left.append(name)
        elif name not in model.shapes:
            fit.unknown.append(name)
    return fit


def _wanted(name: str, shape: Size, parts: Collection[str] | None, fresh_classifier: bool) -> bool:
    agnostic = ".fc_reg." in name and shape[0] == _AGNOSTIC
    if fresh_classifier and not agnostic and re.match(CLASSIFIER, name):
        return False
    return parts is None or name.partition(".")[0] in parts


def _normed_stage(name: str) -> int | None:
    """Return the stage whose norm has this weight, or None. Only downstream models have such norms."""
    found = _STAGE_NORM.fullmatch(name)
    return int(found[1]) if found else None


def _below(stage: int | None, first: int) -> bool:
    """Return whether a model whose first norm is that of stage ``first`` does not read the map of this stage."""
    return stage is not None and stage < first


def _alike(ours: Size, theirs: Size, name: str) -> bool:
    """Return whether shapes are equal, in backbones up to dimensions of 1: matrices are also stored as 1x1 kernels."""
    if ours == theirs:
        return True
    if not name.startswith(BACKBONE) or math.prod(ours) != math.prod(theirs):
        return False
    return [side for side in ours if side != 1] == [side for side in theirs if side != 1]


# Explaining differences


def differences(fit: Fit, model: Weights, file: Source) -> str:
    """Return the first differences of each kind in one sentence."""
    shapes = [f"{name} is {tuple(file.shapes[name])} and should be {tuple(model.shapes[name])}" for name in fit.shapes]
    kinds = (("not in the file: ", fit.missing), ("not in the model: ", fit.unknown), ("other shapes: ", shapes))
    return "; ".join(f"{kind}{_first(names)}" for kind, names in kinds if names)


def _first(words: list[str], count: int = 3) -> str:
    more = f" and {len(words) - count} more" if len(words) > count else ""
    return ", ".join(words[:count]) + more


def hints(fit: Fit, model: Weights, file: Source, parts: Collection[str] | None) -> list[str]:
    """Return sentences that say why a file does not fit, and what to do."""
    alone = parts is not None and set(parts) == {"backbone"}
    kind = _kind_of_file(model, file, alone)
    if kind:
        return [kind]
    head = None if alone else _head(model, file)
    return [hint for hint in (head, *_backbone(fit, model, file), *_details(fit, model, file)) if hint]


def _kind_of_file(model: Weights, file: Source, alone: bool) -> str | None:
    tops, known = ({name.partition(".")[0] for name in weights.shapes} for weights in (file, model))
    is_detector = bool(known & {"rpn_head", "roi_head", "bbox_head"})
    is_pose = _pose_fit.is_pose(model.shapes)
    pose = ("head.deconv_layers", "head.final_layer")
    if any(name.startswith("backbone.body.") for name in file.shapes):
        return "The file has widefield's own names: load it with model.load_state_dict."
    if alone:
        return None
    hint = "parts='backbone' loads its backbone."
    if not is_detector and tops & {"rpn_head", "roi_head", "bbox_head", "mask_head"}:
        return f"It is a detection file; {hint}"
    if "head" not in known and any(name.startswith(pose) for name in file.shapes):
        return f"It is a pose file; {hint}"
    if (is_detector or is_pose) and "decode_head" in tops:
        return f"It is a segmentation file; {hint}"
    heads = {"roi_head", "bbox_head", "rpn_head"} if is_detector else {"decode_head"} & known or {"head"}
    if file.bare or not tops & heads:
        return f"It holds a classifier or a backbone alone; {hint}"
    return None


def _head(model: Weights, file: Source) -> str | None:
    ours, theirs = (_detector_fit.detector_of(weights.shapes) for weights in (model, file))
    if ours is not None and theirs != ours:
        named = _with_article(theirs) if theirs else "another detector, which is not here"
        return f"The file holds {named}, the model is {_with_article(ours)}."
    ours, theirs = (segmenter_of(weights.shapes) for weights in (model, file))
    if theirs == ours:
        return None
    if theirs is None:
        return f"The file's decode head is not that of {ours or 'this model'}, nor of another segmenter here."
    return f"The file holds a {theirs}" + (f", the model is a {ours}." if ours else ".")


def _with_article(name: str) -> str:
    return f"{'an' if name == 'FCOS' else 'a'} {name}"


def segmenter_of(names: Iterable[str]) -> str | None:
    """Return the name of the segmenter that has these weights, or None if it is not known."""
    names = list(names)
    return next((head for head, prefix in _HEADS.items() if any(name.startswith(prefix) for name in names)), None)


def _backbone(fit: Fit, model: Weights, file: Source) -> list[str]:
    wrong = [name for name in (*fit.missing, *fit.unknown, *fit.shapes) if name.startswith(BACKBONE)]
    ours, theirs = model.trunk.family, file.family
    if not wrong:
        return []
    if theirs is not None and ours is not theirs:
        return [f"The file's backbone is a {theirs.name}" + (f", the model's a {ours.name}." if ours else ".")]
    if all(_normed_stage(name) is not None for name in wrong):
        return [
            "Only the norms after the backbone's stages differ: build the model with another stage_norms, such as "
            + ("'layer'." if fit.unknown else "'none'.")
        ]
    if fit.missing and any(re.match(_UNMERGED, name) for name in fit.unknown):
        return ["The model is reparameterized and the file is not: load it before reparameterize()."]
    if model.others:
        return [
            f"The backbone has layers that the file cannot know ({model.others[0].rpartition('.')[0]}): load the file "
            "before convert() or reparameterize(), which keep the function."
        ]
    return [_variant(model, file), *_notes(fit, theirs)]


def _variant(model: Weights, file: Source) -> str:
    ours, theirs = (
        depths(name.removeprefix(BACKBONE) for name in weights.shapes if name.startswith(BACKBONE))
        for weights in (model, file)
    )
    if ours != theirs:
        return f"The file's backbone is of another variant: its stages have {theirs} blocks, the model's {ours}."
    widths = [_width(weights.shapes) for weights in (model, file)]
    if widths[0] != widths[1]:
        return (
            f"The file's backbone is of another variant: it starts with {widths[1]} channels, the model's with "
            f"{widths[0]}."
        )
    return ""


def _width(shapes: Mapping[str, Size]) -> int:
    return next((shape[0] for name, shape in shapes.items() if name.startswith(BACKBONE) and len(shape) == 4), 0)


def _notes(fit: Fit, family: Family | None) -> list[str]:
    return [
        f"{note[0].upper()}{note[1:]}."
        for pattern, note in (family.notes if family else ())
        if any(re.match(re.escape(BACKBONE) + pattern, name) for name in fit.shapes)
    ]


def _details(fit: Fit, model: Weights, file: Source) -> list[str]:
    found = _detector_fit.details(fit.missing, fit.unknown, model.shapes, file.shapes)
    found += _pose_fit.details(fit.missing, fit.unknown, model.shapes, file.shapes)
    for name in ("decode_head.conv_seg.bias", "auxiliary_head.conv_seg.bias"):
        if name in fit.shapes:
            ours, theirs = model.shapes[name][0], file.shapes[name][0]
            found.append(
                f"The file has {theirs} classes, the model {ours}: build the model with num_classes={theirs}, or keep "
                "its own classifier with fresh_classifier=True."
            )
            break
    weight = "decode_head.conv_seg.weight"
    if weight in fit.shapes and model.shapes[weight][1] != file.shapes[weight][1]:
        width = file.shapes[weight][1]
        found.append(f"The file's decode head has another width: build the model with channels={width}.")
    lone = [kind for kind, names in (("file", fit.unknown), ("model", fit.missing))
            if any(name.startswith("auxiliary_head.") for name in names)]  # fmt: skip
    if len(lone) == 1:
        found.append(
            f"Only the {lone[0]} has an auxiliary head, which serves training alone: build the model with "
            f"auxiliary={lone[0] == 'file'}, or load parts=('backbone', 'decode_head')."
        )
    return found
