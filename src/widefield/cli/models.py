"""``widefield models``."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence
from typing import Any

SUMMARY = "list models with parameters and MACs"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--compare", action="store_true", help="the slides' table of networks on ImageNet, cited next to measured"
    )
    parser.add_argument("pattern", nargs="?", help="glob over all names of timm; default: the models of widefield")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    if args.compare:
        _compare(args.pattern)
    else:
        _list(args.pattern)
    return 0


def _list(pattern: str | None) -> None:
    import timm
    from rich.console import Console
    from rich.table import Table
    from timm.models import get_pretrained_cfg, is_model_in_modules

    import widefield.models
    from widefield import _checks

    every = timm.list_models()
    if pattern is None:
        names = [name for name in every if is_model_in_modules(name, widefield.models.MODULES)]
    else:
        names = [name for name in every if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise ValueError(f"no model matches {pattern!r}.{_checks.did_you_mean(pattern, every)}")
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


def _cost(name: str, shape: Sequence[int], *, merged: bool = False) -> Any:
    """Return the cost of a network for an image of this shape, without computing any number."""
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


def _compare(pattern: str | None) -> None:
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
