"""Run checks of the kernels in Triton's interpreter, on CPU tensors, in a separate process.

Whether a kernel is interpreted is decided when it is decorated, for Triton's own library too: the process that runs the
ordinary tests, some of which compile with inductor, must never see TRITON_INTERPRET. One process serves all checks of a
test worker.
"""

import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context


def _start():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    import torch

    torch.set_num_threads(1)


def _checked(check, args, kwargs):
    import torch

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return check(*args, **kwargs)


@contextmanager
def interpreting():
    """Yield run(check, ...), which calls ``check(...)`` where kernels are interpreted, and raises what it raises."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start) as pool:
        yield lambda check, *args, **kwargs: pool.submit(_checked, check, args, kwargs).result(timeout=300)
