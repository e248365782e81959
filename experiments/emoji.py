"""Make image data sets of emoji in front of photographs: many classes, three drawing styles, known object sizes.

The drawings are in three packages of the npm registry. Fetch them, render them once, and compose data sets:

    for name in noto twemoji fluent-emoji-flat; do npm pack @iconify-json/$name; done
    pip install resvg-py 'widefield[photographs]'
    python experiments/emoji.py render iconify-json-*.tgz --out emoji
    python experiments/emoji.py classify emoji --out emoji_small --object-sizes small
    python experiments/emoji.py segment emoji --out emoji_masks --classes 20

Train images show two styles, val images a third one that training never sees, in front of other parts of the
photographs. `classify` writes class folders for `--data.name folder`, with one object an image; `segment`
writes images and masks for `--data.name masks`, with several objects an image. Both write `objects.csv` (the place and
size of every object) and `NOTICE.txt` (licenses and authors, which must go along with the images). Every image depends
on the seed, its split and its number only.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from widefield.data import PHOTOGRAPH_NAMES, Photograph, photographs

CATEGORIES = ("Animals & Nature", "Food & Drink", "Activities", "Travel & Places", "Objects")
SIZES = {"small": (1 / 8, 1 / 4), "large": (1 / 2, 7 / 8), "mixed": (1 / 8, 7 / 8)}
"""Ranges of the longer side of an object, relative to the image's side; the logarithm is uniform in between."""
SPLITS = ("train", "val")
LEAST_COVER = 0.12  # of the square; thinner drawings cannot be seen when they are small
LEAST_DIFFERENCE = 0.045  # mean difference of two classes at 16 x 16 pixels; clock faces and moons are nearer
TURN = 15.0  # degrees, either way
COLUMNS = ("file", "class", "style", "side", "left", "top", "width", "height", "visible", "photograph")


@dataclass(frozen=True)
class Pack:
    """One style: the SVG drawings of a package by code point."""

    style: str
    notice: str
    drawings: dict[str, str]
    names: dict[str, str]
    categories: dict[str, str]


def read_pack(path: Path) -> Pack:
    """Read a package of iconify: a tar file with icons.json, chars.json, info.json and metadata.json."""
    with tarfile.open(path) as archive:
        parts = {name: _json(archive, path, name) for name in ("icons", "chars", "info", "metadata")}
    icons, info = parts["icons"], parts["info"]
    names = {code: name for code, name in parts["chars"].items() if "-" not in code and name in icons["icons"]}
    of_names = {name: group for group, listed in parts["metadata"]["categories"].items() for name in listed}
    license, author = info["license"], info["author"]
    return Pack(
        style=icons["prefix"],
        notice=(
            f"{info['name']} ({icons['prefix']}): {author['name']}, {author['url']}. License: "
            f"{license.get('spdx', license['title'])}, {license['url']}. Changes: rendered from SVG to pixels; "
            "resized, rotated and placed over photographs."
        ),
        drawings={code: _svg(icons, name) for code, name in names.items()},
        names=names,
        categories={code: of_names.get(name, "") for code, name in names.items()},
    )


def _json(archive: tarfile.TarFile, path: Path, name: str) -> dict[str, Any]:
    try:
        file = archive.extractfile(f"package/{name}.json")
    except KeyError:
        raise SystemExit(f"{path} has no {name}.json: give a package of iconify, as `npm pack` writes it.") from None
    assert file is not None  # noqa: S101 (a regular file)
    content: dict[str, Any] = json.load(file)
    return content


def _svg(icons: dict[str, Any], name: str) -> str:
    """Return a drawing of a package as an SVG document."""
    icon = icons["icons"][name]
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{width}" '
        f'height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def drawn(svg: str, side: int) -> Image.Image:
    """Return a drawing as RGBA, cut to what is visible and scaled so that its longer side is ``side`` pixels."""
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise SystemExit("SVG is drawn by resvg-py, which this script alone needs: pip install resvg-py.") from None
    pixels = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * side, height=2 * side, skip_system_fonts=True))
    image = Image.open(io.BytesIO(pixels)).convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha >= 128)).getbbox()
    return scaled(image.crop(box), side) if box else Image.new("RGBA", (side, side))


def scaled(image: Image.Image, side: int) -> Image.Image:
    """Resize an image, so that its longer side is ``side`` pixels."""
    factor = side / max(image.size)
    return image.resize(tuple(max(1, round(factor * length)) for length in image.size), Image.Resampling.LANCZOS)


def render(args: argparse.Namespace) -> None:
    """Choose classes that all styles have, draw them, and write ``STYLE/CLASS.png``, classes.txt and NOTICE.txt."""
    packs = [read_pack(path) for path in args.packages]
    styles = [pack.style for pack in packs]
    if len(set(styles)) < 2:
        raise SystemExit(f"give packages of at least two styles, of which the last is for val; got {styles}.")
    common = [
        code
        for code in packs[0].names
        if packs[0].categories[code] in CATEGORIES and all(code in pack.names for pack in packs)
    ]
    order = np.random.default_rng(args.seed).permutation(sorted(common)).tolist()
    chosen: dict[str, list[Image.Image]] = {}
    small: list[list[np.ndarray]] = []
    for code in order:
        if len(chosen) == args.classes:
            break
        images = [drawn(pack.drawings[code], args.size) for pack in packs]
        sketches = [_sketch(image) for image in images]
        if min(sketch[3].mean() for sketch in sketches) >= LEAST_COVER and _new(sketches, small):
            chosen[packs[0].names[code]] = images
            small.append(sketches)
    if len(chosen) < args.classes:
        raise SystemExit(f"these packages have {len(chosen)} classes that differ enough, fewer than {args.classes}.")
    for number, style in enumerate(styles):
        (args.out / style).mkdir(parents=True, exist_ok=True)
        for name, images in chosen.items():
            images[number].save(args.out / style / f"{name}.png", optimize=True)
    (args.out / "classes.txt").write_text("".join(f"{name}\n" for name in chosen))
    (args.out / "styles.txt").write_text("".join(f"{style}\n" for style in styles))
    (args.out / "NOTICE.txt").write_text("".join(f"{pack.notice}\n" for pack in packs))
    total = sum(path.stat().st_size for path in args.out.rglob("*.png"))
    print(f"{len(chosen)} of {len(common)} classes in {len(styles)} styles, {total / 1e6:.1f} MB, in {args.out}")


def _sketch(image: Image.Image) -> np.ndarray:
    """Return premultiplied colors and alpha of an image in a square of 16 pixels, (4, 16, 16)."""
    square = Image.new("RGBA", (max(image.size),) * 2)
    square.paste(image, tuple((side - own) // 2 for side, own in zip(square.size, image.size, strict=True)))
    pixels = np.asarray(square.resize((16, 16), Image.Resampling.BOX), np.float32).transpose(2, 0, 1) / 255
    return np.concatenate([pixels[:3] * pixels[3:], pixels[3:]])


def _new(sketches: Sequence[np.ndarray], others: Sequence[Sequence[np.ndarray]]) -> bool:
    """Return whether a class differs from all others in every style."""
    return all(
        abs(mine - theirs).mean() >= LEAST_DIFFERENCE
        for other in others
        for mine, theirs in zip(sketches, other, strict=True)
    )


@dataclass(frozen=True)
class Composer:
    """What the images of a data set are made of."""

    drawings: dict[str, list[list[Image.Image]]]
    """Split -> for each style the drawing of each class."""
    styles: dict[str, list[str]]
    photographs: Sequence[Photograph]
    size: int
    sides: tuple[float, float]
    most: int
    """The most objects of an image."""
    seed: int

    def image(self, split: str, index: int, label: int | None = None) -> tuple[Image.Image, np.ndarray, list[dict]]:
        """Return an image, the class at each pixel from 1 (0: background), and its objects as rows.

        Args:
            split: ``"train"`` or ``"val"``.
            index: number of the image.
            label: class of the only object; default: up to ``most`` objects of random classes.
        """
        generator = np.random.default_rng((self.seed, SPLITS.index(split), index))
        photograph = self.photographs[generator.integers(len(self.photographs))]
        image = background(photograph.part(split), self.size, generator)
        owner = np.full((self.size, self.size), -1)
        rows: list[dict[str, Any]] = []
        for number in range(1 if label is not None else int(generator.integers(1, self.most + 1))):
            style = int(generator.integers(len(self.styles[split])))
            each = self.drawings[split][style]
            which = int(generator.integers(len(each))) if label is None else label
            row = self._place(image, owner, number, each[which], generator)
            rows.append({"class": which, "style": self.styles[split][style], **row, "photograph": photograph.name})
        mask = np.append([row["class"] + 1 for row in rows], 0)[owner]
        for number, row in enumerate(rows):
            row["visible"] = int((owner == number).sum())
        return image, mask.astype(np.uint8), rows

    def _place(
        self, image: Image.Image, owner: np.ndarray, number: int, drawing: Image.Image, generator: np.random.Generator
    ) -> dict[str, Any]:
        """Put a drawing over the image, in place; return its side and box in pixels."""
        smallest, largest = self.sides
        side = round(smallest * (largest / smallest) ** generator.random())
        turned = drawing.rotate(TURN * (2 * generator.random() - 1), Image.Resampling.BICUBIC, expand=True)
        visible = turned.getchannel("A").point(lambda alpha: 255 * (alpha >= 128)).getbbox()
        shown = scaled(turned.crop(visible), side)
        left, top = (int(generator.integers(self.size - length + 1)) for length in shown.size)
        image.paste(shown, (left, top), shown)
        width, height = shown.size
        solid = np.asarray(shown.getchannel("A")) >= 128
        owner[top : top + height, left : left + width][solid] = number
        return {"side": side, "left": left, "top": top, "width": width, "height": height}


def background(part: Tensor, size: int, generator: np.random.Generator) -> Image.Image:
    """Return a random square of a photograph's part (3, H, W), up to twice the size, resized to ``size``."""
    height, width = part.shape[1:]
    if min(height, width) < size:
        raise SystemExit(f"images of {size} pixels do not fit into this part of a photograph, {height} x {width}.")
    side = int(generator.integers(size, min(2 * size, height, width) + 1))
    top, left = (int(generator.integers(length - side + 1)) for length in (height, width))
    square = Image.fromarray(part[:, top : top + side, left : left + side].movedim(0, -1).numpy())
    return square.resize((size, size), Image.Resampling.BICUBIC)


def composer(args: argparse.Namespace) -> tuple[Composer, list[str]]:
    """Return the composer for the arguments of a command, and the names of the classes."""
    folder: Path = args.emoji
    if not (folder / "classes.txt").is_file():
        raise SystemExit(f"{folder} holds no rendered emoji: run the command render first.")
    styles, classes = ((folder / f"{name}.txt").read_text().split() for name in ("styles", "classes"))
    if args.classes > len(classes):
        raise SystemExit(f"{folder} has {len(classes)} classes, fewer than {args.classes}.")
    classes = sorted(classes[: args.classes or len(classes)])
    held_out = args.val_style or styles[-1]
    if held_out not in styles:
        raise SystemExit(f"--val-style must be one of {', '.join(styles)}; got {held_out}.")
    of_split = {"train": [style for style in styles if style != held_out], "val": [held_out]}
    loaded = {
        split: [[Image.open(folder / style / f"{name}.png").convert("RGBA") for name in classes] for style in chosen]
        for split, chosen in of_split.items()
    }
    sides = sides_of(args.object_sizes, args.size)
    shown = photographs(args.photographs)
    return Composer(loaded, of_split, shown, args.size, sides, getattr(args, "objects", 1), args.seed), classes


def sides_of(words: Sequence[str], size: int) -> tuple[float, float]:
    """Return the smallest and the largest side in pixels: of a name in ``SIZES``, or of two numbers of pixels."""
    if len(words) == 1 and words[0] in SIZES:
        smallest, largest = (part * size for part in SIZES[words[0]])
        return smallest, largest
    try:
        smallest, largest = map(float, words)
    except ValueError:
        smallest = largest = math.nan
    if not 4 <= smallest <= largest <= size:
        raise SystemExit(
            f"--object-sizes must be {', '.join(SIZES)}, or two sides from 4 to {size} pixels; got {' '.join(words)}."
        )
    return smallest, largest


def classify(args: argparse.Namespace) -> None:
    """Write ``SPLIT/CLASS/NUMBER.jpg``: one object in each image, classes equally often."""
    made, classes = composer(args)

    def rows() -> Iterator[dict[str, Any]]:
        for split in SPLITS:
            for name in classes:
                (args.out / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(getattr(args, split) * len(classes)):
                label = index % len(classes)
                image, _, (row,) = made.image(split, index, label)
                file = f"{split}/{classes[label]}/{index:06d}.jpg"
                image.save(args.out / file, quality=95)
                yield {**row, "file": file, "class": classes[label]}

    _record(args, made, rows())
    counts = " + ".join(f"{getattr(args, split) * len(classes):,} {split}" for split in SPLITS)
    print(f"{counts} images of {len(classes)} classes in {args.out}")


def segment(args: argparse.Namespace) -> None:
    """Write ``images/SPLIT/NUMBER.jpg`` and ``masks/SPLIT/NUMBER.png``: several objects in each image."""
    made, classes = composer(args)

    def rows() -> Iterator[dict[str, Any]]:
        for split in SPLITS:
            for kind in ("images", "masks"):
                (args.out / kind / split).mkdir(parents=True, exist_ok=True)
            for index in range(getattr(args, split)):
                image, mask, found = made.image(split, index)
                file = f"images/{split}/{index:06d}.jpg"
                image.save(args.out / file, quality=95)
                Image.fromarray(mask).save(args.out / "masks" / split / f"{index:06d}.png")
                yield from ({**row, "file": file, "class": classes[row["class"]]} for row in found)

    _record(args, made, rows())
    (args.out / "classes.txt").write_text("".join(f"{name}\n" for name in ("background", *classes)))
    print(f"{args.train:,} train + {args.val:,} val images of {len(classes)} classes in {args.out}")


def _record(args: argparse.Namespace, made: Composer, rows: Iterator[dict[str, Any]]) -> None:
    """Write the rows of objects, and the licenses."""
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "objects.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    credits = [f"Photograph {one.name}: {one.credit}. License: {one.license}.\n" for one in made.photographs]
    (args.out / "NOTICE.txt").write_text((args.emoji / "NOTICE.txt").read_text() + "".join(credits))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the three commands."""
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(required=True)
    one = commands.add_parser("render", help="draw the emoji of packages that npm fetched")
    one.add_argument("packages", nargs="+", type=Path, metavar="TGZ", help="one per style; the last is that of val")
    one.add_argument("--out", type=Path, default=Path("emoji"))
    one.add_argument("--size", type=int, default=128, help="longer side of a drawing in pixels (128)")
    one.add_argument("--classes", type=int, default=200, help="number of classes (200)")
    one.add_argument("--seed", type=int, default=0, help="of the choice of classes (0)")
    one.set_defaults(run=render)
    for run, counts, size in ((classify, (60, 10), 96), (segment, (4000, 500), 128)):
        one = commands.add_parser(run.__name__, help=str(run.__doc__).splitlines()[0])
        one.add_argument("emoji", type=Path, help="folder that render wrote")
        one.add_argument("--out", type=Path, required=True)
        one.add_argument("--size", type=int, default=size, help=f"side of the images in pixels ({size})")
        one.add_argument(
            "--object-sizes", nargs="+", default=["mixed"], help="small, large, mixed, or two sides in pixels"
        )
        one.add_argument("--classes", type=int, default=0, help="use the first so many classes (all)")
        one.add_argument("--val-style", help="style of val; the others are for train (the last)")
        one.add_argument("--photographs", nargs="+", default=PHOTOGRAPH_NAMES, help="names of the backgrounds (all)")
        unit = "images of each class" if run is classify else "images"
        for split, count in zip(SPLITS, counts, strict=True):
            one.add_argument(f"--{split}", type=int, default=count, help=f"{split} {unit} ({count})")
        one.add_argument("--seed", type=int, default=0)
        one.set_defaults(run=run)
    one.add_argument("--objects", type=int, default=4, help="the most objects of an image (4)")
    return whole


def main(words: Sequence[str] | None = None) -> None:
    args = parser().parse_args(words)
    args.run(args)


if __name__ == "__main__":
    main()
