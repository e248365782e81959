"""Detections as COCO's results: boxes, ids, and run lengths of masks as pycocotools writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from widefield.predictions.coco_results import CocoEntries, coco_results, read_ids, run_lengths
from widefield.tasks import BoxPrediction


@given(arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_run_lengths_are_those_of_pycocotools(mask: np.ndarray) -> None:
    pycocotools = pytest.importorskip("pycocotools.mask")
    expected = pycocotools.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert run_lengths(mask) == {"size": expected["size"], "counts": expected["counts"].decode()}


def test_run_lengths_of_large_masks() -> None:
    pycocotools = pytest.importorskip("pycocotools.mask")
    mask = np.zeros((900, 1200), dtype=bool)
    mask[100:850, 37:1100] = True
    mask[300:400, 500:900] = False
    for one in (mask, ~mask, np.zeros_like(mask), np.ones_like(mask)):
        expected = pycocotools.encode(np.asfortranarray(one.astype(np.uint8)))["counts"].decode()
        assert run_lengths(one)["counts"] == expected


def _found(masks: torch.Tensor | None = None) -> BoxPrediction:
    boxes = torch.tensor([[1.0, 2, 5, 10], [0, 0, 3, 3]])
    return BoxPrediction(boxes, torch.tensor([1, 0]), torch.tensor([0.75, 0.5]), masks, size=(12, 9))


def test_boxes_become_corner_and_size() -> None:
    first, second = coco_results(_found(), 42, [7, 9])
    assert first == {"image_id": 42, "category_id": 9, "bbox": [1, 2, 4, 8], "score": 0.75}
    assert second["category_id"] == 7
    masks = torch.zeros(2, 12, 9, dtype=torch.bool)
    masks[0, 2:10, 1:5] = True
    with_masks = coco_results(_found(masks), 42, [7, 9])
    assert with_masks[0]["segmentation"]["size"] == [12, 9]


def test_pycocotools_reads_the_results(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    content = {
        "images": [{"id": 42, "file_name": "a.jpg", "height": 12, "width": 9}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    masks = torch.zeros(2, 12, 9, dtype=torch.bool)
    masks[0, 2:10, 1:5] = True
    entries = CocoEntries(read_ids(tmp_path / "truth.json"), ("cat", "dog"), 2)
    assert entries.add("below/a.jpg", _found(masks)) == {"image_id": 42}
    loaded = coco.COCO(str(tmp_path / "truth.json")).loadRes(entries.entries)
    assert [one["category_id"] for one in loaded.loadAnns([1, 2])] == [9, 7]
    assert loaded.loadAnns([1])[0]["area"] == masks[0].sum()


def test_ids_are_counted_or_read(tmp_path: Path) -> None:
    counted = CocoEntries(read_ids(None), (), 3)
    assert [counted.add(name, _found())["image_id"] for name in ("x.png", "y.png")] == [1, 2]
    assert {one["category_id"] for one in counted.entries} == {1, 2}
    file = tmp_path / "ids.json"
    file.write_text(json.dumps({"images": [{"id": 5, "file_name": "a.jpg"}], "categories": [{"id": 1, "name": "cat"}]}))
    with pytest.raises(ValueError, match=r"has no category 'car', which is a class of the model\. Did you mean"):
        CocoEntries(read_ids(file), ("car",), 1)
    with pytest.raises(ValueError, match=r"has no image 'b\.jpg'"):
        CocoEntries(read_ids(file), ("cat",), 1).add("b.jpg", _found())
    file.write_text("[1]")
    with pytest.raises(ValueError, match="is not a COCO file with images"):
        read_ids(file)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"ids\.json is not a JSON file"):
        read_ids(file)
    with pytest.raises(FileNotFoundError):
        read_ids(tmp_path / "none.json")
