"""Follow an image through a model's operators: which pixels each position of a tensor can depend on.

If the positions of a tensor lie on a grid over the image, position i of an axis depends on pixels ``start + i * jump``
to ``start + i * jump + size - 1``. A convolution or pooling of kernel k, stride s, padding p and dilation d turns this
into (Araujo, Norris, Sim, "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019)::

    size' = size + d (k - 1) jump        start' = start - p jump        jump' = s jump

Branches that merge depend on the union. Operators without a rule are assumed to reach every position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Axis:
    """The pixels that positions along rows, or columns, depend on."""

    jump: int = 1
    start: int = 0
    size: int = 1

    def windows(self, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
        """Return the axis after a convolution or pooling."""
        reach = dilation * (kernel - 1) * self.jump
        return Axis(self.jump * stride, self.start - padding * self.jump, self.size + reach)

    def joined(self, other: Axis) -> Axis:
        """Return an axis whose positions depend on the pixels of both."""
        start = min(self.start, other.start)
        return Axis(self.jump, start, max(self.start + self.size, other.start + other.size) - start)

    def center(self, index: int) -> float:
        """Return the middle of a position's pixels, relative to the center of the first pixel."""
        return self.start + index * self.jump + (self.size - 1) / 2


@dataclass(frozen=True)
class Grid:
    """Positions of a tensor that lie on a grid over the image."""

    dims: tuple[int, int]
    """Dimensions of rows and columns, counted from the last, -1; equal if one dimension holds both, rows first."""
    shape: tuple[int, int]
    y: Axis
    x: Axis
    around: tuple[int, int] = (0, 0)
    """Entries before and after the positions in a shared dimension: class tokens, which depend on no pixel yet."""

    def fits(self, other: Grid) -> bool:
        """Return whether positions of both grids correspond."""
        jumps = self.y.jump == other.y.jump and self.x.jump == other.x.jump
        return jumps and (self.dims, self.shape, self.around) == (other.dims, other.shape, other.around)

    def joined(self, other: Grid) -> Grid:
        """Return the grid that depends on the pixels of both."""
        return replace(self, y=self.y.joined(other.y), x=self.x.joined(other.x))

    def without(self, gone: Sequence[int]) -> Grid:
        """Return the grid after other dimensions, counted from the last, were removed."""
        y, x = (dim + sum(one > dim for one in gone) for dim in self.dims)
        return replace(self, dims=(y, x))

    def beside(self, new: int) -> Grid:
        """Return the grid after a dimension was inserted, which is now at ``new``, counted from the last."""
        y, x = (dim if dim > new else dim - 1 for dim in self.dims)
        return replace(self, dims=(y, x))


@dataclass(frozen=True)
class Trace:
    """What is known of a tensor that depends on the image."""

    grid: Grid | None
    reason: str | None = None
    """The operator that made it depend on every position."""
    moved: str | None = None
    """Without a grid and a reason: the operator after which positions were unknown."""


class Tracer(TorchDispatchMode):
    """While active, follow an image (1, C, H, W), or the frames of a clip (1, C, T, H, W)."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._traces = WeakTensorKeyDictionary()
        self._written: dict[int, tuple[Tensor, Trace]] = {}
        self._filled: dict[int, tuple[Tensor, Trace]] = {}
        self._inside: list[str] = []
        self._traces[image] = Trace(Grid((-2, -1), (image.shape[-2], image.shape[-1]), Axis(), Axis()))

    def of(self, value: Any) -> Trace | None:
        """Return the trace of a tensor, or None if it does not depend on the image."""
        if not isinstance(value, Tensor):
            return None
        if self._written and value.layout == torch.strided:
            written = self._written.get(value.untyped_storage()._cdata)
            if written is not None:
                return written[1]
        trace: Trace | None = self._traces.get(value)
        if trace is None and self._filled and value.layout == torch.strided:
            filled = self._filled.get(value.untyped_storage()._cdata)
            return filled[1] if filled else None
        return trace

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """Keep track of the names of the modules that run."""
        handles = []
        try:
            for name, module in model.named_modules():
                handles.append(module.register_forward_pre_hook(lambda m, args, name=name: self._inside.append(name)))
                handles.append(module.register_forward_hook(lambda m, args, output: self._left()))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _left(self) -> None:
        self._inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and record what its results depend on."""
        kwargs = kwargs or {}
        with self:  # follow composite operators, which torch.inference_mode does not decompose
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        parameters = func._schema.arguments
        named = {parameter.name: parameter.default_value for parameter in parameters}
        named |= dict(zip(named, args, strict=False)) | kwargs
        traces = [trace for value in _tensors(named.values()) if (trace := self.of(value)) is not None]
        result = func(*args, **kwargs)
        outputs = list(_tensors([result]))
        if traces and outputs:
            call = _Call(func, named, self.of, traces, outputs, self._where(func))
            before = [self.of(output) for output in outputs]
            for output, trace in zip(outputs, call.found(), strict=True):
                if trace is not None:
                    self._traces[output] = _shaped(trace, output)
            if func._schema.is_mutable and before != [self.of(output) for output in outputs]:
                self._note_writing(call, fresh=before[0] is None)
        return result

    def _note_writing(self, call: _Call, *, fresh: bool) -> None:
        """After an in-place write, invalidate the traces of all tensors that share the memory.

        ``fresh``: neither the tensor nor a base that it fully covers depended on the image before.
        """
        for parameter in call.func._schema.arguments:
            given = call.named[parameter.name]
            if parameter.alias_info is None or not parameter.alias_info.is_write or not isinstance(given, Tensor):
                continue
            trace = Trace(None, call.reason(), f"{call.where} writes to a tensor with other views")
            storage = given.untyped_storage()
            if storage.nbytes() > given.numel() * given.element_size():
                self._written[storage._cdata] = given, trace  # kept alive, as its address may be reused
            elif fresh:
                self._filled[storage._cdata] = given, trace
            for other in list(self._traces):
                if other is not given and other.untyped_storage()._cdata == storage._cdata:
                    self._traces[other] = trace

    def _where(self, func: Any) -> str:
        inside = next((name for name in reversed(self._inside) if name), None)
        return f"{func.overloadpacket} in {inside}" if inside else str(func.overloadpacket)


def _from_last(dim: int, ndim: int) -> int:
    return dim - ndim if dim >= 0 else dim


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _shaped(trace: Trace, output: Tensor) -> Trace:
    """Return a trace whose grid has the tensor's shape."""
    grid = trace.grid
    if grid is None or grid.dims[0] == grid.dims[1]:
        return trace
    if output.ndim < -min(grid.dims):  # such as the statistics of a norm
        return Trace(None, trace.reason, trace.moved)
    return replace(trace, grid=replace(grid, shape=(output.shape[grid.dims[0]], output.shape[grid.dims[1]])))


@dataclass(frozen=True)
class _Call:
    """One call of an operator with arguments that depend on the image."""

    func: Any
    named: dict[str, Any]
    of: Callable[[Any], Trace | None]
    traces: list[Trace]
    outputs: list[Tensor]
    where: str

    def found(self) -> list[Trace | None]:
        """Return the trace of each result; None if it depends on no pixel."""
        name = str(self.func.overloadpacket)
        if name in _VIEWS:
            return _viewed(self)
        rule = _RULES.get(name)
        if rule is None:
            rule = _Call.joined if torch.Tag.pointwise in self.func.tags else _Call.anywhere
        return [rule(self)] * len(self.outputs)

    def first(self) -> tuple[Tensor, Grid | None]:
        """Return the first argument, and its grid if no other argument has one."""
        value = next(iter(self.named.values()))
        trace = self.of(value)
        alone = sum(other.grid is not None for other in self.traces) == 1
        return value, trace.grid if trace and alone else None

    def axes(self, key: str = "dim") -> set[int]:
        """Return the dimensions that an argument names, counted from the last; all if it names none."""
        ndim = next(iter(self.named.values())).ndim
        given = self.named.get(key)
        return {_from_last(dim, ndim) for dim in ([given] if isinstance(given, int) else given or range(ndim))}

    def reason(self) -> str | None:
        """Return why an argument depends on every position."""
        return next((trace.reason for trace in self.traces if trace.reason), None)

    def moved(self) -> str | None:
        """Return why an argument's positions are unknown."""
        return next((trace.moved for trace in self.traces if trace.moved), None)

    def anywhere(self, grid: Grid | None = None) -> Trace:
        """Return the trace of a result that depends on every position, on a grid or not."""
        new = f"{self.where} may reach every place"
        moved = self.moved()
        return Trace(grid, self.reason() or (f"{moved}, and {new}" if moved else new))

    def lost(self) -> Trace:
        """Return the trace of a result that reads no more than its arguments, on an unknown grid."""
        return Trace(None, self.reason(), self.moved() or f"{self.where} lays places out anew")

    def on(self, grid: Grid) -> Trace:
        """Return the trace of a result on this grid that combines no positions."""
        return Trace(grid, self.reason() or self.moved())

    def joined(self) -> Trace:
        """Return the trace of a result that depends, at each position, on all arguments there."""
        grids = [trace.grid for trace in self.traces if trace.grid is not None]
        if not grids or not all(grid.fits(grids[0]) for grid in grids):
            return self.lost()
        grid = grids[0]
        for other in grids[1:]:
            grid = grid.joined(other)
        return self.on(grid)


def _windows(call: _Call) -> Trace:
    """Convolution or pooling."""
    named = call.named
    _, grid = call.first()
    if grid is None or grid.dims != (-2, -1) or named.get("transposed"):
        return call.anywhere()
    weight = named.get("weight")
    kernel = _both(named["kernel_size"] if weight is None else weight.shape[2:])
    stride = _both(named["stride"] or kernel)  # default stride of pooling
    padding, dilation = _both(named["padding"]), _both(named.get("dilation", 1))
    terms = zip(kernel, stride, padding, dilation, strict=True)
    y, x = (axis.windows(*term) for axis, term in zip((grid.y, grid.x), terms, strict=True))
    return call.on(replace(grid, y=y, x=x))


def _both(value: Any) -> tuple[int, int]:
    sizes = [value] if isinstance(value, int) else list(value)[-2:]  # clips have time in front
    return int(sizes[0]), int(sizes[-1])


def _routed(call: _Call) -> Trace:
    """Trace a mixture of experts: stride 1, "same" alignment."""
    _, grid = call.first()
    if grid is None:
        return call.anywhere()
    terms = max(call.named["spans"]), 1, max(call.named["spans"]) // 2, 1
    return call.on(replace(grid, y=grid.y.windows(*terms), x=grid.x.windows(*terms)))


def _adaptive(call: _Call) -> Trace:
    x, grid = call.first()
    sides = call.outputs[0].shape[-2:]
    if grid is None or grid.dims != (-2, -1) or any(n % m for n, m in zip(x.shape[-2:], sides, strict=True)):
        return call.anywhere()
    h, w = (n // m for n, m in zip(x.shape[-2:], sides, strict=True))
    return call.on(replace(grid, y=grid.y.windows(h, h, 0, 1), x=grid.x.windows(w, w, 0, 1)))


def _product(call: _Call) -> Trace:
    """Trace a matrix product: a grid is kept unless the sum runs along it."""
    left, right = [value for value in call.named.values() if isinstance(value, Tensor)][-2:]
    grids = [trace.grid if (trace := call.of(value)) else None for value in (left, right)]
    summed = -1 if grids[0] else -2
    grid = grids[0] or grids[1]
    several = sum(trace.grid is not None for trace in call.traces) > 1
    if grid is None or several or summed in grid.dims:
        return call.anywhere()
    return call.on(grid)


def _reduction(call: _Call) -> Trace:
    _, grid = call.first()
    axes = call.axes()
    if grid is None or axes & set(grid.dims):
        return call.anywhere()
    return call.on(grid if call.named.get("keepdim") else grid.without(sorted(axes)))


def _along(call: _Call) -> Trace:
    """Trace operators that combine the entries of a dimension and keep it, such as softmax."""
    _, grid = call.first()
    return call.anywhere(grid) if grid is None or call.axes() & set(grid.dims) else call.on(grid)


def _layer_norm(call: _Call) -> Trace:
    _, grid = call.first()
    last = -len(call.named["normalized_shape"])
    return call.anywhere(grid) if grid is None or max(grid.dims) >= last else call.on(grid)


def _batch_norm(call: _Call) -> Trace:
    _, grid = call.first()
    return call.anywhere(grid) if grid is None or call.named.get("training") else call.on(grid)


def _group_norm(call: _Call) -> Trace:
    return call.anywhere(call.first()[1])


def _cat(call: _Call) -> Trace:
    trace, parts = call.joined(), call.named["tensors"]
    grid, dim = trace.grid, _from_last(call.named["dim"], call.outputs[0].ndim)
    if grid is None or dim not in grid.dims:
        return trace
    own = [index for index, part in enumerate(parts) if call.of(part) is not None]
    if len(own) > 1 or grid.dims[0] != grid.dims[1]:
        return call.lost()
    before, behind = (sum(part.shape[dim] for part in some) for some in (parts[: own[0]], parts[own[0] + 1 :]))
    return call.on(replace(grid, around=(grid.around[0] + before, grid.around[1] + behind)))


def _stack(call: _Call) -> Trace:
    trace = call.joined()
    if trace.grid is None:
        return trace
    return replace(trace, grid=trace.grid.beside(_from_last(call.named["dim"], call.outputs[0].ndim)))


def _pad(call: _Call) -> Trace:
    _, grid = call.first()
    sides = call.named["pad" if "pad" in call.named else "padding"]
    before = {-1 - i: sides[2 * i] for i in range(len(sides) // 2)}
    if grid is None or (grid.dims[0] == grid.dims[1] and grid.dims[0] in before):
        return call.lost()
    y, x = (axis.windows(1, 1, before.get(dim, 0), 1) for axis, dim in zip((grid.y, grid.x), grid.dims, strict=True))
    return call.on(replace(grid, y=y, x=x))


def _shuffled(call: _Call) -> Trace:
    """Trace operators that reorder, add or remove entries in the dimensions in their arguments."""
    _, grid = call.first()
    axes = call.axes("dims" if "dims" in call.named else "dim")
    return call.lost() if grid is None or axes & set(grid.dims) else call.on(grid)


def _constant(call: _Call) -> None:
    """Trace operators that read only the shape of their argument."""


def _viewed(call: _Call) -> list[Trace | None]:
    """Trace views: the strides of a tensor without data show where entries are."""
    value, grid = call.first()
    if grid is None:
        return [call.lost()] * len(call.outputs)
    blank = torch.empty(value.shape, device="meta")
    rest = dict(list(call.named.items())[1:])
    shown = list(_tensors([call.func(blank, **rest)]))
    found = [_located(grid, list(value.shape), one) for one in shown]
    return [call.lost() if one is None else call.on(one) for one in found]


def _located(grid: Grid, shape: Sequence[int], view: Tensor) -> Grid | None:
    """Return the grid of a view of a contiguous tensor; None if its positions are not on a grid."""
    (dy, dx), (H, W) = grid.dims, grid.shape
    inner, offset = prod(shape[len(shape) + dx + 1 :]), view.storage_offset()
    seen = [(dim, n, step) for dim, (n, step) in enumerate(zip(view.shape, view.stride(), strict=True), -view.ndim)]
    seen = [entry for entry in seen if entry[1] > 1 and entry[2] > 0]
    if dy == dx:
        length = shape[dx]
        if sum(grid.around):  # tokens are kept, or the extra ones are cut off
            for dim, n, step in seen:
                if step == inner and n == length:
                    return replace(grid, dims=(dim, dim))
                if step == inner and n == H * W and offset % (inner * length) == grid.around[0] * inner:
                    return replace(grid, dims=(dim, dim), around=(0, 0))
            return None
    steps = (inner * W if dy == dx else prod(shape[len(shape) + dy + 1 :])), inner
    ends = steps[0] * H, steps[1] * W
    places: list[tuple[int, Axis] | None] = [None, None]
    for dim, n, step in seen:
        last = step * (n - 1)
        if (step, n) == (inner, H * W) and steps[0] == inner * W and 1 not in (H, W):
            return replace(grid, dims=(dim, dim))  # rows and columns in one
        for k, axis in enumerate((grid.y, grid.x)):
            if last < steps[k] or step >= ends[k]:
                continue  # a dimension further in, or further out
            if step % steps[k] or last >= ends[k] or places[k] is not None:
                return None
            first = int(offset) % ends[k] // steps[k]
            places[k] = dim, replace(axis, jump=axis.jump * (step // steps[k]), start=axis.start + first * axis.jump)
    if places[0] is None or places[1] is None:
        return None
    (y_dim, y), (x_dim, x) = places[0], places[1]
    return Grid((y_dim, x_dim), (view.shape[y_dim], view.shape[x_dim]), y, x)


def _names(words: str) -> list[str]:
    return [f"aten.{word}" for word in words.split()]


_VIEWS = frozenset(
    _names(
        "view _unsafe_view _reshape_alias permute transpose t unsqueeze squeeze expand select unbind slice narrow split"
        " split_with_sizes chunk unsafe_split unsafe_split_with_sizes unsafe_chunk unfold diagonal"
    )
)

_Rule = Callable[[_Call], Trace | None]

_RULES: dict[str, _Rule] = {
    name: rule
    for rule, names in (
        (_windows, ["widefield.depthwise"]),
        (_windows, _names("convolution max_pool2d_with_indices mkldnn_max_pool2d avg_pool2d")),
        (_windows, _names("max_pool3d_with_indices avg_pool3d")),
        (_routed, ["widefield.routed"]),
        (_adaptive, _names("_adaptive_avg_pool2d adaptive_max_pool2d mkldnn_adaptive_avg_pool2d")),
        (_product, _names("mm addmm bmm baddbmm")),
        (_reduction, _names("mean sum prod amax amin max min any all var var_mean std logsumexp linalg_vector_norm")),
        (_along, _names("_softmax _log_softmax cumsum sort topk")),
        (_layer_norm, _names("native_layer_norm _fused_rms_norm")),
        (_group_norm, _names("native_group_norm")),
        (_batch_norm, _names("native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit")),
        (_batch_norm, _names("_native_batch_norm_legit_no_training")),
        (_cat, _names("cat")),
        (_stack, _names("stack")),
        (_pad, _names("constant_pad_nd reflection_pad2d replication_pad2d")),
        (_shuffled, _names("roll flip glu")),
        (_Call.lost, _names("repeat pixel_shuffle pixel_unshuffle channel_shuffle as_strided as_strided_ im2col")),
        (_Call.joined, _names("copy_ clone _to_copy detach alias lift_fresh fill_ masked_fill_")),
        # Elementwise, but not tagged as such by PyTorch.
        (_Call.joined, _names("hardswish hardswish_ gelu_ mish_ _prelu_kernel log_sigmoid_forward rrelu_with_noise")),
        (_Call.joined, _names("rsub floor_divide bernoulli")),
        (_constant, _names("empty_like zeros_like ones_like full_like rand_like randn_like")),
        (_constant, _names("new_zeros new_ones new_empty new_full _local_scalar_dense")),
    )
    for name in names
}
