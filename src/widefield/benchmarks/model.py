"""Measure throughput and memory of timm's models, stock and with our operators (``widefield bench model NAME...``).

- ``inference``: forward under ``torch.inference_mode()``, in evaluation mode.
- ``step``: forward, cross-entropy and backward in training mode, gradients to all parameters; no optimizer.

Each is measured for timm's model and for the same model with its depthwise convolutions replaced by
:class:`widefield.surgery.FastDepthwise`, in both memory formats. All four are interleaved. Memory is the peak of a call
beyond weights and inputs; PyTorch counts it on CUDA devices only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import timm
import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

import widefield.models  # noqa: F401  registers our networks
from widefield import _checks, bench
from widefield.benchmarks import record
from widefield.benchmarks.record import Record, Row
from widefield.benchmarks.settings import LAYOUTS, Settings
from widefield.surgery import FastDepthwise, convert

MODES = ("inference", "step")

Models = dict[str, nn.Module]


def build(name: str) -> tuple[Models, str | None]:
    """Return {"timm": model, "FastDepthwise": converted model}, and the reason if it could not be converted."""
    model = timm.create_model(name)
    try:
        return {"timm": model, "FastDepthwise": convert(model, FastDepthwise())}, None
    except ValueError as error:  # nothing to convert
        return {"timm": model}, str(error).partition(":")[0]


def calls(models: Models, x: Tensor, mode: str) -> dict[str, Callable[[], object]]:
    """Return "timm NCHW", "FastDepthwise channels_last" and so on -> a call of one mode. Models are copied."""
    found: dict[str, Callable[[], object]] = {}
    for layout, memory_format in LAYOUTS.items():
        images = x.contiguous(memory_format=memory_format)
        for name, model in models.items():
            own = copy.deepcopy(model).to(memory_format=memory_format)
            found[f"{name} {layout}"] = call(own.train(mode == "step"), images, mode)
    return found


def call(model: nn.Module, x: Tensor, mode: str) -> Callable[[], object]:
    """Return a call of one mode. The caller sets the model's mode: training mode for "step"."""

    def infer() -> None:
        with torch.inference_mode():
            model(x)

    def step() -> None:
        y = model(x)
        labels = torch.arange(len(x), device=x.device) % y.shape[1]
        F.cross_entropy(y.float(), labels).backward()
        model.zero_grad(set_to_none=True)  # otherwise the next call would appear to need less memory

    return step if mode == "step" else infer


COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda r: str(r["model"]),
    "parameters": lambda r: f"{r['parameters'] / 1e6:.2f}M",
    "MACs": lambda r: f"{r['macs'] / 1e9:.3f}G",
    "mode": lambda r: str(r["mode"]),
    "layout": lambda r: str(r["layout"]),
    "layers": lambda r: str(r["layers"]),
    "ms (p20-p80)": lambda r: record.milliseconds(r["time"]),
    "images/s": lambda r: f"{r['images_per_s']:.1f}",
    "timm, same layout / this": lambda r: f"{r['same_layout']:.2f}",
    "timm, better layout / this": lambda r: f"{r['better_layout']:.2f}",
    "peak memory": lambda r: "-" if r["time"]["peak_bytes"] is None else f"{r['time']['peak_bytes'] / 2**20:.0f} MiB",
}


def rows_of(name: str, mode: str, batch: int, measured: dict[str, bench.Row], cost: bench.Cost) -> list[Row]:
    """Return rows from measurements of :func:`calls`. MACs are per image."""
    best = min(measured[f"timm {layout}"].p50 for layout in LAYOUTS)
    rows = []
    for key, row in measured.items():
        layers, layout = key.split()
        rows.append(
            {
                "label": f"{name}, {mode}, {key}",
                "model": name,
                "parameters": cost.parameters,
                "macs": cost.macs,
                "mode": mode,
                "layout": layout,
                "layers": layers,
                "batch": batch,
                "time": row.to_dict(),
                "images_per_s": batch / row.p50,
                "same_layout": measured[f"timm {layout}"].p50 / row.p50,
                "better_layout": best / row.p50,
            }
        )
    return rows


def run(settings: Settings, names: Sequence[str], *, batch_size: int | None = None, size: int | None = None) -> None:
    """Run the benchmark: print rows and write files to ``settings.out``.

    Args:
        settings: of the measurement; models are cast to its dtype.
        names: models in timm's registry, ours included.
        batch_size: 64 on CUDA devices when None, 8 on CPUs.
        size: side of the images in pixels; the one in timm's configuration of the model when None.

    Raises:
        ValueError: an unknown name, numbers out of range.
    """
    every = timm.list_models()
    for name in names:
        if name not in every:
            raise ValueError(f"no model is called {name!r}.{_checks.did_you_mean(name, every)}")
    count = _checks.integer("batch_size", (8 if settings.device == "cpu" else 64) if batch_size is None else batch_size)
    if size is not None:
        size = _checks.integer("size", size)
    out = Record("model", settings)
    out.fact(
        f"Batch {count}. MACs are of one image." + ("" if settings.device == "cuda" else " Memory is not counted.")
    )
    table = out.table("Models", COLUMNS)
    with out.until_interrupted():
        for name in names:
            config = get_pretrained_cfg(name)
            shape = config.input_size if config else (3, 224, 224)
            shape = (shape[0], size, size) if size else shape
            models, reason = build(name)
            if reason is not None:
                out.fact(f"{name} as timm makes it only: {reason}.")
            models = {key: model.to(settings.device, settings.torch_dtype) for key, model in models.items()}
            x = torch.randn(count, *shape).to(settings.device, settings.torch_dtype)
            cost = bench.cost(models["timm"].eval(), x[:1])
            for mode in MODES:
                for row in rows_of(name, mode, count, settings.measure(calls(models, x, mode)), cost):
                    out.add(table, row)
    out.finish([])
