"""Find the kernel sizes that fit a data set: probe, read, choose, settle, verify.

Every phase leaves its outcome in the fit's folder, and a phase that is finished is not repeated. The training phases
are runs, which resume exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from rich.console import Console
from safetensors.torch import save_model
from torch import Tensor

from widefield import _checks, bench, data, tasks
from widefield._files import check_place
from widefield._progress import progress_console
from widefield.data import SampleSet
from widefield.fitting import choose, recipes
from widefield.fitting.choose import Choice
from widefield.fitting.costs import Costs, compare_latency, measure_costs, plain_model
from widefield.fitting.deployed import export_model
from widefield.fitting.groups import Groups, find_groups
from widefield.fitting.halves import Part, halves
from widefield.fitting.page import page
from widefield.fitting.progress import Phases, read_log
from widefield.fitting.read import Probed, Reader
from widefield.fitting.recipes import PLAIN, PROBE, START, UNCHANGED
from widefield.fitting.result import (
    CHOICE,
    COSTS,
    VERDICT,
    FitResult,
    choice_dict,
    load_choice,
    load_costs,
    save_costs,
    write_json,
)
from widefield.fitting.sources import SETTINGS, check_unchanged, spec_of
from widefield.fitting.spec import FILE, FitSpec, is_fit
from widefield.fitting.verify import verify
from widefield.loading.trained import load_trained
from widefield.tasks import Task
from widefield.train import checkpoint, train
from widefield.train.model import build_model
from widefield.train.recipe import Recipe
from widefield.train.recipe_io import load_recipe
from widefield.train.run_files import flat

P = ParamSpec("P")
R = TypeVar("R")

_MOST_REPEATS = 3
_SLACK = 1.02
"""Measured latencies up to this factor of the limit meet it: a measurement is not more exact."""


def _guided(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate :func:`fit` so that a wrong keyword raises a TypeError that names the right one."""
    known = [name for name in inspect.signature(function).parameters if name != "settings"]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        _checks.known_arguments(function.__name__, kwargs, [*known, *SETTINGS])
        return function(*args, **kwargs)

    return call


@_guided
def fit(
    source: FitSpec | Recipe | str | Path,
    data: str | None = None,
    *,
    overrides: Sequence[str] = (),
    console: Console | None = None,
    **settings: Any,
) -> FitResult:
    """Find the kernel sizes that fit a data set, and train the plain network that has them.

    A copy of the network learns all sizes at once in a part of the epochs. Its losses on half of the val split decide
    on one size for each stage, within a budget of latency, multiply-accumulates or parameters. The plain network with
    these sizes is fine-tuned in the other epochs, and compared with the unchanged network on the other half of the val
    split.

    The folder holds ``plain/`` and ``unchanged/``, which are runs, ``model.onnx``, the page ``index.html``, and the
    record of every step. If it holds an unfinished fit with the same settings, that is continued.

    Args:
        source: a recipe, its file or name, the folder of a run, the name of a model of timm or torchvision (with
            ``data``), settings, or the folder of a fit to continue. A finished run is also the unchanged network.
        data: name of a data set, in place of the recipe's.
        overrides: command-line words that change the recipe, such as ``["--epochs", "20"]``.
        console: where to show progress; default: stderr, or the notebook's cell. ``Console(quiet=True)`` is silent.
        settings: the arguments of :class:`FitSpec`, such as ``budget="macs"`` and ``limit=0.9``.

    Raises:
        ValueError, TypeError: the recipe or a setting does not work, nothing can be converted, no sizes are within the
            limit, or the folder holds a fit with other settings.
        OSError: the folder cannot be written.
        FileNotFoundError: there is no such recipe or model.
        SystemExit: Ctrl-C or SIGTERM during a training, with 130 or 143. Call the function again to continue.
    """
    spec = spec_of(source, data, overrides, settings)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("fit runs in one process; start it without accelerate launch or torchrun.")
    _claim(spec)
    console = console or progress_console()
    return _Fit(spec, console).run()


def _claim(spec: FitSpec) -> None:
    """Make the folder of a new fit, or check that the one in it has the same settings.

    A fit that failed before its first phase was finished is replaced.
    """
    folder = spec.folder
    check_place(folder, folder=True)
    if is_fit(folder) and read_log(folder):
        before, now = flat(FitSpec.load(folder).to_dict()), flat(spec.to_dict())
        changed = [
            f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
            for key in dict.fromkeys([*before, *now])
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"{folder} holds a fit with other settings: {'; '.join(changed[:3])}. Continue it as it was "
                f"(widefield fit --resume {folder}), or choose another folder with --out."
            )
        return
    if folder.is_dir() and any(file.name != FILE for file in folder.iterdir()):
        raise FileExistsError(f"{folder} holds something else: choose another folder with --out.")
    folder.mkdir(parents=True, exist_ok=True)
    spec.save()


@dataclass(frozen=True)
class _Setting:
    """The data and the task of a fit."""

    train: SampleSet
    val: SampleSet
    task: Task
    select: Part
    report: Part
    images: Tensor
    """(batch, C, H, W): what costs are measured on."""
    steps_per_epoch: int

    @classmethod
    def of(cls, spec: FitSpec) -> _Setting:
        recipe = spec.recipe
        train_set, val_set = data.create_both(recipe.data.name, **recipe.data.args)
        task = tasks.create(recipe.task.name, train_set, **recipe.task.args)
        select, report = halves(val_set)
        first = next((sample for index in range(len(val_set)) if (sample := val_set[index]) is not None), None)
        if first is None:
            raise ValueError("no image of the val split can be read.")
        image = task.collate([first])["image"]
        one = image[0][None] if isinstance(image, list) else image
        images = one.repeat(spec.batch, 1, 1, 1)
        steps = len(train_set) // recipe.batch_size // recipe.accumulate
        if not steps:
            raise ValueError(
                f"the train split has {len(train_set)} images, fewer than one batch of "
                f"{recipe.batch_size * recipe.accumulate}: lower batch_size."
            )
        return cls(train_set, val_set, task, select, report, images, steps)


class _Fit:
    """A fit in progress."""

    def __init__(self, spec: FitSpec, console: Console) -> None:
        self.spec, self.console = spec, console
        self.setting = _Setting.of(spec)
        if spec.unchanged is not None:
            check_unchanged(spec, self.setting.train, self.setting.val)
        self.phases = Phases(spec.folder, _work(spec, self.setting), console)
        self._probed: Probed | None = None

    def run(self) -> FitResult:
        """Run all phases that are not finished; return the result."""
        self.phases.line(data.summarize(self.setting.train, self.setting.val))
        groups, costs = self._plan()
        relative = choose.relative_costs(costs.table, costs.unchanged, groups)
        choose.check_limit(self.spec.limit, relative)
        recipe = recipes.probe_recipe(self.spec, groups)
        self._train("probe", recipe)
        choice = self._choose(groups, costs)
        same = choice.sizes == choose.key_of(groups.unchanged, groups)
        folders = {UNCHANGED: Path(self.spec.unchanged or self.spec.folder / UNCHANGED)}
        if not same:
            self._settle(choice, groups)
        if self.spec.unchanged is None:
            self._train("compare", recipes.unchanged_recipe(self.spec))
        folders[PLAIN] = folders[UNCHANGED] if same else self.spec.folder / PLAIN
        self._verify(choice, folders)
        result = FitResult.load(self.spec.folder)
        self._export(result)
        result = FitResult.load(self.spec.folder)
        checkpoint.write_text(result.page, page(result))
        self.phases.line(f"{result.verdict.words}; the page is {result.page}")
        return result

    def _plan(self) -> tuple[Groups, Costs]:
        """Find the groups and measure the costs."""
        folder, setting = self.spec.folder, self.setting
        if self.phases.finished("plan") and (folder / COSTS).is_file():
            self.phases.skipped("plan")
            return load_costs(folder)
        with self.phases.phase("plan"):
            groups = find_groups(self.spec, setting.task, setting.images)
            costs = measure_costs(self.spec, setting.task, groups, setting.images)
            choose.check_limit(self.spec.limit, choose.relative_costs(costs.table, costs.unchanged, groups))
            save_costs(folder, groups, costs)
        self.phases.line(f"{groups}\n{costs}")
        return groups, costs

    def _train(self, phase: str, recipe: Recipe) -> None:
        """Train the run of a phase, or continue it."""
        if self.phases.finished(phase):
            self.phases.skipped(phase)
            return
        folder = recipe.folder
        resumes = bool(checkpoint.checkpoints(folder / "checkpoints"))
        if folder.is_dir() and not resumes:  # killed before its first checkpoint
            shutil.rmtree(folder)
        with self.phases.phase(phase):
            result = train(
                load_recipe(folder) if resumes else recipe, resume=folder if resumes else None, console=self.console
            )
            if result.interrupted:
                self.phases.line(f"continue with: widefield fit --resume {self.spec.folder}")
                raise SystemExit(128 + result.interrupted)

    def _probe(self, groups: Groups) -> Probed:
        """Return the probed network with its trained weights, not their moving average, which lags in a short run."""
        if self._probed is None:
            model = load_trained(self.spec.folder / PROBE, "last", "model")
            self._probed = Probed(model, groups, self.spec.recipe, self.setting.task, self.setting.train)
        return self._probed

    def _choose(self, groups: Groups, costs: Costs) -> Choice:
        """Read the probed network and choose the sizes."""
        folder = self.spec.folder
        if self.phases.finished("choose") and (folder / CHOICE).is_file():
            self.phases.skipped("choose")
            return load_choice(folder)
        reader = Reader(self.spec, groups, self.setting.task, self.setting.select, self.phases.count)
        with self.phases.phase("read"):
            reader.read_untrained(self._untrained())
            reader.read_rings(self._probe(groups))
            reader.read_first(self._probe(groups))
        with self.phases.phase("choose"):
            choice = _chosen(self.spec, groups, costs, reader, self._probe(groups), self.setting)
            write_json(folder / CHOICE, choice_dict(choice))
        sizes = ", ".join(f"{group.name} {size}x{size}" for group, size in zip(groups, choice.sizes, strict=True))
        self.phases.line(f"    chosen: {sizes}; {self.spec.budget} {choice.measured or choice.predicted:.2f} of before")
        return choice

    def _untrained(self) -> torch.nn.Module:
        """Return the unchanged network as it is before training."""
        with torch.random.fork_rng():
            torch.manual_seed(self.spec.seed)
            return build_model(self.spec.recipe, self.setting.task, self.setting.train.classes).eval()

    def _settle(self, choice: Choice, groups: Groups) -> None:
        """Fine-tune the plain network, starting from the probe's weights."""
        assignment = choose.assignment_of(choice.sizes, groups)
        start = self.spec.folder / START
        if not self.phases.finished("settle") and not start.is_file():
            unfinished = start.with_name(f".{START}.part")
            save_model(self._probe(groups).plain(assignment), str(unfinished))
            unfinished.replace(start)
        self._probed = None  # its layers are merged
        self._train("settle", recipes.plain_recipe(self.spec, assignment, groups))

    def _verify(self, choice: Choice, folders: dict[str, Path]) -> None:
        if self.phases.finished("verify") and (self.spec.folder / VERDICT).is_file():
            self.phases.skipped("verify")
            return
        setting = self.setting
        with self.phases.phase("verify"):
            verdict, ratings = verify(
                self.spec, choice, folders, setting.task, setting.report, setting.images, self.phases.line
            )
            environment = bench.environment(self.spec.device)
            found = {"verdict": dataclasses.asdict(verdict), "ratings": ratings, "environment": environment}
            write_json(self.spec.folder / VERDICT, found)

    def _export(self, result: FitResult) -> None:
        if not self.spec.onnx:
            return
        if self.phases.finished("export"):
            self.phases.skipped("export")
            return
        with self.phases.phase("export"):
            note = export_model(result, self.setting.images, self.setting.val)
            if note:
                self.phases.line(f"    {note}")


def _chosen(spec: FitSpec, groups: Groups, costs: Costs, reader: Reader, probed: Probed, setting: _Setting) -> Choice:
    """Choose the sizes, and repeat the choice with a tighter limit while the whole network's latency misses it.

    If it misses it every time, the unchanged sizes are kept if they meet it.
    """
    relative = choose.relative_costs(costs.table, costs.unchanged, groups)
    model = choose.additive(reader.readings.means, groups)
    points = choose.front(model, relative, groups)
    unchanged = choose.key_of(groups.unchanged, groups)
    limit = spec.limit
    for repeat in range(_MOST_REPEATS + 1):
        keys = choose.finalists(points, reader.readings.means, groups, limit, relative)
        reader.read_whole(probed, keys)
        losses, untrained = reader.readings.whole, reader.readings.untrained or 0.0
        found = choose.decide(losses, groups, relative, limit, untrained, spec.seed)
        predicted = choose.cost_of(found.chosen, groups, relative)
        measured = None
        if spec.budget == "latency":
            measured = 1.0 if found.chosen == unchanged else _latency(spec, setting, found.chosen, groups)
        choice = Choice(
            sizes=found.chosen,
            candidates=found.candidates,
            front=tuple(points),
            model=model,
            equality=found.equality,
            spread=found.spread,
            matters=found.matters,
            predicted=predicted,
            measured=measured,
            repeats=repeat,
        )
        if limit is None or spec.limit is None or measured is None or measured <= spec.limit * _SLACK:
            return choice
        cheapest = 1 + sum(min(row.values()) for row in relative.values())
        limit = max(min(spec.limit * predicted / measured, limit * 0.99), cheapest)
    if spec.limit is not None and spec.limit >= 1:
        return replace(choice, sizes=unchanged, predicted=1.0, measured=1.0)
    return choice


def _latency(spec: FitSpec, setting: _Setting, sizes: Sequence[int], groups: Groups) -> float:
    """Return the latency of the whole network with these sizes relative to the unchanged one."""
    model = plain_model(spec, setting.task, choose.assignment_of(sizes, groups), groups)
    other = plain_model(spec, setting.task, {}, groups)
    mine, base = compare_latency(model, other, setting.images, spec)
    return mine.p20 / base.p20


def _work(spec: FitSpec, setting: _Setting) -> dict[str, float]:
    """Return the work of each phase, in epochs of training the unchanged network.

    A forward pass is a third of a training step.
    """
    probe, settle = spec.shares()
    if spec.recipe.max_steps:
        probe, settle = probe / setting.steps_per_epoch, settle / setting.steps_per_epoch  # type: ignore[assignment]
    epoch = 3 * len(setting.train)
    half = len(setting.select)
    return {
        "probe": 1.4 * probe,
        "read": spec.readings * min(256, half) / epoch,
        "choose": 16 * min(4096, half) / epoch,
        "settle": settle,
        "compare": 0.0 if spec.unchanged is not None else float(probe + settle),
        "verify": 2 * half / epoch,
    }
