"""Which expert each image got, how evenly a mixture uses its experts, and whether its router looks at the image at all.

MoRF (Lian, Yu, Wang 2024), section 4.3 and figure 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from widefield import _checks, report
from widefield.analysis._model import batched, chunks, running, track, visited, watched
from widefield.analysis._result import Result, plain
from widefield.analysis._routing import CONSTANT, DEAD, Routing, Variance, collapse
from widefield.analysis._routing_figures import CAPTIONS, DRAWN
from widefield.nn import FusedMoRFConv2d, MoRFConv2d
from widefield.surgery.inputs import pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "CONSTANT",
    "DEAD",
    "Routing",
    "RoutingStatistics",
    "Variance",
    "collapse",
    "mixtures",
    "recording",
    "routing_statistics",
    "routing_weights",
]

UNKNOWN = -1
"""Label of an image whose class is not known."""


@dataclass(frozen=True)
class RoutingStatistics(Result):
    """Routing of a set of images through every mixture of a model.

    Attributes:
        blocks: one entry per mixture, in the order of the modules.
        labels: class of each image, (N,) int64, an index into ``classes``; -1 where it is not known.
        classes: their names.
        names: what to call each image.
    """

    name: str
    about: Mapping[str, Any]
    blocks: tuple[Routing, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    names: tuple[str, ...]

    title: ClassVar[str] = "Routing"
    lead: ClassVar[str] = (
        "Which experts the mixtures of a network choose, for which images, and whether their routers look at the "
        "images at all."
    )

    def by_class(self) -> dict[str, RoutingStatistics]:
        """Return the statistics of each class that has images, by its name."""
        members = {name: np.flatnonzero(self.labels == i) for i, name in enumerate(self.classes)}
        return {name: self.of(images) for name, images in members.items() if len(images)}

    def of(self, images: np.ndarray) -> RoutingStatistics:
        """Return the statistics of some of the images, by their indices."""
        return replace(
            self,
            about={**self.about, "images": len(images), "labeled": int((self.labels[images] >= 0).sum())},
            blocks=tuple(block.of(images) for block in self.blocks),
            labels=self.labels[images],
            names=tuple(self.names[k] for k in images),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return every number: of each block its summary, its weights by image, and what depends on the classes."""
        parts = self.by_class()
        blocks = []
        for i, block in enumerate(self.blocks):
            smallest, largest = block.extremes()
            blocks.append(
                {
                    **block.to_dict(),
                    "smallest_fields": [self.names[k] for k in smallest],
                    "largest_fields": [self.names[k] for k in largest],
                    "variance": block.variance(self.labels),
                    "by_class": {
                        name: {"frequencies": part.blocks[i].frequencies(), "shares": part.blocks[i].shares()}
                        for name, part in parts.items()
                    },
                    "weights": block.weights,
                }
            )
        fields = {key: getattr(self, key) for key in ("name", "about", "labels", "classes", "names")}
        return {"kind": type(self).__name__, **plain({**fields, "blocks": blocks})}

    def rows(self) -> list[dict[str, str]]:
        """Return one row a block; experts in the order that ``about`` gives.

        The last columns: how much the weights vary over the images (:meth:`Routing.variation`), and how much of that
        variance the class explains (:attr:`Variance.eta_squared`).
        """
        rows = []
        for block in self.blocks:
            explained = block.variance(self.labels).eta_squared
            rows.append(
                {
                    "model": self.name,
                    "block": block.name,
                    "chosen, %": _percentages(block.frequencies()),
                    "weight, %": _percentages(block.shares()),
                    "entropy": f"{block.entropy():.3f}",
                    "Gini": f"{block.gini():.3f}",
                    "dead": ", ".join(block.dead()) or "-",
                    "field, px": f"{block.fields().mean():.2f}",
                    "varies, %": f"{100 * block.variation():.2g}" + ("" if block.depends_on_input else " (constant)"),
                    "by class, %": "-" if np.isnan(explained) else f"{100 * explained:.0f}",
                }
            )
        return rows

    @classmethod
    @report.paper()
    def draw(cls, results: Mapping[str, RoutingStatistics], *, kind: str = "pies") -> Figure:
        """Draw one figure.

        Args:
            results: by name.
            kind: "pies": how often each expert is chosen in each block (the paper's figure 3); "heat": the experts'
                mean shares of the routing weight, blocks x experts; "classes": by how much these differ for each
                class from the mean over the classes (of many, the twenty that differ most); "fields": how large a
                field the images want in each block, and which want the extremes.

        Raises:
            ValueError: another kind; or "classes", and no image of a result has a label.
        """
        return DRAWN[_checks.choice("kind", kind, tuple(DRAWN))](results)

    @classmethod
    def figures(cls, results: Mapping[str, RoutingStatistics], **options: Any) -> dict[str, Figure]:
        """Return all kinds that apply, by caption, whichever kind ``options`` names."""
        labeled = all((result.labels >= 0).any() for result in results.values())
        return {
            caption: cls.draw(results, **{**options, "kind": kind})
            for kind, caption in CAPTIONS.items()
            if kind != "classes" or labeled
        }


def routing_statistics(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    classes: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    name: str | None = None,
    about: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> RoutingStatistics:
    """Route images through a model and say which experts of its mixtures they get.

    MoRF (Lian, Yu, Wang 2024), section 4.3. Evaluation mode, hence hard routing without its noise; the model is left
    as it was found. Only the routing weights are kept, N x n numbers for each mixture.

    Args:
        model: with layers :class:`widefield.nn.MoRFConv2d`, or reparameterized ones.
        batches: images (N, C, H, W), normalized: one tensor, or batches such as a loader gives: tensors,
            dictionaries with "image" and, if known, "label", or pairs (images, labels). Labels are integers (N,); -1
            where the class is not known.
        classes: their names; default: the numbers.
        images: what to call each image; default: "image 0" and so on.
        name: of the model, for tables and figures; default: its class.
        about: how the images came about, to be kept with the result.
        batch_size: images at a time; larger batches are split.
        progress: show a bar.

    Raises:
        ValueError: the model has no mixture, or calls one several times for an image; fewer than two images; a
            label without a class; names of another number of images; weights that are not finite.
        TypeError: images or labels of another kind.
    """
    _checks.integer("batch_size", batch_size)
    labels: list[Tensor] = []
    given = images.split(batch_size) if isinstance(images, Tensor) else batched(images)
    found = routing_weights(
        model, _images(track(given, "routing", show=progress), labels, classes), batch_size=batch_size
    )
    known = torch.cat(labels).numpy()
    count = len(known)
    if count < 2:
        raise ValueError(f"routing statistics need at least two images; got {count}.")
    for routing in found:
        if len(routing.weights) != count:
            raise ValueError(f"the model calls {routing.name!r} {len(routing.weights)} times for {count} images.")
        if not np.isfinite(routing.weights).all():
            raise ValueError(f"the routing weights of {routing.name!r} are not finite.")
    if names is not None and len(names) != count:
        raise ValueError(f"names has {len(names)} entries for {count} images: give one each.")
    own = {
        "images": count,
        "labeled": int((known >= 0).sum()),
        "routing": " and ".join(sorted({"hard" if routing.hard else "soft" for routing in found})),
        "experts": " or ".join(dict.fromkeys(", ".join(routing.experts) for routing in found)),
        "dead below": f"{DEAD:g} of an even share",
        "constant below": f"{100 * CONSTANT:g} % of variation",
    }
    return RoutingStatistics(
        name=type(model).__name__ if name is None else name,
        about={**(about or {}), **own},
        blocks=tuple(found),
        labels=known,
        classes=tuple(map(str, range(known.max() + 1) if classes is None else classes)),
        names=tuple(names or (f"image {i}" for i in range(count))),
    )


def routing_weights(
    model: nn.Module, images: Tensor | Iterable[Any], *, batch_size: int | None = None
) -> list[Routing]:
    """Return the routing weights of every mixture in a model, without labels: what statistics are made of.

    Args:
        model, batches: as in :func:`routing_statistics`.
        batch_size: images at a time; None: as they come.

    Raises:
        ValueError: the model has no mixture, or does not call one; there are no images.
    """
    layers = mixtures(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no mixture of receptive fields: convert it with widefield.MoRF first."
        )
    with visited(model), torch.no_grad(), recording(model) as recorded:
        for part in chunks(images, model, batch_size):
            with running(model, part):
                model(part)
    found = recorded()
    missing = set(layers) - {routing.name for routing in found}
    if missing:
        raise ValueError(f"{type(model).__name__} does not call its mixtures {sorted(missing)}.")
    return found


def mixtures(model: nn.Module) -> dict[str, MoRFConv2d | FusedMoRFConv2d]:
    """Return the mixtures of a model by name, reparameterized ones included."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (MoRFConv2d, FusedMoRFConv2d))}


@contextmanager
def recording(model: nn.Module) -> Iterator[Callable[[], list[Routing]]]:
    """Watch a model's mixtures while the block runs it.

    Yields:
        a function () -> one entry for each mixture that was called so far. The weights stay on their device until
        then: to fetch those of every batch would make a GPU wait.
    """
    layers = mixtures(model)
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def see(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen[name].append(output.detach().float())

    def recorded() -> list[Routing]:
        return [
            Routing(
                name,
                tuple(zip(layer.kernel_sizes, layer.dilations, strict=True)),
                torch.cat(seen[name]).cpu().numpy(),
                layer.router.routing == "hard",
            )
            for name, layer in layers.items()
            if seen[name]
        ]

    with watched({name: layer.router for name, layer in layers.items()}, see):
        yield recorded


def _images(batches: Iterable[Any], labels: list[Tensor], classes: Sequence[str] | None) -> Iterator[Tensor]:
    """Yield the images of each batch, and append its labels to ``labels``."""
    for batch in batches:
        if isinstance(batch, Mapping) and not batch:  # every image of it was left out
            continue
        images = pixels(batch)
        given = batch.get("label") if isinstance(batch, Mapping) else None
        if isinstance(batch, (tuple, list)) and len(batch) > 1:
            given = batch[1]
        labels.append(_labels(given, len(images), classes))
        yield images


def _labels(given: Any, count: int, classes: Sequence[str] | None) -> Tensor:
    if given is None:
        return torch.full((count,), UNKNOWN)
    if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex():
        kind = f"{given.dtype} tensor" if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"labels must be tensors of integers, one an image; got a {kind}.")
    if given.shape != (count,):
        raise ValueError(f"labels must have the shape ({count},), one an image; got {tuple(given.shape)}.")
    labels = given.detach().cpu().long()
    if classes is not None and count and int(labels.max()) >= len(classes):
        raise ValueError(f"the label {int(labels.max())} has no name: classes has {len(classes)}.")
    return labels.clamp(min=UNKNOWN)


def _percentages(shares: np.ndarray) -> str:
    return "/".join(f"{100 * share:.0f}" for share in shares)
