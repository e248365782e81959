import importlib.util

import pytest
from interpreter import interpreting

spec = importlib.util.find_spec("triton")
if spec is None or spec.origin is None:  # this folder is on the path as the parent of another, but is not the package
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def interpreted():
    """See :func:`interpreter.interpreting`."""
    with interpreting() as run:
        yield run
