"""Choose block sizes: measure them once per kind of problem, and cache the choice in memory and in a file.

Triton's own autotuner is not used, for three reasons:

- It chooses among launches of one kernel. Here the host's work depends on the choice, too: the padding of weights and
  the number of partial sums of a gradient.
- It would measure during CUDA graph capture.
- Its key has exact sizes, but similar sizes can share a choice.

The file is ``$XDG_CACHE_HOME/widefield/triton/<device>-<torch>-<triton>.json`` (``~/.cache`` by default). A file that
cannot be read or written is ignored.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton
import triton.testing
from torch import Tensor
from triton.errors import TritonError

from widefield.ops import _cache
from widefield.ops._triton.host import INTERPRETED

Config = dict[str, int]
Key = tuple[object, ...]

# Milliseconds for warming up and for measuring one candidate: enough for a median within a few percent.
WARMUP, REPEAT = 5, 25

_best: dict[tuple[str, int | None, Key], Config] = {}
_lock = threading.Lock()


def run(
    name: str,
    key: Key,
    candidates: Callable[[], Sequence[Config]],
    launch: Callable[[Config], Tensor],
    device: torch.device,
) -> Tensor:
    """Return ``launch(config)`` with the fastest of the candidates for this key.

    Args:
        name: of the kernel.
        key: the properties of the problem that affect speed. Every candidate must be correct for every problem.
        candidates: returns the list. Its first entry is used where measuring is not allowed: in the interpreter, during
            CUDA graph capture, and under ``torch.use_deterministic_algorithms``, since the choice affects the order of
            additions.
        launch: does all work that depends on the choice; may be called repeatedly with the same result.
        device: of the tensors.
    """
    if INTERPRETED or device.type != "cuda":
        return launch(candidates()[0])
    with on(device):
        config = None if torch.are_deterministic_algorithms_enabled() else _best.get((name, device.index, key))
        return launch(config or _choose(name, key, candidates(), launch, device))


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context that launches on this device; Triton ignores the tensors' device and uses the current one."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _choose(
    name: str, key: Key, candidates: Sequence[Config], launch: Callable[[Config], Tensor], device: torch.device
) -> Config:
    if torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    with _lock:
        path, entry = cache_file(device), f"{name} {json.dumps(key)}"
        known = _best.get((name, device.index, key)) or _cache.read(path).get(
            entry
        )  # measured by another thread or process
        if known is None or known not in candidates:  # not measured, or by a version with other candidates
            try:
                known = fastest(candidates, launch)
            except torch.OutOfMemoryError:  # measuring needs additional memory
                return candidates[0]
            _cache.write(path, entry, known)
        _best[name, device.index, key] = known
        return known


def fastest(
    candidates: Sequence[Config],
    launch: Callable[[Config], Tensor],
    measure: Callable[[Callable[[], Tensor]], float] | None = None,
) -> Config:
    """Return the candidate with the lowest median time, skipping those that do not compile or fit on the device."""
    if len(candidates) == 1:
        return candidates[0]
    measure = measure or _median
    best, least, failure = candidates[0], float("inf"), None
    for config in candidates:
        try:
            time = measure(functools.partial(launch, config))
        except TritonError as error:
            failure = error
            continue
        if time < least:
            best, least = config, time
    if failure is not None and least == float("inf"):
        raise failure
    return best


def _median(call: Callable[[], Tensor]) -> float:
    return float(triton.testing.do_bench(call, warmup=WARMUP, rep=REPEAT, return_mode="median"))


@functools.cache
def cache_file(device: torch.device) -> Path:
    """Return the file with the choices for a device."""
    return _cache.path("triton", torch.cuda.get_device_name(device), torch.__version__, triton.__version__)


def bucket(n: int) -> int:
    """Round the side of a map up: exact up to 16, in steps of 8 up to 64, then to powers of two."""
    if n <= 16:
        return n
    return -(-n // 8) * 8 if n <= 64 else 1 << (n - 1).bit_length()
