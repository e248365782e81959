"""Records of runs: listing, sorting, filtering, comparing, drawing."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from train.helpers import log
from widefield import report
from widefield.runs import RunRecord, comparison, draw_runs, filter_runs, find_runs, pick_runs, read_run, sort_runs
from widefield.runs.compare import differences
from widefield.runs.records import duration
from widefield.train import ConversionSpec, EmaSpec, OptimizerSpec, Recipe, RunResult, save_recipe

Run = Callable[..., RunResult]
Make = Callable[..., Path]


@pytest.fixture
def make(recipe: Recipe) -> Make:
    """Write a run's folder without training: accuracies of its epochs, and its recipe with some keys replaced."""

    def write(name: str, accuracies: list[float | None], *, hours: float = 1.0, **changes: Any) -> Path:
        plan = replace(recipe, name=name, **{"epochs": 3, **changes})
        plan.folder.mkdir(parents=True)
        save_recipe(plan, plan.folder / "config.yaml")
        prefix = "ema_" if plan.ema else ""
        lines: list[dict[str, Any]] = []
        for epoch, value in enumerate(accuracies):
            lines.append({"kind": "step", "step": 6 * epoch + 3, "epoch": epoch, "loss": 1.0, "lr": 0.1})
            entry = {"kind": "epoch", "step": 6 * epoch + 6, "epoch": epoch, "lr": 0.1, "seconds": 40.5}
            lines.append({**entry, "train_loss": 2.0 - epoch, "loss": 1.5 - epoch, "experts": [1, 2]})
            lines[-1][f"{prefix}top1"] = value
            meta = plan.folder / "checkpoints" / f"step-{6 * epoch + 6:08}" / "meta.json"
            meta.parent.mkdir(parents=True)
            meta.write_text(json.dumps({"headline": f"{prefix}top1", "higher_is_better": True}))
        (plan.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        for file in plan.folder.glob("*.*"):
            os.utime(file, (time.time() - 3600 * hours,) * 2)
        return plan.folder

    return write


def names(runs: list[RunRecord]) -> list[str]:
    return [run.name for run in runs]


def test_a_run_is_listed_as_it_ended(run: Run, recipe: Recipe) -> None:
    result = run(ema=EmaSpec(0.5), conversion=ConversionSpec("morf", "*.conv_dw", {"kernel_sizes": [3, 5, 7]}))
    (found,) = find_runs(recipe.output)
    epochs = [entry for entry in log(result.folder) if entry["kind"] == "epoch"]
    assert (found.folder, found.name, found.state, found.problem) == (result.folder, "run", "finished", "")
    assert (found.model, found.data) == ("convnext_atto + morf", "scales")
    assert (found.done, found.length, found.unit, found.headline) == (2, 2, "epoch", "ema_top1")
    assert found.last() == result.metrics["ema_top1"] == epochs[-1]["ema_top1"]
    assert found.best() == result.best["ema_top1"] == max(entry["ema_top1"] for entry in epochs)
    assert found.best("loss") == min(entry["loss"] for entry in epochs)
    assert found.last("train_loss") == epochs[-1]["train_loss"]
    raw = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert found.seconds == pytest.approx(sum(entry["seconds"] for entry in raw if entry["kind"] == "epoch"))
    assert abs(time.time() - found.updated.timestamp()) < 600
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["recipe"]["conversion.args.kernel_sizes"] == [3, 5, 7]
    row = found.row()
    assert (row["trained"], row["metric"], row["state"]) == ("2/2 epochs", "ema_top1", "finished")
    assert row["last"] == f"{100 * result.metrics['ema_top1']:.2f}%"


def test_weights_are_never_read(make: Make) -> None:
    folder = make("run", [0.5, 0.6, 0.7])
    for name in ("model.safetensors", "state.safetensors"):
        (folder / "checkpoints" / "step-00000018" / name).write_bytes(b"no weights")
        (folder / "checkpoints" / "step-00000018" / name).chmod(0)
    assert read_run(folder).state == "finished"


def test_states(make: Make) -> None:
    finished, still, alive = make("finished", [0.1, 0.2, 0.3]), make("still", [0.1]), make("alive", [0.1], hours=0)
    assert [read_run(folder).state for folder in (finished, still, alive)] == ["finished", "interrupted", "running?"]
    young = make("young", [])
    assert (read_run(young).state, read_run(young).row()["best"]) == ("interrupted", "-")
    assert read_run(young).problem == "it has no checkpoint to resume from"
    failed = make("failed", [])
    (failed / "config.yaml").rename(failed / "failed.yaml")
    assert (read_run(failed).state, read_run(failed).model) == ("failed", "convnext_atto")
    dismantled = make("dismantled", [0.1, 0.2, 0.3])
    for file in sorted((dismantled / "checkpoints").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    assert (read_run(dismantled).state, read_run(dismantled).best()) == ("finished", 0.3)


def test_an_interrupted_run_is_told_from_a_finished_one(run: Run, recipe: Recipe) -> None:
    folder = run(epochs=1).folder
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 1\n", "epochs: 2\n", 1))
    for file in folder.glob("*.*"):
        os.utime(file, (time.time() - 3600,) * 2)
    found = read_run(folder)
    assert (found.state, found.row()["trained"]) == ("interrupted", "1/2 epochs")


def test_values_that_were_not_finite_are_passed_over(make: Make) -> None:
    found = read_run(make("run", [0.5, None, None]))
    assert (found.best(), found.last()) == (0.5, None)
    assert (found.row()["best"], found.row()["last"]) == ("50.00%", "-")


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("config.yaml", "{", "config.yaml is malformed"),
        ("config.yaml", "just words", "config.yaml is malformed"),
        ("config.yaml", b"\xff\xfe\x00", "config.yaml is malformed"),
        ("config.yaml", "base: gone\nepochs: 3\n", "its recipe does not fit this version: base: 'gone' is neither"),
        ("config.yaml", "base: digits_morf\nantigravity: 1\n", "does not fit this version: antigravity: unknown key"),
        ("config.yaml", None, "it has checkpoints and no config.yaml"),
        ("metrics.jsonl", '{"kind": "epoch", "step": 1}\n', "metrics.jsonl"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl"),
        ("metrics.jsonl", b"\xff\xfe\x00", "metrics.jsonl"),
        ("checkpoints/step-00000018/meta.json", "{}", "meta.json"),
        ("checkpoints/step-00000018/meta.json", None, "meta.json"),
    ],
)
def test_a_broken_run_is_listed_as_such(file: str, content: str | bytes | None, problem: str, make: Make) -> None:
    make("whole", [0.1, 0.2, 0.3])
    broken = make("broken", [0.1, 0.2, 0.3]) / file
    if content is None:
        broken.unlink()
    else:
        broken.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = {run.name: run for run in find_runs(broken.parents[len(Path(file).parts)])}
    assert found["whole"].state == "finished"
    assert found["broken"].state == "broken"
    assert problem in found["broken"].problem
    assert found["broken"].row()["state"] == "broken"


def test_the_last_line_of_a_killed_run_may_be_half(make: Make) -> None:
    file = make("run", [0.1, 0.2]) / "metrics.jsonl"
    file.write_text(file.read_text() + '{"kind": "epo')
    assert read_run(file.parent).done == 2


def test_a_recipe_of_another_version_still_shows_its_numbers(make: Make) -> None:
    config = make("run", [0.1, 0.2, 0.3]) / "config.yaml"
    config.write_text(config.read_text() + "antigravity: true\n")
    found = read_run(config.parent)
    assert (found.state, found.model, found.best()) == ("finished", "convnext_atto", 0.3)
    assert found.problem == "its recipe does not fit this version: antigravity: unknown key."


def test_folders_are_searched_to_the_runs_and_no_deeper(make: Make, recipe: Recipe, tmp_path: Path) -> None:
    first, second = make("a", [0.1], hours=3), make("b", [0.2], hours=2, output=f"{recipe.output}/deep/er")
    make("hidden", [0.2], output=f"{recipe.output}/.trash")
    (first / "checkpoints" / "config.yaml").write_text("")
    (tmp_path / "runs" / "deep" / "round").symlink_to(tmp_path / "runs")
    (tmp_path / "elsewhere").mkdir()
    second.rename(tmp_path / "elsewhere" / "b")
    second.symlink_to(tmp_path / "elsewhere" / "b")
    assert names(find_runs(recipe.output)) == ["a", "b"]
    assert names(find_runs(recipe.output, first)) == ["a", "b"]  # no duplicates
    assert names(find_runs(first)) == ["a"]
    assert find_runs(tmp_path / "runs" / "deep" / "er" / "b" / "checkpoints") == []
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere'"):
        find_runs("nowhere")


# Sorting and filtering


@pytest.fixture
def three(make: Make) -> list[RunRecord]:
    lr = OptimizerSpec(lr=0.01)
    return [
        read_run(make("low", [0.1, 0.2, 0.3], hours=1, optimizer=lr)),
        read_run(make("high", [0.9, 0.8, 0.7], hours=2)),
        read_run(make("none", [None], hours=3, ema=EmaSpec(0.9))),
    ]


@pytest.mark.parametrize(
    ("key", "order"),
    [
        ("name", ["high", "low", "none"]),
        ("updated", ["none", "high", "low"]),
        ("trained", ["none", "low", "high"]),
        ("time", ["none", "low", "high"]),
        ("state", ["low", "high", "none"]),
        ("top1", ["high", "low", "none"]),
        ("best", ["high", "low", "none"]),
        ("loss", ["low", "high", "none"]),
    ],
)
def test_sorting(key: str, order: list[str], three: list[RunRecord]) -> None:
    assert names(sort_runs(three, key)) == order


def test_sorting_by_what_is_not_there(three: list[RunRecord]) -> None:
    with pytest.raises(ValueError, match=r"no run has the metric 'top2'.*train_loss.*Did you mean 'top1'\?"):
        sort_runs(three, "top2")


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        (["state=finished"], ["low", "high"]),
        (["name=*o*"], ["low", "none"]),
        (["optimizer.lr=0.01"], ["low"]),
        (["ema.decay=*"], ["none"]),
        (["ema.decay=null"], ["low", "high"]),
        (["channels_last=false", "name=h*"], ["high"]),
        (["model.name=convnext_atto", "state=broken"], []),
    ],
)
def test_filtering(conditions: list[str], kept: list[str], three: list[RunRecord]) -> None:
    assert names(filter_runs(three, conditions)) == kept


def test_wrong_conditions(three: list[RunRecord]) -> None:
    with pytest.raises(ValueError, match=r"KEY=VALUE.*got 'finished'"):
        filter_runs(three, ["finished"])
    with pytest.raises(ValueError, match=r"no run has the key 'optimizer.rl'\. Did you mean 'optimizer.lr'\?"):
        filter_runs(three, ["optimizer.rl=1"])


def test_picking(three: list[RunRecord], make: Make, recipe: Recipe) -> None:
    assert names(pick_runs(three, ["none", "low"])) == ["none", "low"]
    apart = make("apart", [0.1], output=f"{recipe.output}-2")
    assert names(pick_runs(three, [str(apart)])) == ["apart"]
    with pytest.raises(ValueError, match=r"no run 'lov' among 3.*Did you mean 'low'\?"):
        pick_runs(three, ["lov"])
    with pytest.raises(ValueError, match="no run"):
        pick_runs(three, [recipe.output])  # a folder, but not a run's
    with pytest.raises(ValueError, match="'low' names 2 runs"):
        pick_runs([three[0], three[0]], ["low"])


# Comparing


def test_differences_are_those_of_the_recipes(three: list[RunRecord]) -> None:
    assert differences(three) == {
        "optimizer.lr": ["0.01", "0.002", "0.002"],
        "ema.decay": ["-", "-", "0.9"],
        "ema.warmup": ["-", "-", "false"],
    }
    assert differences(three[:1]) == {}


def test_a_comparison_has_a_column_a_run(three: list[RunRecord]) -> None:
    rows = {row[""]: [row["low"], row["high"]] for row in comparison(three[:2])}
    assert rows == {
        "optimizer.lr": ["0.01", "0.002"],
        "state": ["finished", "finished"],
        "trained": ["3/3 epochs", "3/3 epochs"],
        "time": ["2m02s", "2m02s"],
        "last train_loss": ["0", "0"],
        "best train_loss": ["0", "0"],
        "last loss": ["-0.5", "-0.5"],
        "best loss": ["-0.5", "-0.5"],
        "last top1": ["30.00%", "70.00%"],
        "best top1": ["30.00%", "90.00%"],
    }
    assert [row[""] for row in comparison(three, ["top1"])][-2:] == ["last top1", "best top1"]
    with pytest.raises(ValueError, match="two runs or more"):
        comparison(three[:1])


def test_runs_of_one_name_are_told_by_their_folders(make: Make, recipe: Recipe) -> None:
    folders = [make("run", [0.1], output=f"{recipe.output}/{place}") for place in "ab"]
    rows = comparison([read_run(folder) for folder in folders])
    assert list(rows[0]) == ["", *map(str, folders)]


def test_durations_as_text() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3600, 100_000)] == ["0s", "1m00s", "1m01s", "1h00m", "27h46m"]


@pytest.mark.parametrize("prefix", ["", "ema_"])
def test_the_smallest_error_is_the_best(prefix: str, make: Make) -> None:
    runs = []
    for name, errors in (("near", [9.0, 3.0, 5.0]), ("far", [30.0, 20.0, 40.0])):
        folder = make(name, [0.1, 0.2, 0.3])
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line, error in zip([line for line in lines if line["kind"] == "epoch"], errors, strict=True):
            line[f"{prefix}epe"], line[f"{prefix}oks_ap"] = error, error / 100
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        runs.append(read_run(folder))
    near, far = runs
    assert (near.best(f"{prefix}epe"), far.best(f"{prefix}epe")) == (3.0, 20.0)
    assert names(sort_runs([far, near], f"{prefix}epe")) == ["near", "far"]
    rows = {row[""]: row for row in comparison(runs)}
    assert rows[f"best {prefix}epe"]["near"] == "3"
    assert rows[f"best {prefix}oks_ap"]["far"] == "40.00%"
    assert draw_runs(runs, [f"{prefix}oks_ap"]).axes[0].get_ylabel() == f"{prefix}oks_ap (%)"


def test_a_run_without_checkpoints_has_the_headline_of_its_task(make: Make) -> None:
    folder = make("poses", [None])
    for file in (folder / "checkpoints").glob("*/meta.json"):
        file.unlink()
        file.parent.rmdir()
    entry = {"kind": "epoch", "step": 6, "epoch": 0, "loss": 1.0, "oks_ap": 0.5, "ema_oks_ap": 0.25}
    (folder / "metrics.jsonl").write_text(f"{json.dumps(entry)}\n")
    assert read_run(folder).headline == "ema_oks_ap"


# Drawing


def test_curves_hold_the_numbers_of_the_log(three: list[RunRecord]) -> None:
    figure = draw_runs(three)
    (axis,) = figure.axes
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert list(lines) == ["low", "high"]  # the third has no value to draw
    assert list(lines["high"].get_xdata()) == [1, 2, 3]
    assert list(lines["high"].get_ydata()) == pytest.approx([90, 80, 70])
    assert lines["low"].get_color() != lines["high"].get_color()
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("top1 (%)", "epoch")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["low", "high"]


def test_each_metric_has_a_panel_and_fits_a_column(three: list[RunRecord]) -> None:
    figure = draw_runs(three, ["top1", "loss"])
    assert [axis.get_ylabel() for axis in figure.axes] == ["top1 (%)", "loss"]
    assert len(figure.axes[1].get_lines()) == 3
    picture = Image.open(io.BytesIO(report.drawing(figure, "png", dpi=100)))
    assert picture.width <= 100 * report.COLUMN * 1.05
    assert all(text.get_fontsize() >= 7 for axis in figure.axes for text in axis.get_xticklabels())


def test_averages_are_marked_among_others(make: Make) -> None:
    runs = [read_run(make("raw", [0.1])), read_run(make("smooth", [0.2], ema=EmaSpec(0.9)))]
    assert [line.get_label() for line in draw_runs(runs).axes[0].get_lines()] == ["raw", "smooth (average)"]


def test_many_runs_stay_apart(make: Make) -> None:
    lines = draw_runs([read_run(make(f"run{i}", [0.1, 0.2])) for i in range(10)]).axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 10


def test_nothing_to_draw_is_an_error(three: list[RunRecord]) -> None:
    with pytest.raises(ValueError, match=r"no run has the metric 'top2' to draw; there are .*Did you mean 'top1'\?"):
        draw_runs(three, ["top2"])
    with pytest.raises(ValueError, match="no run has an evaluation to draw"):
        draw_runs([])
