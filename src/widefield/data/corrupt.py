"""Decide what happens with image files that cannot be decoded, and count them over all workers."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from widefield import _checks
from widefield.data.base import shared
from widefield.data.decoding import CorruptImageError, UnsupportedImageError

_LISTED = 100  # names in the message of CorruptImagesError; earlier warnings name every file


class CorruptImagesError(OSError):
    """More files are corrupt than allowed; the message lists them."""


class CorruptFiles:
    """The corrupt files of one split.

    Args:
        policy: ``"refuse"`` raises OSError, ``"skip"`` warns once per file.
        max_corrupt: largest fraction of the split that may be skipped, from 0 to 1.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type.
    """

    def __init__(self, policy: str, max_corrupt: float) -> None:
        self.policy = _checks.choice("corrupt", policy, ("refuse", "skip"))
        self.max_corrupt = _checks.number("max_corrupt", max_corrupt, maximum=1)

    def expect(self, count: int, split: str) -> None:
        """Set the number of files of the split, before anything is reported."""
        self._split = split
        # In shared memory, so that all workers and epochs warn about a file only once.
        self._warned = shared(torch.zeros(count, dtype=torch.bool))

    def report(self, index: int, error: CorruptImageError, name: Callable[[int], str]) -> None:
        """Record that file ``index`` cannot be decoded; ``name`` returns the path of a file by index.

        Raises:
            CorruptImageError: the policy is to refuse.
            CorruptImagesError: more files are corrupt than ``max_corrupt`` allows; the message lists them.
        """
        sound = isinstance(error, UnsupportedImageError)  # its message says what to do
        if self.policy == "refuse":
            hint = "Or" if sound else "Repair or delete the file, or"
            raise type(error)(f'{error} {hint} pass corrupt="skip" to leave such images out.') from error.__cause__
        if not self._warned[index]:
            self._warned[index] = True
            warnings.warn(f"{error} It is left out{'' if sound else '; repair or delete it'}.", stacklevel=3)
        found = self._warned.nonzero().flatten().tolist()
        if len(found) > self.max_corrupt * len(self._warned):
            listed = "".join(f"\n  {name(index)}" for index in found[:_LISTED])
            more = f"\n  and {len(found) - _LISTED} more, each named in a warning" if len(found) > _LISTED else ""
            raise CorruptImagesError(
                f"{len(found)} of {len(self._warned)} images of the {self._split} split cannot be read, more than "
                f"max_corrupt={self.max_corrupt:g} allows. Repair or delete them, or raise max_corrupt:{listed}{more}"
            ) from error
