"""Name the metric that ranks the checkpoints of each task; lists of runs read it without torch."""

from __future__ import annotations

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
