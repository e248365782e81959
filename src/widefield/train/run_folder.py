"""Manage the folder of a run: claim it before anything is built, then write ``config.yaml`` and other files.

A run that fails before its first checkpoint leaves ``failed.yaml`` instead of ``config.yaml``; its name can be reused.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from widefield.train import checkpoint, run_data
from widefield.train.recipe import Recipe
from widefield.train.recipe_io import load_recipe, recipe_text
from widefield.train.run_data import RunData
from widefield.train.run_files import RunFiles, flat, log_entries

if TYPE_CHECKING:
    from torch import nn

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAY_CHANGE = ("workers", "log_every", "checkpoint", "trackers", "patience")
"""Keys that do not change the numbers of a run's steps, so that they may differ when it is resumed."""
_PLACES = ("name", "output")
"""Keys that say where a run is; a resumed run stays in its folder, even if that was moved."""
_DATA_PLACES = ("root", "index", "cache", "listing", "refresh", "storage")
"""Options of data sets that say where the data are, keys in ``data.args``. They may change: ``check_data`` has
found the data to be the same."""


class RunFolder(RunFiles):
    """The folder of a run, as the run writes it."""

    def claim(self) -> None:
        """Make the folder of a new run, or clear the folder of a run that failed before its first checkpoint.

        Raises:
            OSError: the folder cannot be written; the message names it.
            FileExistsError: it holds something else.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
            if self._gave_up():
                self._clear()
                return
        except OSError as error:
            raise OSError(
                f"the run's folder {self.path} cannot be written: {error.strerror}. Choose another with --output."
            ) from error
        self.check_free()

    def check_free(self) -> None:
        """Raise FileExistsError if the folder holds something else than a run that failed before a checkpoint."""
        if self.path.is_dir() and any(self.path.iterdir()) and not self._gave_up():
            resumable = bool(checkpoint.checkpoints(self.checkpoints))
            hint = f"Continue it with --resume {self.path}" if resumable else "It has no checkpoint: delete it"
            raise FileExistsError(f"{self.path} holds a run already. {hint}, or choose another --name.")

    def _gave_up(self) -> bool:
        """Return whether the folder holds a run that failed before its first checkpoint."""
        return self.failed.is_file() and not checkpoint.checkpoints(self.checkpoints)

    def check_space(self, model: nn.Module, recipe: Recipe) -> None:
        """Raise OSError if the disk cannot hold the checkpoints that the recipe keeps, and one more being written.

        The estimate assumes two numbers per parameter in the optimizer, as in Adam.
        """
        weights = sum(tensor.nbytes for tensor in model.state_dict().values())
        one = weights * (3 + (recipe.ema is not None))
        needed = one * (recipe.checkpoint.keep + 2)
        place = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        free = shutil.disk_usage(place).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"the checkpoints need about {needed / 1e9:.2f} GB (checkpoint.keep is {recipe.checkpoint.keep}) and "
                f"{free / 1e9:.2f} GB are free: make room, keep fewer, or choose another --output",
                str(self.path),
            )

    def _clear(self) -> None:
        """Delete only what a run writes before its first checkpoint."""
        checkpoint.sweep(self.checkpoints)
        for file in (self.log, self.data, self.mlflow, *self.tensorboard.glob("events.out.tfevents.*"), self.failed):
            file.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.tensorboard):
            with suppress(OSError):  # missing, or not empty
                folder.rmdir()

    def last(self) -> checkpoint.Checkpoint:
        """Return the newest checkpoint; raises FileNotFoundError if there is none to resume."""
        found = checkpoint.checkpoints(self.checkpoints)
        if not found:
            raise FileNotFoundError(f"{self.path} holds no checkpoint to resume from.")
        return found[-1]

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise ValueError naming the keys that ``recipe`` must not change in a resumed run."""
        before, now = (flat(dataclasses.asdict(r)) for r in (load_recipe(self.path), recipe))
        free = {*_MAY_CHANGE, *_PLACES, *(key for key in {*before, *now} if _is_place_of_data(key))}
        changed = [
            f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
            for key in dict.fromkeys([*before, *now])
            if before.get(key) != now.get(key) and not {key, key.split(".")[0]} & free
        ]
        if changed:
            raise ValueError(
                f"the run in {self.path} can only be resumed as it was, and {'; '.join(changed[:3])}. "
                f"Leave that out, or start another run with --name. Free to change are "
                f"{', '.join(key for key in sorted(free) if key not in _PLACES)}."
            )

    def check_data(self, now: RunData) -> None:
        """Raise ValueError naming the changes if the data are not those that the run began with."""
        changed = run_data.changes(run_data.read(self.path), now)
        if changed:
            raise ValueError(
                f"the run in {self.path} can only be resumed on the data it began with, and {'; '.join(changed)}. "
                f"Restore the data, or start another run on them with --name; model.pretrained: {self.path} starts it "
                f"from these weights."
            )

    @contextmanager
    def occupied(self, recipe: Recipe, found: RunData) -> Iterator[None]:
        """Write ``config.yaml`` and ``data.json``; free the folder if the block fails before the first checkpoint."""
        checkpoint.write_text(self.config, recipe_text(recipe))
        run_data.store(self.path, found)
        try:
            yield
        except BaseException:
            if not checkpoint.checkpoints(self.checkpoints):
                self.config.replace(self.failed)
            raise

    @contextmanager
    def explaining_a_full_disk(self) -> Iterator[None]:
        """Add the last checkpoint and how to continue to the error of a full disk in the block."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            found = checkpoint.checkpoints(self.checkpoints)
            left = (
                f"The last good checkpoint is {found[-1].path}: make room, then continue with widefield train --resume "
                f"{self.path}."
                if found
                else "There is no checkpoint yet: make room, or choose another --output, and start again."
            )
            place = f" while writing {error.filename}" if error.filename else ""
            full = OSError(f"the run in {self.path} stopped: {error.strerror or error}{place}. {left}")
            full.errno = error.errno
            raise full from None

    def rewind(self, step: int, evaluated: bool) -> None:
        """Drop the log entries after a checkpoint, which a killed run may have written."""
        if not self.log.is_file():
            return
        kept = [
            line
            for line, entry in log_entries(self.log)
            if entry["step"] < step or (entry["step"] == step and (evaluated or entry["kind"] == "step"))
        ]
        checkpoint.write_text(self.log, "".join(f"{line}\n" for line in kept))


def _is_place_of_data(key: str) -> bool:
    return key.startswith("data.args.") and key.split(".")[2] in _DATA_PLACES


def recipe_hash(recipe: Recipe) -> str:
    """Return a short hash of the keys that decide the numbers of a run."""
    unread = {*_MAY_CHANGE, *_PLACES}
    values = {key: value for key, value in dataclasses.asdict(recipe).items() if key not in unread}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
