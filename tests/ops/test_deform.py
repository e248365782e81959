"""DCNv3's sampling against the papers' code (fixtures), a float64 reference of loops, and a convolution."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conformance import OPERATORS_WITHIN, array, operators
from hypothesis import given, settings
from hypothesis import strategies as st

from tolerances import BFLOAT16, FLOAT32, FLOAT64, NETWORK, close
from widefield.ops import deform
from widefield.ops.deform import Sampling, dcnv3, sampling_points

CASES = [name for name, case in operators().items() if name.startswith("dcnv3_") and "mask" in case]
EVERY = ("bags", "gather", "grid")
every = pytest.mark.parametrize("backend", EVERY)


def inputs(sampling, batch=2, height=5, width=6, channels=None, dtype=torch.float64, spread=1.5):
    """Draw x, offset and mask. Offsets avoid whole pixels, where sampling is not differentiable."""
    rows, columns = sampling.output_size(height), sampling.output_size(width)
    count = sampling.groups * sampling.points
    x = torch.randn(batch, height, width, channels or 2 * sampling.groups)
    whole = (spread * torch.randn(batch, rows, columns, 2 * count)).round()
    offset = whole + 0.1 + 0.8 * torch.rand_like(whole)
    mask = torch.rand(batch, rows, columns, count)
    return [t.to(dtype).requires_grad_() for t in (x, offset, mask)]


def run(tensors, sampling, backend="auto"):
    return dcnv3(*tensors, **sampling._asdict(), backend=backend)


def gradients(y, tensors):
    return torch.autograd.grad(y.square().sum(), tensors)


def pixel(image, row, column):
    """Interpolate ``image`` (H, W, C) between pixels, with zeros outside."""
    height, width, channels = image.shape
    top, left = math.floor(row.detach()), math.floor(column.detach())
    value = image.new_zeros(channels)
    for i, j in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= i < height and 0 <= j < width:
            value = value + image[i, j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return value


def oracle(x, offset, mask, sampling):
    k, groups, scale = sampling.kernel_size, sampling.groups, sampling.offset_scale
    half = sampling.dilation * (k - 1) // 2
    grid = [
        (sampling.dilation * i - half, sampling.dilation * j - half) for i in range(k) for j in range(k)
    ]  # (dx, dy)
    if sampling.remove_center:
        grid.remove((0, 0))
    width = x.shape[3] // groups
    batch, rows, columns, _ = offset.shape
    outputs = []
    for n, i, j, g in itertools.product(range(batch), range(rows), range(columns), range(groups)):
        image = x[n, :, :, g * width : (g + 1) * width]
        value = image.new_zeros(width)
        for p, (dx, dy) in enumerate(grid):
            at = g * len(grid) + p
            move_x, move_y = offset[n, i, j, 2 * at], offset[n, i, j, 2 * at + 1]
            column = j * sampling.stride - sampling.padding + half + scale * (dx + move_x)
            row = i * sampling.stride - sampling.padding + half + scale * (dy + move_y)
            value = value + mask[n, i, j, at] * pixel(image, row, column)
        outputs.append(value)
    return torch.stack(outputs).view(batch, rows, columns, -1) if outputs else x.new_zeros(0, rows, columns, x.shape[3])


@every
@pytest.mark.parametrize("name", CASES)
def test_fixtures(name, backend):
    case = operators()[name]
    config = case["config"]
    keys = ("kernel", "stride", "pad", "dilation", "groups", "offset_scale", "remove_center")
    sampling = Sampling(*(config[key] for key in keys))
    tensors = [array(case[key]).requires_grad_() for key in ("input", "offset", "mask")]
    y = run(tensors, sampling, backend)
    pairs = [(y, "output")]
    pairs += zip(gradients(y, tensors), ("grad_input", "grad_offset", "grad_mask"), strict=True)
    for actual, key in pairs:
        if key in case:
            expected = array(case[key])
            assert actual.shape == expected.shape
            assert ((actual - expected).abs() / expected.abs().clamp(min=1)).max() <= OPERATORS_WITHIN


@every
@given(
    sampling=st.builds(
        Sampling,
        kernel_size=st.sampled_from((1, 2, 3, 5)),
        stride=st.integers(1, 3),
        padding=st.integers(0, 3),
        dilation=st.integers(1, 2),
        groups=st.integers(1, 3),
        offset_scale=st.sampled_from((0.0, 0.5, 1.0, 2.0)),
        remove_center=st.booleans(),
    ),
    size=st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6)),
    spread=st.sampled_from((0.5, 2.0, 20.0)),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=30)
def test_output_and_gradients_are_the_oracles(backend, sampling, size, spread, seed):
    torch.manual_seed(seed)
    sampling = sampling._replace(remove_center=sampling.remove_center and sampling.kernel_size in (3, 5))
    batch, height, width = size
    while min(sampling.output_size(height), sampling.output_size(width)) < 1:
        sampling = sampling._replace(padding=sampling.padding + 1)
    tensors = inputs(sampling, batch, height, width, spread=spread)
    expected = oracle(*tensors, sampling)
    y = run(tensors, sampling, backend)
    close(y, expected, FLOAT64)
    wanted = torch.autograd.grad(expected.square().sum(), tensors, materialize_grads=True)
    for actual, one in zip(gradients(y, tensors), wanted, strict=True):
        close(actual, one, FLOAT64)


@every
def test_derivatives_of_first_and_second_order(backend):
    sampling = Sampling(groups=2)
    tensors = inputs(sampling, height=4, width=3)
    assert torch.autograd.gradcheck(lambda *t: run(t, sampling, backend), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: run(t, sampling, backend), tensors, fast_mode=True)


@every
def test_only_the_gradients_that_are_wanted(backend):
    sampling = Sampling()
    whole = inputs(sampling)
    expected = gradients(run(whole, sampling), whole)
    for index in range(3):
        tensors = [t.detach() for t in whole]
        tensors[index].requires_grad_()
        y = run(tensors, sampling, backend)
        close(gradients(y, [tensors[index]])[0], expected[index], FLOAT64)
        y = run(tensors, sampling, backend)
        (again,) = torch.autograd.grad(y.square().sum(), tensors[index], create_graph=True)
        close(again, expected[index], FLOAT64)


@every
def test_without_offsets_it_is_a_convolution(backend):
    sampling = Sampling(stride=2, padding=2, dilation=2, groups=3)
    x, offset, _ = inputs(sampling, height=7, width=8)
    kernels = torch.randn(3, 3, 3, dtype=torch.double)  # (group, row, column)
    mask = kernels.transpose(1, 2).reshape(-1).expand(*offset.shape[:3], -1)
    weight = kernels.repeat_interleave(2, 0)[:, None]
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, stride=2, padding=2, dilation=2, groups=6).permute(0, 2, 3, 1)
    close(run((x, torch.zeros_like(offset), mask), sampling, backend), expected, FLOAT64)


@every
def test_groups_are_calls_of_their_own(backend):
    sampling = Sampling(kernel_size=3, groups=4)
    x, offset, mask = inputs(sampling, batch=3)
    parts = zip(x.chunk(4, -1), offset.chunk(4, -1), mask.chunk(4, -1), strict=True)
    expected = torch.cat([run(part, sampling._replace(groups=1), backend) for part in parts], -1)
    close(run((x, offset, mask), sampling, backend), expected, FLOAT64)


@every
@pytest.mark.parametrize("far", [1e6, -1e6, 1e30, math.inf, -math.inf])
def test_points_far_outside_are_zero_and_have_no_gradient(backend, far):
    tensors = inputs(Sampling(), dtype=torch.float32)
    tensors[1] = torch.full_like(tensors[1], far).requires_grad_()
    y = run(tensors, Sampling(), backend)
    for value in (y, *gradients(y, tensors)):
        assert not value.any()  # NaN would count as true


@every
def test_a_point_that_is_no_number_spoils_its_pixel_alone(backend):
    tensors = inputs(Sampling())
    with torch.no_grad():
        tensors[1][0, 2, 3, 5] = math.nan
    bad = run(tensors, Sampling(), backend).isnan().any(-1).nonzero().tolist()
    assert bad == [[0, 2, 3]]


@every
def test_no_images(backend):
    sampling = Sampling(groups=2)
    tensors = inputs(sampling, batch=0)
    y = run(tensors, sampling, backend)
    assert y.shape == (0, 5, 6, 4)
    assert [g.shape for g in gradients(y, tensors)] == [t.shape for t in tensors]


@every
def test_any_strides_in_memory(backend):
    sampling = Sampling(groups=2)
    tensors = inputs(sampling)
    x, offset, mask = (t.detach() for t in tensors)
    strided = [
        x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        torch.stack((offset, offset))[0].transpose(1, 2).contiguous().transpose(1, 2),
        mask.flip(0).flip(0).expand_as(mask),
    ]
    strided = [t.requires_grad_() for t in strided]
    y, expected = run(strided, sampling, backend), run(tensors, sampling)
    close(y, expected, FLOAT64)
    grad = torch.randn_like(y).transpose(1, 2).contiguous().transpose(1, 2)
    for actual, wanted in zip(
        torch.autograd.grad(y, strided, grad), torch.autograd.grad(expected, tensors, grad.contiguous()), strict=True
    ):
        close(actual, wanted, FLOAT64)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_are_computed_in_32(backend, dtype, autocast):
    sampling = Sampling(groups=2)
    narrow = [t.detach().requires_grad_() for t in inputs(sampling, width=400, dtype=dtype)]
    wide = [t.detach().float().requires_grad_() for t in narrow]
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = run(narrow, sampling, backend)
    expected = run(wide, sampling, backend)
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))  # also at positions beyond column 256
    for actual, wanted in zip(gradients(y.float(), narrow), gradients(expected, wide), strict=True):
        assert actual.dtype == dtype
        close(actual, wanted, BFLOAT16)


def test_mixed_dtypes_take_the_widest_and_give_back_that_of_x():
    tensors = inputs(Sampling())
    expected = run(tensors, Sampling())
    y = run((tensors[0].float(), *tensors[1:]), Sampling())
    assert y.dtype == torch.float32
    close(y, expected, FLOAT32)


def test_float32_is_near_float64_at_the_size_of_a_stage():
    sampling = Sampling(groups=2)
    tensors = inputs(sampling, 1, 56, 56, 32)
    narrow = [t.detach().float().requires_grad_() for t in tensors]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    y, expected = run(narrow, sampling), run(wide, sampling)
    close(y, expected, FLOAT32)
    for actual, wanted in zip(gradients(y, narrow), gradients(expected, wide), strict=True):
        close(actual, wanted, NETWORK)  # between columns 40 and 41 there are 2**18 positions in float32


def test_gradients_are_the_same_to_the_bit_on_every_run():
    tensors = inputs(Sampling(), dtype=torch.float32, spread=3.0)
    first, second = (gradients(run(tensors, Sampling()), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Module(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, x, offset, mask):
        return dcnv3(x, offset, mask, groups=2, backend=self.backend)


@every
def test_export_with_any_batch_and_no_operators_of_ours(backend):
    sampling = Sampling(groups=2)
    tensors = inputs(sampling, batch=3, dtype=torch.float32)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Module(backend), tuple(tensors), dynamic_shapes=({0: batch},) * 3)
    for count in (1, 5):
        fresh = inputs(sampling, batch=count, dtype=torch.float32)
        y = program.module()(*fresh)
        close(y, run(fresh, sampling), FLOAT32)
        for actual, wanted in zip(gradients(y, fresh), gradients(run(fresh, sampling), fresh), strict=True):
            close(actual, wanted, FLOAT32)  # an exported graph can be trained as well
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("widefield" in name for name in names)


@every
def test_compile_traces_training_without_breaks(backend):
    sampling = Sampling(groups=2)
    tensors = inputs(sampling, dtype=torch.float32)
    compiled = torch.compile(Module(backend), backend="aot_eager", fullgraph=True)
    y, expected = compiled(*tensors), run(tensors, sampling)
    close(y, expected, FLOAT32)
    for actual, wanted in zip(gradients(y, tensors), gradients(expected, tensors), strict=True):
        close(actual, wanted, FLOAT32)


def test_transforms_see_through():
    sampling = Sampling(groups=2)
    tensors = inputs(sampling)

    def one(x, offset, mask):
        return run((x[None], offset[None], mask[None]), sampling)[0]

    close(torch.func.vmap(one)(*tensors), run(tensors, sampling), FLOAT64)
    found = torch.func.grad(lambda *t: run(t, sampling).square().sum(), argnums=(0, 1, 2))(*tensors)
    for actual, wanted in zip(found, gradients(run(tensors, sampling), tensors), strict=True):
        close(actual, wanted, FLOAT64)
    with pytest.raises(ValueError, match=r"torch\.func's transforms"):
        torch.func.vmap(lambda *t: dcnv3(*(a[None] for a in t), groups=2, backend="bags"))(*tensors)


def test_meta_tensors_have_shapes():
    tensors = [t.to("meta") for t in inputs(Sampling(stride=2))]
    assert run(tensors, Sampling(stride=2)).shape == (2, 3, 3, 2)


def test_devices_that_bags_have_not_been_tried_on():
    class Elsewhere:
        device = torch.device("mps")

    assert "mps" in deform.why_not("bags", Elsewhere())
    assert deform.why_not("gather", Elsewhere()) is None
    assert deform.why_not("bags", torch.zeros(1)) is None


def test_sampling_points_are_column_and_row_with_columns_slow():
    sampling = Sampling(stride=2, groups=2, offset_scale=2.0)
    offset = torch.zeros(1, 3, 4, 36)
    offset[0, 1, 2, 18 + 2 * 4 : 18 + 2 * 4 + 2] = torch.tensor((0.5, -1.0))  # the center of the second group
    points = sampling_points(offset, (5, 7), sampling)
    assert points.shape == (1, 3, 4, 2, 9, 2)
    assert points[0, 1, 2, 0].tolist() == [[4 + dx, 2 + dy] for dx in (-2, 0, 2) for dy in (-2, 0, 2)]
    assert points[0, 1, 2, 1, 4].tolist() == [5, 0]
    with pytest.raises(ValueError, match=r"\(9, 7\).*\(5, 4\)"):
        sampling_points(offset, (9, 7), sampling)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1; got 0"),
        ({"kernel_size": 3.0}, TypeError, "kernel_size must be an integer"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"padding": -1}, ValueError, "padding must be at least 0; got -1"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"groups": 3}, ValueError, "divisible by groups; got 4 and 3"),
        (
            {"groups": 1},
            ValueError,
            r"offset must be .* = \(2, 5, 6, 18\) for x of \(2, 5, 6, 4\).*got \(2, 5, 6, 36\)",
        ),
        ({"offset_scale": "1"}, TypeError, "offset_scale must be a number"),
        ({"offset_scale": math.nan}, ValueError, "offset_scale must be from 0"),
        ({"kernel_size": 2, "remove_center": True}, ValueError, "odd kernel_size of at least 3; got 2"),
        ({"kernel_size": 1, "remove_center": True}, ValueError, "odd kernel_size of at least 3; got 1"),
        ({"kernel_size": 9, "padding": 0}, ValueError, "a map of 5x6 with padding 0 is smaller .* spans 9 pixels"),
        ({"backend": "bag"}, ValueError, "Did you mean 'bags'"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    sampling = Sampling(groups=2)
    with pytest.raises(error, match=message):
        dcnv3(*inputs(sampling), **{**sampling._asdict(), **change})


def test_bad_tensors_are_refused():
    x, offset, mask = inputs(Sampling(groups=2))
    with pytest.raises(ValueError, match=r"channels last; got shape \(5, 6, 4\)"):
        dcnv3(x[0], offset, mask, groups=2)
    with pytest.raises(ValueError, match=r"mask must be .*\(2, 5, 6, 18\).*got \(2, 5, 6, 9\)"):
        dcnv3(x, offset, mask[..., :9], groups=2)
    with pytest.raises(TypeError, match=r"offset must hold floating-point numbers; got torch\.int64"):
        dcnv3(x, offset.long(), mask, groups=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every
def test_on_gpu(backend):
    sampling = Sampling(groups=4)
    tensors = inputs(sampling, 2, 14, 15, 64)
    moved = [t.detach().float().cuda().requires_grad_() for t in tensors]
    y, expected = run(moved, sampling, backend), run(tensors, sampling)
    close(y.cpu(), expected, FLOAT32)
    for actual, wanted in zip(gradients(y, moved), gradients(expected, tensors), strict=True):
        close(actual.cpu(), wanted, NETWORK)
