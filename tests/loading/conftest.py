"""The small runs of the training tests."""

from train.conftest import recipe, run  # noqa: F401
