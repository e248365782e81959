"""Measure the speed of an exported model compared with its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from widefield import bench
from widefield.deploy._others import first_line, quiet
from widefield.deploy.runtime import Runtime
from widefield.report import Listing
from widefield.surgery.walk import copied


@dataclass(frozen=True)
class Speed:
    """Images per second of one way to run a model, on the CPU."""

    way: str
    """"eager", "compiled" (torch.compile), or a format."""
    batch_size: int
    images_per_second: float | None
    milliseconds: tuple[float, float, float] | None
    """Of one batch: 20th, 50th and 80th percentile."""
    note: str = ""
    """Why there is no measurement."""

    def row(self) -> dict[str, str]:
        """Return this as a table row."""
        times = "-" if self.milliseconds is None else "{1:.2f} ({0:.2f}-{2:.2f})".format(*self.milliseconds)
        return {
            "way": self.way,
            "batch": str(self.batch_size),
            "images/s": self.note if self.images_per_second is None else f"{self.images_per_second:.1f}",
            "ms a batch (p20-p80)": times,
        }


def measure_throughput(
    model: nn.Module,
    exported: Runtime,
    example_input: Tensor,
    batch_size: int,
    *,
    compiled: bool = True,
    repeats: int = 9,
) -> Listing[Speed]:
    """Time a model, the same under torch.compile, and an exported one, in turns, with PyTorch's number of threads.

    Args:
        model: in evaluation mode; a copy runs on the CPU.
        exported: see :func:`widefield.deploy.load`.
        example_input: (N, C, H, W); gives the size of the images.
        batch_size: images at a time.
        compiled: also time ``torch.compile``, which takes some time to compile.
        repeats: timings of each.
    """
    x = torch.randn(batch_size, *example_input.shape[1:], generator=torch.Generator().manual_seed(0))
    model = copied(model).cpu()
    calls: dict[str, Callable[[], object]] = {"eager": _without_gradients(model, x)}
    missing: dict[str, str] = {}
    if compiled:
        call = _without_gradients(torch.compile(model), x)
        try:
            with quiet():
                call()
            calls["compiled"] = call
        except Exception as error:  # no compiler, or code that it does not support
            missing["compiled"] = first_line(error)
    calls[exported.format] = lambda: exported(x)
    rows = bench.measure(calls, repeats=repeats, shortest_s=0.1)
    found = [
        Speed(way, batch_size, batch_size / row.p50, (1e3 * row.p20, 1e3 * row.p50, 1e3 * row.p80))
        for way, row in rows.items()
    ]
    return Listing(found + [Speed(way, batch_size, None, None, note) for way, note in missing.items()])


def _without_gradients(model: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return model(x)

    return call
