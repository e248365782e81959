"""Run checks of the kernels in Triton's interpreter, on CPU tensors, in a separate process.

Triton decides when a kernel is decorated whether it is interpreted, in its own library as well. The process of the
ordinary tests must therefore never see TRITON_INTERPRET, because some of them compile with inductor. One process serves
all checks of a test worker.
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
    _patch_once_a_launch()


def _patch_once_a_launch():
    """Spare calls of functions inside of kernels that Triton replaces its operators, which took half of the time.

    A launch replaces the operators of the modules that its kernel sees, and restores them at its end. Each call inside
    of it would look for operators that are left in these modules, and there are none.
    """
    from triton import language
    from triton.runtime import interpreter

    launch, replace, replaced = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

    def launched(self, *args, **kwargs):
        replaced.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            replaced.clear()

    def replaced_once(function):
        values = list(function.__globals__.values())
        seen = {module for module in (language, language.core) if any(value is module for value in values)}
        if replaced and seen <= replaced:
            return interpreter._LangPatchScope()
        replaced.update(seen)
        return replace(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launched, replaced_once


def _checked(check, args, kwargs):
    import torch

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return check(*args, **kwargs)


@contextmanager
def interpreting():
    """Yield run(check, ...), which calls ``check(...)`` in the interpreter's process, and raises its errors."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start) as pool:
        yield lambda check, *args, **kwargs: pool.submit(_checked, check, args, kwargs).result(timeout=300)
