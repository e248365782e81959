"""What checks cost: how many images run through the model, and in which kernels."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import widefield
from tolerances import FLOAT64, NETWORK, close
from widefield.nn import DepthwiseConv2d
from widefield.surgery.quick import quick, quicker


def images_run(model, work):
    """Return how many images ``model``, or a copy of it, runs on."""
    seen = []
    kind = type(model)
    handle = register_module_forward_pre_hook(lambda m, args: seen.append(len(args[0])) if type(m) is kind else None)
    try:
        work()
    finally:
        handle.remove()
    return sum(seen)


class Net(nn.Module):
    """A network with a large depthwise kernel, and perhaps a norm."""

    def __init__(self, channels=8, norm=True, size=11):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.wide = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels)
        self.head = nn.Conv2d(channels, 4, 1)

    def forward(self, x):
        return self.head(self.wide(self.norm(self.stem(x)).relu()))


def net(kind, **options):
    """Return the network, its large kernel as it is, as a sum of branches, or as a mixture."""
    model = Net(**options).eval()
    conversions = {"branches": widefield.LargeKernel(model.wide.kernel_size[0], small=3), "mixture": widefield.MoRF()}
    return model if kind == "plain" else widefield.convert(model, conversions[kind], where="wide")


@pytest.mark.parametrize(
    ("kind", "norm", "passes"),
    [("plain", True, 2), ("branches", True, 3), ("branches", False, 2), ("mixture", True, 3), ("mixture", False, 2)],
)
@pytest.mark.parametrize("report", [None, id])
def test_reparameterize_takes_two_passes_or_three(kind, norm, passes, report):
    """One before, one after; one more if norms are left when layers have merged; two more count costs for a report."""
    model, x = net(kind, norm=norm), torch.randn(2, 3, 12, 12)
    runs = images_run(model, lambda: widefield.reparameterize(model, x, report=report))
    assert runs == len(x) * (passes + (2 if report else 0))


def test_trim_takes_four_passes():
    """One watches, two compare, and the costs of one image are counted twice."""
    model, x = Net().eval(), torch.randn(2, 3, 12, 12)
    assert images_run(model, lambda: widefield.trim(model, example_input=x)) == 4 * len(x)


def test_trim_by_a_budget_takes_a_pass_for_each_crop_that_it_tries():
    """The outputs of the original are kept: it runs on all images once, and on those of the probes once."""
    model, loader = Net().eval(), [torch.randn(2, 3, 12, 12), torch.randn(2, 3, 12, 12)]
    probes, halvings, rounds = 1 + 5, 3, 4  # 3x3 to 1x1, and 11x11 to 9x9 ... 1x1
    tries = 1 + probes + halvings * rounds
    others = 2 + 2 + 2 * 2 + 2 * 2 + 2  # watching, kind of output, two checks of two models, costs
    assert images_run(model, lambda: widefield.trim(model, 0.05, loader=loader)) <= 4 * tries + 4 + 2 + others


def test_specialize_takes_three_passes_and_for_a_report_one_more_for_each_layer():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in "abc"))
    model = widefield.convert(model.eval(), widefield.MoRF((3, 5)), where="*")
    x = torch.randn(2, 4, 12, 12)
    assert images_run(model, lambda: widefield.specialize(model, [x])) == 3 * len(x)
    costs = 2  # of one image, before and after
    assert images_run(model, lambda: widefield.specialize(model, [x], report=id)) == (3 + 3) * len(x) + costs


def test_plan_runs_nothing():
    model = Net().eval()
    assert images_run(model, lambda: widefield.plan(model, widefield.MoRF())) == 0


class Convolutions(TorchDispatchMode):
    """Counts PyTorch's convolutions with large depthwise kernels."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default and args[1].shape[1] == 1 and args[1].shape[2:].numel() > 49:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_large_plain_kernels_are_not_checked_in_pytorchs_slow_form():
    """The result has torch.nn.Conv2d layers, which take longer than the branches that they replace."""
    torch.manual_seed(0)
    model, x = net("branches", channels=32, size=31), torch.randn(1, 3, 48, 48)
    with Convolutions() as stock:
        fused = widefield.reparameterize(model, x, report=id)
    assert stock.count == 0
    assert type(fused.wide.lkb_reparam) is nn.Conv2d
    with Convolutions() as stock, torch.no_grad():
        outputs = fused(x)
        close(outputs, model(x), NETWORK)
    assert stock.count == 1


def test_a_model_is_as_it_was_after_a_quick_run():
    model = Net().double().eval()
    wide, x = model.wide, torch.randn(1, 3, 12, 12).double()
    expected = model(x)
    with quick(model) as fast:
        assert isinstance(fast.wide, DepthwiseConv2d)
        assert fast.wide.weight is wide.weight
        assert fast.stem is model.stem
        close(fast(x), expected, FLOAT64)
    assert model.wide is wide
    with pytest.raises(RuntimeError, match="to have 3 channels"), quick(model) as fast:
        fast(x[:, :2])
    assert model.wide is wide
    with quick(wide) as fast:
        assert isinstance(fast, DepthwiseConv2d)


def test_a_compiled_model_is_not_compiled_again():
    model = torch.compile(Net().eval(), backend="eager")
    with quick(model) as fast:
        assert fast is model
        assert type(model._orig_mod.wide) is nn.Conv2d


@pytest.mark.parametrize("change", ["small", "dense", "hook", "forward", "kind"])
def test_layers_that_are_not_slow_or_may_compute_more_stay(change):
    layer = nn.Conv2d(8, 8, 7 if change == "small" else 9, groups=1 if change == "dense" else 8)
    if change == "hook":
        layer.register_forward_hook(lambda *_: None)
    if change == "forward":
        layer.forward = lambda x: x
    if change == "kind":
        layer = timm.layers.Conv2dSame(8, 8, 9, groups=8)
    assert quicker(layer) is layer
