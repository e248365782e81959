"""Read boxes in Pascal VOC's XML files (Everingham et al. 2010), of VOC itself and of annotation tools."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

from widefield import _checks
from widefield.data.labels import published
from widefield.data.listing import Skipped, images_in
from widefield.data.object_files import ObjectFiles, filled, names_of
from widefield.data.object_index import AnnotationError, Flaws, IndexBuilder, brief, is_size, stored_sizes

_CLASS_COLUMN = re.compile(r"\s+(-1|0|1)$")
"""What follows a name in the lists of single classes, such as cat_train.txt: whether the image has one."""
_EDGES = ("xmin", "ymin", "xmax", "ymax")


class VocBoxes(ObjectFiles):
    """Images with boxes from XML files in Pascal VOC's form; there are no masks.

    The defaults are VOC's layout: ``root/Annotations/*.xml``, ``root/JPEGImages`` and ``root/ImageSets/Main/*.txt``.
    The usual union of VOC 2007 and 2012, in the folder ``VOCdevkit``, is ``train: [VOC2007/trainval,
    VOC2012/trainval]`` and ``val: [VOC2007/test]``. For files of annotation tools, which come without lists, set
    ``lists: null`` and the folders.

    Pixels are counted from 1, and the last ones belong to the box, as in VOC: its edges are xmin - 1, ymin - 1, xmax,
    ymax. Objects marked as difficult are crowd regions: detections of them count neither as right nor as wrong.

    Args:
        split: ``"train"`` or ``"val"``.
        root: the folder that holds the files.
        train, val: names of the splits' lists. A name ``FOLDER/LIST`` is a list in a folder of ``root``, whose
            annotations and images are read; several names are read one after the other.
        lists: path of a list of file names without ending, one per line; ``{split}`` is the list's name. None: all XML
            files in ``annotations``.
        annotations, images: folders; ``{split}`` is the list's name.
        classes: names of the classes; None: VOC's 20.
        options: those of `ObjectFiles`, such as ``repair`` and ``scale``.

    Raises:
        FileNotFoundError: a list or a folder is missing.
        AnnotationError: an XML file is damaged or missing, or has an entry that cannot be right. The message names the
            file and the object.
        ValueError, TypeError: an argument is out of range, unknown, or of the wrong type.
    """

    needs: ClassVar[dict[str, str]] = {"root": "the folder that holds Annotations, JPEGImages and ImageSets"}

    def __init__(
        self,
        split: str,
        *,
        root: str | Path,
        train: str | Sequence[str] = "train",
        val: str | Sequence[str] = "val",
        lists: str | None = "ImageSets/Main/{split}.txt",
        annotations: str = "Annotations",
        images: str = "JPEGImages",
        classes: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        if self.has_masks:
            raise ValueError("VOC's XML files have no masks: leave out masks, or convert the data to COCO's form.")
        folder = Path(root).expanduser()
        names = _names_of(split, {"train": train, "val": val}[split])
        known = published("voc")[0][1:] if classes is None else names_of("classes", classes)
        flaws, skipped = Flaws(str(folder), self.repair), Skipped()
        builder = IndexBuilder(flaws, masks=False)
        for name in names:
            inner, _, part = name.rpartition("/")
            places = [os.path.join(inner, filled(option, path, part)) for option, path in  # noqa: PTH118 (of "" is "")
                      (("annotations", annotations), ("images", images))]  # fmt: skip
            listed = None if lists is None else folder / inner / filled("lists", lists, part)
            reader = _Reader(builder, folder, places[0], places[1], known)
            stems = _stems_in(folder / places[0]) if listed is None else _stems_of(listed)
            reader.read(stems, _images_of(folder / places[1], skipped), self.decoding)
        self._hold(builder.build(), known, folder, skipped, flaws.found)


def _names_of(split: str, names: Any) -> list[str]:
    given = [names] if isinstance(names, str) else names
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(name, str) and name for name in given):
        raise TypeError(f"{split} must be the name of a list, or several, such as 'VOC2007/trainval'; got {names!r}.")
    return list(given)


def _stems_of(path: Path) -> list[str]:
    """Return the names in a list, without duplicates; in the lists of single classes a number follows each."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no list of images {str(path)!r}. Name it by the options train, val and lists, or set lists: "
            f"null to read all XML files of the folder annotations."
        )
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return list(dict.fromkeys(_CLASS_COLUMN.sub("", line.strip()) for line in lines if line.strip()))


def _stems_in(folder: Path) -> list[str]:
    """Return the sorted names of a folder's XML files, without their ending."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}. Name it by the option annotations, from root.")
    found = sorted(path.stem for path in folder.iterdir() if path.suffix.lower() == ".xml" and path.name[0] != ".")
    if not found:
        raise FileNotFoundError(f"{str(folder)!r} holds no XML files. Name the folder by the option annotations.")
    return found


def _images_of(folder: Path, skipped: Skipped) -> dict[str, str]:
    """Return path without ending -> path of the images in a folder, both from it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}. Name it by the option images, from root.")
    others = Skipped()  # the XML files may be in the same folder
    paths = [os.path.relpath(path, folder) for path in images_in(folder, others)]
    skipped.reasons.update({reason: found for reason, found in others.reasons.items() if ".xml" not in reason})
    found: dict[str, str] = {}
    for path in paths:
        stem = os.path.splitext(path)[0]  # noqa: PTH122 (a Path takes minutes for a million)
        if stem in found:
            raise AnnotationError(
                f"{str(folder)!r} holds {found[stem]!r} and {path!r}, which have one XML file. Remove one of them."
            )
        found[stem] = path
    return found


class _Reader:
    """Reads the XML files of one folder."""

    def __init__(
        self, builder: IndexBuilder, root: Path, annotations: str, images: str, classes: Sequence[str]
    ) -> None:
        self.builder, self.flaws = builder, builder.flaws
        self.root, self.annotations, self.images = root, annotations, images
        self._labels = {name: label for label, name in enumerate(classes)}

    def read(self, stems: Sequence[str], images: dict[str, str], decoding: dict[str, Any]) -> None:
        """Add the images with these names, and their objects."""
        names = {stem: f"{self.images}/{images[stem]}" for stem in stems if stem in images}
        sizes = stored_sizes(self.root, list(names.values()), decoding) if self.flaws.repair else {}
        for stem in stems:
            file = f"{self.annotations}/{stem}.xml"
            if stem not in names:
                what = f"has no image: {str(self.root / self.images)!r} holds none of this name"
                self.flaws.report(file, what, "XML files without an image")
                continue
            tree = self._parsed(file)
            if tree is not None:
                self._read_image(file, names[stem], tree, sizes.get(names[stem]))

    def _parsed(self, file: str) -> ElementTree.Element | None:
        path = self.root / file
        if not path.is_file():
            self.flaws.report(file, "is missing", "images without an XML file")
            return None
        try:
            tree = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, ValueError) as error:
            self.flaws.report(file, f"is not complete XML: {error or 'it is empty'}", "damaged XML files")
            return None
        if tree.tag != "annotation":
            what = f"is not in VOC's form: its root is <{brief(tree.tag)}>, not <annotation>"
            self.flaws.report(file, what, "XML files of another form")
            return None
        return tree

    def _read_image(self, file: str, name: str, tree: ElementTree.Element, stored: tuple[int, int] | None) -> None:
        width, height = (_integer(tree.findtext(f"size/{side}")) for side in ("width", "height"))
        if not is_size(height, width):
            found = ", ".join(f"{side} {brief(tree.findtext(f'size/{side}'))}" for side in ("width", "height"))
            mend = "take the image's"
            self.flaws.report(file, f"has no valid size: {found}", "XML files without a size", mend=mend)
            if stored is None:
                return
            height, width = stored
        if stored is not None and stored != (height, width):
            what = f"is for an image of {width} x {height} pixels, and {name} has {stored[1]} x {stored[0]}"
            self.flaws.report(file, what, "images of another size than stated")
            return
        row = self.builder.add_image(name, int(height or 0), int(width or 0), len(self.builder.sizes))
        for place, entry in enumerate(tree.findall("object")):
            self._read_object(row, file, place, entry)

    def _read_object(self, row: int, file: str, place: int, entry: ElementTree.Element) -> None:
        def where() -> str:
            return f"object {place} of {file}"

        name = (entry.findtext("name") or "").strip()
        if name not in self._labels:
            hint = _checks.did_you_mean(name, self._labels)
            what = f"has an unknown class: {brief(name)}.{hint} The option classes names them"
            self.flaws.report(where(), what, "objects of unknown classes")
            return
        texts = [entry.findtext(f"bndbox/{edge}") for edge in _EDGES]
        try:
            left, top, right, bottom = (float(text or "") for text in texts)
        except ValueError:
            what = f"has a box that is not four numbers: {', '.join(map(brief, texts))}"
            self.flaws.report(where(), what, "objects without a box of four numbers")
            return
        difficult = _integer(entry.findtext("difficult", "0"))
        if difficult not in (0, 1):
            what = f"has a difficult that is neither 0 nor 1: {brief(entry.findtext('difficult'))}"
            self.flaws.report(where(), what, "objects with an unknown difficult")
            return
        box = left - 1, top - 1, right, bottom
        self.builder.add(row, where, box, self._labels[name], place, crowd=difficult == 1)


def _integer(text: str | None) -> int | None:
    """Return a text as an integer, or None; some tools write 48.0."""
    try:
        value = float(text or "")
        return int(value) if value.is_integer() else None
    except (ValueError, OverflowError):
        return None
