"""Pose models with heatmaps: the head, and key points to heatmaps and back."""

import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from tolerances import FLOAT32, FLOAT64, close
from widefield import dense
from widefield.dense.heatmap_codec import CODECS

IMAGE, HEATMAP = (256, 192), (64, 48)


def codec(kind="msra", image=IMAGE, heatmap=HEATMAP, **options):
    return dense.HeatmapCodec(image, heatmap, kind=kind, **options)


def naive(points, kind, image=IMAGE, heatmap=HEATMAP, sigma=2.0):
    """Return the heatmaps of key points, pixel by pixel."""
    less = kind == "udp"
    made = torch.zeros(len(points), *heatmap, dtype=torch.float64)
    for index, (x, y) in enumerate(points):
        x = x * (heatmap[1] - less) / (image[1] - less)
        y = y * (heatmap[0] - less) / (image[0] - less)
        near_x, near_y = math.trunc(x + 0.5), math.trunc(y + 0.5)
        center = (near_x, near_y) if kind == "msra" else (x, y)
        for row in range(heatmap[0]):
            for column in range(heatmap[1]):
                beyond = max(abs(column - near_x), abs(row - near_y)) > 3 * sigma
                if kind == "unbiased" or not beyond:
                    far = (column - center[0]) ** 2 + (row - center[1]) ** 2
                    made[index, row, column] = math.exp(-far / (2 * sigma**2))
    return made


@pytest.mark.parametrize("kind", CODECS)
def test_heatmaps_are_gaussians(kind):
    points = [(96.0, 128.0), (70.85, 130.92), (3.2, 251.0), (190.0, 0.4)]
    heatmaps, weights = codec(kind).encode(torch.tensor(points, dtype=torch.float64), torch.ones(4))
    assert weights.tolist() == [1, 1, 1, 1]
    close(heatmaps, naive(points, kind), FLOAT64)


@pytest.mark.parametrize("kind", CODECS)
def test_points_without_a_label_or_far_outside_have_no_weight(kind):
    points = torch.tensor([[[20.0, 30.0], [400.0, 30.0], [20.0, -90.0], [-20.0, 30.0]]])
    heatmaps, weights = codec(kind).encode(points, torch.tensor([[0.0, 1.0, 1.0, 1.0]]))
    assert weights.tolist() == [[0, 0, 0, 1]]  # the last one's peak reaches the heatmap
    assert (heatmaps[0, :3] == 0).all()
    assert heatmaps[0, 3].max() > 0


@given(
    x=st.floats(30, 160), y=st.floats(30, 220), kind=st.sampled_from(CODECS),
    sizes=st.sampled_from([(IMAGE, HEATMAP, 2.0, 11), ((384, 288), (96, 72), 3.0, 17)]),
)  # fmt: skip
def test_decoding_returns_what_was_encoded(x, y, kind, sizes):
    image, heatmap, sigma, blur = sizes
    rule = codec(kind, image, heatmap, sigma=sigma, blur=blur)
    points = torch.tensor([[[x, y]]], dtype=torch.float64)
    heatmaps, _ = rule.encode(points, torch.ones(1, 1))
    found = rule.decode(heatmaps)
    # Pixels of the image: a heatmap's pixel is 4. UDP's cut window and its two scales cost a little.
    within = {"msra": 3.01, "unbiased": 0.02, "udp": 1.2}[kind]
    assert (found.points - points).abs().max() <= within
    assert 0.85 < found.scores.item() <= 1


def test_the_quarter_of_a_pixel_goes_to_the_larger_neighbor():
    heatmaps = torch.zeros(1, 3, 8, 10)
    heatmaps[0, :, 4, 5] = 1
    heatmaps[0, 0, 4, 6], heatmaps[0, 0, 3, 5] = 0.5, 0.5
    heatmaps[0, 2] = -1
    found = codec(image=(32, 40), heatmap=(8, 10)).decode(heatmaps)
    assert found.points[0].tolist() == [[21, 15], [20, 16], [-4, -4]]
    assert found.scores[0].tolist() == [1, 1, -1]


@pytest.mark.parametrize("kind", CODECS)
def test_a_batch_is_decoded_as_each_alone(kind):
    heatmaps = torch.rand(3, 5, 16, 12)
    rule = codec(kind, (64, 48), (16, 12))
    together = rule.decode(heatmaps)
    for index in range(3):
        close(together.points[index], rule.decode(heatmaps[index : index + 1]).points[0], 1e-4)
    assert torch.isfinite(together.points).all()


def test_mirror_images_swap_left_and_right():
    heatmaps = torch.rand(2, 3, 5, 7)
    turned = dense.flipped_heatmaps(heatmaps, (0, 2, 1), shift=False)
    assert torch.equal(turned[:, 1], heatmaps[:, 2].flip(-1))
    assert torch.equal(dense.flipped_heatmaps(turned, (0, 2, 1), shift=False), heatmaps)
    shifted = dense.flipped_heatmaps(heatmaps, (0, 2, 1), shift=True)
    assert torch.equal(shifted[..., 1:], turned[..., :-1])
    assert torch.equal(shifted[..., 0], turned[..., 0])


def test_a_model_gives_a_heatmap_per_key_point():
    model = dense.HeatmapPose("test_resnet", 5, channels=(8, 8)).train()
    assert model.stride == 8
    heatmaps = model(torch.randn(2, 3, 64, 96))
    assert heatmaps.shape == (2, 5, 8, 12)
    heatmaps.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.num_keypoints == 5


def test_one_map_is_read():
    maps = dense.feature_maps(timm.create_model("test_resnet", features_only=True))
    with pytest.raises(ValueError, match="reads one map, and the backbone gives 4"):
        dense.HeatmapPose(maps, 5)


def test_published_parameters():
    """mmpose's ResNet-50: 34.0M parameters; MogaNet-S: 29.0M, as stated by its authors."""
    with torch.device("meta"):
        count = {
            name: sum(p.numel() for p in dense.HeatmapPose(name, 17).parameters())
            for name in ("resnet50", "moganet_small")
        }
    assert count["resnet50"] == pytest.approx(34.0e6, rel=2e-3)
    assert count["moganet_small"] == pytest.approx(29.0e6, rel=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dark"}, "kind must be one of"),
        ({"sigma": 0}, "sigma must be above 0"),
        ({"blur": 10}, "blur must be odd"),
        ({"heatmap": (64, 1)}, "a side of heatmap_size"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        codec(**options)


@pytest.mark.parametrize(("kind", "size"), [("msra", (64, 64)), ("unbiased", (96, 96)), ("udp", (64, 96))])
def test_a_model_reads_the_heatmaps_that_its_codec_writes(kind, size):
    model = dense.HeatmapPose("test_resnet", 3, channels=(8, 8, 8, 8), kind=kind, sigma=1.5, blur=7).eval()
    codec = model.codec(size)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, *size)).shape[2:] == codec.heatmap_size
    points = torch.tensor([[[20.0, 30.0], [31.0, 24.0], [26.5, 41.25]]]) + torch.tensor([size[1] - 64, size[0] - 64])
    heatmaps, _ = codec.encode(points, torch.ones(1, 3))
    found = model.decode(heatmaps)
    within = model.stride / 2 if kind == "msra" else 0.1  # "msra" encodes whole pixels of the heatmap
    assert (found.points - points).abs().max() <= within
    if kind == "udp":  # published code encodes and decodes at different scales
        raw = codec.decode(heatmaps).points
        close(raw, found.points * torch.tensor([size[1] / (size[1] - 1), size[0] / (size[0] - 1)]), FLOAT32)
    else:
        close(found.points, codec.decode(heatmaps).points, FLOAT32)


@pytest.mark.parametrize("kind", CODECS)
def test_heatmaps_without_a_clear_peak_move_no_point_far(kind):
    model = dense.HeatmapPose("test_resnet", 300, channels=(), kind=kind)
    heatmaps = torch.rand(4, 300, 12, 10, generator=torch.Generator().manual_seed(0))
    heatmaps[2] = 0.5 + heatmaps[2] * 1e-6  # almost flat
    heatmaps[3] = 0.5
    found = model.decode(heatmaps, (48, 40)).points
    places = heatmaps.flatten(2).argmax(2)
    pixels = torch.stack((places % 10, places // 10), 2)
    less = int(kind == "udp")
    scale = torch.tensor([(40 - less) / (10 - less), (48 - less) / (12 - less)])
    assert (found / scale - pixels).abs().max() <= 5 + 1e-4  # half the blur of 11
    if kind != "msra":
        saddle = torch.tensor([[0.2, 0.9, 0.2], [0.9, 1.0, 0.9], [1.0, 0.95, 0.2]])
        heatmap = torch.nn.functional.pad(saddle, (4, 4, 4, 4), value=0.1)[None, None]
        sharp = dense.HeatmapPose("test_resnet", 1, channels=(), kind=kind, blur=1)
        apart = sharp.decode(heatmap, (11, 11)).points[0, 0] - 5
        assert apart.abs().max() <= 1


@pytest.mark.parametrize("kind", CODECS)
def test_a_batch_is_decoded_like_its_heatmaps(kind):
    heatmaps = torch.rand(3, 4, 64, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = codec(kind).decode(heatmaps)
    for image in range(3):
        for keypoint in range(4):
            alone = codec(kind).decode(heatmaps[image, keypoint][None, None])
            close(alone.points[0, 0], whole.points[image, keypoint], FLOAT64)
            assert alone.scores[0, 0] == whole.scores[image, keypoint]


def smoothed(heatmap, side):
    """Return a heatmap after a Gaussian filter and with its former maximum, pixel by pixel."""
    reach, (height, width) = side // 2, heatmap.shape
    sigma = 0.3 * (reach - 1) + 0.8
    weights = [math.exp(-(step**2) / (2 * sigma**2)) for step in range(-reach, reach + 1)]
    found = torch.zeros_like(heatmap)
    for row in range(height):
        for column in range(width):
            for i in range(max(0, row - reach), min(height, row + reach + 1)):
                for j in range(max(0, column - reach), min(width, column + reach + 1)):
                    weight = weights[i - row + reach] * weights[j - column + reach] / sum(weights) ** 2
                    found[row, column] += weight * heatmap[i, j]
    return found * heatmap.max() / found.max() if found.max() > 0 else found


@pytest.mark.parametrize(("size", "blur"), [((9, 8), 3), ((12, 7), 11), ((6, 6), 1)])
def test_dark_steps_to_the_maximum_of_the_smoothed_logarithm(size, blur):
    heatmaps = torch.rand(1, 12, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    heatmaps[0, 1] = 0
    heatmaps[0, 2] = -1
    found = codec("unbiased", image=size, heatmap=size, blur=blur).decode(heatmaps).points[0]
    for heatmap, point in zip(heatmaps[0], found, strict=True):
        y, x = divmod(int(heatmap.argmax()), size[1])
        step = torch.zeros(2, dtype=torch.float64)
        if 1 < x < size[1] - 2 and 1 < y < size[0] - 2:
            log = smoothed(heatmap, blur).clamp(min=1e-10).log()
            slope = torch.stack([log[y, x + 1] - log[y, x - 1], log[y + 1, x] - log[y - 1, x]]) / 2
            xx, yy = log[y, x + 2] - 2 * log[y, x] + log[y, x - 2], log[y + 2, x] - 2 * log[y, x] + log[y - 2, x]
            xy = log[y + 1, x + 1] - log[y - 1, x + 1] - log[y + 1, x - 1] + log[y - 1, x - 1]
            step = -torch.linalg.solve(torch.stack([xx, xy, xy, yy]).view(2, 2) / 4, slope)
        expected = torch.tensor([x, y]) + step if heatmap.max() > 0 else torch.full((2,), -1.0)
        close(point, expected.double(), FLOAT64)


def test_codecs_have_the_size_of_the_heatmaps_of_odd_images():
    model = dense.HeatmapPose("test_resnet", 3, channels=(8,)).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 70, 93)).shape[2:] == model.codec((70, 93)).heatmap_size


@pytest.mark.parametrize("option", [{"kind": "dark"}, {"sigma": 0}, {"blur": 4}])
def test_models_refuse_codecs_that_do_not_exist(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        dense.HeatmapPose("test_resnet", 3, **option)
