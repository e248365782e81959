"""``widefield models``."""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

SUMMARY = "list models with parameters and MACs"

COMPARISONS = ("imagenet", "segmentation", "detection", "pose")

COUNTS = Path(__file__).parents[1] / "models" / "counts.json"
"""The rows of our networks by name, see :func:`row`, written by ``python benchmarks/model_counts.py``.

To build and count all of them takes half a minute, and torch and timm take seconds to import. A file needs neither.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--compare",
        nargs="?",
        const=COMPARISONS[0],
        choices=COMPARISONS,
        help="published counts next to measured ones: of networks on ImageNet (the default), segmentation models, "
        "detectors, or pose models",
    )
    parser.add_argument("pattern", nargs="?", help="glob over all names of timm; default: the models of widefield")
    parser.set_defaults(needs_models=False)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    if args.compare == "segmentation":
        _compare_segmentation(args.pattern)
    elif args.compare == "detection":
        _compare_detection(args.pattern)
    elif args.compare == "pose":
        _compare_poses(args.pattern)
    elif args.compare:
        _compare_imagenet(args.pattern)
    else:
        _list(args.pattern)
    return 0


def _list(pattern: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    counts = json.loads(COUNTS.read_text(encoding="utf-8"))
    rows = counts if pattern is None else {name: counts.get(name) or row(name) for name in _matching(pattern)}
    table = Table()
    for column in ("model", "input", "parameters", "MACs", "stated", "by"):
        table.add_column(column, justify="left" if column in ("model", "by") else "right", no_wrap=column != "by")
    for name, entry in rows.items():
        stated = entry["stated"] or {"parameters": "", "macs": "", "source": ""}
        table.add_row(
            name,
            "x".join(map(str, entry["input"])),
            f"{entry['parameters'] / 1e6:.2f}M",
            f"{entry['macs'] / 1e9:.3f}G",
            f"{stated['parameters']} / {stated['macs']}" if entry["stated"] else "",
            stated["source"],
        )
    Console().print(table)


def _matching(pattern: str) -> list[str]:
    """Return the names in timm's registry that match a glob; raises ValueError if there is none."""
    import timm

    import widefield.models  # noqa: F401  registers ours
    from widefield import _checks

    every = timm.list_models()
    names = [name for name in every if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise ValueError(f"no model matches {pattern!r}.{_checks.did_you_mean(pattern, every)}")
    return names


def our_names() -> list[str]:
    """Return the names of widefield's networks in timm's order."""
    import timm
    from timm.models import is_model_in_modules

    import widefield.models

    return [name for name in timm.list_models() if is_model_in_modules(name, widefield.models.MODULES)]


def row(name: str) -> dict[str, Any]:
    """Build a network on the meta device and return its row: input (C, H, W), parameters, MACs, stated counts."""
    import timm
    from timm.models import get_pretrained_cfg

    import widefield.models

    config = get_pretrained_cfg(name)
    shape = config.input_size if config else (3, 224, 224)
    cost = _measured(_on_meta(partial(timm.create_model, name)), shape)
    stated = widefield.models.STATED.get(name)
    return {
        "input": list(shape),
        "parameters": cost.parameters,
        "macs": cost.macs,
        "stated": stated and stated._asdict(),
    }


def _on_meta(build: Callable[[], Any]) -> Any:
    """Return what ``build`` makes, in evaluation mode on the meta device."""
    import torch

    try:
        with torch.device("meta"):
            return build().eval()
    except NotImplementedError:  # older releases of timm compute with numbers while they build
        return build().to("meta").eval()


def _measured(model: Any, shape: Sequence[int]) -> Any:
    """Return the cost of a model on the meta device for an image of this shape."""
    import torch

    from widefield import bench

    return bench.cost(model, torch.empty(1, *shape, device="meta"))


def _merged(module: Any, name: str) -> Any:
    """Return a network in its merged form if it is one of ours."""
    from timm.models import is_model_in_modules

    from widefield.models import MODULES
    from widefield.surgery import fuse_layers

    return fuse_layers(module)[0] if is_model_in_modules(name, MODULES) else module


def _compare_imagenet(pattern: str | None) -> None:
    import timm
    from rich.console import Console
    from rich.table import Table

    from widefield.models.comparison import CITED

    rows = [row for row in CITED if pattern is None or fnmatch.fnmatchcase(row.name, pattern)]
    if not rows:
        raise ValueError(f"no network of the slides' table is called {pattern!r} in timm's registry.")
    table = Table(
        caption=f"{_CAPTION} SLaK is cited with 40 % of its weights removed, and measured dense.",
        caption_justify="left",
    )
    for column in ("architecture", "date", "type", "size", "parameters (M)", "MACs (G)", "top-1", "model"):
        table.add_column(column, justify="left" if column in ("architecture", "date", "model") else "right")
    for row in rows:
        cost = None
        if row.name:
            model = _merged(_on_meta(partial(timm.create_model, row.name)), row.name)
            cost = _measured(model, (3, row.size, row.size))
        table.add_row(
            row.architecture + (f" ({row.note})" if row.note else ""),
            row.date,
            row.kind,
            str(row.size),
            _both(row.parameters, cost and cost.parameters / 1e6),
            _both(row.macs, cost and cost.macs / 1e9),
            f"{row.top1:g}",
            row.name,
        )
    Console().print(table)


def _compare_segmentation(pattern: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from widefield import dense
    from widefield.models.comparison_segmentation import CITED_SEGMENTERS, CLASSES

    rows = [row for row in CITED_SEGMENTERS if pattern is None or fnmatch.fnmatchcase(row.name, pattern)]
    if not rows:
        raise ValueError(f"no segmentation model of the tables has a backbone {pattern!r} in timm's registry.")
    table = Table(
        caption=f"{_CAPTION} parameters include the auxiliary head, MACs do not. mIoU: one scale / several scales.",
        caption_justify="left",
    )
    for column in (
        "architecture",
        "method",
        "data",
        "size",
        "parameters (M)",
        "MACs (G)",
        "mIoU",
        "source",
        "backbone",
    ):
        table.add_column(
            column, justify="right" if column in ("size", "parameters (M)", "MACs (G)", "mIoU") else "left"
        )
    for row in rows:
        build = partial(getattr(dense, row.method), row.name, CLASSES[row.data], **row.args)
        model = _on_meta(build)
        model.backbone = _merged(model.backbone, row.name)
        cost = _measured(model, (3, *row.size))
        table.add_row(
            row.architecture,
            row.method,
            row.data,
            "x".join(map(str, row.size)),
            _both(row.parameters, cost.parameters / 1e6),
            _both(row.macs, cost.macs / 1e9),
            row.miou,
            row.source,
            row.name,
        )
    Console().print(table)


def _compare_detection(pattern: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from widefield import dense
    from widefield.dense.detector_cost import FixedRoIs
    from widefield.models.comparison_detection import CITED_DETECTORS, CLASSES, METHODS, SIZE

    rows = [row for row in CITED_DETECTORS if pattern is None or fnmatch.fnmatchcase(row.name, pattern)]
    if not rows:
        raise ValueError(f"no detector of the tables has a backbone {pattern!r} in timm's registry.")
    table = Table(
        caption=f"{_CAPTION} MACs are of an image of {SIZE[1]}x{SIZE[0]} pixels, 1000 RoIs in each box head and 100 in "
        f"each mask head. AP: boxes / masks.",
        caption_justify="left",
    )
    for column in ("architecture", "method", "schedule", "parameters (M)", "MACs (G)", "AP", "source", "backbone"):
        table.add_column(column, justify="right" if column in ("parameters (M)", "MACs (G)", "AP") else "left")
    for row in rows:
        method = METHODS[row.method]
        model = _on_meta(partial(getattr(dense, method.kind), row.name, CLASSES, **method.args, **row.args))
        model.backbone = _merged(model.backbone, row.name)
        cost = _measured(FixedRoIs(model), (3, *SIZE))
        counts = _both(row.parameters, cost.parameters / 1e6), _both(row.macs, cost.macs / 1e9)
        table.add_row(row.architecture, row.method, row.schedule, *counts, row.ap, row.source, row.name)
    Console().print(table)


def _compare_poses(pattern: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from widefield import dense
    from widefield.models.comparison_pose import CITED_POSES, KEYPOINTS

    rows = [row for row in CITED_POSES if pattern is None or fnmatch.fnmatchcase(row.name, pattern)]
    if not rows:
        raise ValueError(f"no pose model of the tables has a backbone {pattern!r} in timm's registry.")
    table = Table(
        caption=f"{_CAPTION} MACs are of one crop, without the flip test. AP: percent on COCO's validation images.",
        caption_justify="left",
    )
    for column in ("architecture", "crop", "parameters (M)", "MACs (G)", "AP", "source", "backbone"):
        table.add_column(column, justify="left" if column in ("architecture", "source", "backbone") else "right")
    for row in rows:
        model = _on_meta(partial(dense.HeatmapPose, row.name, KEYPOINTS, **row.args))
        model.backbone = _merged(model.backbone, row.name)
        cost = _measured(model, (3, *row.size))
        counts = _both(row.parameters, cost.parameters / 1e6), _both(row.macs, cost.macs / 1e9)
        table.add_row(row.architecture, "x".join(map(str, row.size)), *counts, row.ap, row.source, row.name)
    Console().print(table)


_CAPTION = "cited / measured; * differs by more than 1 %. Ours are measured in their merged form;"


def _both(cited: float, measured: float | None) -> str:
    """Return both counts and a mark; 0 stands for a count that the source does not state."""
    if measured is None:
        return f"{cited:g} / -  "
    mark = "*" if cited and abs(measured - cited) > 0.01 * cited else " "
    return f"{cited:g} / {measured:.4g} {mark}" if cited else f"- / {measured:.4g} {mark}"
