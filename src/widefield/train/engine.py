"""The training loop: accelerate's devices and precisions, timm's optimisers, schedules and averages, any task.

The state of a run is (epoch, position in the epoch) and what ``state.pt`` holds; everything else is a function of the
recipe. Hence a resumed run continues as if it had not stopped, on the CPU to the bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, gather_object, send_to_device, set_seed
from rich.console import Console
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from widefield import data, tasks
from widefield.nn import load_balancing
from widefield.surgery import DynamicSparsity
from widefield.tasks import Batch
from widefield.train import checkpoint
from widefield.train.build import build_model
from widefield.train.checkpoint import Checkpoint
from widefield.train.evaluation import evaluate
from widefield.train.interrupt import StopRequest
from widefield.train.loading import EpochSampler, batches, shut_down, train_loader, val_loader
from widefield.train.progress import Reporter, numbers, reporter
from widefield.train.randomness import random_state, restore_random_state
from widefield.train.recipe import Recipe
from widefield.train.run_folder import RunFolder, recipe_hash


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        folder: the run's folder.
        metrics: of the last evaluated epoch, on the val split, ``train_loss`` among them; those of the moving average
            start with ``ema_``. Empty before the first evaluation.
        best: the metrics of the best epoch, by the task's headline, of the moving average if there is one.
        epochs: finished epochs.
        steps: finished steps.
        interrupted: the signal that stopped the run, or None. A process should then exit with 128 + the signal.
        model: the trained model, without wrappers, in evaluation mode; the moving average if there is one.
    """

    folder: Path
    metrics: dict[str, float]
    best: dict[str, float]
    epochs: int
    steps: int
    interrupted: signal.Signals | None
    model: nn.Module


def train(recipe: Recipe, *, resume: str | Path | None = None, console: Console | None = None) -> RunResult:
    """Train what the recipe describes, in ``recipe.folder``, or go on with an interrupted run.

    Seeds the global random generators. In the main thread the first SIGINT or SIGTERM ends the run after the current
    step, with a checkpoint, and ``interrupted`` set in the result.

    Args:
        recipe: see :class:`Recipe`; to resume, ``load_recipe(resume)``.
        resume: the folder of a run to go on with; finished runs return at once.
        console: where to show progress; default: stderr. ``Console(quiet=True)`` shows nothing.

    Raises:
        OSError: the run's folder cannot be written, the disk is full, or an image cannot be read.
        FileExistsError: the folder holds a run, and ``resume`` is not given. One that failed before its first
            checkpoint does not count and is written over.
        FileNotFoundError: there is no checkpoint to resume.
        ValueError, TypeError: the recipe does not work, or does not fit the run to resume; the message names the key.
        FloatingPointError: the loss is NaN or infinite; the last good checkpoint stays.
    """
    # accelerate keeps the precision of a process's first Accelerator; this one is to have the recipe's.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision, dataloader_config=DataLoaderConfiguration(non_blocking=True)
    )
    folder = RunFolder(recipe.folder if resume is None else Path(resume))
    last = None if resume is None else folder.last()
    if last is None and accelerator.is_main_process:
        folder.claim()
    accelerator.wait_for_everyone()

    run = _Run(recipe, folder, accelerator)
    if last is None:
        run.start()
    else:
        run.restore(last)
    if not accelerator.is_main_process:
        console = Console(quiet=True)
    with ExitStack() as stack:
        stack.callback(run.shut_down)
        if accelerator.is_main_process:
            stack.enter_context(folder.occupied(recipe))
            run.open_logs(stack)
        run.stop = stack.enter_context(StopRequest())
        run.report = stack.enter_context(reporter(console or Console(stderr=True), run.total_steps))
        run.loop()
    return run.result()


class _Stopped(Exception):  # noqa: N818 (a turn of events, not an error)
    """An evaluation was cut short."""


class _Run:
    """A run in progress."""

    stop: StopRequest
    report: Reporter

    def __init__(self, recipe: Recipe, folder: RunFolder, accelerator: Accelerator) -> None:
        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        set_seed(recipe.seed)
        self.train_set, val_set = (
            data.create(recipe.data.name, split, **recipe.data.args) for split in ("train", "val")
        )
        self.task = tasks.create(recipe.task.name, self.train_set, **recipe.task.args)
        self.headline = f"ema_{self.task.headline}" if recipe.ema else self.task.headline

        model = build_model(recipe, self.task.model_args).to(accelerator.device)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.raw = model
        # Copied before accelerate wraps the model's forward: a copy of the wrapper would still call the original.
        self.ema = ModelEmaV3(model, decay=recipe.ema.decay, use_warmup=recipe.ema.warmup) if recipe.ema else None
        self._whole_batch = recipe.batch_size * accelerator.num_processes
        self._prepare(
            self._optimizer(),
            train_loader(self.train_set, recipe.batch_size, recipe.workers, recipe.seed),
            val_loader(val_set, recipe.batch_size, recipe.workers),
        )
        self.sparse = None
        if recipe.sparsity:
            arguments = dataclasses.asdict(recipe.sparsity)
            self.sparse = DynamicSparsity(model, **arguments, end=self.total_steps, seed=recipe.seed)
        # Every process drops and mixes differently.
        set_seed(recipe.seed, device_specific=True)

        self.epoch = self.position = 0
        self.metrics: dict[str, float] = {}
        self._loss_sum, self._loss_count = 0.0, 0
        self._pending: list[tuple[int, float, Tensor]] = []
        self._log: Any = None
        self._board: Any = None

    def _optimizer(self) -> torch.optim.Optimizer:
        spec = self.recipe.optimizer
        betas = {} if spec.betas is None else {"betas": spec.betas}
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            self.raw,
            opt=spec.name,
            lr=spec.lr_at(self._whole_batch),
            weight_decay=spec.weight_decay,
            **betas,
            **spec.args,
        )
        return optimizer

    def _prepare(self, optimizer: torch.optim.Optimizer, train_batches: Any, val_batches: Any) -> None:
        self.sampler: EpochSampler = train_batches.sampler
        self.model, self.optimizer, self.train_batches, self.val_batches = self.accelerator.prepare(
            self.raw, optimizer, train_batches, val_batches
        )
        self.steps_per_epoch: int = len(self.train_batches)
        if not self.steps_per_epoch:
            raise ValueError(
                f"the train split has {len(self.sampler)} images, fewer than one batch of {self._whole_batch}: "
                f"lower batch_size."
            )
        spec = self.recipe.schedule
        # Not prepared: accelerate would step it once per process, and timm's counts updates itself.
        self.epochs: int
        self.scheduler, self.epochs = create_scheduler_v2(
            optimizer,
            sched=spec.name,
            num_epochs=self.recipe.epochs,
            warmup_epochs=spec.warmup_epochs,
            warmup_lr=spec.warmup_lr,
            min_lr=spec.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
            **spec.args,
        )

    @property
    def step(self) -> int:
        """Batches behind the run; those that held no image count."""
        return self.epoch * self.steps_per_epoch + self.position

    @property
    def total_steps(self) -> int:
        """Batches of the whole run."""
        return self.epochs * self.steps_per_epoch

    def shut_down(self) -> None:
        """End the loaders' workers."""
        for loader in (self.train_batches, self.val_batches):
            shut_down(loader)

    def start(self) -> None:
        """Choose what is sparse, from the gradients of the first batch."""
        if self.sparse is None:
            return
        first = self.accelerator.process_index * self.recipe.batch_size
        order = list(EpochSampler(len(self.sampler), self.recipe.seed))[first : first + self.recipe.batch_size]
        batch = send_to_device(data.collate([self.train_set[index] for index in order]), self.accelerator.device)
        scaler = self.accelerator.scaler  # without it, gradients of 1e-6 vanish in fp16; a factor changes no ranking

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            value = self.task.loss(model, batch)
            return value if scaler is None else scaler.scale(value)

        with self.accelerator.autocast():
            self.sparse.start([batch], loss)
        if self.ema is not None:
            self.sparse.apply(self.ema.module)

    # The loop

    def loop(self) -> None:
        """Train and evaluate until all epochs are done or a stop is asked for."""
        while self.epoch < self.epochs:
            started = time.monotonic()
            self._train_epoch()
            # Before the evaluation: if that is cut short, nothing is lost.
            saved = self._save()
            if self.position < self.steps_per_epoch:
                break
            try:
                self.metrics = {"train_loss": self._train_loss(), **self._evaluate()}
            except _Stopped:
                break
            self._finish_epoch(saved, time.monotonic() - started)
        if self.epoch < self.epochs:
            self.report.line(
                f"stopped at step {self.step} of {self.total_steps}; "
                f"continue with: widefield train --resume {self.folder.path}"
            )

    def _train_epoch(self) -> None:
        """Train to the end of the epoch or until a stop is asked for."""
        self.sampler.start = self.position * self._whole_batch
        self.train_set.set_epoch(self.epoch)
        self.train_batches.set_epoch(self.epoch)
        self.model.train()
        for batch in batches(self.train_batches) if self.position < self.steps_per_epoch else ():
            if not self._largest(not batch):
                self._update(batch)
            self.position += 1
            if self.step % self.recipe.log_every == 0:
                self._flush()
            if self._stopping():
                break
        self._flush()

    def _update(self, batch: Batch) -> None:
        """Take one step."""
        recipe = self.recipe
        if recipe.channels_last:
            batch = {**batch, "image": batch["image"].contiguous(memory_format=torch.channels_last)}
        if recipe.balance:
            with load_balancing(self.raw) as balance:
                loss = self.task.loss(self.model, batch) + recipe.balance * balance()
        else:
            loss = self.task.loss(self.model, batch)
        self.accelerator.backward(loss)
        if recipe.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_grad)
        step = self.step + 1
        self._pending.append((step, self._lr(), loss.detach()))
        self.optimizer.step()
        if self.sparse is not None:
            self.sparse.step(self.optimizer)
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step_update(step)
        if self.ema is not None:
            self.ema.update(self.raw, step)
            if self.sparse is not None:
                self.sparse.apply(self.ema.module)

    def _flush(self) -> None:
        """Read the losses of the last steps, all at once: reading each would stall the accelerator at every step.

        Raises FloatingPointError for the first that is not finite. No checkpoint is written in between.
        """
        if not self._pending:
            return
        losses = self.accelerator.reduce(torch.stack([loss for _, _, loss in self._pending]), reduction="mean").tolist()
        for (step, lr, _), loss in zip(self._pending, losses, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {step} of {self.total_steps} (learning rate {lr:.3g}). The last good "
                    f"checkpoint, if there is one, is in {self.folder.checkpoints}. A lower optimizer.lr, a longer "
                    f"warm-up or clip_grad may mend it."
                )
            self._loss_sum += loss
            self._loss_count += 1
            if step % self.recipe.log_every == 0:
                self._write({"kind": "step", "step": step, "epoch": self.epoch, "loss": loss, "lr": lr})
        self._pending.clear()
        self.report.step(self.step, numbers({"loss": loss, "lr": lr, **self.metrics}))

    def _evaluate(self) -> dict[str, float]:
        """Return the metrics of the model, and of its moving average; raises _Stopped."""

        def measure(model: nn.Module) -> dict[str, float]:
            return evaluate(
                model,
                self._until_stop(batches(self.val_batches)),
                self.task,
                self.accelerator.device,
                gather=self.accelerator.gather_for_metrics,
            )

        with self.accelerator.autocast():
            metrics = measure(self.model)
            if self.ema is not None:
                metrics |= {f"ema_{name}": value for name, value in measure(self.ema.module).items()}
        return metrics

    def _until_stop(self, all_batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in all_batches:
            if self._stopping():
                raise _Stopped
            if not self._largest(not batch):
                yield batch

    def _finish_epoch(self, saved: Checkpoint, seconds: float) -> None:
        lr = self._lr()
        self._write(
            {"kind": "epoch", "step": self.step, "epoch": self.epoch, "lr": lr, "seconds": seconds, **self.metrics}
        )
        if self.accelerator.is_main_process:
            checkpoint.record(saved, self.metrics)
            checkpoint.prune(
                self.folder.checkpoints,
                self.recipe.checkpoint.keep,
                self.headline,
                higher_is_better=self.task.higher_is_better,
            )
        self._next_epoch()
        self.report.line(f"epoch {self.epoch}/{self.epochs}  {numbers(self.metrics)}  ({seconds:.1f} s)")

    def _next_epoch(self) -> None:
        self.epoch, self.position = self.epoch + 1, 0
        self._loss_sum, self._loss_count = 0.0, 0

    def _train_loss(self) -> float:
        return self._loss_sum / self._loss_count if self._loss_count else math.nan

    def _lr(self) -> float:
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def _stopping(self) -> bool:
        """Whether any process was asked to stop; they all stop after the same step, then."""
        number = self._largest(self.stop.received or 0)
        if number:
            self.stop.received = signal.Signals(number)
        return number > 0

    def _largest(self, value: int) -> int:
        """Return the largest value of any process; collective operations must be run by all of them or by none."""
        if self.accelerator.num_processes == 1:
            return value
        values: Tensor = self.accelerator.gather(torch.tensor([value], device=self.accelerator.device))
        return int(values.max())

    # Logs

    def open_logs(self, stack: ExitStack) -> None:
        """Open ``metrics.jsonl`` and the TensorBoard log, until ``stack`` is left."""
        from torch.utils.tensorboard import SummaryWriter

        self._log = stack.enter_context(self.folder.log.open("a", encoding="utf-8"))
        self._board = stack.enter_context(SummaryWriter(str(self.folder.tensorboard), purge_step=self.step + 1))

    def _write(self, entry: dict[str, Any]) -> None:
        if self._log is None:
            return
        # JSON has no NaN and no infinity.
        valid = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self._log.write(json.dumps(valid, allow_nan=False) + "\n")
        self._log.flush()
        for name, value in entry.items():
            if name not in ("kind", "step", "epoch"):
                self._board.add_scalar(f"{entry['kind']}/{name}", value, entry["step"])

    # Checkpoints

    def _save(self) -> Checkpoint:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "sparsity": None if self.sparse is None else self.sparse.state_dict(),
            "random": gather_object([random_state()]),
            "sampler": {"epoch": self.epoch, "position": self.position},
            "loss": [self._loss_sum, self._loss_count],
        }
        meta = {
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "processes": self.accelerator.num_processes,
            "model": self.recipe.model.name,
            "model_args": dict(self.task.model_args),
            "headline": self.headline,
            "higher_is_better": self.task.higher_is_better,
            "recipe": recipe_hash(self.recipe),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("widefield", "torch", "timm", "accelerate")},
            },
        }
        saved = Checkpoint(self.folder.checkpoints, {**meta, "metrics": None})
        if self.accelerator.is_main_process:
            ema = None if self.ema is None else self.ema.module
            saved = checkpoint.save(self.folder.checkpoints, self.raw, ema, state, meta)
        self.accelerator.wait_for_everyone()
        return saved

    def restore(self, last: Checkpoint) -> None:
        """Go back to a checkpoint.

        Raises ValueError before anything is changed: another model, another recipe, another number of processes.
        """
        checkpoint.load_weights(last.path / "model.safetensors", self.raw)
        self.folder.check_recipe(self.recipe)
        if last.meta["processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"the run used {last.meta['processes']} processes and can only be resumed with as many; there are "
                f"{self.accelerator.num_processes}."
            )
        if self.ema is not None:
            checkpoint.load_weights(last.path / "ema.safetensors", self.ema.module)
        state = last.state()
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.sparse is not None:
            self.sparse.load_state_dict(state["sparsity"])
        self.epoch, self.position = state["sampler"]["epoch"], state["sampler"]["position"]
        self._loss_sum, self._loss_count = state["loss"]
        if self.accelerator.is_main_process:
            checkpoint.sweep(self.folder.checkpoints)
            self.folder.rewind(last.step, evaluated=last.metrics is not None)
        if last.metrics is not None:
            self.metrics = last.metrics
            self._next_epoch()
        restore_random_state(state["random"][self.accelerator.process_index])

    def result(self) -> RunResult:
        """Return what the run came to."""
        best = checkpoint.best(self.folder.checkpoints, self.headline, higher_is_better=self.task.higher_is_better)
        trained = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return RunResult(
            folder=self.folder.path,
            metrics=self.metrics,
            best=dict(best.metrics or {}) if best else {},
            epochs=self.epoch,
            steps=self.step,
            interrupted=self.stop.received if self.epoch < self.epochs else None,
            model=(trained if self.ema is None else self.ema.module).eval(),
        )
