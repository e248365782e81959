"""Data sets by name, for recipes and the command line."""

from __future__ import annotations

import inspect
from typing import Any

from widefield import _checks
from widefield.data.digits import Digits
from widefield.data.folder import Folder
from widefield.data.loading import ImageSet
from widefield.data.scales import Scales

SETS: dict[str, type[ImageSet]] = {"digits": Digits, "scales": Scales, "folder": Folder}


def create(name: str, split: str, **options: Any) -> ImageSet:
    """Build the data set ``name``.

    Args:
        name: ``"digits"``, ``"scales"`` or ``"folder"``.
        split: ``"train"`` or ``"val"``.
        options: keyword arguments of `Digits`, `Scales` or `Folder`.

    Raises:
        ValueError: unknown name or split, or an option out of range.
        TypeError: unknown or missing option, or one of the wrong kind.
    """
    make = SETS[_checks.choice("name", name, tuple(SETS))]
    accepted = [p for p in inspect.signature(make).parameters if p != "split"]
    for option in options:
        if option not in accepted:
            raise TypeError(
                f"the data set {name!r} has no option {option!r}; it takes {', '.join(accepted)}."
                f"{_checks.did_you_mean(option, accepted)}"
            )
    if "root" in accepted and "root" not in options:
        raise TypeError(f"the data set {name!r} needs the option root, the folder that holds train and val.")
    return make(split, **options)
