"""Find the convolutions whose size a fit chooses, the layers that share a size, and the sizes each can have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from widefield import surgery
from widefield.fitting.spec import FitSpec
from widefield.report import Report
from widefield.surgery.answers import evaluating
from widefield.tasks import Task
from widefield.train.model import build_network

Assignment = Mapping[str, int]
"""Name of a group -> kernel size of its layers."""


@dataclass(frozen=True)
class Layer:
    """A convolution whose size is chosen."""

    name: str
    """In the network, as recipes name it."""
    module: str
    """In the whole model of the task."""
    height: int
    """Of the map that it reads, in pixels, for the images of the val split."""
    width: int


@dataclass(frozen=True)
class Group:
    """Layers that share a size."""

    name: str
    layers: tuple[Layer, ...]
    own: int
    """Their size in the unchanged network."""
    sizes: tuple[int, ...]
    """Those to choose from, ascending, the own one among them."""

    @property
    def side(self) -> int:
        """Return the smaller side of the smallest map that the layers read."""
        return min(min(layer.height, layer.width) for layer in self.layers)

    def nearest(self, size: int) -> int:
        """Return the largest of the sizes that is not above ``size``, or the smallest."""
        return max((own for own in self.sizes if own <= size), default=self.sizes[0])


@dataclass(frozen=True)
class Groups(Report):
    """The groups of a network, and the sizes and layers that were left out."""

    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> Group:
        return next(group for group in self.groups if group.name == name)

    @property
    def unchanged(self) -> dict[str, int]:
        """Return the assignment of the unchanged network."""
        return {group.name: group.own for group in self.groups}

    @property
    def sizes(self) -> list[int]:
        """Return all sizes that any group has, ascending."""
        return sorted({size for group in self.groups for size in group.sizes})

    def uniform(self, size: int) -> dict[str, int]:
        """Return the assignment of one size, or the nearest that a group has."""
        return {group.name: group.nearest(size) for group in self.groups}

    def modules(self, assignment: Assignment) -> dict[str, int]:
        """Return the size of each layer by its name in the whole model."""
        return {layer.module: assignment[group.name] for group in self.groups for layer in group.layers}

    def summary(self) -> str:
        """Return how many layers, groups and assignments there are, and what was left out."""
        layers = sum(len(group.layers) for group in self.groups)
        count = 1
        for group in self.groups:
            count *= len(group.sizes)
        lines = [f"{layers} convolutions in {len(self.groups)} groups: {count:,} assignments of kernel sizes"]
        return "\n".join([*lines, *self.notes])

    def rows(self) -> list[dict[str, str]]:
        """Return one row per group."""
        return [
            {
                "layers": group.name,
                "convolutions": str(len(group.layers)),
                "map": " or ".join(dict.fromkeys(f"{layer.height}x{layer.width}" for layer in group.layers)),
                "now": f"{group.own}x{group.own}",
                "sizes": ", ".join(map(str, group.sizes)),
            }
            for group in self.groups
        ]


def find_groups(spec: FitSpec, task: Task, images: Tensor) -> Groups:
    """Find the groups of a recipe's network.

    Args:
        spec: the settings.
        task: makes the model of the network.
        images: (N, C, H, W) as in evaluation; one suffices.

    Raises:
        ValueError: no convolution can be converted, or none has two sizes; the message lists the reasons.
    """
    network = build_network(spec.recipe, task)
    convolutions, notes = _convolutions(spec, network)
    parts = surgery.anatomy(network)
    stages = parts.count_stages(list(convolutions))
    model = task.model(network).eval()
    names = {module: name for name, module in model.named_modules()}
    maps = _maps(model, convolutions, images)
    layers = {
        name: Layer(name, names[conv], *maps[name]) for name, conv in convolutions.items() if maps.get(name) is not None
    }
    notes += [f"{name} is left out: it does not run in evaluation mode" for name in convolutions if name not in layers]
    members: dict[Any, list[str]] = {}
    for name in layers:
        key = name if spec.by == "layer" else (stages[name], convolutions[name].kernel_size[0])
        members.setdefault(key, []).append(name)
    numbers = {name: parts.stage_of(name) for name in layers}
    groups = []
    for key, inside in members.items():
        own = convolutions[inside[0]].kernel_size[0]
        label = inside[0] if spec.by == "layer" else _label(key, members, numbers[inside[0]])
        group, note = _group(label, [layers[name] for name in inside], own, spec.kernel_sizes)
        notes += note
        if group is not None:
            groups.append(group)
    if not groups:
        raise ValueError(
            f"no convolution of {spec.recipe.model.name} has two sizes to choose from: {'; '.join(notes)}. Give other "
            f"kernel_sizes, or larger images."
        )
    return Groups(tuple(groups), tuple(notes))


def _convolutions(spec: FitSpec, network: nn.Module) -> tuple[dict[str, nn.Conv2d], list[str]]:
    """Return the convolutions to fit by name, and notes about those that are not."""
    config = surgery.Elastic(spec.kernel_sizes)
    where = None if spec.where is None else list(spec.where)
    found: dict[str, Any] = {
        step.name: network.get_submodule(step.name) for step in surgery.plan(network, config, where).replaced
    }
    if not found:
        try:
            surgery.convert(network, config, where)
        except ValueError as error:
            converted = spec.recipe.conversion is not None
            hint = " The recipe's own conversions come first: leave them out to fit plain kernels." if converted else ""
            raise ValueError(f"{spec.recipe.model.name}: {error}{hint}") from error
    depthwise = {name: conv for name, conv in found.items() if conv.groups == conv.in_channels > 1}
    if where is None and depthwise and len(depthwise) < len(found):
        rest = len(found) - len(depthwise)
        return depthwise, [f"{rest} convolutions that are not depthwise keep their size; where selects them"]
    return found, []


def _label(key: tuple[int, int], members: Mapping[Any, Sequence[str]], stage: int | None) -> str:
    """Return the name of a group of a stage, with its size if the stage has several."""
    rank, own = key
    label = f"stage {(rank if stage is None else stage) + 1}"
    return f"{label}, {own}x{own}" if sum(other[0] == rank for other in members) > 1 else label


def _group(label: str, layers: Sequence[Layer], own: int, sizes: Sequence[int]) -> tuple[Group | None, list[str]]:
    """Return a group with the sizes that fit its maps, or None without a choice; and notes on what is left out."""
    side = min(min(layer.height, layer.width) for layer in layers)
    largest = 2 * side - 1
    fitting = sorted({size for size in sizes if size <= largest} | {own})
    gone = [f"{size}x{size}" for size in sizes if size not in fitting]
    notes = []
    if gone:
        notes.append(f"{label}: {', '.join(gone)} left out, as a kernel on {side} pixels reaches at most {largest}")
    if len(fitting) < 2:
        return None, [*notes, f"{label} keeps {own}x{own}: no other size fits"]
    return Group(label, tuple(layers), own, tuple(fitting)), notes


def _maps(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor) -> dict[str, tuple[int, int]]:
    """Return (height, width) of the first map that each layer reads; layers that do not run are missing."""
    return {name: (shape[2], shape[3]) for name, (shape, _) in _calls(model, layers, images).items()}


def inputs_of(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor) -> dict[str, Tensor]:
    """Return the first input of each layer in evaluation mode, (N, C, H, W); layers that do not run are missing."""
    return {name: x for name, (_, x) in _calls(model, layers, images).items()}


def _calls(
    model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor
) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    found: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    with _hooked(layers, found), evaluating(model), torch.no_grad():
        model(images)
    return found


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], found: dict[str, tuple[tuple[int, ...], Tensor]]) -> Iterator[None]:
    """Record the first input of each layer in the block."""

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.setdefault(name, (tuple(args[0].shape), args[0].detach()))

        return hook

    handles = [module.register_forward_pre_hook(record(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
