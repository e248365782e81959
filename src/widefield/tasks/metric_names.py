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
    if value is None or (is_share(metric) and math.isnan(value)):
        return "-"
    return f"{100 * value:.2f}%" if is_share(metric) else f"{value:.4g}"


def is_share(metric: str) -> bool:
    """Return whether a metric is a fraction, of images, pixels, objects or key points, which is shown in percent."""
    return _SHARE.search(metric) is not None
