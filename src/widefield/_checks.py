"""Check arguments: one function per kind of argument, with its error messages.

Each function returns the value in canonical form, or raises an error that shows the value and what to write instead.
Public functions and constructors call them first, before anything is built or changed.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

Pair = tuple[int, int]
"""(rows, columns)."""

Expert = tuple[int, int]
"""(kernel size, dilation) of one expert."""

INIT = ("preserve", "random")
"""How a layer made from a convolution starts: with the function of the convolution, or afresh."""
SPARSE_GROWTH = ("random", "gradient")
"""Where the weights of a sparse network grow."""
SPARSE_INIT = ("snip", "snip_density", "erk", "uniform")
"""How the first weights of a sparse network are chosen."""


def did_you_mean(word: object, known: Iterable[str], *, likeness: float = 0.5) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known word, or an empty string when none is near.

    ``likeness`` is the least similarity, up to 1. Raise it if there are many words, as one of them is always similar.
    """
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=likeness)
    return f" Did you mean {near[0]!r}?" if near else ""


_SYNONYMS = (
    {"batch_size", "batch"},
    {"model", "net", "network", "module"},
    {"config", "conversion", "to"},
    {"where", "layers", "names", "include", "modules", "filter"},
    {"images", "loader", "data", "dataloader", "data_loader", "batches", "dataset", "calibration"},
    {"images", "x", "input", "inputs", "example_input", "batch"},
    {"example_input", "example_inputs", "example", "input_size", "input_shape", "image_size", "img_size", "size", "x",
     "input", "inputs", "sample", "dummy_input"},
    {"tolerance", "tol", "atol", "rtol", "eps", "epsilon", "threshold"},
    {"inplace", "in_place"},
    {"report", "callback", "verbose"},
    {"kernel_sizes", "kernel_size", "kernels", "sizes"},
    {"limit", "max_size", "max_kernel_size"},
    {"position", "target", "unit", "pixel"},
    {"layer", "target_layer", "layer_name", "node"},
    {"path", "file", "filename", "output", "f"},
    {"progress", "verbose", "show_progress"},
    {"normalization", "normalize", "mean_std", "preprocessing"},
    {"classes", "class_names", "labels"},
    {"targets", "target", "class_index", "class_idx", "category"},
)  # fmt: skip
"""Argument names that people use for the same thing, ours among them; earlier groups win."""


def known_arguments(function: str, given: Iterable[str], parameters: Sequence[str]) -> None:
    """Raise TypeError for a keyword that is none of the parameters; the message names the one that was meant."""
    for name in given:
        if name not in parameters:
            same = [parameter for group in _SYNONYMS for parameter in parameters if {name, parameter} <= group]
            hint = f" Did you mean {same[0]!r}?" if same else did_you_mean(name, parameters)
            raise TypeError(f"{function}() has no argument {name!r}.{hint} It takes {', '.join(parameters)}.")


def guided(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that a wrong keyword raises a TypeError that names the right one."""
    return guided_with()(function)


def guided_with(*passed_on: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return :func:`guided` for a function with ``**keywords``, which are these."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = inspect.signature(function).parameters.values()
        parameters = (*(one.name for one in known if one.kind is not one.VAR_KEYWORD), *passed_on)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            known_arguments(function.__name__, kwargs, parameters)
            return function(*args, **kwargs)

        return call

    return decorate


def choice(name: str, value: object, options: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``options``; raise ValueError with the options and the nearest one."""
    if isinstance(value, str) and value in options:
        return value
    listed = ", ".join(repr(o) for o in options)
    raise ValueError(f"{name} must be one of {listed}; got {value!r}.{did_you_mean(value, options)}")


def boolean(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False; raises TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}.")
    return value


def integer(name: str, value: object, *, minimum: int = 1, maximum: int | None = None) -> int:
    """Return ``value`` as an int within [minimum, maximum]; raises TypeError or ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer; got {value!r} of type {type(value).__name__}.")
    number = value.__index__()
    if number < minimum or (maximum is not None and number > maximum):
        span = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"{name} must be {span}; got {number}.")
    return int(number)


def number(name: str, value: Any, *, minimum: float = 0.0, maximum: float = float("inf")) -> float:
    """Return ``value`` as a float within [minimum, maximum]; raises TypeError or ValueError (also for NaN)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {value!r} of type {type(value).__name__}.")
    if not minimum <= value <= maximum:
        raise ValueError(f"{name} must be from {minimum} to {maximum}; got {value!r}.")
    return float(value)


def square(name: str, value: object) -> int:
    """Return one int for an int or a pair of equal ints (a stride or kernel given per axis); raises ValueError."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) == 2 and value[0] == value[1]:
            return integer(name, value[0])
        raise ValueError(f"{name} must be one integer or two equal ones; got {tuple(value)!r}.")
    return integer(name, value)


def pair(name: str, value: object, *, minimum: int = 1) -> tuple[int, int]:
    """Return (rows, columns) for an integer, or a sequence of one or two of them; raises TypeError or ValueError."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) not in (1, 2):
            raise ValueError(f"{name} must be one integer or two (rows, columns); got {tuple(value)!r}.")
        return integer(name, value[0], minimum=minimum), integer(name, value[-1], minimum=minimum)
    side = integer(name, value, minimum=minimum)
    return side, side


def odd_pair(name: str, value: object) -> Pair:
    """Return (rows, columns), both odd, for one number or two; raise TypeError or ValueError."""
    rows, columns = pair(name, value)
    for side in (rows, columns):
        if side % 2 == 0:
            raise ValueError(f"{name} must be odd, so that it is centered on a pixel; got {side}.")
    return rows, columns


def odd(name: str, value: object) -> int:
    """Return one odd number, for an int or a pair of equal ints; raise TypeError or ValueError."""
    return odd_pair(name, square(name, value))[0]


def experts(kernel_sizes: object) -> tuple[Expert, ...]:
    """Return ``kernel_sizes`` as (size, dilation) pairs.

    Accepts one entry per expert: an odd size, or a pair (odd size, dilation). Sizes may repeat.
    Raises ValueError for an empty list, an even or non-positive size, a dilation below 1.
    """
    if isinstance(kernel_sizes, (str, bytes)) or not isinstance(kernel_sizes, Iterable):
        raise TypeError(
            f"kernel_sizes must be a sequence with one entry per expert, such as (3, 5, 7); got {kernel_sizes!r}."
        )
    entries = list(kernel_sizes)
    if not entries:
        raise ValueError("kernel_sizes is empty: give at least one expert, such as (3, 5, 7).")
    return tuple(_expert(entry) for entry in entries)


def _expert(entry: object) -> Expert:
    if isinstance(entry, Sequence) and not isinstance(entry, str):
        if len(entry) != 2:
            raise ValueError(
                f"an expert is a kernel size or a pair (kernel size, dilation); got {tuple(entry)!r} in kernel_sizes."
            )
        size, dilation = entry
    else:
        size, dilation = entry, 1
    size = integer("every entry of kernel_sizes", size)
    if size % 2 == 0:
        raise ValueError(
            f"kernel sizes must be odd, so that every expert is centered on the same pixel; got {size}. "
            f"Use {size - 1} or {size + 1}."
        )
    return size, integer("the dilation of an expert", dilation)


def conv_channels(in_channels: object, out_channels: object, groups: object) -> tuple[int, int, int]:
    """Check channel counts against groups as ``torch.nn.Conv2d`` does; raises ValueError naming both numbers."""
    c_in, c_out = integer("in_channels", in_channels), integer("out_channels", out_channels)
    g = integer("groups", groups)
    for name, channels in (("in_channels", c_in), ("out_channels", c_out)):
        if channels % g:
            raise ValueError(f"{name} must be divisible by groups; got {name}={channels} and groups={g}.")
    return c_in, c_out, g


def depthwise_channels(in_channels: object, out_channels: object, groups: object = None) -> int:
    """Return the channels of a depthwise layer, for which all three numbers are equal; raises ValueError.

    ``groups`` may be None, which stands for the channels.
    """
    c_in, c_out = integer("in_channels", in_channels), integer("out_channels", out_channels)
    if c_in != c_out or (groups is not None and groups != c_in):
        raise ValueError(
            f"a depthwise layer has in_channels == out_channels == groups; got in_channels={c_in}, "
            f"out_channels={c_out} and groups={groups}. Use torch.nn.Conv2d for others."
        )
    return c_in


def init(value: object) -> str:
    """Return ``value`` if it is one of :data:`INIT`; raises ValueError."""
    return choice("init", value, INIT)


def images(shape: Sequence[int], channels: int) -> None:
    """Check the shape of a layer's input against (N, C, H, W); raises ValueError naming both."""
    if len(shape) != 4 or shape[1] != channels:
        hint = " Add the batch dimension with x[None]." if len(shape) == 3 and shape[0] == channels else ""
        raise ValueError(f"the input must be (N, {channels}, H, W); got shape {tuple(shape)}.{hint}")
