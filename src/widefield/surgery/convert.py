"""Replace the convolutions of any model, keeping its weights.

A conversion is a frozen config. It decides which convolutions it can replace, and with what. :func:`plan` shows what
:func:`convert` would do.
"""

from __future__ import annotations

import copy
import fnmatch
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from widefield import _checks, _history
from widefield.nn import SameAligned
from widefield.report import Report
from widefield.surgery.anatomy import Anatomy, anatomy
from widefield.surgery.conversions import Conversion, Place, checked
from widefield.surgery.walk import check_report, duplicate, hooked, merge_method, replace

_SHOWN = 6
"""Number of reasons that an error lists."""

Where = str | Sequence[str] | Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Step:
    """What happens to one convolution: replaced with ``after``, or kept for ``reason``."""

    name: str
    before: str
    after: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Plan(Report):
    """What a conversion does to a model; prints as a table."""

    steps: tuple[Step, ...]

    @property
    def replaced(self) -> tuple[Step, ...]:
        """Return the convolutions that are replaced."""
        return tuple(step for step in self.steps if step.after is not None)

    @property
    def passed_over(self) -> tuple[Step, ...]:
        """Return the convolutions that stay, each with its reason."""
        return tuple(step for step in self.steps if step.after is None)

    def summary(self) -> str:
        """Return how many convolutions are replaced and how many stay."""
        return f"{len(self.replaced)} replaced, {len(self.passed_over)} passed over"

    def rows(self) -> list[dict[str, str]]:
        """Return one row a convolution."""
        return [
            {
                "module": step.name or "(the model itself)",
                "now": step.before,
                "then": step.after or f"stays: {step.reason}",
            }
            for step in self.steps
        ]

    def __str__(self) -> str:
        # rich folds long cells, which Markdown does not. `import widefield` must not load it.
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self.summary(), title_justify="left")
        for column in ("module", "now", "then"):
            table.add_column(column, overflow="fold")
        for row in self.rows():
            table.add_row(*row.values())
        text = io.StringIO()
        # In a notebook rich would display the table, and color it.
        Console(file=text, width=150, force_jupyter=False, color_system=None).print(table)
        return text.getvalue().rstrip()


@_checks.guided
def plan(model: nn.Module, config: Conversion, where: Where | None = None) -> Plan:
    """Return what :func:`convert` would do, without changing the model.

    Args:
        model: any module.
        config: a conversion, such as ``MoRF()``.
        where: the convolutions to replace: a glob over module names ("stages.3.*"), several globs, or a predicate
            ``(module, name) -> bool``. Default: those in the backbone (:func:`anatomy`) without its stem; configs with
            ``takes_stem`` convert the stem, too.
    """
    return Plan(tuple(step for step, _, _ in _steps(model, checked(config, "plan"), where)))


@_checks.guided
def convert(
    model: nn.Module,
    config: Conversion,
    where: Where | None = None,
    *,
    inplace: bool = False,
    report: Callable[[Plan], object] | None = None,
) -> nn.Module:
    """Return the model with its spatial convolutions replaced; weights, device and mode stay the same.

    Args:
        model, config, where: as in :func:`plan`.
        inplace: change ``model`` itself instead of a copy.
        report: called once with the executed :class:`Plan`: ``print``, or the ``append`` of a list.

    Raises:
        TypeError: a report that is not callable.
        ValueError: no convolution to replace; the message lists those that could be, or the reasons.
    """
    config = checked(config, "convert")
    check_report(report)
    if not inplace:
        model = duplicate(model)
    steps = _steps(model, config, where)
    chosen = {module: here.replacement(module) for step, module, here in steps if step.after is not None}
    if not chosen:
        raise ValueError(_nothing_to_convert(model, config, where))
    model = _history.carry(model, replace(model, chosen))
    _note(model, [(step.name, here) for step, _, here in steps if step.after is not None])
    if report is not None:
        report(Plan(tuple(step for step, _, _ in steps)))
    return model


def _note(model: nn.Module, chosen: Sequence[tuple[str, Conversion]]) -> None:
    """Add a conversion to the model's history: for each layer the config of its place, equal ones together."""
    groups: dict[Conversion, list[str]] = {}
    for name, here in chosen:
        groups.setdefault(here, []).append(name)
    foreign = next((kind.__name__ for kind in map(type, groups) if not _history.is_ours(kind)), None)
    if foreign is not None:
        _history.note(model, _history.UNKNOWN, why=f"{foreign} is a conversion of your own, which no file can repeat")
        return
    listed = [
        {"config": type(here).__name__, "args": here.options(), "layers": names} for here, names in groups.items()
    ]
    _history.note(model, "convert", groups=listed)


def _steps(model: nn.Module, config: Conversion, where: Where | None) -> list[tuple[Step, nn.Module, Conversion]]:
    """Return, for each convolution: what happens to it, the convolution, and the config for its place."""
    selects = selector(where)
    mergeable = [name for name, m in model.named_modules() if name and merge_method(m)]
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    parts = anatomy(model)
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, _ConvNd)}
    reasons: dict[str, str | None] = {}
    for name, module in convolutions.items():
        if set(module.kernel_size) == {1}:
            reason: str | None = "its kernel size is 1: not a spatial convolution"
        else:
            passed = _outside(parts, name, config) if where is None else selects(module, name)
            reason = passed or _untouchable(module)
        if reason is None and not config.keeps_parameters:
            reason = _tied(module, name, owners) or _part_of(name, mergeable)
        reasons[name] = reason or config.why_not(module)
    stages = parts.count_stages([name for name, reason in reasons.items() if reason is None])
    steps: list[tuple[Step, nn.Module, Conversion]] = []
    for name, module in convolutions.items():
        reason, here = reasons[name], config
        if reason is None:
            here = config.at(Place(name, name in parts.readers, stages[name], 1 + max(stages.values())))
            reason = here.why_not(module)
        after = _line(here.replacement(_weightless(module))) if reason is None else None
        steps.append((Step(name, _line(module), after, reason), module, here))
    return steps


def _line(module: nn.Module) -> str:
    if isinstance(module, SameAligned):
        return f"SameAligned({_line(module.layer)})"
    return f"{type(module).__name__}({module.extra_repr()})"


def selector(where: Where | None) -> Callable[[nn.Module, str], str | None]:
    """Return a function (module, name) -> why ``where`` does not select it, or None if it does."""
    if where is None:
        return lambda module, name: None
    if isinstance(where, str):
        where = [where]
    if callable(where):
        predicate = where
        return lambda module, name: None if predicate(module, name) else "where does not select it"
    patterns = list(where) if isinstance(where, Sequence) else []
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"where must be a glob, several globs, or a callable (module, name) -> bool; got {where!r}.")
    return lambda module, name: (
        None if any(fnmatch.fnmatchcase(name, p) for p in patterns) else f"{', '.join(patterns)} does not match it"
    )


def _outside(parts: Anatomy, name: str, config: Conversion) -> str | None:
    """Return why a convolution is not converted by default, or None if it is."""
    part = parts.part(name)
    if part == "body" or (part == "stem" and config.takes_stem):
        return None
    if name in parts.readers:
        return "it reads the image itself"
    return f"it is part of the {part} ({parts.root_of(name)}), and the default converts the backbone only"


def _untouchable(module: nn.Module) -> str | None:
    if parametrize.is_parametrized(module):
        return "its weight is parametrized: remove the parametrization first"
    if hooked(module):
        return "it has hooks, which a replacement would lose: remove them first"
    return None


def _part_of(name: str, mergeable: Sequence[str]) -> str | None:
    for block in mergeable:
        if name.startswith(f"{block}."):
            return f"it is part of {block}, which merges its convolutions: reparameterize before converting"
    return None


def _tied(module: nn.Module, name: str, owners: Mapping[int, Sequence[str]]) -> str | None:
    for parameter in module.parameters(recurse=False):
        others = [other for other in owners[id(parameter)] if other != name]
        if others:
            return f"it shares its weight with {', '.join(others)}"
    return None


def _weightless(module: nn.Module) -> nn.Module:
    """Return a copy of a module with its parameters on the meta device."""
    stand_ins = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, stand_ins)  # memo: id -> what to use


def _nothing_to_convert(model: nn.Module, config: Conversion, where: Where | None) -> str:
    steps = [step for step, _, _ in _steps(model, config, lambda module, name: True)]
    possible = [step.name or "(the model itself)" for step in steps if step.after is not None]
    if possible:
        asked = "the default" if where is None else f"where={where!r}"
        return f"{asked} matches no convolution of {type(model).__name__}. These could match: {', '.join(possible)}."
    if not steps:
        return f"{type(model).__name__} has no convolution to convert."
    reasons: dict[str, list[str]] = {}
    for step in steps:
        reasons.setdefault(str(step.reason), []).append(step.name or "(the model itself)")
    found = [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in reasons.items()
    ]
    rest = f"; and {len(found) - _SHOWN} other reasons, which plan() shows" if len(found) > _SHOWN else ""
    return f"no convolution of {type(model).__name__} can be converted by {config}: {'; '.join(found[:_SHOWN])}{rest}."
