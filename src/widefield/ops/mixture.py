"""One kernel per sample, mixed from a bank of experts (MoRF, Lian, Yu, Wang 2024, eq. 6 and 7).

A mixture of n convolutions is linear in the input, so for sample i it is one convolution::

    y_i = sum_r a_ir (W_r * x_i + b_r) = (sum_r a_ir pad(W_r)) * x_i + sum_r a_ir b_r

The paper merges at inference. Here the merged form serves training too: autograd through the sum gives the gradients
with respect to x, every W_r, every b_r and the routing weights a. Three backends compute the same function:

- ``"branches"``: n convolutions and a weighted sum. The oracle, and the faster one where per-sample kernels are larger
  than the map that they are applied to.
- ``"merged"``: one convolution per sample; a depthwise one is :mod:`widefield.ops.depthwise`'s, with its dispatch.
- ``"routed"``: the same without ever writing a sample's kernel to memory; depthwise on CUDA devices, for small maps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield import _checks
from widefield.ops import _routed, _timed, fold
from widefield.ops._autocast import autocast_dtype, without_autocast
from widefield.ops._onednn import WIDEST
from widefield.ops._problem import (
    STEPS,
    Problem,
    has_numbers,
    is_channels_last,
    is_traced,
    multiply_adds,
    problem_of,
    size_of,
)
from widefield.ops.depthwise import depthwise_conv2d
from widefield.ops.per_sample import per_sample_conv2d

BACKENDS = ("auto", "merged", "branches", "routed")

_MANY = 4
"""Experts of one kind, on average, from which kinds are mixed one after the other instead of from one padded bank."""

_TO_MOVE = 25
"""Multiply-adds in whose time a number of a map is copied into a bucket, or out of one."""

_TO_CALL = 40_000_000
"""Multiply-adds in whose time a bucket's kernels are selected and its calls made."""

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
    """Weighted sum of n convolutions with weights of its own for every sample: ``sum_r a_r (W_r * x + b_r)``, eq. 6.

    All experts are centred on the same pixel ("same" alignment).

    Args:
        x: (N, C_in, H, W), any memory format.
        kernels: n tensors (C_out, C_in/groups, K_r, K_r), K_r odd.
        biases: n tensors (C_out,), or None.
        weights: routing weights (N, n), unconstrained.
        stride: of every expert; the output has ceil(H/stride) rows and ceil(W/stride) columns.
        groups: of every expert.
        dilations: one per expert; default 1.
        sparse: a weight of exactly 0 means that the expert was not chosen: neither its kernel nor that weight gets a
            gradient from that sample. Branches compute only what was chosen. Merged kernels are cropped to the largest
            expert that a sample chose, with the samples sorted by it, where that saves more time than it takes. Nothing
            is skipped, and the output is the same, where there are no numbers to look at: while torch.compile or
            torch.export traces, and on meta tensors.
        backend: "auto", "merged", "branches" or "routed".

    Returns:
        (N, C_out, ceil(H/stride), ceil(W/stride)) in x's memory format.

    Raises:
        ValueError: shapes that do not fit together, an unknown backend, or one that cannot compute this call.
        TypeError: x and kernels of different dtypes, outside autocast.
    """
    dilations = tuple(dilations) if dilations is not None else (1,) * len(kernels)
    _check(x, kernels, biases, weights, groups, dilations)
    size = max(fold.effective_size(size_of(k)[-1], d) for k, d in zip(kernels, dilations, strict=True))
    step = fold.common_dilation(dilations)
    way, _ = _choose(backend, x, kernels[0], len(kernels), size, stride, groups, step)
    if way == "branches":
        return _branches(x, kernels, biases, weights, stride, groups, dilations, sparse)
    experts = [(size_of(k)[-1], d) for k, d in zip(kernels, dilations, strict=True)]
    order = sorted(range(len(experts)), key=lambda r: experts[r])
    if order != list(range(len(experts))):  # experts of one kind side by side: cheaper to reorder than their kernels
        weights = weights[:, order]
        kernels, experts = [kernels[r] for r in order], [experts[r] for r in order]
        biases = None if biases is None else [biases[r] for r in order]
    bias_bank = None if biases is None else torch.stack(list(biases))
    on_gpu = x.device.type == "cuda"  # where the bank may be mixed inside the convolution
    if len(experts) >= _MANY * len(set(experts)) and size_of(x)[0] and not on_gpu:
        weights = _of_chosen(weights) if sparse else weights
        with without_autocast(x):
            mixed = _mixed_by_kind(kernels, experts, weights.to(kernels[0].dtype), _reach(x, step), step)
            bias = None if bias_bank is None else weights.to(bias_bank.dtype) @ bias_bank
        return _convolved(x, mixed, bias, stride, groups, step)
    bank = fold.kernel_bank(kernels, [d for _, d in experts])
    return _merged(x, bank, bias_bank, weights, stride, groups, experts, sparse, backend)


def bank_conv2d(
    x: Tensor,
    bank: Tensor,
    bias_bank: Tensor | None,
    weights: Tensor,
    *,
    experts: Sequence[tuple[int, int]],
    stride: int = 1,
    groups: int = 1,
    sparse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """:func:`mixture_conv2d` for experts that are already one padded bank, the inference form of eq. 7.

    Args:
        x: (N, C_in, H, W).
        bank: (n, C_out, C_in/groups, K, K) as :func:`widefield.ops.fold.kernel_bank` makes it.
        bias_bank: (n, C_out) or None.
        weights: (N, n).
        experts: (kernel size, dilation) of each: where in the bank its taps are.
        stride, groups, sparse, backend, and what is raised: as in :func:`mixture_conv2d`.
    """
    _check(
        x, bank.unbind(), None if bias_bank is None else bias_bank.unbind(), weights, groups, [d for _, d in experts]
    )
    step = fold.common_dilation([d for _, d in experts])
    size = fold.effective_size(size_of(bank)[-1], step)
    way, _ = _choose(backend, x, bank[0], len(experts), size, stride, groups, step)
    if way == "branches":
        kernels = [fold.expert(bank, r, k, d, step) for r, (k, d) in enumerate(experts)]
        biases = None if bias_bank is None else bias_bank.unbind()
        return _branches(x, kernels, biases, weights, stride, groups, [d for _, d in experts], sparse)
    return _merged(x, bank, bias_bank, weights, stride, groups, experts, sparse, backend)


def plan(
    x: Tensor,
    kernels: Sequence[Tensor] | Tensor,
    biases: Sequence[Tensor] | Tensor | None,
    weights: Tensor,
    stride: int,
    groups: int,
    dilations: Sequence[int] | None,
    backend: str,
    experts: Sequence[tuple[int, int]] | None = None,
) -> tuple[str, str, dict[str, str], list[Problem]]:
    """Return what a call of either function would do: backend, reason, why not the others, depthwise passes.

    ``experts``: where the kernels are a padded bank, the size and dilation of each.
    """
    dilations = tuple(dilations) if dilations is not None else (1,) * len(kernels)
    _check(x, list(kernels), None if biases is None else list(biases), weights, groups, dilations)
    step = fold.common_dilation(dilations)
    size = max(
        fold.effective_size(k.shape[-1], step if experts else d) for k, d in zip(kernels, dilations, strict=True)
    )
    way, reason = _choose(backend, x, kernels[0], len(kernels), size, stride, groups, step)
    depthwise = kernels[0].shape[1] == 1 and kernels[0].shape[0] == groups
    could = "it could, but is not the fastest here"
    others = {other: could for other in ("merged", "branches") if other != way}
    if way != "routed":
        inside = _routed.why_not(x, kernels[0], None, weights, stride, step) if depthwise else "it is depthwise only"
        others["routed"] = inside or "on small maps both are timed at the first call"
    problems = []
    if depthwise:
        if way == "branches":  # each expert by itself: those of the largest
            each = experts or [(k.shape[-1], d) for k, d in zip(kernels, dilations, strict=True)]
            taps, step = max(each, key=lambda expert: fold.effective_size(*expert))
        else:
            taps = min((size - 1) // step, 2 * ((max(x.shape[2:]) - 1) // step)) + 1
        padding = step * (taps // 2)
        weight_size = (1 if way == "branches" else x.shape[0], groups, taps, taps)
        problems = [
            problem_of(name, x, tuple(x.shape), weight_size, (stride,) * 2, (padding,) * 2, (step,) * 2)._replace(
                dtype=autocast_dtype(x) or x.dtype
            )
            for name in STEPS
        ]
    return way, reason, others, problems


def _check(
    x: Tensor,
    kernels: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    weights: Tensor,
    groups: int,
    dilations: Sequence[int],
) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be (N, C, H, W); got shape {tuple(x.shape)}.")
    n = len(kernels)
    if n == 0:
        raise ValueError("kernels is empty: give at least one expert.")
    if size_of(weights) != (size_of(x)[0], n):
        raise ValueError(
            f"weights must be (N, n) = ({x.shape[0]}, {n}), one weight for each sample and expert; "
            f"got shape {tuple(weights.shape)}."
        )
    if biases is not None and len(biases) != n:
        raise ValueError(f"biases must hold one tensor per expert ({n}) or be None; got {len(biases)}.")
    if len(dilations) != n:
        raise ValueError(f"dilations must hold one number per expert ({n}); got {tuple(dilations)!r}.")
    c_in, c_out = size_of(x)[1], size_of(kernels[0])[0]
    _check_dtype(x, kernels[0])
    for kernel in kernels:
        shape = tuple(size_of(kernel))
        if kernel.ndim != 4 or shape[2] != shape[3] or shape[2] % 2 == 0:
            raise ValueError(f"a kernel must be (C_out, C_in/groups, K, K) with K odd; got shape {shape}.")
        if shape[0] != c_out or shape[1] * groups != c_in or c_out % groups:
            raise ValueError(
                f"a kernel of shape {shape} does not fit {c_in} input channels, {c_out} output channels "
                f"and groups={groups}: expected ({c_out}, {c_in // groups}, K, K)."
            )


def _check_dtype(x: Tensor, kernel: Tensor) -> None:
    if x.dtype != kernel.dtype and autocast_dtype(x) is None:
        raise TypeError(
            f"x is {x.dtype} and the kernels are {kernel.dtype}: convert one to the other, or use torch.autocast."
        )


def _choose(
    backend: str, x: Tensor, kernel: Tensor, n: int, size: int, stride: int, groups: int, dilation: int
) -> tuple[str, str]:
    """Resolve "auto" to a backend and the reason. It reads shapes only, never the batch size beyond an empty one, so
    that a graph with a dynamic batch has one form.

    Merging trades n convolutions for one, and pays by losing the reuse of weights over the batch. Depthwise kernels
    have next to nothing to reuse. For the others merging won while a sample's kernels held, per input channel, at most
    4 times as many numbers as its output map, and lost from 33 times on (benchmarks/results/mixture_cpu.md); the
    limit lies between.
    """
    backend = _checks.choice("backend", backend, BACKENDS)
    batch, _, height, width = size_of(x)
    c_out, c_group = size_of(kernel)[:2]
    depthwise = c_group == 1 and c_out == groups
    if backend == "routed":
        reason = _routed.why_not(x, kernel, None, kernel, stride, dilation) if depthwise else "it is depthwise only"
        if reason is not None:
            raise ValueError(
                f"backend='routed' cannot compute this mixture: {reason}. backend='auto' takes one that can."
            )
    if backend != "auto":
        return backend, "asked for"
    if n == 1:
        return "branches", "there is one expert: nothing to merge"
    if batch == 0:
        return "branches", "the batch is empty"  # convolution takes that, but not zero groups
    if depthwise:
        return "merged", "depthwise: one convolution per sample instead of one per expert"
    numbers = c_out // groups * size * size
    pixels = -(-height // stride) * -(-width // stride)
    if numbers <= 10 * pixels:
        return "merged", f"a sample's kernels have {numbers} numbers per input channel, its map {pixels} pixels"
    return "branches", f"a sample's kernels would have {numbers} numbers per input channel for {pixels} pixels"


def _reach(x: Tensor, step: int) -> int:
    """Return the taps, ``step`` pixels apart, of the largest kernel of which all meet the map somewhere.

    Without a bound where the map's size is a symbol, or a tensor as it is under torch.jit.trace: a graph for many
    sizes keeps the kernel as it is.
    """
    side = max(x.shape[2], x.shape[3]) if all(isinstance(n, int) for n in x.shape[2:]) else sys.maxsize // 4
    return 2 * ((side - 1) // step) + 1


def _branches(
    x: Tensor,
    kernels: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    weights: Tensor,
    stride: int,
    groups: int,
    dilations: Sequence[int],
    sparse: bool,
) -> Tensor:
    skip = sparse and has_numbers(weights)
    y: Tensor | None = None
    for r, (kernel, dilation) in enumerate(zip(kernels, dilations, strict=True)):
        bias = None if biases is None else biases[r]
        c_out, c_group, _, size = size_of(kernel)
        padding = dilation * (size // 2)
        chosen = weights[:, r].nonzero().squeeze(1) if skip else None
        seen = x if chosen is None else x.index_select(0, chosen)
        if c_group == 1 and c_out == groups:
            term = depthwise_conv2d(seen, kernel, bias, stride=stride, padding=padding, dilation=dilation)
        else:
            term = F.conv2d(seen, kernel, bias, stride, padding, dilation, groups)
        a = weights[:, r] if chosen is None else weights[:, r].index_select(0, chosen)
        term = term * a[:, None, None, None].to(term.dtype)
        if chosen is not None:
            term = term.new_zeros(x.shape[0], *term.shape[1:]).index_copy(0, chosen, term)
        y = term if y is None else y + term
    if y is None:
        raise ValueError("kernels is empty: give at least one expert.")
    return y


def _merged(
    x: Tensor,
    bank: Tensor,
    bias_bank: Tensor | None,
    weights: Tensor,
    stride: int,
    groups: int,
    experts: Sequence[tuple[int, int]],
    sparse: bool,
    backend: str,
) -> Tensor:
    step = fold.common_dilation([d for _, d in experts])
    bank = fold.crop(bank, _reach(x, step))
    if size_of(x)[0] == 0:  # grouped convolution refuses zero groups
        every = None if bias_bank is None else bias_bank.unbind()
        return _branches(x, bank.unbind(), every, weights, stride, groups, [step] * len(experts), False)
    _, _, c_group, largest, _ = size_of(bank)
    sizes = [min(fold.effective_size(k, d // step), largest) for k, d in experts]
    if sparse:
        weights = _of_chosen(weights)
        if has_numbers(weights):
            buckets = _buckets(x, weights, bank, sizes, stride, step)
            if len(buckets) > 1 or largest not in buckets:
                return _by_size(x, bank, bias_bank, weights, buckets, sizes, stride, groups, step)
    if c_group == 1 and _mixes_inside(backend, x, bank, bias_bank, weights, sizes, stride, step):
        return _mixed_inside(x, bank, bias_bank, weights, sizes)
    return _merged_dense(x, bank, bias_bank, weights, stride, groups, step)


def _of_chosen(weights: Tensor) -> Tensor:
    """Keep gradients from weights of exactly 0: their experts were not chosen."""
    # torch.jit.trace checks a graph against one recorded without gradients: they must not differ.
    learning = (torch.is_grad_enabled() and weights.requires_grad) or is_traced()
    return torch.where(weights == 0, 0, weights) if learning else weights


def _buckets(
    x: Tensor, weights: Tensor, bank: Tensor, sizes: Sequence[int], stride: int, dilation: int
) -> dict[int, list[int]]:
    """Return the samples to be convolved with kernels of each size: those of the largest expert that each sample has a
    weight for, or all samples with the largest of the bank where moving them apart would cost more than it saves.

    Which samples is data: on a GPU this waits for it once a layer.
    """
    largest = bank.shape[-1]
    buckets: dict[int, list[int]] = {}
    for i, row in enumerate(weights.tolist()):
        live = [size for size, weight in zip(sizes, row, strict=True) if weight != 0]
        buckets.setdefault(max(live, default=min(sizes)), []).append(i)
    work = {size: _work(x.shape[2:], size, stride, dilation) for size in {*buckets, largest}}
    saved = sum((work[largest] - work[size]) * len(samples) for size, samples in buckets.items())
    moves = 0.0
    if len(buckets) > 1:
        numbers = x.numel() + x.shape[0] * bank.shape[1] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
        moves = _TO_MOVE * numbers + _TO_CALL * len(buckets)
    if saved * bank.shape[1] * bank.shape[2] > moves:
        return dict(sorted(buckets.items()))
    return {largest: list(range(len(weights)))}


def _work(side: tuple[int, ...], size: int, stride: int, dilation: int) -> float:
    """Multiply-adds of one kernel on one map, in units of those of narrow kernels."""
    padding = dilation * (size // 2)
    slower = 1.5 if fold.effective_size(size, dilation) > WIDEST else 1.0
    return slower * multiply_adds((side[0], side[1]), (size,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2)


def _by_size(
    x: Tensor,
    bank: Tensor,
    bias_bank: Tensor | None,
    weights: Tensor,
    buckets: dict[int, list[int]],
    sizes: Sequence[int],
    stride: int,
    groups: int,
    dilation: int,
) -> Tensor:
    """Convolve each bucket of samples with kernels of its size, mixed of the experts that are no larger."""
    # Split and joined, not indexed: the gradient of an index is a map of zeros for each bucket.
    samples, rows = x.split(1), weights.split(1)
    results: dict[int, Tensor] = {}
    for size, chosen in buckets.items():
        fitting = [r for r, span in enumerate(sizes) if span <= size]
        biases = None if bias_bank is None else bias_bank[fitting]
        kernels = fold.crop(bank, size)[fitting]
        if len(chosen) == len(samples):
            return _merged_dense(x, kernels, biases, weights[:, fitting], stride, groups, dilation)
        some, shares = torch.cat([samples[i] for i in chosen]), torch.cat([rows[i] for i in chosen])[:, fitting]
        part = _merged_dense(some, kernels, biases, shares, stride, groups, dilation)
        results.update(zip(chosen, part.split(1), strict=True))
    return torch.cat([results[i] for i in range(len(samples))])


def _mixes_inside(
    backend: str,
    x: Tensor,
    bank: Tensor,
    bias_bank: Tensor | None,
    weights: Tensor,
    spans: Sequence[int],
    stride: int,
    dilation: int,
) -> bool:
    """Decide between "merged" and "routed" for depthwise experts; "auto" times both once, where that may pay."""
    if backend != "auto":
        return backend == "routed"
    _, channels, height, width = size_of(x)
    small = x.device.type == "cuda" and height * width <= _SMALL_MAP
    if not small or not has_numbers(x):
        return False
    if _routed.why_not(x, bank, bias_bank, weights, stride, dilation) is not None:
        return False
    ways = ("merged", "routed")
    key = f"mixture {tuple(x.shape)} {bank.shape[-1]} {tuple(spans)} {x.dtype} {is_channels_last(x)}"
    known = _timed.known(key, x.device, ways)
    if known is None:
        if not _timed.may_measure(x.device):
            return False
        with torch.no_grad():
            known = _timed.measure(
                key,
                x.device,
                {
                    "merged": lambda: _merged_dense(x, bank, bias_bank, weights, stride, channels, dilation),
                    "routed": lambda: _mixed_inside(x, bank, bias_bank, weights, spans),
                },
            )
    return known[0] == "routed"


def _mixed_inside(x: Tensor, bank: Tensor, bias_bank: Tensor | None, weights: Tensor, spans: Sequence[int]) -> Tensor:
    with without_autocast(x):
        x = x.to(autocast_dtype(x) or x.dtype)
        return _routed.routed(x, bank.squeeze(2), bias_bank, weights, spans)


def _merged_dense(
    x: Tensor, bank: Tensor, bias_bank: Tensor | None, weights: Tensor, stride: int, groups: int, dilation: int
) -> Tensor:
    _, c_out, c_group, size, _ = size_of(bank)
    # Mixed in the parameters' precision also under autocast: rounding n kernels before adding them costs accuracy and
    # saves nothing, as the mix is small next to the convolution.
    with without_autocast(x):
        a = weights.to(bank.dtype)
        kernels = (a @ bank.flatten(1)).view(a.shape[0], c_out, c_group, size, size)
        bias = None if bias_bank is None else a @ bias_bank
    return _convolved(x, kernels, bias, stride, groups, dilation)


def _mixed_by_kind(
    kernels: Sequence[Tensor], experts: Sequence[tuple[int, int]], weights: Tensor, reach: int, step: int
) -> Tensor:
    """Mix experts that lie sorted by kind: those of one kind in one product, each result into the next larger one.

    The bank's sum without the bank, most of which is padding, and most of what would be read where experts are many.
    """
    kinds = sorted(set(experts), key=lambda kind: fold.effective_size(*kind))
    mixed: Tensor | None = None
    for size, dilation in kinds:
        first = experts.index((size, dilation))
        last = first + experts.count((size, dilation))
        stack = torch.stack(list(kernels[first:last]))
        one = (weights[:, first:last] @ stack.flatten(1)).view(weights.shape[0], *size_of(stack)[1:])
        one = fold.crop(fold.dilate(one, dilation // step), reach)
        mixed = one if mixed is None else one + fold.pad(mixed, size_of(one)[-1])
    if mixed is None:
        raise ValueError("kernels is empty: give at least one expert.")
    return mixed


def _convolved(x: Tensor, kernels: Tensor, bias: Tensor | None, stride: int, groups: int, dilation: int) -> Tensor:
    """Convolve every sample with kernels (N, C_out, C_in/groups, K, K) and biases (N, C_out) of its own."""
    padding = dilation * (size_of(kernels)[-1] // 2)
    return per_sample_conv2d(
        x, kernels, bias, stride=(stride,) * 2, padding=(padding,) * 2, dilation=(dilation,) * 2, groups=groups
    )
