"""Register networks in timm: configurations, construction, and weights with the official keys."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import Tensor, nn

_log = logging.getLogger(__name__)


class Stated(NamedTuple):
    """Counts that a paper or its repository states; 224x224 pixels and 1000 classes unless noted."""

    parameters: str
    macs: str
    source: str


def cfg(first_conv: str, classifier: str = "head", **kwargs: Any) -> dict[str, Any]:
    """Return timm's configuration of an ImageNet network; ``kwargs`` take precedence."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        **kwargs,
    }


def build(cls: type[nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """Build a :class:`Backbone` with timm, accepting weights with the official keys (:func:`official_weights`)."""
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=official_weights,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


def official_weights(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Check a state dict against the network that loads it and return it; called by timm.

    Weights of a reparameterized network convert ``model``, in place, to its reparameterized form. timm then adapts the
    first convolution to other image channels, and drops a classifier with another number of classes.

    Raises:
        ValueError: the weights belong to another network; the message names the first keys that differ.
    """
    from widefield.surgery.merged_forms import merge_in_place, merged_forms

    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    free = {f"{config.get(part)}.{name}" for part in ("first_conv", "classifier") for name in ("weight", "bias")}
    classes = state.get(f"{config.get('classifier')}.weight")
    if classes is not None:  # these weights may have other classes than the configuration
        config["num_classes"] = classes.shape[0]
        asked = getattr(model, "num_classes", 0)
        if asked not in (0, classes.shape[0]):
            _log.warning("the weights have %d classes, the network %d: its head starts afresh", len(classes), asked)
    if not _differences(state, model, free):
        return state
    for select, merged in merged_forms(model):
        if not _differences(state, merged, free):
            merge_in_place(model, select)
            return state
    name = config.get("architecture") or type(model).__name__
    raise ValueError(f"these weights do not fit {name}: {'; '.join(_differences(state, model, free))}.")


def _differences(state: dict[str, Tensor], model: nn.Module, free: Iterable[str]) -> list[str]:
    """Return the differences of weights from the network's; ``free`` keys may be missing or have another shape."""
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in state.items()}
    missing = [key for key in ours if key not in theirs and key not in free]
    unknown = [key for key in theirs if key not in ours and key not in free]
    shapes = [
        f"{key} is {theirs[key]} and should be {shape}"
        for key, shape in ours.items()
        if theirs.get(key, shape) != shape and key not in free
    ]
    listed = (("missing: ", missing), ("not known: ", unknown), ("", shapes))
    return [f"{what}{_first(keys)}" for what, keys in listed if keys]


def _first(words: list[str], count: int = 3) -> str:
    more = f" and {len(words) - count} more" if len(words) > count else ""
    return ", ".join(words[:count]) + more
