"""Measure the cost of token mixers: the same MetaFormer with each mixer in turn (``widefield bench mixers``).

- ``inference``: a forward pass of the merged network.
- ``step``: forward and backward passes of the training network.

Both are in NCHW. All mixers are timed in one run, interleaved. Ratios are the plain 7x7 depthwise convolution's time
over a mixer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import nn

import widefield.models  # noqa: F401  registers our networks
from widefield import _checks, bench
from widefield.benchmarks import record
from widefield.benchmarks.model import MODES, call
from widefield.benchmarks.record import Record, Row
from widefield.benchmarks.settings import Settings
from widefield.nn.mixers import TOKEN_MIXERS
from widefield.surgery import fuse_layers

PEER = "conv"

COLUMNS: dict[str, Callable[[Row], str]] = {
    "mixer": lambda r: str(r["mixer"]),
    "parameters": lambda r: f"{r['parameters'] / 1e6:.2f}M",
    "merged": lambda r: f"{r['merged_parameters'] / 1e6:.2f}M",
    "MACs": lambda r: f"{r['macs'] / 1e9:.3f}G",
    "inference, ms": lambda r: record.milliseconds(r["inference"]),
    "images/s": lambda r: f"{r['images_per_s']:.1f}",
    "conv / this, inference": lambda r: f"{r['inference_ratio']:.2f}",
    "step, ms": lambda r: record.milliseconds(r["step"]),
    "conv / this, step": lambda r: f"{r['step_ratio']:.2f}",
}


def networks(name: str, mixers: Sequence[str]) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Return mixer -> (training network, merged network)."""
    pairs = {}
    for mixer in mixers:
        model = timm.create_model(name, token_mixer=mixer)
        merged, _ = fuse_layers(timm.create_model(name, token_mixer=mixer).eval())
        pairs[mixer] = model.train(), merged
    return pairs


def rows_of(
    batch: int, counts: Mapping[str, Sequence[bench.Cost]], measured: Mapping[str, Mapping[str, bench.Row]]
) -> list[Row]:
    """Return rows from counts (training form, merged form) and measurements (mode -> mixer -> row)."""
    times = {mode: record.times(rows) for mode, rows in measured.items()}
    return [
        {
            "mixer": mixer,
            "parameters": trained.parameters,
            "merged_parameters": merged.parameters,
            "macs": merged.macs,
            "batch": batch,
            **{mode: times[mode][mixer] for mode in MODES},
            "images_per_s": batch / measured["inference"][mixer].p50,
            **{f"{mode}_ratio": measured[mode][PEER].p50 / measured[mode][mixer].p50 for mode in MODES},
        }
        for mixer, (trained, merged) in counts.items()
    ]


def run(
    settings: Settings,
    *,
    name: str = "metaformer_tiny",
    mixers: Sequence[str] | None = None,
    batch_size: int | None = None,
    size: int = 224,
) -> None:
    """Run the benchmark: print rows and write files to ``settings.out``.

    Args:
        settings: of the measurement; networks are cast to its dtype.
        name: a MetaFormer in timm's registry.
        mixers: names of :data:`widefield.nn.mixers.TOKEN_MIXERS`; all when None. The peer is always included.
        batch_size: 64 on CUDA devices when None, 4 on CPUs.
        size: side of the images in pixels.

    Raises:
        ValueError: an unknown name, numbers out of range.
    """
    known = timm.list_models("metaformer_*")
    _checks.choice("name", name, known)
    chosen = [_checks.choice("every entry of mixers", m, tuple(TOKEN_MIXERS)) for m in mixers or TOKEN_MIXERS]
    chosen = [PEER, *(mixer for mixer in chosen if mixer != PEER)]
    count = _checks.integer("batch_size", (4 if settings.device == "cpu" else 64) if batch_size is None else batch_size)
    size = _checks.integer("size", size, minimum=32)
    out = Record("mixers", settings)
    out.fact(f"{name}, batch {count}, {size}x{size} pixels. MACs are of one image and the merged network.")
    place: dict[str, Any] = {"device": settings.device, "dtype": settings.torch_dtype}
    pairs = {m: (a.to(**place), b.to(**place)) for m, (a, b) in networks(name, chosen).items()}
    x = torch.randn(count, 3, size, size).to(**place)
    counts = {m: [bench.cost(model.eval(), x[:1]) for model in pair] for m, pair in pairs.items()}
    table = out.table("Token mixers", COLUMNS)
    with out.until_interrupted():
        measured = {
            mode: settings.measure(
                {m: call(pair[0].train() if mode == "step" else pair[1], x, mode) for m, pair in pairs.items()}
            )
            for mode in MODES
        }
        for row in rows_of(count, counts, measured):
            out.add(table, row)
    out.finish([])
