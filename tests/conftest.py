import copy
import functools
import gc
from collections.abc import Iterator

import pytest
import torch
from torch._export import utils
from torch.onnx._internal.exporter import _registration

# Two test processes share two cores: more threads only wait for each other.
torch.set_num_threads(1)

# Without a GPU, torch.manual_seed still notes a stack trace for it at each call.
SEED = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed

# Modules and collected tests are over a million objects that stay until the end. The garbage collector would look
# through them again and again: while they grow, and in each full collection of a test.
gc.disable()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(30_000, 10, 10)  # a graph of torch.export alone has more objects than the usual 700
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _exporters_read_operators_once():
    """Keep what torch reads for each graph: the source of all functions that write ONNX takes half a second alone."""
    read = functools.cache(_registration.ONNXRegistry.from_torchlib)

    def from_torchlib(cls, opset_version=_registration._constants.TORCHLIB_OPSET):
        registry = copy.copy(read(opset_version))
        registry.functions = {target: list(found) for target, found in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", classmethod(from_torchlib))
        patch.setattr(utils, "_materialize_cpp_cia_ops", functools.cache(utils._materialize_cpp_cia_ops))
        yield


@pytest.fixture(autouse=True)
def _seeded():
    SEED(0)
