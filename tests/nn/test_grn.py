import pytest
import torch
from conformance import check_operator, loaded, operators
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.grn import GlobalResponseNorm

from tolerances import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, close
from widefield.nn.grn import GRN


def random(channels, use_bias=True):
    layer = GRN(channels, use_bias)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def oracle(x, layer):
    """Compute equations 1 to 3 of the paper one by one, in float64."""
    x = x.double()
    norms = x.square().sum((1, 2)).sqrt()
    relative = norms / (norms.mean(1, keepdim=True) + layer.eps)
    y = layer.gamma.double() * x * relative[:, None, None] + x
    return y if layer.beta is None else y + layer.beta.double()


@pytest.mark.parametrize("name", ["grn", "grn_no_bias"])
def test_it_is_the_official_one(name):
    case = operators()[name]
    layer = GRN(5, use_bias=case["config"].get("bias", True)).double()  # before loading: the weights are float64
    check_operator(loaded(layer, case), case)


@settings(deadline=None)
@given(st.tuples(*[st.integers(1, 5)] * 4), st.booleans(), st.floats(0.01, 100))
def test_it_is_the_paper_s_equations(shape, use_bias, size):
    layer = random(shape[-1], use_bias).double()
    x = size * torch.randn(shape, dtype=torch.float64)
    close(layer(x), oracle(x, layer), FLOAT64)


def test_it_is_timm_s_with_other_keys():
    ours, theirs = random(6), GlobalResponseNorm(6)
    theirs.load_state_dict({"weight": ours.gamma.detach().flatten(), "bias": ours.beta.detach().flatten()})
    x = torch.randn(2, 5, 4, 6)
    close(ours(x), theirs(x), FLOAT32)


def test_gradients():
    layer = random(3).double()
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))
    assert torch.autograd.gradgradcheck(call, (x, *parameters.values()))


def test_a_new_layer_is_the_identity_and_learns():
    layer, x = GRN(4), torch.randn(2, 3, 3, 4)
    assert torch.equal(layer(x), x)
    layer(x).square().sum().backward()
    assert layer.gamma.grad.abs().min() > 0
    assert layer.beta.grad.abs().min() > 0


@pytest.mark.parametrize("use_bias", [True, False])
def test_keys(use_bias):
    shapes = {key: tuple(value.shape) for key, value in GRN(7, use_bias).state_dict().items()}
    assert shapes == {"gamma": (1, 1, 1, 7), "beta": (1, 1, 1, 7)} if use_bias else {"gamma": (1, 1, 1, 7)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, FLOAT16), (torch.bfloat16, BFLOAT16)])
def test_narrow_dtypes_survive_norms_that_they_cannot_hold(dtype, tolerance):
    layer = random(4)
    with torch.no_grad():
        layer.gamma.div_(10)
    x = (1500 * torch.randn(2, 64, 64, 4)).to(dtype)
    assert x.float().square().sum((1, 2)).sqrt().min() > 65504
    expected = oracle(x, layer)
    y = layer.to(dtype)(x)
    assert y.dtype == dtype
    close(y, expected, tolerance)


def test_narrow_dtypes_see_small_inputs_as_wide_ones_do():
    layer = random(4)
    x = torch.full((1, 2, 2, 4), 1e-6).half()  # eps is as large as these norms, and is rounded in float16
    close(1e6 * layer.half()(x).double(), 1e6 * oracle(x, layer), FLOAT16)


def test_autocast_keeps_the_dtype_of_the_input():
    layer, x = random(8), torch.randn(2, 6, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16())
        assert layer(x).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    close(y, oracle(x, layer), BFLOAT16)


def test_channels_without_response_have_finite_gradients():
    layer = random(3)
    x = torch.randn(2, 4, 4, 3)
    x[0], x[1, ..., 1] = 0, 0
    x.requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    for tensor in (x, layer.gamma, layer.beta):
        assert tensor.grad.isfinite().all()
    close(y[0], layer.beta.expand(1, 4, 4, 3)[0], FLOAT32)


def test_memory_format_and_empty_batch():
    layer = random(6)
    x = torch.randn(2, 6, 5, 4)
    seen = x.permute(0, 2, 3, 1)
    close(layer(seen), layer(seen.contiguous()), FLOAT32)
    assert layer(torch.empty(0, 5, 4, 6)).shape == (0, 5, 4, 6)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="channels must be at least 1; got 0"):
        GRN(0)
    with pytest.raises(TypeError, match=r"channels must be an integer; got 2\.5"):
        GRN(2.5)
    with pytest.raises(ValueError, match="eps must be from 0"):
        GRN(2, eps=-1.0)
    with pytest.raises(ValueError, match=r"must be \(N, H, W, 4\); got shape \(2, 4, 5, 6\).*permute"):
        GRN(4)(torch.randn(2, 4, 5, 6))
    with pytest.raises(ValueError, match=r"got shape \(5, 6, 4\)"):
        GRN(4)(torch.randn(5, 6, 4))


def test_it_shows_its_arguments():
    assert repr(GRN(3, use_bias=False)) == "GRN(3, use_bias=False, eps=1e-06)"
