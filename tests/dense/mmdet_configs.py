"""Read configurations of mmdetection in fixtures: everything in them is used, or reported as unknown."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from dense.rules import Differences
from widefield.dense import DetectionRules

NORMS = {"BN": "batch", "SyncBN": "batch", "GN": "group"}
"""OpenMMLab's name of a norm -> ours."""

BOX_LOSSES = {"L1Loss": "l1", "SmoothL1Loss": "smooth_l1", "IoULoss": "iou", "GIoULoss": "giou"}
"""OpenMMLab's name of a loss of boxes -> ours."""


class Settings:
    """The entries of a configuration. Each must be taken, so that none is skipped unseen.

    Args:
        where: name of the configuration in messages.
        entries: name -> value.
        differences: where unknown entries are reported.
    """

    def __init__(self, where: str, entries: Mapping[str, Any], differences: Differences) -> None:
        self.where, self.differences = where, differences
        self.left = dict(entries)

    def take(self, name: str, default: Any = None) -> Any:
        """Return an entry."""
        return self.left.pop(name, default)

    def inner(self, name: str, default: Mapping[str, Any] | None = None) -> Settings:
        """Return a configuration inside this one."""
        return Settings(f"{self.where}.{name}", self.left.pop(name, None) or default or {}, self.differences)

    def expect(self, name: str, *values: Any) -> None:
        """Take an entry that must have one of these values, if it is there."""
        value = self.left.pop(name, values[0])
        if value not in values:
            self.unknown(name, value)

    def unknown(self, name: str, value: Any) -> None:
        """Report an entry that this library has no equivalent of."""
        self.differences.lines.append(f"{self.where}: {name}={value!r} is unknown")

    def done(self) -> None:
        """Report the entries that nobody took."""
        for name, value in self.left.items():
            self.unknown(name, value)
        self.left = {}


def norm_of(settings: Settings, name: str = "norm_cfg", default: Mapping[str, Any] | None = None) -> str | None:
    """Take a norm and return our name of it."""
    if name in settings.left and settings.left[name] is None:
        settings.take(name)
        return None
    if name not in settings.left and default is None:
        return None
    norm = settings.inner(name, default)
    kind = norm.take("type")
    norm.expect("requires_grad", True, False)
    norm.expect("num_groups", 32)
    norm.done()
    if kind not in NORMS:
        norm.unknown("type", kind)
    return NORMS.get(kind)


def focal_loss(settings: Settings, name: str = "loss_cls") -> dict[str, float]:
    """Take a focal loss and return its weight, alpha and gamma."""
    loss = settings.inner(name, {"type": "FocalLoss", "use_sigmoid": True})
    loss.expect("type", "FocalLoss")
    loss.expect("use_sigmoid", True)
    found = {
        "weight": loss.take("loss_weight", 1.0),
        "alpha": loss.take("alpha", 0.25),
        "gamma": loss.take("gamma", 2.0),
    }
    loss.done()
    return found


def cross_entropy_weight(settings: Settings, name: str, *, sigmoid: bool) -> float:
    """Take a cross-entropy of softmaxes or sigmoids and return its weight."""
    loss = settings.inner(name, {"type": "CrossEntropyLoss", "use_sigmoid": sigmoid})
    loss.expect("type", "CrossEntropyLoss")
    loss.expect("use_sigmoid", sigmoid)
    weight: float = loss.take("loss_weight", 1.0)
    loss.done()
    return weight


def box_loss(settings: Settings, name: str = "loss_bbox", default: str = "L1Loss") -> dict[str, Any]:
    """Take a loss of boxes and return our name of it as ``kind``, its weight, and its ``beta`` if it has one."""
    loss = settings.inner(name, {"type": default})
    kind = loss.take("type")
    if kind not in BOX_LOSSES:
        loss.unknown("type", kind)
    found = {"kind": BOX_LOSSES.get(kind), "weight": loss.take("loss_weight", 1.0)}
    if kind == "SmoothL1Loss":
        found["beta"] = loss.take("beta", 1.0)
    if kind == "IoULoss":
        loss.expect("mode", "log")
        loss.expect("linear", False)
    loss.expect("reduction", "mean")
    loss.done()
    return found


def test_rules(settings: Settings) -> DetectionRules:
    """Take the rules of a one-stage detector, or of the second stage."""
    rules: dict[str, Any] = {
        "score_threshold": settings.take("score_thr", 0.0),
        "nms_threshold": nms_threshold(settings),
        "max_per_image": settings.take("max_per_img"),
    }
    if "nms_pre" in settings.left:
        rules["candidates"] = settings.take("nms_pre")
    settings.expect("min_bbox_size", 0, -1)
    settings.expect("mask_thr_binary", 0.5)
    settings.done()
    return DetectionRules(**rules)


test_rules.__test__ = False  # type: ignore[attr-defined]


def nms_threshold(settings: Settings) -> float:
    """Take the NMS and return its IoU."""
    nms = settings.inner("nms")
    nms.expect("type", "nms")
    found: float = nms.take("iou_threshold")
    nms.done()
    return found


def pairs(values: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return the numbers between ranges that follow each other, such as 64 between (-1, 64) and (64, 128)."""
    if any(one[1] != other[0] for one, other in itertools.pairwise(values)):
        raise ValueError(f"the ranges {values} do not follow each other")
    if values[0][0] > 0 or values[-1][1] < 1e4:
        raise ValueError(f"the ranges {values} do not hold every distance")
    return tuple(high for _, high in values[:-1])
