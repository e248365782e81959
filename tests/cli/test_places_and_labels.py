"""Behavior of all commands: output paths are checked first, missing folders, labels of models."""

import json

import pytest
import timm
import torch

import widefield.loading
import widefield.runs.report
from widefield import cli
from widefield._files import check_place

COMMANDS = ["erf", "cam", "kernels", "masks", "routing", "interactions", "stability", "export"]


@pytest.fixture
def _no_models(monkeypatch):
    """Fail if a model is built, because errors must be found before."""

    def build(*args, **options):
        raise AssertionError("a model was loaded before the place to write to was looked at")

    monkeypatch.setattr(widefield.loading, "load", build)
    monkeypatch.setattr(widefield.runs.report, "load", build)


@pytest.mark.usefixtures("_no_models")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_written_is_known_first(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert cli.main([command, "test_resnet", "--out", str(out)]) == 1
        printed = capsys.readouterr().err
        assert str(out) in printed
        assert printed.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("_no_models")
def test_a_page_that_cannot_be_written_is_known_first(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "file").touch()
    for out, message in (
        ("run", "run is a folder, and a file must be written there"),
        ("file/report.html", "file/report.html cannot be written"),
        ("report.json", "the suffix of out must be one of '.html', '.htm'; got '.json'"),
    ):
        assert cli.main(["report", "run", "--out", out]) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["runs", "--plot", "file/curves.png"]) == 1
    assert "file/curves.png cannot be written" in capsys.readouterr().err
    assert cli.main(["bench", "model", "test_resnet", "--out", "file"]) == 1
    assert "file is a file, and a folder must be created there" in capsys.readouterr().err


def test_looking_at_a_place_leaves_nothing_behind(tmp_path):
    check_place(tmp_path / "a" / "b", folder=True)
    check_place(tmp_path / "a" / "b.html")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    check_place(tmp_path / "a" / "b" / "c.html")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "nofolder"], "there is no folder 'nofolder': a report is on a run of `widefield train`"),
        (["report", "runs/on"], "there is no folder 'runs/on': a report is on a run of `widefield train`, runs/NAME. "
         "Did you mean 'runs/one'?"),
        (["erf", "test_resnet", "--images", "nofolder"], "no folder of images 'nofolder'. Give a folder, or one of"),
        (["erf", "test_resnet", "--images", "picturs"], "no folder of images 'picturs'. Did you mean 'pictures'?"),
        (["erf", "test_resnet", "--images", "digit"], "Did you mean 'digits'?"),
        (["kernels", "nofolder"], "there is neither a folder 'nofolder', nor does timm know a model of that name."),
        (["kernels", "runs/on"], "there is no folder 'runs/on'"),
    ],
)  # fmt: skip
def test_folders_that_are_not_there(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "pictures").mkdir()
    assert cli.main(words) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert "Did you mean 'folder'" not in printed
    assert printed.count("Did you mean") == message.count("Did you mean")


WORDS = ["test_resnet{layers: [1, 1, 1, 1], num_classes: 7}", "test_vit{depth: 1, num_classes: 7}"]


def test_labels_stand_for_long_words(tmp_path, capsys):
    words = ["--size", "160", "--count", "1", "--vector", "svg", "--out", str(tmp_path)]
    assert cli.main(["cam", *WORDS, "--label", "ours", "ViT of a block", *words]) == 0
    stored = json.loads((tmp_path / "cam.json").read_text())["results"]
    assert list(stored) == ["ours", "ViT of a block"]
    drawn = (tmp_path / "cam.svg").read_text()
    assert "ours" in drawn
    assert "test_resnet{" not in drawn
    assert "ViT of a block" in capsys.readouterr().out


@pytest.mark.usefixtures("_no_models")
@pytest.mark.parametrize("labels", [["a"], ["a", "a"], ["a", "b", "c"]])
def test_labels_are_one_each(labels, capsys, tmp_path):
    assert cli.main(["erf", *WORDS, "--label", *labels, "--out", str(tmp_path)]) == 1
    assert f"--label takes a different text for each model; got {labels}" in capsys.readouterr().err


def test_classes_of_weights_from_a_file_have_names(tmp_path, capsys):
    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    word = f"test_resnet{{checkpoint_path: {file}}}"
    assert cli.main(["cam", word, "--size", "64", "--count", "1", "--target", "967", "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "cam.json").read_text())["results"].values()
    assert found["labels"] == ["espresso"]
    assert found["about"]["weights"] == f"file {file}"


def test_tables_of_accuracy_name_the_file_of_the_weights(tmp_path, capsys, monkeypatch):
    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), file)
    words = ["--data", "digits", "--size", "32", "--class-map", "sorted", "--workers", "0", "--device", "cpu"]
    word = f"test_resnet{{num_classes: 10, checkpoint_path: {file}}}"
    assert cli.main(["eval", word, *words, "--out", str(tmp_path / "eval.json")]) == 0
    (found,) = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert found["weights"] == f"file {file}"
    assert f"file {file}" in capsys.readouterr().out.replace("\n", "")
