import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import widefield  # noqa: F401, registers models
from widefield.analysis import Field, effective_receptive_field, theoretical_receptive_field
from widefield.analysis._places import Tracer
from widefield.nn import DepthwiseConv2d, MoRFConv2d
from widefield.ops import dcnv3


class Network(nn.Module):
    """A layer whose forward is a given function."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def look(function, size=32, **layers):
    return theoretical_receptive_field(Network(function, **layers), size, layer="")


def strides_in_the_first_1x1(model):
    """ResNet in its first published form."""
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    return model


def test_resnets_have_the_fields_of_the_literature():
    model = timm.create_model("resnet50")
    field = theoretical_receptive_field(model, 64)
    assert (field.size, field.jump, field.reason, field.local) == ((427, 427), (32, 32), None, (427, 427))
    assert field.center == (32, 32)
    assert theoretical_receptive_field(model, 64, layer="layer3").size == (267, 267)
    assert theoretical_receptive_field(strides_in_the_first_1x1(model), 64).size == (483, 483)


windows = st.tuples(
    st.sampled_from(["convolution", "depthwise", "max", "average"]),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),  # kernel
    st.tuples(st.integers(1, 2), st.integers(1, 2)),  # stride
    st.tuples(st.integers(0, 2), st.integers(0, 2)),  # padding
    st.integers(1, 3),  # dilation
)


def stack(specifications):
    layers = []
    for kind, kernel, stride, padding, dilation in specifications:
        padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
        if kind == "convolution":
            layers.append(nn.Conv2d(2, 2, kernel, stride, padding, dilation))
        elif kind == "depthwise":
            layers.append(DepthwiseConv2d(2, 2, kernel, stride, padding, dilation))
        elif kind == "max":
            layers.append(nn.MaxPool2d(kernel, stride, padding, dilation))
        else:
            layers.append(nn.AvgPool2d(kernel, stride, padding))
    return nn.Sequential(*layers)


def backwards(layers, unit):
    """Return first and last pixel, along rows and columns, from the unit back to the image, layer by layer."""
    found = []
    for axis in (0, 1):
        first = last = unit[axis]
        for layer in reversed(layers):
            kernel, stride, padding, dilation = (
                value[axis] if isinstance(value, tuple) else value
                for value in (layer.kernel_size, layer.stride, layer.padding, getattr(layer, "dilation", 1))
            )
            first, last = first * stride - padding, last * stride - padding + dilation * (kernel - 1)
        found.append((first, last))
    return found


@settings(max_examples=30, deadline=None)
@given(st.lists(windows, min_size=1, max_size=4))
def test_stacks_of_strided_dilated_and_pooled_layers(specifications):
    model = stack(specifications)
    x = torch.zeros(1, 2, 160, 150)
    h, w = model(x).shape[2:]
    field = theoretical_receptive_field(model, x, layer=str(len(model) - 1))
    (top, bottom), (left, right) = backwards(model, (h // 2, w // 2))
    assert field.size == (bottom - top + 1, right - left + 1)
    assert field.center == ((top + bottom) / 2, (left + right) / 2)
    inside = max(0, min(bottom, 159) - max(top, 0) + 1), max(0, min(right, 149) - max(left, 0) + 1)
    assert field.clipped((160, 150)) == inside
    assert field.reason is None


def test_gradients_fill_the_field_and_nothing_else():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 5, 2, 2), nn.AvgPool2d(3, 2, 1), nn.Conv2d(4, 2, (3, 1), padding=1, dilation=2)
    )
    for weight in model.parameters():
        nn.init.constant_(weight, 1.0)
    result = effective_receptive_field(model, torch.randn(1, 3, 96, 64), position=(9, 6))
    rows, columns = (torch.from_numpy(result.scores.sum(axis)).nonzero().flatten() for axis in (1, 0))
    for seen, side, center in zip((rows, columns), result.theoretical.size, result.theoretical.center, strict=True):
        assert (int(seen[0]), int(seen[-1])) == (center - (side - 1) / 2, center + (side - 1) / 2)
    assert result.clipped == result.theoretical.size


@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (lambda: timm.create_model("test_resnet"), "layer3"),
        (lambda: timm.create_model("test_convnext"), "stages.1.downsample"),
        (lambda: torchvision.models.shufflenet_v2_x0_5(), "stage3.0"),
        (lambda: torchvision.models.squeezenet1_1(), "features.7"),
    ],
)
def test_no_gradient_lies_outside(build, layer):
    result = effective_receptive_field(build(), torch.randn(1, 3, 96, 96), layer=layer)
    field = result.theoretical
    assert field.reason is None
    assert field.size < (96, 96)
    top, left = (round(center - (side - 1) / 2) for center, side in zip(field.center, field.size, strict=True))
    held = result.scores[max(top, 0) : top + field.size[0], max(left, 0) : left + field.size[1]].sum()
    assert held == pytest.approx(result.scores.sum(), rel=1e-12)


def test_branches_see_what_any_sees():
    layers = {"a": nn.Conv2d(3, 4, 3, padding=1), "b": nn.Conv2d(3, 4, (1, 7), padding=(0, 3))}
    assert look(lambda m, x: m.a(x) + m.b(x), **layers).size == (3, 7)
    assert look(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), **layers).size == (3, 7)
    assert look(lambda m, x: torch.where(x[:, :1] > 0, m.a(x), m.b(x)), **layers).size == (3, 7)
    assert look(lambda m, x: torch.stack([m.a(x), m.b(x)], -1).amax(-1), **layers).size == (3, 7)
    assert look(lambda m, x: torch.stack([m.a(x), m.b(x)]).mean(0), **layers).size == (3, 7)
    shifted = look(lambda m, x: F.pad(m.a(x), (2, 0, 0, 0))[..., :-2] + m.a(x), **layers)
    assert (shifted.size, shifted.center) == ((3, 5), (16, 15))


def test_layouts_are_followed():
    conv, linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 6)
    norm = nn.LayerNorm(8)

    def channels_last(m, x):
        return F.gelu(m.linear(m.norm(m.conv(x).permute(0, 2, 3, 1))))

    def tokens(m, x):
        y = m.conv(x)
        y = m.linear(m.norm(y.flatten(2).transpose(1, 2)))
        return y.transpose(1, 2).reshape(len(x), 6, *x.shape[2:])

    def with_class_token(m, x):
        y = m.conv(x).flatten(2).transpose(1, 2)
        y = torch.cat([torch.zeros(1, 2, 8), y], 1) + 1
        return m.linear(y)[:, 2:].transpose(1, 2).unflatten(2, x.shape[2:])

    def shuffled(m, x):
        return m.conv(x).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2).chunk(2, 1)[0]

    for function in (channels_last, tokens, with_class_token, shuffled):
        field = look(function, (20, 30), conv=conv, linear=linear, norm=norm)
        assert (field.size, field.center, field.reason) == ((3, 3), (10, 15), None), function.__name__


def rearrange(x, draw):
    """Apply a random layout change that is valid for x."""
    dim = draw(st.integers(0, x.ndim - 1))
    kind = draw(st.sampled_from(["permute", "flatten", "unflatten", "slice", "unsqueeze", "select", "last", "token"]))
    if kind == "permute":
        return x.permute(draw(st.permutations(range(x.ndim))))
    if kind == "flatten":
        return x.flatten(dim, min(dim + 1, x.ndim - 1))
    if kind == "unflatten":
        first = draw(st.sampled_from([n for n in range(1, x.shape[dim] + 1) if x.shape[dim] % n == 0]))
        return x.unflatten(dim, (first, -1))
    if kind == "slice":
        index = [slice(None)] * x.ndim
        index[dim] = slice(draw(st.integers(0, x.shape[dim] - 1)), None, draw(st.integers(1, 3)))
        return x[tuple(index)]
    if kind == "select":
        return x.select(dim, x.shape[dim] - 1) if x.ndim > 2 else x
    if kind == "last":
        return x.chunk(2, dim)[-1]
    if kind == "token":  # prepended, unused, removed
        return torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x], dim).narrow(dim, 1, x.shape[dim])
    return x.unsqueeze(dim)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_places_are_where_the_trace_says(data):
    h, w = data.draw(st.integers(2, 6)), data.draw(st.integers(2, 6))
    pixels = 100 * torch.arange(h)[:, None] + torch.arange(w)  # its own row and column
    x = pixels.expand(1, 4, h, w).contiguous()
    tracer = Tracer(x)
    with tracer:
        for _ in range(data.draw(st.integers(1, 5))):
            x = rearrange(x, data.draw)
    grid = tracer.of(x).grid
    if grid is None:
        return
    y_dim, x_dim = grid.dims
    ys, xs = (axis.start + axis.jump * torch.arange(n) for axis, n in zip((grid.y, grid.x), grid.shape, strict=True))
    expected = 100 * ys[:, None] + xs
    assert (grid.y.size, grid.x.size) == (1, 1)
    if y_dim == x_dim:
        assert grid.around == (0, 0)
        assert (x.movedim(x_dim, -1) == expected.flatten()).all()
    else:
        assert (x.movedim((y_dim, x_dim), (-2, -1)) == expected).all()


def test_slices_lie_on_a_coarser_grid():
    def merging(m, x):  # Swin's patch merging
        return torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)

    field = look(merging)
    assert (field.size, field.jump, field.center) == ((2, 2), (2, 2), (16.5, 16.5))
    field = look(lambda m, x: F.adaptive_avg_pool2d(x[..., 3:, :][..., 1:, ::3], (7, 11)))
    assert (field.size, field.jump, field.center) == ((4, 1), (4, 3), (17.5, 15))


def test_gates_reach_the_whole_image_and_the_rest_is_known():
    model = timm.create_model("test_efficientnet")
    field = theoretical_receptive_field(model, 96)
    assert field.size is None
    assert field.reason == "aten.mean in blocks.3.0.se may reach every place"
    assert field.local == (67, 67)
    assert field.jump == (32, 32)
    assert field.clipped((96, 80)) == (96, 80)


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda m, x: x.flatten(2).softmax(-1).view_as(x), "aten._softmax"),
        (lambda m, x: F.group_norm(x, 1), "aten.native_group_norm"),
        (lambda m, x: F.instance_norm(x), "aten._native_batch_norm_legit"),
        (lambda m, x: F.layer_norm(x, x.shape[1:]), "aten.native_layer_norm"),
        (lambda m, x: x * x.mean((2, 3), keepdim=True), "aten.mean"),
        (lambda m, x: (x.flatten(2) @ torch.eye(1024)).view_as(x), "aten.mm"),
        (lambda m, x: torch.fft.irfft2(torch.fft.rfft2(x)), "aten._fft_r2c"),
        (lambda m, x: F.interpolate(x, scale_factor=2), "aten._unsafe_index"),
        (lambda m, x: F.conv_transpose2d(x, torch.ones(3, 3, 1, 1)), "aten.convolution"),
        (lambda m, x: F.conv2d(x, x.mean() * torch.ones(3, 3, 1, 1)), "aten.mean"),
        (lambda m, x: F.conv2d(x, x[..., :3, :3], padding=1), "aten.convolution"),
        (lambda m, x: x.flip(2) + x, "aten.flip"),
        (lambda m, x: x + x.roll(1, 3), "aten.roll"),
        (lambda m, x: x[..., torch.arange(32), :], "aten.index"),
    ],
)
def test_what_joins_places_is_named(function, operator):
    field = look(lambda m, x: F.avg_pool2d(function(m, x), 2))
    assert field.size is None
    assert operator in field.reason


def test_attention_reaches_every_place():
    field = theoretical_receptive_field(timm.create_model("test_vit"), 160)
    assert field.size is None
    assert "attention" in field.reason
    assert "in blocks.0.attn" in field.reason
    assert (field.jump, field.local, field.center) == ((16, 16), (16, 16), (87.5, 87.5))
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(2, 1), num_heads=(2, 2), embed_dim=16
    )
    field = theoretical_receptive_field(swin, 64)
    assert field.size is None
    assert "in layers.0.blocks.0" in field.reason
    assert (field.jump, field.center) == ((8, 8), (35.5, 35.5))


def test_operators_of_widefield():
    field = look(lambda m, x: m.conv(x), conv=DepthwiseConv2d(3, 3, (21, 5), padding="same"))
    assert field.size == (21, 5)
    morf = MoRFConv2d(3, 3, (3, 5, (3, 4)), groups=3)
    field = look(lambda m, x: m.conv(x), conv=morf)
    assert (field.size, field.local) == (None, (9, 9))
    assert "conv.router" in field.reason

    def deformable(m, x):
        offset, mask = torch.zeros(1, 32, 32, 18), torch.ones(1, 32, 32, 9)
        return dcnv3(x.permute(0, 2, 3, 1), offset, mask).permute(0, 3, 1, 2)

    assert look(deformable).size is None
    model = timm.create_model("replknet_31b", depths=(1, 1), widths=(8, 8), kernel_sizes=(7, 3), small_kernel=3)
    stem = 1 + 2 * 1 + 2 * 2 + 2 * 2
    assert theoretical_receptive_field(model, 64).size == (stem + 6 * 4 + 2 * 4 + 2 * 8,) * 2


def test_writing_in_place_hides_nothing():
    def parts(m, x):
        y = torch.zeros_like(x)
        y[:, :1] = m.conv(x)[:, :1]
        return y

    def beneath_a_view(m, x):
        y = x.clone()
        view = y.flatten(2)
        y += m.conv(x)
        return view.unflatten(2, x.shape[2:])

    for function in (parts, beneath_a_view):
        field = look(function, conv=nn.Conv2d(3, 3, 3, padding=1))
        assert field.size is None
        assert "writes to a tensor" in field.reason
    whole = look(lambda m, x: m.conv(x).relu_().add_(x), conv=nn.Conv2d(3, 3, 3, padding=1))
    assert whole.size == (3, 3)


def test_targets_sizes_and_contexts():
    model = nn.Sequential(nn.Conv2d(1, 2, 4, 4), nn.Conv2d(2, 2, 3, padding=1))
    by_image = theoretical_receptive_field(model, torch.randn(3, 1, 32, 48))
    assert by_image == theoretical_receptive_field(model, (32, 48))
    assert by_image == Field((12, 12), (4, 4), (17.5, 25.5), None, (12, 12))
    assert theoretical_receptive_field(model, 32, position=(0, 7)).center == (1.5, 29.5)
    assert theoretical_receptive_field(model, 32, position=(0, 7)).clipped((32, 32)) == (8, 8)
    with torch.inference_mode():
        assert theoretical_receptive_field(model, (32, 48)) == by_image
    assert theoretical_receptive_field(model.bfloat16(), (32, 48)) == by_image


def test_the_model_is_left_as_it_was():
    class Breaks(nn.Module):
        def forward(self, x):
            raise OSError("broken")

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), Breaks())
    model[2].eval()
    model[0].weight.requires_grad_(False)
    state = torch.get_rng_state()
    with pytest.raises(OSError, match="broken"):
        theoretical_receptive_field(model, 16, layer="1")
    assert theoretical_receptive_field(model[:3], 16).size == (3, 3)
    assert [m.training for m in model.modules()] == [True, True, True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_errors():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 2))
    with pytest.raises(ValueError, match=r"no layer '3'"):
        theoretical_receptive_field(model, 8, layer="3")
    with pytest.raises(ValueError, match=r"layer '2' of Sequential returns no map .* it returns \(1, 2\)"):
        theoretical_receptive_field(model, 8, layer="2")
    with pytest.raises(ValueError, match=r"position \(8, 0\) lies outside the map of layer '0', which is 8x8"):
        theoretical_receptive_field(model, 8, layer="0", position=(8, 0))
    with pytest.raises(ValueError, match="position must be one of 'center'; got 'middle'"):
        theoretical_receptive_field(model, 8, layer="0", position="middle")
    with pytest.raises(ValueError, match=r"Sequential cannot be run on images of \(3, 9, 9\)"):
        theoretical_receptive_field(model, 9)
    with pytest.raises(ValueError, match="images is empty"):
        theoretical_receptive_field(model, torch.zeros(0, 3, 8, 8))
    with pytest.raises(TypeError, match=r"images must be a tensor .*got str"):
        theoretical_receptive_field(model, "8")
    with pytest.raises(ValueError, match="does not depend on the image"):
        look(lambda m, x: torch.ones_like(x))
    with pytest.raises(ValueError, match="no layer of Sequential returns a map"):
        theoretical_receptive_field(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), 8)
