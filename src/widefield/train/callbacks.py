"""What a program of yours may do while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from widefield.train.run_result import RunResult


class Callback:
    """Base class of callbacks; override what is needed, and pass objects to ``train(recipe, callbacks=[...])``.

    With several processes, each calls its own. An error that a callback raises ends the run, which can be resumed from
    its last checkpoint: a tuner's exception for a trial that it gives up passes through.
    """

    def on_train_begin(self, model: nn.Module, step: int) -> None:
        """Do something before the first step.

        Args:
            model: the model without wrappers, on its device. If it is changed, the run is no longer what its recipe
                says.
            step: number of finished steps: 0, or those of the run that is resumed.
        """

    def on_step_end(self, model: nn.Module, step: int) -> None:
        """Do something after a step; its loss is still on the accelerator, so it is not given.

        Args:
            model: as in :meth:`on_train_begin`.
            step: its number, from 1.
        """

    def on_evaluate(self, model: nn.Module, step: int, metrics: Mapping[str, float]) -> None:
        """Do something after an evaluation, when its checkpoint is complete and its metrics are written.

        Args:
            model: as in :meth:`on_train_begin`.
            step: number of finished steps.
            metrics: as in the log, ``train_loss`` included; names of the moving average's start with ``ema_``.
        """

    def on_train_end(self, result: RunResult) -> None:
        """Do something with the result of a run that has finished or was interrupted."""


def checked(callbacks: Sequence[Callback]) -> tuple[Callback, ...]:
    """Return callbacks, in their order; raises TypeError for anything else."""
    for one in callbacks:
        if not isinstance(one, Callback):
            raise TypeError(f"callbacks must be objects of widefield.train.Callback; got {one!r}.")
    return tuple(callbacks)
