"""Find the receptive field that a data set needs: :func:`widefield.fit`."""

from widefield._intervals import Interval
from widefield.fitting.choose import Additive, Candidate, Choice, Point
from widefield.fitting.costs import Costs
from widefield.fitting.groups import Group, Groups, Layer
from widefield.fitting.halves import halves
from widefield.fitting.read import Readings
from widefield.fitting.result import FitResult, Network, SizeRow, Verdict
from widefield.fitting.search import fit
from widefield.fitting.spec import FitSpec

__all__ = [
    "Additive",
    "Candidate",
    "Choice",
    "Costs",
    "FitResult",
    "FitSpec",
    "Group",
    "Groups",
    "Interval",
    "Layer",
    "Network",
    "Point",
    "Readings",
    "SizeRow",
    "Verdict",
    "fit",
    "halves",
]
