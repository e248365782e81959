"""What learns, and how fast: frozen parameters, timm's optimisers and schedules, groups with a rate of their own.

timm drops arguments that an optimizer or a schedule does not read; here they are refused.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from widefield import _checks
from widefield.train.recipe import OptimizerSpec, ScheduleSpec

_DROPPED = {"betas": "has_betas", "eps": "has_eps", "momentum": "has_momentum"}
"""Arguments that timm drops for optimizers without them -> what timm's description of an optimizer says of that."""
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
"""Schedule -> the arguments that timm's ``create_scheduler_v2`` reads for it."""


def matching(key: str, where: str | Sequence[str], names: Iterable[str]) -> set[str]:
    """Return the names that a glob, or any of several, matches.

    Raises ValueError for a glob that matches nothing, naming the key that it stands under.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in [where] if isinstance(where, str) else where:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ValueError(
                f"{key}: {pattern!r} matches no parameter.{_checks.did_you_mean(pattern, names)} "
                f"There are, for example, {', '.join(names[:: max(1, len(names) // 5)][:5])}."
            )
        found.update(matched)
    return found


def freeze(model: nn.Module, where: str | Sequence[str]) -> list[nn.Module]:
    """Have parameters stay as they are, and return the norms that stay with them.

    A norm with running statistics belongs to them if all of its own parameters do: it is to be kept in evaluation mode.

    Raises ValueError for a glob that matches nothing, and where nothing would be left to learn.
    """
    parameters = dict(model.named_parameters())
    frozen = matching("freeze", where, parameters)
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


def create_optimizer(model: nn.Module, spec: OptimizerSpec, lr: float) -> torch.optim.Optimizer:
    """Build timm's optimiser for what learns in a model, with peak learning rate ``lr``.

    Parameters that a group of ``spec.groups`` matches get groups of their own: of several, the first counts. Their
    ``lr_scale`` multiplies that of layer-wise decay.

    Raises ValueError or TypeError for names and arguments that timm does not know, for an argument that the optimizer
    does not read, and for a glob without a match.
    """
    betas = {} if spec.betas is None else {"betas": spec.betas}
    for key, has in _DROPPED.items():
        where = "optimizer.betas" if key in betas else f"optimizer.args.{key}"
        if key in {**betas, **spec.args} and not getattr(get_optimizer_info(spec.name.lower().split("_")[-1]), has):
            raise ValueError(f"{where}: the optimizer {spec.name!r} has no {key}; leave it out.")
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model, opt=spec.name, lr=lr, weight_decay=spec.weight_decay, **betas, **spec.args
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"optimizer: {spec.name!r} refuses its args {spec.args}: {error}.") from error
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    home: dict[int, int] = {}
    for number, group in enumerate(spec.groups):
        for name in matching(f"optimizer.groups[{number}].where", group.where, parameters):
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
        # What schedules start from: they multiply by the scale themselves.
        own["initial_lr"] = lr
    return optimizer


def create_schedule(
    optimizer: torch.optim.Optimizer, spec: ScheduleSpec, epochs: int, steps_per_epoch: int
) -> tuple[Any, int]:
    """Build timm's schedule, stepped at every update, or None for "none"; return it and the epochs that it makes.

    Raises ValueError for an argument that the schedule does not read, and TypeError or ValueError for a wrong value.
    """
    _check_read(spec)
    # Not to be prepared: accelerate would step it once per process, and timm's counts updates itself.
    try:
        schedule: tuple[Any, int] = create_scheduler_v2(
            optimizer,
            sched=spec.name,
            num_epochs=epochs,
            warmup_epochs=spec.warmup_epochs,
            warmup_lr=spec.warmup_lr,
            min_lr=spec.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
            **spec.args,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"schedule: {spec.name!r} refuses its args {spec.args}: {error}.") from error
    return schedule


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
    if spec.warmup_epochs and spec.name == "none":
        raise ValueError("schedule.warmup_epochs: the schedule 'none' has no warm-up; leave it out.")
