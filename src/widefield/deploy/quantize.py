"""Quantize trained models to 8 bits with onnxruntime, and report the effect on accuracy, routing, layers and kernels.

Quantization is static. Convolutions and matrix products compute in 8 bits: weights are signed, with one scale per
output channel; activations are unsigned, with a scale and a zero point from calibration images. Routers stay in
float32, as they cost little and everything after them depends on their choice.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from widefield import _checks, bench
from widefield._extras import need
from widefield._files import checksum, staged
from widefield.dense import HeatmapPose, ServedPose
from widefield.deploy import _balance, _graph, _int8
from widefield.deploy._ablation import Ablation
from widefield.deploy._dense import heads_of, is_detector, served, traceable
from widefield.deploy._onnx import output_names, to_onnx
from widefield.deploy._trace import bare, prepared, traced
from widefield.deploy.export import PACKAGES, outputs_of, sizes_of
from widefield.deploy.info import ModelInfo, collected, to_texts
from widefield.deploy.record import Deployed, input_of
from widefield.deploy.runtime import Runtime, load
from widefield.nn.router import Router
from widefield.surgery.compare import Difference, Tally
from widefield.surgery.inputs import batches
from widefield.surgery.walk import begin, copied, unmerged

log = logging.getLogger(__name__)

OUTLIERS = ("warn", "refuse", "float")
CALIBRATION = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
NOISY = 30.0
"""Signal-to-noise ratio in dB below which a kernel counts as having outliers: rounding changes its output by more than
3 %. A Gaussian kernel has 40 to 45; one with a single peak and K x K taps has 53 - 20 log10(K).
"""


LOSSY = 0.1
"""Relative RMS change of the outputs above which the responsible layers are logged."""


@dataclass(frozen=True)
class RoundedLayer:
    """Effect of rounding one layer, its weights and its output, on the model."""

    name: str
    operator: str
    """ONNX operator of layers with weights, or of sums read in 8 bits; "input" for the images."""
    span: tuple[float, float] | None
    """Smallest and largest value of the rounded output; None if the output stays in float32."""
    change: float
    """Relative RMS change of the model's outputs if only this layer is rounded."""


@dataclass(frozen=True)
class QuantizedKernel:
    """One weight, rounded to 8 bits with one scale per output channel."""

    name: str
    shape: tuple[int, ...]
    noise_ratio: float | None
    """Signal-to-noise ratio of the worst channel in dB: energy of the weights over that of the rounding error. None if
    rounding is exact.
    """
    peak: float
    """Largest absolute value over the root mean square, in the same channel."""
    vanished: float
    """Share of the layer's non-zero taps that round to zero."""
    kept_float: bool


@dataclass(frozen=True)
class Flips:
    """How often rounding changes which experts an image gets."""

    name: str
    rate: float
    """Share of images whose largest routing weight (soft) or set of chosen experts (hard) changes."""


@dataclass(frozen=True, kw_only=True)
class Quantization(Deployed):
    """A model in 8 bits, compared with its float32 form.

    Attributes:
        bytes_before: size of the float32 ONNX model.
        calibration: how activation ranges were read off.
        change: difference between the int8 and the float32 model on the images given.
        flips: how often the routing of each mixture changes.
        kernels: effect of rounding on each weight.
        layers: effect of rounding each layer alone, in the order of the graph; empty if not measured.
    """

    bytes_before: int
    calibration: str
    change: Difference
    flips: tuple[Flips, ...]
    kernels: tuple[QuantizedKernel, ...]
    layers: tuple[RoundedLayer, ...]

    @property
    def by_change(self) -> tuple[RoundedLayer, ...]:
        """The layers, ordered by how much their rounding changes the outputs, largest first."""
        return tuple(sorted(self.layers, key=lambda layer: -layer.change))

    @property
    def by_noise(self) -> tuple[QuantizedKernel, ...]:
        """The kernels, ordered by signal-to-noise ratio, worst first."""
        return tuple(sorted(self.kernels, key=_ratio))

    @property
    def outliers(self) -> tuple[QuantizedKernel, ...]:
        """The kernels with outliers, worst first."""
        return tuple(kernel for kernel in self.by_noise if _ratio(kernel) < NOISY)

    @property
    def flip_rate(self) -> float | None:
        """Share of all (image, mixture) pairs whose routing changes; None without mixtures."""
        return sum(f.rate for f in self.flips) / len(self.flips) if self.flips else None

    def rows(self) -> list[dict[str, str]]:
        """Return one row per kernel, worst first."""
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

    def layer_rows(self, count: int | None = None) -> list[dict[str, str]]:
        """Return one row per layer, largest effect first; at most ``count``."""
        return [
            {
                "layer": layer.name,
                "operator": layer.operator,
                "output from": "float32" if layer.span is None else f"{layer.span[0]:.3g}",
                "to": "float32" if layer.span is None else f"{layer.span[1]:.3g}",
                "change of the outputs": f"{layer.change:.4f}",
            }
            for layer in self.by_change[:count]
        ]

    def summary(self) -> str:
        """Return sizes and the change of outputs in one line."""
        parts = [
            f"{self.path}: {self.bytes_before / 2**20:.1f} to {self.bytes / 2**20:.1f} MiB",
            self.change.summary(),
        ]
        if self.flip_rate is not None:
            parts.append(f"routing flips for {self.flip_rate:.2%}")
        if self.layers:
            worst = self.by_change[0]
            parts.append(f"the layer whose rounding costs most is {worst.name} ({worst.change:.2g} alone)")
        return ", ".join(parts)


@_checks.guided
def quantize(
    model: nn.Module,
    path: str | Path,
    loader: Iterable[Any],
    *,
    images: Tensor | Iterable[Any] | None = None,
    dynamic: Sequence[str] = ("batch",),
    calibration: str = "minmax",
    outliers: str = "warn",
    keep: Sequence[str] = (),
    equalize: bool = False,
    compare_layers: int = 4,
    reduce_range: bool = False,
    classes: Sequence[str] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    info: ModelInfo | None = None,
) -> Quantization:
    """Write an int8 ONNX model, compare it with the float32 model, and write the record next to it (PATH.json).

    Activation ranges that a later clamp makes unreachable are removed before rounding. The mean error of rounded
    weights is subtracted from the biases (Nagel et al., ICCV 2019, section 4.2).

    Of detectors and pose models, backbone and neck are rounded; the heads stay in float32, and the last non-maximum
    suppression, or decoding, is inside.

    Args:
        model: in evaluation mode, reparameterized, float32; not modified.
        path: ``.onnx``.
        loader: calibration images, some hundreds, preprocessed as in training but not augmented. See
            :func:`widefield.surgery.inputs.batches`.
        images: images to compare on, with labels for accuracy, masks for mean IoU, boxes for box AP, or key points for
            PCK. Default: those of ``loader``, on which the results are too good.
        dynamic: sizes that may change, as in :func:`widefield.deploy.export`; "batch" is always one, since calibration
            runs image by image. Without "size", all images must have the size of the first batch.
        calibration: how activation ranges are read off: "minmax", "entropy" or "percentile" (99.999).
        outliers: treatment of kernels that keep less than 30 dB (:data:`NOISY`): "warn", "refuse", or leave those
            layers in "float".
        keep: names of layers to leave in float32, as in the record.
        equalize: first scale the channels between two convolutions to similar sizes (the same paper, section 4.1).
            This helps where small channels stand next to large ones. It needs calibration images as varied as those in
            use, or activations saturate: compare on held-out ``images``.
        compare_layers: number of images on which to measure the effect of rounding each layer alone; this takes as
            many runs per layer. 0: skip.
        reduce_range: 7-bit weights, for x86 processors without VNNI, whose sums of byte products saturate.
        classes, normalization, info: see :func:`widefield.deploy.export`.

    Returns:
        The record. ``str()`` and notebooks show it; :meth:`Quantization.to_dict` is the JSON file.

    Raises:
        RuntimeError: the model is in training mode.
        ValueError: unmerged layers, unknown suffix, option or layer; the model cannot be exported or quantized; with
            ``outliers="refuse"``, kernels with outliers, each with its figure.
        TypeError: parameters are not float32, or the loader is an iterator.
        OSError: the path cannot be written.
        ModuleNotFoundError: a package of the extra [export] is not installed.
    """
    path = Path(path)
    _checks.choice("the suffix of path", path.suffix, (".onnx",))
    need(*PACKAGES["onnx"])
    _checks.choice("calibration", calibration, tuple(CALIBRATION))
    _checks.choice("outliers", outliers, OUTLIERS)
    compare_layers = _checks.integer("compare_layers", compare_layers, minimum=0)
    model = bare(model)
    begin(model, "what is rounded is the evaluation-mode function", None)
    dynamic = sizes_of(dynamic)
    if "batch" not in dynamic:
        raise ValueError(f"dynamic must contain 'batch', because calibration runs image by image; got {dynamic!r}.")
    twin = _twin(model)
    dense = is_detector(model) or isinstance(model, HeatmapPose)
    x = next(batches(loader, twin))[0]
    probe, reference = _Probe(twin), copied(model).cpu()
    info = collected(
        model, x.shape, outputs_of(reference, x[:1]), classes=classes, normalization=normalization, info=info,
        fixed="size" not in dynamic,
    )  # fmt: skip
    shown = _Shown(loader, twin)
    measured = loader if images is None else [images] if isinstance(images, Tensor) else images
    compared = _Shown(measured, twin)
    if "size" not in dynamic:
        for given in (shown,) if images is None else (shown, compared):
            given.check_size(x.shape[2:])
    with staged(path.parent) as stage, tempfile.TemporaryDirectory() as elsewhere:
        first, written = Path(elsewhere) / "float32.onnx", stage / path.name
        with torch.no_grad():
            to_onnx(traced(probe, traceable(twin, x, dynamic), dynamic), first, None)
            names = output_names(twin(x) if dense else reference(x))
        plain = _graph.read(first)
        _balance.prepare(plain)
        if equalize:
            _balance.equalize(plain, shown)
        weights = _int8.weights(plain)
        keep = [keep] if isinstance(keep, str) else list(keep)
        if dense:
            keep += heads_of(model, [weight.name for weight in weights])
        kernels = _judged(weights, outliers, keep, 64 if reduce_range else 127)
        rounded = _round(plain, written, shown, kernels, calibration, seven_bits=reduce_range)
        read = partial(_comparable, twin, names) if dense else list
        change, flips = _measured(reference, probe, load(written), measured, read)
        layers = _compared(plain, rounded, compared, compare_layers, probe.outputs, read)
        if isinstance(twin, ServedPose):
            names.remove(_HEATMAPS)
        _int8.drop_outputs(written, names)
        _graph.annotate(written, to_texts(info))
        done = Quantization(
            path=path.name,
            files={part.name: checksum(part) for part in sorted(stage.iterdir())},
            bytes=_bytes(stage),
            input=input_of(x.shape, dynamic, info),
            outputs=tuple(names),
            classes=info.classes,
            environment=bench.environment(beside=PACKAGES["onnx"]),
            bytes_before=_bytes(Path(elsewhere)),
            calibration=calibration,
            change=change,
            flips=flips,
            kernels=kernels,
            layers=layers,
        )
        done.write(stage)
    _warn(done)
    return done


def _twin(model: nn.Module) -> nn.Module:
    """Return the model as it is traced; raises ValueError unless its layers are merged."""
    twin = prepared(model, "branches", "onnx")
    left = unmerged(model)
    if left:
        raise ValueError(f"{left[0]} is not merged, and layers are rounded as they compute: call reparameterize first.")
    return ServedPose(twin, measured=True) if isinstance(twin, HeatmapPose) else served(twin, "onnx")


def _round(
    plain: Any,
    path: Path,
    shown: _Shown,
    kernels: Iterable[QuantizedKernel],
    calibration: str,
    *,
    seven_bits: bool,
) -> Any:
    """Write the rounded graph with corrected biases, and return it."""
    floating = {kernel.name for kernel in kernels if kernel.kept_float}
    _int8.quantize(plain, path, shown, CALIBRATION[calibration], floating, seven_bits=seven_bits)
    rounded = _graph.read(path)
    _balance.correct(plain, rounded, shown)
    _graph.write(rounded, path)
    return rounded


class _Shown:
    """The images of a loader, iterable repeatedly."""

    def __init__(self, loader: Iterable[Any], model: nn.Module) -> None:
        self._loader, self._model = loader, model

    def __iter__(self) -> Iterator[Tensor]:
        return (found for found, _ in batches(self._loader, self._model))

    def check_size(self, size: Sequence[int]) -> None:
        """Raise ValueError if images have another size (H, W)."""
        for found in self:
            if found.shape[2:] != tuple(size):
                raise ValueError(
                    f"images must all be {'x'.join(map(str, size))}, as in the first batch; got "
                    f"{'x'.join(map(str, found.shape[2:]))}. Pass dynamic=('batch', 'size') for images of any size."
                )


Read = Callable[[Sequence[Tensor]], Any]
"""How the outputs of a graph are to be compared: a list, the detections of each image, or heatmaps."""

_HEATMAPS = "heatmaps"
"""Last output of a pose model's graph while it is compared."""


def _comparable(graph: Any, names: Sequence[str], outputs: Sequence[Tensor]) -> Any:
    named = dict(zip(names, outputs, strict=True))
    return named[_HEATMAPS] if isinstance(graph, ServedPose) else graph.detections(named)


def _compared(
    plain: Any, rounded: Any, images: Iterable[Tensor], count: int, outputs: int, read: Read
) -> tuple[RoundedLayer, ...]:
    """Measure on ``count`` images how the rounding of each layer alone changes the first ``outputs`` outputs."""
    if not count:
        return ()
    ablation = Ablation(plain, rounded)
    tallies = [Tally() for _ in ablation.layers]
    for batch in images:
        x = batch[:count]
        before = read(ablation(x, ())[:outputs])
        for index, tally in enumerate(tallies):
            tally.add(before, read(ablation(x, (index,))[:outputs]))
        count -= len(x)
        if not count:
            break
    found = zip(ablation.layers, tallies, strict=True)
    return tuple(RoundedLayer(layer.name, layer.operator, layer.span, tally.difference().rms) for layer, tally in found)


def _warn(done: Quantization) -> None:
    """Log a large change of the outputs, and the layers responsible."""
    if done.change.rms <= LOSSY:
        return
    worst = "; ".join(
        f"{layer.name} ({layer.operator}) {layer.change:.2g}"
        + ("" if layer.span is None else f", its output from {layer.span[0]:.3g} to {layer.span[1]:.3g}")
        for layer in done.by_change[:5]
    )
    blame = f" Rounded alone, these layers change them most: {worst}." if worst else ""
    log.warning(
        f"8 bits change the outputs by {done.change.rms:.2g} (relative RMS).{blame} "
        "keep=[...] leaves layers in float32."
    )


def _bytes(folder: Path) -> int:
    return sum(part.stat().st_size for part in folder.iterdir())


class _Probe(nn.Module):
    """A model that also returns the routing weights of every call of a mixture."""

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


def _judged(
    weights: Sequence[_int8.Weight], outliers: str, keep: Sequence[str], steps: int
) -> tuple[QuantizedKernel, ...]:
    """Measure the effect of rounding on every weight; warn, refuse or leave in float as requested."""
    names = tuple(weight.name for weight in weights)
    kept = {_checks.choice("every entry of keep", name, names) for name in keep}
    kernels = tuple(_rounded(weight, steps, kept, noisy=outliers == "float") for weight in weights)
    noisy = sorted((kernel for kernel in kernels if _ratio(kernel) < NOISY and kernel.name not in kept), key=_ratio)
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


def _rounded(weight: _int8.Weight, steps: int, kept: Collection[str], *, noisy: bool) -> QuantizedKernel:
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
        weight.name in kept or (noisy and decibels < NOISY),
    )


def _measured(
    model: nn.Module, probe: _Probe, rounded: Runtime, images: Iterable[Any], read: Read
) -> tuple[Difference, tuple[Flips, ...]]:
    """Compare outputs with the model's, and routing weights with the probe's."""
    tally, flipped, count = Tally(model), Counter[str](), 0
    calls: Counter[str] = Counter()
    with torch.no_grad():
        for x, labels in batches(images, model):
            weights, theirs = probe(x)[probe.outputs :], [y for y in tree_leaves(rounded(x)) if isinstance(y, Tensor)]
            tally.add(model(x), read(theirs[: probe.outputs]), labels, images=len(x), size=x.shape[-2:])
            count += len(x)
            calls = Counter(probe.names)
            routing = zip(probe.names, probe.chosen, weights, theirs[probe.outputs :], strict=True)
            for name, top_k, before, after in routing:
                a, b = (w.topk(top_k or 1, dim=1).indices.sort(1).values for w in (before, after))
                flipped[name] += int((a != b).any(1).sum())
    return tally.difference(), tuple(Flips(name, flipped[name] / count / calls[name]) for name in calls)
