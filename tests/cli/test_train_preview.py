"""What `widefield train` would do, without training: recipes, the whole recipe, a dry run."""

import re
from pathlib import Path

import pytest

from widefield.cli import main
from widefield.train import describe_recipes, load_recipe, shipped_recipes

SMALL = ["--model.args.depths", "[1, 1, 1, 1]", "--model.args.dims", "[8, 8, 8, 8]"]


def test_every_shipped_recipe_says_what_it_is():
    found = describe_recipes()
    assert [one.name for one in found] == shipped_recipes()
    for one in found:
        assert one.about, one.name
        assert not one.about.startswith(("#", " ")), one.name
        assert not re.search(r"\bUse it as\b|accelerate launch", one.about), one.name


def test_recipes_lists_names_tasks_and_data(capsys):
    assert main(["recipes", "demo_scenes*", "--task", "detection"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"demo_scenes_faster_rcnn\s+│ detection │ scenes", out)
    assert "demo_scenes_pose" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipes", "demo_sclaes"], "no recipe is called 'demo_sclaes'. Did you mean 'demo_scales'?"),
        (["recipes", "--task", "poses"], "Did you mean 'pose'?"),
        (["train", "demo_sclaes"], "Did you mean 'demo_scales'? `widefield recipes` lists the shipped ones."),
        (["train", "--dry-run", "--resume", "runs/x"], "leave out --resume"),
    ],
)
def test_mistakes_name_their_mend_in_one_line(words, message, capsys):
    assert main(words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert len(error) < 300


def test_print_config_is_a_recipe_that_reads_back(capsys, tmp_path):
    assert main(["train", "digits_morf", "--print-config", "--optimizer.lr", "0.5"]) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert load_recipe(file) == load_recipe("digits_morf", ["--optimizer.lr", "0.5"])


def test_a_dry_run_builds_everything_and_writes_nothing(capsys, tmp_path):
    words = ["train", "digits_morf", "--output", str(tmp_path / "runs"), *SMALL, "--batch_size", "32"]
    assert main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "train: 1,442 images, 10 classes" in out
    assert "4 MoRFConv2d" in out
    assert "image 32x3x32x32, label 32" in out
    assert "steps: 900 of 32 images, 20 epochs" in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_finds_what_training_would_stumble_over(capsys, tmp_path):
    words = ["train", "digits_morf", "--output", str(tmp_path), *SMALL, "--dry-run"]
    held = tmp_path / "digits_morf"
    held.mkdir()
    (held / "notes.txt").write_text("mine")
    assert main(words) == 1
    assert "holds a run already. It has no checkpoint: delete it, or choose another --name" in capsys.readouterr().err
    assert Path(held / "notes.txt").read_text() == "mine"
    assert main([*words, "--name", "other", "--batch_size", "5000"]) == 1
    assert "fewer than one batch of 5000: lower batch_size" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["digits_morf"]
