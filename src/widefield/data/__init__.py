"""Data sets: embedded (`Digits`), generated (`Scales`) and yours (`Folder`), all giving samples of one form."""

from widefield.data.catalog import create
from widefield.data.digits import Digits
from widefield.data.folder import Folder
from widefield.data.loading import ImageSet, Sample, collate, seeded
from widefield.data.pictures import PHOTOGRAPHS, Pictures
from widefield.data.scales import Scales

__all__ = ["PHOTOGRAPHS", "Digits", "Folder", "ImageSet", "Pictures", "Sample", "Scales", "collate", "create", "seeded"]
