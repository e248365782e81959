"""A run's record of its data: class names, and everything needed to use the run without the data."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from train.helpers import QUIET, log, same_weights
from widefield import cli, data
from widefield.analysis.cam import class_activation
from widefield.loading import MissingDataError, load, load_trained, read_run_data
from widefield.runs import write_report
from widefield.tasks import Classification
from widefield.train import (
    DataSpec,
    ModelSpec,
    OptimizerSpec,
    Recipe,
    build_model,
    load_recipe,
    train,
)
from widefield.train.run import Run as Training

SPLITS = {"train": 6, "val": 3}


def pictures(root: Path, names: str = "abc") -> Path:
    """Write noisy images, one color per class, in class folders of both splits."""
    rng = np.random.default_rng(0)
    for split, count in SPLITS.items():
        for place, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                color = np.roll([200, 60, 20], place)
                pixels = (color + rng.normal(0, 20, (40, 40, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def made(root: Path, output: Path, **changes: Any) -> Recipe:
    recipe = Recipe(
        name="run",
        model=ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "ls_init_value": 1.0}),
        data=DataSpec("folder", {"root": str(root), "size": 32, "mean": [0.4, 0.4, 0.4], "scale": [0.9, 1.0]}),
        optimizer=OptimizerSpec(lr=1e-2),
        output=str(output),
        epochs=6,
        batch_size=6,
        workers=0,
        trackers=[],
    )
    return replace(recipe, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``set`` and ``runs/run``, which was trained on it and separates the classes."""
    place = tmp_path_factory.mktemp("finished")
    result = train(made(pictures(place / "set"), place / "runs"), console=QUIET)
    assert result.best["top1"] > 0.6
    return place


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of it as the current folder, with the run's recipe pointing at the copy."""
    place = tmp_path / "copy"
    shutil.copytree(finished, place)
    config = place / "runs" / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(finished), str(place)))
    monkeypatch.chdir(place)
    return place


def moved(place: Path, old: str, new: str) -> None:
    for split in SPLITS:
        (place / "set" / split / old).rename(place / "set" / split / new)


def evaluated(*words: str) -> float:
    assert cli.main(["eval", "runs/run", "--workers", "0", "--device", "cpu", "--out", "eval.json", *words]) == 0
    return float(json.loads(Path("eval.json").read_text())["results"][0]["metrics"]["top1"])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(list(words)) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


class TestRecord:
    def test_is_what_the_data_set_says(self, here: Path) -> None:
        found = read_run_data("runs/run")
        assert found.classes == ("a", "b", "c")
        assert (found.size, found.mean, found.std) == (
            32,
            (0.4, 0.4, 0.4),
            data.create("folder", "val", root="set").std,
        )
        assert {name: split.images for name, split in found.splits.items()} == {"train": 18, "val": 9}
        shutil.rmtree("set")
        assert read_run_data("runs/run") == found

    def test_the_fingerprint_is_of_names_and_labels_wherever_the_files_are(self, here: Path) -> None:
        before = data.create("folder", "val", root="set").fingerprint()
        Path("set").rename("elsewhere")
        assert data.create("folder", "val", root="elsewhere").fingerprint() == before
        Path("elsewhere/val/a/0.png").rename("elsewhere/val/a/9.png")
        assert data.create("folder", "val", root="elsewhere").fingerprint() != before
        assert data.create("digits", "val").fingerprint() != data.create("digits", "train").fingerprint()

    def test_a_broken_one_is_named(self, here: Path) -> None:
        (here / "runs/run/data.json").write_text("{}")
        with pytest.raises(ValueError, match=r"data.json is not as a run writes it: KeyError"):
            read_run_data("runs/run")

    def test_a_missing_one_is_named_by_all_who_need_it(self, here: Path) -> None:
        (here / "runs/run/data.json").unlink()
        for reader in (read_run_data, load_trained, load):
            with pytest.raises(FileNotFoundError, match=r"runs/run is not the folder of a run: it has no data.json"):
                reader("runs/run")


def test_arguments_that_are_none_count(tmp_path: Path) -> None:
    spec = ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "ls_init_value": None})
    result = train(made(pictures(tmp_path / "set"), tmp_path / "runs", model=spec, epochs=1), console=QUIET)
    assert load_recipe(result.folder).model == spec
    assert same_weights(load_trained(result.folder), result.model)


class TestClasses:
    def test_that_were_renamed_are_refused_by_whatever_reads_labels(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert evaluated() > 0.6
        moved(here, "a", "z")
        for words in (["eval"], ["cam"], ["interactions"], ["export"], ["eval", "--weights", "model"]):
            error = refused(capsys, words[0], "runs/run", *words[1:])
            assert "the classes of the data have changed since the run: class 'a' became class 'z'." in error

    def test_that_were_added_are_refused(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for split in SPLITS:
            shutil.copytree(here / "set" / split / "b", here / "set" / split / "ab")
        assert "since the run: class 'ab' was added." in refused(capsys, "eval", "runs/run")
        with pytest.raises(ValueError, match="class 'ab' was added"):
            load("runs/run").pictures()

    def test_that_look_the_same_are_told_apart(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        content = json.loads(Path("runs/run/data.json").read_text())
        Path("runs/run/data.json").write_text(json.dumps({**content, "classes": ["caf\u00e9", "b", "c"]}))
        moved(here, "a", "cafe\u0301")
        error = refused(capsys, "eval", "runs/run")
        assert "class caf\u00e9 became class 'cafe\\u0301'" in error.replace("'caf\u00e9'", "caf\u00e9")
        assert "look the same" in error

    def test_several_that_were_added(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for split in SPLITS:
            for name in ("x", "y"):
                shutil.copytree(here / "set" / split / "b", here / "set" / split / name)
        assert "since the run: classes 'x', 'y' were added." in refused(capsys, "eval", "runs/run")

    def test_with_other_images_are_noted(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = (["eval", "runs/run"], ["erf", "runs/run", "--count", "1"], ["report", "runs/run", "--count", "1"])

        def shown(count: int = 2) -> list[str]:
            texts = []
            for command in words[:count]:  # the last takes seconds
                assert cli.main([*command, "--out", f"out-{command[0]}" + ".html" * (command[0] == "report")]) == 0
                caught = capsys.readouterr()
                texts.append(caught.out + caught.err)
            return texts

        assert not any("changed since the run" in text for text in shown())
        (here / "set/val/a/0.png").rename(here / "set/val/b/7.png")
        note = "changed since the run: images of the val split have other names or other labels"
        assert all(note in text for text in shown(3))
        (here / "set/val/b/7.png").unlink()
        assert all("changed since the run: the val split had 9 images and has 8" in text for text in shown())

    def test_in_another_order_are_found_by_name(self, here: Path) -> None:
        expected = evaluated()
        labels = [load("runs/run").pictures(count=None)[i]["label"] for i in range(9)]
        (here / "map.txt").write_text("c\na\nb\n")
        config = here / "runs/run/config.yaml"
        config.write_text(config.read_text().replace("    root:", "    class_map: map.txt\n    root:"))
        assert data.create("folder", "val", root="set", class_map="map.txt").classes == ("c", "a", "b")
        assert evaluated() == expected
        own = load("runs/run").pictures(count=None)
        assert [own[i]["label"] for i in range(9)] == labels
        assert own.classes == ("a", "b", "c")

    def test_that_are_gone_are_counted(self, here: Path) -> None:
        for split in SPLITS:
            shutil.rmtree(here / "set" / split / "b")
        evaluated()
        result = json.loads(Path("eval.json").read_text())["results"][0]
        assert (result["classes"], result["outputs"], result["images"]) == (2, 3, 6)

    def test_are_named_in_class_activation_of_any_images(self, here: Path) -> None:
        assert cli.main(["cam", "runs/run", "--images", "photographs", "--count", "1", "--out", "out"]) == 0
        (found,) = json.loads(Path("out/cam.json").read_text())["results"].values()
        model = load("runs/run")
        images = model.pictures("photographs", count=1).tensor()
        named = class_activation(model.model, images, classes=("a", "b", "c"))
        assert tuple(found["labels"]) == named.labels

    def test_of_another_run_leave_its_head(self, here: Path) -> None:
        recipe = load_recipe("runs/run")
        start = replace(recipe, model=replace(recipe.model, pretrained="runs/run"))
        old = load_trained("runs/run")
        same, others = (
            build_model(start, Classification(3), classes) for classes in (("a", "b", "c"), ("x", "y", "z"))
        )
        assert torch.equal(same.head.fc.weight, old.head.fc.weight)
        assert not torch.equal(others.head.fc.weight, old.head.fc.weight)
        assert torch.equal(others.stem[0].weight, old.stem[0].weight)

    @pytest.mark.parametrize(("classes", "fresh"), [("abc", False), ("xyz", True), ("abcd", True)])
    def test_of_another_run_leave_the_head_of_torchvisions_models(self, here: Path, classes: str, fresh: bool) -> None:
        spec = ModelSpec("torchvision:shufflenet_v2_x0_5")
        recipe = made(here / "set", here / "runs", name="tv", model=spec, epochs=1)
        old = train(recipe, console=QUIET).model
        start = replace(recipe, model=replace(spec, pretrained="runs/tv"))
        new = build_model(start, Classification(len(classes)), tuple(classes))
        assert torch.equal(new.conv1[0].weight, old.conv1[0].weight)
        assert torch.equal(new.conv1[1].running_mean, old.conv1[1].running_mean)
        assert new.fc.weight.shape == (len(classes), 1024)
        assert fresh != (len(classes) == 3 and torch.equal(new.fc.weight, old.fc.weight))


class TestResume:
    @pytest.fixture
    def part(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Return a run of six steps that was killed after four."""
        recipe = replace(load_recipe("runs/run"), name="part", output=str(here / "runs"), epochs=2)
        train(replace(recipe, name="whole"), console=QUIET)
        plain = Training._finish_round
        with monkeypatch.context() as patch:

            def finish(self: Training, *args: Any) -> None:
                plain(self, *args)
                raise KeyboardInterrupt

            patch.setattr(Training, "_finish_round", finish)
            with pytest.raises(KeyboardInterrupt):
                train(recipe, console=QUIET)
        return here / "runs" / "part"

    def rename(self, here: Path) -> None:
        moved(here, "a", "z")

    def add(self, here: Path) -> None:
        for split in SPLITS:
            shutil.copytree(here / "set" / split / "b", here / "set" / split / "ab")

    def remove(self, here: Path) -> None:
        for split in SPLITS:
            shutil.rmtree(here / "set" / split / "c")

    def one_more(self, here: Path) -> None:
        shutil.copy(here / "set/train/a/0.png", here / "set/train/a/7.png")

    def one_less_in_val(self, here: Path) -> None:
        (here / "set/val/a/0.png").unlink()

    def other_name(self, here: Path) -> None:
        (here / "set/train/a/0.png").rename(here / "set/train/a/7.png")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (rename, "class 'a' became class 'z'."),
            (add, "class 'ab' was added; the train split had 18 images and has 24; the val split had 9 images and"),
            (remove, "class 'c' is gone; the train split had 18 images and has 12"),
            (one_more, "the train split had 18 images and has 19."),
            (one_less_in_val, "the val split had 9 images and has 8."),
            (other_name, "images of the train split have other names or other labels."),
        ],
    )
    def test_on_other_data_is_refused(
        self,
        part: Path,
        here: Path,
        change: Callable[..., None],
        message: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        before = {path: path.read_bytes() for path in part.rglob("*") if path.is_file()}
        change(self, here)
        error = refused(capsys, "train", "--resume", str(part))
        assert f"can only be resumed on the data it began with, and {message}" in error
        assert "Restore the data, or start another run on them with --name" in error
        assert {path: path.read_bytes() for path in part.rglob("*") if path.is_file()} == before

    def test_on_the_same_data_elsewhere_goes_on_exactly(
        self, part: Path, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("set").rename("elsewhere")
        error = refused(capsys, "train", "--resume", str(part))
        assert "If the data have moved, give their new place: --data.args.root FOLDER." in error
        assert cli.main(["train", "--resume", str(part), "--data.args.root", "elsewhere"]) == 0
        assert log(part) == log(here / "runs/whole")
        assert load_recipe(part).data.args["root"] == "elsewhere"

    def test_without_its_record_of_the_data_is_refused(self, part: Path) -> None:
        (part / "data.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"part is not the folder of a run: it has no data.json"):
            train(load_recipe(part), resume=part, console=QUIET)


class TestWithoutItsData:
    @pytest.fixture(autouse=True)
    def gone(self, here: Path) -> None:
        shutil.rmtree(here / "set")

    @pytest.mark.parametrize(
        "words",
        [
            ["kernels"],
            ["erf", "--count", "1"],
            ["stability", "--count", "1", "--shifts", "1"],
            ["interactions", "--count", "1", "--grid", "4", "--pairs", "1", "--contexts", "2"],
            ["export", "--count", "4"],
            ["cam", "--images", "photographs", "--count", "1"],
        ],
    )
    def test_what_needs_no_image_of_it_works(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([words[0], "runs/run", "--out", "out", *words[1:]]) == 0
        shown = capsys.readouterr().err
        stand_in = "Photographs stand in for the data of the run 'run'." in shown
        assert stand_in == (words[0] not in ("kernels", "cam"))

    @pytest.mark.parametrize(
        "words",
        [["cam"], ["routing"], ["export", "--int8"], ["export", "--trim"], ["eval"], ["export", "--routing", "mean"]],
    )
    def test_what_is_about_its_images_says_what_to_do(
        self, words: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        error = refused(capsys, words[0], "runs/run", *words[1:])
        assert "are missing: root is not a folder" in error
        assert ("--data SOURCE" if words[0] == "eval" else "(--images)") in error

    def test_a_report_shows_what_there_is(self, here: Path) -> None:
        page = write_report(["runs/run"], here / "report.html", count=1).read_text()
        assert "Class activation: left out" in page
        assert "are missing" in page
        numbers = json.loads((here / "report.json").read_text())["results"]
        assert set(numbers) == {"Effective receptive field", "Kernel energy", "Translation stability"}

    def test_its_weights_are_those_that_were_trained(self, here: Path) -> None:
        found = load("runs/run")
        assert (found.size, found.mean, found.weights.origin) == (32, (0.4, 0.4, 0.4), "run")
        assert same_weights(found.model, load_trained("runs/run"))
        with pytest.raises(MissingDataError, match=re.escape("the data of the run 'run' are missing")):
            found.pictures()

    def test_it_is_evaluated_on_other_data(self, here: Path) -> None:
        pictures(here / "other")
        assert evaluated("--data", "other") > 0.6

    def test_what_it_started_from_may_be_gone_too(self, tmp_path: Path) -> None:
        weights = tmp_path / "weights.pth"
        torch.save(load_trained("runs/run").state_dict(), weights)
        recipe = load_recipe("runs/run")
        model = replace(recipe.model, args={**recipe.model.args, "checkpoint_path": str(weights)})
        root = pictures(tmp_path / "set")
        folder = train(made(root, tmp_path / "runs", name="second", model=model, epochs=1), console=QUIET).folder
        weights.unlink()
        load_trained(folder)
