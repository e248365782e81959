"""Autograd and torch.func work on every layer as on torch.nn.Conv2d."""

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import nn
from torch.autograd import functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from tolerances import FLOAT64, close
from widefield import GMConv, MoRF, convert, reparameterize
from widefield.nn import DeformConv2d, DepthwiseConv2d, DynamicGMConv2d, GMConv2d, MoRFConv2d
from widefield.ops import dcnv3, mixture_conv2d, per_sample_conv2d

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # within torch.func.jvp


def shaken(layer):
    """Return the layer with random weights in the parts that read the image, because these start at zero."""
    for parameter in layer.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return layer


LAYERS = {
    "conv": lambda: nn.Conv2d(2, 2, 3, padding=1, groups=2),
    "depthwise 3": lambda: DepthwiseConv2d(2, 2, 3, padding="same"),
    "depthwise even": lambda: DepthwiseConv2d(2, 2, 4, padding="same"),
    "depthwise 15": lambda: DepthwiseConv2d(2, 2, 15, padding="same"),
    "depthwise fft": lambda: DepthwiseConv2d(2, 2, 7, padding="same", backend="fft"),
    "depthwise strided": lambda: DepthwiseConv2d(2, 2, 5, stride=2, padding=2),
    "soft": lambda: MoRFConv2d(2, 2, (3, 5, 7), groups=2),
    "strided": lambda: MoRFConv2d(2, 2, (3, 5), stride=2, groups=2),
    "dilated": lambda: MoRFConv2d(2, 2, (3, (3, 2)), groups=2, attention="sigmoid"),
    "of one kind": lambda: MoRFConv2d(2, 2, (3, 3, 3, 3), groups=2),
    "branches": lambda: MoRFConv2d(2, 2, (3, 5), groups=2, backend="branches"),
    "dense": lambda: MoRFConv2d(2, 3, (3, 5)),
    "hard": lambda: MoRFConv2d(2, 2, (3, 5, 7), groups=2, routing="hard"),
    "hard branches": lambda: MoRFConv2d(2, 2, (3, 5, 7), groups=2, routing="hard", backend="branches"),
    "fused": lambda: MoRFConv2d(2, 2, (3, 5), groups=2).eval().fuse(),
    "masked": lambda: GMConv2d(2, 2, 5, padding=2, groups=2),
    "dynamic": lambda: shaken(DynamicGMConv2d(2, 2, 5, padding=2, groups=2, sigma=2.0)),
    "dynamic dense": lambda: shaken(DynamicGMConv2d(2, 3, 3, padding=1, sigma=2.0)),
    "deformable": lambda: shaken(DeformConv2d(2, 2, 3, padding=1, groups=1)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
both_layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
# PyTorch's own softmax cannot be differentiated in reverse after forward mode on dual numbers (2.14).
WITH_SOFTMAX = ("hard", "hard branches", "deformable")

# After forward mode, the derivative of its layer norm is also wrong, without an error (2.14).
NORMALIZED = ("deformable",)


def case(name, layout=torch.contiguous_format, batch=2):
    """Return a layer, its parameters, an image and a tangent, all in float64."""
    layer = LAYERS[name]().double().eval()
    x, v = torch.randn(2, batch, 2, 3, 4, dtype=torch.double)
    parameters = {key: value.detach() for key, value in layer.named_parameters()}
    return layer, parameters, x.contiguous(memory_format=layout), v


def slope(f, x, v, step=1e-6):
    return (f(x + step * v) - f(x - step * v)) / (2 * step)


# In place


@both_layouts
@pytest.mark.parametrize("batch", [1, 2])
@every_layer
def test_outputs_may_be_changed_in_place(name, batch, layout):
    layer, _, x, _ = case(name, layout, batch)
    for mode in (True, False):
        layer.train(mode and name != "fused" and not name.startswith("hard"))
        x.requires_grad_()
        inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
        expected = torch.autograd.grad(layer(x).relu().square().sum(), inputs, allow_unused=True)
        actual = torch.autograd.grad(layer(x).relu_().square().sum(), inputs, allow_unused=True)
        for a, b in zip(actual, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b, FLOAT64)


@both_layouts
@every_layer
def test_outputs_of_frozen_layers_may_be_changed_in_place_by_what_learns(name, layout):
    """Views made under no_grad cannot be modified in place with gradients on."""
    layer, _, x, _ = case(name, layout)
    scale = torch.ones(1, dtype=torch.double, requires_grad=True)
    with torch.no_grad():
        y = layer(x)
        expected = y.sum()
    y.mul_(scale).sum().backward()
    close(scale.grad, expected[None], FLOAT64)


@both_layouts
@pytest.mark.parametrize(
    "conversion", [MoRF((3, 5, 7)), MoRF((3, 5), routing="hard"), GMConv(body="dynamic")], ids=repr
)
def test_networks_with_activations_in_place_train_and_serve(conversion, layout):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(True))
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=layout).requires_grad_()
    model = convert(model, conversion)
    for candidate in (model, model.eval(), reparameterize(model)):
        y = candidate(x)
        y.sum().backward()
        assert (y >= 0).all()
    assert x.grad.isfinite().all()


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("learning", [False, True])
def test_no_operator_returns_a_view(learning, dtype, layout):
    for batch in (1, 2):
        x = torch.randn(batch, 4, 7, 6, dtype=dtype).contiguous(memory_format=layout).requires_grad_(learning)
        weights = torch.rand(batch, 2, dtype=dtype)
        for size, stride, dilation in ((1, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2), (7, 1, 1), (15, 1, 1), (15, 2, 1)):
            padding = (dilation * (size // 2),) * 2
            steps = {"stride": (stride,) * 2, "padding": padding, "dilation": (dilation,) * 2}
            for groups, c_out in ((4, 4), (2, 6)):
                kernels = torch.randn(batch, c_out, 4 // groups, size, size, dtype=dtype)
                y = per_sample_conv2d(x, kernels, groups=groups, **steps)
                assert not y._is_view(), (size, stride, dilation, groups)
                bank = [torch.randn(c_out, 4 // groups, k, k, dtype=dtype) for k in (3, size)]
                assert not mixture_conv2d(x, bank, None, weights, groups=groups, stride=stride)._is_view()
        places, mask = torch.randn(batch, 7, 6, 18, dtype=dtype), torch.rand(batch, 7, 6, 9, dtype=dtype)
        y = dcnv3(torch.randn(batch, 7, 6, 4, dtype=dtype).requires_grad_(learning), places, mask)
        assert not y._is_view()
        y.relu_()


# Forward mode


@both_layouts
@every_layer
def test_dual_numbers(name, layout):
    layer, parameters, x, v = case(name, layout)
    expected = slope(layer, x, v)
    for learning in (True, False):
        with fwad.dual_level(), torch.set_grad_enabled(learning):
            y = layer(fwad.make_dual(x, v))
            close(fwad.unpack_dual(y).tangent, expected, 1e-6)
            close(fwad.unpack_dual(y.relu_()).tangent, expected * (y > 0), 1e-6)
    with fwad.dual_level(), FlopCounterMode(display=False):
        close(fwad.unpack_dual(layer(fwad.make_dual(x, v))).tangent, expected, 1e-6)

    tangents = {key: torch.randn_like(value) for key, value in parameters.items()}

    def moved(step):
        return functional_call(layer, {key: p + step * tangents[key] for key, p in parameters.items()}, (x,))

    with fwad.dual_level():
        duals = {key: fwad.make_dual(p, tangents[key]) for key, p in parameters.items()}
        y = functional_call(layer, duals, (x,))
        close(fwad.unpack_dual(y).tangent, (moved(1e-6) - moved(-1e-6)) / 2e-6, 1e-6)


@every_layer
def test_gradcheck_in_all_modes(name):
    layer, parameters, x, _ = case(name)
    inputs = [t.clone().requires_grad_() for t in (x, *parameters.values())]

    def f(x, *values):
        return functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    checks = {"check_batched_grad": True, "fast_mode": False}
    assert torch.autograd.gradcheck(
        f, inputs, check_forward_ad=True, check_batched_forward_grad=True, check_undefined_grad=False, **checks
    )
    assert torch.autograd.gradgradcheck(
        f, inputs, check_fwd_over_rev=True, check_batched_grad=True, check_undefined_grad=False, fast_mode=True
    )


@every_layer
def test_functional_jacobians_and_hessians(name):
    layer, _, x, v = case(name)

    def loss(x):
        return layer(x).sin().sum()

    jacobian = functional.jacobian(layer, x)
    close(functional.jacobian(layer, x, vectorize=True), jacobian, FLOAT64)
    close(functional.jacobian(layer, x, strategy="forward-mode", vectorize=True), jacobian, FLOAT64)
    curvature = functional.hessian(loss, x)
    close(functional.hessian(loss, x, vectorize=True), curvature, FLOAT64)
    if name not in WITH_SOFTMAX:
        mixed = functional.hessian(loss, x, vectorize=True, outer_jacobian_strategy="forward-mode")
        close(mixed, curvature, FLOAT64)
    product = (curvature.flatten(4).flatten(0, 3) @ v.flatten()).view_as(x)
    for function in (functional.hvp, functional.vhp):
        close(function(loss, x, v)[1], product, FLOAT64)
    close(functional.jvp(layer, x, v)[1], (jacobian.flatten(4) @ v.flatten()), FLOAT64)


# torch.func


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # within torch.func.linearize
@every_layer
def test_transforms_nest_in_every_order(name):
    layer, parameters, x, v = case(name)

    def f(x):
        return functional_call(layer, parameters, (x,))

    def loss(x):
        return f(x).sin().sum()

    jacobian, curvature = functional.jacobian(f, x), functional.hessian(loss, x)
    close(jvp(f, (x,), (v,))[1], jacobian.flatten(4) @ v.flatten(), FLOAT64)
    for outer in (jacfwd, jacrev):
        close(outer(f)(x), jacobian, FLOAT64)
        for inner in (jacrev,) if name in NORMALIZED else (jacfwd, jacrev):
            close(outer(inner(loss))(x), curvature, FLOAT64)
    close(hessian(loss)(x), curvature, FLOAT64)
    close(torch.func.linearize(f, x)[1](v), jacobian.flatten(4) @ v.flatten(), FLOAT64)
    close(torch.func.functionalize(f)(x), f(x), FLOAT64)
    close(torch.func.functionalize(grad(loss))(x), grad(loss)(x), FLOAT64)


@pytest.mark.parametrize("name", ["conv", "depthwise fft", "soft"])
def test_third_derivatives_by_forward_mode_alone(name):
    layer, parameters, x, v = case(name)

    def along(t):
        return functional_call(layer, parameters, (x + t * v,)).sin().sum()

    t = torch.zeros((), dtype=torch.double)
    expected = jacrev(jacrev(jacrev(along)))(t)
    for third in (jacfwd(jacfwd(jacfwd(along))), jacfwd(jacfwd(jacrev(along))), jacrev(jacfwd(jacfwd(along)))):
        close(third(t), expected, FLOAT64)


@every_layer
def test_vmap_over_images_weights_and_gradients(name):
    layer, parameters, _, _ = case(name)
    images = torch.randn(3, 1, 2, 3, 4, dtype=torch.double)
    stacked = {key: torch.randn(3, *p.shape, dtype=torch.double) for key, p in parameters.items()}
    if "bank" in stacked:
        stacked["bank"] *= parameters["bank"] != 0  # the padding of a bank is zero

    def f(values, x):
        return functional_call(layer, values, (x,))

    def loss(values, x):
        return f(values, x).relu_().square().sum()

    each = [{key: p[i] for key, p in stacked.items()} for i in range(3)]
    close(vmap(f, (None, 0))(parameters, images), torch.stack([f(parameters, x) for x in images]), FLOAT64)
    close(vmap(f, (0, None))(stacked, images[0]), torch.stack([f(p, images[0]) for p in each]), FLOAT64)
    close(vmap(f)(stacked, images), torch.stack([f(p, x) for p, x in zip(each, images, strict=True)]), FLOAT64)

    def push(values, x, v):
        return jvp(lambda x: f(values, x), (x,), (v,))[1]

    tangents = [push(p, x, x.cos()) for p, x in zip(each, images, strict=True)]
    close(vmap(push)(stacked, images, images.cos()), torch.stack(tangents), FLOAT64)
    actual = vmap(grad(loss), (None, 0))(parameters, images)
    for i, x in enumerate(images):
        for key, expected in grad(loss)(parameters, x).items():
            close(actual[key][i], expected, FLOAT64)


def test_grid_sampling_has_no_forward_mode_and_says_so():
    layer = DeformConv2d(2, 2, 3, padding=1, groups=1, backend="grid")
    x = torch.randn(1, 2, 3, 4)
    with fwad.dual_level(), pytest.raises(ValueError, match=r"grid_sample has no forward-mode derivative.*'auto'"):
        layer(fwad.make_dual(x, x))
