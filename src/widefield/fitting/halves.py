"""Divide a val split into the half that sizes are selected on and the half that results are reported on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from widefield.data import Sample, SampleSet
from widefield.data.poses import PoseSet

_SEED = 9001
"""Of the division, which must be the same in every fit of a data set."""
_LEAST = 8
"""Fewest images, or files of a pose set, in a half: below, no interval means anything."""


class Part(SampleSet):
    """Some samples of a data set, by their index."""

    def __init__(self, whole: SampleSet, indices: Sequence[int]) -> None:
        super().__init__(whole.split, whole.seed)
        self.whole, self.indices = whole, [int(index) for index in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, index: int) -> Sample | None:
        """Return sample ``index`` of the part."""
        return self.whole[self.indices[index]]


def halves(val: SampleSet) -> tuple[Part, Part]:
    """Return the selection half and the report half of a val split, in the order of the split.

    The division is random, as labels may alternate with the index. It is the same for every fit. People of one file of
    a pose set stay together, because they are measured together.

    Raises ValueError if a half has too few images.
    """
    units = _units(val)
    count = int(units.max()) + 1 if len(units) else 0
    if count < 2 * _LEAST:
        raise ValueError(
            f"the val split has {count} images. A fit selects sizes on one half and reports on the other, and each "
            f"needs at least {_LEAST}: use more."
        )
    selects = np.zeros(count, bool)
    selects[np.random.default_rng(_SEED).permutation(count)[: count // 2]] = True
    of_sample = selects[units]
    first, second = np.flatnonzero(of_sample), np.flatnonzero(~of_sample)
    return Part(val, first.tolist()), Part(val, second.tolist())


def _units(val: SampleSet) -> NDArray[np.int64]:
    """Return the number of the unit that each sample belongs to, (N,)."""
    if isinstance(val, PoseSet):
        return np.unique(val.boxes.files, return_inverse=True)[1].astype(np.int64)
    return np.arange(len(val))
