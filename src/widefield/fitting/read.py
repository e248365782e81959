"""Read the probed network: its losses on the selection half, for many assignments of kernel sizes.

Many assignments are read on the first images, and the promising ones on all. Losses are kept per image, so that
assignments are compared in pairs. Every reading is a function of the probe's weights, and is saved at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from widefield import surgery
from widefield.data import SampleSet
from widefield.fitting.choose import assignment_of, first_readings
from widefield.fitting.groups import Assignment, Groups
from widefield.fitting.halves import Part
from widefield.fitting.losses import Losses, Norms, device_of, ring_energies
from widefield.fitting.spec import FitSpec
from widefield.nn import SameAligned
from widefield.tasks import Task
from widefield.train.checkpoint import write_text
from widefield.train.recipe import Recipe

FILE = "readings.json"
_FIRST = 256
"""Images of the first readings."""
_WHOLE = 4096
"""Most images of a whole reading."""
_SAVE_S = 5.0
"""Seconds between saves."""

Key = tuple[int, ...]


@dataclass
class Readings:
    """The losses of the probed network.

    Attributes:
        first: sizes in the order of the groups -> losses of the first images.
        whole: the same for all images of the selection half, for some of the assignments.
        untrained: mean loss of the network before training, or of the best answer that is the same for all images if
            that is smaller; None: not read yet.
        rings: layer -> share of each square ring in the squares of its largest kernel, center first.
    """

    first: dict[Key, list[float]] = field(default_factory=dict)
    whole: dict[Key, list[float]] = field(default_factory=dict)
    untrained: float | None = None
    rings: dict[str, list[float]] = field(default_factory=dict)

    @property
    def means(self) -> dict[Key, float]:
        """Return the mean loss of each first reading."""
        return {key: float(np.mean(values)) for key, values in self.first.items()}

    def save(self, folder: Path) -> None:
        """Write ``readings.json``; raises OSError."""
        entries = {
            name: [{"sizes": list(key), "losses": values} for key, values in found.items()]
            for name, found in (("first", self.first), ("whole", self.whole))
        }
        content = {"untrained": self.untrained, "rings": self.rings, **entries}
        write_text(folder / FILE, json.dumps(content) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Readings:
        """Read ``readings.json``; without the file, nothing was read yet."""
        if not (folder / FILE).is_file():
            return cls()
        found: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        first, whole = (
            {tuple(entry["sizes"]): entry["losses"] for entry in found[name]} for name in ("first", "whole")
        )
        return cls(first, whole, found["untrained"], found["rings"])


class Probed:
    """The probed network at any assignment.

    Args:
        model: with elastic convolutions; moved to the device.
        groups: of its network.
        recipe: precision, batch size and workers.
        task: what it was trained for.
        train: the train split, for the statistics of batch norms.
    """

    def __init__(self, model: nn.Module, groups: Groups, recipe: Recipe, task: Task, train: SampleSet) -> None:
        self.device = device_of()
        self.model = model.to(self.device)
        if recipe.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.groups = groups
        self._norms = Norms(self.model, train, task, recipe, self.device)
        self._elastic = _elastic_names(self.model, groups)

    def choose(self, assignment: Assignment) -> nn.Module:
        """Give the network the sizes of an assignment and the statistics for them; return it."""
        sizes = {self._elastic[name]: size for name, size in self.groups.modules(assignment).items()}
        surgery.choose_sizes(self.model, sizes)
        self._norms.update()
        return self.model

    def plain(self, assignment: Assignment) -> nn.Module:
        """Return the plain network of an assignment, on the CPU and in evaluation mode."""
        self.choose(assignment)
        merged, _ = surgery.fuse_layers(self.model, select=lambda module: isinstance(module, surgery.Elastic.layers))
        for group in self.groups:
            if assignment[group.name] == group.own:  # the recipe does not resize these, so they keep their kind
                for layer in group.layers:
                    module = merged.get_submodule(layer.module)
                    if isinstance(module, SameAligned):
                        merged.set_submodule(layer.module, module.fuse())
        return merged.cpu().eval()

    def rings(self) -> dict[str, list[float]]:
        """Return the ring energies of each layer's largest kernel."""
        surgery.choose_sizes(self.model)
        layers = surgery.elastic_layers(self.model)
        return {
            layer.name: list(ring_energies(layers[self._elastic[layer.module]].kernel()))
            for group in self.groups
            for layer in group.layers
        }


def _elastic_names(model: nn.Module, groups: Groups) -> dict[str, str]:
    """Return each layer's name in the whole model -> that of the elastic convolution in it."""
    names = list(surgery.elastic_layers(model))
    wanted = [layer.module for group in groups for layer in group.layers]
    found = {layer: next((n for n in names if n == layer or n.startswith(f"{layer}.")), "") for layer in wanted}
    missing = [layer for layer, name in found.items() if not name]
    if missing:
        raise ValueError(f"the probe's network has no elastic convolution {missing[0]!r}: it is of another fit.")
    return found


class Reader:
    """Reads assignments on the selection half, and keeps what was read in the fit's folder.

    Args:
        spec: the settings.
        groups: of the network.
        task: what it was trained for.
        select: the selection half.
        say: called with a line of progress.
    """

    def __init__(
        self, spec: FitSpec, groups: Groups, task: Task, select: Part, say: Callable[[int, int], None]
    ) -> None:
        self.spec, self.groups, self._say = spec, groups, say
        self.readings = Readings.load(spec.folder)
        device = device_of()
        self._first = Losses(_spread(select, _FIRST), task, spec.recipe, device)
        self._whole = Losses(_spread(select, _WHOLE), task, spec.recipe, device)
        self._saved = time.monotonic()

    def read_first(self, probed: Probed) -> None:
        """Read the first assignments."""
        keys = first_readings(self.groups, self.spec.readings, self.spec.seed)
        self._read(probed, keys, self.readings.first, self._first)

    def read_whole(self, probed: Probed, keys: Iterable[Key]) -> None:
        """Read assignments on all images of the selection half."""
        self._read(probed, list(keys), self.readings.whole, self._whole)

    def read_untrained(self, model: nn.Module) -> None:
        """Read the network before training, and what is known without any image.

        Where most pixels are background, the first steps of training take off more loss than all later ones.
        """
        if self.readings.untrained is None:
            self.readings.untrained = min(float(np.mean(self._first(model))), self._first.blind())
            self.readings.save(self.spec.folder)

    def read_rings(self, probed: Probed) -> None:
        """Read the energies of the kernels' rings."""
        if not self.readings.rings:
            self.readings.rings = probed.rings()
            self.readings.save(self.spec.folder)

    def _read(self, probed: Probed, keys: Sequence[Key], found: dict[Key, list[float]], losses: Losses) -> None:
        for number, key in enumerate(keys):
            if key not in found:
                found[key] = losses(probed.choose(assignment_of(key, self.groups)))
                if time.monotonic() - self._saved > _SAVE_S:
                    self.readings.save(self.spec.folder)
                    self._saved = time.monotonic()
            self._say(number + 1, len(keys))
        self.readings.save(self.spec.folder)


def _spread(half: Part, count: int) -> Part:
    """Return at most ``count`` samples of a half, evenly over it."""
    if len(half) <= count:
        return half
    places = np.linspace(0, len(half) - 1, count).round().astype(int)
    return Part(half.whole, [half.indices[int(place)] for place in places])
