"""Measure routing: each image's experts, how evenly experts are used, and whether routers depend on the image.

MoRF (Lian, Yu, Wang 2024), section 4.3 and figure 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from widefield import _checks, report
from widefield.analysis._model import batched, chunks, running, track, visited, watched
from widefield.analysis._result import Result, plain
from widefield.analysis._routing import CONSTANT, DEAD, RoutedImages, Routing, Variance, block_names, collapse
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
    "block_names",
    "collapse",
    "mixtures",
    "recording",
    "routing_statistics",
    "routing_weights",
]

UNKNOWN = -1
"""Label of an image of unknown class."""


@dataclass(frozen=True)
class RoutingStatistics(RoutedImages, Result):
    """Routing of a set of images through every mixture of a model."""

    title: ClassVar[str] = "Routing"
    lead: ClassVar[str] = (
        "Which experts the mixtures of a network choose for which images, and whether their routers depend on the "
        "image."
    )

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers: of each block a summary, the weights of each image, and statistics by class."""
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
        """Return one row per block; experts in the order given in ``about``.

        The last columns: how much the weights vary over images (:meth:`Routing.variation`), and the share of that
        variance explained by the class (:attr:`Variance.eta_squared`).
        """
        rows = []
        for name, block in zip(block_names(self.blocks), self.blocks, strict=True):
            explained = block.variance(self.labels).eta_squared
            rows.append(
                {
                    "model": self.name,
                    "block": name,
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
    def reading(cls, results: Mapping[str, RoutingStatistics]) -> str:
        """Return how many blocks have dead experts or ignore the image, for each model."""
        parts = []
        for name, result in results.items():
            dead = sum(bool(block.dead()) for block in result.blocks)
            constant = sum(not block.depends_on_input for block in result.blocks)
            total = len(result.blocks)
            parts.append(f"in {name} {dead} of {total} blocks have dead experts, and {constant} ignore the image")
        return f"Do the mixtures mix? {_capital('; '.join(parts))}."

    @classmethod
    @report.paper()
    def draw(cls, results: Mapping[str, RoutingStatistics], *, kind: str = "choices") -> Figure:
        """Draw one figure.

        Args:
            results: by name.
            kind: "choices": how often each expert is chosen in each block (the paper's figure 3). "heat": the experts'
                mean shares of the routing weight, blocks by experts. "classes": difference of these shares between
                classes, for up to twenty classes with the largest differences. "fields": field size that the images
                prefer in each block, and the images with the extremes.

        Raises:
            ValueError: unknown kind; or "classes", and a result has no labeled image.
        """
        return DRAWN[_checks.choice("kind", kind, tuple(DRAWN))](results)

    @classmethod
    def figures(cls, results: Mapping[str, RoutingStatistics], **options: Any) -> dict[str, Figure]:
        """Return all kinds that apply, by caption, whatever kind ``options`` names."""
        labeled = all((result.labels >= 0).any() for result in results.values())
        return {
            caption: cls.draw(results, **{**options, "kind": kind})
            for kind, caption in CAPTIONS.items()
            if kind != "classes" or labeled
        }


@_checks.guided
def routing_statistics(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    classes: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    batch_size: int = 8,
    name: str | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> RoutingStatistics:
    """Route images through a model and report which experts of its mixtures they get.

    MoRF (Lian, Yu, Wang 2024), section 4.3. The model runs in evaluation mode, so hard routing has no noise. Only
    routing weights are kept, N x n numbers per mixture.

    Args:
        model: with :class:`widefield.nn.MoRFConv2d` layers, reparameterized or not; left unchanged.
        images: normalized images (N, C, H, W), or batches of them: tensors, dictionaries with "image" and optionally
            "label", or pairs (images, labels). Labels are integers (N,); -1 if unknown.
        classes: class names. Default: the numbers.
        names: name of each image. Default: "image 0" and so on.
        batch_size: images at a time; larger batches are split.
        name: the model's name in tables and figures. Default: its class name.
        about: facts to store with the result.
        progress: show a progress bar.

    Raises:
        ValueError: the model has no mixture, or calls one several times per image; there are fewer than two images; a
            label has no class name; another number of names than images; weights are not finite.
        TypeError: images or labels have the wrong type.
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


@_checks.guided
def routing_weights(
    model: nn.Module, images: Tensor | Iterable[Any], *, batch_size: int | None = None
) -> report.Listing[Routing]:
    """Return the routing weights of every mixture in a model, without labels.

    Args:
        model, images: as in :func:`routing_statistics`.
        batch_size: images at a time; None keeps the given batches.

    Raises:
        ValueError: the model has no mixture or does not call one; there are no images.
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
    return report.Listing(found)


def mixtures(model: nn.Module) -> dict[str, MoRFConv2d | FusedMoRFConv2d]:
    """Return a model's mixtures by name, including reparameterized ones."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (MoRFConv2d, FusedMoRFConv2d))}


@contextmanager
def recording(model: nn.Module) -> Iterator[Callable[[], list[Routing]]]:
    """Record the routing weights of a model's mixtures while the block runs it.

    Yields:
        A function () -> one entry per mixture called so far. Weights stay on their device until then, as copying those
        of each batch would stall a GPU.
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
        if isinstance(batch, Mapping) and not batch:  # all of its images were left out
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


def _capital(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}"


def _percentages(shares: np.ndarray) -> str:
    return "/".join(f"{100 * share:.0f}" for share in shares)
