import copy

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model

import widefield
from tolerances import NETWORK, close
from widefield.nn import DepthwiseConv2d

TINY = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "num_classes": 5}


def network():
    torch.manual_seed(0)
    return timm.create_model("convnext_atto", **TINY).eval()


def layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, DepthwiseConv2d)]


def test_a_converted_model_is_the_same_model():
    model = network()
    fast = widefield.convert(model, widefield.FastDepthwise())
    assert layers(fast) == [f"stages.{i}.blocks.0.conv_dw" for i in range(4)]
    assert not layers(model)
    assert fast.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(2, 3, 64, 64)
    close(fast(x), model(x), NETWORK)
    outputs = []
    for twin in (fast, model):
        twin.train()(x).square().sum().backward()
        outputs.append([p.grad for p in twin.parameters()])
    for a, b in zip(*outputs, strict=True):
        close(a, b, NETWORK)


def test_in_place_the_parameters_are_the_very_same():
    model = network()
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert widefield.convert(model, widefield.FastDepthwise(), inplace=True) is model
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    weight = model.get_parameter("stages.0.blocks.0.conv_dw.weight")
    old = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, old)


@pytest.mark.parametrize("back", [widefield.reparameterize, reparameterize_model], ids=["ours", "timm's"])
def test_the_way_back(back):
    model = network()
    plain = back(widefield.convert(model, widefield.FastDepthwise()))
    assert not layers(plain)
    x = torch.randn(2, 3, 64, 64)
    close(plain(x), model(x), NETWORK)
    assert plain.state_dict().keys() == model.state_dict().keys()


def test_plan_says_what_is_passed_over():
    plan = widefield.plan(timm.create_model("mobilenetv2_035"), widefield.FastDepthwise())
    assert len(plan.replaced) == 17
    assert "it is not depthwise" in str(plan) or "it reads the image itself" in str(plan)
    with pytest.raises(ValueError, match="it is not depthwise: 64 input channels, 64 output channels, groups=1"):
        widefield.convert(timm.create_model("resnet18"), widefield.FastDepthwise())
    with pytest.raises(ValueError, match="backend must be one of"):
        widefield.FastDepthwise(backend="atan")


def test_blocks_that_merge_themselves_still_do():
    """They read the weights of their convolutions under the same names."""
    model = timm.create_model("mobileone_s0", num_classes=3).eval()
    fast = widefield.convert(model, widefield.FastDepthwise())
    assert layers(fast)
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    close(fast(x), expected, NETWORK)
    close(widefield.reparameterize(fast)(x), expected, NETWORK)


def test_shared_weights_stay_shared():
    conv = torch.nn.Conv2d(4, 4, 7, padding=3, groups=4)
    twin = torch.nn.Conv2d(4, 4, 7, padding=3, groups=4)
    twin.weight = conv.weight
    fast = widefield.convert(torch.nn.Sequential(conv, twin), widefield.FastDepthwise())
    assert layers(fast) == ["0", "1"]
    assert fast[0].weight is fast[1].weight


def test_a_converted_model_can_become_a_mixture():
    fast = widefield.convert(network(), widefield.FastDepthwise())
    mixture = widefield.convert(fast, widefield.MoRF((3, 5, 7)))
    assert not layers(mixture)
    x = torch.randn(1, 3, 64, 64)
    close(mixture(x), fast(x), NETWORK)


def test_compile_and_export():
    fast = widefield.convert(network(), widefield.FastDepthwise())
    x = torch.randn(2, 3, 64, 64)
    expected = fast(x)
    close(torch.compile(copy.deepcopy(fast), backend="aot_eager", fullgraph=True)(x), expected, NETWORK)
    program = torch.export.export(fast, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert not any("widefield" in str(node.target) for node in program.graph.nodes)
    close(program.module()(torch.cat([x, x[:1]])), fast(torch.cat([x, x[:1]])), NETWORK)
