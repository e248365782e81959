"""Receptive fields in convolutional networks.

Importing the package registers its models in timm. Everything else is loaded at first use. The package root holds the
verbs and the conversions; layers live in :mod:`widefield.nn`, operators in :mod:`widefield.ops`, analyses in
:mod:`widefield.analysis`, data sets in :mod:`widefield.data`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if "widefield_cli" not in sys.modules:  # the command line imports them when it needs them: that takes seconds
    import widefield.models  # noqa: F401  registers the models in timm

if TYPE_CHECKING:
    from widefield.deploy.export import export
    from widefield.deploy.quantize import quantize
    from widefield.fitting import fit
    from widefield.loading.sharing import load, push_to_hub, save
    from widefield.predictions.predict import predict
    from widefield.surgery.compare import compare
    from widefield.surgery.conversions import (
        Deformable,
        FastDepthwise,
        GMConv,
        InceptionSplit,
        LargeKernel,
        MoRF,
        TokenMixer,
    )
    from widefield.surgery.convert import convert, plan
    from widefield.surgery.elastic import Elastic, Resize
    from widefield.surgery.reparameterize import reparameterize
    from widefield.surgery.specialize import specialize
    from widefield.surgery.trim import trim

__version__ = "0.1.0"

__all__ = [
    "Deformable",
    "Elastic",
    "FastDepthwise",
    "GMConv",
    "InceptionSplit",
    "LargeKernel",
    "MoRF",
    "Resize",
    "TokenMixer",
    "compare",
    "convert",
    "export",
    "fit",
    "load",
    "plan",
    "predict",
    "push_to_hub",
    "quantize",
    "reparameterize",
    "save",
    "specialize",
    "trim",
]

_ROOMS = (
    "nn",
    "ops",
    "surgery",
    "models",
    "data",
    "dense",
    "deploy",
    "tasks",
    "analysis",
    "train",
    "loading",
    "predictions",
    "runs",
    "fitting",
    "bench",
    "report",
)

_ELSEWHERE = {
    "export": "deploy",
    "quantize": "deploy",
    "fit": "fitting",
    "load": "loading.sharing",
    "predict": "predictions",
    "push_to_hub": "loading",
    "save": "loading",
}
"""Name -> room, for names that are not of surgery."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS or (not name.startswith("_") and importlib.util.find_spec(f"widefield.{name}") is not None):
        return importlib.import_module(f"widefield.{name}")
    if name in __all__:
        room = _ELSEWHERE.get(name, "surgery")
        return getattr(importlib.import_module(f"widefield.{room}"), name)
    raise AttributeError(f"module 'widefield' has no attribute {name!r}.{_mend(name)}")


def _mend(name: str) -> str:
    """Return where a public name lives, or the nearest name of the package."""
    from widefield._checks import did_you_mean

    if name.startswith("_"):  # asked for by tools, not by people
        return ""
    for room in _ROOMS:
        if name in getattr(importlib.import_module(f"widefield.{room}"), "__all__", ()):
            return f" Use widefield.{room}.{name}."
    return did_you_mean(name, __dir__())


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])
