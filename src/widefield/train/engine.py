"""Train the model of a recipe, or build everything without training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from rich.console import Console
from torch import Tensor

from widefield._files import check_place
from widefield._progress import progress_console
from widefield.report import Report
from widefield.surgery.walk import is_ours
from widefield.train.callbacks import Callback, checked
from widefield.train.interrupt import StopRequest
from widefield.train.loaders import batches
from widefield.train.logs import Logs, check_trackers
from widefield.train.progress import reporter
from widefield.train.recipe import Recipe
from widefield.train.run import Run
from widefield.train.run_folder import RunFolder
from widefield.train.run_result import RunResult


def train(
    recipe: Recipe,
    *,
    resume: str | Path | None = None,
    console: Console | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Train the model of a recipe in ``recipe.folder``, or continue an interrupted run.

    The global random generators are seeded. In the main thread the first SIGINT or SIGTERM ends the run after the
    current step with a checkpoint, and the result's ``interrupted`` is set.

    Args:
        recipe: see :class:`Recipe`; to resume, ``load_recipe(resume)``.
        resume: the folder of a run to continue. A finished run is reported and returned at once.
        console: where to show progress; default: stderr, or the notebook's cell. ``Console(quiet=True)`` is silent.
        callbacks: what to call during the run.

    Raises:
        OSError: the run's folder cannot be written, the disk is full, or an image cannot be read. If the disk fills up
            during the run, the message names the last good checkpoint.
        FileExistsError: the folder holds a run, and ``resume`` is not given. A run that failed before its first
            checkpoint is overwritten.
        FileNotFoundError: there is no checkpoint to resume.
        ValueError, TypeError: the recipe does not work, or does not fit the run to resume; the message names the key.
            Or the data have changed since the run began; the message names the changes.
        FloatingPointError: the loss is NaN or infinite; the last good checkpoint is kept.
    """
    callbacks = checked(callbacks)
    accelerator = _accelerator(recipe)
    folder = RunFolder(recipe.folder if resume is None else Path(resume))
    last = None if resume is None else folder.last()
    if last is None and accelerator.is_main_process:
        folder.claim()
    accelerator.wait_for_everyone()

    run = Run(recipe, folder, accelerator, fresh=last is None)
    run.callbacks = callbacks
    if last is None:
        run.start()
    else:
        run.restore(last)
    if not accelerator.is_main_process:
        console = Console(quiet=True)
    with folder.explaining_a_full_disk(), ExitStack() as stack:
        stack.callback(run.shut_down)
        if accelerator.is_main_process:
            stack.enter_context(folder.occupied(recipe, run.data))
            run.logs = stack.enter_context(Logs(folder, recipe, run.step))
        run.stop = stack.enter_context(StopRequest())
        run.report = stack.enter_context(reporter(console or progress_console(), run.plan.steps))
        run.report.line(run.found)
        if run.learner.remark:
            run.report.line(run.learner.remark)
        run.loop()
    result = run.result()
    for callback in callbacks:
        callback.on_train_end(result)
    return result


def _accelerator(recipe: Recipe) -> Accelerator:
    """Return accelerate's devices and precision for a recipe; raises ValueError for what they cannot do."""
    # accelerate keeps the precision of a process's first Accelerator; reset it to use the recipe's.
    AcceleratorState._reset_state()
    check_trackers(recipe.trackers)
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        dynamo_backend="inductor" if recipe.compile else None,
        cpu=not torch.accelerator.is_available(),  # accelerate alone overlooks processes launched on CPUs
    )
    if recipe.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would ignore it
        raise ValueError("mixed_precision: fp16 needs a GPU, and this machine trains on its CPU; use bf16 or no.")
    return accelerator


@dataclass(frozen=True)
class DryRun(Report):
    """What training a recipe would do; everything was built, and nothing was trained or written.

    Attributes:
        folder: of the run.
        data: the splits in words.
        model: name of the model.
        converted: name of each layer of ours in the model -> its class.
        parameters: number of parameters that are trained, and of all.
        batch: name -> shape of the tensors in the first batch of a process; of lists, the number of entries.
        whole_batch: images in a step, of all processes and accumulated ones.
        length: of the run in words, such as "2 epochs".
        steps: of the run.
        remark: of the task on the model; may be empty.
    """

    folder: Path
    data: str
    model: str
    converted: Mapping[str, str]
    parameters: tuple[int, int]
    batch: Mapping[str, tuple[int, ...]]
    whole_batch: int
    length: str
    steps: int
    remark: str

    def summary(self) -> str:
        """Return the data, and the task's remark if there is one."""
        return "\n".join(filter(None, (self.data, self.remark)))

    def rows(self) -> list[dict[str, str]]:
        """Return one row per fact."""
        trained, whole = (f"{count:,}" for count in self.parameters)
        kinds = Counter(self.converted.values())
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.batch.items())
        facts = {
            "model": f"{self.model}, {trained} parameters are trained, of {whole}",
            "layers": ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none of widefield",
            "first batch": shapes,
            "steps": f"{self.steps:,} of {self.whole_batch} images, {self.length}",
            "folder": str(self.folder),
        }
        return [{"part": name, "found": text} for name, text in facts.items()]

    def __str__(self) -> str:
        lines = [f"{row['part']}: {row['found']}" for row in self.rows()]
        return "\n".join([self.data, *lines, *([self.remark] if self.remark else [])])


@contextmanager
def trial(recipe: Recipe) -> Iterator[Run]:
    """Give a run that is built and checked, and that writes nothing.

    Raises what :func:`train` raises before its first step, except about the run's folder.
    """
    run = Run(recipe, RunFolder(recipe.folder), _accelerator(recipe), fresh=True)
    try:
        yield run
    finally:
        run.shut_down()


def dry_run(recipe: Recipe) -> DryRun:
    """Build all that training a recipe needs, read the first batch, and take no step; nothing is written.

    Raises what :func:`train` raises before its first step.
    """
    folder = RunFolder(recipe.folder)
    folder.check_free()
    check_place(folder.path, folder=True)
    with trial(recipe) as run:
        if run.accelerator.is_main_process:
            folder.check_space(run.learner.raw, recipe)
        first = next(batches(run.train_batches))
    raw = run.learner.raw
    return DryRun(
        folder=folder.path,
        data=run.found,
        model=recipe.model.name,
        converted={name: type(layer).__name__ for name, layer in raw.named_modules() if is_ours(layer)},
        parameters=(
            sum(parameter.numel() for parameter in raw.parameters() if parameter.requires_grad),
            sum(parameter.numel() for parameter in raw.parameters()),
        ),
        batch={
            name: tuple(value.shape) if isinstance(value, Tensor) else (len(value),)
            for name, value in first.items() if isinstance(value, Tensor | list)
        },
        whole_batch=run.whole_batch,
        length=run.plan.whole(),
        steps=run.plan.steps,
        remark=run.learner.remark,
    )  # fmt: skip
