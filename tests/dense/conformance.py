"""Check fixtures of dense prediction: numbers of OpenMMLab's code against this library's.

Usage: ``python tests/dense/conformance.py FILE...``. It prints what differs, and exits with 1 if anything does, also
for a file of an unknown kind. The kinds are in modules of their own. Each has a table ``CHECKS`` from the name of a
kind to a function of the file's content and :class:`dense.rules.Differences`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dense import (
    anchor_head_checks,
    box_checks,
    detection_checks,
    one_stage_checks,
    pose_checks,
    roi_checks,
    segmentation_checks,
    two_stage_checks,
)
from dense.rules import Check, Differences, checked, run_script

CHECKS: Mapping[str, Check] = {
    **segmentation_checks.CHECKS,
    **anchor_head_checks.CHECKS,
    **box_checks.CHECKS,
    **detection_checks.CHECKS,
    **one_stage_checks.CHECKS,
    **pose_checks.CHECKS,
    **roi_checks.CHECKS,
    **two_stage_checks.CHECKS,
}
"""Kind -> check."""


def kind(document: Mapping[str, Any]) -> str | None:
    """Return the kind of a file: the class of the neck or head, or the first word of a model's name; None: unknown."""
    config = document.get("config")
    names = [
        document.get("neck"),
        str(document.get("head", "")).split(" ")[0],
        config.get("type") if isinstance(config, Mapping) else None,
        str(document.get("model", "")).split("_")[0],
        "bbox_heads" if "bbox_coder" in str(document.get("cases")) else None,
        "pose_units" if set(document) & set(pose_checks.UNITS) else None,
        "detection_units" if set(document) & set(box_checks.SECTIONS) else None,
    ]
    return next((name for name in names if name in CHECKS), None)


def check(path: Path) -> Differences:
    """Return what differs between a file and this library."""
    return checked(path, kind, CHECKS)


def main(arguments: Sequence[str]) -> int:
    """Check files and print the results; return the exit status."""
    return run_script(arguments, check, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
