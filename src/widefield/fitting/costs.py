"""Cost of every size of every group: measured latency, multiply-accumulates, or parameters.

Costs add up over groups: that of an assignment is the whole unchanged network's, minus that of its convolutions, plus
that of the chosen ones. For latency this is an estimate; the network of the final choice is measured as a whole.

Latencies are 20th percentiles, as other processes can only add to them. All depthwise convolutions are measured as
``widefield.nn.DepthwiseConv2d``, those of the unchanged network, too: otherwise a network could seem faster for its
operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from widefield import bench, surgery
from widefield.dense.detector import Detector
from widefield.dense.detector_cost import FixedRoIs
from widefield.fitting.groups import Assignment, Group, Groups, inputs_of
from widefield.fitting.recipes import resized
from widefield.fitting.spec import FitSpec
from widefield.report import Report
from widefield.surgery.answers import evaluating
from widefield.tasks import Task
from widefield.train.model import build_model

UNITS = {"latency": "ms", "macs": "MMACs", "params": "parameters"}
_PER_UNIT = {"latency": 1e-3, "macs": 1e6, "params": 1.0}
_REPEATS, _SHORTEST = 11, 2e-3
"""Timings of a layer, and the shortest one in seconds."""


@dataclass(frozen=True)
class Costs(Report):
    """The costs of the groups' sizes.

    Attributes:
        budget: "latency", "macs" or "params".
        unchanged: of the whole unchanged network: seconds of a forward pass, multiply-accumulates, or parameters.
        table: group -> size -> cost of its convolutions at this size, in the same unit.
        about: how it was measured.
    """

    budget: str
    unchanged: float
    table: Mapping[str, Mapping[int, float]]
    about: Mapping[str, Any]

    def of(self, assignment: Assignment, groups: Groups) -> float:
        """Return the cost of an assignment relative to the unchanged network."""
        change = sum(self.table[g.name][assignment[g.name]] - self.table[g.name][g.own] for g in groups)
        return 1 + change / self.unchanged

    def scaled(self, factor: float) -> Costs:
        """Return the costs with a table that was multiplied by ``factor``."""
        table = {name: {size: cost * factor for size, cost in sizes.items()} for name, sizes in self.table.items()}
        return Costs(self.budget, self.unchanged, table, self.about)

    def summary(self) -> str:
        """Return the cost of the unchanged network."""
        return f"{self.budget} of the unchanged network: {self.shown(self.unchanged)}"

    def shown(self, cost: float) -> str:
        """Return a cost as text."""
        return f"{cost / _PER_UNIT[self.budget]:.4g} {UNITS[self.budget]}"

    def rows(self) -> list[dict[str, str]]:
        """Return one row per group, one column per size."""
        sizes = sorted({size for row in self.table.values() for size in row})
        return [
            {"layers": name, **{f"{size}x{size}": self.shown(row[size]) if size in row else "-" for size in sizes}}
            for name, row in self.table.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON's types."""
        table = {name: {str(size): cost for size, cost in row.items()} for name, row in self.table.items()}
        return {"budget": self.budget, "unchanged": self.unchanged, "table": table, "about": dict(self.about)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Costs:
        """Return what :meth:`to_dict` describes."""
        table = {name: {int(size): cost for size, cost in row.items()} for name, row in found["table"].items()}
        return cls(found["budget"], found["unchanged"], table, found["about"])


def measure_costs(spec: FitSpec, task: Task, groups: Groups, images: Tensor) -> Costs:
    """Measure the cost of every size of every group.

    Args:
        spec: the settings.
        task: makes the model of the network.
        groups: of the network.
        images: (N, C, H, W) as in evaluation; the batch whose latency counts.
    """
    about = {"images": "x".join(map(str, images.shape)), **bench.environment(spec.device)}
    model = plain_model(spec, task, {}, groups)
    modules = {layer.module: model.get_submodule(layer.module) for group in groups for layer in group.layers}
    if spec.budget == "latency":
        with _threads(spec.threads):
            return _timed(spec, model, modules, groups, images.to(spec.device), about)
    counts = {g.name: {size: _count(g, modules, size, spec.budget, model, images) for size in g.sizes} for g in groups}
    cost = counted(model, images)
    return Costs(spec.budget, float(cost.macs if spec.budget == "macs" else cost.parameters), counts, about)


def plain_model(spec: FitSpec, task: Task, assignment: Assignment, groups: Groups) -> nn.Module:
    """Return the model of an assignment with fresh weights, in evaluation mode; groups left out stay unchanged."""
    fresh = replace(spec.recipe, model=replace(spec.recipe.model, pretrained=False))
    return build_model(resized(fresh, assignment, groups), task).eval()


def counted(model: nn.Module, images: Tensor) -> bench.Cost:
    """Return the parameters of a model, and its MACs for the first of some images; detectors have fixed RoIs."""
    return bench.cost(FixedRoIs(model) if isinstance(model, Detector) else model, images[:1])


def compare_latency(first: nn.Module, second: nn.Module, images: Tensor, spec: FitSpec) -> tuple[bench.Row, bench.Row]:
    """Return the times of two models on the same images, measured in turns."""
    x, first, second = images.to(spec.device), _fast(first), _fast(second)
    with _threads(spec.threads), _ready(first, spec.device) as one, _ready(second, spec.device) as other:
        found = bench.measure(
            {"first": partial(one, x), "second": partial(other, x)},
            repeats=31, warmup=2, device=spec.device, shortest_s=1e-2, budget_s=10.0,
        )  # fmt: skip
    return found["first"], found["second"]


def _timed(
    spec: FitSpec,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    groups: Groups,
    images: Tensor,
    about: dict[str, Any],
) -> Costs:
    model = _fast(model).to(spec.device)
    modules = {name: model.get_submodule(name) for name in modules}
    with _ready(model, spec.device), torch.no_grad():
        inputs = inputs_of(model, modules, images)
        candidates: dict[str, Callable[[], object]] = {}
        keys: dict[tuple[str, int], str] = {}
        for group in groups:
            for layer in group.layers:
                for size in group.sizes:
                    conv = _conv(modules[layer.module], size, group.own)
                    x = inputs[layer.module]
                    key = f"{conv} on {tuple(x.shape)}"
                    keys[layer.module, size] = key
                    if key not in candidates:
                        candidates[key] = partial(conv.to(spec.device).eval(), x)
        whole = bench.measure({"whole": partial(model, images)}, repeats=_REPEATS, warmup=3, device=spec.device)
        rows = bench.measure(
            candidates, repeats=_REPEATS, warmup=2, device=spec.device, shortest_s=_SHORTEST, budget_s=2.0
        )
    table = {
        group.name: {size: sum(rows[keys[layer.module, size]].p20 for layer in group.layers) for size in group.sizes}
        for group in groups
    }
    return Costs("latency", whole["whole"].p20, table, {**about, "timings": _REPEATS})


def _fast(model: nn.Module) -> nn.Module:
    """Return a model whose depthwise convolutions are widefield's; its weights are shared."""
    if any(surgery.FastDepthwise().why_not(module) is None for module in model.modules()):
        return surgery.convert(model, surgery.FastDepthwise(), "*")
    return model


@contextmanager
def _ready(model: nn.Module, device: str) -> Iterator[nn.Module]:
    with evaluating(model), torch.no_grad():
        yield model.to(device)


def _conv(module: nn.Module, size: int, own: int) -> nn.Module:
    """Return the convolution that takes the place of ``module`` at a size: itself at its own."""
    return module if size == own else surgery.Resize(size).replacement(module)


def _count(
    group: Group, modules: Mapping[str, nn.Module], size: int, budget: str, model: nn.Module, images: Tensor
) -> float:
    """Return the multiply-accumulates for one image, or the weights, of a group's convolutions at a size."""
    total = 0
    for layer in group.layers:
        module: Any = modules[layer.module]
        weights = size * size * module.out_channels * (module.in_channels // module.groups)
        height, width = (
            -(-side // step) for side, step in zip((layer.height, layer.width), module.stride, strict=True)
        )
        total += weights * (height * width if budget == "macs" else 1)
    return float(total)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Use this many threads of PyTorch in the block."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
