"""Reproduce the papers' tables with ``widefield bench``: depthwise, mixture, deform, mixers, model, memory and deploy.

All benchmarks have the same structure. A frozen case describes a row. The function ``calls`` returns its peers by name.
:meth:`Settings.measure` measures their time and memory in interleaved rounds. ``rows_of`` computes ratios of medians of
one such measurement. :class:`Record` prints each row once it is measured and writes all rows to files. A :class:`Bar`
compares them with a limit.
"""

from widefield.benchmarks.record import Bar, Record
from widefield.benchmarks.settings import Settings

__all__ = ["Bar", "Record", "Settings"]
