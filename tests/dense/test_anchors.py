"""Anchors and points lie where loops over cells put them, for every size, also in exported graphs."""

import pytest
import torch
from torch import nn

import tolerances
from widefield.dense.anchors import Anchors, inside, points


def _naive(size, stride, scales, ratios):
    rows = []
    for y in range(size[0]):
        for x in range(size[1]):
            for ratio in ratios:
                for scale in scales:
                    w, h = stride * scale / ratio**0.5, stride * scale * ratio**0.5
                    rows.append([x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("anchors", [Anchors((4, 8)), Anchors.octaves((8, 16)), Anchors((3, 5), (1, 2.5), (0.3,))])
def test_anchors_of_every_cell(anchors):
    sizes = [(5, 7), (1, 3)]
    found = anchors.grid([torch.empty(2, 3, *size, dtype=torch.float64) for size in sizes])
    for size, stride, level in zip(sizes, anchors.strides, found, strict=True):
        expected = _naive(size, stride, anchors.scales, anchors.ratios)
        assert len(level) == size[0] * size[1] * anchors.per_cell
        tolerances.close(level, expected, tolerances.FLOAT64)


def test_half_precision_maps_get_float32_anchors():
    assert Anchors((4,)).grid([torch.empty(1, 1, 2, 2, dtype=torch.bfloat16)])[0].dtype == torch.float32


def test_cells_within_an_area():
    flags = Anchors((4, 8), (8,), (1, 2)).covered([torch.empty(3, 4), torch.empty(2, 2)], (8, 12))
    assert flags[0].reshape(3, 4, 2)[..., 0].tolist() == [[True] * 3 + [False]] * 2 + [[False] * 4]
    assert flags[1].reshape(2, 2, 2)[..., 1].tolist() == [[True, True], [False, False]]


def test_boxes_that_leave_the_image():
    rows = torch.tensor([[0, 0, 5, 5], [-1, 0, 5, 5], [0, 0, 20, 5], [0, 0, 5, 10], [0, 0, 19.9, 9.9]])
    assert inside(rows, (10, 20)).tolist() == [True, False, False, False, True]
    assert inside(rows, (10, 20), 1.5).all()


def test_points_are_the_centers_of_cells():
    found = points([torch.empty(1, 1, 2, 3, dtype=torch.float64)], [8])[0]
    assert found.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]
    corners = points([torch.empty(1, 1, 1, 2)], [8], offset=0)[0]
    assert corners.tolist() == [[0, 0], [8, 0]]


def test_a_graph_exported_once_holds_for_every_size():
    class Grid(nn.Module):
        def forward(self, x):
            return Anchors((4,)).grid([x])[0], points([x], [4])[0]

    size = {2: torch.export.Dim("h", min=2, max=512), 3: torch.export.Dim("w", min=2, max=512)}
    graph = torch.export.export(Grid(), (torch.zeros(1, 1, 6, 9),), dynamic_shapes=(size,)).module()
    for height, width in ((6, 9), (17, 2)):
        x = torch.zeros(1, 1, height, width)
        assert all(map(torch.equal, graph(x), Grid()(x)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Anchors(()), "strides must hold"),
        (lambda: Anchors((4,), (0,)), "scales must hold"),
        (lambda: Anchors((4,), (8,), (-1,)), "ratios"),
        (lambda: Anchors((4,)).grid([torch.empty(1, 1, 2, 2)] * 2), "1 levels"),
        (lambda: points([torch.empty(1, 1, 2, 2)], [4, 8]), "2 strides"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
