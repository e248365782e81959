"""Whole fits on a planted truth: what they find, leave behind, and continue."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fitting.planted import recipe_of
from train.helpers import QUIET
from widefield.fitting import FitResult, FitSpec, Interval, fit, halves
from widefield.fitting.verify import verdict_words
from widefield.loading import load_trained
from widefield.nn import ElasticConv2d
from widefield.surgery import elastic_layers
from widefield.train import load_recipe

FILES = ("fit.yaml", "costs.json", "readings.json", "choice.json", "verdict.json", "log.jsonl", "erf.png", "index.html")


def again(finished: FitResult, folder: Path, without: tuple[str, ...], **changes: Any) -> FitResult:
    """Continue a copy of a fit in which some phases are not finished."""
    shutil.copytree(finished.folder, folder)
    lines = (folder / "log.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["phase"] not in without]
    (folder / "log.jsonl").write_text("".join(f"{line}\n" for line in kept))
    for name in ("readings", "choice"):
        if {"read": "readings"}.get(name, name) in without or "read" in without:
            (folder / f"{name}.json").unlink(missing_ok=True)
    spec = replace(FitSpec.load(folder), **changes)
    spec.save()
    return fit(folder, console=QUIET)


def test_far_dots_need_a_large_kernel(finished: FitResult) -> None:
    assert finished.sizes["stage 1"] >= 7  # a kernel of 5 sees no distance above 4
    losses = {candidate.sizes[0]: candidate for candidate in finished.choice.candidates}
    for size in (3, 5):
        assert losses[size].to_best.low > 0.1
    assert finished.choice.matters
    assert finished.choice.equality < 0.05


def test_the_folder_holds_all_that_the_result_says(finished: FitResult) -> None:
    for name in FILES:
        assert (finished.folder / name).is_file(), name
    loaded = FitResult.load(finished.folder)
    assert loaded == finished
    json.dumps(loaded.to_dict(), allow_nan=False)
    assert finished.verdict.words in str(finished).lower()
    assert len(finished.rows()) == len(finished.groups)
    assert list(finished.seconds) == ["plan", "probe", "read", "choose", "settle", "compare", "verify"]


def test_phases_are_plain_runs_of_the_whole_budget(finished: FitResult) -> None:
    probe, plain, unchanged = (load_recipe(finished.folder / name) for name in ("probe", "plain", "unchanged"))
    assert probe.max_steps + plain.max_steps == unchanged.max_steps == 160
    assert (probe.schedule.before, probe.schedule.after) == (0, plain.max_steps)
    assert (plain.schedule.before, plain.schedule.after) == (probe.max_steps, 0)
    assert unchanged == replace(finished.spec.recipe, name="unchanged", output=str(finished.folder))
    assert isinstance(load_trained(finished.folder / "probe").mix, ElasticConv2d)
    network = load_trained(finished.folder / "plain")
    assert not elastic_layers(network)
    assert network.mix.kernel_size == (finished.sizes["stage 1"],) * 2


def test_settling_starts_from_the_probed_network_at_the_chosen_sizes(finished: FitResult) -> None:
    from safetensors.torch import load_file

    start = load_file(finished.folder / "start.safetensors")
    probed = load_trained(finished.folder / "probe", "last").eval()
    probed.mix.kernel_size = finished.sizes["stage 1"]
    torch.testing.assert_close(start["mix.weight"], probed.mix.kernel())
    torch.testing.assert_close(start["classifier.weight"], probed.classifier.weight)


def test_reading_again_chooses_bitwise_the_same(finished: FitResult, folder: Path) -> None:
    other = again(finished, folder, ("read", "choose"))
    assert other.readings == finished.readings
    assert other.choice == finished.choice


def test_the_selection_never_sees_the_report_half(finished: FitResult, folder: Path) -> None:
    from widefield import data

    recipe = finished.spec.recipe
    val = data.create("pairs", "val", **recipe.data.args)
    select, report = halves(val)
    assert not set(select.indices) & set(report.indices)
    assert sorted([*select.indices, *report.indices]) == list(range(len(val)))
    args = {**recipe.data.args, "other": report.indices}  # all labels of the report half are wrong
    changed = replace(recipe, data=replace(recipe.data, args=args))
    other = again(finished, folder, ("read", "choose", "verify"), recipe=changed)
    assert other.readings == finished.readings
    assert other.choice == finished.choice
    before, after = finished.verdict.plain.metrics["top1"], other.verdict.plain.metrics["top1"]
    assert after == pytest.approx(1 - before)


def test_a_fit_is_continued_as_it_was_or_not_at_all(finished: FitResult, folder: Path) -> None:
    spec = finished.spec
    assert fit(spec, console=QUIET) == finished  # nothing is left to do
    with pytest.raises(ValueError, match=r"other settings: probe was 0\.5 and is 0\.4"):
        fit(spec, probe=0.4, console=QUIET)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else"):
        fit(spec.recipe, out=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_sizes": (3, 4)}, "kernel sizes must be odd.*got 4"),
        ({"limit": 0.0}, "limit must be above 0"),
        ({"limit": -1.0}, "limit must be from 0"),
        ({"probe": 0.0}, "probe must be between 0 and 1"),
        ({"probe": 1.0}, "probe must be between 0 and 1"),
        ({"by": "block"}, "by must be one of"),
        ({"budget": "flops"}, "budget must be one of"),
        ({"where": ["nothing.*"]}, "matches no convolution.*These could match: mix"),
        ({"limit": 0.1, "budget": "macs"}, r"no choice of sizes meets the limit 0\.1"),
        ({"kernel_sizes": (7,)}, "no convolution of one_convolution has two sizes"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    tmp_path: Path, folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(recipe_of(tmp_path, (1, 2)), out=folder, console=QUIET, **settings)
    assert not (folder / "probe").exists()


def test_a_fit_that_was_refused_leaves_its_folder_to_the_next_one(tmp_path: Path, folder: Path) -> None:
    for limit in (0.1, 0.15):
        with pytest.raises(ValueError, match=f"no choice of sizes meets the limit {limit}"):
            fit(recipe_of(tmp_path, (1, 2)), out=folder, budget="macs", limit=limit, console=QUIET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 1, "evaluate_every": 1, "schedule": None}, "at least 2"),
        ({"data": {"count": 14}, "batch_size": 4}, "the val split has 14 images.*at least 8"),
        ({"batch_size": 512}, "fewer than one batch of 512"),
    ],
)
def test_recipes_that_cannot_work_are_refused(
    tmp_path: Path, folder: Path, changes: dict[str, Any], message: str
) -> None:
    from widefield.train import ScheduleSpec

    if "schedule" in changes:
        changes = {**changes, "schedule": ScheduleSpec()}
    with pytest.raises(ValueError, match=message):
        fit(recipe_of(tmp_path, (1, 2), **changes), out=folder, console=QUIET)


def test_wrong_arguments_name_the_right_ones(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, (1, 2))
    with pytest.raises(TypeError, match=r"no argument 'budgte'.*Did you mean 'budget'"):
        fit(recipe, budgte="macs")
    with pytest.raises(TypeError, match="takes a recipe or the name of a model"):
        fit(torch.nn.Conv2d(1, 1, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resnet18 is a model: say what it shall learn"):
        fit("resnet18")
    with pytest.raises(FileNotFoundError, match="no recipe 'resnet1'"):
        fit("resnet1")


@pytest.mark.parametrize(
    ("ends", "cost", "matters", "same", "words", "recommended"),
    [
        ((0.01, 0.03), 1.2, True, False, "gain", "plain"),
        ((-0.01, 0.03), 0.9, True, False, "as good and cheaper", "plain"),
        ((-0.01, 0.03), 1.0, True, False, "nothing to gain here", "unchanged"),
        ((-0.03, -0.01), 0.5, True, False, "nothing to gain here", "unchanged"),
        ((0.0, 0.0), 1.0, True, True, "nothing to gain here", "unchanged"),
        ((0.0, 0.0), 1.0, False, True, "the field does not matter for these data", "unchanged"),
        ((-0.01, 0.01), 0.9, False, False, "the field does not matter for these data", "plain"),
        ((-0.01, 0.01), 1.0, False, False, "the field does not matter for these data", "unchanged"),
        ((-0.03, -0.01), 0.5, False, False, "the field does not matter for these data", "unchanged"),
    ],
)
def test_verdicts(
    ends: tuple[float, float], cost: float, matters: bool, same: bool, words: str, recommended: str
) -> None:
    difference = Interval(sum(ends) / 2, *ends, 100)
    assert verdict_words(difference, cost, matters=matters, same=same) == (words, recommended)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("distances", "noise", "sizes", "matters"),
    [((6, 8), False, (7, 11), True), ((1, 2), False, (3,), False), ((1, 2), True, (3, 5), False)],
    ids=["far apart", "close", "labels of noise"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_planted_field_is_found(
    tmp_path: Path, distances: tuple[int, int], noise: bool, sizes: tuple[int, ...], matters: bool, seed: int
) -> None:
    """Every kernel that sees dots at a distance of 2 solves the second case, so the smallest is as good as any."""
    recipe = recipe_of(tmp_path, distances, data={"noise": noise}, max_steps=480, evaluate_every=480, seed=seed)
    result = fit(recipe, out=tmp_path / "fit", budget="macs", limit=None, probe=0.5, onnx=False, console=QUIET)
    assert result.sizes["stage 1"] in sizes
    assert result.choice.matters == matters
    assert (result.verdict.words == "the field does not matter for these data") == (not matters)
    assert (result.verdict.plain.metrics["top1"] > 0.95) == (not noise)
