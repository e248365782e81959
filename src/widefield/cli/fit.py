"""``widefield fit``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from widefield.cli.train import described_keys

if TYPE_CHECKING:
    import argparse

    from widefield._keys import KeyParser

SUMMARY = "find the kernel sizes that fit a data set, and train the plain network that has them"


def add(parser: KeyParser) -> None:
    """Add the command's arguments."""
    parser.usage = (
        "widefield fit [-h] [--json] (RECIPE | RUN | MODEL --data.name SET | --resume DIR)\n"
        "       [OPTIONS] [--KEY VALUE ...]"
    )
    parser.epilog = (
        "RECIPE is a YAML file or the name of a shipped recipe. A finished RUN is also the unchanged network. MODEL is "
        "a model of timm, or of torchvision (torchvision:resnet18); its published weights are used with "
        "--model.pretrained true. All epochs of the recipe are used: a part to probe, the rest to settle."
    )
    parser.take_keys(described_keys)
    parser.set_defaults(needs_models=False)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a recipe, a run or a model")
    parser.add_argument("--resume", metavar="DIR", help="continue the fit in this folder")
    parser.add_argument(
        "--kernel-sizes", type=int, nargs="+", metavar="N", help="the sizes to choose from (3 5 7 11, and the own ones)"
    )
    parser.add_argument("--where", nargs="+", metavar="GLOB", help="which convolutions (those of the backbone)")
    parser.add_argument("--by", choices=("stage", "layer"), help="which layers share a size (stage)")
    parser.add_argument("--budget", choices=("latency", "macs", "params"), help="the cost that is limited (latency)")
    parser.add_argument("--limit", metavar="X", help="largest cost relative to the unchanged network, or none (1.0)")
    parser.add_argument("--probe", type=float, metavar="SHARE", help="share of the epochs to probe (0.2)")
    parser.add_argument("--readings", type=int, metavar="N", help="most assignments of sizes to read (64)")
    parser.add_argument("--latency-batch", type=int, metavar="N", help="images of a latency measurement (1)")
    parser.add_argument("--latency-device", metavar="DEVICE", help="where latency is measured (cpu)")
    parser.add_argument("--latency-threads", type=int, metavar="N", help="threads in latency measurements (PyTorch's)")
    parser.add_argument("--unchanged", metavar="RUN", help="finished run of the recipe to compare with (it is trained)")
    parser.add_argument("--out", metavar="DIR", help="folder of the fit (runs/NAME-fit)")


_NAMES = {
    "kernel_sizes": "kernel_sizes",
    "where": "where",
    "by": "by",
    "budget": "budget",
    "probe": "probe",
    "readings": "readings",
    "latency_batch": "batch",
    "latency_device": "device",
    "latency_threads": "threads",
    "unchanged": "unchanged",
    "out": "out",
}
"""Option -> setting."""


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    if args.recipe and args.resume:
        raise ValueError(f"--resume continues the fit in {args.resume}: leave out {args.recipe}.")
    if not args.recipe and not args.resume:
        raise ValueError("give a recipe, a run or a model first: widefield fit RECIPE --KEY VALUE; or --resume DIR.")
    import widefield.models  # noqa: F401  registers them in timm; takes seconds
    from widefield.fitting import FitSpec, fit

    if args.resume:
        FitSpec.load(args.resume)  # raises if there is none
    result = fit(args.recipe or args.resume, overrides=args.keys, **_settings(args))
    args.printer.add(run=result.run, page=result.page, **result.to_dict())
    print(result.summary())
    args.printer.table(result.rows())
    print(f"\nThe network is in {result.run}.")
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given."""
    found = {name: getattr(args, option) for option, name in _NAMES.items() if getattr(args, option) is not None}
    if args.limit is not None:
        found["limit"] = None if args.limit.lower() in ("none", "null") else _number(args.limit)
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--limit must be a number such as 0.9, or none; got {text!r}.") from None
