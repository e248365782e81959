"""Say what the name of a metric tells about it: whether it ranks a task, what is better, how it is shown.

Lists of runs read it without torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType

HEADLINES: Mapping[str, str] = MappingProxyType(
    {
        "classification": "top1",
        "multilabel": "map",
        "segmentation": "miou",
        "detection": "box_ap",
        "pose": "oks_ap",
        "masked_image": "loss",
    }
)
"""Name of a task -> its :attr:`Task.headline`."""

_LOWER = re.compile(r"(loss|(^|_)epe)$")
"""Metrics of which smaller values are better: losses, and the end-point error of key points."""
_SHARE = re.compile(
    r"(^|_)(top\d+$|map$|[co]f1$|(miou|macc|aacc)(_|$)|((box|mask)_ap|oks_a[pr])(\d+|_|$)|(pck(\d+)?|auc)$)"
)
"""Metrics that are fractions."""


def lower_is_better(metric: str) -> bool:
    """Return whether smaller values of a metric are better, which holds for losses and errors in pixels."""
    return _LOWER.search(metric) is not None


def shown(metric: str, value: float | None) -> str:
    """Return a metric's value as text: shares in percent, others with four digits; ``-`` for none."""
    if value is None:
        return "-"
    return percent(value) if is_share(metric) else f"{value:.4g}"


def percent(share: float, digits: int = 2) -> str:
    """Return a share as text, in percent; ``-`` for NaN."""
    return "-" if math.isnan(share) else f"{100 * share:.{digits}f}%"


def finite(value: float) -> float | None:
    """Return a number for JSON, which has neither NaN nor infinity: None for these."""
    return value if math.isfinite(value) else None


def heading(name: str) -> str:
    """Return the name of a figure of COCO as a heading, such as ``AP small`` for ``ap_small``."""
    word, _, rest = name.partition("_")
    return f"{word.upper()} {rest}".strip()


def is_share(metric: str) -> bool:
    """Return whether a metric is a fraction, of images, pixels, objects or key points, which is shown in percent."""
    return _SHARE.search(metric) is not None


_MEANINGS = (
    (r"top(\d+)", "share of the images whose class is among the {} likeliest ones"),
    (r"knn_top1", "share of the images whose class is that of their nearest neighbors by the encoder's features"),
    (r"map", "mean over the classes of the average precision: how well a class's images rank before the others"),
    (r"cf1", "F1 of the mean precision and the mean recall of the classes, at the threshold"),
    (r"of1", "F1 of all decisions together, at the threshold"),
    (r"miou", "mean over the classes of the IoU: pixels in both label and prediction, relative to those in either"),
    (r"macc", "mean over the classes of the share of their pixels that are right"),
    (r"aacc", "share of all pixels that are right"),
    (r"miou_(\w+)", "mean IoU among the {} objects"),
    (r"box_ap", "average precision of boxes, mean over overlaps (IoU) of 0.5 to 0.95 and over the classes"),
    (r"mask_ap", "average precision of masks, likewise"),
    (r"(?:box|mask)_ap(\d\d)", "average precision at an overlap of 0.{}"),
    (r"(?:box|mask)_ap_(\w+)", "average precision of {} objects; small: below 32x32 pixels, large: above 96x96"),
    (r"oks_ap", "average precision of poses, mean over similarities (OKS) of 0.5 to 0.95"),
    (r"oks_ar", "average recall of poses, over the same similarities"),
    (r"oks_a[pr](\d\d)", "average precision (recall) at a similarity of 0.{}"),
    (r"oks_a[pr]_(\w+)", "average precision (recall) of {} people; medium: an area of 32x32 to 96x96 pixels"),
    (r"pck", "share of the key points within 5 % of the longer side of the box"),
    (r"pck(\d\d)", "share of the key points within {} % of it"),
    (r"auc", "mean of such shares over limits from 0 up to 30 pixels"),
    (r"epe", "mean distance of key points from the true ones, in pixels"),
)
"""Pattern of a metric's name, and what the metric is, with the first group of the name in braces."""


def meaning(metric: str) -> str:
    """Return what a metric is, in words; "" for those without them, such as a loss."""
    for pattern, words in _MEANINGS:
        found = re.fullmatch(pattern, metric)
        if found is not None:
            return words.format(*found.groups())
    return ""
