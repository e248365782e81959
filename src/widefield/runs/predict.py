"""Predict images in files with any model: classes with their probabilities, classes of pixels, objects, or poses."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from widefield import _checks, bench, report
from widefield._files import write_whole
from widefield.data.decoding import read
from widefield.data.listing import counted
from widefield.runs.box_files import BoxOutsideError
from widefield.runs.coco_results import CocoEntries, read_ids
from widefield.runs.drawing import DRAWINGS, drawing_of
from widefield.runs.drawing_parts import MIN_SCORE, Drawing, preview
from widefield.runs.image_paths import Images, find_images, names_of
from widefield.runs.loading import load
from widefield.runs.poses import BoxSource, box_source, pose_prediction
from widefield.runs.sharing import subject_of
from widefield.runs.subjects import Subject
from widefield.surgery.inputs import place
from widefield.tasks import BoxPrediction, PosePrediction, Prediction, Task
from widefield.train.interrupt import ignore_signals

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ON_A_PAGE = 60
"""Largest number of images on a page and in a notebook."""
_IN_A_FIGURE = 12
_Item = tuple[int, Tensor | str, tuple[int, int]]
"""Place of an image, what the model gets of it or why it cannot be read, and (height, width) of the file."""


@dataclass(frozen=True)
class Predicted:
    """An image and what a model predicts for it.

    Attributes:
        path: the file.
        name: its path in the folder that was given, or its name; different for every image.
        prediction: what the model predicts.
        decoding: how the file was decoded: arguments of `widefield.data.decoding.read`.
    """

    path: Path
    name: str
    prediction: Prediction
    decoding: Mapping[str, Any] = field(default_factory=dict)

    def image(self) -> Image.Image:
        """Return the image as the model got it, before resizing; raises as `widefield.data.decoding.read` does."""
        return read(self.path, **self.decoding)


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be read, or that has a box outside of it, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Predictions(report.Report):
    """The predictions of a model for some images; it displays itself in notebooks, and saves itself.

    Attributes:
        name: the model's name.
        weights: where the model's weights come from.
        about: facts about how the images were prepared.
        classes: names of the classes; empty if they are unknown.
        palette: color of each class, (red, green, blue).
        top: number of classes that are listed for an image.
        images: the images that could be read, in order.
        unreadable: the others.
        min_score: least score of the objects that are drawn and listed.
    """

    name: str
    weights: str
    about: Mapping[str, Any]
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    top: int
    images: tuple[Predicted, ...]
    unreadable: tuple[Unreadable, ...] = ()
    min_score: float = MIN_SCORE

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Predicted:
        return self.images[index]

    def summary(self) -> str:
        """Return the model, the number of images, and the ones that could not be read."""
        lines = [f"{self.name} ({self.weights}): {counted(len(self.images), 'image')}"]
        if self.unreadable:
            lines.append(f"{counted(len(self.unreadable), 'image')} could not be read:")
            lines += [f"{entry.path}: {entry.reason}" for entry in self.unreadable]
        return "\n".join(lines)

    def rows(self) -> list[dict[str, str]]:
        """Return one row per image: its largest classes."""
        return [row_of(found, self.drawing(found)) for found in self.images]

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types, except the masks; of a detector the objects of all scores."""
        return {
            "model": self.name,
            "weights": self.weights,
            "about": dict(self.about),
            "classes": list(self.classes),
            "palette": [list(color) for color in self.palette],
            "images": [data_of(found, self.drawing(found)) for found in self.images],
            "unreadable": [{"path": str(entry.path), "reason": entry.reason} for entry in self.unreadable],
        }

    def plot(self, count: int = _IN_A_FIGURE) -> Figure:
        """Return a figure of the first ``count`` images with their predictions."""
        with report.paper():
            shown = self.images[: _checks.integer("count", count)]
            columns = min(4, max(1, len(shown)))
            rows = max(1, -(-len(shown) // columns))
            images = [preview(found.image(), 480) for found in shown]
            heights = [x.height / x.width / self.drawing(one).beside for x, one in zip(images, shown, strict=True)]
            side = report.PAGE / 4
            figure = report.blank(side * columns + 0.2, (side * min(max(heights, default=1.0), 2.0) + 0.65) * rows)
            axes = figure.subplots(rows, columns, squeeze=False)
            for axis in axes.flat:
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            for axis, image, found in zip(axes.flat, images, shown, strict=False):
                self.drawing(found).panel(axis, image, found.prediction)
                axis.set_title(_short(found.name, 26), fontsize=7)
        return figure

    def save(self, path: str | Path) -> Path:
        """Write a figure (.png, .pdf, .svg), the numbers (.json), a page (.html), or the images' files; return it.

        A path without an ending is a folder, which gets the mask and the overlay of each image of a segmentation model,
        as ``labels/NAME.png`` and ``overlays/NAME.png``, and the image with its objects of a detector, as
        ``overlays/NAME.png``; likewise with its poses of a pose model.

        Raises ValueError for another ending, OSError if a file cannot be written.
        """
        path = Path(path)
        if not path.suffix:
            for found in self.images:
                write_files(found, self.drawing(found), path)
            return path
        _checks.choice("the suffix of path", path.suffix, (".png", ".pdf", ".svg", ".json", ".html"))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            content = _document(self.to_dict())
        elif path.suffix == ".html":
            content = self._page().encode()
        else:
            content = report.drawing(self.plot(), path.suffix[1:])
        write_whole(path, content)
        return path

    def _repr_html_(self) -> str:
        """Return the images as cards, which Jupyter displays."""
        lines = "".join(report.paragraph(line) for line in self.summary().splitlines())
        return report.styled(lines + grid_of(self._cards(), self.images))

    def _cards(self) -> list[str]:
        return [card_of(found, self.drawing(found)) for found in self.images[:ON_A_PAGE]]

    def _page(self) -> str:
        return page_of(self, self._cards())

    def drawing(self, found: Predicted) -> Drawing:
        """Return how a prediction is drawn."""
        return drawing_of(found.prediction, self.classes, self.palette, top=self.top, min_score=self.min_score)


def row_of(found: Predicted, drawing: Drawing) -> dict[str, str]:
    """Return an image's row of a table."""
    return {"image": found.name, **drawing.row(found.prediction)}


def data_of(found: Predicted, drawing: Drawing) -> dict[str, Any]:
    """Return an image's prediction in JSON types."""
    return {"path": str(found.path), "name": found.name, **drawing.data(found.prediction)}


def card_of(found: Predicted, drawing: Drawing) -> str:
    """Return an image's card of a page (HTML)."""
    return drawing.card(found.name, found.image(), found.prediction)


def grid_of(cards: Sequence[str], images: Sequence[Predicted]) -> str:
    """Return the cards of images as they fit a page (HTML)."""
    return report.cards(cards, wide=bool(images) and DRAWINGS[type(images[0].prediction)].wide)


def write_files(found: Predicted, drawing: Drawing, folder: Path) -> list[Path]:
    """Write the files of an image below a folder, and return their paths; raises OSError."""
    written = []
    for kind, content in drawing.files(found.image(), found.prediction).items():
        target = (folder / kind / found.name).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, content)
        written.append(target)
    return written


def page_of(predictions: Predictions, cards: Sequence[str], images: int | None = None) -> str:
    """Return a self-contained page with these cards; ``images`` is the number of images, if it is not of the cards."""
    total = len(predictions.images) if images is None else images
    lead = f"{counted(total, 'image')}, predicted by {predictions.name}. Weights: {predictions.weights}."
    if len(cards) < total:
        lead += f" The page shows the first {len(cards)}."
    sections = [("Predictions", grid_of(cards, predictions.images))] if cards else []
    if predictions.unreadable:
        rows = [{"file": str(entry.path), "problem": entry.reason} for entry in predictions.unreadable]
        sections.append(("Could not be read", report.table(rows)))
    return report.page(f"Predictions of {predictions.name}", lead, sections, bench.environment())


def predict(
    model: str | Path | Subject | nn.Module,
    images: Images,
    *,
    size: int | None = None,
    top: int = 5,
    min_score: float = MIN_SCORE,
    boxes: str | Path | Subject | None = None,
    box_classes: Sequence[str] | None = None,
    coco: str | Path | None = None,
    batch_size: int = 8,
    workers: int = 0,
    **loading: Any,
) -> Predictions:
    """Predict images in files, and keep all predictions.

    Args:
        model: a module or a subject; or words for one, as of :func:`load`: the folder of a run, a file or folder that
            :func:`widefield.save` wrote, ``hf-hub:USER/NAME``, or the name of a model of timm or torchvision. A module
            gets the images that its file, its run or timm's configuration asks for.
        images: files, folders that are searched at any depth, and globs.
        size: side of the images for a classifier, or shorter side for other models; default: the model's own. For poses
            it is that of the detector.
        top: number of classes to list for an image.
        min_score: least score of the objects that are drawn and listed; the others are kept as well. For poses: least
            score of the boxes that get a pose.
        boxes: for pose models: where the boxes come from: a detector, by the words of ``model`` or loaded; or a JSON
            file with boxes, see `widefield.runs.box_files.read_boxes`. None: the whole image is one box.
        box_classes: names of the classes of the boxes that get a pose; default: those that the pose model knows.
        coco: a COCO file with the names of images and categories, for ``boxes`` that are COCO's results.
        batch_size: images at a time, or crops. Segmentation models and detectors get images of different sizes one by
            one.
        workers: loader processes; 0: load in the process itself.
        loading: further arguments of :func:`load`, such as ``pretrained`` and ``device``.

    Files that cannot be read are listed in ``unreadable``. Masks are kept at the size of their files; use
    :func:`predict_each` for more images than fit into memory.

    Raises:
        FileNotFoundError: there is no such file or folder, or no image in it; and as of :func:`load`.
        ValueError, TypeError: as of :func:`load`, or an argument is out of range.
    """
    subject = load(str(model), **loading) if isinstance(model, (str, Path)) else subject_of(model)
    if not isinstance(model, (str, Path)) and loading:
        raise TypeError(f"the model is loaded already; it takes no {', '.join(loading)}.")
    known = empty(subject, size=size, top=top, min_score=min_score)
    source = box_source(
        subject, boxes, classes=box_classes, min_score=min_score, size=size, coco=coco,
        pretrained=bool(loading.get("pretrained", False)),
    )  # fmt: skip
    found = list(predict_each(subject, images, size=size, boxes=source, batch_size=batch_size, workers=workers))
    return replace(
        about_boxes(known, source),
        images=tuple(one for one in found if isinstance(one, Predicted)),
        unreadable=tuple(one for one in found if isinstance(one, Unreadable)),
    )


def empty(subject: Subject, *, size: int | None = None, top: int = 5, min_score: float = MIN_SCORE) -> Predictions:
    """Return predictions of a model for no images."""
    return Predictions(
        subject.name,
        str(subject.weights),
        subject.preparation(size),
        subject.class_names,
        subject.palette,
        _checks.integer("top", top),
        (),
        min_score=_checks.number("min_score", min_score, maximum=1.0),
    )


def about_boxes(predictions: Predictions, source: BoxSource | None) -> Predictions:
    """Return predictions that name the source of the boxes, if there is one."""
    return replace(predictions, about={**predictions.about, "boxes": source.name}) if source else predictions


def predict_each(
    subject: Subject,
    images: Images,
    *,
    size: int | None = None,
    boxes: str | Path | Subject | BoxSource | None = None,
    batch_size: int = 8,
    workers: int = 0,
) -> Iterator[Predicted | Unreadable]:
    """Return an iterator over the images in order, which predicts each one when it is asked for it.

    Arguments and errors are those of :func:`predict`; ``boxes`` may also be of `widefield.runs.poses.box_source`, which
    chooses among them.
    """
    source = boxes if isinstance(boxes, BoxSource) else box_source(subject, boxes, size=size)
    files = find_images(images)
    paths = [path for path, _ in files]
    loader = DataLoader(
        _Files(paths, subject, size),
        batch_size=_checks.integer("batch_size", batch_size),
        num_workers=_checks.integer("workers", workers, minimum=0),
        collate_fn=list,
        worker_init_fn=ignore_signals,
        generator=torch.Generator().manual_seed(0),
    )
    names, task = names_of(files), subject.task()
    if source is None:
        return _each(subject, paths, names, loader, partial(_predicted, subject, task))

    posing: Any = task  # a Pose
    source = source.for_images(names)

    def poses(batch: Sequence[_Item]) -> Iterator[tuple[int, Prediction | str]]:
        for index, pixels, _ in batch:
            if isinstance(pixels, str):
                yield index, pixels
            else:
                try:
                    found = source(names[index], pixels)
                except BoxOutsideError as error:
                    yield index, str(error)
                    continue
                rules, labeled = posing.rules, source.labeled
                yield (
                    index,
                    pose_prediction(subject, rules, posing.skeleton, found, pixels, batch_size, labeled=labeled),
                )

    return _each(subject, paths, names, loader, poses)


def _each(
    subject: Subject,
    paths: Sequence[Path],
    names: Sequence[str],
    loader: Iterable[Any],
    predicted: Callable[[Sequence[_Item]], Iterator[tuple[int, Prediction | str]]],
) -> Iterator[Predicted | Unreadable]:
    for batch in loader:
        for index, prediction in predicted(batch):
            if isinstance(prediction, str):
                yield Unreadable(paths[index], prediction)
            else:
                yield Predicted(paths[index], names[index], prediction, subject.decoding)


@dataclass(frozen=True)
class Written:
    """What :func:`predict_files` wrote.

    Attributes:
        images: number of images that could be read.
        unreadable: the others.
        rows: table rows of the first images.
        paths: the page, the numbers and the figure; and the folders with the files of each image.
    """

    images: int
    unreadable: tuple[Unreadable, ...]
    rows: tuple[dict[str, str], ...]
    paths: tuple[Path, ...]


def predict_files(
    subject: Subject,
    images: Images,
    folder: str | Path,
    *,
    size: int | None = None,
    top: int = 5,
    min_score: float = MIN_SCORE,
    boxes: str | Path | Subject | None = None,
    box_classes: Sequence[str] | None = None,
    coco: str | Path | None = None,
    batch_size: int = 8,
    workers: int = 0,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda found, total: found,
) -> Written:
    """Predict any number of images, and write the results as they come; no prediction is kept.

    The folder gets a page (predict.html), the numbers (predict.json), a figure of the first images (predict.png), and
    for segmentation models ``labels/NAME.png``, whose values are indices of classes, and ``overlays/NAME.png``, both at
    the size of the image. For detectors it gets ``overlays/NAME.png``, and the objects of all scores as COCO's results
    (predict_coco.json); likewise for pose models.

    Args:
        folder: where to write; it is created.
        coco: a COCO file with the ids of images, by file name, and of categories, by name, for predict_coco.json, and
            for ``boxes`` that are COCO's results. Default: both are counted from 1, in the order of predict.json, which
            names them.
        progress: wraps the iterable of predictions; its second argument is their number.

    Other arguments and errors are those of :func:`predict`; OSError if a file cannot be written; ValueError for a file
    ``coco`` without one of the images or classes.
    """
    folder, known = Path(folder), empty(subject, size=size, top=top, min_score=min_score)
    source = box_source(subject, boxes, classes=box_classes, min_score=min_score, size=size, coco=coco)
    known = about_boxes(known, source)
    ids, labeled = read_ids(coco), source is None or source.labeled
    if labeled and subject.work in ("detection", "pose"):
        ids = ids.of_images(names_of(find_images(images)))
    results = CocoEntries(ids, known.classes, len(known.palette))
    stream = predict_each(subject, images, size=size, boxes=source, batch_size=batch_size, workers=workers)
    lost: list[Unreadable] = []
    first: list[Predicted] = []
    cards: list[str] = []
    data: list[dict[str, Any]] = []
    kinds: dict[Path, None] = {}
    for found in progress(stream, len(find_images(images))):
        if isinstance(found, Unreadable):
            lost.append(found)
            continue
        drawing = known.drawing(found)
        located = labeled and isinstance(found.prediction, (BoxPrediction, PosePrediction))
        more = results.add(found.name, found.prediction) if located else {}
        data.append({**data_of(found, drawing), **more})
        for path in write_files(found, drawing, folder):
            kinds[folder / path.relative_to(folder).parts[0]] = None
        if len(cards) < ON_A_PAGE:
            cards.append(card_of(found, drawing))
        if len(first) < _IN_A_FIGURE:
            first.append(found)
    known = replace(known, images=tuple(first), unreadable=tuple(lost))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"predict.{suffix}" for suffix in ("html", "json")]
    write_whole(paths[0], page_of(known, cards, len(data)).encode())
    write_whole(paths[1], _document({**known.to_dict(), "images": data}))
    if results.images:
        paths.append(folder / "predict_coco.json")
        write_whole(paths[-1], json.dumps(results.entries, allow_nan=False).encode())
    if first:
        paths.append(known.save(folder / "predict.png"))
    return Written(len(data), tuple(lost), tuple(known.rows()), (*paths, *kinds))


class _Files(Dataset[Any]):
    """Images as the model expects them, with the size of the file; or why a file cannot be read."""

    def __init__(self, paths: Sequence[Path], subject: Subject, size: int | None) -> None:
        self.paths = paths
        self._prepare, self._decoding = subject.prepare(size), subject.decoding

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> _Item:
        try:
            image = read(self.paths[index], **self._decoding)
        except OSError as error:
            return index, str(error), (0, 0)
        return index, self._prepare(image), (image.height, image.width)


def _predicted(subject: Subject, task: Task, batch: Sequence[_Item]) -> Iterator[tuple[int, Prediction | str]]:
    """Yield the predictions of a batch in order; images of one size that follow each other run together."""
    device, dtype = place(subject.model)
    for _, group in itertools.groupby(batch, lambda one: one[1].shape if isinstance(one[1], Tensor) else None):
        items = list(group)
        tensors = [image for _, image, _ in items if isinstance(image, Tensor)]
        if not tensors:
            yield from ((index, str(reason)) for index, reason, _ in items)
            continue
        stacked = torch.stack(tensors).to(device, dtype)
        found = task.predict(subject.model, stacked, [size for _, _, size in items])
        yield from ((index, one) for (index, _, _), one in zip(items, found, strict=True))


def _document(content: Mapping[str, Any]) -> bytes:
    document = {"environment": bench.environment(), **content}
    return (json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False, default=str) + "\n").encode()


def _short(name: str, letters: int) -> str:
    return name if len(name) <= letters else f"…{name[1 - letters :]}"
