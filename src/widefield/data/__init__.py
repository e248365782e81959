"""Data sets: embedded (`Digits`), generated (`Scales`) and yours (`Folder`), all giving samples of one form."""

from widefield.data.catalog import create
from widefield.data.digits import Digits
from widefield.data.folder import Folder
from widefield.data.loading import ImageSet, Sample, collate, seeded
from widefield.data.scales import Scales

__all__ = ["Digits", "Folder", "ImageSet", "Sample", "Scales", "collate", "create", "seeded"]
