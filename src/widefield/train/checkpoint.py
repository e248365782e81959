"""Write and read checkpoints on disk, atomically.

A checkpoint is a folder ``checkpoints/step-00000123`` with

* ``model.safetensors`` and, with a moving average, ``ema.safetensors``: the weights;
* ``state.safetensors`` and ``state.json``: optimizer, scheduler, random states;
* ``meta.json``: step, epoch, position in the epoch, metrics once the epoch is evaluated, versions, recipe hash.

It is written to a hidden folder next to it, flushed to the disk, and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from widefield import _checks
from widefield.train.state_file import load_state, save_state

_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint and its ``meta.json``."""

    path: Path
    meta: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Return the number of steps before it."""
        return int(self.meta["step"])

    @property
    def metrics(self) -> dict[str, float] | None:
        """Return the metrics on the val split, or None if the epoch was not evaluated yet."""
        metrics: dict[str, float] | None = self.meta["metrics"]
        return metrics

    @property
    def weights(self) -> Path:
        """Return the weights to use: the moving average if there is one."""
        ema = self.path / "ema.safetensors"
        return ema if ema.is_file() else self.path / "model.safetensors"

    def state(self) -> dict[str, Any]:
        """Read the state onto the CPU."""
        state: dict[str, Any] = load_state(self.path)
        return state


def save(
    folder: Path, model: nn.Module, ema: nn.Module | None, state: Mapping[str, Any], meta: Mapping[str, Any]
) -> Checkpoint:
    """Write a checkpoint into ``folder`` (``runs/NAME/checkpoints``), or return the existing one for this step.

    ``meta`` holds ``step`` and further descriptions in JSON types. If anything fails, such as a full disk, the folder
    is unchanged.
    """
    path = folder / f"step-{meta['step']:08d}"
    checkpoint = Checkpoint(path, {**meta, "metrics": None})
    if path.is_dir():  # resumed and interrupted again before a step
        return read(path)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    try:
        with system_errors():
            save_model(model, str(unfinished / "model.safetensors"))
            if ema is not None:
                save_model(ema, str(unfinished / "ema.safetensors"))
            save_state(unfinished, dict(state))
        (unfinished / "meta.json").write_text(_json(checkpoint.meta), encoding="utf-8")
        for file in unfinished.iterdir():
            _flush(file)
        _flush(unfinished)
        unfinished.chmod(0o755)  # mkdtemp makes folders private to their owner
        unfinished.replace(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _flush(folder)
    return checkpoint


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise errors of the system that safetensors reports in the block as OSError."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def record(checkpoint: Checkpoint, metrics: Mapping[str, float]) -> Checkpoint:
    """Add the metrics of its epoch to a checkpoint; return the checkpoint with them."""
    meta = {**checkpoint.meta, "metrics": dict(metrics)}
    write_text(checkpoint.path / "meta.json", _json(meta))
    return replace(checkpoint, meta=meta)


def read(path: Path) -> Checkpoint:
    """Read one checkpoint folder."""
    return Checkpoint(path, json.loads((path / "meta.json").read_text(encoding="utf-8")))


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the finished checkpoints in ``folder``, oldest first."""
    return sorted((read(path) for path in folder.glob("step-*")), key=lambda checkpoint: checkpoint.step)


def best(folder: Path, headline: str, *, higher_is_better: bool) -> Checkpoint | None:
    """Return the checkpoint with the best ``headline`` metric, or None if none is evaluated.

    The earliest of equal ones wins. NaN is never the best.
    """
    evaluated = [c for c in checkpoints(folder) if c.metrics and c.metrics[headline] == c.metrics[headline]]
    sign = -1 if higher_is_better else 1
    return min(evaluated, key=lambda c: sign * (c.metrics or {})[headline], default=None)


def chosen(run: Path, which: str) -> Checkpoint:
    """Return a checkpoint of a run's folder: the ``"best"`` by its headline metric, or the ``"last"``.

    Raises FileNotFoundError if there is none.
    """
    _checks.choice("which", which, ("best", "last"))
    folder = run / "checkpoints"
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"{run} is not the folder of a run: it holds no checkpoints.")
    last = found[-1]
    if which == "last":
        return last
    ranked = best(folder, last.meta["headline"], higher_is_better=last.meta["higher_is_better"])
    if ranked is None:
        raise FileNotFoundError(f'{run} holds no evaluated checkpoint yet; which="last" gives the newest.')
    return ranked


def prune(folder: Path, keep: int, headline: str, *, higher_is_better: bool) -> None:
    """Delete all checkpoints except the newest ``keep`` and the best."""
    found = checkpoints(folder)
    top = best(folder, headline, higher_is_better=higher_is_better)
    for checkpoint in found[:-keep]:
        if top is None or checkpoint.path != top.path:
            # Hide it first: a half-deleted folder must not look like a checkpoint.
            doomed = checkpoint.path.rename(folder / f"{_UNFINISHED}{checkpoint.path.name}")
            shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Delete the remains of an interrupted write or deletion."""
    for leftover in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def load_weights(path: Path, model: nn.Module) -> None:
    """Load a ``.safetensors`` file into ``model``.

    Raises:
        ValueError: it holds the weights of another model; the message names the first keys and shapes that differ, and
            ``model`` is unchanged.
    """
    differences = _differences(path, model)
    if differences:
        shown = "; ".join(differences[:3])
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"{path} holds the weights of another model than this {type(model).__name__}: {shown}{more}. "
            f"Resume with the recipe of that run, or start another run."
        )
    load_model(model, path)


def _differences(path: Path, model: nn.Module) -> list[str]:
    with safe_open(str(path), framework="pt") as file:
        stored = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
        # A tensor that two names share is stored once; the metadata maps the other name to it.
        for name, kept in (file.metadata() or {}).items():
            if kept in stored:
                stored[name] = stored[kept]
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, extra = "not in the checkpoint", "not in the model"
    return [
        f"{name} is {stored.get(name, missing)} there and {expected.get(name, extra)} here"
        for name in [*expected, *(name for name in stored if name not in expected)]
        if stored.get(name) != expected.get(name)
    ]


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: after a crash it holds the old text or the new one."""
    unfinished = path.with_name(f"{_UNFINISHED}{path.name}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        _flush(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _json(meta: Mapping[str, Any]) -> str:
    return json.dumps(meta, indent=2) + "\n"


def _flush(path: Path) -> None:
    """Flush a file or the entries of a folder to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
