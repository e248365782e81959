"""Divide a run into steps, epochs of the data, and rounds, each of which ends with an evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """The course of a run. Its length counts in epochs (a round is an epoch) or in steps (a round is any number).

    Attributes:
        steps: steps of the whole run.
        steps_per_epoch: steps of one pass over the data. The order of the data is a function of the seed and the epoch.
        steps_per_round: steps from one evaluation to the next; the last round may be shorter.
        unit: what the run's length counts in: ``"epoch"`` or ``"step"``.
    """

    steps: int
    steps_per_epoch: int
    steps_per_round: int
    unit: str

    @property
    def rounds(self) -> int:
        """Return the number of rounds."""
        return -(-self.steps // self.steps_per_round)

    def end(self, finished: int) -> int:
        """Return the step that ends the round after ``finished`` rounds."""
        return min((finished + 1) * self.steps_per_round, self.steps)

    def finished(self, step: int) -> int:
        """Return how many rounds were finished before step number ``step`` (from 1), which may end one."""
        return (step - 1) // self.steps_per_round

    def epoch(self, step: int) -> int:
        """Return the epoch of the data, from 0, that step number ``step`` (from 1) belongs to."""
        return (step - 1) // self.steps_per_epoch

    @property
    def evaluation(self) -> str:
        """Return the kind of the log's entries about evaluations."""
        return "epoch" if self.unit == "epoch" else "evaluation"

    def whole(self) -> str:
        """Return the length of the run as text, such as "2 epochs"."""
        return f"{self._count(self.steps)} {self.unit}s"

    def progress(self, step: int) -> str:
        """Return how much is done after ``step`` steps as text, such as "epoch 1/2"."""
        return f"{self.unit} {self._count(step)}/{self._count(self.steps)}"

    def _count(self, step: int) -> int:
        return step // self.steps_per_epoch if self.unit == "epoch" else step
