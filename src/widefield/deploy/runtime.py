"""Load exported models as callables from tensors to tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from widefield import _checks
from widefield._extras import need
from widefield.dense import DecodedKeypoints
from widefield.deploy._others import first_line, quiet
from widefield.deploy.info import INFO, ModelInfo, from_texts
from widefield.surgery.detections import Found

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml"}
"""Format -> suffix of its file."""

DETECTIONS = frozenset({"boxes", "scores", "labels", "count"})
"""Outputs of detectors with the last non-maximum suppression inside; those with masks have ``masks``, too."""

KEYPOINTS = ("keypoints", "scores")
"""Outputs of pose models that decode their heatmaps."""

Answer = Tensor | tuple[Tensor, ...] | list[Found] | DecodedKeypoints
_Loaded = tuple[Callable[[Tensor], list[Tensor]], Any, tuple[str, ...], ModelInfo]


class Runtime:
    """An exported model: (N, C, H, W), float32, on the CPU -> its output, or a tuple of them. Made by :func:`load`."""

    def __init__(
        self,
        format: str,
        run: Callable[[Tensor], list[Tensor]],
        inner: Any,
        outputs: tuple[str, ...] = (),
        info: ModelInfo | None = None,
    ) -> None:
        self.format = format
        self.inner = inner
        """What runs: an ``onnxruntime.InferenceSession``, a module, or OpenVINO's compiled model."""
        self.outputs = outputs
        """Names of the outputs, in order; PyTorch's archives have none."""
        self.info = info or ModelInfo()
        """Names of the classes, normalization and size of the images, as the file says."""
        self._run = run

    def __call__(self, images: Tensor) -> Answer:
        """Run the model; raises ValueError for images of a shape that it does not accept.

        Detectors with the last non-maximum suppression inside return a list with ``boxes``, ``scores``, ``labels`` and
        ``masks`` of each image, like the model. Pose models that decode their heatmaps return ``points`` and ``scores``
        (archives of PyTorch, which have no names, a tuple of the two). Other models return tensors.
        """
        outputs = self._run_on(images)
        if set(self.outputs) >= DETECTIONS:
            return _detections(dict(zip(self.outputs, outputs, strict=True)))
        if self.outputs == KEYPOINTS:
            return DecodedKeypoints(*outputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def named(self, images: Tensor) -> dict[str, Tensor]:
        """Run the model and return its outputs by name; raises as calling it does."""
        return dict(zip(self.outputs, self._run_on(images), strict=True))

    def _run_on(self, images: Tensor) -> list[Tensor]:
        if images.dtype != torch.float32:
            raise TypeError(f"images must be float32, as exports are; got {images.dtype}.")
        try:
            return self._run(images.detach().cpu())
        except Exception as error:  # runtimes raise their own types
            raise ValueError(
                f"the {self.format} model does not run on images of {tuple(images.shape)}: {first_line(error)}"
            ) from error


def _detections(outputs: dict[str, Tensor]) -> list[Found]:
    """Return the detections of each image without the padding."""
    boxes, scores, labels = (outputs[name] for name in ("boxes", "scores", "labels"))
    masks, found = outputs.get("masks"), []
    for i, count in enumerate(outputs["count"].tolist()):
        inner = None if masks is None else masks[i, :count]
        found.append(Found(boxes[i, :count], scores[i, :count], labels[i, :count], inner))
    return found


def format_of(path: Path) -> str:
    """Return the format of a file by its suffix; raises ValueError for another suffix."""
    suffixes = tuple(FORMATS.values())
    _checks.choice("the suffix of path", path.suffix, suffixes)
    return next(name for name, suffix in FORMATS.items() if suffix == path.suffix)


def load(path: str | Path, *, threads: int | None = None) -> Runtime:
    """Load a file written by :func:`widefield.deploy.export`, or another file of these formats with one image input.

    Args:
        path: ``.onnx`` (run by onnxruntime), ``.pt2`` (PyTorch) or ``.xml`` (OpenVINO).
        threads: number of threads in onnxruntime and OpenVINO. Default: as many as PyTorch uses.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is incomplete or of another kind.
        ModuleNotFoundError: onnxruntime or OpenVINO is not installed.
    """
    path = Path(path)
    format = format_of(path)
    threads = torch.get_num_threads() if threads is None else _checks.integer("threads", threads)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    loader = {"onnx": _onnx, "pt2": _pt2, "openvino": _openvino}[format]
    try:
        loaded = loader(path, threads)
    except (ModuleNotFoundError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole {format} model ({path.stat().st_size} bytes): {first_line(error)} Export it anew."
        ) from error
    return Runtime(format, *loaded)


def _onnx(path: Path, threads: int) -> _Loaded:
    need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # optimizer warnings do not concern the user
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    outputs = tuple(output.name for output in session.get_outputs())
    info = from_texts(session.get_modelmeta().custom_metadata_map)
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})], session, outputs, info


def _pt2(path: Path, threads: int) -> _Loaded:
    from torch.utils._pytree import tree_leaves

    with quiet():
        extra = {INFO: ""}
        module = torch.export.load(path, extra_files=extra).module()

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return cast(list[Tensor], tree_leaves(module(x)))

    return run, module, (), ModelInfo.from_dict(json.loads(extra[INFO] or "{}"))


def _openvino(path: Path, threads: int) -> _Loaded:
    openvino = import_openvino()
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    model = core.read_model(os.fspath(path))
    info = json.loads(model.get_rt_info(INFO).astype(str)) if model.has_rt_info(INFO) else {}
    compiled = core.compile_model(model, "CPU", options)
    outputs = compiled.outputs

    def run(x: Tensor) -> list[Tensor]:
        found = compiled(x.numpy())
        return [torch.from_numpy(found[output].copy()) for output in outputs]

    return run, compiled, tuple(output.any_name for output in outputs), ModelInfo.from_dict(info)


def import_openvino() -> Any:
    """Return the module ``openvino``; raises ModuleNotFoundError with installation instructions."""
    need("openvino")
    import openvino

    return openvino
