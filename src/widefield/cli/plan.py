"""``widefield plan``."""

from __future__ import annotations

import argparse
from typing import Any

from widefield.cli._subjects import MODEL_HELP

SUMMARY = "what a conversion, or masked pre-training, would do to each layer of a model"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", metavar="KIND", help="a conversion, as in recipes: morf, gmconv, large_kernel, ...")
    what.add_argument(
        "--masked", nargs="?", const="fcmae", metavar="METHOD", help="fcmae, spark, simmim or a2mim (fcmae)"
    )
    parser.add_argument("--where", nargs="+", metavar="GLOB", help="conversion: the layers, by name (all that can)")
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="KEY=VALUE",
        help="arguments of the conversion, such as kernel_sizes=[3,7], or of the task masked_image, such as patch=16",
    )  # fmt: skip
    parser.add_argument("--size", type=int, metavar="N", help="masked: side of the images in pixels (the model's own)")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status, 1 if nothing would be converted, or the network would be refused."""
    from widefield.loading import load
    from widefield.loading.trained import examined
    from widefield.train.recipe_io import read_yaml

    options = {key: value for word in args.options for key, value in read_yaml(word.replace("=", ": ", 1)).items()}
    if args.masked and args.where:
        raise ValueError("--where chooses layers of a conversion; masked pre-training is about all of them.")
    found = load(args.model)
    network = examined(found.model)
    if args.to:
        return _converted(network, args, options)
    return _masked(network, args.size or found.size, args, options)


def _converted(network: Any, args: argparse.Namespace, options: dict[str, Any]) -> int:
    from widefield.surgery import plan
    from widefield.train.model import conversion_of
    from widefield.train.recipe import ConversionSpec

    found = plan(network, conversion_of(ConversionSpec(args.to, args.where, options)), args.where)
    args.printer.add(model=args.model, replaced=len(found.replaced), steps=found.steps)
    args.printer.table(found.rows(), right=())
    print(found.summary())
    return 0 if found.replaced else 1


def _masked(network: Any, size: int, args: argparse.Namespace, options: dict[str, Any]) -> int:
    from widefield import masking, tasks
    from widefield.loading.inputs import Classes

    task: Any = tasks.create("masked_image", Classes(()), method=args.masked, **options)
    encoder: Any = network.encoder.body if isinstance(network, masking.Encoder) else network
    found = masking.plan(encoder, task.method.mask.patch) if task.method.visible else None
    model = task.model(encoder)
    mask = task.method.mask.draw(1, size, size)
    masked, total = int(mask.sum()), mask.numel()
    args.printer.add(model=args.model, method=args.masked, size=size, masked_patches=masked, patches=total)
    if found is not None:
        args.printer.add(plan=found.to_dict())
        args.printer.table(found.rows(), right=())
    print(f"{masked} of {total} patches are masked in images of {size}x{size}")
    if found is not None:
        print(found.summary())
        return 0 if found.leak is None else 1
    reach = masking.reach(model, (3, size, size))
    args.printer.add(reach=reach)
    print(reach)
    return 0
