"""The commands on a pose run: predict with a detector, with files and alone, eval and report."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tolerances import FLOAT32
from train.helpers import QUIET
from widefield import cli
from widefield.data import Scenes
from widefield.loading import load
from widefield.predictions import predict
from widefield.tasks import PosePrediction
from widefield.train import DataSpec, ModelSpec, Recipe, TaskSpec, train

NETWORK = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
HEAD = {"neck_channels": 8, "box_channels": 8, "rois_per_image": 8, "anchor_scales": [2.0], "test_proposals": 20,
        "score_threshold": 0.0}  # fmt: skip


def trained(name: str, data: DataSpec, task: TaskSpec, folder: Path) -> Path:
    torch.manual_seed(0)
    recipe = Recipe(
        name=name,
        model=ModelSpec("convnext_atto", NETWORK),
        data=data,
        task=task,
        output=str(folder),
        max_steps=2,
        batch_size=2,
        workers=0,
    )
    return train(recipe, console=QUIET).folder


@pytest.fixture(scope="module")
def posing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a short run of a small pose model on the objects of scenes."""
    data = DataSpec("scene_poses", {"size": 64, "count": 4, "crop_size": [64, 64]})
    task = TaskSpec("pose", {"channels": [8, 8, 8], "keypoint_threshold": 0.0})
    return trained("poses", data, task, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def detecting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a short run of a small detector on scenes."""
    data = DataSpec("scenes", {"size": 64, "count": 6})
    task = TaskSpec("detection", {"model": "faster_rcnn", "head_args": HEAD})
    return trained("objects", data, task, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two scenes, named as COCO names files."""
    folder = tmp_path_factory.mktemp("photos")
    scenes = Scenes("val", size=64, count=2)
    for index, name in enumerate(("000000000139.png", "more/000000000285.png")):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels_of(scenes[index])).save(folder / name)
    return folder


def pixels_of(scene: Any) -> np.ndarray:
    """Return the image of a scene, uint8 (H, W, 3)."""
    pixels = (scene["image"] * 0.22 + 0.5).mul(255).round().clamp(0, 255).byte()
    return pixels.movedim(0, -1).numpy()


def document(path: Path) -> Any:
    return json.loads(path.read_text())


def test_blocks_of_a_run_are_measured_with_its_key_points(posing: Path, tmp_path: Path) -> None:
    assert cli.main(["blocks", str(posing), "--count", "2", "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "blocks.json").read_text())["results"].values()
    assert (found["metric"], len(found["blocks"])) == ("PCK", 4)
    assert 0 <= found["score"] <= 1


def test_a_detector_and_a_pose_model_are_one_call(
    posing: Path, detecting: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", str(posing), str(photos), "--boxes", str(detecting), "--min-score", "0", "--size", "64"]
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    assert "poses" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        "overlays", "predict.html", "predict.json", "predict.png", "predict_coco.json",
    }  # fmt: skip
    found = document(tmp_path / "predict.json")
    assert found["about"]["boxes"] == "objects"
    assert found["about"]["crop_size"] == [64, 64]
    assert [image["name"] for image in found["images"]] == ["000000000139.png", "more/000000000285.png"]
    by_hand = predict(str(detecting), photos, size=64)
    for image, boxes in zip(found["images"], by_hand.images, strict=True):
        detected = {tuple(np.round(box, 3)) for box in boxes.prediction.boxes.tolist()}
        assert image["poses"]
        for pose in image["poses"]:
            assert tuple(np.round(pose["box"], 3)) in detected
            assert list(pose["keypoints"]) == ["center", "top", "right", "bottom", "left"]
    listed = [pose for image in found["images"] for pose in image["poses"]]
    entries = document(tmp_path / "predict_coco.json")
    assert len(entries) == len(listed)
    for pose, entry in zip(listed, entries, strict=True):
        assert entry["category_id"] == found["classes"].index(pose["name"]) + 1
        assert entry["keypoints"] == pytest.approx([*chain(*pose["keypoints"].values())], rel=FLOAT32)
        assert entry["score"] == pose["score"]
    assert {entry["image_id"] for entry in entries} == {1, 2}
    page = (tmp_path / "predict.html").read_text()
    assert "left (round)" in page
    with Image.open(tmp_path / "overlays/more/000000000285.png") as shown:
        assert shown.size == (640, 640)  # enlarged


def test_boxes_of_some_classes_and_scores(posing: Path, detecting: Path, photos: Path) -> None:
    subject, detector = load(str(posing)), load(str(detecting))
    every = predict(subject, photos, boxes=detector, min_score=0, size=64)
    names = [every.classes[label] for one in every.images for label in one.prediction.labels.tolist()]
    some = predict(subject, photos, boxes=detector, min_score=0, size=64, box_classes=[names[0]])
    assert {every.classes[k] for one in some.images for k in one.prediction.labels.tolist()} == {names[0]}
    assert sum(len(one.prediction) for one in some.images) == names.count(names[0])
    none = predict(subject, photos, boxes=detector, min_score=0.99)
    assert [len(one.prediction) for one in none.images] == [0, 0]
    assert none.rows()[0]["poses"] == "0"
    none.plot()


def test_without_boxes_the_image_is_one(posing: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    seen = predict(str(posing), [photos, tmp_path])
    assert [one.path.name for one in seen.unreadable] == ["broken.png"]
    (found, _) = seen.images
    assert isinstance(found.prediction, PosePrediction)
    assert found.prediction.boxes.tolist() == [[0, 0, 64, 64]]
    assert found.prediction.size == (64, 64)
    assert found.prediction.labels is None  # the model does not tell classes apart
    (pose,) = seen.to_dict()["images"][0]["poses"]
    assert (pose["label"], pose["name"]) == (None, None)
    assert cli.main(["predict", str(posing), str(photos), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out/predict_coco.json").exists()  # whose entries have a category
    assert seen._repr_html_().count("<img") == 4  # each image, and its pose


def test_true_boxes_in_files_give_the_poses_of_the_evaluation(posing: Path, tmp_path: Path) -> None:
    subject = load(str(posing))
    dataset, task = subject.own_data(), subject.task()
    scenes = Scenes("val", size=64, count=4)
    images, results, annotations = [], [], []
    for number in range(2):
        scene = scenes[number]
        Image.fromarray(pixels_of(scene)).save(tmp_path / f"scene_{number}.png")
        images.append({"id": number, "file_name": f"scene_{number}.png"})
        for box, label in zip(scene["boxes"].tolist(), scene["labels"].tolist(), strict=True):
            x1, y1, x2, y2 = box
            entry = {"image_id": number, "category_id": label + 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            annotations.append(entry)
            results.append({**entry, "score": 1.0})
    (tmp_path / "results.json").write_text(json.dumps(results))
    categories = [{"id": k, "name": name} for k, name in enumerate(scenes.object_classes, start=1)]
    whole = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "true.json").write_text(json.dumps(whole))
    batch = task.collate([dataset[index] for index in range(len(dataset)) if int(dataset[index]["image_id"]) < 2])
    with torch.no_grad():
        expected = task.outputs(subject.model, batch)["preds"]
    for name in ("results.json", "true.json"):
        found = predict(subject, tmp_path / "scene_*.png", boxes=tmp_path / name)
        for number, one in enumerate(found.images):
            rows = expected.images == number
            # The suppression of duplicates may leave out some.
            points, boxes = expected.points[rows].float(), expected.boxes[rows]
            assert 0 < len(one.prediction) <= int(rows.sum())
            for pose, box in zip(one.prediction.keypoints, one.prediction.boxes, strict=True):
                match = (boxes == box).all(1).nonzero()[0, 0]
                torch.testing.assert_close(pose, points[match], rtol=FLOAT32, atol=1e-3)


def test_what_a_detector_wrote_is_read_again(posing: Path, detecting: Path, photos: Path, tmp_path: Path) -> None:
    assert cli.main(["predict", str(detecting), str(photos), "--out", str(tmp_path / "boxes")]) == 0
    out = str(tmp_path / "poses")
    words = ["predict", str(posing), str(photos), "--min-score", "0", "--out", out]
    assert cli.main([*words, "--boxes", str(tmp_path / "boxes/predict.json")]) == 0
    read = document(tmp_path / "poses/predict.json")["images"]
    assert cli.main([*words, "--boxes", str(detecting)]) == 0
    composed = document(tmp_path / "poses/predict.json")["images"]
    for one, other in zip(read, composed, strict=True):
        boxes, again = (np.array(sorted(pose["box"] for pose in image["poses"])) for image in (one, other))
        np.testing.assert_allclose(boxes, again, atol=1e-2)  # the detector ran on batches of another size


def test_all_images_are_looked_up_before_the_model_runs(
    posing: Path, detecting: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "boxes.json").write_text(
        json.dumps({"classes": ["disk"], "images": [{"name": "000000000139.png", "objects": []}]})
    )
    coco = {"images": [{"id": 139, "file_name": "000000000139.png"}], "annotations": []}
    coco["categories"] = [{"id": k, "name": name} for k, name in enumerate(load(str(posing)).classes, start=1)]
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    out = tmp_path / "out"
    for words in (
        [str(posing), "--boxes", str(tmp_path / "boxes.json"), "--box-classes", "disk"],
        [str(posing), "--boxes", str(detecting), "--coco", str(tmp_path / "coco.json")],
        [str(detecting), "--coco", str(tmp_path / "coco.json")],
    ):
        assert cli.main(["predict", words[0], str(photos), *words[1:], "--out", str(out)]) == 1
        assert "has no image 'more/000000000285.png'" in capsys.readouterr().err
        assert not out.exists()


def test_an_image_with_a_box_outside_of_it_is_left_out(posing: Path, photos: Path, tmp_path: Path) -> None:
    name = load(str(posing)).classes[0]
    thing = {"name": name, "score": 0.9, "box": [10, 10, 40, 40]}
    images = [
        {"name": "000000000139.png", "objects": [{**thing, "box": [70, 10, 90, 40]}]},
        {"name": "more/000000000285.png", "objects": [thing]},
    ]
    (tmp_path / "boxes.json").write_text(json.dumps({"classes": [name], "images": images}))
    found = predict(str(posing), photos, boxes=tmp_path / "boxes.json")
    (left_out,), (image,) = found.unreadable, found.images
    assert "is outside of the image '000000000139.png', which is 64x64" in left_out.reason
    assert image.name == "more/000000000285.png"
    assert image.prediction.boxes.tolist() == [[10, 10, 40, 40]]
    words = ["predict", str(posing), str(photos), "--boxes", str(tmp_path / "boxes.json")]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 3  # an image was left out
    written = document(tmp_path / "out/predict.json")
    assert (len(written["images"]), len(written["unreadable"])) == (1, 1)


def test_results_of_other_names_need_a_coco_file(posing: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes((photos / "000000000139.png").read_bytes())
    entry = {"image_id": 3, "category_id": 18, "bbox": [10, 10, 30, 20], "score": 0.9}
    (tmp_path / "results.json").write_text(json.dumps([entry]))
    name = load(str(posing)).classes[2]
    coco = {"images": [{"id": 3, "file_name": "one.png"}], "categories": [{"id": 18, "name": name}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    given: dict[str, Any] = {"boxes": tmp_path / "results.json", "box_classes": [name]}
    found = predict(str(posing), tmp_path / "one.png", coco=tmp_path / "coco.json", **given)
    assert found[0].prediction.boxes.tolist() == [[10, 10, 40, 30]]
    assert found[0].prediction.labels.tolist() == [2]


def test_an_evaluation_has_a_page_with_key_points_sizes_errors_and_crops(
    posing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, out = tmp_path / "page.html", tmp_path / "out.json"
    words = ["eval", str(posing), "--workers", "0", "--page", str(page), "--out", str(out), "--examples", "1"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    for text in ("oks_ap50", "key point", "PCK@0.2", "inversion", "center"):
        assert text in printed
    text = page.read_text()
    for heading in ("COCO&#39;s figures", "Key points", "People by size", "Classes", "Best images", "Worst images"):
        assert f"<h2>{heading}</h2>" in text
    assert "prediction, with lines to the labels" in text
    assert "the object keypoint similarity" in text
    (result,) = json.loads(out.read_text())["results"]
    assert set(result["scores"]) >= {"metrics", "by_keypoint", "by_size", "errors"}
    assert result["classes"] == 8


def test_an_evaluation_with_the_boxes_of_a_detector(
    detecting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scenes as files in COCO's form, with the key points of their objects."""
    scenes = Scenes("val", size=64, count=2)
    (tmp_path / "images").mkdir()
    listed, annotations = [], []
    for number, scene in enumerate(scenes):
        Image.fromarray(pixels_of(scene)).save(tmp_path / f"images/{number:03d}.png")
        listed.append({"id": number, "file_name": f"{number:03d}.png", "width": 64, "height": 64})
        for index, (x1, y1, x2, y2) in enumerate(scene["boxes"].tolist()):
            points = scene["keypoints"][index].clone()
            points[:, :2] -= 0.5
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": 10 + int(scene["labels"][index]),
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": float(scene["area"][index]), "iscrowd": 0,
                "keypoints": (points * (points[:, 2:] > 0)).flatten().tolist(),
                "num_keypoints": int((points[:, 2] > 0).sum()),
            })  # fmt: skip
    names = list(scenes.keypoint_names)
    categories = [{"id": 10 + k, "name": name, "keypoints": names} for k, name in enumerate(scenes.object_classes)]
    (tmp_path / "all.json").write_text(
        json.dumps({"images": listed, "annotations": annotations, "categories": categories})
    )
    data = DataSpec("coco_keypoints", {
        "root": str(tmp_path), "annotations": "all.json", "images": "images", "skeleton": "scenes",
        "crop_size": [64, 48],
    })  # fmt: skip
    run = trained("files", data, TaskSpec("pose", {"channels": [8], "keypoint_threshold": 0.0}), tmp_path)
    words = ["predict", str(detecting), str(tmp_path / "images"), "--coco", str(tmp_path / "all.json")]
    assert cli.main([*words, "--out", str(tmp_path / "found")]) == 0
    capsys.readouterr()
    file = tmp_path / "found/predict_coco.json"
    # The detector finds nothing in the second image, whose people count as missed.
    found = [entry for entry in document(file) if entry["image_id"] == 0]
    assert 0 < len(found) < len(document(file))
    file.write_text(json.dumps(found))
    page = tmp_path / "page.html"
    words = ["eval", str(run), "--workers", "0", "--out", str(tmp_path / "eval.json"), "--page", str(page)]
    assert cli.main([*words, "--boxes", str(file)]) == 0
    printed = capsys.readouterr().out
    assert f"val: {len(found)} boxes of a detector in 1 image in" in printed
    assert "changed since the run" not in printed  # as was asked for
    row = next(line for line in printed.splitlines() if "files" in line and "64x48" in line)
    assert f" {len(found)} " in row
    assert "crops" in printed
    assert f"{len(found)} crops of" in page.read_text()
    (result,) = document(tmp_path / "eval.json")["results"]
    assert (result["images"], result["size"]) == (len(found), [64, 48])
    assert sum(result["scores"]["people"]) == sum(entry["num_keypoints"] > 0 for entry in annotations)
    assert result["metrics"]["oks_ap"] is not None
    assert result["metrics"]["pck"] is None  # whose pose it is, is not known


def test_a_report_shows_the_evaluation(posing: Path, tmp_path: Path) -> None:
    assert cli.main(["report", str(posing), "--out", str(tmp_path / "report.html"), "--count", "2"]) == 0
    text = (tmp_path / "report.html").read_text()
    for heading in ("Training", "Metrics", "Key points", "Worst images"):
        assert f"<h2>{heading}</h2>" in text
    found = json.loads((tmp_path / "report.json").read_text())["results"]
    assert found["Evaluation"]["poses"]["scores"]["by_keypoint"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "POSES", "photo.png", "--boxes", "test_resnet"], "test_resnet is a model for classification"),
        (["predict", "OBJECTS", "photo.png", "--boxes", "OBJECTS"], "objects is a model for detection"),
        (["predict", "POSES", "photo.png", "--size", "64"], "there is no detector"),
        (["predict", "POSES", "photo.png", "--box-classes", "disk"], "there are none"),
        (["predict", "POSES", "photo.png", "--boxes", "OBJECTS", "--box-classes", "disc"], "Did you mean 'disk'?"),
        (["predict", "POSES", "photo.png", "--boxes", "nothing.json"], "there is no file of boxes 'nothing.json'"),
        (["predict", "POSES", "photo.png", "--boxes", "emty.json"], "Did you mean 'empty.json'?"),
        (["predict", "POSES", "photo.png", "--boxes", "runs/boxes.txt"], "there is no file of boxes 'runs/boxes.txt'"),
        (["predict", "POSES", "photo.png", "--boxes", "runs/boxes"], "there is no folder 'runs/boxes'"),
        (["predict", "POSES", "photo.png", "--boxes", "resnet7"], "there is neither a folder 'resnet7'"),
        (["eval", "POSES", "--boxes", "nothing.json"], "--boxes: there is no file 'nothing.json'. Give the results"),
        (["predict", "POSES", "photo.png", "--boxes", "photo.png"], "is not a JSON file with boxes"),
        (["predict", "POSES", "photo.png", "--boxes", "empty.json"], "the file name 'photo.png' does not end with one"),
        (["eval", "POSES", "--data", "digits"], "the data have no key points"),
        (["eval", "POSES", "--boxes", "empty.json"], "--boxes is for data in COCO's form"),
        (["eval", "OBJECTS", "--boxes", "empty.json"], "--boxes is for pose models"),
        (["eval", "POSES", "--size", "96"], "the crops of a pose model have one size"),
        (["eval", "POSES", "--data", "coco_keypoints:.", "--size", "96"], "Leave out --size"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, posing: Path, detecting: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40)).save("photo.png")
    Path("empty.json").write_text("[]")
    runs = {"POSES": str(posing), "OBJECTS": str(detecting)}
    assert cli.main([runs.get(word, word) for word in words]) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.strip().count("\n") == 0
