"""Write the logs of a run: always ``metrics.jsonl``, and TensorBoard, Weights & Biases and MLflow on request."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Self

from torch import Tensor

from widefield.train.recipe import Recipe
from widefield.train.run_files import flat
from widefield.train.run_folder import RunFolder


class Tracker(NamedTuple):
    """A place that shows a run while it trains. Both callables take things by name, and their step."""

    numbers: Callable[[Mapping[str, float], int], None]
    pictures: Callable[[Mapping[str, Tensor], int], None]
    """Pictures are uint8 (3, H, W)."""


def check_trackers(trackers: Sequence[str]) -> None:
    """Raise ValueError for a tracker whose package is not installed."""
    for name, module in (("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")):
        if name in trackers and importlib.util.find_spec(module) is None:
            raise ValueError(f"trackers: {name!r} needs the package {module}: pip install {module}, or leave it out.")


@contextmanager
def _silent_threads(package: str) -> Iterator[None]:
    """Keep threads of a package from printing the OSError that ends them; the package's next call raises it again."""
    usual = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (issubclass(args.exc_type, OSError) and type(args.thread).__module__.startswith(f"{package}.")):
            usual(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = usual


class Logs:
    """The logs of a run, open in a ``with`` block.

    Args:
        folder: of the run.
        recipe: its ``trackers`` get the numbers, too.
        step: number of finished steps; entries of a killed run after them are dropped.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, step: int) -> None:
        self._folder, self._recipe, self._step = folder, recipe, step

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._file = stack.enter_context(self._folder.log.open("a", encoding="utf-8"))
            makers = {"tensorboard": self._tensorboard, "wandb": self._wandb, "mlflow": self._mlflow}
            self._trackers: list[Tracker] = [makers[name](stack) for name in self._recipe.trackers]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def write(self, entry: dict[str, Any]) -> None:
        """Write one entry: ``kind``, ``step`` and numbers by name; trackers get the numbers only."""
        # JSON has no NaN and no infinity.
        valid = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self._file.write(json.dumps(valid, allow_nan=False) + "\n")
        self._file.flush()
        numbers = {
            f"{entry['kind']}/{name}": float(value)
            for name, value in entry.items()
            if name not in ("kind", "step", "epoch") and isinstance(value, (int, float))
        }
        for tracker in self._trackers:
            tracker.numbers(numbers, entry["step"])

    @property
    def shows_pictures(self) -> bool:
        """Whether there is a tracker, to which pictures can be sent."""
        return bool(self._trackers)

    def show(self, pictures: Mapping[str, Tensor], step: int) -> None:
        """Send pictures, uint8 (3, H, W) by name, to the trackers."""
        for tracker in self._trackers if pictures else ():
            tracker.pictures(pictures, step)

    def _tensorboard(self, stack: ExitStack) -> Tracker:
        from torch.utils.tensorboard import SummaryWriter

        stack.enter_context(_silent_threads("tensorboard"))
        board = stack.enter_context(SummaryWriter(str(self._folder.tensorboard), purge_step=self._step + 1))

        def write_numbers(numbers: Mapping[str, float], step: int) -> None:
            for name, value in numbers.items():
                board.add_scalar(name, value, step)

        def write_pictures(pictures: Mapping[str, Tensor], step: int) -> None:
            for name, picture in pictures.items():
                board.add_image(name, picture.cpu(), step)

        return Tracker(write_numbers, write_pictures)

    def _wandb(self, stack: ExitStack) -> Tracker:
        import wandb  # type: ignore[import-not-found, unused-ignore]

        run = wandb.init(
            project="widefield",
            name=self._recipe.name,
            id=hashlib.sha256(str(self._folder.path.resolve()).encode()).hexdigest()[:16],  # the same when resumed
            resume="allow",
            dir=str(self._folder.path),
            config=dataclasses.asdict(self._recipe),
        )
        stack.callback(run.finish)

        def write_pictures(pictures: Mapping[str, Tensor], step: int) -> None:
            run.log({name: wandb.Image(one.movedim(0, -1).cpu().numpy()) for name, one in pictures.items()}, step=step)

        return Tracker(lambda numbers, step: run.log(dict(numbers), step=step), write_pictures)

    def _mlflow(self, stack: ExitStack) -> Tracker:
        """Log to the server of MLFLOW_TRACKING_URI, or to where MLflow puts its files; a resumed run continues its own.

        MLflow keys its images by file name, so pictures are written as ``NAME-STEP.png``.
        """
        import mlflow  # type: ignore[import-not-found, unused-ignore]
        from accelerate.tracking import MLflowTracker

        known = self._folder.mlflow
        identity = known.read_text(encoding="utf-8").strip() if self._step and known.is_file() else None
        tracker = MLflowTracker("widefield", run_id=identity, run_name=self._recipe.name)
        tracker.start()
        stack.callback(tracker.finish)
        if identity is None:  # MLflow refuses to change a parameter, as a resumed run may
            known.write_text(tracker.tracker.info.run_id + "\n", encoding="utf-8")
            tracker.store_init_configuration(flat(dataclasses.asdict(self._recipe)))

        def write_pictures(pictures: Mapping[str, Tensor], step: int) -> None:
            for name, picture in pictures.items():
                mlflow.log_image(picture.movedim(0, -1).cpu().numpy(), f"{name.replace('/', '-')}-{step}.png")

        def write_numbers(numbers: Mapping[str, float], step: int) -> None:
            tracker.log(dict(numbers), step=step)

        return Tracker(write_numbers, write_pictures)
