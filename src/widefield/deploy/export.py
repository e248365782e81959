"""Models as files that run without widefield, each proven to be the model that it was made from."""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from timm.layers import CondConv2d
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from widefield import _checks, bench
from widefield._files import checksum, staged
from widefield.deploy import _graph
from widefield.deploy._onnx import to_onnx
from widefield.deploy._others import first_line
from widefield.deploy._trace import DYNAMIC, bare, prepared, traced
from widefield.deploy.info import INFO, ModelInfo, collected, to_texts
from widefield.deploy.runtime import FORMATS, Runtime, format_of, import_openvino, load
from widefield.deploy.throughput import Speed, measure_throughput
from widefield.nn import DynamicGMConv2d, FusedMoRFConv2d, MoRFConv2d
from widefield.surgery.compare import Tally
from widefield.surgery.inputs import batches, example_input, pixels
from widefield.surgery.walk import begin, copied, unmerged

log = logging.getLogger(__name__)

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": (), "openvino": ("onnx", "openvino")}
"""What writes and runs a format, beside PyTorch."""

BATCHES = (1, 3, 8)
"""Batch sizes at which a graph with a dynamic batch is verified."""


@dataclass(frozen=True)
class Check:
    """An exported model beside the one that it was made from, on batches of one shape."""

    shape: tuple[int, ...]
    """(N, C, H, W)."""
    images: int
    """In all batches of this shape."""
    max_abs: float
    """Largest absolute difference of any output."""
    relative: float
    """``max_abs`` in units of the largest absolute value of the model's outputs."""
    agreement: float | None
    """Share of the images with the same largest output; None where the output is not (N, classes)."""


@dataclass(frozen=True)
class Export:
    """What was exported, and the proof: the JSON file that stands beside an export."""

    model: str
    format: str
    path: str
    """Of the file to load, relative to the folder of this report."""
    files: Mapping[str, str]
    """Every file of the export -> its SHA-256."""
    bytes: int
    input: Mapping[str, Any]
    """name, dtype, the example's shape, what of it may change; and size, mean and std as of
    :class:`widefield.deploy.ModelInfo`, None where they are not known."""
    outputs: tuple[str, ...]
    """Names, in order: keys of the model's dicts, "output" where there are none; of an archive none is known."""
    routing: str | None
    """The form, or forms, of layers whose kernel depends on the image; None where there are none."""
    operators: Mapping[str, int]
    """Operator -> how often it occurs in the graph."""
    checks: tuple[Check, ...]
    tolerance: float
    """Largest relative difference allowed; one above it, and there would be no export."""
    images: str
    """What it was verified on."""
    throughput: Sequence[Speed]
    """The file beside the model, where that was asked for."""
    environment: Mapping[str, str]
    """Machine, versions, date."""
    classes: tuple[str, ...] | None = None
    """Names of the model's outputs, in order; None where they are not known."""

    @property
    def relative(self) -> float:
        """The largest relative difference of all checks."""
        return max(check.relative for check in self.checks)

    def __str__(self) -> str:
        """Say it in a clause."""
        return f"{self.path}: {self.bytes / 2**20:.1f} MiB, within {self.relative:.1e} of the model"

    def rows(self) -> list[dict[str, str]]:
        """Return one row for each check."""
        return [
            {
                "file": self.path,
                "images": "x".join(map(str, check.shape)),
                "of them": str(check.images),
                "largest difference": f"{check.max_abs:.1e}",
                "of scale": f"{check.relative:.1e}",
                "top-1 agreement": "-" if check.agreement is None else f"{100 * check.agreement:.4g} %",
            }
            for check in self.checks
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {**asdict(self), "checks": [{**asdict(check), "shape": list(check.shape)} for check in self.checks]}


def export(
    model: nn.Module,
    path: str | Path,
    example: Tensor | None = None,
    *,
    routing: str = "branches",
    dynamic: Sequence[str] = ("batch",),
    loader: Iterable[Any] | None = None,
    tolerance: float = 1e-4,
    opset: int | None = None,
    throughput: Sequence[int] = (),
    classes: Sequence[str] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    info: ModelInfo | None = None,
    report: Callable[[Export], object] | None = None,
) -> Export:
    """Write a model to a file that runs without widefield, verify it, and write the proof beside it (PATH.json).

    What is written is the model as it is: call :func:`widefield.reparameterize` first, and perhaps
    :func:`widefield.specialize` and :func:`widefield.trim`. Convolutions are plain Conv nodes, whatever operator
    computes them here. The file is loaded and run on fresh images beside the model, at batches of 1, 3 and 8 where the
    batch is dynamic, and at a second size where that is; it appears if it passes, and not at all otherwise.

    Args:
        model: in evaluation mode, float32; untouched.
        path: ``.onnx``, ``.pt2`` (torch.export's archive) or ``.xml`` (OpenVINO, with a ``.bin`` beside it).
        example: (N, C, H, W). Default: as :func:`widefield.reparameterize` makes one up.
        routing: form of layers whose kernel depends on the image, "branches" or "per-sample"; see
            :data:`widefield.deploy.ROUTING`. For a graph without routing, specialize the model.
        dynamic: which sizes may change: "batch", "size" (height and width), both or neither.
        loader: images to verify on besides noise, of any size that the graph takes; see
            :func:`widefield.surgery.inputs.batches`.
        tolerance: largest difference allowed, in units of the largest absolute output.
        opset: ONNX operator set; default: that of torch's exporter.
        throughput: batch sizes at which the file is timed beside the model, eager and compiled by torch.compile, in
            turns: some seconds each.
        classes: names of the outputs, in order. They go into the file and the report, as do the next two.
        normalization: mean and standard deviation of each channel, with which images in [0, 1] are to be normalized.
        info: the same and the size of the images, for what the two arguments above do not say, such as
            ``ModelInfo.from_weights(ResNet50_Weights.DEFAULT)`` for models of torchvision. What nothing says is taken
            from timm's configuration of the model, and is None where there is none.
        report: called once with what is returned: ``print``, or the ``append`` of a list.

    Raises:
        RuntimeError: the model is in training mode; or the file does not compute what the model does.
        TypeError: parameters that are not float32; a report that cannot be called.
        ValueError: another suffix, an unknown word; a model that cannot be traced, or not with these dynamic sizes; an
            operator without a form in this format. The message names it.
        OSError: the path cannot be written to.
        ModuleNotFoundError: OpenVINO is not installed.
    """
    path = Path(path)
    format = format_of(path)
    model = bare(model)
    dynamic = tuple(sorted({_checks.choice("every entry of dynamic", size, DYNAMIC) for size in _words(dynamic)}))
    tolerance = _checks.number("tolerance", tolerance, maximum=1.0)
    begin(model, "an export holds the evaluation-mode function", report)
    if format == "openvino":
        import_openvino()
    twin = prepared(model, routing, format)
    with contextlib.suppress(ValueError):  # what cannot be merged is exported as it is
        left = unmerged(model)
        if left:
            log.warning("exported as they train are %d layers (%s, ...): reparameterize first.", len(left), left[0])
    reference = copied(model).cpu()
    x = _example(reference, example)
    info = collected(
        model, x.shape, outputs_of(reference, x), classes=classes, normalization=normalization, info=info,
        fixed="size" not in dynamic,
    )  # fmt: skip
    times = [_checks.integer("every entry of throughput", count) for count in throughput]
    if times and "batch" not in dynamic and set(times) != {len(x)}:
        raise ValueError(f"the batch is fixed to {len(x)}, and cannot be timed at throughput={tuple(throughput)}.")
    given = () if loader is None else (found for found, _ in batches(loader, reference))
    with staged(path.parent) as stage:
        with torch.no_grad():
            operators = _write(twin, x, stage / path.name, format, dynamic, opset, info)
        exported = load(stage / path.name)
        checks = _checked(reference, exported, chain(_fresh(x, dynamic), given))
        worst = max(checks, key=lambda check: check.relative)
        if not worst.relative <= tolerance:
            raise RuntimeError(
                f"the {format} file does not compute what the model does: on images of {worst.shape} outputs differ by "
                f"{worst.relative:.2e} of their scale, more than tolerance={tolerance:.0e}. Nothing was written."
            )
        files = {part.name: checksum(part) for part in sorted(stage.iterdir())}
        done = Export(
            model=_name(model),
            format=format,
            path=path.name,
            files=files,
            bytes=sum(part.stat().st_size for part in stage.iterdir()),
            input=input_of(x.shape, dynamic, info),
            outputs=exported.outputs,
            routing=_routing(model, routing),
            operators=dict(sorted(operators.items())),
            checks=checks,
            tolerance=tolerance,
            images="noise" if loader is None else "noise, and images given",
            throughput=[speed for count in times for speed in measure_throughput(model, exported, x, count)],
            environment=bench.environment(beside=PACKAGES[format]),
            classes=info.classes,
        )
        write_report(stage / f"{path.name}.json", done.to_dict())
    if format == "onnx" and f"{path.name}.data" not in files:  # weights of a larger model that stood here
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    if report is not None:
        report(done)
    return done


def outputs_of(model: nn.Module, x: Tensor) -> int | None:
    """Return how many classes a model tells apart: the channels of its only output, (N, classes, ...), or None."""
    with torch.no_grad():
        found = [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor)]
    return found[0].shape[1] if len(found) == 1 and found[0].ndim > 1 else None


def input_of(shape: Sequence[int], dynamic: Sequence[str], info: ModelInfo) -> dict[str, Any]:
    """Return what a report says of the input."""
    told = info.to_dict()
    about = {name: told[name] for name in ("size", "mean", "std")}
    return {"name": "images", "dtype": "float32", "shape": list(shape), "dynamic": list(dynamic), **about}


def write_report(path: Path, told: Mapping[str, Any]) -> None:
    """Write JSON; raises ValueError for numbers that it does not know."""
    path.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _example(model: nn.Module, given: Tensor | None) -> Tensor:
    """Return an example that the model runs on, on the CPU."""
    x = example_input(model) if given is None else pixels(given).detach().cpu()
    if x.dtype != torch.float32 or not len(x):
        raise ValueError(f"the example must hold float32 images; got {tuple(x.shape)} of {x.dtype}.")
    if given is None:
        try:
            with torch.no_grad():
                model(x)
        except Exception as error:
            raise ValueError(
                f"the model does not run on the example made up for it, {tuple(x.shape)}: pass example=."
            ) from error
    return x


def _routing(model: nn.Module, asked: str) -> str | None:
    """Return the forms in which layers with routing went in."""
    forms = {asked for module in model.modules() if isinstance(module, (MoRFConv2d, FusedMoRFConv2d))}
    forms |= {"per-sample" for module in model.modules() if isinstance(module, (DynamicGMConv2d, CondConv2d))}
    return " and ".join(sorted(forms)) or None


def _words(dynamic: Sequence[str]) -> Sequence[str]:
    return (dynamic,) if isinstance(dynamic, str) else dynamic


def _write(
    model: nn.Module, x: Tensor, path: Path, format: str, dynamic: Sequence[str], opset: int | None, info: ModelInfo
) -> Counter[str]:
    program = traced(model, x, dynamic)
    if format == "pt2":
        torch.export.save(program, path, extra_files={INFO: json.dumps(info.to_dict())})
        return Counter(str(n.target).removesuffix(".default") for n in program.graph.nodes if n.op == "call_function")
    written = path.with_suffix(FORMATS["onnx"])
    operators = to_onnx(program, written, opset)
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


def _fresh(x: Tensor, dynamic: Sequence[str]) -> Iterator[Tensor]:
    """Yield noise of every shape that is to be tried."""
    generator = torch.Generator().manual_seed(1)  # the example is drawn from 0
    count, channels, height, width = x.shape
    sizes = [(height, width)]
    if "size" in dynamic:
        sizes.append((height + height // 4, width + width // 2))
    for rows, columns in sizes:
        for batch in BATCHES if "batch" in dynamic else (count,):
            yield torch.randn(batch, channels, rows, columns, generator=generator)


def _checked(model: nn.Module, exported: Runtime, images: Iterable[Tensor]) -> tuple[Check, ...]:
    tallies: dict[tuple[int, ...], Tally] = {}
    with torch.no_grad():
        for x in images:
            tallies.setdefault(tuple(x.shape), Tally()).add(model(x), exported(x))
    changes = {shape: tally.difference() for shape, tally in tallies.items()}
    return tuple(Check(shape, c.images, c.max_abs, c.relative, c.agreement) for shape, c in changes.items())


def _name(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)
