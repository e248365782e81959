"""Register the three passes of a depthwise convolution as PyTorch operators: ``torch.ops.widefield.depthwise*``.

Each has a fake implementation (shapes and layouts, for torch.compile and torch.export), derivatives in terms of the
three, a rule for vmap, and a FLOP count. All are bilinear, so the derivatives hold at any order, in forward and in
reverse mode.

Weights are (G, C, KH, KW) and biases (G, C): G is 1, or N for per-sample kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from widefield._checks import Pair
from widefield.ops import _backend
from widefield.ops._autocast import without_autocast
from widefield.ops._fakes import register_fake
from widefield.ops._problem import (
    PLAIN,
    Problem,
    is_batch_of_gradients,
    is_channels_last,
    laid_out,
    memory_format,
    output_size,
    problem_of,
)

_library = torch.library.Library("widefield", "FRAGMENT")
_library.define(
    "depthwise(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, str backend)"
    " -> Tensor"
)
_library.define(
    "depthwise_input_grad(Tensor grad, Tensor weight, SymInt[] input_size, int[2] stride, int[2] padding,"
    " int[2] dilation, str backend) -> Tensor"
)
_library.define(
    "depthwise_weight_grad(Tensor grad, Tensor x, SymInt[] weight_size, int[2] stride, int[2] padding,"
    " int[2] dilation, str backend) -> Tensor"
)


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, backend: str
) -> Tensor:
    """Convolve (N, C, H, W) with weights (G, C, KH, KW); differentiable. The caller has checked the arguments."""
    return _call("depthwise", x, weight, bias, stride, padding, dilation, backend)


def input_grad(
    grad: Tensor, weight: Tensor, input_size: Sequence[int], stride: Pair, padding: Pair, dilation: Pair, backend: str
) -> Tensor:
    """Return the gradient of :func:`depthwise` with respect to x, of shape ``input_size``; differentiable."""
    return _call("depthwise_input_grad", grad, weight, input_size, stride, padding, dilation, backend)


def weight_grad(
    grad: Tensor, x: Tensor, weight_size: Sequence[int], stride: Pair, padding: Pair, dilation: Pair, backend: str
) -> Tensor:
    """Return the gradient of :func:`depthwise` with respect to weights of ``weight_size``; differentiable."""
    return _call("depthwise_weight_grad", grad, x, weight_size, stride, padding, dilation, backend)


def _call(name: str, first: Tensor, second: Tensor, third: Any, *rest: Any) -> Tensor:
    """Run an operator, differentiably, with as little dispatch as the call allows.

    PyTorch's dispatch of an operator written in Python takes longer than a small convolution. It is needed only by
    compilers, tracers, dispatch modes, tensor subclasses and dual numbers.
    """
    if torch._C._are_functorch_transforms_active():
        result = _transformed(name, (first, second, third, *rest))
    elif _is_watched(first, second, third):
        result = _operate(name, first, second, third, *rest)
    elif torch.is_grad_enabled():
        result = _EAGER[name].apply(first, second, third, *rest)
    else:
        result = _RUN[name](first, second, third, *rest)
    return result


def _is_watched(first: Tensor, second: Tensor, third: Any) -> bool:
    """Return whether something other than eager autograd has to see the operator."""
    return (
        torch.compiler.is_compiling()  # first: compilers do not trace what follows
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or type(first) not in PLAIN
        or type(second) not in PLAIN
        or (isinstance(third, Tensor) and (type(third) not in PLAIN or _functorch.is_legacy_batchedtensor(third)))
        or _functorch.is_legacy_batchedtensor(first)
        or _functorch.is_legacy_batchedtensor(second)
    )


def _transformed(name: str, args: tuple[Any, ...]) -> Tensor:
    """Compute under torch.func's transforms, which need a Function: they do not see the derivatives of operators."""
    result: Tensor = _plain(name, *args) if _is_functionalized() else _FUNCTIONS[name].apply(*args)
    return result


def _is_functionalized() -> bool:
    """Return whether torch.func.functionalize is active, which does not support autograd Functions."""
    stack = _functorch.get_interpreter_stack() or ()
    return any(interpreter.key() == _functorch.TransformType.Functionalize for interpreter in stack)


def _plain(name: str, *args: Any) -> Tensor:
    """Compute with PyTorch's own operators, which every transform supports."""
    *inputs, _ = args
    result: Tensor = getattr(_backend.module("aten"), _PARTS[name][0])(*inputs)
    return result


def _operate(name: str, *args: Any) -> Tensor:
    result: Tensor = getattr(torch.ops.widefield, name)(*args)
    return result


class _Way(NamedTuple):
    """How one pass of one shape is computed."""

    problem: Problem
    dtype: torch.dtype
    """Of the result."""
    widens: bool
    layout: torch.memory_format
    compute: Callable[..., Tensor] | None
    """The backend's function. None where timings decide, as they may change from call to call."""


ways_of: dict[str, dict[Any, _Way]] = {}
"""Passes that came up before, by operator: choosing anew takes as long as a small convolution."""


def _way(step: str, first: Tensor, second: Tensor, third: Any, geometry: tuple[Pair, Pair, Pair], backend: str) -> _Way:
    like = second if step == "weight_grad" else first
    if step == "weight_grad":
        input_size, weight_size = second.shape, third
    else:
        input_size, weight_size = third if step == "input_grad" else first.shape, second.shape
    problem = problem_of(step, like, tuple(input_size), tuple(weight_size), *geometry)
    widens = _backend.widens(backend, problem)
    if widens:
        problem = problem._replace(dtype=torch.float32)
    layout = memory_format(problem.channels_last and step != "weight_grad")
    compute = None
    if problem.device.type == "cpu":
        compute = getattr(_backend.resolve(backend, problem), step)
    return _Way(problem, like.dtype, widens, layout, compute)


def _chosen_now(way: _Way, backend: str, args: tuple[Any, ...]) -> Callable[..., Tensor]:
    """Return the function of the backend that is the choice at present. Timed with ``args`` if it has to be."""

    def run(module: ModuleType) -> object:
        result: Tensor = getattr(module, way.problem.step)(*args)
        return result.to(way.dtype).contiguous(memory_format=way.layout)

    chosen: Callable[..., Tensor] = getattr(_backend.resolve(backend, way.problem, run), way.problem.step)
    return chosen


def _implementation(name: str, step: str, fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function behind an operator: it describes the problem, has a backend chosen, and runs it.

    The arguments are those of the backends' functions. The third is the bias in the forward pass, and the size of the
    result in the other two.
    """

    def run(
        first: Tensor,
        second: Tensor,
        third: Any,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        backend: str,
    ) -> Tensor:
        # PyTorch passes lists, which cannot be keys.
        geometry: Any = (tuple(stride), tuple(padding), tuple(dilation))
        size = None if third is None or isinstance(third, Tensor) else tuple(third)
        if first.shape[0] == 0:
            return fake(first, second, third, *geometry, backend).zero_()
        like = second if step == "weight_grad" else first
        key = (first.shape, second.shape, size, like.stride(), like.dtype, like.device, geometry, backend)
        way = ways.get(key)
        if way is None:
            way = _way(step, first, second, third, geometry, backend)
            if len(ways) < 4096:
                ways[key] = way
        inputs: tuple[Any, ...] = (first, second, third if size is None else size)
        if way.widens:
            inputs = tuple([value.float() if isinstance(value, Tensor) else value for value in inputs])
        # Below the dispatch key that tracks views: callers could not modify a view made here in place.
        with torch._C._AutoDispatchBelowADInplaceOrView(), without_autocast(first):
            compute = way.compute or _chosen_now(way, backend, (*inputs, *geometry))
            return compute(*inputs, *geometry).to(way.dtype).contiguous(memory_format=way.layout)

    ways = ways_of.setdefault(name, {})
    run.__name__ = name
    return run


def _empty(like: Tensor, size: tuple[int, ...]) -> Tensor:
    layout = memory_format(is_channels_last(like))
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, backend: str
) -> Tensor:
    return _empty(x, (*x.shape[:2], *output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)))


def _fake_input_grad(grad: Tensor, weight: Tensor, input_size: list[int], *_: object) -> Tensor:
    return _empty(grad, tuple(input_size))


def _fake_weight_grad(grad: Tensor, x: Tensor, weight_size: list[int], *_: object) -> Tensor:
    return x.new_empty(tuple(weight_size))


# Derivatives. Incoming gradients may have any layout, or be broadcast. They are converted to the layout of the tensor
# that they belong to, so that a backward pass uses the same layout as its forward pass.


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, _, *geometry = inputs
    ctx.save_for_backward(first, second)
    ctx.geometry = geometry
    ctx.channels_last = is_channels_last(first)


def _remember_for_both_modes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _remember(ctx, inputs, output)
    ctx.save_for_forward(*inputs[:2])
    ctx.size = None if isinstance(inputs[2], Tensor) else inputs[2]


def is_wanted(ctx: Any, index: int) -> bool:
    """Return whether this gradient is needed.

    ``torch.autograd.grad`` with respect to an image does not need those of the kernels, although the kernels require
    gradients. PyTorch's own operators skip them in this case, too.
    """
    if not ctx.needs_input_grad[index]:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(ctx.next_functions[index][0]))
    except (AttributeError, RuntimeError, TypeError):  # a leaf that was asked for, or a call outside of the engine
        return True


def _forward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad = laid_out(grad, ctx.channels_last)
    dx = dw = db = None
    if is_wanted(ctx, 0):
        dx = _call("depthwise_input_grad", grad, weight, x.shape, *ctx.geometry)
    if is_wanted(ctx, 1):
        dw = _call("depthwise_weight_grad", grad, x, weight.shape, *ctx.geometry)
    if is_wanted(ctx, 2):
        db = grad.sum((0, 2, 3))[None] if weight.shape[0] == 1 else grad.sum((2, 3))  # one sum rounds 16 bits once
    return dx, dw, db, None, None, None, None


def _input_grad_backward(ctx: Any, grad_of_dx: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight = ctx.saved_tensors
    grad_of_dx = laid_out(grad_of_dx, ctx.channels_last)
    of_grad = of_weight = None
    if is_wanted(ctx, 0):
        of_grad = _call("depthwise", grad_of_dx, weight, None, *ctx.geometry)
    if is_wanted(ctx, 1):
        of_weight = _call("depthwise_weight_grad", grad, grad_of_dx, weight.shape, *ctx.geometry)
    return of_grad, of_weight, None, None, None, None, None


def _weight_grad_backward(ctx: Any, grad_of_dw: Tensor) -> tuple[Tensor | None, ...]:
    grad, x = ctx.saved_tensors
    of_grad = of_x = None
    if is_wanted(ctx, 0):
        of_grad = _call("depthwise", x, grad_of_dw, None, *ctx.geometry)
    if is_wanted(ctx, 1):
        of_x = _call("depthwise_input_grad", grad, grad_of_dw, x.shape, *ctx.geometry)
    return of_grad, of_x, None, None, None, None, None


def _primal(x: Tensor) -> Tensor:
    """Return x without its tangent. Tensors inside vmap have no tangent."""
    hidden = _functorch.is_batchedtensor(x) or is_batch_of_gradients(x)
    return x if hidden else forward_ad.unpack_dual(x).primal


def _pushed_forward(name: str, primals: Sequence[Any], tangents: Sequence[Tensor | None]) -> Tensor:
    """Return the tangent of an operator's result. It is linear in the first argument, the second, and the bias."""
    first, second, third, *geometry = primals
    of_first, of_second, of_bias = tangents[:3]
    if of_first is None and of_second is None:
        of_first = torch.zeros_like(first)
    if name == "depthwise":
        third = of_bias
    total: Tensor | None = None
    for left, right in ((of_first, second), (first, of_second)):
        if left is not None and right is not None:
            term = _call(name, left, right, third, *geometry)
            total = term if total is None else total + term
            third = None if name == "depthwise" else third  # added once
    return cast(Tensor, total)


def _jvp(name: str) -> Callable[..., Tensor]:
    def derivative(ctx: Any, *tangents: Any) -> Tensor:
        # Enabled again, because outer transforms may differentiate this derivative.
        with forward_ad._set_fwd_grad_enabled(True):
            first, second = (_primal(saved) for saved in ctx.saved_tensors)
            return _pushed_forward(name, (first, second, ctx.size, *ctx.geometry), tangents)

    return derivative


Caller = Callable[..., Tensor]
"""What a rule for vmap calls: the operator, or the function that other transforms see."""

# vmap: a mapped dimension is more batch, and mapped weights are weights per sample.


def _to_front(value: Tensor, dim: int | None, count: int) -> Tensor:
    return value.expand(count, *value.shape) if dim is None else value.movedim(dim, 0)


def _per_sample(value: Tensor, dim: int | None, count: int, batch: int) -> Tensor:
    """Lay (count, G, ...) out as (count * batch, ...)."""
    value = _to_front(value, dim, count)
    return value.expand(count, batch, *value.shape[2:]).reshape(count * batch, *value.shape[2:])


def _vmap_forward(
    call: Caller, info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Any:
    x = _to_front(x, in_dims[0], info.batch_size)
    count, batch = x.shape[:2]
    if in_dims[1] is not None or in_dims[2] is not None or weight.shape[0] != 1:
        weight = _per_sample(weight, in_dims[1], count, batch)
        bias = None if bias is None else _per_sample(bias, in_dims[2], count, batch)
    y = call("depthwise", x.flatten(0, 1), weight, bias, *rest)
    return y.unflatten(0, (count, batch)), 0


def _vmap_input_grad(
    call: Caller, info: Any, in_dims: Any, grad: Tensor, weight: Tensor, input_size: list[int], *rest: Any
) -> Any:
    grad = _to_front(grad, in_dims[0], info.batch_size)
    count, batch = grad.shape[:2]
    if in_dims[1] is not None or weight.shape[0] != 1:
        weight = _per_sample(weight, in_dims[1], count, batch)
    size = (count * batch, *input_size[1:])
    dx = call("depthwise_input_grad", grad.flatten(0, 1), weight, size, *rest)
    return dx.unflatten(0, (count, batch)), 0


def _vmap_weight_grad(
    call: Caller, info: Any, in_dims: Any, grad: Tensor, x: Tensor, weight_size: list[int], *rest: Any
) -> Any:
    grad, x = _to_front(grad, in_dims[0], info.batch_size), _to_front(x, in_dims[1], info.batch_size)
    count, batch = x.shape[:2]
    size = (count * batch, *weight_size[1:])
    dw = call("depthwise_weight_grad", grad.flatten(0, 1), x.flatten(0, 1), size, *rest)
    dw = dw.unflatten(0, (count, batch))
    return (dw.sum(1, keepdim=True) if weight_size[0] == 1 else dw), 0


def _flops(kernel: tuple[int, ...], outputs: tuple[int, ...]) -> int:
    return 2 * prod(kernel[2:]) * prod(outputs)


_PARTS: dict[str, tuple[str, Callable[..., Tensor], Callable[..., Any], Callable[..., Any]]] = {
    "depthwise": ("forward", _fake_forward, _forward_backward, _vmap_forward),
    "depthwise_input_grad": ("input_grad", _fake_input_grad, _input_grad_backward, _vmap_input_grad),
    "depthwise_weight_grad": ("weight_grad", _fake_weight_grad, _weight_grad_backward, _vmap_weight_grad),
}
_RUN: dict[str, Callable[..., Tensor]] = {}
_EAGER: dict[str, type[torch.autograd.Function]] = {}
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}
"""Operator -> its implementation; an autograd Function of that; a Function with rules for all transforms."""


def _eager(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(ctx: Any, *args: Any) -> Tensor:
        result = run(*args)
        _remember(ctx, args, result)
        return result

    return forward


def _below_autograd(name: str) -> Callable[..., Tensor]:
    def forward(*args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _operate(name, *args)

    return forward


for _name, (_step, _fake, _backward, _vmap) in _PARTS.items():
    _RUN[_name] = _run = _implementation(_name, _step, _fake)
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    register_fake(_name, _fake, _library)
    torch.library.register_vmap(f"widefield::{_name}", functools.partial(_vmap, _operate), lib=_library)
    _bases, _derivative = (torch.autograd.Function,), staticmethod(_backward)
    _EAGER[_name] = type(_name, _bases, {"forward": staticmethod(_eager(_run)), "backward": _derivative})
    _function: Any = type(
        _name,
        _bases,
        {
            "forward": staticmethod(_below_autograd(_name)),
            "setup_context": staticmethod(_remember_for_both_modes),
            "backward": _derivative,
            "jvp": staticmethod(_jvp(_name)),
            "vmap": staticmethod(functools.partial(_vmap, _call)),
        },
    )
    _FUNCTIONS[_name] = _function
    _library.impl(_name, _function.apply, "Autograd")


@register_flop_formula(torch.ops.widefield.depthwise)
def _forward_flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _flops(weight, out_shape)


@register_flop_formula(torch.ops.widefield.depthwise_input_grad)
def _input_grad_flops(grad: Any, weight: Any, *_: Any, **__: Any) -> int:
    return _flops(weight, grad)


@register_flop_formula(torch.ops.widefield.depthwise_weight_grad)
def _weight_grad_flops(grad: Any, x: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _flops(out_shape, grad)
