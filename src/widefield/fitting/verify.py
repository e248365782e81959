"""Compare the plain network with the unchanged one on the report half, which nothing was selected on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from widefield import analysis, report
from widefield._files import write_whole
from widefield._intervals import Interval, paired
from widefield.data import SampleSet
from widefield.fitting.choose import Choice
from widefield.fitting.costs import compare_latency, counted
from widefield.fitting.figures import DRAWN_FIELD, FIELD
from widefield.fitting.halves import Part
from widefield.fitting.losses import autocast, device_of
from widefield.fitting.recipes import PLAIN, UNCHANGED
from widefield.fitting.result import CHEAPER, GAIN, NO_MATTER, NOTHING, Network, SizeRow, Verdict
from widefield.fitting.spec import FitSpec
from widefield.loading.trained import load_trained
from widefield.tasks import Batch, Task
from widefield.train.evaluation import measure
from widefield.train.loaders import batches, shut_down, val_loader

_CHEAPER = 0.97
"""Largest relative cost that is called cheaper."""
_SIZE_GROUPS = 4
_BUDGETS = {"latency": "Latency", "macs": "Multiply-accumulates", "params": "Parameters"}
_SVG = "http://www.w3.org/2000/svg"
"""Name space of a file; parts of a page do without it."""
_FIELD_IMAGES = 8


@dataclass(frozen=True)
class Measured:
    """A trained network on the report half."""

    metrics: dict[str, float]
    ratings: list[float]
    """Of each image; NaN if it has none."""
    indices: list[int]
    """Places of the images in the half."""
    rating: str


def evaluate_half(model: nn.Module, half: Part, task: Task, spec: FitSpec) -> Measured:
    """Measure a network's metrics and its rating of each image."""
    device, recipe = device_of(), spec.recipe
    ratings: list[float] = []
    indices: list[int] = []
    words: list[str] = []

    def each(batch: Batch, outputs: dict[str, Any]) -> None:
        rated, name = _rated(task, outputs)
        ratings.extend(rated.double().cpu().tolist())
        indices.extend(batch["index"].tolist())
        words.append(name)

    loader = val_loader(half, task.collate, recipe.batch_size, recipe.workers)
    model.to(device)
    try:
        with autocast(recipe, device):
            found = measure(model, batches(loader), task, device, each=each)
    finally:
        shut_down(loader)
        model.cpu()
    return Measured(found.metrics, ratings, indices, words[0])


def _rated(task: Task, outputs: Mapping[str, Any]) -> tuple[Tensor, str]:
    """Return a rating of each image, larger being better, and what it is."""
    rated = task.rate(outputs)
    if rated is not None:
        return rated, task.rating
    preds, target = outputs.get("preds"), outputs.get("target")
    if isinstance(preds, Tensor) and isinstance(target, Tensor) and preds.ndim == 2 and target.ndim == 1:
        return (preds.argmax(1) == target).float(), "whether its class is right"
    value = outputs.get("value")
    if isinstance(value, Tensor):
        return -value, "its loss, negative"
    raise ValueError(f"the task {type(task).__name__} rates no single images: define its method rate.")


def verify(
    spec: FitSpec,
    choice: Choice,
    folders: Mapping[str, Path],
    task: Task,
    report_half: Part,
    images: Tensor,
    say: Callable[[str], None],
) -> tuple[Verdict, dict[str, Any]]:
    """Return the verdict, and the ratings of all images for the record.

    Args:
        spec: the settings.
        choice: the chosen sizes.
        folders: of the runs "plain" and "unchanged"; the same one if the unchanged sizes were chosen.
        task: of both.
        report_half: the images to compare on.
        images: (N, C, H, W), whose latency counts.
        say: called with a line of progress.
    """
    same = folders[PLAIN] == folders[UNCHANGED]
    models = {name: load_trained(folder, "last") for name, folder in folders.items()}
    measured: dict[str, Measured] = {}
    for name, model in models.items():
        measured[name] = measured[UNCHANGED] if same and measured else evaluate_half(model, report_half, task, spec)
        say(f"    {name}: {task.headline} {measured[name].metrics[task.headline]:.4g}")
    plain, unchanged = measured[PLAIN], measured[UNCHANGED]
    difference = paired(plain.ratings, unchanged.ratings, spec.seed)
    fields, notes = _fields(spec, models, report_half, same=same)
    times = compare_latency(models[PLAIN], models[UNCHANGED], images, spec)
    networks = {
        name: _network(spec, folders[name], model, measured[name], row.p20, fields.get(name, {}), images)
        for (name, model), row in zip(((PLAIN, models[PLAIN]), (UNCHANGED, models[UNCHANGED])), times, strict=True)
    }
    if same:
        networks[PLAIN] = networks[UNCHANGED]
    cost = _relative_cost(spec, networks[PLAIN], networks[UNCHANGED])
    words, recommended = verdict_words(difference, cost, matters=choice.matters, same=same)
    verdict = Verdict(
        words=words,
        text=_text(words, task.headline, networks, difference, cost, plain.rating, spec, same=same),
        recommended=recommended,
        headline=task.headline,
        rating=plain.rating,
        difference=difference,
        plain=networks[PLAIN],
        unchanged=networks[UNCHANGED],
        sizes=_by_size(report_half, plain, unchanged, spec.seed),
        notes=tuple(notes),
    )
    return verdict, {"indices": plain.indices, PLAIN: plain.ratings, UNCHANGED: unchanged.ratings}


def verdict_words(difference: Interval, cost: float, *, matters: bool, same: bool) -> tuple[str, str]:
    """Return the verdict and the name of the run to use.

    Args:
        difference: of the ratings, plain minus unchanged.
        cost: of the plain network relative to the unchanged one.
        matters: whether the sizes changed the loss of the probed network.
        same: whether the unchanged sizes were chosen.
    """
    if same:
        return (NOTHING if matters else NO_MATTER), UNCHANGED
    better, worse, cheaper = difference.low > 0, difference.high < 0, cost <= _CHEAPER
    if not matters:  # one comparison in forty is better by chance
        return NO_MATTER, PLAIN if better or (cheaper and not worse) else UNCHANGED
    if better:
        return GAIN, PLAIN
    if worse:
        return NOTHING, UNCHANGED
    return (CHEAPER, PLAIN) if cheaper else (NOTHING, UNCHANGED)


def _relative_cost(spec: FitSpec, plain: Network, unchanged: Network) -> float:
    pairs = {
        "latency": (plain.latency, unchanged.latency),
        "macs": (plain.macs, unchanged.macs),
        "params": (plain.parameters, unchanged.parameters),
    }
    mine, other = pairs[spec.budget]
    return mine / other


def _network(
    spec: FitSpec,
    folder: Path,
    model: nn.Module,
    found: Measured,
    latency: float,
    field: dict[str, float],
    images: Tensor,
) -> Network:
    cost = counted(model, images)
    inside = folder.is_relative_to(spec.folder)
    place = folder.relative_to(spec.folder) if inside else folder.absolute()
    return Network(str(place), found.metrics, cost.parameters, cost.macs, latency, field)


def _text(
    words: str,
    headline: str,
    networks: Mapping[str, Network],
    difference: Interval,
    cost: float,
    rating: str,
    spec: FitSpec,
    *,
    same: bool,
) -> str:
    before, after = networks[UNCHANGED].metrics[headline], networks[PLAIN].metrics[headline]
    if same:
        reason = "All sizes give the same loss within its error" if words == NO_MATTER else "No other sizes are better"
        return f"{reason}: keep the sizes as they are ({headline} {before:.4f} on the report half)."
    measured = (
        f"{headline} is {after:.4f} with the chosen sizes and {before:.4f} with the unchanged ones on the report half "
        f"of {difference.images} images. Of each image, {rating.rstrip('.')} changes by {difference.mean:+.4f} on "
        f"average (95 % interval {difference.low:+.4f} to {difference.high:+.4f}). "
        f"{_BUDGETS[spec.budget]}: {cost:.2f} of the unchanged network's."
    )
    if words == NO_MATTER:
        found = f"All sizes give the same loss of the probed network within its error. {measured}"
        if difference.low > 0 or difference.high < 0:
            found += " The difference is then one of training. A longer probe, or another seed, may say otherwise."
        return found
    if words == NOTHING:
        return f"{measured} Keep the unchanged network."
    return measured


def _by_size(half: Part, plain: Measured, unchanged: Measured, seed: int) -> tuple[SizeRow, ...]:
    """Return the ratings by quartile of the objects' size, if the samples have a size in pixels."""
    first = half[0] if len(half) else None
    size = None if first is None else first.get("size")
    if not isinstance(size, Tensor) or size.ndim != 0 or not size.is_floating_point():
        return ()
    sizes = np.array([float((half[index] or {}).get("size", np.nan)) for index in plain.indices])
    order = np.argsort(sizes, kind="stable")
    rows = []
    for part in np.array_split(order, _SIZE_GROUPS):
        mine, other = np.array(plain.ratings)[part], np.array(unchanged.ratings)[part]
        if np.isfinite(mine - other).any():
            low, high = float(sizes[part].min()), float(sizes[part].max())
            rows.append(
                SizeRow(low, high, float(np.nanmean(mine)), float(np.nanmean(other)), paired(mine, other, seed))
            )
    return tuple(rows)


def _fields(
    spec: FitSpec, models: Mapping[str, nn.Module], half: Part, *, same: bool
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Return the area ratios of the effective receptive field of each network, and draw the fields."""
    try:
        images = _images(half)
        fields = {
            name: analysis.effective_receptive_field(model, images, name=name)
            for name, model in models.items()
            if not (same and name == PLAIN)
        }
    except (ValueError, RuntimeError, TypeError) as error:
        return {}, [f"The effective receptive field could not be measured: {error}"]
    analysis.save(fields, spec.folder / "erf.json")
    figure = analysis.ReceptiveField.draw(fields)
    write_whole(spec.folder / FIELD, report.png(figure))
    drawn = report.svg(figure, analysis.ReceptiveField.title).replace("<svg ", f"<svg xmlns='{_SVG}' ", 1)
    write_whole(spec.folder / DRAWN_FIELD, drawn.encode())
    return {
        name: {f"{share:g}": ratio for share, ratio in found.area_ratio.items()} for name, found in fields.items()
    }, []


def _images(half: SampleSet) -> Tensor:
    """Return the first images of a half that have the size of the first one, (N, C, H, W)."""
    found: list[Tensor] = []
    for index in range(len(half)):
        sample = half[index]
        if sample is not None and (not found or sample["image"].shape == found[0].shape):
            found.append(sample["image"])
        if len(found) == _FIELD_IMAGES:
            break
    if not found:
        raise ValueError("no image of the report half can be read.")
    return torch.stack(found)
