"""Find the parts of a model: its backbone, the backbone's stem and stages, and the necks and heads around it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from widefield.report import Report

Part = Literal["stem", "body", "neck", "head"]

NAMES = ("backbone", "encoder", "trunk", "body", "image_encoder")
"""Usual names of a backbone inside another model; earlier names win."""

_BEFORE_THE_PYRAMID = (*NAMES, "features")
"""Usual names of a backbone next to its neck: body and fpn in torchvision's detectors, features and extra in SSD."""

_NECKS = frozenset({"neck", "fpn", "pyramid", "extra", "extras", "decoder", "channel_mapper"})
_HEAD = re.compile(r"(^|_)(heads?|classifier|fc|logits|linear)(_|$)|^aux", re.IGNORECASE)
_NUMBERED = re.compile(r"(layer|stage|block|level|res)_?(\d+)")
_LISTS = frozenset({"stages", "layers", "levels"})


@dataclass(frozen=True)
class Stage:
    """One stage of a backbone.

    Attributes:
        name: the module that returns the stage's features, such as "layer3" or "backbone.stages.2". Modules between two
            of these belong to the later stage.
        reduction: side of the image over the side of these features; None if unknown.
        channels: channels of these features; None if unknown.
    """

    name: str
    reduction: int | None = None
    channels: int | None = None


@dataclass(frozen=True)
class Anatomy(Report):
    """The parts of a model, as dotted module names of that model; see :func:`anatomy`.

    Every method takes the name of a module or of a parameter.

    Attributes:
        backbone: the module that turns images into feature maps; "" if the model is a backbone itself.
        stem: outermost modules before the first stage. In a backbone with a deep stem, such as "conv1" of ResNet-D,
            this covers more than the convolution that reads the image.
        readers: convolutions that read the image, all of them in the stem.
        stages: stages of the backbone in the order of the images; empty if unknown.
        necks: outermost modules with parameters between the backbone and the heads, such as "backbone.fpn".
        heads: outermost modules with parameters that turn features into predictions, inside the backbone ("fc",
            "classifier") and outside of it ("roi_heads").
    """

    backbone: str
    stem: tuple[str, ...]
    readers: tuple[str, ...]
    stages: tuple[Stage, ...]
    necks: tuple[str, ...]
    heads: tuple[str, ...]
    _stage_of: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)
    _widths: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)
    _layers: frozenset[str] = field(default_factory=frozenset, repr=False, compare=False)

    def summary(self) -> str:
        """Return the backbone and the number of stages."""
        stages = f"{len(self.stages)} stages" if self.stages else "unknown stages"
        return f"Backbone: {self.backbone or 'the model itself'}, {stages}"

    def rows(self) -> list[dict[str, str]]:
        """Return one row per part."""

        def row(part: str, modules: Sequence[str], reduction: object = None, channels: object = None) -> dict[str, str]:
            numbers = {"stride": reduction, "channels": channels}
            return {
                "part": part,
                "modules": ", ".join(modules) or "-",
                **{name: "-" if number is None else str(number) for name, number in numbers.items()},
            }

        stages = [row(f"stage {k}", [s.name], s.reduction, s.channels) for k, s in enumerate(self.stages)]
        return [row("stem", self.stem), *stages, row("necks", self.necks), row("heads", self.heads)]

    def part(self, name: str) -> Part:
        """Return which part a module or parameter belongs to: "body" is the backbone without its stem and heads."""
        if _within(name, self.stem):
            return "stem"
        if is_inside(name, self.backbone) and not _within(name, self.heads):
            return "body"
        return "neck" if _within(name, self.necks) else "head"

    def in_backbone(self, name: str) -> bool:
        """Return whether a module or parameter belongs to the backbone; the backbone's own classifier does not."""
        return self.part(name) in ("stem", "body")

    def root_of(self, name: str) -> str:
        """Return the entry of ``stem``, ``necks`` or ``heads`` that holds a module; "" if none does."""
        roots = (*self.stem, *self.heads, *self.necks)
        return next((root for root in roots if is_inside(name, root)), "")

    def stage_of(self, name: str) -> int | None:
        """Return the index in ``stages`` of a module or parameter.

        Stem modules belong to stage 0. None: outside the backbone, in a head, a container of several stages, or the
        stages are unknown.
        """
        if not self.in_backbone(name):
            return None
        return self._stage_of.get(name, self._stage_of.get(name.rpartition(".")[0]))

    def ends_in_norm(self, stage: int) -> bool:
        """Return whether a stage is named after one layer with parameters behind its blocks, as in VAN and MogaNet."""
        return self.stages[stage].name in self._layers

    def count_stages(self, names: Sequence[str]) -> dict[str, int]:
        """Return each of these convolutions' stage, numbered from 0 over the stages that hold any of them.

        Convolutions outside the backbone count as one more stage at the end. If the stages are unknown, a new stage
        starts wherever the number of input channels changes.

        Args:
            names: in the order of the model.
        """
        if self.stages:
            found = [self.stage_of(name) for name in names]
            raw = [len(self.stages) if stage is None else stage for stage in found]
        else:
            raw = []
            for index, name in enumerate(names):
                changed = index > 0 and self._widths.get(name) != self._widths.get(names[index - 1])
                raw.append(raw[-1] + changed if raw else 0)
        ranks = {stage: rank for rank, stage in enumerate(sorted(set(raw)))}
        return {name: ranks[stage] for name, stage in zip(names, raw, strict=True)}


def anatomy(model: nn.Module) -> Anatomy:
    """Return the parts of a model: backbone, stem, stages, necks and heads.

    The backbone is the module nearest to the root that has ``feature_info`` or ``forward_features``, as timm's networks
    do, or else one named like a backbone (:data:`NAMES`). The search goes on inside it, down to the part before the
    pyramid. If several modules at the same depth qualify, such as the bodies of a network's blocks, the model itself is
    the backbone.

    Stages come from timm's ``feature_info``, or else from numbered siblings such as layer1 to layer4. Readers come from
    timm's configuration, or else they are the first convolution if it is dense with at most four input channels, and
    its siblings with as many.

    Args:
        model: any module. It is only read.
    """
    modules = dict(model.named_modules())
    outer, backbone = _backbone(model)
    inside = [name for name in modules if is_inside(name, backbone)]
    stages = _stages(modules[backbone], backbone)
    ends = [stage.name for stage in stages]
    readers = _readers(model, backbone, inside)
    stem = _stem(readers, backbone, ends)
    heads = _heads_inside(modules[backbone], backbone, [*ends, *readers])
    outside = _outside(model, [backbone, *(name for name in stem if not is_inside(name, backbone))]) if backbone else []
    necks = [n for n in outside if (outer != backbone and is_inside(n, outer)) or _NECKS & set(n.split("."))]
    heads += [name for name in outside if name not in necks]
    widths = {name: width for name, module in modules.items() if isinstance(width := _width(module), int)}
    layers = frozenset(end for end in ends if _has_parameters(modules[end]) and not list(modules[end].children()))
    return Anatomy(
        backbone, tuple(stem), tuple(readers), stages, tuple(necks), tuple(heads), _spans(inside, ends), widths, layers
    )


def is_inside(name: str, part: str) -> bool:
    """Return whether a module or parameter is ``part`` or lies in it; everything lies in ""."""
    return not part or name == part or name.startswith(f"{part}.")


def _within(name: str, parts: Iterable[str]) -> bool:
    return any(is_inside(name, part) for part in parts)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


# Backbone


def _backbone(model: nn.Module) -> tuple[str, str]:
    """Return the first backbone found from the root, and the innermost one inside it."""
    outer = found = ""
    while (inner := _nearest(model.get_submodule(found), _BEFORE_THE_PYRAMID if found else NAMES)) is not None:
        found = _join(found, inner)
        outer = outer or found
    return outer, found


def _nearest(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Return the name of the nearest backbone in a module, or None if there is none or the module is one itself."""
    if _is_network(module):
        return None
    for level in _levels(module):
        networks = [path for path, child in level.items() if _is_network(child)]
        called = [[path for path in level if path.rpartition(".")[2] == name] for name in names]
        nearest = next((paths for paths in (networks, *called) if paths), None)
        if nearest is not None:
            return nearest[0] if len(nearest) == 1 else None
    return None


def _levels(module: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """Yield the submodules by name: children first, then their children, and so on."""
    level = dict(module.named_children())
    while level:
        yield level
        level = {f"{path}.{name}": inner for path, child in level.items() for name, inner in child.named_children()}


def _is_network(module: nn.Module) -> bool:
    return getattr(module, "feature_info", None) is not None or callable(getattr(module, "forward_features", None))


# Stages


def _stages(backbone: nn.Module, prefix: str) -> tuple[Stage, ...]:
    """Return the stages of a backbone by ``feature_info``, or by the names of its modules."""
    info: Any = getattr(backbone, "feature_info", None)
    entries = [entry for entry in getattr(info, "info", info) or () if entry.get("module")]
    known = _flattened(backbone)
    names = [known.get(_flat(entry["module"])) or known.get(_flat(f"model.{entry['module']}")) for entry in entries]
    count = next((index for index, name in enumerate(names) if name is None), len(names))
    if count and not any(names[count:]):  # features_only drops the stages after the last one asked for
        return tuple(
            Stage(_join(prefix, name), entry.get("reduction"), entry.get("num_chs"))
            for name, entry in zip(names[:count], entries, strict=False)
            if name is not None
        )
    return tuple(Stage(_join(prefix, name)) for name in _numbered(backbone))


def _flattened(module: nn.Module) -> dict[str, str]:
    """Return flat name -> name of every submodule. timm's ``features_only`` renames "stages.0" to "stages_0"."""
    return {_flat(name): name for name, _ in module.named_modules() if name}


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _numbered(backbone: nn.Module) -> list[str]:
    """Return the nearest siblings that are named like stages and numbered, in their order; [] unless one such group."""
    for level in _levels(backbone):
        groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for path in level:
            parent, _, name = path.rpartition(".")
            match = _NUMBERED.fullmatch(name)
            if match is not None:
                groups.setdefault((parent, match[1]), []).append((int(match[2]), path))
            elif name.isdecimal() and parent.rpartition(".")[2] in _LISTS:
                groups.setdefault((parent, ""), []).append((int(name), path))
        runs = [sorted(group) for group in groups.values()]
        runs = [run for run in runs if len(run) > 1 and [n for n, _ in run] == list(range(run[0][0], run[-1][0] + 1))]
        if runs:
            return [path for _, path in runs[0]] if len(runs) == 1 and runs[0][0][0] < 2 else []
    return []


def _spans(names: Sequence[str], ends: Sequence[str]) -> dict[str, int]:
    """Return the stage of every module of a backbone that holds no two; what follows the last stage belongs to it."""
    last = [max(index for index, name in enumerate(names) if is_inside(name, end)) for end in ends]
    return {
        name: min(sum(index > end for end in last), len(ends) - 1)
        for index, name in enumerate(names)
        if ends and sum(is_inside(end, name) for end in ends) < 2
    }


# Stem and heads


def _readers(model: nn.Module, backbone: str, inside: Sequence[str]) -> list[str]:
    """Return the names of the convolutions that read the image, in the order of the model."""
    modules = dict(model.named_modules())
    convolutions = {name: m for name, m in modules.items() if isinstance(m, (nn.Conv2d, nn.Conv3d))}
    within = [name for name in inside if name in convolutions]
    config = getattr(modules[backbone], "pretrained_cfg", None) or {}
    named = config.get("first_conv") or ()
    known = _flattened(modules[backbone])
    named = [known.get(_flat(name), "") for name in ((named,) if isinstance(named, str) else named)]
    found = {_join(backbone, name) for name in named if name} & set(within)
    first = next(iter(within or convolutions), None)
    if not found and first is not None and convolutions[first].groups == 1 and convolutions[first].in_channels <= 4:
        found = {first}
    stems = {(_top(name, backbone), convolutions[name].in_channels) for name in found}
    branches = {n for n, m in convolutions.items() if m.groups == 1 and (_top(n, backbone), m.in_channels) in stems}
    return [name for name in convolutions if name in found | branches]


def _top(name: str, backbone: str) -> str:
    """Return the child of the backbone, or of the model, that holds a module."""
    if backbone and is_inside(name, backbone):
        return _join(backbone, name.removeprefix(f"{backbone}.").split(".")[0])
    return name.split(".")[0]


def _stem(readers: Sequence[str], backbone: str, ends: Sequence[str]) -> list[str]:
    """Return the outermost modules around the readers that hold no stage but the first and not the backbone."""
    stem: list[str] = []
    for reader in readers:
        root = reader
        parts = reader.split(".")
        for depth in range(1, len(parts)) if ends else ():
            outer = ".".join(parts[:depth])
            if not is_inside(backbone, outer) and not any(is_inside(end, outer) for end in ends[1:]):
                root = outer
                break
        if root not in stem:
            stem.append(root)
    return stem


def _heads_inside(backbone: nn.Module, prefix: str, body: Sequence[str]) -> list[str]:
    """Return the backbone's children that make predictions: by name, and what timm's configuration calls so."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    named = config.get("classifier") or ()
    roots = {name.split(".")[0] for name in ((named,) if isinstance(named, str) else named)}
    children = {name: child for name, child in backbone.named_children() if name in roots or _HEAD.search(name)}
    found = [_join(prefix, name) for name, child in children.items() if _has_parameters(child)]
    return [name for name in found if not any(is_inside(kept, name) for kept in body)]


def _outside(model: nn.Module, kept: Sequence[str], prefix: str = "") -> list[str]:
    """Return the outermost modules with parameters that hold none of the kept ones and are in none."""
    found: list[str] = []
    for name, child in model.get_submodule(prefix).named_children():
        path = _join(prefix, name)
        if any(part != path and is_inside(part, path) for part in kept):
            found += _outside(model, kept, path)
        elif path not in kept and _has_parameters(child):
            found.append(path)
    return found


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _width(module: nn.Module) -> Any:
    return getattr(module, "in_channels", None)
