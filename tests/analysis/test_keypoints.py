"""What a pose model says about one key point: its receptive field, its class activation, means over people."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from headed import UNet

from analysis.known_fields import Blurred, person
from tolerances import FLOAT64, close
from widefield import dense
from widefield.analysis import (
    ClassAt,
    KeypointPeak,
    class_activation,
    effective_receptive_field,
    keypoint_receptive_fields,
    object_receptive_fields,
    translation_stability,
)
from widefield.analysis.registry import ANALYSES, View

NAMES = ("nose", "elbow", "knee")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    found = dense.HeatmapPose("test_resnet", 3, channels=(16, 16)).double().eval()
    with torch.no_grad():
        for parameter in found.head.parameters():
            if parameter.ndim == 4:
                parameter.mul_(100)
    return found


def test_the_field_of_a_key_point_is_the_gradient_of_its_peak(model):
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    result = effective_receptive_field(model, image, targets=KeypointPeak(1), classes=NAMES)
    leaf = image.clone().requires_grad_()
    heatmaps = model(leaf)
    place = heatmaps[0, 1].flatten().argmax()
    gradient = torch.autograd.grad(heatmaps[0, 1].flatten()[place], leaf)[0]
    close(torch.from_numpy(result.scores * result.peak), gradient.clamp(min=0)[0].sum(0), FLOAT64)
    assert result.position == (int(place) // heatmaps.shape[3], int(place) % heatmaps.shape[3])
    assert result.rows()[0]["layer"] == "elbow at its peak"
    assert result.theoretical.size is None
    assert "transposed" in result.theoretical.reason
    assert json.loads(json.dumps(result.to_dict()))["of"] == "elbow at its peak"


def test_the_highest_peak_is_the_default(model):
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    best = int(model(image).amax((2, 3)).argmax())
    result = effective_receptive_field(model, image, targets=KeypointPeak())
    assert result.of == f"key point {best} at its peak"
    close(
        torch.from_numpy(result.scores),
        torch.from_numpy(effective_receptive_field(model, image, targets=KeypointPeak(best)).scores),
        FLOAT64,
    )


def test_fields_of_known_squares():
    image = person()["image"][None]
    result = effective_receptive_field(Blurred(), image, targets=KeypointPeak(1))
    assert {tuple(place) for place in np.argwhere(result.scores > 0)} == {
        (y, x) for y in range(19, 26) for x in range(37, 44)
    }


def test_maps_of_a_key_point_are_local(model):
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    result = class_activation(model, images, targets=KeypointPeak(2), classes=NAMES)
    assert result.labels == ("knee", "knee")
    assert result.maps.shape[1:] == (2, 2)  # the last map of the backbone
    found = model.decode(model(images), (64, 64))
    close(torch.from_numpy(result.points), found.points[:, 2], FLOAT64)
    close(torch.from_numpy(result.probability), found.scores[:, 2].clamp(0, 1).float(), 1e-6)
    features = model.backbone(images)[0].detach().requires_grad_()
    values = model.head(features)[:, 2].amax((1, 2))
    expected = (torch.autograd.grad(values.sum(), features)[0] * features).sum(1).relu()
    expected = expected / expected.amax((1, 2), keepdim=True).clamp(min=1e-12)
    close(torch.from_numpy(result.maps), expected.float(), 1e-5)
    assert result.plot().axes


def test_key_points_take_the_place_of_classes_in_maps(model):
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    highest = model(images).amax((2, 3))
    result = class_activation(model, images, classes=NAMES)
    assert result.predicted.tolist() == highest.float().clamp(0, 1).argmax(1).tolist()
    chosen = class_activation(model, images, targets=[1, 0], classes=NAMES)
    assert chosen.labels == ("elbow", "nose")


def test_radii_of_known_squares_are_medians_over_people():
    people = [person(seed=k, points=((20 + k, 15), (40, 22 + k), (12 + k, 45))) for k in range(3)]
    result = keypoint_receptive_fields(Blurred(), people, classes=NAMES, sizes=())
    assert [(group.keypoint, group.size, group.people) for group in result.groups] == [
        (k, "all sizes", 3) for k in range(3)
    ]
    for group, side in zip(result.groups, (3, 7, 11), strict=True):
        places = np.mgrid[-(side // 2) : side // 2 + 1, -(side // 2) : side // 2 + 1]
        radii = np.sort(np.hypot(*(places + 0.0)).ravel())
        # msra moves a peak by a quarter of a pixel, towards the larger neighbor
        for share in (0.5, 0.9):
            assert abs(group.reach_pixels[share] - radii[int(np.ceil(share * side**2)) - 1]) < 0.75
            assert group.reach[share] == pytest.approx(group.reach_pixels[share] / 64)
        assert group.found == 1.0
        assert group.field.sum() == pytest.approx(1.0)
    shown = result.rows()[1]
    assert (shown["key point"], shown["number"], shown["found"]) == ("elbow", "3", "100%")


def test_people_are_grouped_by_size_and_by_labels():
    people = [
        person(area=torch.tensor(400.0)),
        person(area=torch.tensor(40000.0), visible=(2, 0, 2)),
        None,
        person(area=torch.tensor(40001.0), points=((20, 15), (40, 22), (12, 50)), visible=(2, 0, 0)),
    ]
    result = keypoint_receptive_fields(Blurred(), people, sizes=(50,), keypoints=[0, 1])
    found = {(group.keypoint, group.size): group.people for group in result.groups}
    assert found == {(0, "below 50 px"): 1, (0, "50 px and more"): 2, (1, "below 50 px"): 1}
    assert result.about["crops"] == 3
    limited = keypoint_receptive_fields(Blurred(), people, sizes=(50,), keypoints=[0], count=1)
    assert [group.people for group in limited.groups] == [1, 1]


def test_boxes_are_measured_in_pixels_of_the_crop():
    affine = torch.tensor([[0.5, 0.0, 3.0], [0.0, 0.5, 1.0]], dtype=torch.float64)
    boxed = person(box=torch.tensor([10.0, 10.0, 30.0, 90.0]), affine=affine)
    plain, own = (keypoint_receptive_fields(Blurred(), [one], sizes=()).groups[2] for one in (person(), boxed))
    assert own.reach_pixels == plain.reach_pixels
    assert own.reach[0.9] == pytest.approx(plain.reach[0.9] * 64 / 40)


def test_a_key_point_that_is_far_off_is_not_found():
    wrong = person()
    wrong["keypoints"][0, :2] = torch.tensor([50.0, 50.0])
    outside = person()
    outside["keypoints"][1, :2] = torch.tensor([70.0, 20.0])
    groups = keypoint_receptive_fields(Blurred(), [wrong, outside], sizes=()).groups
    assert [group.found for group in groups] == [0.5, 1.0, 1.0]
    assert [group.people for group in groups] == [2, 1, 2]


def test_results_draw_and_save_themselves(model, tmp_path):
    sets = {name: keypoint_receptive_fields(model, [person(seed=3)], classes=NAMES, name=name) for name in ("a", "b")}
    result = sets["a"]
    assert len(type(result).figures(sets)) == 3
    stored = json.loads(result.save(tmp_path / "fields.json").read_text())["results"]["a"]
    assert stored["names"] == list(NAMES)
    assert "example" not in stored["groups"][0]
    assert result.save(tmp_path / "fields.html").read_text().count("<svg ") == 3


def test_an_analysis_of_pose_models(model):
    entry = ANALYSES["keypoint-erf"]
    assert entry.applies(model)
    assert not ANALYSES["stability"].applies(model)
    view = View(model, "tiny", "random", classes=NAMES, samples=[person()], source="made up")
    assert entry.run(view, count=1).about["source"] == "made up"


def test_wrong_questions_are_refused(model):
    images = torch.zeros(2, 3, 64, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="give one image; keypoint_receptive_fields"):
        effective_receptive_field(model, images, targets=KeypointPeak(0))
    with pytest.raises(ValueError, match="keypoint must be from 0 to 2; got 3"):
        effective_receptive_field(model, images[:1], targets=KeypointPeak(3))
    with pytest.raises(ValueError, match="needs a pose model"):
        effective_receptive_field(UNet().double().eval(), images[:1], targets=KeypointPeak(0))
    with pytest.raises(ValueError, match="needs a pose model"):
        class_activation(UNet().double().eval(), images[:1], targets=KeypointPeak(0))
    with pytest.raises(ValueError, match="needs a pose model"):
        keypoint_receptive_fields(UNet(), [person()])
    with pytest.raises(ValueError, match="needs a detector"):
        object_receptive_fields(model, [person()])
    with pytest.raises(ValueError, match="is a pose model"):
        translation_stability(model, images, shifts=(1,))
    with pytest.raises(ValueError, match="leave out layer and position"):
        effective_receptive_field(model, images[:1], targets=KeypointPeak(0), layer="head")
    with pytest.raises(ValueError, match="no labeled key point in 1 crops"):
        keypoint_receptive_fields(model, [person(visible=(0, 0, 0))])
    with pytest.raises(TypeError, match="samples with key points"):
        keypoint_receptive_fields(model, [{"image": images[0]}])
    with pytest.raises(ValueError, match="2 names, but the model has 3 key points"):
        keypoint_receptive_fields(model, [person()], classes=NAMES[:2])


def test_a_pixel_of_a_heatmap_may_be_asked_about(model):
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert effective_receptive_field(model, image, targets=ClassAt(0, 3, 5)).position == (3, 5)


def test_words_hold_radii_ends_and_what_is_found():
    people = [person(seed=k, area=torch.tensor(area)) for k, area in enumerate((400.0, 400.0, 40000.0))]
    result = keypoint_receptive_fields(Blurred(), people, classes=NAMES, sizes=(50,), name="net")
    radii = {k: [g.reach[0.9] for g in result.groups if g.keypoint == k] for k in range(3)}
    means = [(2 * small + large) / 3 for small, large in radii.values()]  # two people, and one
    half = np.average([g.reach[0.5] for g in result.groups], weights=[g.people for g in result.groups])
    words = type(result).reading({"net": result})
    assert words == (
        f"net: half of the contributions to a key point come from within {half:.2f} of the longer side of the person's "
        f"box around it, and 90% from within {np.mean(means):.2f}. The 90% reach least far for nose ({means[0]:.2f}) "
        f"and farthest for knee ({means[2]:.2f})."
    )
    assert result.summary().startswith(f"{words}\nnet: ")


def test_words_on_sizes_a_single_key_point_and_wrong_peaks():
    found = keypoint_receptive_fields(Blurred(), [person()], sizes=(50,), keypoints=[1], name="net")
    (group,) = found.groups
    assert "least far" not in found.summary()
    large = replace(group, size="50 px and more", reach={0.5: 0.2, 0.9: 0.4}, people=3, found=0.0)
    both = replace(found, groups=(group, large))
    assert (
        f"By size they reach least far for people below 50 px ({group.reach[0.9]:.2f}) and farthest for people of 50 "
        "px and more (0.40). The model finds 25% of these key points: most fields belong to a peak at a wrong place."
    ) in both.summary()
