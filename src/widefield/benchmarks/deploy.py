"""Measure the cost of routing in deployment: MoRF networks compared with plain ones (``widefield bench deploy``).

All forms of a network are measured in onnxruntime and in PyTorch, interleaved:

- "plain": timm's network without mixtures.
- "branches", "per-sample": the two graphs of a reparameterized MoRF network (:data:`widefield.deploy.ROUTING`).
- "specialized": the MoRF network with static routing, which leaves one convolution per layer, of the size of the
  largest expert.

Weights are random, since they do not affect the time.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import widefield.models  # noqa: F401  registers our networks
from widefield import _checks, bench
from widefield.benchmarks import record
from widefield.benchmarks.record import Record, Row, bar
from widefield.benchmarks.settings import Settings
from widefield.deploy import export, load
from widefield.surgery import NothingToFuseError, reparameterize, specialize

RUNTIMES = ("onnxruntime", "eager")
PLAIN = "plain"
LEAST = 0.9
"""Required speed of a specialized network in onnxruntime, as a fraction of the plain network's."""


def forms(name: str, x: Tensor) -> dict[str, tuple[nn.Module, str]]:
    """Return form -> (network in evaluation mode, routing of its export), the plain form first."""
    plain = timm.create_model(name.removeprefix("morf_")).eval()
    with contextlib.suppress(NothingToFuseError):  # ConvNeXt has no batch norms
        plain = reparameterize(plain, x)
    routed = reparameterize(timm.create_model(name).eval(), x)
    return {
        PLAIN: (plain, "branches"),
        "branches": (routed, "branches"),
        "per-sample": (routed, "per-sample"),
        "specialized": (reparameterize(specialize(timm.create_model(name).eval(), [x]), x), "branches"),
    }


COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda r: str(r["model"]),
    "form": lambda r: str(r["form"]),
    "batch": lambda r: str(r["batch"]),
    "parameters": lambda r: f"{r['parameters'] / 1e6:.2f}M",
    "largest difference": lambda r: f"{r['difference']:.0e}",
    "onnxruntime, ms (p20-p80)": lambda r: record.milliseconds(r["onnxruntime"]),
    "plain / this": lambda r: f"{r['onnxruntime_ratio']:.2f}",
    "eager, ms (p20-p80)": lambda r: record.milliseconds(r["eager"]),
    "plain / this, eager": lambda r: f"{r['eager_ratio']:.2f}",
}

SHORT = ("form", "batch", "onnxruntime, ms (p20-p80)", "plain / this", "eager, ms (p20-p80)", "plain / this, eager")
"""Columns of the summary at the head of the Markdown file."""


def rows_of(
    name: str,
    batch: int,
    costs: dict[str, bench.Cost],
    differences: dict[str, float],
    measured: dict[str, dict[str, bench.Row]],
) -> list[Row]:
    """Return one row per form from the measurements, runtime -> form -> row."""
    times = {runtime: record.times(rows) for runtime, rows in measured.items()}
    return [
        {
            "label": f"{name}, {form}, batch {batch}",
            "model": name,
            "form": form,
            "batch": batch,
            "parameters": cost.parameters,
            "macs": cost.macs,
            "difference": differences[form],
            **{runtime: times[runtime][form] for runtime in RUNTIMES},
            **{f"{runtime}_ratio": measured[runtime][PLAIN].p50 / measured[runtime][form].p50 for runtime in RUNTIMES},
        }
        for form, cost in costs.items()
    ]


def run(
    settings: Settings,
    *,
    names: Sequence[str] = ("morf_convnext_tiny",),
    batch_sizes: Sequence[int] = (1, 8),
    size: int = 224,
) -> None:
    """Run the benchmark: print rows and write files to ``settings.out``.

    Args:
        settings: of the measurement; the device is the CPU and the dtype float32.
        names: MoRF networks in timm's registry.
        batch_sizes: numbers of images per call.
        size: side of the images in pixels.

    Raises:
        ValueError: another device or dtype, an unknown name, numbers out of range.
    """
    if settings.device != "cpu" or settings.dtype != "float32":
        raise ValueError(f"exports are measured on the CPU in float32; got {settings.device}, {settings.dtype}.")
    known = timm.list_models("morf_*")
    chosen = [_checks.choice("every entry of names", name, known) for name in names]
    counts = [_checks.integer("every entry of batch_sizes", count) for count in batch_sizes]
    size = _checks.integer("size", size, minimum=32)
    out = Record("deploy", settings)
    out.fact(f"{size}x{size} pixels. Largest differences are those of the export, in units of the output's scale.")
    table = out.table("In onnxruntime and eager", COLUMNS)
    with out.until_interrupted(), tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            torch.manual_seed(0)
            models = forms(name, torch.randn(2, 3, size, size))
            costs = {form: bench.cost(model, torch.randn(1, 3, size, size)) for form, (model, _) in models.items()}
            exported, differences = {}, {}
            for form, (model, routing) in models.items():
                path = Path(folder) / f"{form}.onnx"
                differences[form] = export(model, path, torch.randn(2, 3, size, size), routing=routing).relative
                exported[form] = load(path)
            for batch in counts:
                x = torch.randn(batch, 3, size, size)
                calls = {("onnxruntime", form): _call(model, x) for form, model in exported.items()}
                calls |= {
                    ("eager", form): _call(model, x) for form, (model, _) in models.items() if form != "per-sample"
                }
                found = settings.measure({" ".join(key): call for key, call in calls.items()})
                measured: dict[str, dict[str, bench.Row]] = {runtime: {} for runtime in RUNTIMES}
                for (runtime, form), timed in zip(calls, found.values(), strict=True):
                    measured[runtime][form] = timed
                measured["eager"]["per-sample"] = measured["eager"]["branches"]  # one model, two graphs
                for row in rows_of(name, batch, costs, differences, measured):
                    out.add(table, row)
    specialized = [row for row in table.rows if row["form"] == "specialized"]
    held = bar("plain / specialized, onnxruntime", specialized, lambda r: r["onnxruntime_ratio"], at_least=LEAST)
    short = [{heading: COLUMNS[heading](row) for heading in SHORT} for row in table.rows]
    out.finish([held], [("Milliseconds, and the plain network's time over this one's", short)] if short else ())


def _call(model: Callable[[Tensor], Any], x: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return model(x)

    return call
