"""Say how every module of a network is treated when patches are masked, and refuse networks that would leak."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from widefield.dense.backbone import Backboned, FeatureMaps, feature_maps
from widefield.masking.autoencoder import MaskedAutoencoder
from widefield.masking.probe import Leak, leak
from widefield.masking.rules import rule_of
from widefield.masking.visibility import Visibility, treat, treated
from widefield.report import Report

ALONE = "works on each position by itself"


@dataclass(frozen=True)
class Treatment:
    """What happens to one module: its name, its class, and its rule in words."""

    name: str
    module: str
    treatment: str


@dataclass(frozen=True)
class MaskingPlan(Report):
    """How the modules of a network are treated when patches are masked.

    Attributes:
        treatments: of modules with a rule, and of other modules without parts.
        leak: the first module by which visible positions depend on masked ones; None: nothing leaks.
        patch: side of the patches with which this was tried, in pixels.
    """

    treatments: tuple[Treatment, ...]
    leak: Leak | None
    patch: int

    def summary(self) -> str:
        """Return how many modules have which rule, and whether anything leaks."""
        counts = Counter(one.treatment for one in self.treatments)
        lines = [f"{count} x {treatment}" for treatment, count in counts.most_common()]
        verdict = "nothing visible depends on masked patches" if self.leak is None else refusal(self.leak)
        return "\n".join([*lines, verdict])

    def rows(self) -> list[dict[str, str]]:
        """Return one row a module."""
        return [{"module": one.name, "class": one.module, "treatment": one.treatment} for one in self.treatments]

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types."""
        return {"patch": self.patch, "leak": None if self.leak is None else self.leak.name, "modules": self.rows()}


def plan(backbone: Backboned | FeatureMaps, patch: int | None = None, **backbone_args: Any) -> MaskingPlan:
    """Return how the modules of a network are treated when patches are masked, and whether anything leaks.

    The network runs on two small images, as a copy in float64, see :func:`widefield.masking.leak`. It is not changed.

    Args:
        backbone: a timm name or a module, see :func:`widefield.dense.feature_maps`.
        patch: side of a patch in pixels; None: the stride of the last map, the smallest that is possible.
        backbone_args: further arguments of ``timm.create_model``.
    """
    maps = feature_maps(backbone, levels=1, stage_norms="none", **backbone_args)
    rows = [
        Treatment(name.removeprefix("body."), type(module).__name__, ALONE if rule is None else rule.treatment)
        for name, module, rule in treated(maps, rule_of)
        if rule is not None or not list(module.children())
    ]
    side = maps.strides[-1] if patch is None else patch
    return MaskingPlan(tuple(rows), leak_of(maps, side), side)


def leak_of(maps: nn.Module, patch: int) -> Leak | None:
    """Return where a network leaks under the rules of :mod:`widefield.masking.rules`, or None."""

    def with_rules(network: nn.Module) -> Visibility:
        visibility = Visibility()
        treat(network, visibility, rule_of)
        return visibility

    return leak(maps, with_rules, patch)


def refusal(found: Leak) -> str:
    """Return why a network cannot be pre-trained on visible patches alone."""
    mode = "training" if found.training else "evaluation"
    return (
        f"in {mode} mode, visible positions depend on masked ones behind {found}. It mixes positions in a way for "
        "which there is no rule, as attention does. Pre-train this network by a method that hides patches in the image "
        "or at a stage instead (a2mim, simmim), or replace the module."
    )


def refuse_leak(model: MaskedAutoencoder) -> None:
    """Raise ValueError if a model that hides patches by rules lets visible positions depend on masked ones."""
    if not model.method.visible:
        return
    found = leak_of(model.encoder, model.method.mask.patch)
    if found is not None:
        raise ValueError(refusal(found))
