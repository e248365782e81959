"""Provide arguments, models, images and result files for the commands that analyze models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from widefield.analysis import ClassAt, ClassIn, DetectionScore, KeypointPeak, Result
    from widefield.analysis.registry import Analysis, View
    from widefield.data import Pictures
    from widefield.loading import Subject

MODEL_HELP = (
    "a timm model (resnet50), a torchvision model (torchvision:resnet50), the folder of a run of `widefield train`, or "
    "what `widefield share` wrote: a .safetensors file, a folder, or hf-hub:USER/NAME; "
    "arguments go in braces: 'replknet_31b{kernel_sizes: [3, 3, 3, 3]}'"
)

_LISTED = 40
"""Largest number of names that a message lists; skeletons have fewer key points."""


def analysis(args: argparse.Namespace) -> Analysis:
    """Return the analysis that has the command's name."""
    from widefield.analysis.registry import ANALYSES

    return ANALYSES[args.command]


def arguments(
    parser: argparse.ArgumentParser,
    *,
    models: str | int | None = "+",
    images: int | None = 32,
    sizes: bool = False,
    out: str = "analysis",
    figures: bool = True,
) -> None:
    """Add the arguments that these commands share.

    Args:
        parser: the command's parser.
        models: argparse's nargs; None: the command takes no models.
        images: default number of images; None: the command takes no images.
        sizes: --size takes several values, and ``args.size`` is a list.
        out: default folder for results.
        figures: whether the command draws figures.
    """
    if models:
        parser.add_argument("models", nargs=models, metavar="MODEL", help=MODEL_HELP)
        parser.add_argument("--pretrained", action="store_true", help="download pretrained weights (default: random)")
    if images is not None:
        parser.add_argument(
            "--images",
            metavar="SOURCE",
            help="a folder, a data set such as scales, photographs (crops of two), or photographs:cat,coffee, whole "
            "ones by name (the run's data)",
        )
        parser.add_argument("--count", type=int, default=images, metavar="N", help=f"number of images ({images})")
        size = "side of the images in pixels" + ("; several are compared" if sizes else "")
        parser.add_argument(
            "--size", type=int, nargs="+" if sizes else None, metavar="N", help=f"{size} (the model's own)"
        )
        parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images per batch (8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of images and random weights (0)")
    parser.add_argument("--device", default="cpu", help="where to compute (cpu)")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help=f"folder ({out})")
    parser.set_defaults(writes={"out": True})
    if figures and models == "+":
        parser.add_argument(
            "--label", nargs="+", metavar="TEXT", help="name of each model in figures and tables (its argument)"
        )
    if figures:
        parser.add_argument("--vector", choices=("pdf", "svg"), help="also write the figure as a vector drawing")


def places(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the arguments that choose a class, and a pixel, region, detection, box or key point of a model's output.

    ``names`` are further names of ``--class``.
    """
    parser.add_argument(
        "--class",
        *names,
        dest="of_class",
        metavar="CLASS",
        help="name or index of a class (default: the predicted one)",
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--pixel", type=int, nargs="*", metavar="N",
        help="segmentation: ROW COLUMN of the pixel whose class logit is examined (without numbers: the center)",
    )  # fmt: skip
    place.add_argument(
        "--region", type=int, nargs=4, metavar=("TOP", "LEFT", "BOTTOM", "RIGHT"),
        help="segmentation: the rectangle whose mean class logit is examined",
    )  # fmt: skip
    place.add_argument(
        "--detection", type=int, nargs="?", const=0, metavar="RANK",
        help="detectors: the detection whose class logit is examined, 0 being the best (0); with --class of that class",
    )  # fmt: skip
    place.add_argument(
        "--box", type=float, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="detectors: the box, in pixels, whose class logit is examined",
    )  # fmt: skip
    place.add_argument(
        "--keypoint", nargs="?", const="", metavar="NAME",
        help="pose models: name or index of the key point whose heatmap's peak is examined (the highest peak)",
    )  # fmt: skip


_PLACES = ("of_class", "pixel", "region", "detection", "box", "keypoint")
"""Arguments of :func:`places`."""


def target(args: argparse.Namespace, view: View) -> ClassAt | ClassIn | DetectionScore | KeypointPeak | int | None:
    """Return what the arguments of :func:`places` choose, for a model; raises ValueError for an unknown class."""
    from widefield.analysis import ClassAt, ClassIn, DetectionScore, KeypointPeak
    from widefield.analysis._scores import check_scores

    if any(getattr(args, place) is not None for place in _PLACES):
        check_scores(view.model)
    if args.keypoint is not None:
        if args.of_class is not None:
            raise ValueError("--keypoint chooses a heatmap, and a pose model has no other classes: leave out --class.")
        return KeypointPeak(keypoint(args.keypoint, view) if args.keypoint else None)
    label = None if args.of_class is None else _label(args.of_class, view)
    if args.box is not None or args.detection is not None:
        return DetectionScore(label, args.detection or 0, args.box)
    if args.region is not None:
        return ClassIn(label, tuple(args.region))
    if args.pixel is None:
        return label
    if len(args.pixel) not in (0, 2):
        raise ValueError(f"--pixel takes ROW COLUMN, or nothing for the center; got {args.pixel}.")
    return ClassAt(label, *args.pixel)


def keypoint(word: str, view: View) -> int:
    """Return the index of a key point by its name or index; raises ValueError for other models and names."""
    from widefield.analysis._keypoints import check_pose_model

    check_pose_model(view.model, "--keypoint")
    return _label(word, view, "key point")


def _label(word: str, view: View, kind: str = "class") -> int:
    from widefield import _checks

    if word in view.classes:
        return view.classes.index(word)
    if word.isdecimal():
        return int(word)
    several = f"Its {kind}{'es' if kind == 'class' else 's'}"
    if not view.classes:
        known = f" {several} have no names: give an index."
    elif len(view.classes) <= _LISTED:
        known = f"{_checks.did_you_mean(word, view.classes)} {several} are {', '.join(view.classes)}."
    else:
        known = _checks.did_you_mean(word, view.classes)
    raise ValueError(f"{view.name} has no {kind} {word!r}.{known}")


def subject(word: str, args: argparse.Namespace) -> Subject:
    """Build or load a model of the command line as it is examined; see :func:`widefield.loading.load`."""
    from widefield.loading import load
    from widefield.loading.trained import examined

    labels = check_labels(args)
    found = load(word, pretrained=args.pretrained, seed=args.seed, device=args.device, together_with=args.models)
    if found.work == "masked_image":
        print(f"{found.name} was pre-trained by masking: this is its encoder, up to the last feature map.")
    found = replace(found, model=examined(found.model))
    return replace(found, name=labels[args.models.index(word)]) if labels else found


def check_labels(args: argparse.Namespace) -> list[str]:
    """Return the labels of the command line, one per model, or none; raises ValueError for another number."""
    labels: list[str] = getattr(args, "label", None) or []
    if labels and not len(labels) == len(set(labels)) == len(args.models) == len(set(args.models)):
        raise ValueError(f"--label takes a different text for each model; got {labels} for the models {args.models}.")
    return labels


def pictures(args: argparse.Namespace, found: Subject, size: int | None = None, *, stand_in: bool = True) -> Pictures:
    """Return the images of the command line, as the model expects them.

    Args:
        args: arguments of the command line.
        found: the model.
        size: overrides --size.
        stand_in: use photographs, and say so, if the data of a run are missing. False for results about these images.
    """
    given = {"count": args.count, "size": size or args.size, "seed": args.seed}
    if stand_in:
        shown = found.any_pictures(args.images, say=lambda text: print(text, file=sys.stderr), **given)
    else:
        shown = found.pictures(args.images, **given)
    print(shown.found())
    return shown


def views(args: argparse.Namespace, entry: Analysis, **options: Any) -> Iterator[View]:
    """Yield each model of the command line with the images that an analysis needs, for each size asked for.

    Args:
        args: arguments of the command line.
        entry: the analysis.
        options: arguments for the analysis.
    """
    for word in args.models:
        found = subject(word, args)
        yield from views_of(found, args, entry, **options)
        warn_if_shut(found)  # after the analysis: of errors there is one line


def warn_if_shut(found: Subject) -> None:
    """Say so if residual branches of a model are shut, as they are in many networks until these are trained."""
    from widefield.analysis import shut_branches

    shut = shut_branches(found.model)
    if shut:
        print(
            f"warning: {len(shut)} scales of {found.name} are nearly zero, such as {shut[0]}: their residual branches "
            "are shut, as at initialization, and what follows shows the shortcuts. Give trained weights (--pretrained, "
            "or the folder of a run).",
            file=sys.stderr,
        )


def views_of(found: Subject, args: argparse.Namespace, entry: Analysis, **options: Any) -> Iterator[View]:
    """Yield one model as :func:`views` does."""
    from widefield import _checks

    if entry.reads_objects:
        if not entry.applies(found.model):
            raise ValueError(
                f"{entry.name} needs {entry.needs}, and {found.name} is a model for {found.work}. Give the folder of a "
                f"run with {entry.needs}."
            )
        view = found.object_view(args.count)
        print(f"{len(view.samples or ())} images of {view.source}")
        yield view
        return
    if not entry.reads_images(found.model):
        yield found.view()
        return
    for size in args.size if isinstance(args.size, list) else [args.size]:
        side = found.size if size is None else _checks.integer("--size", size)
        shown = pictures(args, found, side + entry.margin(options, side), stand_in=entry.stand_in)
        yield found.view(shown, batch_size=args.batch_size)


def write(results: Mapping[str, Result], args: argparse.Namespace, stem: str | None = None, **options: Any) -> None:
    """Print what results of one kind show, as rows and in words, and write them to files.

    The files are OUT/COMMAND.png, .json, .html, and .pdf or .svg on request. ``options`` are those of ``draw``.
    """
    from widefield import bench
    from widefield.analysis import save

    suffixes = ["png", "json", "html", *([args.vector] if args.vector else [])]
    paths = [save(results, args.out / f"{stem or args.command}.{suffix}", **options) for suffix in suffixes]
    args.printer.table([row for result in results.values() for row in result.rows()])
    args.printer.text(type(next(iter(results.values()))).reading(results))
    found = {name: result.to_dict() for name, result in results.items()}
    args.printer.add(environment=bench.environment(), results=found, files=paths)
    print("wrote " + ", ".join(str(path) for path in paths))
