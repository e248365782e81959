"""``widefield eval``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform

from data.http_server import serving
from data.made_sets import pictures, webdataset, write_tar
from train.helpers import QUIET, log
from widefield import cli
from widefield.train import DataSpec, EmaSpec, ModelSpec, Recipe, train

WNIDS = ImageNetInfo("imagenet-1k").label_names()
Eval = Callable[..., list[dict[str, Any]]]
TIMM = "test_resnet{num_classes: %d}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of two epochs with a moving average."""
    torch.manual_seed(0)
    recipe = Recipe(
        name="run",
        model=ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),
        data=DataSpec("scales", {"count": 64, "size": 32}),
        output=str(tmp_path_factory.mktemp("runs")),
        ema=EmaSpec(0.3),
        epochs=2,
        batch_size=16,
        workers=0,
    )
    return train(recipe, console=QUIET).folder


@pytest.fixture
def images(tmp_path: Path) -> Callable[..., Path]:
    """Create class folders of these names with three images of random colors each, in ImageNet's file format."""

    def make(*names: str, split: str = "") -> Path:
        generator = torch.Generator().manual_seed(3)
        number = 0
        for name in names:
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for _ in range(3):
                number += 1
                pixels = torch.randint(256, (40, 60, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"ILSVRC2012_val_{number:08}.JPEG", format="PNG")
        return tmp_path / "images"

    return make


@pytest.fixture
def evaluated(tmp_path: Path) -> Eval:
    """Run the command and return its results."""

    def call(*words: object) -> list[dict[str, Any]]:
        file = tmp_path / "out" / "results.json"
        common = ["--device", "cpu", "--workers", "0", "--out", str(file)]
        assert cli.main(["eval", *map(str, words), *common]) == 0
        content = json.loads(file.read_text())
        assert content["command"].startswith("widefield eval ")
        assert content["environment"]["torch"] == torch.__version__.partition("+")[0]
        results: list[dict[str, Any]] = content["results"]
        return results

    return call


# Results


def test_what_was_found_is_said_before_the_results(images: Any, evaluated: Eval, capsys: pytest.CaptureFixture) -> None:
    root = images("cat", "dog")
    (root / ".ipynb_checkpoints").mkdir()
    (root / ".ipynb_checkpoints" / "a.png").write_bytes((root / "cat" / "ILSVRC2012_val_00000001.JPEG").read_bytes())
    (root / "dog" / "notes.txt").write_text("x")
    (result,) = evaluated(TIMM % 2, "--data", root)
    assert result["images"] == 6
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"val: 6 images in {root}, 2 classes; left out: 1 hidden (")
    assert "1 not images by their ending, .txt (" in first


def test_a_folder_of_one_class_is_named(images: Any, capsys: pytest.CaptureFixture) -> None:
    root = images("cat")
    assert cli.main(["eval", TIMM % 2, "--data", str(root), "--device", "cpu", "--workers", "0"]) == 1
    assert f"the val split in '{root}' has only the class 'cat'; a classifier needs" in capsys.readouterr().err


# Runs


def test_a_run_is_evaluated_as_it_evaluated_itself(
    trained: Path, evaluated: Eval, capsys: pytest.CaptureFixture
) -> None:
    smooth, raw = evaluated(trained, "--weights", "both", "--which", "last")
    last = log(trained)[-1]
    for found, prefix in ((smooth, "ema_"), (raw, "")):
        assert found["metrics"] == {name: last[prefix + name] for name in ("loss", "top1", "top5")}
        assert found["images"] == 64
    assert smooth["metrics"]["loss"] != raw["metrics"]["loss"]
    assert [found["weights"] for found in (smooth, raw)] == ["ema, last (step 8)", "model, last (step 8)"]
    assert (smooth["batch_size"], smooth["mixed_precision"], smooth["outputs"], smooth["classes"]) == (16, "no", 8, 8)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert f"{100 * last['ema_top1']:.2f}%" in shown[0]
    assert f"{100 * last['top1']:.2f}%" in shown[1]


def test_the_best_average_is_what_is_evaluated_by_default(trained: Path, evaluated: Eval) -> None:
    (found,) = evaluated(trained)
    epochs = [entry for entry in log(trained) if entry["kind"] == "epoch"]
    best = max(epochs, key=lambda entry: entry["ema_top1"])
    assert found["metrics"]["top1"] == best["ema_top1"]
    assert found["weights"] == f"ema, best (step {best['step']})"


def test_a_page_shows_each_class_and_the_worst_images(
    trained: Path, evaluated: Eval, tmp_path: Path, capsys: Any
) -> None:
    page = tmp_path / "page.html"
    (found,) = evaluated(trained, "--page", page, "--examples", 2)
    printed = capsys.readouterr().out
    confusion = np.array(found["scores"]["confusion"])
    assert confusion.sum() == 64
    assert confusion.trace() / 64 == pytest.approx(found["metrics"]["top1"])
    text = page.read_text()
    for name in found["scores"]["classes"]:
        assert f">{name}<" in text
        assert f"│ {name} " in printed
    assert [h for h in re.findall(r"<h2[^>]*>(.*?)</h2>", text) if h.endswith("images")] == [
        "Best images",
        "Worst images",
    ]
    rated = [float(one) for one in re.findall(r"<h3>image \d+: ([\d.]+) %", text)]
    assert len(rated) == 4
    assert min(rated[:2]) >= max(rated[2:])
    assert "<figcaption>label: " in text


def test_of_many_classes_the_weakest_are_printed(images: Any, evaluated: Eval, tmp_path: Path, capsys: Any) -> None:
    root = images(*(f"c{index:02}" for index in range(25)))
    (found,) = evaluated(TIMM % 25, "--data", root, "--page", tmp_path / "page.html", "--examples", 1)
    printed = capsys.readouterr().out
    assert "the 20 classes with the lowest accuracy; --out has all 25:" in printed
    assert len(set(re.findall(r"^│ (c\d\d) ", printed, re.MULTILINE))) == 20
    assert len(found["scores"]["classes"]) == 25


def test_several_sizes_and_what_they_cost(trained: Path, evaluated: Eval, capsys: pytest.CaptureFixture) -> None:
    results = evaluated(trained, "--size", 32, 64, "--throughput", "--precision", "bf16", "--channels-last")
    assert [found["size"] for found in results] == [32, 64]
    assert all(found["images_per_second"] == 16 / found["forward"]["p50"] for found in results)
    assert {(found["mixed_precision"], found["channels_last"]) for found in results} == {("bf16", True)}
    assert "images/s" in capsys.readouterr().out


def test_a_run_on_other_images_sees_them_as_its_own(trained: Path, evaluated: Eval, images: Callable) -> None:
    folder = images("disk", "star")
    (found,) = evaluated(trained, "--data", folder, "--crop-pct", 0.5)
    source = found["data"]
    assert (source["name"], source["root"], source["size"], source["crop_pct"]) == ("folder", str(folder), 32, 0.5)
    assert (found["classes"], found["outputs"], found["images"]) == (2, 8, 6)
    (among_all,) = evaluated(trained, "--data", f"folder:{folder}", "--all-outputs")
    assert (among_all["classes"], among_all["metrics"]["loss"] > found["metrics"]["loss"]) == (8, True)
    assert source["mean"] == [0.5] * 3  # the classes of the run's data, not ImageNet's


# Models of timm and torchvision


def by_hand(folder: Path, model: torch.nn.Module, size: int, places: list[int], **options: Any) -> dict[str, float]:
    """Apply timm's own transform image by image; the classes are in the order of the sorted folders."""
    config = {**timm.data.resolve_model_data_config(model), "input_size": (3, size, size), **options}
    transform = create_transform(**config)
    right, losses = [], []
    for label, place in enumerate(sorted(folder.iterdir())):
        for file in sorted(place.iterdir()):
            with torch.no_grad():
                logits = model.eval()(transform(Image.open(file).convert("RGB"))[None])[:, places]
            right.append(int(logits.argmax()) == label)
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([label])).item())
    return {"top1": sum(right) / len(right), "loss": sum(losses) / len(losses)}


@pytest.mark.parametrize(
    ("names", "places", "words"),
    [
        (["2", "10", "999"], [10, 2, 999], ["--class-map", "integer"]),  # ImageNet-V2's folders
        ([WNIDS[5], WNIDS[300], WNIDS[700]], [5, 300, 700], []),  # ImageNet-A's and -R's
    ],
)
def test_a_model_of_timm_on_parts_of_imagenet(
    names: list[str], places: list[int], words: list[str], evaluated: Eval, images: Callable
) -> None:
    folder = images(*names)
    (found,) = evaluated("test_resnet", "--data", folder, "--size", 32, "--seed", 4, *words)
    torch.manual_seed(4)
    expected = by_hand(folder, timm.create_model("test_resnet"), 32, places)
    assert found["metrics"] == pytest.approx(expected, rel=1e-5)
    assert (found["classes"], found["outputs"], found["weights"]) == (3, 1000, "random")


def test_a_split_named_val_is_taken(evaluated: Eval, images: Callable) -> None:
    folder = images("a", "b", split="val")
    (found,) = evaluated(TIMM % 2, "--data", folder, "--size", 32)
    assert (found["images"], found["classes"], found["outputs"]) == (6, 2, 2)


def test_shards_are_found_by_the_names_of_their_files(evaluated: Eval, tmp_path: Path) -> None:
    members = webdataset(pictures(2))
    for part in range(3):
        write_tar(tmp_path / "tars" / f"val-{part}.tar", members[4 * part : 4 * part + 4])
    with serving(tmp_path) as server:
        (found,) = evaluated(TIMM % 3, "--data", f"shards:{server.url}/tars/val-{{0..2}}.tar", "--size", 32)
        (local,) = evaluated(TIMM % 3, "--data", f"shards:{tmp_path}/tars/val-*.tar", "--size", 32)
    assert found["images"] == local["images"] == 6
    assert found["data"]["val"] == "val-{0..2}.tar"


def test_a_broken_image_is_an_error_or_left_out(
    evaluated: Eval, images: Callable, capsys: pytest.CaptureFixture
) -> None:
    folder = images("a", "b")
    broken = next(folder.rglob("*.JPEG"))
    broken.write_bytes(broken.read_bytes()[:100])
    words = [TIMM % 2, "--data", str(folder), "--size", "32"]
    assert cli.main(["eval", *words, "--device", "cpu", "--workers", "0"]) == 1
    assert str(broken) in capsys.readouterr().err
    # Beyond max_corrupt, which is meant for large sets, skipping is an error as well.
    for number in range(100):
        (folder / "b" / f"{number}.png").write_bytes((folder / "b" / "ILSVRC2012_val_00000004.JPEG").read_bytes())
    with pytest.warns(UserWarning, match=broken.name):
        (found,) = evaluated(*words, "--skip-corrupt")
    assert found["images"] == 105


def test_reassessed_labels_go_by_file(evaluated: Eval, images: Callable, tmp_path: Path) -> None:
    folder = images(WNIDS[5], WNIDS[300])
    real = tmp_path / "real.json"
    real.write_text(json.dumps([[], *[[5]] * 5]))
    (found,) = evaluated("test_resnet", "--data", folder, "--size", 32, "--real", real)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    transform = create_transform(**{**timm.data.resolve_model_data_config(model), "input_size": (3, 32, 32)})
    with torch.no_grad():
        files = sorted(folder.rglob("*.JPEG"), key=lambda file: file.name)[1:]
        hits = [model(transform(Image.open(file).convert("RGB"))[None])[0, [5, 300]].argmax() == 0 for file in files]
    assert found["metrics"]["real_top1"] == pytest.approx(sum(map(int, hits)) / 5)
    # timm's copy has other indices than 5 and 300 for these names: without all outputs, nothing remains.
    (timms,) = evaluated("test_resnet", "--data", folder, "--size", 32, "--real")
    assert timms["metrics"]["real_top1"] is None
    (timms,) = evaluated("test_resnet", "--data", folder, "--size", 32, "--all-outputs", "--real")
    assert timms["metrics"]["real_top1"] in [hits / 5 for hits in range(6)]


def test_images_come_as_the_model_was_published(evaluated: Eval, images: Callable) -> None:
    folder = images(WNIDS[5], WNIDS[300])
    tv, small = evaluated("torchvision:resnet18", "resnet18", "--data", folder, "--size", 32)
    keys = ("size", "interpolation", "crop_pct")
    assert [tv["data"][key] for key in keys] == [32, "bilinear", 224 / 256]
    config = timm.create_model("resnet18").pretrained_cfg
    assert (config["crop_pct"], config["test_crop_pct"]) == (0.95, 1.0)
    assert [small["data"][key] for key in keys] == [32, "bicubic", 1.0]
    (own,) = evaluated(TIMM % 2, "--data", folder, "--class-map", "sorted")
    config = timm.create_model("test_resnet").pretrained_cfg
    assert [own["data"][key] for key in keys] == [config["input_size"][-1], config["interpolation"], config["crop_pct"]]


def test_embedded_data_serve_any_model(evaluated: Eval) -> None:
    (found,) = evaluated(TIMM % 10, "--data", "digits", "--size", 32)
    assert (found["images"], found["classes"]) == (355, 10)


# Errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test_resnet"], "test_resnet is not a run, so it has no data of its own: give --data"),
        (["test_resnt", "--data", "digits"], "Did you mean 'test_resnet'"),
        (["test_resnet", "--data", "digits"], "10 of the data's 10 classes ('0', '1', '2', ...) are not among"),
        (["test_resnet", "--data", "digts"], "--data digts: there is no such folder"),
        (["test_resnet", "--data", "digits", "--which", "last"], "none of the models is a run"),
        (["test_resnet", "--data", "digits", "--class-map", "names.txt"], "there is no file 'names.txt'"),
        ([TIMM % 9, "--data", "digits"], "on digits: the model has 9 outputs and the data 10 classes"),
        ([TIMM % 10, "--data", "digits", "--crop-pct", "0.9"], "has no option 'crop_pct'"),
        ([TIMM % 10, "--data", "digits", "--batch-size", "0"], "batch_size must be at least 1"),
        (
            ["test_vit{num_classes: 10, dynamic_img_size: false}", "--data", "digits"],
            "VisionTransformer refuses images of 3x32x32",
        ),
        ([TIMM % 10, "--data", "digits", "--real", "nowhere.json"], "nowhere.json"),
        (["RUN", "--data", "digits"], "are not among the model's 8 ("),
        (["RUN", "--real"], "--real finds labels by file names, and scales has none"),
        (["EMPTY"], "holds no checkpoints"),
        ([TIMM % 10, "--data", "digits", "--out", "file.txt/results.json"], "file.txt"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    words: list[str],
    message: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("no folder")
    known = {"RUN": str(trained), "EMPTY": str(tmp_path)}
    assert cli.main(["eval", *(known.get(word, word) for word in ["--out", "results.json", *words])]) == 1
    error = capsys.readouterr().err
    assert error.startswith("widefield eval: ")
    assert message in error
    assert not (tmp_path / "results.json").exists()


def test_a_run_without_average_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = {"depths": [1, 1, 1, 1], "dims": [4, 4, 4, 4]}
    recipe = Recipe("raw", ModelSpec("convnext_atto", args), DataSpec("scales", {"count": 16}), epochs=1)
    folder = train(
        Recipe(**{**vars(recipe), "output": str(tmp_path), "batch_size": 8, "workers": 0}), console=QUIET
    ).folder
    assert cli.main(["eval", str(folder), "--weights", "ema"]) == 1
    assert "keeps no moving average" in capsys.readouterr().err
    assert cli.main(["eval", str(folder), "--weights", "both"]) == 0
    assert "model, best (step 2)" in capsys.readouterr().out


def test_nothing_is_evaluated_before_all_is_known_to_fit(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from widefield.runs import accuracy

    calls: list[Any] = []
    monkeypatch.setattr(accuracy, "evaluate_model", lambda *args, **options: calls.append(args))
    assert cli.main(["eval", str(trained), "test_resnet", "--data", "digits"]) == 1
    assert calls == []
