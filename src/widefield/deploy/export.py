"""Export models to files that run without widefield, verified against the model."""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from timm.layers import CondConv2d
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from widefield import _checks, bench
from widefield._extras import need
from widefield._files import checksum, staged
from widefield.dense import HeatmapPose
from widefield.deploy import _graph
from widefield.deploy._dense import is_detector, reading, rules_of, served, traceable
from widefield.deploy._onnx import to_onnx
from widefield.deploy._others import first_line
from widefield.deploy._trace import DYNAMIC, bare, prepared, traced
from widefield.deploy.info import INFO, ModelInfo, collected, to_texts
from widefield.deploy.record import Deployed, input_of
from widefield.deploy.runtime import FORMATS, format_of, import_openvino, load
from widefield.deploy.throughput import Speed, measure_throughput
from widefield.nn import DynamicGMConv2d, FusedMoRFConv2d, MoRFConv2d
from widefield.surgery import inputs
from widefield.surgery.compare import Difference, NothingToCompareError, Tally
from widefield.surgery.inputs import Example, batches, pixels
from widefield.surgery.walk import begin, copied, unmerged

log = logging.getLogger(__name__)

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": (), "openvino": ("onnx", "openvino")}
"""Packages besides PyTorch that write and run a format."""

BATCHES = (1, 3, 8)
"""Batch sizes at which a graph with a dynamic batch is verified."""

FEW = (1, 3)
"""The same for detectors, which need a lot of memory for each image."""


@dataclass(frozen=True)
class Check:
    """The difference between an exported model and its source, on batches of one shape."""

    shape: tuple[int, ...]
    """(N, C, H, W)."""
    images: int
    """Number of images in all batches of this shape."""
    max_abs: float
    """Largest absolute difference of any output."""
    relative: float
    """``max_abs`` divided by the largest absolute value of the model's outputs."""
    agreement: float | None
    """Share of images with the same top class, or of pixels if the output is (N, classes, H, W); of detectors, share of
    detections that the model and the file both find; of pose models, share of key points that are within a pixel of the
    image; None for others."""
    miou_before: float | None = None
    """Mean IoU of the model, where the loader's masks give one."""
    miou_after: float | None = None
    """Mean IoU of the file."""
    detections: int | None = None
    """Of detectors: number of detections, of the model and of the file, that ``agreement`` counts."""
    ap_before: float | None = None
    """Box AP of the model, where the loader has boxes."""
    ap_after: float | None = None
    """Box AP of the file."""
    keypoints: int | None = None
    """Of pose models: number of key points that ``agreement`` counts."""
    distance: float | None = None
    """Largest distance of key points in pixels of the image, without those with two peaks of equal height."""
    near: float | None = None
    """Share of key points that are within 5 % of the longer side of the image."""
    pck_before: float | None = None
    """Share of labeled key points that the model finds within 5 % of the longer side, where the loader has them."""
    pck_after: float | None = None
    """The same for the file."""

    @classmethod
    def of(cls, shape: tuple[int, ...], found: Difference) -> Check:
        """Return the check that a difference on images of a shape amounts to."""
        names = [field.name for field in fields(cls) if field.name not in ("shape", "relative")]
        return cls(shape=shape, relative=found.relative, **{name: getattr(found, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class Export(Deployed):
    """An exported model and its verification.

    Attributes:
        model: name of the model.
        format: "onnx", "pt2" or "openvino".
        routing: form of the layers whose kernel depends on the image; None if there are none.
        operators: operator -> number of occurrences in the graph.
        checks: one per shape of images.
        tolerance: largest relative difference allowed; a larger one is an error, and nothing is written.
        images: which images were compared.
        throughput: timings of the file and the model, if requested.
        detection: of detectors: where the last non-maximum suppression is ("nms"), and its rules; None for others.
        pose: of pose models: where heatmaps become key points ("decoding"), and how; None for others.
    """

    model: str
    format: str
    routing: str | None
    operators: Mapping[str, int]
    checks: tuple[Check, ...]
    tolerance: float
    images: str
    throughput: Sequence[Speed]
    detection: Mapping[str, Any] | None = None
    pose: Mapping[str, Any] | None = None

    @property
    def relative(self) -> float:
        """The largest relative difference of all checks."""
        return max(check.relative for check in self.checks)

    def summary(self) -> str:
        """Return size and largest difference in one line."""
        return f"{self.path}: {self.bytes / 2**20:.1f} MiB, within {self.relative:.1e} of the model"

    def rows(self) -> list[dict[str, str]]:
        """Return one row per check."""
        labeled = any(check.miou_before is not None for check in self.checks)
        boxes = any(check.ap_before is not None for check in self.checks)
        points = any(check.pck_before is not None for check in self.checks)
        same = "top-1 agreement" if self.detection is None else "found by both"
        same = same if self.pose is None else "within a pixel"
        return [
            {
                "file": self.path,
                "images": "x".join(map(str, check.shape)),
                "count": str(check.images),
                "largest difference": f"{check.max_abs:.1e}",
                "relative": f"{check.relative:.1e}",
                same: "-" if check.agreement is None else f"{100 * check.agreement:.4g} %",
                **({} if check.distance is None else {"farthest, px": f"{check.distance:.2g}"}),
                **({"PCK": _from_to(check.pck_before, check.pck_after)} if points else {}),
                **({"mIoU": _from_to(check.miou_before, check.miou_after)} if labeled else {}),
                **({"box AP": _from_to(check.ap_before, check.ap_after)} if boxes else {}),
            }
            for check in self.checks
        ]


@_checks.guided
def export(
    model: nn.Module,
    path: str | Path,
    example_input: Example | None = None,
    *,
    routing: str = "branches",
    dynamic: Sequence[str] = ("batch",),
    nms: str = "inside",
    decoding: str = "inside",
    loader: Iterable[Any] | None = None,
    tolerance: float = 1e-4,
    opset: int | None = None,
    throughput: Sequence[int] = (),
    classes: Sequence[str] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    info: ModelInfo | None = None,
) -> Export:
    """Write a model to a file that runs without widefield, verify it, and write the record next to it (PATH.json).

    The model is written as it is: call :func:`widefield.reparameterize` first, and optionally
    :func:`widefield.specialize` and :func:`widefield.trim`. Convolutions become plain Conv nodes, whatever operator
    computes them here. The file is loaded and compared with the model on noise: at batch sizes 1, 3 and 8 if the batch
    is dynamic, and at a larger and an odd image size if the size is. The file is written only if verification passes.

    Outputs of detectors have fixed shapes, see :class:`widefield.dense.ServedDetector`, and are compared as sets. Pose
    models give key points or heatmaps, see :class:`widefield.dense.ServedPose`; both are compared by their key points.

    Args:
        model: in evaluation mode, float32; not modified.
        path: ``.onnx``, ``.pt2`` (an archive of torch.export) or ``.xml`` (OpenVINO, with a ``.bin`` next to it).
        example_input: (N, C, H, W), or its size: 224, (H, W), (C, H, W) or (N, C, H, W). Default: as in
            :func:`widefield.surgery.inputs.example_input`.
        routing: form of layers whose kernel depends on the image, "branches", "per-sample" or "blocked"; see
            :data:`widefield.deploy.ROUTING`. For a graph without routing, specialize the model first.
        dynamic: sizes that may change: "batch", "size" (height and width), both or neither.
        nms: of detectors: the last non-maximum suppression is "inside" of the file or "outside".
        decoding: of pose models: heatmaps become key points "inside" of the file or "outside".
        loader: further images to verify on, of any size the graph accepts; see
            :func:`widefield.surgery.inputs.batches`.
        tolerance: largest difference allowed, relative to the largest absolute output.
        opset: ONNX operator set. Default: that of torch's exporter.
        throughput: batch sizes at which to time the file and the model, eager and compiled; some seconds each.
        classes: class names, or names of key points, in the order of the scores; stored in the file and the record,
            like the next two.
        normalization: mean and standard deviation of each channel, for images in [0, 1].
        info: normalization, classes and image size together, such as
            ``ModelInfo.from_weights(ResNet50_Weights.DEFAULT)`` for torchvision. The two arguments above take
            precedence. Default: timm's configuration of the model, or None.

    Returns:
        The record. ``str()`` and notebooks show it; :meth:`Export.to_dict` is the JSON file.

    Raises:
        RuntimeError: the model is in training mode, or the file does not compute the same as the model.
        TypeError: parameters are not float32.
        ValueError: unknown suffix or option; a detector in an archive of PyTorch, or one that finds nothing in any of
            the images; the model cannot be traced, or not with these dynamic sizes; an operator
            has no form in this format, in which case the message names it.
        OSError: the path cannot be written.
        ModuleNotFoundError: a package of the extra [export] or [openvino] is not installed.
    """
    path = Path(path)
    format = format_of(path)
    model = bare(model)
    dynamic = sizes_of(dynamic)
    tolerance = _checks.number("tolerance", tolerance, maximum=1.0)
    begin(model, "an export holds the evaluation-mode function", None)
    need(*PACKAGES[format])
    twin = prepared(model, routing, format)
    twin = served(twin, format, nms=nms, decoding=decoding)
    _warn_unmerged(model)
    reference = copied(model).cpu()
    x = _example(reference, example_input)
    outputs = outputs_of(reference, x)
    info = collected(
        model, x.shape, outputs, classes=classes, normalization=normalization, info=info, fixed="size" not in dynamic
    )
    times = _times(throughput, dynamic, len(x))
    given = () if loader is None else batches(loader, reference)
    with staged(path.parent) as stage:
        with torch.no_grad():
            operators = _write(twin, x, stage / path.name, format, dynamic, opset, info, routing == "blocked")
        exported = load(stage / path.name)
        answer = reading(twin, exported)
        checks = _verified(reference, answer, chain(_fresh(reference, x, dynamic), given), tolerance, format)
        done = Export(
            path=path.name,
            files={part.name: checksum(part) for part in sorted(stage.iterdir())},
            bytes=sum(part.stat().st_size for part in stage.iterdir()),
            input=input_of(x.shape, dynamic, info),
            outputs=exported.outputs,
            classes=info.classes,
            environment=bench.environment(beside=PACKAGES[format]),
            model=_name(model),
            format=format,
            routing=_routing(model, routing),
            operators=dict(sorted(operators.items())),
            checks=checks,
            tolerance=tolerance,
            images="noise" if loader is None else "noise, and images given",
            throughput=[speed for count in times for speed in measure_throughput(model, exported, x, count)],
            detection=rules_of(twin) if is_detector(model) else None,
            pose=rules_of(twin) if isinstance(model, HeatmapPose) else None,
        )
        done.write(stage)
    if format == "onnx" and f"{path.name}.data" not in done.files:  # weights of a larger model that was here before
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    return done


def _warn_unmerged(model: nn.Module) -> None:
    with contextlib.suppress(ValueError):  # layers that cannot be merged are exported as they are
        left = unmerged(model)
        if left:
            log.warning(
                "%d layers are exported in their training form (%s, ...): reparameterize first.", len(left), left[0]
            )


def _times(throughput: Sequence[int], dynamic: Sequence[str], fixed: int) -> list[int]:
    times = [_checks.integer("every entry of throughput", count) for count in throughput]
    if times and "batch" not in dynamic and set(times) != {fixed}:
        raise ValueError(f"the batch size is fixed to {fixed}, so throughput={tuple(throughput)} cannot be timed.")
    return times


def outputs_of(model: nn.Module, x: Tensor) -> int | None:
    """Return how many classes a model tells apart: the channels of its only output, (N, classes, ...), or None.

    Detectors state it.
    """
    if is_detector(model):
        return int(model.num_classes)  # type: ignore[arg-type]
    with torch.no_grad():
        found = [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor)]
    return found[0].shape[1] if len(found) == 1 and found[0].ndim > 1 else None


def _example(model: nn.Module, given: Example | None) -> Tensor:
    """Return an example input that the model runs on, on the CPU."""
    x = pixels(inputs.example_input(model, given)).detach().cpu()
    if x.dtype != torch.float32 or not len(x):
        raise ValueError(f"example_input must hold float32 images; got {tuple(x.shape)} of {x.dtype}.")
    if given is None:
        try:
            with torch.no_grad():
                model(x)
        except Exception as error:
            raise ValueError(
                f"the model does not run on a made-up input of {tuple(x.shape)}: pass example_input."
            ) from error
    return x


def _routing(model: nn.Module, asked: str) -> str | None:
    """Return the forms in which layers with routing went in."""
    forms = {asked for module in model.modules() if isinstance(module, (MoRFConv2d, FusedMoRFConv2d))}
    alone = "per-sample" if asked == "branches" else asked  # layers without experts
    forms |= {alone for module in model.modules() if isinstance(module, (DynamicGMConv2d, CondConv2d))}
    return " and ".join(sorted(forms)) or None


def sizes_of(dynamic: Sequence[str]) -> tuple[str, ...]:
    """Return the dynamic sizes, sorted and checked; a single word is one of them."""
    words = (dynamic,) if isinstance(dynamic, str) else dynamic
    return tuple(sorted({_checks.choice("every entry of dynamic", size, DYNAMIC) for size in words}))


def _write(
    model: nn.Module,
    x: Tensor,
    path: Path,
    format: str,
    dynamic: Sequence[str],
    opset: int | None,
    info: ModelInfo,
    blocked: bool,
) -> Counter[str]:
    program = traced(model, traceable(model, x, dynamic), dynamic)
    if format == "pt2":
        torch.export.save(program, path, extra_files={INFO: json.dumps(info.to_dict())})
        return Counter(str(n.target).removesuffix(".default") for n in program.graph.nodes if n.op == "call_function")
    written = path.with_suffix(FORMATS["onnx"])
    operators = to_onnx(program, written, opset, blocked=blocked)
    if format == "openvino":
        openvino = import_openvino()
        try:
            converted = openvino.convert_model(written)
        except Exception as error:
            raise ValueError(f"OpenVINO does not take this model: {first_line(error)}") from error
        converted.set_rt_info(json.dumps(info.to_dict()), INFO)
        openvino.save_model(converted, path, compress_to_fp16=False)
        for part in path.parent.iterdir():
            if part.name.startswith(written.name):
                part.unlink()
        return Counter(operation.get_type_name() for operation in converted.get_ops())
    _graph.annotate(path, to_texts(info))
    return operators


def _fresh(model: nn.Module, x: Tensor, dynamic: Sequence[str]) -> Iterator[tuple[Tensor, None]]:
    """Yield noise of every shape that is to be tried, without labels."""
    generator = torch.Generator().manual_seed(1)  # the example is drawn from 0
    count, channels, height, width = x.shape
    sizes = [(height, width)]
    if "size" in dynamic:
        larger, odd = (height + height // 4, width + width // 2), (height + height // 8 | 1, width - width // 8 | 1)
        sizes += [size for size in (larger, odd) if size != sizes[0] and _runs(model, x, size)]
        if len(sizes) == 1:  # a model that takes only multiples of a side
            sizes.append((2 * height, 3 * width))
    for rows, columns in sizes:
        batches_tried = FEW if is_detector(model) else BATCHES
        for batch in batches_tried if "batch" in dynamic else (count,):
            yield torch.randn(batch, channels, rows, columns, generator=generator), None


def _runs(model: nn.Module, x: Tensor, size: tuple[int, int]) -> bool:
    """Return whether a model runs on images of a size."""
    try:
        with torch.no_grad():
            model(x.new_zeros(1, x.shape[1], *size))
    except Exception:  # models refuse sizes with any type of error
        return False
    return True


def _verified(
    model: nn.Module,
    exported: Callable[[Tensor], Any],
    images: Iterable[tuple[Tensor, Any]],
    tolerance: float,
    format: str,
) -> tuple[Check, ...]:
    """Compare an exported model with its source; raises RuntimeError if they differ by more than the tolerance."""
    tallies: dict[tuple[int, ...], Tally] = {}
    with torch.no_grad():
        for x, labels in images:
            tally = tallies.setdefault(tuple(x.shape), Tally(model))
            tally.add(model(x), exported(x), labels, images=len(x), size=x.shape[-2:])
    changes = {shape: _difference(tally, model) for shape, tally in tallies.items()}
    known = {shape: change for shape, change in changes.items() if change is not None}
    if not known:
        raise ValueError(
            "the file cannot be verified: the model finds nothing in noise or in the images given. Pass loader= with "
            "images in which it does, or lower its score_threshold."
        )
    for shape, change in known.items():
        if not change.within(tolerance):
            found = f", with {change.agreed}" if change.matched is not None else ""
            raise RuntimeError(
                f"the {format} file does not compute the same as the model: on images of {shape} outputs differ by "
                f"{change.relative:.2e} of their scale{found}, more than tolerance={tolerance:.0e}. Nothing was "
                "written."
            )
    return tuple(Check.of(shape, change) for shape, change in known.items())


def _difference(tally: Tally, model: nn.Module) -> Difference | None:
    """Return what a tally counted; None for a detector that found nothing."""
    try:
        return tally.difference()
    except NothingToCompareError:
        if is_detector(model):
            return None
        raise


def _from_to(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{before:.2%} -> {after:.2%}"


def _name(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)
