"""Run every verb on one network: pass, refused with a reason, or failed. `checks.py NAME [VERB TO SKIP ...]`."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from subjects import Subject, subject
from torch import nn

import widefield
from widefield import analysis
from widefield.nn import DynamicGMConv2d, FusedMoRFConv2d, MoRFConv2d

TOLERANCE = 1e-4
"""Largest difference that the library allows for whole networks in float32, relative to the largest output."""

ROUNDING = 1e-8
"""The same in float64. Random weights amplify float32 rounding in some networks, up to a hundred thousand times."""

KEEPING = {
    "MoRF": widefield.MoRF((3, 5)),
    "GMConv": widefield.GMConv(),
    "FastDepthwise": widefield.FastDepthwise(),
    "LargeKernel": widefield.LargeKernel(13),
}
"""Conversions that keep a network's function."""

FRESH = {
    "Deformable": widefield.Deformable(),
    "InceptionSplit": widefield.InceptionSplit(),
    "TokenMixer": widefield.TokenMixer("lka"),
}
"""Conversions that replace layers by newly initialized ones."""

ROUTED = (MoRFConv2d, FusedMoRFConv2d, DynamicGMConv2d)
"""Our layers that remain after reparameterizing, because their kernels depend on the image."""


class WrongError(Exception):
    """A wrong result."""


def run(tested: Subject, skip: Sequence[str] = ()) -> Iterator[dict[str, object]]:
    """Yield {"verb", "status", "detail", "seconds"} for each check, status "pass", "refused", "caught" or "failed"."""
    made: dict[str, nn.Module] = {}
    for verb, check in _checks(tested, made):
        if verb in skip:
            continue
        start = time.perf_counter()
        try:
            status, detail = "pass", check() or ""
        except Exception as error:  # the point of the sweep
            status, detail = _judged(error)
        yield {"verb": verb, "status": status, "detail": detail, "seconds": round(time.perf_counter() - start, 1)}


def _judged(error: Exception) -> tuple[str, str]:
    """Return the status and text of an error: refused or caught by widefield, or failed."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    if str(Path(widefield.__file__).parent) not in innermost.filename or isinstance(error, WrongError):
        return "failed", f"{text} [{Path(innermost.filename).name}:{innermost.lineno}]"
    caught = isinstance(error, RuntimeError) or error.__cause__ is not None
    return "caught" if caught else "refused", text


def _checks(tested: Subject, made: dict[str, nn.Module]) -> Iterator[tuple[str, Callable[[], str | None]]]:
    model, x = tested.model, tested.x
    for name, config in (KEEPING | FRESH).items():
        yield f"convert {name}", lambda name=name, config=config: _convert(tested, name, config, made)
        if name in made:
            yield f"gradients {name}", lambda name=name: _gradients(tested, made[name])
        if name in made and name in KEEPING:
            yield f"reparameterize {name}", lambda name=name: _reparameterize(made[name], x, made, name)
    yield "reparameterize", lambda: _reparameterize(model, x, made, "plain")
    plain = made.get("plain fused", model)
    yield "trim", lambda: _trim(plain, x)
    if "MoRF" in made:
        yield "specialize", lambda: _finite(widefield.specialize(made["MoRF"], [x]), x)
    yield "effective field", lambda: analysis.effective_receptive_field(model, x).layer
    yield "theoretical field", lambda: str(analysis.theoretical_receptive_field(model, x).size)
    yield "class activation", lambda: analysis.class_activation(model, x).layer
    yield "stability", lambda: f"{analysis.translation_stability(model, _larger(x), shifts=(1, 2)).change.mean():.2g}"
    yield "kernels", lambda: f"{len(analysis.kernel_energy(plain).layers)} kernels"
    yield "count", lambda: f"{widefield.bench.cost(model, x).macs:,} MACs"
    serving = copy.deepcopy(made.get("MoRF fused", plain)).float()
    with tempfile.TemporaryDirectory() as folder:
        yield "export", lambda: _export(serving, Path(folder) / "model.onnx", x.float())
        yield "quantize", lambda: _quantize(copy.deepcopy(plain).float(), Path(folder) / "int8.onnx", x.float())


def _larger(x: torch.Tensor) -> torch.Tensor:
    """Return images whose shifted windows have the size of ``x``."""
    return nn.functional.pad(x, (0, 2, 0, 2)) if x.ndim == 4 else x


def _convert(tested: Subject, name: str, config: widefield.surgery.Conversion, made: dict[str, nn.Module]) -> str:
    replaced = len(widefield.plan(tested.model, config).replaced)
    converted = widefield.convert(tested.model, config)
    if name in KEEPING:
        _same(tested.model, converted, tested.x, lambda model: widefield.convert(model, config))
    else:
        _trainable(converted, tested)
    made[name] = converted
    return f"{replaced} layers"


def _trainable(converted: nn.Module, tested: Subject) -> None:
    """Raise WrongError unless the loss is finite, in training mode because batch norms have the old layers' scale."""
    try:
        loss = tested.loss(converted.train())
    finally:
        converted.eval()
    if not loss.isfinite():
        raise WrongError(f"the loss is {loss:g}")


def _gradients(tested: Subject, converted: nn.Module) -> str:
    unused = _without_gradient(tested, tested.model)
    missing = [name for name in _without_gradient(tested, converted) if name not in unused]
    if missing:
        raise WrongError(f"{len(missing)} parameters get no gradient, the first of them {missing[0]}")
    return f"{len(unused)} unused in the original, too" if unused else ""


def _without_gradient(tested: Subject, model: nn.Module) -> list[str]:
    """Return the parameters that a training step does not reach; raises WrongError if gradients are not finite."""
    model.zero_grad(set_to_none=True)
    try:
        tested.loss(model.train()).backward()
        learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)
    infinite = [name for name, grad in learning.items() if grad is not None and not grad.isfinite().all()]
    if infinite:
        raise WrongError(f"the gradient of {infinite[0]} is not finite")
    return [name for name, grad in learning.items() if grad is None]


def _reparameterize(model: nn.Module, x: torch.Tensor, made: dict[str, nn.Module], name: str) -> str:
    done: list[widefield.surgery.Reparameterization] = []
    fused = widefield.reparameterize(model, x, report=done.append)
    left = {type(m).__name__ for m in fused.modules() if type(m).__module__.startswith("widefield.")}
    left -= {kind.__name__ for kind in ROUTED}
    inside = {type(m) for layer in fused.modules() if isinstance(layer, ROUTED) for m in layer.modules()}
    left -= {kind.__name__ for kind in inside}
    if left:
        raise WrongError(f"{', '.join(sorted(left))} is left")
    made[f"{name} fused"] = fused
    return f"{len(done[0].fused)} fused, outputs differ by {done[0].difference.relative:.0e}"


def _same(first: nn.Module, second: nn.Module, x: torch.Tensor, change: Callable[[nn.Module], nn.Module]) -> str:
    """Compare a network with its ``change``. If float32 is too coarse, compare again in float64."""
    found = widefield.compare(first, second, x).relative
    if found <= TOLERANCE:
        return f"{found:.0e}"
    first = copy.deepcopy(first).double()
    exact = widefield.compare(first, change(first), x.double()).relative
    if not exact <= ROUNDING:
        raise WrongError(f"the outputs differ by {found:.1e} of their scale, in float64 by {exact:.1e}")
    return f"{found:.0e}, in float64 {exact:.0e}"


def _finite(model: nn.Module, x: torch.Tensor) -> str:
    with torch.no_grad():
        outputs = model(x)
    for out in torch.utils._pytree.tree_leaves(outputs):
        if isinstance(out, torch.Tensor) and not out.isfinite().all():
            raise WrongError("the outputs are not finite")
    return ""


def _trim(model: nn.Module, x: torch.Tensor) -> str:
    def change(given: nn.Module) -> nn.Module:
        return widefield.trim(given, 0.0, example_input=x.shape)

    return _same(model, change(model), x, change)


def _export(model: nn.Module, path: Path, x: torch.Tensor) -> str:
    written = widefield.export(model, path, x, loader=[x], tolerance=TOLERANCE)
    return f"{written.relative:.0e}"


def _quantize(model: nn.Module, path: Path, x: torch.Tensor) -> str:
    return f"relative RMS {widefield.quantize(model, path, [x], compare_layers=0).change.rms:.2g}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        found = subject(sys.argv[1])
    except Exception as error:
        print(json.dumps({"verb": "build", "status": "failed", "detail": f"{type(error).__name__}: {error}"[:400]}))
    else:
        print(json.dumps({"verb": "build", "status": "pass", "detail": f"images {tuple(found.x.shape)}"}), flush=True)
        for row in run(found, sys.argv[2:]):
            print(json.dumps(row), flush=True)
