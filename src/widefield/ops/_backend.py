"""Choose the backend for a pass of a depthwise convolution: limits of each backend, and the choice of "auto".

On CPUs the choice is a table from measurements (benchmarks/results/depthwise_cpu.md), so the same call always uses the
same backend. On CUDA devices the fastest one depends on the card and on cuDNN: all are timed once per kind of problem,
and the choice is cached (:mod:`widefield.ops._timed`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from widefield import _checks
from widefield._checks import Pair
from widefield.ops import _fft, _limits, _timed
from widefield.ops._limits import Limits
from widefield.ops._onednn import WIDEST, computes_in, is_slow_in_channels_last, leaves_cache, never_returns
from widefield.ops._problem import Problem, idle_taps

_HOMES = {
    "aten": "widefield.ops._aten",
    "onednn": "widefield.ops._onednn",
    "fft": "widefield.ops._fft",
    "direct": "widefield.ops._triton.direct",
    "gemm": "widefield.ops._triton.gemm",
}
BACKENDS = ("auto", *_HOMES)


_SOME, _MUCH = 5_000_000, 20_000_000
"""Multiply-adds from which a faster kernel makes up for the Python overhead of our operators, 0.1 ms. The first applies
if another pass uses them anyway, the second if none does.
"""

_MANY_TAPS = 150
"""Taps from which the cost of moving a map to another layout is negligible next to the multiplications."""


def why_not(backend: str, problem: Problem) -> str | None:
    """Return what keeps ``backend`` from computing ``problem``, or None if nothing does."""
    if backend in ("direct", "gemm"):
        from widefield.ops import _triton

        reason = _triton.unavailable()
        if reason is not None:
            return reason
    reason = module(backend).why_not(problem)
    return None if reason is None else str(reason)


@functools.cache
def module(backend: str) -> ModuleType:
    """Return the module of a backend. Those of Triton are imported at first use."""
    return importlib.import_module(_HOMES[backend])


def check(backend: str, problem: Problem) -> None:
    """Raise ValueError with the reason if ``backend``, requested by name, cannot compute ``problem``."""
    reason = None if backend == "auto" else why_not(backend, problem)
    if reason is not None:
        raise ValueError(
            f"backend={backend!r} cannot compute the {problem.step} of this convolution: {reason}. "
            "backend='auto' takes one that can."
        )


def resolve(backend: str, problem: Problem, run: Callable[[ModuleType], object] | None = None) -> ModuleType:
    """Return the module to compute ``problem`` with. ``run`` computes it with a given module, to be timed."""
    if backend != "auto":
        check(backend, problem)
        return module(backend)
    return module(choose(problem, run)[0])


def choose(problem: Problem, run: Callable[[ModuleType], object] | None = None) -> tuple[str, str]:
    """Return what "auto" uses for ``problem``, and why. Without ``run`` nothing new is timed."""
    if problem.device.type == "cpu":
        if widens("auto", problem):
            name, reason = _on_cpu(problem._replace(dtype=torch.float32), _limits.LIMITS)
            return name, f"this CPU has no {problem.dtype} arithmetic of its own: in 32 bits, {reason}"
        return _on_cpu(problem, _limits.LIMITS)
    if problem.device.type != "cuda":
        return "aten", f"nothing else computes on {problem.device.type}"
    able = [name for name in ("direct", "gemm") if why_not(name, problem) is None]
    if not able:
        return "aten", "nothing else can compute it here"
    candidates = ["aten", *able]
    key = _timed.key_of(problem)
    known = _timed.known(key, problem.device, candidates)
    if known is None and run is not None and _timed.may_measure(problem.device):
        runs = {name: functools.partial(run, module(name)) for name in candidates}
        known = _timed.measure(key, problem.device, runs)
    if known is not None:
        return known
    guess = "gemm" if "gemm" in able and min(problem.kernel) >= WIDEST else "direct"
    return guess if guess in able else able[0], "not timed yet: the rule of thumb is by kernel size"


def widens(backend: str, problem: Problem) -> bool:
    """Return whether a 16-bit problem is computed in 32 bits, because the CPU only emulates its dtype, slowly.

    Never for "aten", which is PyTorch's own convolution as it is.
    """
    sixteen = problem.dtype in (torch.bfloat16, torch.float16)
    return sixteen and backend != "aten" and problem.device.type == "cpu" and not computes_in(problem.dtype)


def is_stock(problems: Sequence[Problem]) -> bool:
    """Return whether "auto" uses PyTorch's own kernels for all of these, so that they need no operator of ours."""
    return all(
        problem.device.type == "cpu" and not widens("auto", problem) and _on_cpu(problem, _limits.LIMITS)[0] == "aten"
        for problem in problems
    )


@functools.lru_cache(4096)
def _on_cpu(problem: Problem, limits: Limits) -> tuple[str, str]:
    """Return what "auto" takes. ``limits`` are those in use, here as a part of the cache's key."""
    if why_not("onednn", problem) is not None:
        return "aten", str(why_not("onednn", problem))
    if why_not("fft", problem) is None and _is_for_spectra(problem):
        return "fft", "kernel and map are large enough for spectra to need far fewer operations"
    return {"forward": _forward, "input_grad": _input_grad, "weight_grad": _weight_grad}[problem.step](problem)


def _is_for_spectra(problem: Problem) -> bool:
    """Compare multiply-adds inside the map with those of the transforms.

    Those of the transforms are slower by a measured factor. It is largest for short lengths, and larger for
    channels_last, which is read one channel at a time.
    """
    if problem.dtype != torch.float32:
        return False
    if problem.step == "weight_grad":
        factor = 17 if problem.channels_last else 15
    elif problem.pixels < 1000:
        factor = 24 if problem.channels_last else 18
    else:
        factor = 20 if problem.channels_last else 14
    kernels_per_map = 1 if problem.per_sample else 1 / max(problem.batch, 1)
    transforms = 1 + kernels_per_map / 2  # in pairs: a map there and back, and its part of a kernel
    return problem.multiply_adds > factor * transforms * _limits.LIMITS.spectra * _fft.work(problem)


def _cut(problem: Problem) -> Pair:
    size = (problem.height, problem.width)
    return idle_taps(size, problem.kernel, problem.stride, problem.padding, problem.dilation)


def _extent(problem: Problem) -> int:
    """Return the columns that the kernel spans without the taps that only meet padding."""
    return problem.dilation[1] * (problem.kernel[1] - 2 * _cut(problem)[1] - 1) + 1


def _forward(problem: Problem) -> tuple[str, str]:
    extent = _extent(problem)
    if problem.per_sample:
        return "onednn", "kernels per sample run as one image, in the layout that suits them"
    if not problem.channels_last:
        if extent > WIDEST:
            return "onednn", f"PyTorch loops over small matrix products for {extent} columns in NCHW"
        if problem.kernel[1] > WIDEST:
            return "onednn", "taps that never meet the map are cut off first"
    elif never_returns(problem.dtype, problem.channels, extent):
        return "onednn", "PyTorch never returns from kernels so wide of so few channels in bfloat16: in 32 bits"
    elif (
        problem.dilation == problem.stride == (1, 1)
        and is_slow_in_channels_last(problem.kernel[0], extent, problem.batch * problem.pixels)
        and problem.all_multiply_adds >= (_SOME if extent >= WIDEST - 1 else 2 * _SOME)  # 11 columns gain the least
    ):
        return "onednn", f"channels_last is slow for {extent} columns, and fast with columns of zeros beside them"
    elif extent > WIDEST and problem.dilation != (1, 1) and problem.stride == (1, 1):
        return "onednn", "a dilated kernel that wide is plain on interleaved maps"
    elif (
        min(problem.kernel) >= 27
        and problem.pixels >= 1000
        and leaves_cache(problem.channels, *problem.kernel, problem.dtype)
    ):
        return "onednn", "so many large kernels leave the cache: channels are computed in groups"
    return "aten", "PyTorch's own kernel is the fast one for this width and layout"


def _input_grad(problem: Problem) -> tuple[str, str]:
    extent = _extent(problem)
    if problem.dilation != (1, 1):
        return "onednn", "PyTorch's input gradient is slow for dilated kernels"
    if problem.per_sample:
        return "onednn", "kernels per sample run as one image, in the layout that suits them"
    least = _MUCH if _forward(problem)[0] == "aten" else _SOME
    much = problem.all_multiply_adds >= least
    many = problem.kernel[0] * extent >= _MANY_TAPS
    large = problem.pixels >= 2000
    narrow = much and problem.pixels < 800 and problem.dtype == torch.float32  # pays for few columns, too
    if not problem.channels_last:
        flips = many and not (extent <= 17 and large) if extent > WIDEST else much and extent >= (9 if narrow else 10)
    elif extent > WIDEST:
        flips = much or (many and problem.pixels >= 196)
    elif extent >= WIDEST - 1:
        flips = much and not large
    elif extent == WIDEST - 2 and problem.kernel[0] >= 7 and problem.pixels >= _limits.LIMITS.pixels:
        flips = False  # padded to 15 columns it does not gain enough
    else:
        flips = narrow and extent >= 5
    if flips:
        return "onednn", "the forward convolution with the flipped kernel is faster for this width"
    return "aten", "PyTorch's own kernel is the fast one for this width, layout and size"


def _weight_grad(problem: Problem) -> tuple[str, str]:
    if problem.channels == 1:  # 2.14, for kernels about twice as tall as the map; groups=1 is not depthwise to it
        return "onednn", "PyTorch's own writes out of bounds for tall kernels of one channel"
    if problem.dtype == torch.bfloat16 and problem.channels_last and problem.width < problem.stride[1]:
        return "onednn", "PyTorch's own reads out of bounds for maps narrower than the stride"  # 2.14
    if _cut(problem) != (0, 0):
        return "onednn", "taps that never meet the map are cut off first"
    halves = all(p <= e // 2 for p, e in zip(problem.padding, problem.extent, strict=True))  # or it loops after all
    if halves and problem.kernel[1] <= 3 and problem.dilation == (1, 1) and problem.kernel[0] <= problem.height:
        return "aten", "PyTorch has fast kernels for up to 3 columns"
    numbers = problem.batch * problem.channels * problem.pixels
    if problem.stride != (1, 1):
        if not _is_worth_splitting(problem, numbers):
            return "aten", "too few products to split the map into one for each step of the stride"
    elif halves and _extent(problem) <= WIDEST:
        each = 3 if not problem.channels_last else 11 if problem.dilation == (1, 1) else 7
        if problem.multiply_adds <= each * problem.pixels:
            return "aten", "so few products of each number cost less than moving it"
    columns, least = (5, 50_000) if problem.channels_last else (7, 12_000)
    if problem.kernel[1] <= columns and numbers < least:
        return "aten", "so few numbers are soon added up"
    return "onednn", "PyTorch loops over small matrix products for this width"


def _is_worth_splitting(problem: Problem, numbers: int) -> bool:
    """Compare the multiplications of a strided weight gradient with the cost of splitting x.

    Splitting costs a call for each of the maps, which have fewer columns the larger the stride, and moves all numbers.
    """
    parts = problem.stride[0] * problem.stride[1] * max(problem.stride) / 2
    call, each = (1_500_000, 2.5) if problem.channels_last else (700_000, 2.0)  # PyTorch's own is the slower in NCHW
    return problem.all_multiply_adds > parts * (call + each * numbers)


def names(backend: object) -> str:
    """Return ``backend`` if it is the name of one; raise ValueError with all names otherwise."""
    return _checks.choice("backend", backend, BACKENDS)
