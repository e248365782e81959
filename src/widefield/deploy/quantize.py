"""Post-training static quantisation to 8 bits, in onnxruntime, and what it costs: accuracy, routing, thin kernels.

Convolutions and matrix products compute in 8 bits: weights signed, with a scale for every output channel, activations
unsigned, with a scale and a zero that are read off calibration images. Routers stay in float32, as they cost next to
nothing and decide over everything behind them.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from widefield import _checks, bench
from widefield._files import checksum, staged
from widefield.deploy import _int8
from widefield.deploy._onnx import output_names, to_onnx
from widefield.deploy._trace import bare, prepared, traced
from widefield.deploy.export import PACKAGES, write_report
from widefield.deploy.runtime import Runtime, load
from widefield.nn.router import Router
from widefield.surgery.outputs import Change, Tally, batches
from widefield.surgery.walk import copied, unmerged

log = logging.getLogger(__name__)

OUTLIERS = ("warn", "refuse", "float")
CALIBRATION = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
NOISY = 30.0
"""Signal-to-noise ratio in dB below which a kernel has outliers: rounding moves its output by more than 3%. A kernel of
Gaussian numbers has 40 to 45; that of a peak and nothing else, of K x K taps, 53 - 20 log10(K)."""


@dataclass(frozen=True)
class QuantizedKernel:
    """One weight, rounded to 8 bits with a scale for each output channel."""

    name: str
    shape: tuple[int, ...]
    noise_ratio: float | None
    """Signal-to-noise ratio of the channel that has the lowest, dB: energy of the weights over that of the rounding.
    None: no weight is rounded."""
    peak: float
    """Largest absolute value over the root mean square, in the same channel."""
    vanished: float
    """Share of the layer's non-zero taps that round to zero: what the kernel sees less."""
    kept_float: bool


@dataclass(frozen=True)
class Flips:
    """How often rounding changes which experts an image gets."""

    name: str
    rate: float
    """Share of images whose largest routing weight (soft) or set of chosen experts (hard) is another."""


@dataclass(frozen=True)
class Quantization:
    """What became of a model in 8 bits: the JSON file that stands beside it."""

    path: str
    files: dict[str, str]
    bytes_before: int
    bytes_after: int
    calibration: str
    change: Change
    """The int8 model against the one in float32, over the images given."""
    flips: tuple[Flips, ...]
    kernels: tuple[QuantizedKernel, ...]
    environment: dict[str, str]

    @property
    def by_noise(self) -> tuple[QuantizedKernel, ...]:
        """The kernels, those that rounding spoils most first."""
        return tuple(sorted(self.kernels, key=_ratio))

    @property
    def outliers(self) -> tuple[QuantizedKernel, ...]:
        """The kernels with outliers, worst first."""
        return tuple(kernel for kernel in self.by_noise if _ratio(kernel) < NOISY)

    @property
    def flip_rate(self) -> float | None:
        """Share of all (image, mixture) whose routing flips; None without mixtures."""
        return sum(f.rate for f in self.flips) / len(self.flips) if self.flips else None

    def rows(self) -> list[dict[str, str]]:
        """Return one row for every kernel, worst first."""
        return [
            {
                "layer": k.name,
                "shape": "x".join(map(str, k.shape)),
                "signal to noise": "exact" if k.noise_ratio is None else f"{k.noise_ratio:.1f} dB",
                "peak / rms": f"{k.peak:.1f}",
                "taps rounded to 0": f"{100 * k.vanished:.1f} %",
                "computes in": "float32" if k.kept_float else "int8",
            }
            for k in self.by_noise
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [
            f"{self.path}: {self.bytes_before / 2**20:.1f} to {self.bytes_after / 2**20:.1f} MiB",
            str(self.change),
        ]
        if self.flip_rate is not None:
            parts.append(f"routing flips for {self.flip_rate:.2%}")
        return ", ".join(parts)


def quantize(
    model: nn.Module,
    path: str | Path,
    loader: Iterable[Any],
    *,
    images: Iterable[Any] | None = None,
    calibration: str = "minmax",
    outliers: str = "warn",
    reduce_range: bool = False,
) -> Quantization:
    """Write an int8 ONNX model, measured against the one in float32, and the report beside it (PATH.json).

    Args:
        model: in evaluation mode, re-parameterised, float32; untouched.
        path: ``.onnx``.
        loader: calibration images, some hundreds, as in training but not augmented; all of one size. See
            :func:`widefield.surgery.outputs.batches`.
        images: what to measure on, with labels if the accuracy is to be known. Default: ``loader``, which flatters.
        calibration: how the range of activations is read off: "minmax", "entropy" or "percentile" (99.999).
        outliers: what to do about kernels of which less than 30 dB are left (:data:`NOISY`): "warn", "refuse", or leave
            those layers in "float".
        reduce_range: weights in 7 bits, for x86 processors before VNNI, whose sums of byte products saturate.

    Raises:
        RuntimeError: the model is in training mode.
        ValueError: layers that are not merged yet, another suffix, an unknown word, a model that cannot be exported or
            quantised; with ``outliers="refuse"`` kernels that have some, each with its figure.
        TypeError: parameters that are not float32, or a loader that is an iterator.
        OSError: the path cannot be written to.
    """
    path = Path(path)
    _checks.choice("the suffix of path", path.suffix, (".onnx",))
    _checks.choice("calibration", calibration, tuple(CALIBRATION))
    _checks.choice("outliers", outliers, OUTLIERS)
    model = bare(model)
    twin = prepared(model, "branches", "onnx")
    left = unmerged(model)
    if left:
        raise ValueError(f"{left[0]} is not merged, and is to be rounded as it computes: call reparameterize first.")
    x = next(batches(loader, twin))[0]
    probe = _Probe(twin)
    reference = copied(model).cpu()
    with staged(path.parent) as stage, tempfile.TemporaryDirectory() as elsewhere:
        plain, written = Path(elsewhere) / "float32.onnx", stage / path.name
        with torch.no_grad():
            to_onnx(traced(probe, x, ("batch",)), plain, None)
            names = output_names(reference(x))
        kernels = _judged(_int8.weights(plain), outliers, 64 if reduce_range else 127)
        floating = {kernel.name for kernel in kernels if kernel.kept_float}
        shown = (found for found, _ in batches(loader, twin))
        _int8.quantize(plain, written, shown, CALIBRATION[calibration], floating, seven_bits=reduce_range)
        change, flips = _measured(reference, probe, load(written), loader if images is None else images)
        _int8.drop_outputs(written, names)
        done = Quantization(
            path.name,
            {part.name: checksum(part) for part in sorted(stage.iterdir())},
            _bytes(Path(elsewhere)),
            _bytes(stage),
            calibration,
            change,
            flips,
            kernels,
            bench.environment(beside=PACKAGES["onnx"]),
        )
        write_report(stage / f"{path.name}.json", done.to_dict())
    return done


def _bytes(folder: Path) -> int:
    return sum(part.stat().st_size for part in folder.iterdir())


class _Probe(nn.Module):
    """A model that returns, after its outputs, the routing weights of every call of a mixture."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.outputs = 0
        self.names: list[str] = []
        self.chosen: list[int | None] = []
        """For each routing: how many experts a hard router chooses, or None for soft routing."""
        self._weights: list[Tensor] = []
        for name, module in model.named_modules():
            if isinstance(module, Router):
                module.register_forward_hook(partial(self._see, name.rpartition(".")[0]))
        self.eval()

    def _see(self, name: str, router: Router, args: Any, weights: Tensor) -> None:
        self.names.append(name)
        self.chosen.append(router.top_k if router.routing == "hard" else None)
        self._weights.append(weights)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, C, H, W) -> the model's outputs, then routing weights (N, n)."""
        self.names, self.chosen, self._weights = [], [], []
        found = [leaf for leaf in tree_leaves(self.model(x)) if isinstance(leaf, Tensor)]
        self.outputs = len(found)
        return (*found, *self._weights)


def _judged(weights: Iterable[_int8.Weight], outliers: str, steps: int) -> tuple[QuantizedKernel, ...]:
    """Measure what rounding does to every weight; warn, refuse or leave in float as asked."""
    kernels = tuple(_rounded(weight, steps, keep=outliers == "float") for weight in weights)
    noisy = sorted((kernel for kernel in kernels if _ratio(kernel) < NOISY), key=_ratio)
    if noisy and outliers != "float":
        told = "; ".join(
            f"{k.name} ({_ratio(k):.0f} dB, peak {k.peak:.0f} times the rms, {100 * k.vanished:.0f} % of its taps "
            "round to 0)"
            for k in noisy[:5]
        )
        text = f"{len(noisy)} kernels have outliers, and 8 bits leave little of the rest: {told}. "
        text += "outliers='float' leaves those layers in float32."
        if outliers == "refuse":
            raise ValueError(text)
        log.warning(text)
    return kernels


def _ratio(kernel: QuantizedKernel) -> float:
    return math.inf if kernel.noise_ratio is None else kernel.noise_ratio


def _rounded(weight: _int8.Weight, steps: int, keep: bool) -> QuantizedKernel:
    values = weight.values.double()  # (channels, numbers)
    peak = values.abs().amax(1, keepdim=True)
    step = torch.where(peak > 0, peak / steps, 1.0)
    rounded = (values / step).round() * step
    energy, noise = values.square().sum(1), (values - rounded).square().sum(1)
    ratio = torch.where(noise > 0, 10 * torch.log10(energy / noise), torch.inf)
    worst = int(ratio.argmin())
    rms = values[worst].square().mean().sqrt().item()
    alive = values != 0
    decibels = float(ratio[worst])
    return QuantizedKernel(
        weight.name,
        weight.shape,
        decibels if math.isfinite(decibels) else None,
        peak[worst].item() / rms if rms else 0.0,
        float(((rounded == 0) & alive).sum() / alive.sum()) if alive.any() else 0.0,
        keep and decibels < NOISY,
    )


def _measured(
    model: nn.Module, probe: _Probe, rounded: Runtime, images: Iterable[Any]
) -> tuple[Change, tuple[Flips, ...]]:
    """Compare outputs with the model's, and routing weights with the probe's."""
    tally, flipped, count = Tally(), Counter[str](), 0
    calls: Counter[str] = Counter()
    with torch.no_grad():
        for x, labels in batches(images, model):
            weights, theirs = probe(x)[probe.outputs :], rounded(x)
            theirs = theirs if isinstance(theirs, tuple) else (theirs,)
            ours = [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor)]
            tally.add(ours, list(theirs[: probe.outputs]), labels)
            count += len(x)
            calls = Counter(probe.names)
            routing = zip(probe.names, probe.chosen, weights, theirs[probe.outputs :], strict=True)
            for name, top_k, before, after in routing:
                a, b = (w.topk(top_k or 1, dim=1).indices.sort(1).values for w in (before, after))
                flipped[name] += int((a != b).any(1).sum())
    return tally.change(), tuple(Flips(name, flipped[name] / count / calls[name]) for name in calls)
