"""What the child processes of benchmarks/whole_models.py measure, each in a fresh process on one thread."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib
import logging
import multiprocessing
import os
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from whole_networks import MODES, NETWORKS, OURS, Models, Network, built

from widefield import deploy
from widefield.benchmarks.memory import peak_resident, reset_peak, resident, return_freed_memory
from widefield.benchmarks.settings import LAYOUTS, keep_freed_memory
from widefield.deploy import export

Row = dict[str, Any]
Call = Callable[[], object]

LEAST, MOST = 3, 7
"""Rounds of a measurement; one less if a round takes LONG_S seconds, as long calls vary less."""
LONG_S = 20.0
PRELOADED = ["torchvision", "widefield.models", "widefield.deploy", "widefield.benchmarks.model", "torch._dynamo"]
"""What takes long to import; children start with it."""
HOPELESS = 1.4
"""A layout whose warm-up call takes this many times as long as the same network's in the other is not timed further."""


class FailedError(RuntimeError):
    """A measurement in a child process did not end well; the message says why."""


def in_child(function: Callable[..., Any], *arguments: object, timeout_s: float) -> Any:
    """Return what ``function`` returns in a fresh process.

    Raises:
        FailedError: it raised an error, took too long, or the process ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout_s):
            raise FailedError(f"not done within {timeout_s:g} s")
        done, value = receiver.recv()
    except EOFError:
        process.join()  # for its exit code
        raise FailedError(f"its process ended with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if not done:
        raise FailedError(value)
    return value


def _run(sender: Connection, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    try:
        sender.send((True, function(*arguments)))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        sender.send((False, f"{type(error).__name__}: {lines[0][:200]}"))


def measured(calls: Mapping[str, Call], budget_s: float, *, pairs: bool = False) -> dict[str, list[float]]:
    """Return the CPU seconds of each call in every round; calls take turns.

    Args:
        calls: name -> call; with ``pairs`` the names are "NETWORK, LAYOUT".
        budget_s: seconds for all rounds, which decide their number within LEAST and MOST.
        pairs: leave out layouts that are much slower than the other one of the same network; they have one timing.
    """
    seconds = {name: [_seconds(call)] for name, call in calls.items()}
    for name, call in calls.items():
        if seconds[name][0] < 3:  # the first call of a process is slower
            seconds[name] = [_seconds(call)]
    kept = {name: call for name, call in calls.items() if not pairs or _is_worth_timing(name, seconds)}
    turn_s = sum(seconds[name][0] for name in kept)
    rounds = max(int(budget_s / turn_s), LEAST if turn_s < LONG_S else LEAST - 1)
    for name in kept:
        seconds[name] = []
    items = list(kept.items())
    for turn in range(min(MOST, rounds)):
        first = turn // 2 % len(items)
        order = items[first:] + items[:first]
        for name, call in reversed(order) if turn % 2 else order:
            seconds[name].append(_seconds(call))
    return seconds


def _seconds(call: Call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _is_worth_timing(name: str, seconds: Mapping[str, list[float]]) -> bool:
    network = name.partition(", ")[0]
    return seconds[name][0] <= HOPELESS * min(s[0] for other, s in seconds.items() if other.startswith(f"{network}, "))


def eager(index: int, mode: str, budget_s: float) -> Row:
    """Time all networks of a row in both layouts, in turns; in inference compare their outputs too."""
    keep_freed_memory()
    network = NETWORKS[index]
    models, call = built(network, mode)
    found: Row = {"difference": _difference(models, network) if mode == MODES[0] else None}
    calls = {}
    for layout, memory_format in reversed(LAYOUTS.items()):
        images = network.images().contiguous(memory_format=memory_format)
        for name, model in models.items():
            own = copy.deepcopy(model).to(memory_format=memory_format)
            calls[f"{name}, {layout}"] = call(name, own, images)
    found["seconds"] = measured(calls, budget_s, pairs=True)
    found["parameters"] = sum(p.numel() for p in models[OURS].parameters())
    return found


def _difference(models: Models, network: Network) -> float | None:
    """Return the largest difference of our outputs from the stock network's, relative; None: other weights."""
    if network.kind not in ("timm", "zoo"):
        return None
    x = network.images()[:1]
    with torch.inference_mode():
        theirs, mine = (models[name](x) for name in (next(iter(models)), OURS))
    return float((theirs - mine).abs().max() / theirs.abs().max())


def memory(index: int, mode: str, name: str, layout: str) -> int:
    """Return the peak resident memory of eager calls, in bytes: weights, activations and workspaces."""
    before = _resident_before()
    _, call = _one(NETWORKS[index], mode, name, layout)
    return _peak(call, 2) - before


def _resident_before() -> int:
    return_freed_memory()
    reset_peak()
    return resident()


def _one(network: Network, mode: str, name: str, layout: str) -> tuple[nn.Module, Call]:
    models, call = built(network, mode)
    model = models[name].to(memory_format=LAYOUTS[layout])
    return model, call(name, model, network.images().contiguous(memory_format=LAYOUTS[layout]))


def _peak(call: Call, calls: int) -> int:
    """Return the peak of resident memory during calls after a first one."""
    call()
    gc.collect()
    reset_peak()
    for _ in range(calls - 1):
        call()
    return peak_resident()


def compiled(index: int, name: str, layout: str, ours: str, budget_s: float, compile_s: float) -> Row:
    """Compile a network with torch.compile; return its memory, the seconds it took, and times against ours.

    Raises:
        FailedError: it took more CPU seconds than ``compile_s``.
    """
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    importlib.import_module("torch._inductor.compile_fx")
    before = _resident_before()
    network = NETWORKS[index]
    models, call = built(network, MODES[0])
    model = models[name].to(memory_format=LAYOUTS[layout])
    images = network.images().contiguous(memory_format=LAYOUTS[layout])
    del models
    run = call(name, torch.compile(model), images)  # type: ignore[arg-type]
    start = sum(os.times()[:4])
    with _quiet(), _given_up_after(compile_s):
        run()
    took = sum(os.times()[:4]) - start
    return {"memory": _peak(run, 2) - before, "compile_s": took, **_against_ours(run, network, ours, budget_s)}


@contextlib.contextmanager
def _given_up_after(limit_s: float) -> Iterator[None]:
    """End the code inside once this process and its children that ended have used this much CPU time."""
    start = sum(os.times()[:4])

    def check(*_: object) -> None:
        if sum(os.times()[:4]) - start > limit_s:
            raise FailedError(f"not compiled within {limit_s:g} s of CPU time")

    before = signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def exported(index: int, path: str) -> None:
    """Write our merged network to a file of fixed batch size."""
    network = NETWORKS[index]
    models, _ = built(network, MODES[0])
    export(models[OURS], path, network.images(), dynamic=())


def loaded(index: int, path: str, ours: str, budget_s: float) -> Row:
    """Return the memory of a file in its runtime, and times against ours."""
    network, images = NETWORKS[index], NETWORKS[index].images()
    importlib.import_module({".onnx": "onnxruntime", ".xml": "openvino"}[Path(path).suffix])
    before = _resident_before()
    run = _served(deploy.load(path, threads=1), images, network)
    return {"memory": _peak(run, 2) - before, **_against_ours(run, network, ours, budget_s)}


def _served(runtime: deploy.Runtime, images: torch.Tensor, network: Network) -> Call:
    """Return a call of a file; masks of detections are pasted into the image, as those of the networks are."""
    if network.kind != "mask_rcnn":
        return functools.partial(runtime, images)
    from widefield.dense import paste_masks

    def call() -> None:
        found: Any = runtime(images)
        for one in found:
            paste_masks(one.masks, one.boxes, tuple(images.shape[2:]))

    return call


def _against_ours(run: Call, network: Network, ours: str, budget_s: float) -> Row:
    """Time a call and ours in turns."""
    keep_freed_memory()
    _, mine = _one(network, MODES[0], OURS, ours)
    seconds = measured({"this": run, OURS: mine}, budget_s)
    return {"ms": 1e3 * statistics.median(seconds["this"]), "ratio": ratio(seconds["this"], seconds[OURS])}


def ratio(theirs: list[float], mine: list[float]) -> float:
    """Return the median over rounds of their time over ours, at least of the rounds that both have."""
    return statistics.median(t / m for t, m in zip(theirs, mine, strict=False))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
