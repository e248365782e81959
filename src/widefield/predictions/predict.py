"""Predict images in files or in memory with any model: classes, classes of pixels, objects, or poses."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from widefield import _checks
from widefield._files import write_whole
from widefield.data.decoding import read
from widefield.drawing.kinds import drawing_of
from widefield.drawing.parts import MIN_SCORE
from widefield.loading.load import load
from widefield.loading.sharing import subject_of
from widefield.loading.subjects import Subject
from widefield.predictions.box_files import BoxOutsideError
from widefield.predictions.coco_results import CocoEntries, read_ids
from widefield.predictions.image_paths import Images, Source, find_sources
from widefield.predictions.poses import BoxSource, box_source, pose_prediction
from widefield.predictions.predicted import (
    IN_A_FIGURE,
    ON_A_PAGE,
    Predicted,
    Predictions,
    Unreadable,
    document,
    page_of,
)
from widefield.predictions.tables import CsvTable, JsonLines
from widefield.report import Card
from widefield.surgery.inputs import place
from widefield.tasks import BoxPrediction, PosePrediction, Prediction, Task
from widefield.train.interrupt import ignore_signals

_Item = tuple[int, Tensor | str, tuple[int, int]]
"""Place of an image, what the model gets of it or why it cannot be read, and (height, width) of the file."""


@_checks.guided_with("pretrained", "seed", "device", "which", "weights")
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
        images: files, folders that are searched at any depth, and globs; or images in memory: PIL's, or arrays uint8
            (H, W, 3) or (H, W); one, or a list.
        size: side of the images for a classifier, or shorter side for other models; default: the model's own. For poses
            it is that of the detector.
        top: number of classes to list for an image.
        min_score: least score of the objects that are drawn and listed; the others are kept as well. For poses: least
            score of the boxes that get a pose.
        boxes: for pose models: where the boxes come from: a detector, by the words of ``model`` or loaded; or a JSON
            file with boxes, see `widefield.predictions.box_files.read_boxes`. None: the whole image is one box.
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
    shown: dict[str, Any] = {"top": top, "min_score": min_score}
    found = list(
        predict_each(subject, images, size=size, **shown, boxes=source, batch_size=batch_size, workers=workers)
    )
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
    top: int = 5,
    min_score: float = MIN_SCORE,
    boxes: str | Path | Subject | BoxSource | None = None,
    batch_size: int = 8,
    workers: int = 0,
) -> Iterator[Predicted | Unreadable]:
    """Return an iterator over the images in order, which predicts each one when it is asked for it.

    Arguments and errors are those of :func:`predict`; ``boxes`` may also be of
    `widefield.predictions.poses.box_source`, which chooses among them.
    """
    known = empty(subject, size=size, top=top, min_score=min_score)
    source = boxes if isinstance(boxes, BoxSource) else box_source(subject, boxes, size=size)
    sources = find_sources(images)
    loader = DataLoader(
        _Files(sources, subject, size),
        batch_size=_checks.integer("batch_size", batch_size),
        num_workers=_checks.integer("workers", workers, minimum=0),
        collate_fn=list,
        worker_init_fn=ignore_signals,
        generator=torch.Generator().manual_seed(0),
    )
    task = subject.task()
    if source is None:
        return _each(known, sources, subject, loader, partial(_predicted, subject, task))

    posing: Any = task  # a Pose
    names = [one.name for one in sources]
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

    return _each(known, sources, subject, loader, poses)


def _each(
    known: Predictions,
    sources: Sequence[Source],
    subject: Subject,
    loader: Iterable[Any],
    predicted: Callable[[Sequence[_Item]], Iterator[tuple[int, Prediction | str]]],
) -> Iterator[Predicted | Unreadable]:
    for batch in loader:
        for index, prediction in predicted(batch):
            source = sources[index]
            if isinstance(prediction, str):
                yield Unreadable(source.path, prediction)
                continue
            how = drawing_of(prediction, known.classes, known.palette, top=known.top, min_score=known.min_score)
            yield Predicted(source.path, source.name, prediction, how, subject.decoding, source.pixels)


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
    folder: str | Path | None,
    *,
    size: int | None = None,
    top: int = 5,
    min_score: float = MIN_SCORE,
    boxes: str | Path | Subject | None = None,
    box_classes: Sequence[str] | None = None,
    coco: str | Path | None = None,
    batch_size: int = 8,
    workers: int = 0,
    pictures: bool = True,
    csv: str | Path | TextIO | None = None,
    jsonl: str | Path | TextIO | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda found, total: found,
) -> Written:
    """Predict any number of images, and write the results as they come; no prediction is kept.

    The folder gets a page (predict.html), the numbers (predict.json), a figure of the first images (predict.png), and
    the annotated picture of each image, ``overlays/NAME.png``, at the size of the image. Segmentation models add
    ``labels/NAME.png``, whose values are indices of classes. For detectors and pose models it gets the objects of all
    scores, or the poses, as COCO's results (predict_coco.json).

    Args:
        folder: where to write; it is created. None: nothing but ``csv`` and ``jsonl``.
        coco: a COCO file with the ids of images, by file name, and of categories, by name, for predict_coco.json, and
            for ``boxes`` that are COCO's results. Default: both are counted from 1, in the order of predict.json, which
            names them.
        pictures: whether the folder gets the pictures of each image.
        csv, jsonl: a file for the predictions as a table or as lines of JSON, or an open one; see
            `widefield.predictions.tables`. Lines appear as images are predicted.
        progress: wraps the iterable of predictions; its second argument is their number.

    Other arguments and errors are those of :func:`predict`; OSError if a file cannot be written; ValueError for a file
    ``coco`` without one of the images or classes.
    """
    known = empty(subject, size=size, top=top, min_score=min_score)
    source = box_source(subject, boxes, classes=box_classes, min_score=min_score, size=size, coco=coco)
    known = about_boxes(known, source)
    sources = find_sources(images)
    shown: dict[str, Any] = {"size": size, "top": top, "min_score": min_score}
    stream = predict_each(subject, images, **shown, boxes=source, batch_size=batch_size, workers=workers)
    with ExitStack() as stack:
        sinks: list[_Folder | CsvTable | JsonLines] = []
        kept = _Folder(known, subject, None if folder is None else Path(folder), sources, source, coco, pictures)
        sinks.append(kept)
        if csv is not None:
            sinks.append(CsvTable(stack.enter_context(_opened(csv))))
        if jsonl is not None:
            sinks.append(JsonLines(stack.enter_context(_opened(jsonl))))
        for found in progress(stream, len(sources)):
            for sink in sinks:
                sink.add(found)
        for sink in sinks:
            sink.finish()
    return kept.written([Path(one) for one in (csv, jsonl) if isinstance(one, (str, Path))])


@contextmanager
def _opened(target: str | Path | TextIO) -> Iterator[TextIO]:
    """Yield an open text file; a file that is opened here appears only when the block has succeeded."""
    if not isinstance(target, (str, Path)):
        yield target
        return
    path = Path(target).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class _Folder:
    """Collects what the page, the figure and the numbers need, and writes pictures as they come."""

    def __init__(
        self,
        known: Predictions,
        subject: Subject,
        folder: Path | None,
        sources: Sequence[Source],
        boxes: BoxSource | None,
        coco: str | Path | None,
        pictures: bool,
    ) -> None:
        ids, self._labeled = read_ids(coco), boxes is None or boxes.labeled
        if self._labeled and subject.work in ("detection", "pose"):
            ids = ids.of_images([one.name for one in sources])
        self._results = CocoEntries(ids, known.classes, len(known.palette))
        self._known, self._folder, self._pictures = known, folder, pictures
        self._lost: list[Unreadable] = []
        self._first: list[Predicted] = []
        self._cards: list[Card] = []
        self._data: list[dict[str, Any]] = []
        self._kinds: dict[Path, None] = {}
        self._count = 0
        self._paths: list[Path] = []

    def add(self, found: Predicted | Unreadable) -> None:
        if isinstance(found, Unreadable):
            self._lost.append(found)
            return
        self._count += 1
        if len(self._first) < IN_A_FIGURE:
            self._first.append(found)
        if self._folder is None:
            return
        more: Mapping[str, Any] = {}
        if self._labeled and isinstance(found.prediction, (BoxPrediction, PosePrediction)):
            more = self._results.add(found.name, found.prediction)
        self._data.append({**found.to_dict(), **more})
        if self._pictures:
            for path in found.write_files(self._folder):
                self._kinds[self._folder / path.relative_to(self._folder).parts[0]] = None
        if len(self._cards) < ON_A_PAGE:
            self._cards.append(found.card())

    def finish(self) -> None:
        self._known = replace(self._known, images=tuple(self._first), unreadable=tuple(self._lost))
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._paths = [self._folder / f"predict.{suffix}" for suffix in ("html", "json")]
        write_whole(self._paths[0], page_of(self._known, self._cards, self._count).encode())
        write_whole(self._paths[1], document({**self._known.to_dict(), "images": self._data}))
        if self._results.images:
            self._paths.append(self._folder / "predict_coco.json")
            write_whole(self._paths[-1], json.dumps(self._results.entries, allow_nan=False).encode())
        if self._first:
            self._paths.append(self._known.save(self._folder / "predict.png"))

    def written(self, more: Sequence[Path]) -> Written:
        paths = (*self._paths, *self._kinds, *more)
        return Written(self._count, tuple(self._lost), tuple(self._known.rows()), paths)


class _Files(Dataset[Any]):
    """Images as the model expects them, with the size of the file; or why a file cannot be read."""

    def __init__(self, sources: Sequence[Source], subject: Subject, size: int | None) -> None:
        self._sources = sources
        self._prepare, self._decoding = subject.prepare(size), subject.decoding

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int) -> _Item:
        source = self._sources[index]
        try:
            image = read(source.path, **self._decoding) if source.pixels is None else source.pixels
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
