"""Contributions of blocks: products that can be computed by hand, which modules count as blocks, and restoration."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tolerances import FLOAT64
from widefield import dense
from widefield.analysis import block_contributions, save
from widefield.analysis.blocks import ALL


class Scaled(nn.Module):
    """Return ``x + factor * x``, or without a shortcut ``(1 + factor) * x``."""

    def __init__(self, factor, shortcut=True):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))
        self.shortcut = shortcut

    def forward(self, x):
        return x + self.factor * x if self.shortcut else (1 + self.factor) * x


def product(*blocks, classes=3):
    """Return a network whose logits are linear in the blocks' input."""
    torch.manual_seed(0)
    stem, head = nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.Linear(4, classes, bias=False)
    layers = {"stem": stem, "blocks": nn.Sequential(*blocks), "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    model = nn.Sequential()
    for name, module in {**layers, "head": head}.items():
        model.add_module(name, module)
    return model.double()


IMAGES = torch.randn(7, 3, 12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(-0.9, 3), min_size=1, max_size=4), st.integers(1, 8))
def test_factors_are_what_is_measured(factors, batch_size):
    found = block_contributions(product(*map(Scaled, factors)), IMAGES, batch_size=batch_size)
    assert [block.name for block in found.blocks] == [f"blocks.{i}" for i in range(len(factors))]
    for block, factor in zip(found.blocks, factors, strict=True):
        assert block.adds == pytest.approx(abs(factor), rel=FLOAT64, abs=1e-6)
        assert block.change == pytest.approx(abs(1 / (1 + factor) - 1), rel=1e-6, abs=FLOAT64)
        assert block.agreement == 1  # a positive factor moves no maximum
    assert found.together.change == pytest.approx(abs(1 / np.prod([1 + f for f in factors]) - 1), rel=1e-6, abs=FLOAT64)


class Turned(nn.Module):
    """A branch that decides the class: its output outweighs the shortcut."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x, scale=10.0):
        return x + scale * self.conv(x).flip(1)


@pytest.mark.parametrize("form", ["pairs", "mappings", "generator"])
def test_scores_with_labels(form):
    model = product(Scaled(0.5), Turned(), Scaled(0.0)).eval()
    with torch.no_grad():
        labels = model(IMAGES).argmax(1)
        labels[0] = (labels[0] + 1) % 3
        blocks = model.blocks
        without = model.head(model.flat(model.pool(blocks[2](blocks[0](model.stem(IMAGES))))))
    batches = [(IMAGES[:4], labels[:4]), (IMAGES[4:], labels[4:])]
    if form == "mappings":
        batches = [{"image": x, "label": y} for x, y in batches]
    elif form == "generator":
        batches = (batch for batch in batches)
    found = block_contributions(model, batches)
    assert (found.metric, found.score, found.about["images"]) == ("accuracy", 6 / 7, 7)
    right = (without.argmax(1) == labels).double().mean().item()
    assert [block.score for block in found.blocks] == [6 / 7, pytest.approx(right), 6 / 7]
    assert right < 6 / 7
    assert found.blocks[1].agreement == pytest.approx((without.argmax(1) == model(IMAGES).argmax(1)).double().mean())
    assert found.drop(found.blocks[1]) == pytest.approx(100 * (6 / 7 - right))
    assert f"{100 * right:.1f} of 85.7 accuracy" in [row["score without it (%)"] for row in found.rows()]
    assert f"85.7% accuracy; without one of 3 blocks 0.0 to {100 * (6 / 7 - right):.1f} points less" in found.line
    assert "without one of 3 blocks outputs change by 0 to" in block_contributions(model, IMAGES).line


class Shaped(nn.Module):
    """A block as others write them, by the form of its forward pass."""

    def __init__(self, form):
        super().__init__()
        self.form, self.conv = form, nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        match self.form:
            case "after":
                return self.act(self.conv(x) + x)
            case "in place":
                y = self.conv(x)
                y += x
                return self.act(y)
            case "addcmul":
                return torch.addcmul(x, torch.full_like(x, 0.5), self.conv(x))
            case "views":
                return (x.flatten(2) + self.conv(x).flatten(2)).view(x.shape)
            case "gated":
                return x * self.conv(x).sigmoid()
            case "activated shortcut":
                return F.relu(x) + self.conv(x)
            case "weighted":
                return 0.5 * x + self.conv(x)
            case "two convolutions":
                return self.conv(x) + self.conv(x.flip(1))
            case "turned":
                return x.transpose(1, 2).reshape(x.shape) + self.conv(x)
        raise AssertionError(self.form)


@pytest.mark.parametrize("form", ["after", "in place", "addcmul", "views"])
def test_shortcuts_in_any_form(form):
    model = product(Shaped(form), Scaled(0.5, shortcut=False)).eval()
    found = block_contributions(model, IMAGES)
    assert [(block.name, block.kind) for block in found.blocks] == [("blocks.0", "Shaped")]
    with torch.no_grad():
        off = model.head(model.flat(model.pool(model.blocks[1](model.stem(IMAGES)))))
        change = ((off - model(IMAGES)).norm() / model(IMAGES).norm()).item()
    assert found.together.change == pytest.approx(change, rel=1e-6)


@pytest.mark.parametrize("form", ["gated", "activated shortcut", "weighted", "two convolutions", "turned"])
def test_what_is_not_a_shortcut(form):
    with pytest.raises(ValueError, match="Sequential has no residual block"):
        block_contributions(product(Shaped(form)), IMAGES)
    found = block_contributions(product(Shaped(form), Shaped("after")), IMAGES)
    assert [block.name for block in found.blocks] == ["blocks.1"]
    assert [(b.name, b.kind, b.reason) for b in found.fixed] == [
        ("blocks.0", "Shaped", "its shortcut is not the identity")
    ]
    assert found.rows()[-1]["score without it (%)"] == "stays on: its shortcut is not the identity"


TINY = {"depths": (1, 2, 1, 1)}
WIDE = {"widths": (8, 16, 24, 32)}
CONVNEXT = {**TINY, "dims": (8, 16, 24, 32)}


@pytest.mark.parametrize(
    ("name", "args", "kinds", "fixed"),
    [
        ("test_resnet", {}, "BasicBlock", ["layer2.0", "layer4.0"]),
        ("mobilenetv2_050", {}, "InvertedResidual" * 10, [f"blocks.{i}.0" for i in range(1, 7)]),
        ("convnext_atto", CONVNEXT, "ConvNeXtBlock" * 5, []),
        ("morf_convnext_tiny", CONVNEXT, "ConvNeXtBlock" * 5, []),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, **TINY, "embed_dim": 12}, None, []),
        ("hornet_tiny_7x7", TINY, "Block" * 5, []),
        ("replknet_31b", {"depths": (1, 1, 1, 1), **WIDE, "kernel_sizes": (5, 5, 5, 5)}, None, []),
        ("unireplknet_a", {**TINY, **WIDE}, "UniRepLKNetBlock" * 5, []),
        ("van_b0", {**TINY, **WIDE}, "Block" * 5, []),
        ("moganet_xtiny", {**TINY, **WIDE}, "MogaBlock" * 5, []),
        ("metaformer_tiny", {**TINY, **WIDE}, "MetaFormerBlock" * 5, []),
        ("slak_tiny", {**TINY, **WIDE, "kernel_sizes": (7, 7, 7, 7)}, "Block" * 5, []),
    ],
)
def test_timms_networks_and_ours(name, args, kinds, fixed):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **args).eval()
    found = block_contributions(model, torch.randn(1, 3, 64 if "swin" in name else 32, 64))
    assert [block.name for block in found.fixed] == fixed
    assert kinds is None or "".join(block.kind for block in found.blocks) == kinds
    if name.startswith("replknet"):
        assert [block.kind for block in found.blocks] == ["RepLKBlock", "ConvFFN"] * 4
    if name.startswith("swin"):
        assert [block.kind for block in found.blocks] == ["SwinTransformerBlock"] * 5


def test_layer_scale_decides_how_much_blocks_do():
    """What the demo's first recipe did: with 1e-6 no kernel takes part."""
    torch.manual_seed(0)
    small = timm.create_model("convnext_atto", num_classes=4, ls_init_value=1e-6, **CONVNEXT)
    plain = timm.create_model("convnext_atto", num_classes=4, ls_init_value=1.0, **CONVNEXT)
    images = torch.randn(4, 3, 64, 64)
    assert block_contributions(small, images).together.change < 1e-4
    assert block_contributions(plain, images).together.change > 1e-2


def test_dense_labels_and_detectors():
    torch.manual_seed(0)
    options = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "ls_init_value": None}
    images, masks = torch.randn(3, 3, 32, 48), torch.randint(4, (3, 32, 48))
    masks[0, :5] = 255
    model = dense.SemanticFPN("convnext_atto", 4, neck_channels=8, channels=8, **options).eval()
    found = block_contributions(model, [{"image": images, "mask": masks}])
    assert found.metric == "mIoU"
    assert found.blocks[0].name.startswith("backbone.")
    assert len(found.blocks) == 4
    assert all(0 < block.score < 1 for block in (*found.blocks, found.together))
    detector = dense.FCOS("convnext_atto", 4, neck_channels=32, score_threshold=0.0, **options)
    assert block_contributions(detector, images[:1]).metric == "box AP"


class Fails(nn.Module):
    def forward(self, x):
        if self.calls == 3:
            raise RuntimeError("the third call fails")
        self.calls += 1
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = product(Scaled(0.5), Turned(), Scaled(0.5))
    last = Fails()
    last.calls = 0 if fails else 4
    model.add_module("last", last)
    model.blocks[0].forward = own = lambda x: x + x.sin()
    model.stem.weight.requires_grad_(False)
    model.head.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    if fails:
        with pytest.raises(RuntimeError, match="the third call fails"):
            block_contributions(model, IMAGES)
    else:
        assert len(block_contributions(model, IMAGES).blocks) == 3
    assert [module.training for module in model.modules()] == modes
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["stem.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert vars(model.blocks[0])["forward"] is own
    assert "forward" not in vars(model.blocks[1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_pictures_tables_and_numbers(tmp_path):
    labeled = [(IMAGES, torch.zeros(7, dtype=torch.long))]
    results = {
        "with labels": block_contributions(product(Scaled(0.5), Turned()), labeled, name="with labels"),
        "without": block_contributions(product(Scaled(0.0)), IMAGES, name="without", about={"seed": 3}),
    }
    save(results, tmp_path / "blocks.svg")
    drawn = (tmp_path / "blocks.svg").read_text()
    assert "predictions changed (%)" in drawn
    results["with labels"].save(tmp_path / "one.svg")
    assert "points of accuracy lost" in (tmp_path / "one.svg").read_text()
    rows = results["without"].rows()
    assert [row["block"] for row in rows] == ["blocks.0", ALL]
    assert rows[0]["score without it (%)"] == "–"
    assert results["without"].to_dict()["blocks"][0]["change"] == 0
    words, about = results["without"].summary().splitlines()
    assert words == type(results["without"]).reading({"without": results["without"]})
    assert about == "without: seed 3, images 7."


@pytest.mark.parametrize("images", [IMAGES[:0], [], [IMAGES[:0]]])
def test_no_images(images):
    with pytest.raises(ValueError, match="images"):
        block_contributions(product(Scaled(0.5)), images)
