"""Translation stability: models that shifts cannot affect, models that they must affect, and one-pass statistics."""

import json

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import widefield  # noqa: F401
from tolerances import FLOAT64
from widefield.analysis import save
from widefield.analysis.stability import DIRECTIONS, SHIFTS, TranslationStability, translation_stability, usual_shifts


def pointwise(classes=5):
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.GELU(), nn.Conv2d(8, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(), nn.Conv2d(8, 8, 3, 2, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).double()  # fmt: skip


def test_even_images_have_nothing_that_shifts():
    images = torch.randn(6, 3, 1, 1, dtype=torch.float64).expand(-1, -1, 24, 24)
    found = translation_stability(small(), images, shifts=(1, 3, 8))
    assert found.same.shape == found.cosine.shape == found.change.shape == (3, 3, 6)
    assert found.same.all()
    assert (found.change == 0).all()
    assert abs(found.cosine - 1).max() == 0


def test_periodic_images_look_alike_to_a_mean_over_places():
    tile = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    images = tile.repeat(1, 1, 7, 6)  # 28 x 24; windows of 20 x 16 contain whole periods
    found = translation_stability(pointwise(), images, shifts=(1, 2, 5, 8))
    assert found.same.all()
    assert found.change.max() < FLOAT64
    assert found.about["window"] == [20, 16]


class EverySecond(nn.Module):
    """Return two scores: the mean of every second column from the first, and one half."""

    def forward(self, x):
        seen = x[:, 0, :, ::2].mean((1, 2))
        return torch.stack([seen, torch.full_like(seen, 0.5)], 1)


def test_a_stride_is_blind_to_what_a_shift_by_less_brings():
    images = torch.zeros(2, 1, 20, 20)
    images[0, :, :, ::2] = 1  # stripes: bright, then dark; and the reverse
    images[1, :, :, 1::2] = 1
    found = translation_stability(EverySecond(), images, shifts=(1, 2, 3, 4))
    for name, moved in zip(DIRECTIONS, (True, False, True), strict=True):
        k = list(DIRECTIONS).index(name)
        odd = [0, 2]
        assert (found.same[k, odd] == (not moved)).all()
        assert found.same[k, [1, 3]].all()
        assert (found.change[k, [1, 3]] == 0).all()
    # from (1, 1/2) to (0, 1/2), and back
    assert found.change[0, 0] == pytest.approx([1.25**-0.5, 2])
    assert found.cosine[0, 0] == pytest.approx([0.5 / 1.25**0.5] * 2)
    assert [row["same class (%)"] for row in found.rows()] == [
        "33.3 ± 0.0", "100.0 ± 0.0", "33.3 ± 0.0", "100.0 ± 0.0",
    ]  # fmt: skip


class Corner(nn.Module):
    """Return the upper left pixel's channels as scores, so a shift reveals the pixel there."""

    def __init__(self):
        super().__init__()
        self.register_buffer("of", torch.zeros((), dtype=torch.float64))  # the dtype of its computation

    def forward(self, x):
        return x[:, :, 0, 0]


def test_windows_lie_where_they_are_said_to():
    images = torch.randn(3, 4, 12, 10, dtype=torch.float64)
    found = translation_stability(Corner(), images, shifts=(4, 1))
    assert found.shifts == (1, 4)
    before = images[:, :, 0, 0]
    for d, (down, right) in enumerate(DIRECTIONS.values()):
        for s, shift in enumerate(found.shifts):
            after = images[:, :, down * shift, right * shift]
            assert found.change[d, s] == pytest.approx(((after - before).norm(dim=1) / before.norm(dim=1)).tolist())
            assert found.cosine[d, s] == pytest.approx(torch.cosine_similarity(before, after).tolist())
            assert found.same[d, s].tolist() == (before.argmax(1) == after.argmax(1)).tolist()


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 9), batch=st.integers(1, 10), offset=st.sampled_from([0.0, 1e4]), seed=st.integers(0, 99))
def test_chunks_do_not_matter_and_distances_between_images_are_those_of_all_pairs(count, batch, offset, seed):
    torch.manual_seed(seed)
    images = torch.randn(count, 4, 8, 8, dtype=torch.float64) + offset
    found = translation_stability(Corner(), images, shifts=(1, 2), batch_size=batch)
    whole = translation_stability(Corner(), [images[:1], images[1:]], shifts=(1, 2), batch_size=count)
    assert np.array_equal(found.change, whole.change)
    scores = images[:, :, 0, 0]
    pairs = torch.cdist(scores, scores, compute_mode="donot_use_mm_for_euclid_dist").square()
    if count == 1:
        assert np.isnan([found.between, whole.between]).all()
    else:
        mean = pairs.sum() / (count * (count - 1))
        expected = (mean / scores.square().sum(1).mean()).sqrt().item()
        assert found.between == pytest.approx(expected, rel=1e-9)
        assert whole.between == pytest.approx(expected, rel=1e-9)


def test_the_model_is_left_as_it_was_and_runs_agree():
    model, images = small().train(), torch.randn(4, 3, 24, 24)
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[7].bias.grad = torch.ones(5, dtype=torch.float64)
    stored = {k: v.clone() for k, v in model.state_dict().items()}

    def state():
        return (
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            torch.get_rng_state().tolist(),
        )

    before = state()
    first, second = (translation_stability(model, images, shifts=(1, 8)) for _ in range(2))
    assert np.array_equal(first.change, second.change)
    with pytest.raises(ValueError, match="must be finite"):
        translation_stability(model, images / 0, shifts=(1, 8))
    assert state() == before
    assert all(torch.equal(v, stored[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"shifts": ()}, ValueError, r"distinct numbers of pixels.*got \(\)"),
        ({"shifts": (2, 2)}, ValueError, r"distinct .* got \(2, 2\)"),
        ({"shifts": (0, 1)}, ValueError, "every entry of shifts must be at least 1; got 0"),
        ({"shifts": (1.5,)}, TypeError, "every entry of shifts must be an integer; got 1.5"),
        ({"shifts": 4}, TypeError, "shifts must be a sequence .* got 4"),
        ({"shifts": (1, 24)}, ValueError, r"a shift by 24 pixels leaves nothing of images of \(24, 24\) pixels"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"images": torch.randn(3, 24, 24)}, ValueError, "N, C, H, W"),
        ({"images": []}, ValueError, "images is empty"),
        ({"images": [torch.randn(1, 3, 24, 24), torch.randn(1, 3, 9, 9)]}, ValueError, "one size"),
        ({"model": nn.Conv2d(3, 5, 1)}, ValueError, "Conv2d is a segmentation model: .* one score per class"),
    ],
)
def test_errors_say_what_to_mend(given, error, message):
    given = {"model": pointwise(), "images": torch.randn(2, 3, 24, 24), "shifts": (1, 2), **given}
    with pytest.raises(error, match=message):
        translation_stability(**given)


def test_models_of_others_stand_on_one_figure(tmp_path):
    images = torch.randn(3, 3, 40, 40)
    results = {
        name: translation_stability(model.eval(), images, shifts=(2, 8), name=name, about={"source": "noise"})
        for name, model in {
            "test_resnet": timm.create_model("test_resnet", num_classes=5),
            "a network{with: arguments}": small().float(),
        }.items()
    }
    first = results["test_resnet"]
    assert isinstance(first, TranslationStability)
    assert first.about == {"source": "noise", "images": 3, "size": 40, "window": 32, "shifts": [2, 8]}
    assert len(first.rows()) == 2
    figure = TranslationStability.draw(results)
    assert len(figure.axes) == 6
    assert figure.get_size_inches()[0] <= 7
    for axis in figure.axes[3:]:
        assert axis.get_yscale() == "log"
        assert axis.get_xlabel() == "shift (pixels)"
    still = translation_stability(small().float(), torch.zeros(1, 3, 20, 20), shifts=(1,))
    assert still.plot().axes[3].get_yscale() == "linear"  # no change, which a logarithmic axis cannot show
    stored = json.loads(save({"still": still}, tmp_path / "x.json").read_text())["results"]["still"]
    assert stored["between"] is None
    assert stored["change"] == [[[0.0]]] * 3
    assert still.rows()[0]["other image"] == "–"
    with pytest.raises(TypeError, match="no options"):
        first.plot(log=True)


@given(st.integers(2, 600))
def test_the_usual_shifts_are_those_of_the_larger_images(side):
    """All that measure a model agree: from its own side, and from that of the images that are larger by the margin."""
    shifts = usual_shifts(side)
    larger = side + max(shifts)
    assert (tuple(shift for shift in SHIFTS if 8 * shift <= larger) or (1,)) == shifts
    assert max(shifts) == 1 or 7 * max(shifts) <= side


def test_the_default_depends_on_the_images():
    images = torch.randn(2, 3, 36, 40)
    assert translation_stability(small(), images).shifts == (1, 2, 4)
