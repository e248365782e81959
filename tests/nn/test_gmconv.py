import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import widefield
from tolerances import BFLOAT16, FLOAT32, FLOAT64, close
from widefield.nn import DepthwiseConv2d
from widefield.nn.gmconv import DynamicGMConv2d, GMConv2d, default_sigma, fades_out, gaussian_mask, why_not

BOTH = pytest.mark.parametrize("layer_type", [GMConv2d, DynamicGMConv2d])

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
sigmas = st.floats(0.3, 50)


def offsets(kernel_size):
    """Return (y, x) of every tap relative to the center, row by row."""
    rows, columns = kernel_size
    return [(i - (rows - 1) / 2, j - (columns - 1) / 2) for i in range(rows) for j in range(columns)]


def circle(kernel_size, sigma):
    """Compute eq. 3 and 4 literally."""
    f = [
        math.exp(-(math.hypot(y, x) ** 2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)
        for y, x in offsets(kernel_size)
    ]
    return torch.tensor([value / max(f) for value in f], dtype=torch.double).view(kernel_size)


def ellipse(kernel_size, sigma_1, sigma_2):
    """Compute eq. 5 and 6 literally."""
    f = [
        math.exp(-(x**2 / sigma_1**2 + y**2 / sigma_2**2) / 2) / (2 * math.pi * sigma_1 * sigma_2)
        for y, x in offsets(kernel_size)
    ]
    return torch.tensor([value / max(f) for value in f], dtype=torch.double).view(kernel_size)


def unsettled(layer):
    """Set weights of the predictor so that sigmas depend on the image, within a moderate range."""
    if isinstance(layer, DynamicGMConv2d):
        nn.init.normal_(layer.predictor.out.weight, std=0.3)
        nn.init.uniform_(layer.predictor.out.bias, 1, 2)
    else:
        nn.init.uniform_(layer.sigma, 0.5, 3)
    return layer


def norm_of(channels):
    norm = nn.BatchNorm2d(channels).double().eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


@settings(max_examples=60, deadline=None)
@given(sizes, sigmas, sigmas)
def test_masks_are_the_equations(kernel_size, first, second):
    a, b = torch.tensor([first, second], dtype=torch.double)
    close(gaussian_mask(kernel_size, a), circle(kernel_size, first), FLOAT64)
    close(gaussian_mask(kernel_size, a, b), ellipse(kernel_size, first, second), FLOAT64)
    stacked = gaussian_mask(kernel_size, torch.stack((a, b)), torch.stack((b, a)))
    close(stacked, torch.stack((ellipse(kernel_size, first, second), ellipse(kernel_size, second, first))), FLOAT64)
    assert stacked.amax((1, 2)).eq(1).all()


def test_sigma_1_is_along_x():
    mask = gaussian_mask((5, 5), torch.tensor(3.0), torch.tensor(0.5))
    assert mask[2, 4] > 0.5 > mask[4, 2]
    assert gaussian_mask((2, 4), torch.tensor(1.0))[0, 1] == 1  # the nearest taps of an even kernel


def test_masks_of_half_precision_sigmas_are_computed_in_float32():
    assert gaussian_mask((31, 31), torch.tensor(5.0).bfloat16()).dtype == torch.float32


layers = {
    "groups": st.integers(1, 3),
    "per_in": st.integers(1, 2),
    "per_out": st.integers(1, 2),
    "kernel_size": st.tuples(st.integers(1, 5), st.integers(1, 5)),
    "stride": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    "padding": st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 3), st.integers(0, 3))),
    "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    "bias": st.booleans(),
    "padding_mode": st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
}


def convolution(groups, per_in, per_out, kernel_size, stride, padding, dilation, bias, padding_mode):
    stride = (1, 1) if padding == "same" else stride
    return nn.Conv2d(
        groups * per_in, groups * per_out, kernel_size, stride, padding, dilation, groups, bias, padding_mode
    ).double()


def plain(conv, kernel, x):
    """Return the output of a convolution with another kernel, or with one for each sample."""
    if kernel.ndim == 5:
        return torch.cat([plain(conv, k, x[i : i + 1]) for i, k in enumerate(kernel)])
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode)
    return F.conv2d(x, kernel, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


@settings(max_examples=80, deadline=None)
@given(sigma=st.floats(0.3, 20), n=st.integers(1, 3), **layers)
def test_static_outputs_and_gradients_are_those_of_the_masked_kernel(sigma, n, **arguments):
    conv = convolution(**arguments)
    assume(why_not(conv) is None)
    layer = GMConv2d.from_conv2d(conv, init="random", sigma=sigma).double()
    conv.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "sigma"})
    x = torch.randn(n, conv.in_channels, 11, 12).double().requires_grad_()
    y, expected = layer(x), plain(conv, conv.weight * circle(layer.kernel_size, sigma), x)
    close(y, expected, FLOAT64)
    grads = torch.autograd.grad(y.square().sum(), [x, layer.weight])
    for grad, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), [x, conv.weight]), strict=True):
        close(grad, wanted, FLOAT64)


@settings(max_examples=80, deadline=None)
@given(predict=st.sampled_from(["sigma", "sigma1_sigma2", "sigma1_ratio"]), n=st.integers(1, 3), **layers)
def test_dynamic_outputs_and_gradients_are_those_of_a_loop_over_images(predict, n, **arguments):
    """Compute eq. 5-7 literally."""
    conv = convolution(**arguments)
    assume(why_not(conv) is None)
    layer = unsettled(DynamicGMConv2d.from_conv2d(conv, init="random", predict=predict)).double()
    conv.load_state_dict({k: v for k, v in layer.state_dict().items() if "predictor" not in k})
    x = torch.randn(n, conv.in_channels, 11, 12).double().requires_grad_()
    w0, w1, b1 = layer.predictor.parameters()
    kernels = []
    for image in x:
        z = torch.cat((image.flatten(1).max(1).values, image.flatten(1).mean(1)))
        f = w1 @ (w0 @ z).relu() + b1
        first = f[0].abs()
        second = {"sigma": f[0], "sigma1_sigma2": f[-1], "sigma1_ratio": f[0] * f[-1]}[predict].abs()
        assume(0.25 < first < 50 and 0.25 < second < 50)
        grid = torch.tensor(offsets(layer.kernel_size)).double()
        exponent = (grid[:, 1] / first) ** 2 + (grid[:, 0] / second) ** 2
        gaussian = torch.exp(-exponent / 2) / (2 * math.pi * first * second)
        kernels.append(conv.weight * (gaussian / gaussian.max()).view(layer.kernel_size))
    y, expected = layer(x), plain(conv, torch.stack(kernels), x)
    close(y, expected, FLOAT64)
    inputs = [x, *layer.predictor.parameters()]
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (y, expected)]
    for grad, wanted in zip(*grads, strict=True):
        close(grad, wanted, 10 * FLOAT64 if predict == "sigma1_ratio" else FLOAT64)


@BOTH
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_first_and_second_order(layer_type, groups):
    layer = unsettled(layer_type(2, 2, (3, 2), padding=1, groups=groups).double())
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(2, 2, 4, 3).double().requires_grad_()
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


def test_defaults_are_the_papers():
    conv, layer = nn.Conv2d(8, 6, 3), GMConv2d(8, 6, 3)
    assert not isinstance(layer, nn.Conv2d)
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias", "sigma"]
    assert layer.sigma.item() == 5
    assert count(layer) == count(conv) + 1
    dynamic = DynamicGMConv2d(8, 6, 3)
    assert dynamic.predict == "sigma1_ratio"
    assert {k: tuple(v.shape) for k, v in dynamic.state_dict().items()} == {
        "weight": (6, 8, 3, 3),
        "bias": (6,),
        "predictor.hidden.weight": (12, 16),
        "predictor.out.weight": (2, 12),
        "predictor.out.bias": (2,),
    }
    assert GMConv2d(8, 6, 3, bias=False).bias is None


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("channels", "width"), [(1, 1), (2, 3), (3, 4), (4, 6), (5, 7), (64, 96), (512, 768)])
def test_the_hidden_layer_is_that_of_equation_7(channels, width):
    assert DynamicGMConv2d(channels, 1, 3).predictor.hidden.out_features == width
    assert DynamicGMConv2d(channels, 1, 3, reduction=1000).predictor.hidden.out_features == 1


@pytest.mark.parametrize("predict", ["sigma", "sigma1_sigma2", "sigma1_ratio"])
def test_every_image_starts_at_the_static_mask_and_the_whole_predictor_learns(predict):
    layer = DynamicGMConv2d(3, 4, 7, padding=3, sigma=3.0, predict=predict)
    x = torch.randn(5, 3, 9, 9) * torch.linspace(0, 100, 5).view(5, 1, 1, 1)
    assert torch.equal(layer.sigmas(x), torch.full((5, 2), 3.0))
    assert torch.equal(layer.masks(x), GMConv2d(3, 4, 7, sigma=3.0).mask().expand(5, 7, 7))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    layer(x).square().mean().backward()
    assert layer.predictor.out.weight.grad.abs().max() > 0
    assert layer.predictor.hidden.weight.grad.abs().max() == 0
    optimizer.step()
    optimizer.zero_grad()
    layer(x).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())


@BOTH
@settings(max_examples=60, deadline=None)
@given(sigma=st.one_of(st.none(), st.floats(2, 20)), **layers)
def test_preserve_keeps_the_function_in_both_modes(layer_type, sigma, **arguments):
    conv = convolution(**arguments)
    assume(why_not(conv) is None)
    assume(fades_out(conv, sigma) is None)
    x = torch.randn(2, conv.in_channels, 11, 12).double()
    layer = layer_type.from_conv2d(conv, sigma=sigma)
    for mode in (True, False):
        close(layer.train(mode)(x), plain(conv, conv.weight, x), FLOAT64)
    if layer_type is GMConv2d:
        fused = layer.fuse()
        close(plain(fused, fused.weight, x), plain(conv, conv.weight, x), FLOAT64)


@BOTH
@pytest.mark.parametrize("kernel_size", [(63, 63), (64, 64), (1, 127), (31, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_kernels_start_with_a_mask_that_can_be_divided_by(layer_type, kernel_size, dtype):
    conv = nn.Conv2d(2, 2, kernel_size, groups=2).to(dtype)
    layer = layer_type.from_conv2d(conv)
    assert layer.mask().min() > 0.36  # exp(-1) = 0.368
    kernel = layer.weight * layer.mask()
    limits = torch.finfo(dtype)
    assert ((kernel - conv.weight).abs() <= limits.eps * conv.weight.abs().clamp(min=limits.tiny)).all()


@pytest.mark.parametrize(("size", "sigma"), [(1, 5), (3, 5), (7, 5), (11, 5), (13, 6), (31, 15), (63, 31)])
def test_the_default_start_is_the_papers_up_to_11x11(size, sigma):
    assert default_sigma((size, size)) == sigma


@BOTH
def test_dividing_by_a_mask_that_has_faded_out_is_refused(layer_type):
    conv = nn.Conv2d(1, 1, 63)
    with pytest.raises(ValueError, match=r"sigma=5 the corners of its 63x63 kernel keep 2e-17.*at least 10.21"):
        layer_type.from_conv2d(conv, sigma=5)
    assert layer_type.from_conv2d(conv, sigma=5, init="random").start == 5
    assert fades_out(conv, 10.22) is None
    assert fades_out(conv) is None
    assert fades_out(conv, 10.21) is not None


@BOTH
def test_from_conv2d_keeps_dtype_mode_device_what_is_frozen_and_the_original(layer_type):
    conv = nn.Conv2d(4, 4, 3, padding=1).double().eval()
    conv.weight.requires_grad_(False)
    before = copy.deepcopy(conv.state_dict())
    layer = layer_type.from_conv2d(conv)
    assert {p.dtype for p in layer.parameters()} == {torch.double}
    assert not layer.training
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    assert not layer_type.from_conv2d(conv, init="random").weight.requires_grad
    for parameter in layer.parameters():
        parameter.data.zero_()
    for key, value in conv.state_dict().items():
        assert torch.equal(value, before[key])
    on_meta = layer_type.from_conv2d(nn.Conv2d(4, 4, 3, device="meta"))
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}
    with torch.device("meta"):
        assert layer_type(4, 4, 3).weight.is_meta
    on_meta.to_empty(device="cpu").reset_parameters()
    assert on_meta.mask()[0, 1].item() == pytest.approx(math.exp(-1 / 50))


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(4, 4, 1), "1x1 kernel are equally far from the center"),
        (nn.Conv2d(4, 4, 2), "2x2 kernel are equally far"),
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d, not a plain"),
    ],
)
@BOTH
def test_convolutions_that_cannot_be_masked_say_why(layer_type, conv, message):
    with pytest.raises(ValueError, match=message):
        layer_type.from_conv2d(conv)


@BOTH
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sigma": 0}, ValueError, "sigma must be from 0.25 to 141.*; got 0"),
        ({"sigma": -5.0}, ValueError, "got -5.0"),
        ({"sigma": math.nan}, ValueError, "got nan"),
        ({"sigma": 1e6}, ValueError, "got 1000000.0"),
        ({"sigma": "5"}, TypeError, "sigma must be a number; got '5'"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1; got 0"),
        ({"kernel_size": 3.0}, TypeError, "kernel_size must be an integer"),
        ({"groups": 3}, ValueError, "divisible by groups"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"padding": -1}, ValueError, "padding must be at least 0"),
        ({"padding": "full"}, ValueError, "'full'"),
        ({"padding": "same", "stride": 2}, ValueError, "same"),
        ({"padding_mode": "mirror"}, ValueError, "mirror"),
    ],
)
def test_bad_arguments_are_refused(layer_type, arguments, error, message):
    with pytest.raises(error, match=message):
        layer_type(**{"in_channels": 8, "out_channels": 8, "kernel_size": 3, **arguments})


def test_bad_arguments_of_the_predictor_are_refused():
    with pytest.raises(ValueError, match=r"predict must be one of.*Did you mean 'sigma1_ratio'"):
        DynamicGMConv2d(4, 4, 3, predict="sigma_ratio")
    with pytest.raises(ValueError, match=r"reduction must be from 1.0 to inf; got 0"):
        DynamicGMConv2d(4, 4, 3, reduction=0)
    with pytest.raises(ValueError, match="init must be one of"):
        GMConv2d.from_conv2d(nn.Conv2d(4, 4, 3), init="zeros")


@BOTH
@pytest.mark.parametrize("groups", [1, 4])
def test_inputs_of_another_shape_are_refused(layer_type, groups):
    layer = layer_type(4, 4, 3, groups=groups)
    for shape in ((2, 5, 6, 6), (4, 4)):
        with pytest.raises(ValueError, match=r"must be \(N, 4, H, W\)"):
            layer(torch.zeros(shape))


@settings(max_examples=60, deadline=None)
@given(folds=st.booleans(), **layers)
def test_fused_static_layers_are_plain_convolutions(folds, **arguments):
    conv = convolution(**arguments)
    assume(why_not(conv) is None)
    layer = unsettled(GMConv2d.from_conv2d(conv, init="random")).eval()
    norm = norm_of(layer.out_channels) if folds else None
    fused = layer.fuse(norm)
    depthwise = layer.groups == layer.in_channels == layer.out_channels
    assert type(fused) is (DepthwiseConv2d if depthwise else nn.Conv2d)
    if not folds:
        assert count(fused) == count(conv) == count(layer) - 1
    x = torch.randn(2, layer.in_channels, 11, 12).double()
    y = layer(x)
    close(plain(fused, fused.weight, x), norm(y) if folds else y, FLOAT64)
    close(layer(x), y, 0)  # the layer did not change


@settings(max_examples=40, deadline=None)
@given(folds=st.booleans(), **layers)
def test_fused_dynamic_layers_stay_dynamic(folds, **arguments):
    conv = convolution(**arguments)
    assume(why_not(conv) is None)
    layer = unsettled(DynamicGMConv2d.from_conv2d(conv, init="random")).eval()
    norm = norm_of(layer.out_channels) if folds else None
    fused = layer.fuse(norm)
    x = torch.randn(2, layer.in_channels, 11, 12).double()
    y = layer(x)
    close(fused(x), norm(y) if folds else y, FLOAT64)
    assert torch.equal(fused.masks(x), layer.masks(x))
    nn.init.zeros_(fused.predictor.out.bias)
    close(layer(x), y, 0)


@settings(max_examples=40, deadline=None)
@given(**layers)
def test_a_collapsed_dynamic_layer_is_the_convolution_under_the_mask(**arguments):
    conv = convolution(**arguments)
    assume(why_not(conv) is None)
    layer = unsettled(DynamicGMConv2d.from_conv2d(conv, init="random"))
    conv.bias = layer.bias
    mask = torch.rand(layer.kernel_size, dtype=torch.double)
    collapsed = layer.collapse(mask)
    x = torch.randn(2, layer.in_channels, 11, 12).double()
    close(plain(collapsed, collapsed.weight, x), plain(conv, layer.weight * mask, x), FLOAT64)
    depthwise = layer.groups == layer.in_channels == layer.out_channels
    assert type(collapsed) is (DepthwiseConv2d if depthwise else nn.Conv2d)
    assert not collapsed.training
    # If all images have the same mask, the layer computes this.
    nn.init.zeros_(layer.predictor.out.weight)
    collapsed = layer.collapse(layer.mask())
    close(plain(collapsed, collapsed.weight, x), layer(x), FLOAT64)


def test_collapse_keeps_dtype_and_what_is_frozen_and_refuses_masks_that_are_none():
    layer = DynamicGMConv2d(4, 4, (3, 5)).bfloat16()
    layer.weight.requires_grad_(False)
    conv = layer.collapse(torch.full((3, 5), 0.7, dtype=torch.double))
    assert torch.equal(conv.weight, (layer.weight.double() * 0.7).bfloat16())  # rounded once
    assert [p.requires_grad for p in conv.parameters()] == [False, True]
    assert conv.bias.data_ptr() != layer.bias.data_ptr()
    with pytest.raises(ValueError, match=r"mask must be \(KH, KW\) = \(3, 5\); got shape \(2, 3, 5\)"):
        layer.collapse(torch.ones(2, 3, 5))
    with pytest.raises(ValueError, match="mask must be finite"):
        layer.collapse(torch.full((3, 5), float("inf")))


@BOTH
def test_fuse_refuses_what_it_cannot_fold(layer_type):
    layer = layer_type(4, 4, 3)
    with pytest.raises(RuntimeError, match=r"model.eval\(\)"):
        layer.fuse()
    layer.eval()
    with pytest.raises(RuntimeError, match=r"model.eval\(\)"):
        layer.fuse(nn.BatchNorm2d(4).train())
    with pytest.raises(ValueError, match="without running statistics"):
        layer.fuse(nn.BatchNorm2d(4, track_running_stats=False).eval())
    with pytest.raises(ValueError, match="5 channels into 4"):
        layer.fuse(nn.BatchNorm2d(5).eval())


def test_reparameterize_folds_masks_and_norms():
    model = nn.Sequential(
        unsettled(DynamicGMConv2d(3, 4, 7, 2, 3, bias=False)), nn.BatchNorm2d(4), nn.ReLU(),
        unsettled(GMConv2d(4, 4, 3, padding=1, groups=4)), nn.BatchNorm2d(4), nn.ReLU(),
        unsettled(GMConv2d(4, 6, 3, padding=1)),
    ).double().eval()  # fmt: skip
    for index, channels in ((1, 4), (4, 4)):
        model[index] = norm_of(channels)
    x = torch.randn(2, 3, 15, 16).double()
    fused = widefield.reparameterize(model, x)
    close(fused(x), model(x), FLOAT64)
    assert [type(m) for m in fused] == [
        DynamicGMConv2d, nn.Identity, nn.ReLU, nn.Conv2d, nn.Identity, nn.ReLU, nn.Conv2d,
    ]  # fmt: skip


@BOTH
@pytest.mark.parametrize("groups", [1, 4])
def test_lives_like_any_module(layer_type, groups):
    layer = unsettled(layer_type(4, 4, 3, padding=1, groups=groups))
    twin = layer_type(4, 4, 3, padding=1, groups=groups)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 6, 6)
    y = layer(x)
    assert torch.equal(twin(x), y)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    close(layer(x[0]), y[0], FLOAT32)
    assert layer(x[:0]).shape == (0, 4, 6, 6)
    last = x.contiguous(memory_format=torch.channels_last)
    close(layer(last), y, FLOAT32)
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    close(low, y, BFLOAT16)
    close(layer.double()(x.double()), y, FLOAT32)
    assert "kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)" in repr(layer)
    assert ("groups=4" in repr(layer)) == (groups == 4)


@BOTH
@pytest.mark.parametrize("groups", [1, 4])
def test_compile_and_export(layer_type, groups):
    layer = unsettled(layer_type(4, 4, 3, padding=1, groups=groups))
    x = torch.randn(3, 4, 6, 6)
    twin = copy.deepcopy(layer)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    close(y, twin(x), FLOAT32)
    y.square().sum().backward()
    twin(x).square().sum().backward()
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        close(p.grad, q.grad, FLOAT32)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(twin.eval(), (x,), dynamic_shapes=({0: batch},))
    for n in (1, 2, 5):
        x = torch.randn(n, 4, 6, 6)
        close(program.module()(x), twin(x), FLOAT32)
