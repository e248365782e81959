"""Remember how a model came about: what it was built from, and the steps that changed it since.

A model carries its history as plain data in attributes, which copies keep. `widefield.loading.sharing` writes it to a
file next to the weights, and `widefield.surgery.replay` repeats the steps on a freshly built model.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

Step = dict[str, Any]
"""A change in JSON types: "do" names it, "at" is its place in the order of all steps of the process."""

_STEPS, _ORIGIN, _ABOUT = "_widefield_steps", "_widefield_origin", "_widefield_about"
ATTRIBUTES = (_STEPS, _ORIGIN, _ABOUT)
_CLOCK = itertools.count()

UNKNOWN = "unknown"
""""do" of a step that cannot be repeated; "why" says why not."""
TIMM = "timm"
"""Kind of an origin: a network of timm's registry."""


def note(model: nn.Module, do: str, **details: Any) -> None:
    """Add a step to the history of a model, in which the names of modules are relative to it.

    Args:
        model: was just changed.
        do: the kind of the step.
        details: what is needed to repeat it, in JSON types.
    """
    before: list[Step] = vars(model).get(_STEPS, [])
    last = before[-1] if before else {}
    if do == last.get("do") == "choose_sizes":  # a search chooses sizes thousands of times; the last ones count
        details = {"sizes": {**last["sizes"], **details["sizes"]}}
        before = before[:-1]
    vars(model)[_STEPS] = [*before, {"at": next(_CLOCK), "do": do, **plain(details)}]


def carry(old: nn.Module, new: nn.Module) -> nn.Module:
    """Return ``new``, which takes the place of ``old`` as the root, with the history of ``old``."""
    if new is not old:
        for name in ATTRIBUTES:
            if name in vars(old):
                vars(new)[name] = copy.deepcopy(vars(old)[name])
    return new


def forget(model: nn.Module) -> None:
    """Remove the steps of a model: they are part of its constructor."""
    vars(model).pop(_STEPS, None)


def steps(model: nn.Module, since: int = -1) -> list[Step]:
    """Return the steps of a model and of the modules inside it, in their order; names are relative to the model.

    Args:
        model: any module.
        since: leave out steps up to this time.
    """
    found = []
    for path, module in model.named_modules():
        for step in vars(module).get(_STEPS, ()):
            if step["at"] > since:
                inside = ".".join(filter(None, (path, step.get("inside", ""))))
                found.append({**step, **({"inside": inside} if inside else {})})
    return sorted(found, key=lambda step: step["at"])


def set_origin(model: nn.Module, kind: str, **details: Any) -> nn.Module:
    """Note what a model was built from, and return it; steps up to now are part of that.

    Args:
        model: was just built.
        kind: how to build it.
        details: the arguments, in JSON types.
    """
    vars(model)[_ORIGIN] = {"at": next(_CLOCK), "kind": kind, **plain(details)}
    return model


def origin(model: nn.Module) -> dict[str, Any] | None:
    """Return what a model was built from; None if it is not known.

    timm's networks know their name and arguments themselves (timm 1.0.31; earlier ones the name only).
    """
    known: dict[str, Any] | None = vars(model).get(_ORIGIN)
    if known is not None:
        return known
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    if config is None or not name:
        return None
    args = dict(getattr(model, "_model_args", {}))
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int) and classes != args.get("num_classes", config.get("num_classes")):
        args["num_classes"] = classes  # reset_classifier
    return {"at": -1, "kind": TIMM, "name": name, "args": plain(args)}


def described(model: nn.Module) -> dict[str, Any] | None:
    """Return origin and steps of a model, in JSON types; None if its origin is not known."""
    start = origin(model)
    if start is None:
        return None
    since = start["at"]
    later = [{key: value for key, value in step.items() if key != "at"} for step in steps(model, since)]
    return {"origin": {key: value for key, value in start.items() if key != "at"}, "steps": later}


def restore(model: nn.Module, history: Mapping[str, Any]) -> nn.Module:
    """Attach origin and steps, as :func:`described` returned them, to a model that was rebuilt from them; return it."""
    set_origin(model, **history["origin"])
    vars(model)[_STEPS] = [{**step, "at": next(_CLOCK)} for step in plain(history["steps"])]
    return model


_Built = TypeVar("_Built", bound=nn.Module)


def constructed(model: nn.Module, cls: type[nn.Module], args: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Note that a model is made by the constructor of its class with these arguments; called before the constructor."""
    try:
        bound = inspect.signature(cls.__init__).bind(model, *args, **options)
    except TypeError:  # the constructor raises it; copies are made without arguments
        return
    named: dict[str, Any] = {}
    for name, parameter in list(bound.signature.parameters.items())[1:]:
        if name in bound.arguments:
            value = bound.arguments[name]
            named.update(value if parameter.kind is parameter.VAR_KEYWORD else {name: value})
    made(model, cls.__name__, cls.__module__, named)


def made(model: _Built, name: str, module: str, args: Mapping[str, Any]) -> _Built:
    """Note that a function or class makes a model from these arguments, and return the model.

    Modules among the arguments are described by their own history. Without one, or with an argument that JSON cannot
    hold, the origin stays unknown.
    """
    given = {
        key: {"model": described(value)} if isinstance(value, nn.Module) else value
        for key, value in args.items()
        if key != "pretrained"
    }
    lost = next((key for key, value in given.items() if value == {"model": None} or not is_plain(value)), None)
    if lost is not None:
        why = f"the argument {lost} of {name} is a {type(args[lost]).__name__}, which no file can hold"
        set_origin(model, UNKNOWN, why=why)
    else:
        set_origin(model, "made", name=name, module=module, args=given)
    return model


def set_about(model: nn.Module, about: Mapping[str, Any]) -> nn.Module:
    """Attach facts for the file of a model, such as the names of its classes, and return the model."""
    vars(model)[_ABOUT] = dict(about)
    return model


def about(model: nn.Module) -> dict[str, Any]:
    """Return the facts that were attached to a model, or {}."""
    return dict(vars(model).get(_ABOUT, {}))


def is_ours(kind: type) -> bool:
    """Return whether a class belongs to this package, so that a file can name it."""
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def is_plain(value: Any) -> bool:
    """Return whether JSON can hold a value; tuples count, as lists."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) for key in value) and all(map(is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str))


def plain(value: Any) -> Any:
    """Return a value with lists in place of tuples; what JSON cannot hold stays, and is refused when it is written."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value
