"""The command line: thin commands over the library."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from widefield.cli import cam, erf, export, interactions, kernels, masks, report, routing, runs, shape_bias, stability
from widefield.cli import eval as evaluation

MODULES = {
    "eval": evaluation,
    "runs": runs,
    "report": report,
    "erf": erf,
    "routing": routing,
    "masks": masks,
    "cam": cam,
    "interactions": interactions,
    "shape-bias": shape_bias,
    "stability": stability,
    "kernels": kernels,
    "export": export,
}
"""Commands that stand in a module each, which has SUMMARY, ``add(parser)`` and ``run(args)``: of runs, of what models
look at, and of what serves them."""

_RECORDS = ("config", "failed")
"""Names of the recipe in the folder of a run."""

USER_ERRORS = (ValueError, TypeError, OSError, FloatingPointError, ModuleNotFoundError)
"""What the library raises for something that the user can mend: shown as one line, without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``widefield`` with the given words (default: those of the process); return the exit status.

    0, 1 after an error in what was asked, 2 after wrong usage (raised as SystemExit by argparse), 130 or 143 after
    Ctrl-C or SIGTERM.
    """
    parser = _parser()
    words = sys.argv[1:] if argv is None else list(argv)
    args, rest = parser.parse_known_args(words)
    args.words = words
    if rest and not args.takes_overrides:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        _check_places(args)
        status: int = args.run(args, rest) if args.takes_overrides else args.run(args)
    except USER_ERRORS as error:
        print(f"widefield {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status


def _check_places(args: argparse.Namespace) -> None:
    """Raise OSError now, and not when the work is done, where --out or --plot cannot be written."""
    from widefield._files import check_place

    if args.command == "eval":  # its processes share a place, which one of them checks
        return
    if getattr(args, "out", None) is not None:
        check_place(args.out, folder=args.command not in ("runs", "report"))
    if getattr(args, "plot", None) is not None:
        check_place(args.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("widefield", description="Receptive fields in convolutional networks.")
    parser.add_argument("--version", action="version", version=f"widefield {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int], summary: str, *, takes_overrides: bool = False) -> Any:
        # allow_abbrev: or a recipe's key that starts like one of our options would be taken for it.
        sub = commands.add_parser(name, help=summary, formatter_class=_OnDemandHelp, allow_abbrev=False)
        sub.set_defaults(run=run, takes_overrides=takes_overrides)
        return sub

    train = command("train", _train, "train what a recipe describes", takes_overrides=True)
    # The recipe is read by hand: argparse would take the value of a recipe's key for it.
    train.usage = "widefield train [-h] [RECIPE] [--resume RUN] [--KEY VALUE ...]"
    train.epilog = "RECIPE is a YAML file, the folder of a run, or the name of a shipped recipe."
    train.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, exactly")

    demo = command("demo", _demo, "train, re-parameterise, measure and report, in a few minutes", takes_overrides=True)
    demo.add_argument("--data", default="digits", choices=("digits", "scales"), help="what to train on (digits)")
    demo.add_argument("--output", default="runs/demo", help="folder; an earlier demo in it is replaced (runs/demo)")

    models = command("models", _models, "list models with parameters and MACs")
    models.add_argument(
        "--compare", action="store_true", help="the slides' table of networks on ImageNet, cited beside measured"
    )
    models.add_argument("pattern", nargs="?", help="glob over all of timm's names; default: those of widefield")

    for name, module in MODULES.items():
        sub = command(name, module.run, module.SUMMARY)
        sub.description = module.SUMMARY
        module.add(sub)

    _bench_parsers(command("bench", _bench, "measure against PyTorch's own convolutions; rows, ratios and bars"))
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("widefield")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "(not installed)"


def _bench_parsers(bench: argparse.ArgumentParser) -> None:
    subjects = bench.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    count: dict[str, Any] = {"type": int, "metavar": "N"}
    many: dict[str, Any] = {**count, "nargs": "+"}

    def subject(name: str, summary: str) -> argparse.ArgumentParser:
        sub = subjects.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where (cpu)")
        sub.add_argument(
            "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of what (float32)"
        )
        sub.add_argument("--repeats", default=7, **count, help="timings of each call (7)")
        sub.add_argument(
            "--budget",
            type=float,
            metavar="S",
            help="seconds for all timings of a call, two at least (0.6; model, mixers and deploy: 5)",
        )
        sub.add_argument(
            "--batch-size", **count, help="images a call; default: by device and shape, said in the output"
        )
        sub.add_argument("--out", type=Path, metavar="DIR", help="write SUBJECT_DEVICE.json and .md there (no files)")
        return sub

    depthwise = subject("depthwise", "RepLKNet's table 1: all passes of a depthwise convolution against F.conv2d")
    depthwise.add_argument("--channels", **count, help="(384)")
    depthwise.add_argument("--resolutions", **many, help="sides of the maps (16 32 64)")
    depthwise.add_argument("--kernels", **many, help="(3 5 7 9 13 17 21 27 29 31)")
    depthwise.add_argument("--layers", **count, help="convolutions a call (24 on cuda, 1 on cpu)")
    depthwise.epilog = (
        "On cpu, with none of --channels, --resolutions and --kernels, ConvNeXt-T's shapes, larger ones and some in "
        "bfloat16 are measured too."
    )

    mixture = subject("mixture", "MoRF's figure 4: training and inference against sets of experts")
    mixture.add_argument(
        "--shapes", nargs="+", metavar="CxS", help="channels x side of the maps (96x56 192x28 384x14 768x7)"
    )
    mixture.add_argument("--sets", nargs="+", metavar="K,K", help="sets of experts (3,5,7 3,5,7,9,11 and up to 15)")
    mixture.add_argument("--counts", **many, help="numbers of experts (5 64 128)")
    mixture.epilog = "Dense mixtures are measured when --shapes is not given."

    deform = subject("deform", "InternImage's deformable sampling against torchvision's and a gather formulation")
    deform.add_argument("--side", **count, help="of the first stage's maps (56)")
    deform.add_argument("--width", **count, help="channels of the first stage (64)")
    deform.add_argument("--stages", **many, help="(1 2 3 4)")

    mixers = subject("mixers", "one MetaFormer with every token mixer: counts, inference, a training step")
    mixers.add_argument("--name", help="which (metaformer_tiny)")
    mixers.add_argument("--mixers", nargs="+", metavar="NAME", help="which token mixers (all)")
    mixers.add_argument("--size", **count, help="side of the images (224)")

    model = subject("model", "throughput and memory of timm's models, as they are and with FastDepthwise")
    model.add_argument("names", nargs="+", metavar="NAME", help="as timm calls them")
    model.add_argument("--size", **count, help="side of the images; default: the model's own")

    deploy = subject("deploy", "MoRF networks in onnxruntime beside the plain ones: as graphs, and specialised")
    deploy.add_argument(
        "--names", nargs="+", metavar="NAME", help="MoRF networks of timm's registry (morf_convnext_tiny)"
    )
    deploy.add_argument("--size", **count, help="side of the images (224)")


class _OnDemandHelp(argparse.RawDescriptionHelpFormatter):
    """Adds the keys of a recipe to the help of the commands that take them, without importing torch before."""

    def format_help(self) -> str:
        text = super().format_help()
        if self._prog.split()[-1] in ("train", "demo"):
            from widefield.train import describe_keys, shipped_recipes

            text += f"\nShipped recipes: {', '.join(shipped_recipes())}.\n\nKeys of a recipe, in YAML and here:\n"
            text += f"{describe_keys()}\n"
        return text


def _train(args: argparse.Namespace, words: Sequence[str]) -> int:
    from widefield.train import load_recipe, shipped_recipes, train

    leads = bool(words) and not words[0].startswith("-")
    source, overrides = (words[0], words[1:]) if leads else (args.resume, words)
    if source is None:
        if overrides:
            raise ValueError("put the recipe before its keys: widefield train RECIPE --KEY VALUE, or --resume RUN.")
        raise ValueError(f"give a recipe, a YAML file or one of {', '.join(shipped_recipes())}; or --resume RUN.")
    for word in overrides if args.resume else ():
        if word.partition("=")[0] in ("--name", "--output"):
            raise ValueError(f"a resumed run stays in its folder, {args.resume}: leave out {word.partition('=')[0]}.")
    if source == args.resume and not any((Path(source).expanduser() / f"{kind}.yaml").is_file() for kind in _RECORDS):
        raise FileNotFoundError(f"there is no run in {source}: give the folder of one, such as runs/NAME.")
    result = train(load_recipe(source, overrides), resume=args.resume)
    return 128 + result.interrupted if result.interrupted else 0


def _demo(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from widefield import demo

    demo.run(args.data, args.output, overrides)
    return 0


def _models(args: argparse.Namespace) -> int:
    import timm
    from rich.console import Console
    from rich.table import Table
    from timm.models import get_pretrained_cfg, is_model_in_modules

    import widefield.models
    from widefield import _checks

    if args.compare:
        return _compare(args.pattern)
    every = timm.list_models()
    if args.pattern is None:
        names = [name for name in every if is_model_in_modules(name, widefield.models.MODULES)]
    else:
        names = [name for name in every if fnmatch.fnmatchcase(name, args.pattern)]
    if not names:
        raise ValueError(f"no model matches {args.pattern!r}.{_checks.did_you_mean(args.pattern, every)}")
    table = Table()
    for column in ("model", "input", "parameters", "MACs", "stated", "by"):
        table.add_column(column, justify="left" if column in ("model", "by") else "right", no_wrap=column != "by")
    for name in names:
        config = get_pretrained_cfg(name)
        shape = config.input_size if config else (3, 224, 224)
        cost = _cost(name, shape)
        stated = widefield.models.STATED.get(name)
        said = (f"{stated.parameters} / {stated.macs}", stated.source) if stated else ("", "")
        size = "x".join(map(str, shape))
        table.add_row(name, size, f"{cost.parameters / 1e6:.2f}M", f"{cost.macs / 1e9:.3f}G", *said)
    Console().print(table)
    return 0


def _cost(name: str, shape: Sequence[int], *, merged: bool = False) -> Any:
    """Return the counts of a network for an image of this shape, computing no number."""
    import timm
    import torch

    from widefield import bench
    from widefield.surgery import fuse_layers

    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except NotImplementedError:  # older releases of timm compute with numbers while they build
        model = timm.create_model(name).to("meta")
    model.eval()
    if merged:
        model, _ = fuse_layers(model)
    return bench.cost(model, torch.empty(1, *shape, device="meta"))


def _compare(pattern: str | None) -> int:
    from rich.console import Console
    from rich.table import Table
    from timm.models import is_model_in_modules

    from widefield.models import MODULES
    from widefield.models.comparison import CITED

    rows = [row for row in CITED if pattern is None or fnmatch.fnmatchcase(row.name, pattern)]
    if not rows:
        raise ValueError(f"no network of the slides' table is called {pattern!r} in timm's registry.")
    table = Table(
        caption="cited / measured; * differs by more than 1 %. Ours are measured in their merged form; "
        "SLaK is cited with 40 % of its weights removed, and measured dense.",
        caption_justify="left",
    )
    for column in ("architecture", "date", "type", "size", "parameters (M)", "MACs (G)", "top-1", "model"):
        table.add_column(column, justify="left" if column in ("architecture", "date", "model") else "right")

    def both(cited: float, measured: float | None) -> str:
        if measured is None:
            return f"{cited:g} / -  "
        return f"{cited:g} / {measured:.4g}{' *' if abs(measured - cited) > 0.01 * cited else '  '}"

    for row in rows:
        shape, ours = (3, row.size, row.size), is_model_in_modules(row.name, MODULES)
        cost = _cost(row.name, shape, merged=ours) if row.name else None
        table.add_row(
            row.architecture + (f" ({row.note})" if row.note else ""),
            row.date,
            row.kind,
            str(row.size),
            both(row.parameters, cost and cost.parameters / 1e6),
            both(row.macs, cost and cost.macs / 1e9),
            f"{row.top1:g}",
            row.name,
        )
    Console().print(table)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from widefield.benchmarks import Settings, deform, deploy, depthwise, mixers, mixture, model

    budget = 5.0 if args.subject in ("model", "mixers", "deploy") else 0.6  # whole networks take longer
    settings = Settings(
        shlex.join(["widefield", *args.words]),
        device=args.device,
        dtype=args.dtype,
        repeats=args.repeats,
        budget_s=budget if args.budget is None else args.budget,
        out=args.out,
    )
    if args.subject == "depthwise":
        depthwise.run(
            settings,
            channels=args.channels,
            resolutions=args.resolutions,
            kernels=args.kernels,
            batch_size=args.batch_size,
            layers=args.layers,
        )
    elif args.subject == "mixture":
        shapes = args.shapes and [(s[0], s[1]) for s in (_numbers("--shapes", word, "x", 2) for word in args.shapes)]
        mixture.run(
            settings,
            batch_size=16 if args.batch_size is None else args.batch_size,
            shapes=shapes,
            sets=args.sets and [_numbers("--sets", word, ",") for word in args.sets],
            counts=args.counts,
        )
    elif args.subject == "deform":
        deform.run(settings, **_given(args, "batch_size", "side", "width", "stages"))
    elif args.subject == "mixers":
        mixers.run(settings, **_given(args, "name", "mixers", "batch_size", "size"))
    elif args.subject == "deploy":
        deploy.run(
            settings,
            batch_sizes=(1, 8) if args.batch_size is None else (args.batch_size,),
            **_given(args, "names", "size"),
        )
    else:
        model.run(settings, args.names, batch_size=args.batch_size, size=args.size)
    return 0


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _numbers(option: str, word: str, between: str, count: int | None = None) -> list[int]:
    parts = word.split(between)
    if not all(part.isdecimal() for part in parts) or (count is not None and len(parts) != count):
        example = "96x56" if between == "x" else "3,5,7"
        raise ValueError(f"{option} takes words such as {example}; got {word!r}.")
    return [int(part) for part in parts]


if __name__ == "__main__":
    raise SystemExit(main())
