"""The methods of class activation maps against plain formulas, and whether maps mark what a class depends on."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from tolerances import FLOAT32, close
from widefield import cli
from widefield.analysis import class_activation, faithfulness, save
from widefield.analysis._cam_methods import METHODS

N, CLASSES = 3, 5


class Tail(nn.Module):
    """What follows the layer: not linear, so that gradients differ from place to place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.fc(torch.tanh(self.conv(x)).mean((2, 3)))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Tanh()), Tail()).double().eval()


def images():
    torch.manual_seed(1)
    return torch.randn(N, 3, 17, 21, dtype=torch.float64)


def parts(model, image, label):
    """Return a layer's map (C, h, w) and the gradient of a class's logit there."""
    leaf = model[0](image[None]).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model[1](leaf)[0, label], leaf)
    return leaf.detach()[0], gradient[0]


def plain(method, model, image, label):
    """Return the map of one image, (h, w), by loops."""
    A, g = parts(model, image, label)
    C, h, w = A.shape
    out = torch.zeros(h, w, dtype=torch.float64)
    if method == "eigen_cam":
        cells = A.flatten(1).T
        vector = torch.ones(C, dtype=torch.float64)
        for _ in range(20_000):
            vector = cells.T @ (cells @ vector)
            vector = vector / vector.norm()
        out = (cells @ vector).view(h, w)
        return (out if out.sum() >= 0 else -out).clamp(min=0)
    if method == "score_cam":
        scores = []
        for k in range(C):
            mask = (A[k] - A[k].min()) / (A[k].max() - A[k].min())
            mask = nn.functional.interpolate(mask[None, None], image.shape[1:], mode="bilinear")[0, 0]
            scores.append(model((image * mask)[None])[0, label])
        weights = torch.stack(scores).detach().softmax(0)
        return (weights[:, None, None] * A).sum(0).clamp(min=0)
    for k in range(C):
        for i in range(h):
            for j in range(w):
                if method == "grad_cam":
                    weight = g[k].mean()
                elif method == "grad_cam++":
                    weight = sum(
                        g[k, a, b] ** 2 / (2 * g[k, a, b] ** 2 + (A[k] * g[k] ** 3).sum()) * max(g[k, a, b], 0)
                        for a in range(h)
                        for b in range(w)
                    )
                else:
                    weight = g[k, i, j] if method == "hires_cam" else max(g[k, i, j], 0)
                out[i, j] += weight * A[k, i, j]
    return out.clamp(min=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("label", [None, 2])
def test_maps_are_those_of_the_papers(method, label):
    model, given = network(), images()
    found = class_activation(model, given, layer="0", method=method, targets=label, batch_size=2)
    labels = model(given).argmax(1).tolist() if label is None else [label] * N
    for image, mine, k in zip(given, found.maps, labels, strict=True):
        expected = plain(method, model, image, k)
        peak = expected.max()
        close(torch.from_numpy(mine), (expected / peak if peak > 0 else expected).float(), FLOAT32)
    assert found.targets.tolist() == labels
    assert found.rows()[0]["method"].lower().replace("-", "_") in (method, method.replace("_cam", "cam"))


def test_the_class_of_score_cam_is_that_of_the_whole_image():
    model, given = network(), images()
    free = class_activation(model, given, layer="0", method="score_cam")
    fixed = class_activation(model, given, layer="0", method="score_cam", targets=free.predicted.tolist())
    assert np.array_equal(free.maps, fixed.maps)
    assert np.array_equal(free.probability, fixed.probability)


@pytest.mark.parametrize("method", METHODS)
def test_channels_that_are_constant(method):
    model = network()
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[:2] = 0
    found = class_activation(model, images(), layer="0", method=method)
    assert np.isfinite(found.maps).all()


def test_an_unknown_method_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"method must be one of .*'score_cam'; got 'scorecam'"):
        class_activation(network(), images(), layer="0", method="scorecam")


def test_the_share_in_the_center_needs_four_cells():
    torch.manual_seed(0)
    coarse = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    rows = [class_activation(coarse, torch.randn(2, 3, side, side), layer="0").rows()[0] for side in (16, 32)]
    assert rows[0]["map"] == "2×2"
    assert rows[0]["in the center (%)"] == "–"
    assert "±" in rows[1]["in the center (%)"]


# Faithfulness


class Spot(nn.Module):
    """Says class 1 as far as the upper left quarter of the image is bright, whatever the rest."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x):
        x = self.layer(x)
        bright = x[:, :, : x.shape[2] // 2, : x.shape[3] // 2].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(bright), 8 * bright - 4], 1)


def bright(count=2, side=16):
    torch.manual_seed(0)
    return 1 + 0.1 * torch.randn(count, 3, side, side)


def test_a_true_map_beats_chance_and_its_opposite_loses():
    model, given = Spot(), bright()
    found = class_activation(model, given, layer="layer", method="layer_cam", targets=1)
    test = faithfulness(model, given, found, steps=8)
    areas = {name: values.mean() for name, values in test.areas().items()}
    assert areas["deletion"] < areas["random_deletion"] - 0.1
    assert test.rows()[0]["beats random"] == "2 of 2"
    wrong = type(found)(**{**vars(found), "maps": 1 - found.maps})
    worse = faithfulness(model, given, wrong, steps=8)
    assert worse.areas()["deletion"].mean() > areas["random_deletion"] + 0.1
    assert worse.rows()[0]["beats random"] == "0 of 2"


@torch.no_grad()
def test_curves_are_those_of_a_plain_loop():
    model, given = network().float(), images().float()
    found = class_activation(model, given, layer="0", targets=1)
    test = faithfulness(model, given, found, steps=4, batch_size=2)
    assert test.shares.tolist() == [0, 0.25, 0.5, 0.75, 1]
    maps = torch.from_numpy(found.upsampled())
    kernel = [3, 3]
    for n, image in enumerate(given):
        blurred = gaussian_blur(image, kernel, [0.5, 0.5])
        order = maps[n].flatten().argsort(descending=True)
        assert len(maps[n].unique()) > 0.5 * order.numel()
        for step in (1, 2, 3, 4):
            first = torch.zeros(order.numel(), dtype=torch.bool)
            first[order[: math.ceil(order.numel() * step / 4)]] = True
            first = first.view(maps[n].shape)
            for curve, here, there in ((test.deletion, 0 * image, image), (test.insertion, image, blurred)):
                if maps[n][first].min() > 0 or step == 4:  # pixels of equal value come in any order
                    expected = model(torch.where(first, here, there)[None]).softmax(1)[0, 1]
                    assert curve[n, step] == pytest.approx(float(expected), abs=1e-6)
        for curve in (test.deletion, test.random_deletion):
            assert curve[n, 0] == pytest.approx(float(model(image[None]).softmax(1)[0, 1]), abs=1e-6)
    again = faithfulness(model, given, found, steps=4, batch_size=3)
    close(torch.from_numpy(again.random_insertion), torch.from_numpy(test.random_insertion), FLOAT32)


def test_what_cannot_be_tested_is_refused():
    model, given = network().float(), images().float()
    found = class_activation(model, given, layer="0")
    with pytest.raises(ValueError, match=r"images must be the 3 images of the maps, \(N, C, 17, 21\)"):
        faithfulness(model, given[:2], found)
    boxed = type(found)(**{**vars(found), "boxes": np.zeros((N, 4))})
    with pytest.raises(ValueError, match="not of a pixel, box or key point"):
        faithfulness(model, given, boxed)


def test_results_draw_and_save(tmp_path):
    model, given = network().float(), images().float()
    found = class_activation(model, given, layer="0")
    test = faithfulness(model, given, found, steps=4)
    assert len(test.plot().axes) == 2
    save({"a": test}, tmp_path / "a.html")
    assert "Faithfulness of activation maps" in (tmp_path / "a.html").read_text()


def test_the_command_offers_every_method():
    assert tuple(METHODS) == cli.cam.METHODS  # repeated there, as help needs no torch


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["cam", "test_resnet", "--size", "64", "--count", "1", "--method", "eigen_cam", "--faithfulness"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "EigenCAM" in printed
    assert "beats random" in printed
    assert {path.name for path in (tmp_path / "analysis").iterdir()} >= {"cam.png", "faithfulness.png"}
