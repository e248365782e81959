"""``widefield fit``: what it makes of its words. Fits themselves are tested in Python."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import widefield
from fitting.planted import recipe_of
from train.helpers import QUIET
from widefield.cli import main
from widefield.fitting import FitResult, FitSpec, fit
from widefield.fitting.sources import spec_of
from widefield.train import load_recipe


def test_a_finished_fit_is_shown(finished: FitResult, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--resume", str(finished.folder)]) == 0
    shown = capsys.readouterr()
    assert finished.verdict.text in shown.out
    assert str(finished.run) in shown.out
    assert "finished before" in shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit"], "give a recipe, a run or a model first"),
        (["fit", "--epochs", "2"], "give a recipe, a run or a model first"),
        (["fit", "digits_morf", "--resume", "runs/x"], "--resume continues the fit in runs/x: leave out digits_morf"),
        (["fit", "demo_scale"], "Did you mean 'demo_scales'"),
        (["fit", "demo_scales", "--optimizer.lrr", "1"], "optimizer.lrr: unknown key"),
        (["fit", "demo_scales", "--limit", "much"], "--limit must be a number such as 0.9, or none; got 'much'"),
        (["fit", "demo_scales", "--probe", "1"], "probe must be between 0 and 1"),
        (["fit", "demo_scales", "--kernel-sizes", "3", "4"], "kernel sizes must be odd"),
        (["fit", "demo_scales", "--sparsity.sparsity", "0.5"], "sparsity: a fit trains dense kernels"),
        (["fit", "resnet18"], "resnet18 is a model: say what it shall learn"),
        (["fit", "--resume", "nowhere"], "nowhere is not the folder of a fit: it has no fit.yaml"),
    ],
)
def test_errors_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_model_by_name_gets_a_recipe(tmp_path: Path) -> None:
    words = ["--data.args.count", "64", "--epochs", "4", "--output", str(tmp_path)]
    spec = spec_of("torchvision:resnet18", "scales", words, {"limit": None})
    assert spec.recipe.model.name == "torchvision:resnet18"
    assert (spec.recipe.name, spec.recipe.data.name, spec.recipe.epochs) == ("resnet18", "scales", 4)
    assert spec.folder == tmp_path / "resnet18-fit"
    assert spec.shares() == (1, 3)


def test_a_finished_run_is_the_unchanged_network(finished: FitResult, folder: Path, tmp_path: Path) -> None:
    run = finished.folder / "unchanged"
    spec = spec_of(run, None, [], {"out": folder})
    assert spec.unchanged == str(run)
    assert spec.recipe == load_recipe(run)
    assert spec_of(run, None, ["--seed", "1"], {"out": folder}).unchanged is None  # another recipe
    other = replace(spec, recipe=recipe_of(tmp_path, (1, 2)))
    with pytest.raises(ValueError, match="is not a finished run of this recipe"):
        fit(other, console=QUIET)


def test_settings_survive_their_file(tmp_path: Path) -> None:
    recipe = replace(recipe_of(tmp_path, (1, 2)), clip_grad=1e-3)
    spec = FitSpec(recipe, (11, 3), ["mix"], "layer", "params", None, 0.25, out=tmp_path / "fit")  # type: ignore[arg-type]
    spec.folder.mkdir()
    spec.save()
    assert FitSpec.load(spec.folder) == spec
    assert spec.kernel_sizes == (3, 11)


def test_the_function_is_at_the_root() -> None:
    assert widefield.fit is fit
