"""Deformable sampling of DCNv3: Wang et al., "InternImage: Exploring Large-Scale Vision Foundation Models with
Deformable Convolutions", CVPR 2023, section 3.1, eq. 2 without its projections.

For every pixel p0 and group g, with K points on a fixed grid p_k, moved by offsets d and weighted by a mask m::

    y_g(p0) = sum_k m_gk(p0) x_g(p0 + s (p_k + d_gk(p0)))

Positions between pixels are interpolated bilinearly from four neighbors; pixels outside are zero. Three backends
compute the same function:

- ``"bags"``: the map is a table with a row for each pixel and group, and an output is a weighted sum of rows, which
  PyTorch calls an embedding bag; one for each of the four neighbors. Nothing as large as K maps is ever written, and
  only the inputs are kept for the backward pass.
- ``"gather"``: indexing and arithmetic; the reference. It supports every kind of differentiation in PyTorch.
- ``"grid"``: torch.nn.functional.grid_sample, which is exported to ONNX since other runtimes have it, too. It writes K
  maps.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from widefield import _checks
from widefield.ops._problem import is_batch_of_gradients, is_exported, is_scripted_for_onnx, size_of

BACKENDS = ("auto", "bags", "gather", "grid")


class Sampling(NamedTuple):
    """The sampling grid of :func:`dcnv3`. The fields are its arguments."""

    kernel_size: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    offset_scale: float = 1.0
    remove_center: bool = False

    @property
    def points(self) -> int:
        """Points of a group: K."""
        return self.kernel_size**2 - self.remove_center

    @property
    def reach(self) -> int:
        """Pixels from the grid's first point to its center. If the kernel is even, its last point is one further."""
        return self.dilation * (self.kernel_size - 1) // 2

    def output_size(self, side: int) -> int:
        """Return the number of output rows (columns) for a number of input rows (columns)."""
        return (side + 2 * self.padding - self.dilation * (self.kernel_size - 1) - 1) // self.stride + 1

    def checked(self) -> Sampling:
        """Return this with every field in canonical form; raise TypeError or ValueError."""
        kernel_size = _checks.integer("kernel_size", self.kernel_size)
        if self.remove_center and (kernel_size % 2 == 0 or kernel_size == 1):
            raise ValueError(f"remove_center needs an odd kernel_size of at least 3; got {kernel_size}.")
        return Sampling(
            kernel_size,
            _checks.integer("stride", self.stride),
            _checks.integer("padding", self.padding, minimum=0),
            _checks.integer("dilation", self.dilation),
            _checks.integer("groups", self.groups),
            _checks.number("offset_scale", self.offset_scale),
            bool(self.remove_center),
        )


def dcnv3(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Sum weighted samples of x at given points, for each pixel and group: eq. 2 without projections.

    Points are counted with the column slow and the row fast, those of a group after those of the one before.

    Args:
        x: (N, H, W, C), channels last.
        offset: (N, Ho, Wo, groups * K * 2), per point (columns, rows) in pixels, with
            ``Ho = (H + 2 padding - dilation (kernel_size - 1) - 1) // stride + 1``, and likewise Wo.
        mask: (N, Ho, Wo, groups * K), the weights; not normalized here.
        kernel_size: the grid has ``K = kernel_size**2`` points; any size.
        stride, padding, dilation: of the grid, as in a convolution.
        groups: number of groups; each has its own points for its ``C / groups`` channels.
        offset_scale: multiplies the offsets, and the grid too.
        remove_center: leave out the point at the center; the kernel must be odd then.
        backend: "auto", "bags", "gather" or "grid".

    Returns:
        (N, Ho, Wo, C) in x's dtype. Computed in float32 at least, also under autocast: bfloat16 has eight binary
        digits and cannot tell column 256 from 257, let alone what lies between.

    Raises:
        ValueError: shapes that do not fit together, a map smaller than the kernel, numbers out of range, an unknown
            backend, or one that cannot compute this call.
        TypeError: tensors that hold no floating-point numbers, arguments that are no integers.
    """
    sampling = Sampling(kernel_size, stride, padding, dilation, groups, offset_scale, remove_center).checked()
    _check(x, offset, mask, sampling)
    way = _resolve(backend, x)
    if is_scripted_for_onnx():
        return grid_sampled(x, offset, mask, sampling)
    if way == "gather":
        return _gather(x, offset, mask, sampling)
    if way == "grid":
        return _grid(x, offset, mask, sampling)
    if is_exported():  # a graph of PyTorch's own operators, which are differentiable
        return _bags(x, offset, mask, sampling)
    y: Tensor = _Bags.apply(x, offset, mask, sampling)
    return y


def sampling_points(offset: Tensor, size: tuple[int, int], sampling: Sampling) -> Tensor:
    """Return the points that :func:`dcnv3` reads: (N, Ho, Wo, groups, K, 2), each (column, row), from 0.

    Args:
        offset: as in :func:`dcnv3`, of a map of ``size`` (H, W).
        size: rows and columns of the map.
        sampling: the other arguments.
    """
    expected = (sampling.output_size(size[0]), sampling.output_size(size[1]))
    if tuple(offset.shape[1:3]) != expected:
        raise ValueError(f"a map of {size} has offsets of {expected} pixels; got {tuple(offset.shape)}.")
    return torch.stack(_points(offset, sampling), -1)


def grid_sampled(x: Tensor, offset: Tensor, mask: Tensor, sampling: Sampling) -> Tensor:
    """Return :func:`dcnv3` by F.grid_sample, unchecked, in a form that torch.fx traces for inputs of any size and type.

    Hence it neither looks at a size or dtype, nor makes a tensor but from an argument.
    """
    wide = offset.new_zeros((1,), dtype=torch.float32)  # what it is added to has at least this type
    own = (offset + wide).unflatten(-1, (sampling.groups, sampling.points, 2))
    index = _counted(own[:1, :1, :1, :1, :, 0], -1)  # of a point: columns slow, rows fast
    if sampling.remove_center:
        index = index + (index >= sampling.kernel_size**2 // 2).type_as(index)
    column = (index / sampling.kernel_size).floor()
    grid = column, index - column * sampling.kernel_size
    starts = _counted(own[:1, :1, :, :1, :1, 0], 2), _counted(own[:1, :, :1, :1, :1, 0], 1)
    places = []
    for axis, side in enumerate((x.size(2), x.size(1))):
        taps = (grid[axis] * sampling.dilation - sampling.reach) * sampling.offset_scale
        start = starts[axis] * sampling.stride + (sampling.reach - sampling.padding)
        at = start + taps + own[..., axis] * sampling.offset_scale
        places.append((2 * at.clamp(-1, side) + 1) / side - 1)  # the outer edges of the map are -1 and 1
    groups = (sampling.groups, -1)
    maps = (x + wide).unflatten(-1, groups).permute(0, 3, 4, 1, 2).flatten(0, 1)
    at = torch.stack(places, -1).permute(0, 3, 1, 2, 4, 5).flatten(0, 1).flatten(1, 2)
    weights = (mask + wide).unflatten(-1, groups).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)
    y = F.grid_sample(maps, at, align_corners=False).mul(weights.unsqueeze(1)).sum(-1)  # (N groups, C_g, Ho Wo)
    y = y.reshape(x.size(0), x.size(3), -1).permute(0, 2, 1)
    return y.reshape(x.size(0), offset.size(1), offset.size(2), x.size(3)).type_as(x)


def _counted(like: Tensor, dim: int) -> Tensor:
    """Return 0, 1, 2, ... along a dimension."""
    ones = (like * 0).nan_to_num() + 1  # torch.onnx.export(dynamo=False) makes a constant of ones_like
    return ones.cumsum(dim) - 1


def why_not(backend: str, x: Tensor) -> str | None:
    """Return why ``backend`` cannot sample ``x``, or None if it can."""
    if backend == "grid" and forward_ad._current_level >= 0:
        return "PyTorch's grid_sample has no forward-mode derivative"
    if backend != "bags":
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "forward-mode derivatives and torch.func's transforms see through plain operations alone"
    if x.device.type not in ("cpu", "cuda", "meta"):
        return f"weighted embedding bags have not been tried on {x.device.type}"
    return None


def _resolve(backend: str, x: Tensor) -> str:
    backend = _checks.choice("backend", backend, BACKENDS)
    reason = why_not("bags" if backend == "auto" else backend, x)
    if backend == "auto":
        return "bags" if reason is None else "gather"
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot sample this: {reason}. backend='auto' takes one that can.")
    return backend


def _check(x: Tensor, offset: Tensor, mask: Tensor, sampling: Sampling) -> None:
    for name, tensor in (("x", x), ("offset", offset), ("mask", mask)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must hold floating-point numbers; got {tensor.dtype}.")
    if x.ndim != 4:
        raise ValueError(f"x must be (N, H, W, C), channels last; got shape {tuple(x.shape)}.")
    batch, height, width, channels = size_of(x)
    if channels % sampling.groups:
        raise ValueError(f"the channels of x must be divisible by groups; got {channels} and {sampling.groups}.")
    rows, columns = sampling.output_size(height), sampling.output_size(width)
    if rows < 1 or columns < 1:
        extent = sampling.dilation * (sampling.kernel_size - 1) + 1
        raise ValueError(
            f"a map of {height}x{width} with padding {sampling.padding} is smaller than the kernel, which spans "
            f"{extent} pixels."
        )
    count = sampling.groups * sampling.points
    for name, tensor, last in (("offset", offset, 2 * count), ("mask", mask, count)):
        if size_of(tensor) != (batch, rows, columns, last):
            raise ValueError(
                f"{name} must be (N, Ho, Wo, {'groups * K * 2' if name == 'offset' else 'groups * K'}) = "
                f"{(batch, rows, columns, last)} for x of {tuple(x.shape)}, groups={sampling.groups} and "
                f"K={sampling.points} points; got {tuple(tensor.shape)}."
            )


def _points(offset: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the columns and the rows of all points: each (N, Ho, Wo, groups, K)."""
    _, rows, columns, _ = offset.shape
    own = offset.unflatten(-1, (sampling.groups, sampling.points, 2))
    size, scale = sampling.kernel_size, sampling.offset_scale
    taps = (torch.arange(size, device=offset.device) * sampling.dilation - sampling.reach).to(offset.dtype) * scale
    grid = torch.stack((taps.repeat_interleave(size), taps.repeat(size)))  # columns slow, rows fast
    if sampling.remove_center:
        center = size**2 // 2
        grid = torch.cat((grid[:, :center], grid[:, center + 1 :]), 1)
    start = sampling.reach - sampling.padding
    x0, y0 = (torch.arange(n, device=offset.device) * sampling.stride + start for n in (columns, rows))
    x = torch.add(x0[:, None, None] + grid[0], own[..., 0], alpha=scale)
    y = torch.add(y0[:, None, None, None] + grid[1], own[..., 1], alpha=scale)
    return x, y


class _Read(NamedTuple):
    """A call of the operator, as lookups in a table."""

    table: Tensor
    """(rows, C / groups): every pixel of every group, in the order of x, with zeros around each map."""
    first: Tensor
    """(N, Ho, Wo, groups, K): the row of the upper left of the four neighbors of each point."""
    shifts: tuple[int, int, int, int]
    """Offsets from there to the rows of the four: upper left, upper right, lower left, lower right."""
    right: Tensor
    """How far right of the first a point lies, from 0 to 1. This field and the next two are shaped as ``first``."""
    down: Tensor
    weight: Tensor
    """The mask."""

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the weight of each of the four neighbors, mask included."""
        lower = self.weight * self.down
        upper = self.weight - lower
        lower_right, upper_right = lower * self.right, upper * self.right
        return upper - upper_right, upper_right, lower - lower_right, lower_right


# Zeros before the first row and column and two after the last, so that all neighbors of a point are in the table that
# lies at most one pixel outside; points further out are moved there, where all they read is zero.
_BEFORE, _AROUND = 1, 3


def _read(x: Tensor, mask: Tensor, points: tuple[Tensor, Tensor], groups: int) -> _Read:
    """Return the lookups of a call. Differentiable in ``right``, ``down``, ``weight`` and ``table``."""
    batch, height, width, channels = x.shape
    dtype, device = points[0].dtype, x.device
    table = F.pad(x, (0, 0, 1, 2, 1, 2)).to(dtype).reshape(-1, channels // groups)
    x_at, y_at = (at.clamp(-1, side) for at, side in zip(points, (width, height), strict=True))
    left, top = x_at.detach().floor(), y_at.detach().floor()
    line = (width + _AROUND) * groups
    maps = torch.arange(batch, device=device).view(-1, 1, 1, 1, 1) * ((height + _AROUND) * line)
    origin = maps + torch.arange(groups, device=device)[:, None] + _BEFORE * (line + groups)
    first = origin + top.long() * line + left.long() * groups
    shifts = (0, groups, line, line + groups)
    first = first.clamp(
        0, table.shape[0] - 1 - shifts[-1]
    )  # NaN becomes an arbitrary integer, which must not read out of bounds
    weight = mask.to(dtype).view(first.shape)
    return _Read(table, first, shifts, x_at - left, y_at - top, weight)


def _wide(x: Tensor, offset: Tensor, mask: Tensor) -> torch.dtype:
    dtype = torch.promote_types(torch.promote_types(x.dtype, offset.dtype), mask.dtype)
    return torch.promote_types(dtype, torch.float32)


def _gather(x: Tensor, offset: Tensor, mask: Tensor, sampling: Sampling) -> Tensor:
    points = _points(offset.to(_wide(x, offset, mask)), sampling)
    read = _read(x, mask, points, sampling.groups)
    terms = zip(read.shifts, read.weights(), strict=True)
    parts = (_rows(read.table, read.first + shift) * weight[..., None] for shift, weight in terms)
    y = functools.reduce(torch.add, (part.sum(-2) for part in parts))
    return y.flatten(-2).to(x.dtype)


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    """Return rows of a table: (..., C). Indexing with brackets has no batched second derivative."""
    return table.index_select(0, rows.flatten()).view(*rows.shape, table.shape[1])


def _grid(x: Tensor, offset: Tensor, mask: Tensor, sampling: Sampling) -> Tensor:
    """Sample groups as images of a batch, at (pixels, points) instead of rows and columns."""
    (batch, height, width, channels), groups = x.shape, sampling.groups
    dtype = _wide(x, offset, mask)
    sides = (width, height)
    # From pixels to grid_sample's coordinates: the outer edges of the map are -1 and 1.
    points = zip(_points(offset.to(dtype), sampling), sides, strict=True)
    at = torch.stack([(2 * p.clamp(-1, side) + 1) / side - 1 for p, side in points], -1)
    maps = x.to(dtype).view(batch, height, width, groups, channels // groups).permute(0, 3, 4, 1, 2).flatten(0, 1)
    at = at.permute(0, 3, 1, 2, 4, 5).flatten(0, 1).flatten(1, 2)
    weights = mask.to(dtype).unflatten(-1, (groups, sampling.points)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)
    y: Tensor = F.grid_sample(maps, at, align_corners=False).mul(weights[:, None]).sum(-1)  # (N groups, C_g, Ho Wo)
    y = y.unflatten(0, (batch, groups)).permute(0, 3, 1, 2).reshape(*offset.shape[:3], channels)
    return y.to(x.dtype)


def _bags(x: Tensor, offset: Tensor, mask: Tensor, sampling: Sampling) -> Tensor:
    points = _points(offset.to(_wide(x, offset, mask)), sampling)
    read = _read(x, mask, points, sampling.groups)
    y: Tensor | None = None
    for shift, weight in zip(read.shifts, read.weights(), strict=True):
        term = _sum((read.first + shift).flatten(0, -2), read.table, weight.flatten(0, -2))
        y = term if y is None else y.add_(term)
    size = (*offset.shape[:3], x.shape[-1])
    if is_exported():
        return cast(Tensor, y).view(size).to(x.dtype)
    flat = torch.ops.aten._unsafe_view(y, size)  # a view returned by a Function could not be modified in place
    return cast(Tensor, flat).to(x.dtype)


class _Bags(torch.autograd.Function):
    """A derivative for :func:`_bags` that is several times as fast as the one of embedding bags, which sorts by every
    row that is read, and that keeps nothing but the inputs.

    With t_c the rows that a point reads and w_c what they count, its part of the output is ``sum_c w_c t_c``. The
    gradient of w_c is the product of t_c with the gradient of the output; those of the mask and of the point's place
    follow from the bilinear form of w_c. A row's gradient sums over the points that read it: these are sorted by their
    first row, which makes them bags again, and the four neighbors of a row are read by the same points.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, mask: Tensor, sampling: Sampling) -> Tensor:
        ctx.save_for_backward(x, offset, mask)
        ctx.sampling = sampling
        return _bags(x, offset, mask, sampling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, wanted = ctx.saved_tensors, ctx.needs_input_grad[:3]
        x, offset, mask = inputs
        sampling: Sampling = ctx.sampling
        again = torch.is_grad_enabled()
        if again or is_batch_of_gradients(grad):  # for second derivatives, or batched gradients
            with torch.enable_grad():
                y = _gather(x, offset, mask, sampling)
            wanted_of = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
            found = iter(torch.autograd.grad(y, wanted_of, grad, create_graph=again))
            return *(next(found) if want else None for want in wanted), None
        points = _points(offset.to(_wide(x, offset, mask)), sampling)
        read = _read(x, mask, points, sampling.groups)
        grad = grad.to(read.table.dtype).reshape(-1, read.table.shape[1])
        of_x = _grad_of_map(read, grad, x) if wanted[0] else None
        of_offset, of_mask = None, None
        if wanted[1] or wanted[2]:
            upper, upper_right, lower, lower_right = _products(read, grad)
            top, bottom = torch.lerp(upper, upper_right, read.right), torch.lerp(lower, lower_right, read.right)
            of_mask = torch.lerp(top, bottom, read.down).view(mask.shape).to(mask.dtype)
            x_slope = torch.lerp(upper_right - upper, lower_right - lower, read.down)
            slopes = (x_slope, bottom - top)
            sides = (x.shape[2], x.shape[1])
            inside = (
                torch.where((at >= -1) & (at <= side), slope * read.weight * sampling.offset_scale, 0)
                for at, side, slope in zip(points, sides, slopes, strict=True)
            )
            of_offset = torch.stack(tuple(inside), -1).view(offset.shape).to(offset.dtype)
        return of_x, of_offset, of_mask, None


def _sum(rows: Tensor, table: Tensor, weights: Tensor, starts: Tensor | None = None) -> Tensor:
    """Sum rows of a table by weights: rows and weights (bags, any), or, with ``starts`` of bags, (all,)."""
    if starts is None:
        starts = torch.arange(rows.shape[0], device=rows.device, dtype=rows.dtype) * rows.shape[1]
    # torch.nn.functional's compares sizes, of which torch.jit.trace warns.
    bags, *_ = torch.embedding_bag(table, rows.flatten(), starts, False, 0, False, weights.flatten())
    return bags


def _products(read: _Read, grad: Tensor) -> Sequence[Tensor]:
    """Return, for each of the four neighbors, the products of the rows read with ``grad`` (N Ho Wo groups, C_g)."""
    count, points, total = grad.shape[0], read.first.shape[-1], read.table.shape[0]
    starts = torch.arange(count + 1, device=grad.device) * points
    if _takes_sparse(grad) and points <= total:  # a sparse matrix has at most as many entries as a full one
        ones = grad.new_ones(count * points)

        def product(rows: Tensor) -> Tensor:
            wanted = torch.sparse_csr_tensor(starts, rows, ones, (count, total), check_invariants=False)
            found: Tensor = torch.sparse.sampled_addmm(wanted, grad, read.table.t(), beta=0.0)
            return found.values()
    else:
        bag = torch.arange(count, device=grad.device).repeat_interleave(points)

        def product(rows: Tensor) -> Tensor:  # half as fast on CPUs
            function = torch.ops.aten._embedding_bag_per_sample_weights_backward
            found: Tensor = function(grad, read.table, rows, starts[:-1], bag, 0)
            return found

    return [product((read.first + shift).flatten()).view(read.first.shape) for shift in read.shifts]


def _takes_sparse(x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # which traces no sparse matrices
        return False
    _settle_warning()
    return True


@functools.cache
def _settle_warning() -> None:
    """Trigger and suppress PyTorch's one-time warning that sparse matrices are in beta. None of ours is returned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def _grad_of_map(read: _Read, grad: Tensor, x: Tensor) -> Tensor:
    rows = read.table.shape[0]
    keys = read.first.flatten()
    row, order = (keys.int() if rows < 1 << 31 else keys).sort()  # half the digits, half the time
    starts = torch._convert_indices_from_coo_to_csr(row, rows)[:-1]
    bag = order.div(read.first.shape[-1], rounding_mode="floor")
    of_table = torch.zeros_like(read.table)
    for shift, weight in zip(read.shifts, read.weights(), strict=True):
        term = _sum(bag, grad, weight.flatten().index_select(0, order), starts)
        of_table[shift:] += term[: rows - shift]
    batch, height, width, _ = x.shape
    padded = of_table.view(batch, height + _AROUND, width + _AROUND, x.shape[3])
    return padded[:, _BEFORE : height + _BEFORE, _BEFORE : width + _BEFORE].to(x.dtype).contiguous()
