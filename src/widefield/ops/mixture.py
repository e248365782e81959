"""Convolve with per-sample kernels mixed from a bank of experts (MoRF, Lian, Yu, Wang 2024, eq. 6 and 7).

A mixture of n convolutions is linear in the input, so for sample i it is one convolution::

    y_i = sum_r a_ir (W_r * x_i + b_r) = (sum_r a_ir pad(W_r)) * x_i + sum_r a_ir b_r

The paper merges at inference. Here training uses the merged form too: autograd differentiates the sum with respect to
x, every W_r, every b_r and the routing weights a. Three backends compute the same function:

- ``"branches"``: n convolutions and a weighted sum; the reference. It is faster where per-sample kernels are larger
  than the map.
- ``"merged"``: one convolution per sample; for depthwise experts, that of :mod:`widefield.ops.depthwise`. In training,
  depthwise experts are mixed again in the backward pass, so that a sample's kernel takes no memory until then.
- ``"routed"``: the same, without writing a sample's kernel to memory; depthwise on CUDA devices, for small maps.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield import _checks
from widefield._checks import Expert
from widefield.ops import _routed, _sparse, _timed, fold
from widefield.ops._autocast import autocast_dtype, without_autocast
from widefield.ops._bank import Bank, Experts, Plan, kinds_of
from widefield.ops._problem import has_numbers, is_channels_last, is_eager, size_of
from widefield.ops.depthwise import depthwise_conv2d

BACKENDS = ("auto", "merged", "branches", "routed")

_MANY = 4
"""Experts of one kind, on average, from which kinds are mixed one after the other instead of from one padded bank."""

_SMALL_MAP = 16 * 16
"""Pixels up to which a batch's mixed kernels weigh as much as its maps, so that not writing them can pay."""


def mixture_conv2d(
    x: Tensor,
    kernels: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    weights: Tensor,
    *,
    stride: int = 1,
    groups: int = 1,
    dilations: Sequence[int] | None = None,
    sparse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Compute a weighted sum of n convolutions, with weights per sample: ``sum_r a_r (W_r * x + b_r)``, eq. 6.

    All experts are centered on the same pixel ("same" alignment).

    Args:
        x: (N, C_in, H, W), any memory format.
        kernels: n tensors (C_out, C_in/groups, K_r, K_r), K_r odd.
        biases: n tensors (C_out,), or None.
        weights: routing weights (N, n), unconstrained.
        stride: of every expert; the output has ceil(H/stride) rows and ceil(W/stride) columns.
        groups: of every expert.
        dilations: one per expert; default 1.
        sparse: a weight of exactly 0 means that the expert was not chosen: neither its kernel nor that weight gets a
            gradient from that sample. Branches compute only the chosen experts. Merged kernels are cropped to the
            largest expert that a sample chose, with the samples sorted by it, where that saves more time than it
            takes. Nothing is skipped, and the output is the same, while torch.compile or torch.export traces and on
            meta tensors: there are no values to read.
        backend: "auto", "merged", "branches" or "routed".

    Returns:
        (N, C_out, ceil(H/stride), ceil(W/stride)) in x's memory format.

    Raises:
        ValueError: shapes that do not fit together, an unknown backend, or one that cannot compute this call.
        TypeError: x and kernels of different dtypes, outside autocast.
    """
    plan = planned(x, kernels, biases, weights, stride=stride, groups=groups, dilations=dilations, backend=backend)
    if plan.way == "branches":
        return _branches(x, kernels, biases, weights, plan, sparse)
    if plan.order is not None:
        weights, kernels = weights[:, plan.order], [kernels[r] for r in plan.order]
        biases = None if biases is None else [biases[r] for r in plan.order]
    bias_bank = None if biases is None else torch.stack(list(biases))
    return _merged(x, Experts(kernels, bias_bank, plan), weights, plan, sparse)


def bank_conv2d(
    x: Tensor,
    bank: Tensor,
    bias_bank: Tensor | None,
    weights: Tensor,
    *,
    experts: Sequence[Expert],
    stride: int = 1,
    groups: int = 1,
    sparse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Compute :func:`mixture_conv2d` from experts that are one padded bank already, the inference form of eq. 7.

    Args:
        x: (N, C_in, H, W).
        bank: (n, C_out, C_in/groups, K, K), as returned by :func:`widefield.ops.fold.kernel_bank`.
        bias_bank: (n, C_out) or None.
        weights: (N, n).
        experts: (kernel size, dilation) of each: where in the bank its taps are.
        stride, groups, sparse, backend: as in :func:`mixture_conv2d`, also for what is raised.
    """
    plan = planned(x, bank, bias_bank, weights, stride=stride, groups=groups, experts=experts, backend=backend)
    if plan.way == "branches":
        kernels = [fold.expert(bank, r, k, d, plan.step) for r, (k, d) in enumerate(plan.experts)]
        biases = None if bias_bank is None else bias_bank.unbind()
        return _branches(x, kernels, biases, weights, plan, sparse)
    cropped = fold.crop(bank, plan.taps)
    return _merged(x, Bank(cropped, bias_bank, plan.spans, plan.step, stride, groups), weights, plan, sparse)


_plans: dict[Any, Plan] = {}
"""Plans of shapes that came up before: to check and to decide takes as long as a small convolution."""

_shape = operator.attrgetter("shape")


def planned(
    x: Tensor,
    kernels: Sequence[Tensor] | Tensor,
    biases: Sequence[Tensor] | Tensor | None,
    weights: Tensor,
    *,
    stride: int,
    groups: int,
    backend: str,
    dilations: Sequence[int] | None = None,
    experts: Sequence[Expert] | None = None,
) -> Plan:
    """Return the plan of a call; raises what :func:`mixture_conv2d` promises.

    ``experts``: given where ``kernels`` is a padded bank, the size and dilation of each.
    """
    key = None
    if is_eager(x) and type(stride) is int and type(groups) is int:
        key = (
            x.shape, x.dtype, x.device, torch.is_autocast_enabled(x.device.type), weights.shape, stride, groups,
            backend, None if biases is None else biases.shape if isinstance(biases, Tensor) else len(biases),
            None if dilations is None else tuple(dilations), None if experts is None else tuple(experts),
            (kernels.shape, kernels.dtype) if isinstance(kernels, Tensor) else
            (tuple(map(_shape, kernels)), kernels[0].dtype if kernels else None),
        )  # fmt: skip
        found = _plans.get(key)
        if found is not None:
            return found
    if isinstance(kernels, Tensor):
        shapes = [tuple(size_of(kernels)[1:])] * size_of(kernels)[0]
        kinds = [(_checks.integer("a kernel size", k), _checks.integer("a dilation", d)) for k, d in experts or ()]
    else:
        shapes = [tuple(size_of(kernel)) for kernel in kernels]
        given = (1,) * len(shapes) if dilations is None else dilations
        kinds = [(shape[-1], _checks.integer("a dilation", d)) for shape, d in zip(shapes, given, strict=False)]
        kinds += [(1, 1)] * (len(given) - len(kinds))  # too many, which is refused below
    count = None if biases is None else size_of(biases)[0] if isinstance(biases, Tensor) else len(biases)
    _check(x, shapes, kernels[0].dtype if len(shapes) else None, count, weights, groups, kinds)
    plan = _decided(x, kernels, weights, shapes[0], kinds, stride, groups, backend)
    if key is not None and len(_plans) < 4096:
        _plans[key] = plan
    return plan


def _check(
    x: Tensor,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype | None,
    biases: int | None,
    weights: Tensor,
    groups: int,
    experts: Sequence[Expert],
) -> None:
    """Refuse arguments that do not fit together. ``biases``: how many there are."""
    if x.ndim != 4:
        raise ValueError(f"x must be (N, C, H, W); got shape {tuple(x.shape)}.")
    n = len(shapes)
    if n == 0:
        raise ValueError("kernels is empty: give at least one expert.")
    if size_of(weights) != (size_of(x)[0], n):
        raise ValueError(
            f"weights must be (N, n) = ({x.shape[0]}, {n}), one weight for each sample and expert; "
            f"got shape {tuple(weights.shape)}."
        )
    if biases is not None and biases != n:
        raise ValueError(f"biases must hold one tensor per expert ({n}) or be None; got {biases}.")
    if len(experts) != n:
        raise ValueError(f"dilations must hold one number per expert ({n}); got {len(experts)}.")
    if x.dtype != dtype and autocast_dtype(x) is None:
        raise TypeError(f"x is {x.dtype} and the kernels are {dtype}: convert one to the other, or use torch.autocast.")
    c_in, c_out = size_of(x)[1], shapes[0][0]
    for shape in shapes:
        if len(shape) != 4 or shape[2] != shape[3] or shape[2] % 2 == 0:
            raise ValueError(f"a kernel must be (C_out, C_in/groups, K, K) with K odd; got shape {shape}.")
        if shape[0] != c_out or shape[1] * groups != c_in or c_out % groups:
            raise ValueError(
                f"a kernel of shape {shape} does not fit {c_in} input channels, {c_out} output channels "
                f"and groups={groups}: expected ({c_out}, {c_in // groups}, K, K)."
            )


def _decided(
    x: Tensor,
    kernels: Sequence[Tensor] | Tensor,
    weights: Tensor,
    shape: tuple[int, ...],
    experts: Sequence[Expert],
    stride: int,
    groups: int,
    backend: str,
) -> Plan:
    """Make the plan for arguments that fit together. ``shape``: of a kernel, or of one of a bank."""
    stride, backend = _checks.integer("stride", stride), _checks.choice("backend", backend, BACKENDS)
    is_bank = isinstance(kernels, Tensor)
    step = fold.common_dilation([dilation for _, dilation in experts])
    spans = [fold.effective_size(size, dilation // step) for size, dilation in experts]
    taps = shape[-1] if is_bank else max(spans)
    if backend == "routed":
        against: str | None = "it is depthwise only"
        if shape[:2] == (groups, 1):
            example = kernels if isinstance(kernels, Tensor) else kernels[0]
            against = _routed.why_not(x, example, None, weights, stride, step)
        if against is not None:
            raise ValueError(
                f"backend='routed' cannot compute this mixture: {against}. backend='auto' takes one that can."
            )
    way, reason = backend, "asked for"
    if size_of(x)[0] == 0:
        way, reason = "branches", "the batch is empty"  # convolution takes that, but not zero groups
    elif backend == "auto":
        way, reason = _choose(size_of(x)[2:], shape, len(experts), fold.effective_size(taps, step), stride, groups)
    order: list[int] | None = None
    by_kind = False
    if not is_bank and way != "branches":
        order = sorted(range(len(experts)), key=lambda r: experts[r])
        order = None if order == list(range(len(experts))) else order
        # On a GPU the bank may be mixed inside the convolution instead.
        by_kind = len(experts) >= _MANY * len(set(experts)) and x.device.type != "cuda"
    places = order or range(len(experts))
    small = x.device.type == "cuda" and size_of(x)[2:].numel() <= _SMALL_MAP
    taps = min(taps, _reach(x, step))
    sorted_experts = tuple(experts[r] for r in places)
    return Plan(
        way=way,
        reason=reason,
        timed=small and way == "merged" and backend == "auto",
        by_kind=by_kind,
        experts=sorted_experts,
        order=None if order is None else tuple(order),
        step=step,
        taps=taps,
        spans=tuple(min(spans[r], taps) for r in places),
        stride=stride,
        groups=groups,
        channels=(shape[0], shape[1]),
        kinds=() if is_bank or way == "branches" else kinds_of(sorted_experts, step, taps),
    )


def _choose(
    side: Sequence[int], shape: tuple[int, ...], n: int, size: int, stride: int, groups: int
) -> tuple[str, str]:
    """Return what "auto" takes, and why. ``size``: pixels that the largest expert spans.

    It does not read the batch size, so that a graph with a dynamic batch has one form.

    Merging trades n convolutions for one, and loses the reuse of weights over the batch. Depthwise kernels have next to
    nothing to reuse. For the others merging won while a sample's kernels held, per input channel, at most 4 times as
    many numbers as its output map, and lost from 33 times on (benchmarks/results/mixture_cpu.md); the limit lies
    between.
    """
    if n == 1:
        return "branches", "there is one expert: nothing to merge"
    if shape[:2] == (groups, 1):
        return "merged", "depthwise: one convolution per sample instead of one per expert"
    numbers = shape[0] // groups * size * size
    pixels = -(-side[0] // stride) * -(-side[1] // stride)
    if numbers <= 10 * pixels:
        return "merged", f"a sample's kernels have {numbers} numbers per input channel, its map {pixels} pixels"
    return "branches", f"a sample's kernels would have {numbers} numbers per input channel for {pixels} pixels"


def _reach(x: Tensor, step: int) -> int:
    """Return the taps, ``step`` pixels apart, of the largest kernel of which all taps can meet the map.

    There is no bound where the map's size is a symbol, or a tensor as it is under torch.jit.trace: a graph for many
    sizes keeps the kernel as it is.
    """
    side = max(x.shape[2], x.shape[3]) if all(isinstance(n, int) for n in x.shape[2:]) else sys.maxsize // 4
    return 2 * ((side - 1) // step) + 1


def _branches(
    x: Tensor, kernels: Sequence[Tensor], biases: Sequence[Tensor] | None, weights: Tensor, plan: Plan, sparse: bool
) -> Tensor:
    skip = sparse and has_numbers(weights)
    terms = []
    for r, (kernel, (size, dilation)) in enumerate(zip(kernels, plan.experts, strict=True)):
        bias = None if biases is None else biases[r]
        padding = dilation * (size // 2)
        chosen = weights[:, r].nonzero().squeeze(1) if skip else None
        seen = x if chosen is None else x.index_select(0, chosen)
        if plan.depthwise:
            term = depthwise_conv2d(seen, kernel, bias, stride=plan.stride, padding=padding, dilation=dilation)
        else:
            term = F.conv2d(seen, kernel, bias, plan.stride, padding, dilation, plan.groups)
        a = weights[:, r] if chosen is None else weights[:, r].index_select(0, chosen)
        term = term * a[:, None, None, None].to(term.dtype)
        if chosen is not None:
            term = term.new_zeros(x.shape[0], *term.shape[1:]).index_copy(0, chosen, term)
        terms.append(term)
    return functools.reduce(torch.add, terms)


def _merged(x: Tensor, experts: Bank | Experts, weights: Tensor, plan: Plan, sparse: bool) -> Tensor:
    if sparse:
        weights = _sparse.of_chosen(weights)
        if has_numbers(weights) and not plan.by_kind:  # batches of a graph may have any size
            sorting = _sparse.sort(x, weights, plan)
            if not sorting.is_plain(plan):
                return _sparse.mixed_by_size(x, experts, weights, sorting.buckets)
    if plan.way == "routed" or plan.timed:
        bank = experts if isinstance(experts, Bank) else experts.bank()
        if plan.way == "routed" or _routed_is_faster(x, bank, weights, plan):
            return _mixed_inside(x, bank, weights)
    return experts.mixed(x, weights)


def _routed_is_faster(x: Tensor, bank: Bank, weights: Tensor, plan: Plan) -> bool:
    """Time "merged" and "routed" once for each kind of problem."""
    if not has_numbers(x) or why_not_routed(x, bank.kernels, bank.biases, weights, plan) is not None:
        return False
    key = f"mixture {tuple(x.shape)} {plan.taps} {plan.spans} {x.dtype} {is_channels_last(x)}"
    known = _timed.known(key, x.device, ("merged", "routed"))
    if known is None:
        if not _timed.may_measure(x.device):
            return False
        runs = {"merged": lambda: bank.mixed(x, weights), "routed": lambda: _mixed_inside(x, bank, weights)}
        with torch.no_grad():
            known = _timed.measure(key, x.device, runs)
    return known[0] == "routed"


def why_not_routed(x: Tensor, kernel: Tensor, biases: Tensor | None, weights: Tensor, plan: Plan) -> str | None:
    """Return what speaks against "routed" for this call, or None. ``kernel``: any of the experts, or all of them."""
    if not plan.depthwise:
        return "it is depthwise only"
    reason = _routed.why_not(x, kernel, biases, weights, plan.stride, plan.step)
    if reason is None and not plan.timed:
        reason = f"it pays on CUDA devices and maps of up to {_SMALL_MAP} pixels only"
    return reason


def _mixed_inside(x: Tensor, bank: Bank, weights: Tensor) -> Tensor:
    with without_autocast(x):
        x = x.to(autocast_dtype(x) or x.dtype)
        return _routed.routed(x, bank.kernels.squeeze(2), bank.biases, weights, bank.spans)
