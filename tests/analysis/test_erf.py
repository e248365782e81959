import dataclasses
import json
import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tolerances import FLOAT32, FLOAT64, close
from widefield.analysis import ReceptiveField, effective_receptive_field, save
from widefield.analysis.erf import THRESHOLDS


def boxes(layers, kernel, dtype=torch.float32):
    convolutions = [nn.Conv2d(1, 1, kernel, padding=kernel // 2, bias=False) for _ in range(layers)]
    for convolution in convolutions:
        nn.init.constant_(convolution.weight, 1 / kernel**2)
    return nn.Sequential(*convolutions).to(dtype)


def box_field(layers, kernel, side):
    """Return the L-fold convolution of a box with itself, in the middle of an image."""
    profile = np.ones(1)
    for _ in range(layers):
        profile = np.convolve(profile, np.full(kernel, 1 / kernel))
    padded = np.zeros(side)
    first = side // 2 - len(profile) // 2
    padded[first : first + len(profile)] = profile
    field = np.outer(padded, padded)
    return field / field.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 6), st.sampled_from([3, 5, 7]), st.integers(0, 1))
def test_a_stack_of_boxes_is_the_convolution_of_boxes(dtype, layers, kernel, odd):
    side = layers * (kernel - 1) + 4 + odd
    result = effective_receptive_field(boxes(layers, kernel, dtype), torch.randn(2, 1, side, side))
    close(torch.from_numpy(result.scores), torch.from_numpy(box_field(layers, kernel, side)), 1e-6)
    # Variances of convolved densities add up.
    expected = math.sqrt(layers * (kernel**2 - 1) / 12)
    assert (result.sigma_x, result.sigma_y) == pytest.approx((expected, expected), rel=1e-5)
    assert result.theoretical.size == (layers * (kernel - 1) + 1,) * 2


def test_one_convolution_is_its_kernel():
    model = nn.Conv2d(1, 1, (5, 3), padding=(2, 1)).double()
    nn.init.uniform_(model.weight, 0.1, 1)
    result = effective_receptive_field(model, torch.randn(1, 1, 9, 11))
    expected = torch.zeros(9, 11, dtype=torch.double)
    expected[2:7, 4:7] = model.weight.detach()[0, 0]
    close(torch.from_numpy(result.scores), expected / expected.max(), FLOAT64)
    assert result.peak == pytest.approx(expected.max().item(), rel=1e-12)
    assert result.sigma_y > result.sigma_x


def test_channels_of_the_unit_are_added_before_what_is_negative_goes_and_those_of_the_image_after():
    model = nn.Conv2d(3, 4, 3, padding=1).double()
    result = effective_receptive_field(model, torch.randn(1, 3, 8, 8))
    expected = torch.zeros(8, 8, dtype=torch.double)
    expected[3:6, 3:6] = model.weight.detach().sum(0).clamp(min=0).sum(0)  # row and column 4: 8 // 2
    close(torch.from_numpy(result.scores * result.peak), expected, FLOAT64)
    assert result.position == (4, 4)


def curved():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, padding=1), nn.BatchNorm2d(4), nn.GELU()
    ).double()


def test_images_are_averaged_after_what_is_negative_goes():
    model, x = curved(), torch.randn(5, 3, 12, 12).double()
    result = effective_receptive_field(model, x, position=(1, 4))
    model.eval()
    jacobian = torch.autograd.functional.jacobian(lambda image: model(image[None])[0, :, 1, 4].sum(), x[0])
    assert not (jacobian >= 0).all()  # otherwise nothing would be dropped
    expected = sum(
        torch.autograd.functional.jacobian(lambda image: model(image[None])[0, :, 1, 4].sum(), one).clamp(min=0).sum(0)
        for one in x
    )
    close(torch.from_numpy(result.scores * result.peak), expected / 5, FLOAT64)
    assert (result.position, result.layer) == ((1, 4), "")
    assert result.about == {"images": 5, "size": 12, "layer": "(output)", "unit": "(1, 4) of 6"}


def test_batches_do_not_matter_and_calls_repeat_to_the_bit():
    model, x = curved(), torch.randn(5, 3, 12, 12).double()
    whole = effective_receptive_field(model, x)
    assert np.array_equal(whole.scores, effective_receptive_field(model, x).scores)
    loader = ({"image": part, "label": torch.zeros(len(part))} for part in x.split(3))
    for images, batch in ((x, 2), (loader, 8), ([(x[:4], None), (x[4:], None)], 1)):
        result = effective_receptive_field(model, images, batch_size=batch)
        close(torch.from_numpy(result.scores), torch.from_numpy(whole.scores), FLOAT64)
        assert result.about == whole.about


def squares(scores, center):
    """Compute areas by their definition: squares of 1, 3, 5... pixels around a pixel."""
    found = {}
    for share in THRESHOLDS:
        reach = 0
        while True:
            rows, columns = (slice(max(c - reach, 0), c + reach + 1) for c in center)
            if scores[rows, columns].sum() >= share * scores.sum() * (1 - 1e-12):
                break
            reach += 1
        found[share] = scores[rows, columns].size / scores.size
    return found


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(3, 12), st.integers(3, 12), st.floats(0, 8))
def test_area_ratios_are_those_of_growing_squares(seed, h, w, contrast):
    rng = np.random.default_rng(seed)
    kernel = rng.random((2 * h + 1, 2 * w + 1)) ** contrast
    model = nn.Conv2d(1, 1, kernel.shape, padding=(h, w)).double()
    model.weight.data[0, 0] = torch.from_numpy(kernel)
    result = effective_receptive_field(model, torch.zeros(1, 1, 2 * h + 1, 2 * w + 1).double())
    assert result.area_ratio == pytest.approx(squares(kernel, (h, w)), abs=1e-12)
    assert result.log_area_ratio == pytest.approx(squares(np.log10(kernel + 1), (h, w)), abs=1e-12)
    assert list(result.area_ratio.values()) == sorted(result.area_ratio.values())


def test_squares_lie_between_pixels_where_the_field_does():
    model = nn.Conv2d(1, 1, 4, 4).double()
    nn.init.constant_(model.weight, 1.0)
    result = effective_receptive_field(model, torch.zeros(1, 1, 16, 16).double())
    assert result.theoretical.center == (9.5, 9.5)
    assert result.area_ratio == pytest.approx({0.2: 4 / 256, 0.3: 16 / 256, 0.5: 16 / 256, 0.99: 16 / 256})


def test_the_logarithm_depends_on_the_magnitude_and_the_scores_do_not():
    model, x = nn.Conv2d(1, 1, 15, padding=7).double(), torch.zeros(1, 1, 15, 15).double()
    distance = (torch.arange(15.0)[:, None] - 7).abs() + (torch.arange(15.0) - 7).abs()
    model.weight.data[0, 0] = torch.exp(-distance)
    small = effective_receptive_field(model, x)
    model.weight.data *= 1e6
    large = effective_receptive_field(model, x)
    close(torch.from_numpy(large.scores), torch.from_numpy(small.scores), FLOAT64)
    assert large.area_ratio == small.area_ratio
    assert large.peak == pytest.approx(1e6 * small.peak)
    assert large.log_area_ratio[0.5] > 4 * small.log_area_ratio[0.5]
    logarithms = torch.log10(model.weight.data[0, 0] + 1)
    close(torch.from_numpy(large.logarithmic()), logarithms / logarithms.max(), FLOAT64)


def test_transformers_and_maps_with_channels_last():
    vit = effective_receptive_field(timm.create_model("test_vit"), torch.randn(1, 3, 160, 160))
    # The last map is the norm's, whose channels sum to zero, so the one before is used.
    assert vit.layer == "blocks"
    assert vit.position == (5, 5)
    assert vit.theoretical.size is None
    assert vit.clipped == (160, 160)
    assert vit.scores[80:96, 80:96].mean() > 20 * vit.scores.mean()  # its own patch, through the residual path
    assert (vit.scores > 0).mean() > 0.4
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(2, 2), num_heads=(2, 2), embed_dim=16
    )
    result = effective_receptive_field(swin, torch.randn(1, 3, 64, 64), layer="layers.0")
    assert result.about["unit"] == "(8, 8) of 16"
    assert np.unravel_index(result.scores.argmax(), (64, 64)) >= (32, 32)
    assert not result.scores[:8].any()  # two windows of 16 pixels, shifted by 8, limit the field


def test_a_norm_that_cancels_is_an_error_until_it_has_learnt():
    model, x = timm.create_model("test_vit"), torch.randn(1, 3, 160, 160)
    with pytest.raises(ValueError, match="channels of layer 'norm' of VisionTransformer always sum to the same value"):
        effective_receptive_field(model, x, layer="norm")
    nn.init.uniform_(model.norm.weight)
    assert effective_receptive_field(model, x).layer == "norm"


def test_what_the_user_gives_is_kept():
    result = effective_receptive_field(
        boxes(1, 3), torch.randn(1, 1, 8, 12), name="a box", about={"seed": 3, "images": "none"}
    )
    assert (result.name, result.size) == ("a box", "8x12")
    assert result.about == {"seed": 3, "images": 1, "size": "8x12", "layer": "(output)", "unit": "(4, 6) of 8x12"}
    assert effective_receptive_field(boxes(1, 3), torch.randn(1, 1, 8, 8)).name == "Sequential"


def test_contexts_layouts_and_dtypes():
    model, x = boxes(2, 3), torch.randn(2, 1, 12, 12)
    expected = effective_receptive_field(model, x)
    with torch.inference_mode():
        assert np.array_equal(effective_receptive_field(model, torch.clone(x)).scores, expected.scores)
    with torch.no_grad():
        assert np.array_equal(effective_receptive_field(model, x).scores, expected.scores)
    before = x.clone()
    reads, writes = (nn.Sequential(nn.ReLU(inplace=inplace), *model) for inplace in (False, True))
    clipped = effective_receptive_field(reads, x)
    assert np.array_equal(effective_receptive_field(writes, x).scores, clipped.scores)
    assert torch.equal(x, before)
    half = effective_receptive_field(model.bfloat16(), x)
    close(torch.from_numpy(half.scores), torch.from_numpy(expected.scores), 0.05)


@pytest.mark.filterwarnings("ignore:.*jit.*")
def test_what_cannot_be_followed_has_an_effective_field_and_a_reason():
    x = torch.randn(2, 1, 12, 12)
    model = nn.Sequential(torch.jit.script(boxes(1, 3)), *boxes(1, 3))  # it accepts no hooks
    result = effective_receptive_field(model, x, layer="1")
    expected = effective_receptive_field(boxes(2, 3), x)
    close(torch.from_numpy(result.scores), torch.from_numpy(expected.scores), FLOAT32)
    assert (result.theoretical.size, result.theoretical.center) == (None, (6, 6))
    assert "cannot be followed: register_forward_pre_hook is not supported" in result.theoretical.reason
    assert not model[1]._forward_hooks


class Breaks(nn.Module):
    """A model that fails in the nth call."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def forward(self, x):
        self.at -= 1
        if not self.at:
            raise OSError("broken")
        return x


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_the_model_is_left_as_it_was_after_an_exception_too(at):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), Breaks(at))
    model[2].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    images = [torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    if at:
        with pytest.raises(OSError, match="broken"):
            effective_receptive_field(model, images)
    else:
        effective_receptive_field(model, images)
    assert [m.training for m in model.modules()] == [True, True, True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[1].weight.grad is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(image.requires_grad for image in images)


def test_errors_say_what_to_do():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten()), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="no layer 'conv'"):
        effective_receptive_field(model, x, layer="conv")
    with pytest.raises(ValueError, match=r"layer '1' .* returns \(2, 256\)"):
        effective_receptive_field(model, x, layer="1")
    with pytest.raises(ValueError, match=r"position \(2, 8\) lies outside the map of layer '0', which is 8x8"):
        effective_receptive_field(model, x, position=(2, 8))
    with pytest.raises(ValueError, match="position must be one of 'center'; got 'mean'"):
        effective_receptive_field(model, x, position="mean")
    with pytest.raises(ValueError, match="images is empty"):
        effective_receptive_field(model, x[:0])
    with pytest.raises(ValueError, match=r"images must be of one size; got \(3, 8, 8\) and \(3, 8, 9\)"):
        effective_receptive_field(model, [x, torch.randn(1, 3, 8, 9)])
    with pytest.raises(TypeError, match="images must be floating-point tensors"):
        effective_receptive_field(model, x.long())
    with pytest.raises(ValueError, match=r"Sequential cannot be run on images of \(3, 9, 9\): mat1 and mat2"):
        effective_receptive_field(nn.Sequential(*model, nn.Linear(256, 2)), torch.randn(1, 3, 9, 9))
    detached = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Detached())
    with pytest.raises(ValueError, match="layer '' of Sequential has no gradient with respect to the images"):
        effective_receptive_field(detached, x)
    nn.init.constant_(model[0].weight, -1.0)
    with pytest.raises(ValueError, match="no pixel has a positive gradient in layer '0' of Sequential"):
        effective_receptive_field(model, x)
    nn.init.constant_(model[0].weight, math.nan)
    with pytest.raises(ValueError, match="layer '0' of Sequential is not finite for an image from 0 to 1"):
        effective_receptive_field(model, x)


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


@pytest.fixture(scope="module")
def fields():
    torch.manual_seed(0)
    model = boxes(3, 5)
    return {
        f"box {size}": effective_receptive_field(model, torch.randn(1, 1, size, size), name="box_" * 8)
        for size in (24, 32)
    }


def test_results_become_rows_json_and_pages(fields, tmp_path):
    (row,) = fields["box 24"].rows()
    assert (row["size, px"], row["images"], row["theory, px"]) == ("24", "1", "13")
    assert row["20% in"] == f"{fields['box 24'].area_ratio[0.2]:.1%}"
    assert row.keys() == fields["box 32"].rows()[0].keys()
    found = json.loads(save(fields, tmp_path / "erf.json").read_text())["results"]["box 24"]
    assert np.array(found["scores"]) == pytest.approx(fields["box 24"].scores, abs=1e-6)
    assert found["area_ratio"] == {str(k): v for k, v in fields["box 24"].area_ratio.items()}
    assert found["theoretical"]["size"] == [13, 13]
    page = save(fields, tmp_path / "erf.html").read_text()
    assert "theory, px" in page
    assert "unit (12, 12) of 24" in page


def panels(figure):
    return [axis for axis in figure.axes if axis.images and axis.get_title()]


@pytest.mark.parametrize("log", [True, False])
def test_figures_have_one_scale_and_show_the_theoretical_field(fields, log):
    figure = ReceptiveField.draw(fields, log=log)
    shown = panels(figure)
    assert [axis.get_title().splitlines()[-1] for axis in shown] == ["24 px", "32 px"]
    limits = {axis.images[0].get_clim() for axis in shown}
    assert limits == {(1e-4, 1) if log else (0, 1)}
    for axis, result in zip(shown, fields.values(), strict=True):
        (dashed,) = axis.lines
        assert (dashed.get_xdata().min(), dashed.get_xdata().max()) == (-6.5, 6.5)
        ratio = result.area_ratio[0.5]
        assert f"{100 * ratio:.2g}"[:2] in axis.get_xlabel()
        assert "theoretical: 13 px" in axis.get_xlabel()


def test_several_models_at_several_sizes_are_a_table(fields):
    others = {f"other {name}": dataclasses.replace(field, name="other") for name, field in fields.items()}
    figure = ReceptiveField.draw({**fields, **others})
    titles = [axis.get_title().replace("\n", " ") for axis in panels(figure)]
    assert titles[1::2] == ["other 24 px", "other 32 px"]
    del others["other box 32"]
    assert len(panels(ReceptiveField.draw({**fields, **others}))) == 3
    many = {str(i): dataclasses.replace(fields["box 24"], name=str(i)) for i in range(6)}
    assert [axis.get_title() for axis in panels(ReceptiveField.draw(many))] == list(many)
