"""``widefield bench``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from widefield.cli._tables import add_json

if TYPE_CHECKING:
    from widefield.benchmarks import Settings

SUMMARY = "measure against PyTorch's own convolutions; rows, ratios and bars"

_COUNT: Mapping[str, Any] = {"type": int, "metavar": "N"}
_COUNTS: Mapping[str, Any] = {**_COUNT, "nargs": "+"}
_WHOLE_NETWORK = 5.0
"""Seconds for all timings of a call of a whole network."""


@dataclass(frozen=True)
class _Subject:
    """A benchmark: its help, its own arguments, and the call that runs it."""

    summary: str
    run: Callable[[Settings, argparse.Namespace], None]
    arguments: Mapping[str, Mapping[str, Any]]
    budget: float = 0.6
    epilog: str | None = None


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments: for each benchmark those that all share, and its own."""
    parsers = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, subject in SUBJECTS.items():
        sub = parsers.add_parser(name, help=subject.summary, description=subject.summary, allow_abbrev=False)
        sub.epilog = subject.epilog
        sub.set_defaults(writes={"out": True})
        sub.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run (cpu)")
        sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="(float32)")
        sub.add_argument("--repeats", default=7, **_COUNT, help="timings of each call (7)")
        budget = subject.budget
        sub.add_argument(
            "--budget", type=float, default=budget, metavar="S",
            help=f"seconds for all timings of a call, of which there are at least two ({budget:g})",
        )  # fmt: skip
        sub.add_argument("--batch-size", **_COUNT, help="images per call; the default depends on device and shape")
        sub.add_argument("--out", type=Path, metavar="DIR", help="write SUBJECT_DEVICE.json and .md there (no files)")
        add_json(sub)
        for option, details in subject.arguments.items():
            sub.add_argument(option, **details)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.benchmarks import Settings

    settings = Settings(
        shlex.join(["widefield", *args.words]),
        device=args.device,
        dtype=args.dtype,
        repeats=args.repeats,
        budget_s=args.budget,
        out=args.out,
        finished=lambda found: args.printer.add(**found),
    )
    SUBJECTS[args.subject].run(settings, args)
    return 0


def _depthwise(settings: Settings, args: argparse.Namespace) -> None:
    from widefield.benchmarks import depthwise

    depthwise.run(
        settings,
        channels=args.channels,
        resolutions=args.resolutions,
        kernels=args.kernels,
        batch_size=args.batch_size,
        layers=args.layers,
    )


def _mixture(settings: Settings, args: argparse.Namespace) -> None:
    from widefield.benchmarks import mixture

    shapes = args.shapes and [(s[0], s[1]) for s in (_numbers("--shapes", word, "x", 2) for word in args.shapes)]
    mixture.run(
        settings,
        batch_size=16 if args.batch_size is None else args.batch_size,
        shapes=shapes,
        sets=args.sets and [_numbers("--sets", word, ",") for word in args.sets],
        counts=args.counts,
    )


def _deform(settings: Settings, args: argparse.Namespace) -> None:
    from widefield.benchmarks import deform

    deform.run(settings, **_given(args, "batch_size", "side", "width", "stages"))


def _mixers(settings: Settings, args: argparse.Namespace) -> None:
    from widefield.benchmarks import mixers

    mixers.run(settings, **_given(args, "name", "mixers", "batch_size", "size"))


def _model(settings: Settings, args: argparse.Namespace) -> None:
    from widefield.benchmarks import model

    model.run(settings, args.names, batch_size=args.batch_size, size=args.size)


def _memory(settings: Settings, args: argparse.Namespace) -> None:
    from widefield.benchmarks import memory

    memory.run(settings, **_given(args, "batch_size", "sizes", "layers", "families"))


def _deploy(settings: Settings, args: argparse.Namespace) -> None:
    from widefield.benchmarks import deploy

    sizes = (1, 8) if args.batch_size is None else (args.batch_size,)
    deploy.run(settings, batch_sizes=sizes, **_given(args, "names", "size"))


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the arguments that were given, by name."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _numbers(option: str, word: str, between: str, count: int | None = None) -> list[int]:
    parts = word.split(between)
    if not all(part.isdecimal() for part in parts) or (count is not None and len(parts) != count):
        example = "96x56" if between == "x" else "3,5,7"
        raise ValueError(f"{option} takes words such as {example}; got {word!r}.")
    return [int(part) for part in parts]


SUBJECTS: Mapping[str, _Subject] = {
    "depthwise": _Subject(
        "RepLKNet's table 1: all passes of a depthwise convolution against F.conv2d",
        _depthwise,
        {
            "--channels": {**_COUNT, "help": "(384)"},
            "--resolutions": {**_COUNTS, "help": "sides of the maps (16 32 64)"},
            "--kernels": {**_COUNTS, "help": "(3 5 7 9 13 17 21 27 29 31)"},
            "--layers": {**_COUNT, "help": "convolutions per call (24 on cuda, 1 on cpu)"},
        },
        epilog="On cpu, without --channels, --resolutions and --kernels, ConvNeXt-T's shapes, larger ones and some in "
        "bfloat16 are measured, too.",
    ),
    "mixture": _Subject(
        "MoRF's figure 4: training and inference against sets of experts",
        _mixture,
        {
            "--shapes": {
                "nargs": "+",
                "metavar": "CxS",
                "help": "channels x side of the maps (96x56 192x28 384x14 768x7)",
            },
            "--sets": {"nargs": "+", "metavar": "K,K", "help": "sets of experts (3,5,7 3,5,7,9,11 and up to 15)"},
            "--counts": {**_COUNTS, "help": "numbers of experts (5 64 128)"},
        },
        epilog="Dense mixtures are measured if --shapes is not given.",
    ),
    "deform": _Subject(
        "InternImage's deformable sampling against torchvision's and a gather formulation",
        _deform,
        {
            "--side": {**_COUNT, "help": "of the first stage's maps (56)"},
            "--width": {**_COUNT, "help": "channels of the first stage (64)"},
            "--stages": {**_COUNTS, "help": "(1 2 3 4)"},
        },
    ),
    "mixers": _Subject(
        "one MetaFormer with every token mixer: counts, inference, a training step",
        _mixers,
        {
            "--name": {"help": "which (metaformer_tiny)"},
            "--mixers": {"nargs": "+", "metavar": "NAME", "help": "which token mixers (all)"},
            "--size": {**_COUNT, "help": "side of the images (224)"},
        },
        _WHOLE_NETWORK,
    ),
    "model": _Subject(
        "throughput and memory of timm's models, as they are and with FastDepthwise",
        _model,
        {
            "names": {"nargs": "+", "metavar": "NAME", "help": "as timm calls them"},
            "--size": {**_COUNT, "help": "side of the images; default: the model's own"},
        },
        _WHOLE_NETWORK,
    ),
    "memory": _Subject(
        "peak resident memory of training steps: mixtures, and gradient checkpointing of every family",
        _memory,
        {
            "--sizes": {**_COUNTS, "help": "sides of the images (128 224)"},
            "--layers": {
                "nargs": "*",
                "metavar": "NAME",
                "help": "'7x7, timm', '11x11, timm', '11x11, ours', mixture, 'mixture as branches' (all)",
            },
            "--families": {
                "nargs": "*",
                "metavar": "NAME",
                "help": "networks for gradient checkpointing (one a family)",
            },
        },
        epilog="Each row is a fresh process. --repeats and --budget have no effect: memory is measured once.",
    ),
    "deploy": _Subject(
        "MoRF networks in onnxruntime next to the plain ones: as graphs, and specialized",
        _deploy,
        {
            "--names": {
                "nargs": "+",
                "metavar": "NAME",
                "help": "MoRF networks of timm's registry (morf_convnext_tiny)",
            },
            "--size": {**_COUNT, "help": "side of the images (224)"},
        },
        _WHOLE_NETWORK,
    ),
}
