"""``widefield export``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from widefield.cli import _subjects

if TYPE_CHECKING:
    from torch import Tensor, nn

    from widefield.loading import Subject

    Batches = list[Any]

SUMMARY = "from a trained model to a file that serves it: specialized, reparameterized, trimmed, verified"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, models=1, images=128, out="exports", figures=False)
    parser.add_argument("--format", choices=("onnx", "pt2", "openvino"), default="onnx", help="file to write (onnx)")
    parser.add_argument(
        "--routing", choices=("branches", "per-sample", "blocked", "mean", "auto"), default="branches",
        help="layers whose kernel depends on the image: all experts and a weighted sum (branches), kernels mixed for "
        "each image (per-sample), the same in onnxruntime's layout (blocked), or made static on every other image: "
        "all of them (mean), or if it changes little (auto)",
    )  # fmt: skip
    parser.add_argument(
        "--trim",
        action="store_true",
        help="crop kernels as far as every other image allows and, for images of one size, taps that meet no map",
    )
    parser.add_argument("--limit", type=int, metavar="K", help="crop kernels to K x K pixels, at any cost")
    parser.add_argument(
        "--tolerance", type=float, default=0.01, metavar="T",
        help="of --routing auto and of --trim: by how much outputs may change, relative RMS (0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--dynamic", nargs="*", choices=("batch", "size"),
        help="sizes that may change (batch; of segmentation models and detectors batch and size)",
    )  # fmt: skip
    parser.add_argument(
        "--nms", choices=("inside", "outside"), default="inside",
        help="detectors: where the last non-maximum suppression is; outside, the file gives its candidates (inside)",
    )  # fmt: skip
    parser.add_argument(
        "--decoding", choices=("inside", "outside"), default="inside",
        help="pose models: where heatmaps become key points; outside, the file gives heatmaps (inside)",
    )  # fmt: skip
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX operator set (that of torch's exporter)")
    parser.add_argument(
        "--throughput", type=int, nargs="*", default=[], metavar="N",
        help="batch sizes for timing the file next to the model, eager and compiled",
    )  # fmt: skip
    parser.add_argument(
        "--int8", action="store_true", help="write a second file in 8 bits, calibrated on every other image"
    )
    parser.add_argument(
        "--calibration", choices=("minmax", "entropy", "percentile"), default="minmax",
        help="how ranges of activations are estimated (minmax)",
    )  # fmt: skip
    parser.add_argument(
        "--outliers", choices=("warn", "refuse", "float"), default="warn",
        help="how to treat kernels that 8 bits spoil (warn)",
    )  # fmt: skip
    parser.add_argument("--equalize", action="store_true", help="equalize channel scales before quantization (no)")
    parser.add_argument(
        "--keep", nargs="*", default=[], metavar="LAYER", help="layers to leave in float32, as the report names them"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    import torch

    from widefield import deploy
    from widefield.analysis._model import running
    from widefield.surgery import compare

    if args.int8 and args.format != "onnx":
        raise ValueError(f"8 bits are written as ONNX; got --format {args.format}.")
    found = _subjects.subject(args.models[0], args)
    if args.dynamic is None:
        args.dynamic = ["batch"] if found.work in ("classification", "multilabel", "pose") else ["batch", "size"]
    # Photographs suffice to verify a file. Calibration and trimming need images from the data set.
    reads = args.int8 or args.routing in ("mean", "auto") or args.trim or args.limit is not None
    images = _own_samples(found, args, stand_in=not reads) or _pictures(found, args, stand_in=not reads)
    shown, held_out = images[::2], images[1::2] or images
    example = _pixels(images[0])
    with torch.no_grad(), running(found.model, example):  # reports an unsupported size as a one-line error
        found.model(example[:1])
    if "batch" not in args.dynamic:
        held_out = [batch for batch in held_out if len(_pixels(batch)) == len(example)] or [images[0]]
    model = _prepared(found.model, shown, args)
    names = found.output_names if found.work == "pose" else found.classes
    info = deploy.ModelInfo(names or None, tuple(found.mean), tuple(found.std), (found.size, found.size))
    stem = found.name.partition("{")[0].replace(":", "_").replace("/", "_")
    path = args.out / f"{stem}{deploy.FORMATS[args.format]}"
    done = deploy.export(
        model,
        path,
        example,
        routing=args.routing if args.routing in deploy.ROUTING else "branches",
        dynamic=args.dynamic,
        nms=args.nms,
        decoding=args.decoding,
        loader=held_out,
        opset=args.opset,
        throughput=args.throughput,
        info=info,
    )
    written = [path, path.with_name(f"{path.name}.json")]
    args.printer.add(export=done.to_dict())
    args.printer.table(done.rows())
    if found.work == "masked_image":
        print("The file has two outputs: the last feature map, and its mean over positions.")
    args.printer.table([speed.row() for speed in done.throughput])
    if done.detection is None or args.nms == "inside":  # candidates are not comparable with detections
        change = compare(found.model, deploy.load(path), held_out)
        args.printer.add(change=change)
        print(f"The file against {found.name} as it came: {change}.")
    if args.int8:
        small = args.out / f"{stem}-int8.onnx"
        options = {"calibration": args.calibration, "outliers": args.outliers, "equalize": args.equalize}
        options |= {"keep": args.keep, "dynamic": ["batch", *args.dynamic], "info": info}
        rounded = deploy.quantize(model, small, shown, images=held_out, **options)
        print(rounded.summary())
        args.printer.add(int8=rounded.to_dict())
        args.printer.table(rounded.layer_rows(5))
        written += [small, small.with_name(f"{small.name}.json")]
    args.printer.add(files=written)
    print("wrote " + ", ".join(str(part) for part in written))
    return 0


def _prepared(model: nn.Module, shown: Batches, args: argparse.Namespace) -> nn.Module:
    """Return the model to export, and print the steps applied to it."""
    from widefield.surgery import NothingToFuseError, reparameterize, specialize, trim

    if args.routing in ("mean", "auto"):
        model = specialize(model, shown, policy=args.routing, tolerance=args.tolerance, report=_say)
    try:
        model = reparameterize(model, _pixels(shown[0])[:2], report=_say)
    except NothingToFuseError:
        print(f"{type(model).__name__} has nothing to reparameterize.")
    if args.trim:
        size = None if "size" in args.dynamic else tuple(_pixels(shown[0]).shape[-2:])
        model = trim(model, args.tolerance, loader=shown, limit=args.limit, example_input=size, report=_say)
    elif args.limit is not None:
        model = trim(model, 0.0, loader=shown, limit=args.limit, report=_say)
    return model


def _pixels(batch: Any) -> Tensor:
    images: Tensor = batch["image"] if isinstance(batch, dict) else batch[0]
    return images


def _pictures(found: Subject, args: argparse.Namespace, *, stand_in: bool) -> Batches:
    """Return pictures in batches, with labels or masks where these are known."""
    shown = _subjects.pictures(args, found, stand_in=stand_in)
    return found.view(shown, batch_size=args.batch_size).labeled_batches()


def _own_samples(found: Subject, args: argparse.Namespace, *, stand_in: bool) -> Batches:
    """Return the own validation images of a detection or pose run in batches, with their labels; [] for all else.

    Args:
        found: the model.
        args: arguments of the command line.
        stand_in: whether missing data are no error, since pictures take their place.
    """
    from widefield.loading import MissingDataError
    from widefield.loading.inputs import Selection

    if found.work not in ("detection", "pose") or args.images is not None or found.recipe is None:
        return []
    try:
        whole = found.own_data(true_boxes=True)
    except MissingDataError:
        if stand_in:
            return []
        raise
    chosen, task = Selection(whole, args.count, args.seed), found.task(whole)
    samples = [sample for index in range(len(chosen)) if (sample := chosen[index]) is not None]
    print(f"{len(samples)} images of the run's own data")
    step = args.batch_size
    return [task.collate(samples[start : start + step]) for start in range(0, len(samples), step)]


def _say(report: object) -> None:
    print(str(report).partition("\n\n")[0])  # in Python, report= also returns the tables
