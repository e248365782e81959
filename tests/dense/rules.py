"""The rules of the fixtures of dense prediction: weights, inputs and labels by name and seed, and how numbers agree.

Weights are filled under the published name of each entry (:func:`published_fill`), everything runs in float64 and in
evaluation mode. A check collects what differs in :class:`Differences` and goes on, so that one run shows everything.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WITHIN = 1e-8
"""Relative to max(1, expected): ten significant digits are printed, and the order of float64 sums may differ."""

IGNORED = 255
"""The label of pixels without a class."""


class Differences:
    """What differs between a fixture and this library: lines of text, and the number of comparisons."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.compared = 0

    def numbers(self, where: str, actual: object, expected: object, within: float = WITHIN) -> None:
        """Compare numbers, alone or in nested lists; None means not a number."""
        self.compared += 1
        wanted = np.asarray(expected, dtype=float)
        found = np.asarray(actual, dtype=float)
        if found.shape != wanted.shape:
            self.lines.append(f"{where}: {found.shape} numbers, not {wanted.shape}")
            return
        same = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
        with np.errstate(invalid="ignore"):
            gaps = np.where(same, 0.0, np.abs(found - wanted) / np.maximum(1, np.abs(wanted)))
        if not bool((gaps <= within).all()):  # not a number on one side fails, too
            worst = np.unravel_index(np.nanargmax(np.where(np.isnan(gaps), np.inf, gaps)), gaps.shape)
            place = f"[{', '.join(map(str, worst))}]" if worst else ""
            self.lines.append(
                f"{where}{place}: {found[worst]:.12g}, not {wanted[worst]:.12g}; off by {gaps[worst]:.1e}"
            )

    def equal(self, where: str, actual: object, expected: object) -> None:
        """Compare values that must be equal."""
        self.compared += 1
        if actual != expected:
            self.lines.append(f"{where}: {actual!r}, not {expected!r}")

    def summary(self, where: str, tensor: Tensor | None, expected: Mapping[str, object]) -> None:
        """Compare a tensor with its summary in a fixture."""
        if tensor is None:
            self.lines.append(f"{where}: there is no such tensor")
            return
        flat = tensor.detach().double().flatten()
        self.equal(f"{where}.shape", list(tensor.shape), expected["shape"])
        known: dict[str, Callable[[Sequence[float]], object]] = {
            "l2": lambda _: flat.norm().item(),
            "mean": lambda _: flat.mean().item() if flat.numel() else 0.0,
            "max_abs": lambda _: flat.abs().max().item() if flat.numel() else 0.0,
            "first": lambda row: flat[: len(row)].tolist(),
            "last": lambda row: flat[-len(row) :].tolist(),
        }
        self.fields(where, expected, (*known, "shape"))
        for name, measure in known.items():
            if name in expected:
                self.numbers(f"{where}.{name}", measure(expected[name]), expected[name])  # type: ignore[arg-type]

    def state(self, shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
        """Compare names and shapes of a state dict."""
        self.compared += 1
        for key in [key for key in expected if key not in shapes]:
            self.lines.append(f"state_dict: {key} {list(expected[key])} is missing")
        for key, shape in shapes.items():
            if key not in expected:
                self.lines.append(f"state_dict: {key} {list(shape)} should not be there")
            elif list(shape) != list(expected[key]):
                self.lines.append(f"state_dict: {key} is {list(shape)}, not {list(expected[key])}")

    def histogram(self, where: str, classes: Tensor, expected: Mapping[str, int]) -> None:
        """Compare how many pixels have each class."""
        found = {str(value): count for value, count in zip(*_counted(classes), strict=True)}
        self.equal(where, found, dict(expected))

    def fields(self, where: str, entry: Mapping[str, object], known: Sequence[str]) -> None:
        """Report fields that no check reads; texts are remarks."""
        for name, value in entry.items():
            if name not in known and not isinstance(value, str):
                self.lines.append(f"{where}: the field {name!r} is unknown, so it is not checked")


Check = Callable[[Mapping[str, Any], Differences], None]
"""Compares a file's content with this library."""


def checked(path: Path, kind: Callable[[Mapping[str, Any]], str | None], checks: Mapping[str, Check]) -> Differences:
    """Return what differs between a file and this library. An error is a difference, after those found before it.

    Args:
        path: the file.
        kind: returns the name of the check for a file's content, or None.
        checks: name -> check.
    """
    differences = Differences()
    try:
        document = json.loads(path.read_text())
        found = kind(document) if isinstance(document, dict) else None
        if found is None:
            differences.lines.append(f"the kind of this file is unknown; known are {', '.join(checks)}")
        else:
            checks[found](document, differences)
            if not differences.compared:
                differences.lines.append("nothing in this file was compared")
    except Exception as error:  # one bad file must not hide the results of the others
        differences.lines.append(f"{type(error).__name__}: {error}")
    return differences


def run_script(arguments: Sequence[str], check: Callable[[Path], Differences], usage: str | None) -> int:
    """Check files and print the results; return the exit status."""
    if not arguments:
        print(usage)
        return 2
    failed = 0
    for name in arguments:
        start = time.monotonic()
        differences = check(Path(name))
        failed += bool(differences.lines)
        verdict = f"FAILED, {len(differences.lines)} differences" if differences.lines else "ok"
        print(f"{name}: {verdict} ({differences.compared} comparisons, {time.monotonic() - start:.0f} s)", flush=True)
        for line in differences.lines:
            print(f"  {line}")
    return 1 if failed else 0


def _counted(classes: Tensor) -> tuple[list[int], list[int]]:
    values, counts = classes.unique(return_counts=True)
    return values.tolist(), counts.tolist()


def published_fill(module: nn.Module, published: Callable[[str], str]) -> nn.Module:
    """Fill every entry of a state dict by its published name (rule fill-v2); return the module, in float64.

    Args:
        module: any module; put into evaluation mode.
        published: our name of an entry -> its published name.
    """
    module.load_state_dict({key: filled(published(key), value) for key, value in module.state_dict().items()})
    return module.double().eval()


def filled(name: str, value: Tensor) -> Tensor:
    """Return the float32 numbers that belong to an entry of a state dict; counts and integers stay."""
    if name.endswith("num_batches_tracked") or not value.is_floating_point():
        return value
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    v = generator.standard_normal(size=tuple(value.shape))
    return torch.from_numpy(np.asarray(_numbers(name, v))).float()


def _numbers(name: str, v: np.ndarray) -> np.ndarray:
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(v)
    if name.endswith("running_mean"):
        return 0.1 * v
    if v.ndim >= 2:
        return v / np.sqrt(np.prod(v.shape[1:]))
    if name.endswith("bias"):
        return 0.1 * v
    if name.endswith("weight"):
        return 1 + 0.1 * v
    return 0.03 * (1 + 0.1 * v)


def images(size: Sequence[int], count: int = 1) -> Tensor:
    """Return images of the rule input-v1: (count, 3, H, W), float64 from float32."""
    return _normal(0, (count, 3, *size))


def features(shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return maps of the rule features-v1, float64 from float32."""
    return [_normal(1000 + level, shape) for level, shape in enumerate(shapes)]


def _normal(seed: int, shape: Sequence[int]) -> Tensor:
    numbers = np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape))
    return torch.from_numpy(numbers.astype(np.float32)).double()


def labels(classes: int, size: Sequence[int], count: int = 1) -> Tensor:
    """Return masks of the rule labels-v1: int64 (count, H, W), classes or 255, in squares of 8x8."""
    height, width = size
    coarse = (count, -(-height // 8), -(-width // 8))
    values = np.random.Generator(np.random.PCG64(7)).integers(0, classes + 1, size=coarse)
    mask = torch.from_numpy(values.repeat(8, 1).repeat(8, 2)[:, :height, :width])
    return mask.masked_fill(mask == classes, IGNORED).long()
