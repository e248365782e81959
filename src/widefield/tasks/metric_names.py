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
