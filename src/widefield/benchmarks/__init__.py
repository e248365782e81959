"""The tables of the papers as commands: ``widefield bench depthwise``, ``mixture``, ``deform``,
``mixers``, ``model`` and ``deploy``.

Every table is made the same way. A frozen case says what a row is about; one function, ``calls``, sets its peers up by
name; :meth:`Settings.measure` measures those against each other, time and memory, in interleaved rounds; ``rows_of``
takes ratios of medians of one such measurement. :class:`Record` prints rows as they come and writes them to files, and
a :class:`Bar` holds them against a limit.
"""

from widefield.benchmarks.record import Bar, Record
from widefield.benchmarks.settings import Settings

__all__ = ["Bar", "Record", "Settings"]
