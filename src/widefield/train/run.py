"""The training loop for any task, on accelerate's devices and precisions.

The state of a run is its number of steps and the content of a checkpoint. Everything else is a function of the recipe.
A resumed run therefore continues as if it had not stopped; on the CPU it is bitwise equal.
"""

from __future__ import annotations

import itertools
import math
import platform
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from torch import Tensor, nn

from widefield import data, tasks
from widefield.tasks import Batch
from widefield.train import checkpoint, pictures
from widefield.train.alarms import brief, sigmas, watch_routers
from widefield.train.callbacks import Callback
from widefield.train.checkpoint import Checkpoint
from widefield.train.distillation import build_teacher
from widefield.train.evaluation import Share, evaluate
from widefield.train.interrupt import StopRequest
from widefield.train.learner import Learner
from widefield.train.loaders import EpochSampler, batches, first_batch, shut_down, train_loader, val_loader
from widefield.train.logs import Logs
from widefield.train.patience import Patience
from widefield.train.processes import largest
from widefield.train.progress import Reporter, numbers
from widefield.train.randomness import random_state, restore_random_state
from widefield.train.recipe import Recipe
from widefield.train.run_data import record
from widefield.train.run_folder import RunFolder, recipe_hash
from widefield.train.run_result import RunResult


def _both_splits(recipe: Recipe, *, fresh: bool) -> tuple[data.SampleSet, data.SampleSet]:
    try:
        return data.create_both(recipe.data.name, **recipe.data.args)
    except FileNotFoundError as error:
        if fresh or "root" not in recipe.data.args:
            raise
        raise FileNotFoundError(
            f"{error} If the data have moved, give their new place: --data.args.root FOLDER."
        ) from error


class _Stopped(Exception):  # noqa: N818 (control flow, not an error)
    """An evaluation was interrupted."""


_MOST_SKIPPED = 20
"""Number of consecutive skipped steps after which the run fails."""


class _Pending(NamedTuple):
    """A step whose loss is still on the accelerator."""

    number: int
    lr: float
    loss: Tensor
    indices: Tensor
    skipped: bool
    parts: dict[str, Tensor]


class Run:
    """A run in progress."""

    stop: StopRequest
    report: Reporter
    logs: Logs
    callbacks: Sequence[Callback] = ()

    def __init__(self, recipe: Recipe, folder: RunFolder, accelerator: Accelerator, *, fresh: bool) -> None:
        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        set_seed(recipe.seed)
        self.train_set, self.val_set = _both_splits(recipe, fresh=fresh)
        self.found = data.summarize(self.train_set, self.val_set)
        self.task = tasks.create(recipe.task.name, self.train_set, **recipe.task.args)
        if recipe.distillation is not None:
            teacher = build_teacher(recipe.distillation.teacher, self.task, self.train_set, accelerator.autocast)
            about = {key: getattr(recipe.distillation, key) for key in ("weight", "temperature", "hard")}
            self.task.learn_from(teacher.to(accelerator.device), **about)
        self.data = record(self.train_set, self.val_set)
        if not fresh:
            folder.check_data(self.data)
        self.headline = f"ema_{self.task.headline}" if recipe.ema else self.task.headline
        self._patience = Patience(recipe.patience, higher_is_better=self.task.higher_is_better)

        shape = self.val_set.image_shape or self.train_set.image_shape
        self.learner = Learner(recipe, self.task, accelerator, self.train_set.classes, shape)
        self.whole_batch = recipe.batch_size * recipe.accumulate * accelerator.num_processes
        collate, size = self.task.collate, recipe.batch_size
        drawing = recipe.repeats, accelerator.num_processes, recipe.class_sampling
        loader = train_loader(self.train_set, collate, size, recipe.workers, recipe.seed, *drawing)
        self.sampler: EpochSampler = loader.sampler  # type: ignore[assignment]
        self.train_batches = accelerator.prepare(loader)
        share = Share(self.val_set, accelerator.process_index, accelerator.num_processes)
        self.val_batches = val_loader(share, collate, size, recipe.workers)
        steps_per_epoch = len(self.train_batches) // recipe.accumulate
        if not steps_per_epoch:
            raise ValueError(
                f"the train split has {len(self.sampler)} images, fewer than one batch of {self.whole_batch}: "
                f"lower batch_size."
            )
        self.plan = self.learner.schedule(steps_per_epoch)
        # Every process drops and mixes differently.
        set_seed(recipe.seed, device_specific=True)

        self.step = self.rounds = 0  # finished; steps include those whose batches held no image
        self._stream = self._endless()
        self.metrics: dict[str, float] = {}
        self._warnings: list[str] = []
        self._pictures: Mapping[str, Tensor] = {}
        self._loss_sum, self._loss_count = 0.0, 0
        self._pending: list[_Pending] = []
        self._skipped = 0

    def shut_down(self) -> None:
        """End the loaders' workers."""
        for loader in (self.train_batches, self.val_batches):
            shut_down(loader)

    def start(self) -> None:
        """Prepare a new run: check that its checkpoints will fit on the disk, and choose the sparse weights."""
        if self.accelerator.is_main_process:
            self.folder.check_space(self.learner.raw, self.recipe)
        if self.learner.is_sparse:
            size = self.recipe.batch_size
            first = self.accelerator.process_index * size
            order = list(self.sampler)[first : first + size]
            batch = first_batch(self.train_set, self.task.collate, order, size)
            if not batch:
                raise ValueError(f"sparsity: none of the first images of the train split ({order[:8]}...) can be read.")
            self.learner.start(send_to_device(batch, self.accelerator.device))

    # The loop

    @property
    def _done(self) -> bool:
        """Whether all rounds are finished, or the run has ended early."""
        return self.rounds >= self.plan.rounds or self._patience.is_over

    def loop(self) -> None:
        """Train and evaluate until all rounds are finished, patience is over, or a stop is requested."""
        if self._done:
            how = f"{self._patience}" if self._patience.is_over else f"all {self.plan.whole()} are done"
            self.report.line(
                f"the run in {self.folder.path} is finished: {how} "
                f"({numbers(self.metrics)}). To train on from its weights: widefield train {self.folder.path} "
                f"--name NEW --model.pretrained {self.folder.path}"
            )
            return
        for callback in self.callbacks:
            callback.on_train_begin(self.learner.raw, self.step)
        while not self._done:
            started = time.monotonic()
            end = self.plan.end(self.rounds)
            self._train_until(end)
            # Save before the evaluation: if that is interrupted, nothing is lost.
            saved = self._save()
            if self.step < end:
                break
            try:
                self.metrics = {"train_loss": self._train_loss(), **self._evaluate()}
            except _Stopped:
                break
            self._finish_round(saved, time.monotonic() - started)
        if not self._done:
            self.report.line(
                f"stopped at step {self.step} of {self.plan.steps}; "
                f"continue with: widefield train --resume {self.folder.path}"
            )

    def _endless(self) -> Iterator[Batch]:
        """Yield the batches from the current step on, epoch after epoch."""
        accumulate, length = self.recipe.accumulate, self.plan.steps_per_epoch
        for epoch in itertools.count(self.step // length):
            skipped = self.step % length
            self.sampler.start = skipped * self.whole_batch
            self.train_set.set_epoch(epoch)
            self.train_batches.set_epoch(epoch)
            yield from itertools.islice(batches(self.train_batches), (length - skipped) * accumulate)

    def _train_until(self, end: int) -> None:
        """Train up to step ``end`` or until a stop is requested."""
        self._since, self._seen = time.monotonic(), 0
        self.learner.train()
        while self.step < end:
            self._step(list(itertools.islice(self._stream, self.recipe.accumulate)))
            self.step += 1
            for callback in self.callbacks:
                callback.on_step_end(self.learner.raw, self.step)
            every = self.recipe.checkpoint.every
            if self.step % self.recipe.log_every == 0:
                self._flush()
            if every and self.step % every == 0 and self.step < end:
                self._flush()  # a loss that is not finite raises before anything is saved
                self._save()
                self._prune()
            if self._stopping():
                break
        self._flush()

    def _step(self, group: Sequence[Batch]) -> None:
        """Take one step on batches. Some may be empty because all of their images were left out."""
        full = [batch for batch in group if not largest(self.accelerator, not batch)]
        if not full:
            return
        indices = torch.cat([batch["index"] for batch in full])
        lr = self.learner.lr
        loss, skipped, parts = self.learner.step(full, self.step + 1)
        self._pending.append(_Pending(self.step + 1, lr, loss, indices, skipped, parts))
        self._seen += self.whole_batch

    def _flush(self) -> None:
        """Read the losses of the last steps at once: reading each would stall the accelerator at every step.

        No checkpoint is written while losses are pending.

        Raises:
            FloatingPointError: a loss is not finite and its step was not skipped, or too many steps were skipped.
        """
        if not self._pending:
            return
        losses = self.accelerator.reduce(torch.stack([p.loss for p in self._pending]), reduction="mean").tolist()
        for step, loss in zip(self._pending, losses, strict=True):
            if step.skipped or not math.isfinite(loss):
                self._not_finite(step, loss)
                continue
            self._skipped = 0
            self._loss_sum += loss
            self._loss_count += 1
            if step.number % self.recipe.log_every == 0:
                self._write(
                    {"kind": "step", **self._where(step.number), "loss": loss, **self._parts(step), "lr": step.lr}
                )
        self._pending.clear()
        self.report.step(self.step, numbers({"loss": loss, "lr": step.lr, **self._pace(), **self.metrics}))

    def _parts(self, step: _Pending) -> dict[str, float]:
        """Return the mean over processes of the parts of a step's loss; nothing if there is one part."""
        if len(step.parts) < 2:
            return {}
        means = self.accelerator.reduce(torch.stack(list(step.parts.values())), reduction="mean").tolist()
        return dict(zip(step.parts, means, strict=True))

    def _not_finite(self, step: _Pending, loss: float) -> None:
        """Log a step that was not finite; raises FloatingPointError unless it was skipped by request."""
        indices = gather_object(step.indices.tolist())
        what = f"the loss is {loss}" if not math.isfinite(loss) else "a gradient is not finite"
        self._write({"kind": "nonfinite", **self._where(step.number), "lr": step.lr, "images": indices})
        self._skipped += 1
        if step.skipped and self._skipped < _MOST_SKIPPED:
            self.report.line(f"{what} at step {step.number}: skipped")
            return
        shown = ", ".join(map(str, indices[:16])) + (", ..." if len(indices) > 16 else "")
        row = f", and so it was in the {self._skipped} steps up to it" if step.skipped else ""
        raise FloatingPointError(
            f"{what} at step {step.number} of {self.plan.steps}{row} (learning rate {step.lr:.3g}, images {shown} of "
            f"the train split; {self.folder.log} lists all). The last good checkpoint, if there is one, is in "
            f"{self.folder.checkpoints}. Try a lower optimizer.lr, a longer warm-up or clip_grad."
        )

    def _pace(self) -> dict[str, float]:
        """Return images per second since the round began in this process, and the accelerator's memory in GB."""
        pace = {"images/s": self._seen / max(time.monotonic() - self._since, 1e-9)}
        if self.accelerator.device.type == "cuda":
            pace["GB"] = torch.cuda.max_memory_allocated() / 1e9
        return pace

    def _evaluate(self) -> dict[str, float]:
        """Return the metrics of the model, and of its moving average; raises _Stopped."""

        def measure(model: nn.Module) -> dict[str, float]:
            found = self._until_stop(batches(self.val_batches))
            return evaluate(model, found, self.task, self.accelerator.device, shares=True)

        model = self.learner.agree(one_size=self.val_set.image_shape is not None)
        with self.accelerator.autocast(), self.learner.gathered():
            metrics, self._warnings = watch_routers(self.learner.raw, lambda: measure(model))
            if self.learner.ema is not None:
                metrics |= {f"ema_{name}": value for name, value in measure(self.learner.ema.module).items()}
            self._pictures = self._draw()
        return metrics

    def _draw(self) -> Mapping[str, Tensor]:
        """Return the task's pictures in the first process, if there is a tracker to show them and it is their turn."""
        shown = self.task.pictured and self.accelerator.is_main_process and self.logs.shows_pictures
        if not (shown and pictures.due(self.rounds, self.plan.rounds)):
            return {}
        model = self.learner.raw if self.learner.ema is None else self.learner.ema.module
        return pictures.draw(model, self.task, self.val_set, self.accelerator.device)

    def _until_stop(self, share: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches of this process's share until all processes have finished theirs; raises _Stopped."""
        while not self._stopping():
            batch = next(share, None)
            if not largest(self.accelerator, batch is not None):
                return
            if batch:
                yield batch
        raise _Stopped

    def _finish_round(self, saved: Checkpoint, seconds: float) -> None:
        where = self._where(self.step)
        about = {"lr": self.learner.lr, "seconds": seconds}
        self._write({"kind": self.plan.evaluation, **where, **about, **self.metrics})
        looks = sigmas(self.learner.whole())
        if looks:
            self._write({"kind": "sigma", **where, **looks})
        for text in self._warnings:
            self._write({"kind": "warning", **where, "text": text})
        if self.accelerator.is_main_process:
            self.logs.show(self._pictures, self.step)
            checkpoint.record(saved, self.metrics)
        self._prune()
        self._next_round()
        self.report.line(f"{self.plan.progress(self.step)}  {numbers(self.metrics)}  ({seconds:.1f} s)")
        if self._warnings:
            self.report.line(f"warning: {brief(self._warnings)}")
        if self._patience.is_over and self.rounds < self.plan.rounds:
            self.report.line(f"the run ends here: {self._patience} ({self.headline})")
        self.accelerator.wait_for_everyone()  # no process may read checkpoints while the first one deletes some
        for callback in self.callbacks:
            callback.on_evaluate(self.learner.raw, self.step, self.metrics)

    def _prune(self) -> None:
        if self.accelerator.is_main_process:
            keep, higher = self.recipe.checkpoint.keep, self.task.higher_is_better
            checkpoint.prune(self.folder.checkpoints, keep, self.headline, higher_is_better=higher)

    def _next_round(self) -> None:
        """Count the round that :attr:`metrics` are of."""
        self.rounds += 1
        self._patience.see(self.metrics[self.headline])
        self._loss_sum, self._loss_count = 0.0, 0

    def _train_loss(self) -> float:
        return self._loss_sum / self._loss_count if self._loss_count else math.nan

    def _stopping(self) -> bool:
        """Return whether any process was asked to stop; all then stop after the same step."""
        number = largest(self.accelerator, self.stop.received or 0)
        if number:
            self.stop.received = signal.Signals(number)
        return number > 0

    def _where(self, step: int) -> dict[str, int]:
        """Return a step and its epoch, as logs and checkpoints have them."""
        return {"step": step, "epoch": self.plan.epoch(step)}

    def _write(self, entry: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.logs.write(entry)

    # Checkpoints

    def _save(self) -> Checkpoint:
        if not self.learner.finite():  # a finite loss may still have non-finite gradients
            raise FloatingPointError(
                f"weights are NaN or infinite after step {self.step} of {self.plan.steps}. The last good checkpoint, "
                f"if there is one, is in {self.folder.checkpoints}. Try a lower optimizer.lr, clip_grad, or nonfinite: "
                f"skip, which checks every gradient."
            )
        state = {
            **self.learner.state_dict(),
            "random": gather_object([random_state()]),
            "loss": [self._loss_sum, self._loss_count],
            "patience": list(self._patience.state),
        }
        where = self._where(self.step)
        meta = {
            **where,
            "position": self.step - where["epoch"] * self.plan.steps_per_epoch,
            "processes": self.accelerator.num_processes,
            "model": self.recipe.model.name,
            "headline": self.headline,
            "higher_is_better": self.task.higher_is_better,
            "recipe": recipe_hash(self.recipe),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("widefield", "torch", "timm", "accelerate")},
            },
        }
        saved = Checkpoint(self.folder.checkpoints, {**meta, "metrics": None})
        model = self.learner.whole()
        if self.accelerator.is_main_process:
            ema = None if self.learner.ema is None else self.learner.ema.module
            saved = checkpoint.save(self.folder.checkpoints, model, ema, state, meta)
        self.accelerator.wait_for_everyone()
        return saved

    def restore(self, last: Checkpoint) -> None:
        """Restore a checkpoint.

        Raises ValueError, with nothing changed, for another model, another recipe or another number of processes.
        """
        self.learner.load_weights(last.path / "model.safetensors")
        self.folder.check_recipe(self.recipe)
        if last.meta["processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"the run used {last.meta['processes']} processes and can only be resumed with as many; there are "
                f"{self.accelerator.num_processes}."
            )
        state = last.state()
        self.learner.load_state_dict(state, last.path / "ema.safetensors")
        self.step, self.rounds = last.step, self.plan.finished(last.step)
        self._loss_sum, self._loss_count = state["loss"]
        best, since = state.get("patience", (None, 0))  # checkpoints of earlier versions have none
        self._patience.state = best, since
        if self.accelerator.is_main_process:
            checkpoint.sweep(self.folder.checkpoints)
            self.folder.rewind(last.step, evaluated=last.metrics is not None)
        if last.metrics is not None:
            self.metrics = last.metrics
            self._next_round()
        restore_random_state(state["random"][self.accelerator.process_index])

    def result(self) -> RunResult:
        """Return the outcome of the run."""
        best = checkpoint.best(self.folder.checkpoints, self.headline, higher_is_better=self.task.higher_is_better)
        return RunResult(
            folder=self.folder.path,
            metrics=self.metrics,
            best=dict(best.metrics or {}) if best else {},
            epochs=self.step // self.plan.steps_per_epoch,
            steps=self.step,
            interrupted=None if self._done else self.stop.received,
            model=self.learner.result(),
        )
