"""Block sizes: measured once for each kind of problem, remembered in memory and in a file.

Triton's own autotuner is not used. It chooses among launches of one kernel, but here the host's part of the work
depends on the choice too: how weights are padded, into how many partial sums a gradient is split. It would also measure
while a CUDA graph is being captured, and its key is exact sizes, where similar ones can share.

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
        key: what the speed of a candidate depends on. Every candidate must be correct for every problem.
        candidates: makes the list. The first is a good guess. It is used where nothing may be measured: in the
            interpreter, during CUDA graph capture, and under ``torch.use_deterministic_algorithms``, since another
            choice adds in another order.
        launch: does all the work that depends on the choice, any number of times with the same result.
        device: of the tensors.
    """
    if INTERPRETED or device.type != "cuda":
        return launch(candidates()[0])
    with on(device):
        config = None if torch.are_deterministic_algorithms_enabled() else _best.get((name, device.index, key))
        return launch(config or _choose(name, key, candidates(), launch, device))


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context that launches on this device. Triton uses the current one, wherever the tensors are."""
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
        )  # another thread's, another process's
        if known is None or known not in candidates:  # not measured yet, or by a version with other candidates
            try:
                known = fastest(candidates, launch)
            except torch.OutOfMemoryError:  # measuring takes memory of its own
                return candidates[0]
            _cache.write(path, entry, known)
        _best[name, device.index, key] = known
        return known


def fastest(
    candidates: Sequence[Config],
    launch: Callable[[Config], Tensor],
    measure: Callable[[Callable[[], Tensor]], float] | None = None,
) -> Config:
    """Return the candidate with the least median time. Those that do not compile or fit on the device are skipped."""
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
    """Round a side of a map up: exact to 16, to steps of 8 up to 64, then to powers of two."""
    if n <= 16:
        return n
    return -(-n // 8) * 8 if n <= 64 else 1 << (n - 1).bit_length()
