"""timm's blocks merge into float32 layers; the result must have the model's dtype and training mode."""

import pytest
import timm
import torch
from test_folded_networks import shaken_a_little
from torch import nn

import widefield
from tolerances import BFLOAT16, FLOAT16, FLOAT64, OF_DTYPE, close
from widefield.surgery.walk import merge

SMALL = ["efficientvit_m0", "levit_128s", "repvit_m0_9"]
OTHERS = ["tiny_vit_5m_224", "levit_256d", "mobileone_s0", "fastvit_t8", "repvgg_a0", "repghostnet_050"]


def network(name, dtype):
    torch.manual_seed(0)
    model = shaken_a_little(timm.create_model(name, num_classes=5)).to(dtype).requires_grad_(False)
    side = model.pretrained_cfg["input_size"][-1] if model.pretrained_cfg.get("fixed_input_size") else 64
    return model, torch.randn(2, 3, side, side).to(dtype)


def types(model):
    return {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}


def check(name, dtype):
    model, x = network(name, dtype)
    if dtype == torch.float16 and not model(x).isfinite().all():
        pytest.skip("the shaken network itself leaves float16")
    fused = widefield.reparameterize(model, x, tolerance=0.1 if dtype.itemsize == 2 else FLOAT64)
    assert types(fused) == {dtype}
    assert not any(p.requires_grad for p in fused.parameters())
    assert not any(module.training for module in fused.modules())
    close(fused(x), model(x), 0.1 if dtype.itemsize == 2 else FLOAT64)
    assert types(widefield.trim(fused, 0.0)) == {dtype}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SMALL)
def test_the_type_comes_back(name, dtype):
    check(name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OTHERS)
def test_the_type_comes_back_for_all_that_merges_itself(name, dtype):
    check(name, dtype)


@pytest.mark.parametrize("name", ["fastvit_t8", "ghostnetv3_050"])
def test_what_learns_still_learns(name):
    """timm's methods detach the parameters of the whole block, including its squeeze-and-excitation."""
    model, x = network(name, torch.float32)
    fused = widefield.reparameterize(model.requires_grad_(), x)
    assert [key for key, p in fused.named_parameters() if not p.requires_grad] == []


@pytest.mark.parametrize("name", ["levit_128s", "efficientvit_m0"])
def test_models_that_ran_with_gradients(name):
    """They store attention biases with a gradient function, which copy.deepcopy rejects."""
    model, x = network(name, torch.float64)
    y = model.requires_grad_()(x)
    fused = widefield.reparameterize(model, x, tolerance=FLOAT64)
    close(fused(x), y, FLOAT64)


class Foreign(nn.Module):
    """A typical block of timm's: its fuse() replaces the norm and the convolution by new ones."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.norm(self.conv(x))

    def fuse(self):
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        conv = nn.Conv2d(8, 8, 3, padding=1)
        conv.weight.data.copy_(self.conv.weight * scale[:, None, None, None])
        conv.bias.data.copy_((self.conv.bias - self.norm.running_mean) * scale + self.norm.bias)
        return conv


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("learns", [True, False])
def test_narrow_types_are_rounded_once(dtype, learns):
    block = shaken_a_little(Foreign()).to(dtype).requires_grad_(learns)
    exact = Foreign().double().eval()
    exact.load_state_dict(block.state_dict())
    conv = merge(block, "fuse")
    assert types(conv) == types(block) == {dtype}
    assert {p.requires_grad for p in conv.parameters()} == {learns}
    assert not conv.training
    assert torch.get_default_dtype() == torch.float32
    with torch.no_grad():
        scale = exact.norm.weight / (exact.norm.running_var + exact.norm.eps).sqrt()
        close(conv.weight.double(), exact.conv.weight * scale[:, None, None, None], OF_DTYPE[dtype] / 5)
    assert max(FLOAT16, BFLOAT16) / 5 < 1e-2


def test_norms_may_be_wider_than_the_convolution():
    block = shaken_a_little(Foreign())
    block.conv.bfloat16()
    assert types(merge(block, "fuse")) == {torch.bfloat16}
    assert types(block) == {torch.bfloat16, torch.float32}


def test_a_fuse_that_fails_leaves_its_block_with_the_reason():
    class Failing(Foreign):
        def fuse(self):
            raise AssertionError("not today")

    model, reports = nn.Sequential(nn.Conv2d(3, 8, 1), Failing()).eval(), []
    x = torch.randn(2, 3, 8, 8)
    fused = widefield.reparameterize(model, x, report=reports.append)  # the norm is still folded
    assert [left.reason for left in reports[0].left] == ["its fuse() fails with AssertionError: not today"]
    close(fused(x), model(x), 1e-5)
    close(widefield.trim(model, 0.0)(x), model(x), 1e-5)
