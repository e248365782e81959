"""Build optimizers, schedules and parameter groups with their own rates on top of timm, and freeze parameters.

timm ignores arguments that an optimizer or a schedule does not use; here they are errors.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from widefield import _checks
from widefield.surgery import Anatomy, anatomy
from widefield.surgery.anatomy import is_inside
from widefield.train.layer_decay import layer_groups
from widefield.train.recipe import OptimizerSpec, ScheduleSpec


def _in_stem(parts: Anatomy, name: str) -> bool:
    """Return whether a parameter comes before the first stage, such as that of the norm after a stem's convolution."""
    if parts.part(name) == "stem":
        return True
    if parts.stage_of(name) != 0 or parts.ends_in_norm(0):
        return False
    return not is_inside(name, parts.stages[0].name)


PARTS: dict[str, Callable[[Anatomy, str], bool]] = {
    "backbone": lambda parts, name: parts.in_backbone(name),
    "stem": _in_stem,
    "neck": lambda parts, name: parts.part(name) == "neck",
    "head": lambda parts, name: parts.part(name) == "head",
}
"""Parts of a model that recipes name next to globs -> whether a parameter belongs to it."""
_DROPPED = {"betas": "has_betas", "eps": "has_eps", "momentum": "has_momentum"}
"""Arguments that timm drops for optimizers without them -> the flag in timm's description of an optimizer."""
_NOISE = ("noise", "noise_pct", "noise_std", "noise_seed")
_CYCLES = ("cycle_mul", "cycle_decay", "cycle_limit", "cooldown_epochs")
_READ = {
    "cosine": ("k_decay", *_CYCLES, "warmup_prefix", *_NOISE),
    "tanh": (*_CYCLES, "warmup_prefix", *_NOISE),
    "poly": ("decay_rate", "k_decay", *_CYCLES, "warmup_prefix", *_NOISE),
    "step": ("decay_epochs", "decay_rate", "warmup_prefix", *_NOISE),
    "multistep": ("decay_milestones", "decay_rate", "warmup_prefix", *_NOISE),
    "none": (),
}
"""Schedule -> the arguments that ``create_scheduler_v2`` reads for it."""


_DEFAULTS = {"poly": {"decay_rate": 1.0}}
"""Schedule -> defaults other than those of ``create_scheduler_v2``. There, the power of poly is 0.1."""
_LENGTHS: dict[str, Any] = {"decay_epochs": 90, "decay_milestones": [90, 180, 270], "cooldown_epochs": 0}
"""Arguments of ``create_scheduler_v2`` that count epochs -> their defaults there."""
_RISE = 0.02
"""Share of the steps in which the rates of a continued schedule rise."""


def _steps(key: str, length: Any, unit: int) -> Any:
    """Return a value of an argument in ``_LENGTHS``, given in units, in steps.

    timm's multistep schedule decays one step before a milestone, on purpose. The published ones, and PyTorch's, decay
    at the milestone, and so do ours.
    """
    if key == "decay_milestones":
        return [part * unit + 1 for part in length]
    return length * unit


def matching(key: str, where: str | Sequence[str], model: nn.Module) -> set[str]:
    """Return the names of the parameters that learn and that ``where`` selects.

    Args:
        key: the recipe's key, for messages.
        where: a glob over names, one of ``PARTS``, or several of both.
        model: whose parameters.

    Raises:
        ValueError: a glob or a part selects nothing.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found: set[str] = set()
    for pattern in [where] if isinstance(where, str) else where:
        if pattern in PARTS:
            parts = anatomy(model)
            selected = [name for name in names if PARTS[pattern](parts, name)]
            if not selected:
                raise ValueError(f"{key}: {type(model).__name__} has no {pattern} with parameters that learn.")
        else:
            selected = fnmatch.filter(names, pattern)
            if not selected:
                raise ValueError(
                    f"{key}: {pattern!r} matches no parameter.{_checks.did_you_mean(pattern, [*PARTS, *names])} "
                    f"There are, for example, {', '.join(names[:: max(1, len(names) // 5)][:5])}; "
                    f"{', '.join(PARTS)} select parts of the model."
                )
        found.update(selected)
    return found


def freeze(model: nn.Module, where: str | Sequence[str]) -> list[nn.Module]:
    """Freeze parameters, and return the norms that are frozen with them.

    A norm with running statistics is frozen if all of its own parameters are: keep it in evaluation mode.

    Args:
        model: changed in place.
        where: see :func:`matching`.

    Raises:
        ValueError: a glob or a part selects nothing, or nothing would be left to learn.
    """
    parameters = dict(model.named_parameters())
    frozen = matching("freeze", where, model)
    if len(frozen) == len(parameters):
        raise ValueError(f"freeze: {where!r} matches every parameter; nothing is left to learn.")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return [
        module
        for module in model.modules()
        if isinstance(module, _NormBase)
        and any(True for _ in module.parameters())
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]


@contextmanager
def _layers_by_depth(model: nn.Module) -> Iterator[None]:
    """Give a model without timm's ``group_matcher`` one for a block, so that layer-wise decay follows its backbone.

    The layers are those of the backbone's own matcher, or else its stem and its stages. Necks and heads outside of the
    backbone come last. If no stages are known, timm groups parameters by their order.
    """
    ordinal = None if hasattr(model, "group_matcher") else _depths(model)
    if ordinal is None:
        yield
        return
    vars(model)["group_matcher"] = lambda coarse: ordinal
    try:
        yield
    finally:
        del vars(model)["group_matcher"]


def _depths(model: nn.Module) -> Callable[[str], float] | None:
    """Return what maps a parameter's name to the depth of its layer, or None if the stages are unknown."""
    parts = anatomy(model)
    backbone: Any = model.get_submodule(parts.backbone)
    if hasattr(backbone, "group_matcher"):
        layers = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
        prefix = f"{parts.backbone}."
        return lambda name: float(layers.get(name.removeprefix(prefix), "inf") if name.startswith(prefix) else "inf")
    if not parts.stages:
        return None

    def depth(name: str) -> float:
        if not parts.in_backbone(name):
            return float("inf")
        stage = parts.stage_of(name)
        return 0.0 if stage is None or _in_stem(parts, name) else stage + 1.0

    return depth


def create_optimizer(model: nn.Module, spec: OptimizerSpec, lr: float) -> torch.optim.Optimizer:
    """Build timm's optimizer for the trainable parameters.

    Parameters that an entry of ``spec.groups`` selects get separate groups; the first matching entry applies. Its
    ``lr_scale`` multiplies that of layer-wise decay, which follows the backbone's layers if the model has one inside.

    Args:
        model: its frozen parameters are left out.
        spec: the recipe's section.
        lr: peak learning rate.

    Raises:
        ValueError, TypeError: a name or an argument that timm does not know, an argument that the optimizer does not
            read, or a glob without a match.
    """
    betas = {} if spec.betas is None else {"betas": spec.betas}
    for key, has in _DROPPED.items():
        where = "optimizer.betas" if key in betas else f"optimizer.args.{key}"
        if key in {**betas, **spec.args} and not getattr(get_optimizer_info(spec.name.lower().split("_")[-1]), has):
            raise ValueError(f"{where}: the optimizer {spec.name!r} has no {key}; leave it out.")
    options: dict[str, Any] = {**betas, **spec.args}
    if spec.layer_decay is not None:
        groups = layer_groups(model, spec.layer_decay, spec.weight_decay)
        options["param_group_fn"] = lambda model: groups
    try:
        with _layers_by_depth(model):
            optimizer: torch.optim.Optimizer = create_optimizer_v2(
                model, opt=spec.name, lr=lr, weight_decay=spec.weight_decay, **options
            )
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"optimizer: {spec.name!r} refuses its args {spec.args}: {error}.") from error
    parameters = dict(model.named_parameters())
    home: dict[int, int] = {}
    for number, group in enumerate(spec.groups):
        for name in matching(f"optimizer.groups[{number}].where", group.where, model):
            home.setdefault(id(parameters[name]), number)
    split: list[dict[str, Any]] = []
    for given in optimizer.param_groups:
        homes = [home.get(id(parameter)) for parameter in given["params"]]
        for there in dict.fromkeys(homes):  # in the order in which they come
            own = {**given, "params": [p for p, place in zip(given["params"], homes, strict=True) if place == there]}
            if there is not None:
                group = spec.groups[there]
                own["lr_scale"] = own.get("lr_scale", 1.0) * group.lr_scale
                if group.weight_decay is not None:
                    own["weight_decay"] = group.weight_decay
            split.append(own)
    optimizer.param_groups[:] = split  # in place: wrappers such as Lookahead share the list
    for own in split:
        own["lr"] = lr * own.get("lr_scale", 1.0)
        # Schedules start from this, and multiply by the scale themselves.
        own["initial_lr"] = lr
    return optimizer


class Schedule(Protocol):
    """A schedule of the learning rate, as timm's."""

    def step_update(self, num_updates: int) -> None:
        """Set the rate for the step after ``num_updates`` steps."""

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""


def create_schedule(
    optimizer: torch.optim.Optimizer, spec: ScheduleSpec, length: int, unit: int, decay: OptimizerSpec | None = None
) -> tuple[Schedule | None, int]:
    """Build timm's schedule, stepped at every update, or None for "none"; return it and the number of the run's steps.

    Args:
        optimizer: its groups get their rates.
        spec: the recipe's section. Lengths in its ``args`` count in units.
        length: of the run in units: epochs, or steps.
        unit: steps of a unit: those of an epoch, or 1.
        decay: the optimizer's section, if its weight decay may have a schedule, too.

    Raises:
        ValueError, TypeError: an argument that the schedule does not read, or a wrong value.
    """
    _check_read(spec)
    given = {**_DEFAULTS.get(spec.name, {}), **spec.args}
    warmup = spec.warmup_epochs * unit if spec.warmup_steps is None else spec.warmup_steps
    elsewhere = (spec.before + spec.after) * unit
    # Do not prepare it: accelerate would step it once per process, and timm's schedules count updates themselves.
    try:
        schedule, whole = create_scheduler_v2(
            optimizer,
            sched=spec.name,
            num_epochs=length * unit + elsewhere,
            warmup_epochs=0 if spec.warmup_ratio is not None else warmup,
            warmup_lr=spec.warmup_lr,
            min_lr=spec.min_lr,
            step_on_epochs=False,
            updates_per_epoch=1,
            **{**given, **{key: _steps(key, given.get(key, usual), unit) for key, usual in _LENGTHS.items()}},
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"schedule: {spec.name!r} refuses its args {spec.args}: {error}.") from error
    whole = int(whole) // unit * unit
    if spec.warmup_ratio is not None:
        schedule = ScaledWarmup(schedule, optimizer, warmup, spec.warmup_ratio, spec.warmup_shape)
    if decay is not None and decay.weight_decay_end is not None:
        schedule = WeightDecayCosine(schedule, optimizer, decay, whole)
    steps = length * unit if spec.after else whole - elsewhere  # a cool-down belongs to the last part
    if spec.before and schedule is not None:
        schedule = Continued(schedule, optimizer, spec.before * unit, steps)
    return schedule, steps


class _Around:
    """Base of schedules around another one, or around a constant rate; they have no state of their own."""

    _schedule: Schedule | None

    def _update_inner(self, num_updates: int) -> None:
        """Set the rates of the inner schedule."""
        if self._schedule is not None:
            self._schedule.step_update(num_updates)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner schedule's state."""
        return {} if self._schedule is None else self._schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        if self._schedule is not None:
            self._schedule.load_state_dict(state)


class Continued(_Around):
    """A schedule whose first part another run has done.

    The rates rise linearly over the first 2 % of the steps, because the optimizer's moments start anew.

    Args:
        schedule: the whole one.
        optimizer: its optimizer.
        before: steps that were done.
        steps: of this run.
    """

    def __init__(self, schedule: Schedule, optimizer: torch.optim.Optimizer, before: int, steps: int) -> None:
        self._schedule, self._optimizer, self._before = schedule, optimizer, before
        self._rise = max(1, round(_RISE * steps))
        self.step_update(0)

    def step_update(self, num_updates: int) -> None:
        """Set the rate for the step after ``num_updates`` steps of this run."""
        self._update_inner(self._before + num_updates)
        if num_updates + 1 < self._rise:
            for group in self._optimizer.param_groups:
                group["lr"] *= (num_updates + 1) / self._rise


class ScaledWarmup(_Around):
    """A schedule whose rates rise during its first steps: that of step t of w, from 0, times 1 - (1 - t/w)(1 - ratio).

    This is the linear warm-up of OpenMMLab's mmcv. timm's own rises from a rate of its own to the peak, past the decay
    that the schedule has meanwhile; under poly with power 1, 1500 of 160,000 steps, the two differ by up to 0.9 %.

    Args:
        schedule: timm's, without a warm-up.
        optimizer: its optimizer.
        steps: w, the length of the warm-up.
        ratio: factor of the first step.
        shape: "linear", see above; "constant" keeps the factor of the first step until step w.
    """

    def __init__(
        self, schedule: Schedule, optimizer: torch.optim.Optimizer, steps: int, ratio: float, shape: str = "linear"
    ) -> None:
        self._schedule, self._optimizer, self._steps, self._ratio = schedule, optimizer, steps, ratio
        self._rises = shape == "linear"
        self.step_update(0)

    def step_update(self, num_updates: int) -> None:
        """Set the rate for the step after ``num_updates`` steps."""
        self._update_inner(num_updates)
        if num_updates < self._steps:
            done = num_updates / self._steps if self._rises else 0.0
            factor = 1 - (1 - done) * (1 - self._ratio)
            for group in self._optimizer.param_groups:
                group["lr"] *= factor


class WeightDecayCosine(_Around):
    """A schedule that also moves the weight decay along half a cosine, from the first to the last step.

    Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, section 3.2; SparK's
    pre-training has it. The decay of every group changes by the same factor, so that groups without any stay so.

    Args:
        schedule: of the learning rate; None if it is constant.
        optimizer: its groups have the decay of the start.
        spec: the recipe's section, with ``weight_decay_end``.
        steps: of the run.
    """

    def __init__(
        self, schedule: Schedule | None, optimizer: torch.optim.Optimizer, spec: OptimizerSpec, steps: int
    ) -> None:
        self._schedule, self._optimizer, self._steps = schedule, optimizer, steps
        self._start = [group["weight_decay"] for group in optimizer.param_groups]
        self._ratio = (spec.weight_decay_end or 0.0) / spec.weight_decay

    def step_update(self, num_updates: int) -> None:
        """Set rate and decay for the step after ``num_updates`` steps."""
        self._update_inner(num_updates)
        done = min(num_updates / max(self._steps - 1, 1), 1.0)
        factor = self._ratio + (1 - self._ratio) * (1 + math.cos(math.pi * done)) / 2
        for group, start in zip(self._optimizer.param_groups, self._start, strict=True):
            group["weight_decay"] = start * factor


def _check_read(spec: ScheduleSpec) -> None:
    read = _READ[spec.name]
    for key in spec.args:
        if key not in read:
            listed = f"It reads {', '.join(read)}." if read else "It reads none."
            raise ValueError(
                f"schedule.args.{key}: the schedule {spec.name!r} does not read it; leave it out."
                f"{_checks.did_you_mean(key, read)} {listed}"
            )
        if spec.args[key] is None and key != "noise":
            raise ValueError(f"schedule.args.{key}: null is not a value of it; leave it out.")
    if spec.min_lr and spec.name not in ("cosine", "tanh", "poly"):
        raise ValueError(f"schedule.min_lr: the schedule {spec.name!r} has no lowest rate; leave it out.")
    if spec.name == "none":
        for key in ("warmup_epochs", "warmup_steps"):
            if getattr(spec, key):
                raise ValueError(f"schedule.{key}: the schedule 'none' has no warm-up; leave it out.")
