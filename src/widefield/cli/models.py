"""``widefield models``."""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
    if args.compare:
        kinds = {
            "imagenet": _compare_imagenet,
            "segmentation": _compare_segmentation,
            "detection": _compare_detection,
            "pose": _compare_poses,
        }
        comparison = kinds[args.compare](args.pattern)
        args.printer.add(rows=[one.entry for one in comparison.rows], note=comparison.caption)
        args.printer.table([one.cells for one in comparison.rows], comparison.right, caption=comparison.caption)
        return 0
    counts = json.loads(COUNTS.read_text(encoding="utf-8"))
    names = counts if args.pattern is None else _matching(args.pattern)
    found = {name: counts.get(name) or row(name) for name in names}
    args.printer.add(models=[{"model": name, **entry} for name, entry in found.items()])
    args.printer.table([_cells(name, entry) for name, entry in found.items()], _COUNTED)
    return 0


_COUNTED = ("input", "parameters", "MACs", "stated")


def _cells(name: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """Return the table row of :func:`row`."""
    stated = entry["stated"]
    return {
        "model": name,
        "input": "x".join(map(str, entry["input"])),
        "parameters": f"{entry['parameters'] / 1e6:.2f}M",
        "MACs": f"{entry['macs'] / 1e9:.3f}G",
        "stated": f"{stated['parameters']} / {stated['macs']}" if stated else "",
        "by": stated["source"] if stated else "",
    }


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


class _Row(NamedTuple):
    """A cited network next to its measured counts."""

    entry: dict[str, Any]
    """Fields of the citation, in which ``cited`` and ``measured`` hold both counts; None for those that are unknown."""
    cells: dict[str, str]


class _Comparison(NamedTuple):
    rows: list[_Row]
    right: tuple[str, ...]
    """Right-aligned columns."""
    caption: str


def _row(cited: Any, cost: Any, **before: str) -> _Row:
    """Return a row whose first cells are ``before``, and then both counts."""
    measured = cost and {"parameters": cost.parameters, "macs": cost.macs}
    cells = {
        **before,
        "parameters (M)": _both(cited.parameters, cost and cost.parameters / 1e6),
        "MACs (G)": _both(cited.macs, cost and cost.macs / 1e9),
    }
    counts = {"parameters": round(cited.parameters * 1e6) or None, "macs": round(cited.macs * 1e9) or None}
    fields = {name: value for name, value in cited._asdict().items() if name not in counts}
    return _Row({**fields, "cited": counts, "measured": measured}, cells)


def _cited(rows: Sequence[Any], pattern: str | None, none: str) -> list[Any]:
    """Return the rows whose network matches a glob; raises ValueError with the text ``none`` if there are none."""
    found = [row for row in rows if pattern is None or fnmatch.fnmatchcase(row.name, pattern)]
    if not found:
        raise ValueError(f"no {none} {pattern!r} in timm's registry.")
    return found


def _compare_imagenet(pattern: str | None) -> _Comparison:
    import timm

    from widefield.models.comparison import CITED

    rows = []
    for row in _cited(CITED, pattern, "network of the slides' table is called"):
        cost = None
        if row.name:
            model = _merged(_on_meta(partial(timm.create_model, row.name)), row.name)
            cost = _measured(model, (3, row.size, row.size))
        title = row.architecture + (f" ({row.note})" if row.note else "")
        found = _row(row, cost, architecture=title, date=row.date, type=row.kind, size=str(row.size))
        rows.append(found._replace(cells={**found.cells, "top-1": f"{row.top1:g}", "model": row.name}))
    caption = f"{_CAPTION} SLaK is cited with 40 % of its weights removed, and measured dense."
    return _Comparison(rows, ("type", "size", "parameters (M)", "MACs (G)", "top-1"), caption)


def _compare_segmentation(pattern: str | None) -> _Comparison:
    from widefield import dense
    from widefield.models.comparison_segmentation import CITED_SEGMENTERS, CLASSES

    rows = []
    for row in _cited(CITED_SEGMENTERS, pattern, "segmentation model of the tables has a backbone"):
        build = partial(getattr(dense, row.method), row.name, CLASSES[row.data], **row.args)
        model = _on_meta(build)
        model.backbone = _merged(model.backbone, row.name)
        cost = _measured(model, (3, *row.size))
        size = "x".join(map(str, row.size))
        found = _row(row, cost, architecture=row.architecture, method=row.method, data=row.data, size=size)
        rows.append(found._replace(cells={**found.cells, "mIoU": row.miou, "source": row.source, "backbone": row.name}))
    caption = f"{_CAPTION} parameters include the auxiliary head, MACs do not. mIoU: one scale / several scales."
    return _Comparison(rows, ("size", "parameters (M)", "MACs (G)", "mIoU"), caption)


def _compare_detection(pattern: str | None) -> _Comparison:
    from widefield import dense
    from widefield.dense.detector_cost import FixedRoIs
    from widefield.models.comparison_detection import CITED_DETECTORS, CLASSES, METHODS, SIZE

    rows = []
    for row in _cited(CITED_DETECTORS, pattern, "detector of the tables has a backbone"):
        method = METHODS[row.method]
        model = _on_meta(partial(getattr(dense, method.kind), row.name, CLASSES, **method.args, **row.args))
        model.backbone = _merged(model.backbone, row.name)
        cost = _measured(FixedRoIs(model), (3, *SIZE))
        found = _row(row, cost, architecture=row.architecture, method=row.method, schedule=row.schedule)
        rows.append(found._replace(cells={**found.cells, "AP": row.ap, "source": row.source, "backbone": row.name}))
    caption = (
        f"{_CAPTION} MACs are of an image of {SIZE[1]}x{SIZE[0]} pixels, 1000 RoIs in each box head and 100 in each "
        "mask head. AP: boxes / masks."
    )
    return _Comparison(rows, ("parameters (M)", "MACs (G)", "AP"), caption)


def _compare_poses(pattern: str | None) -> _Comparison:
    from widefield import dense
    from widefield.models.comparison_pose import CITED_POSES, KEYPOINTS

    rows = []
    for row in _cited(CITED_POSES, pattern, "pose model of the tables has a backbone"):
        model = _on_meta(partial(dense.HeatmapPose, row.name, KEYPOINTS, **row.args))
        model.backbone = _merged(model.backbone, row.name)
        cost = _measured(model, (3, *row.size))
        found = _row(row, cost, architecture=row.architecture, crop="x".join(map(str, row.size)))
        rows.append(found._replace(cells={**found.cells, "AP": row.ap, "source": row.source, "backbone": row.name}))
    caption = f"{_CAPTION} MACs are of one crop, without the flip test. AP: percent on COCO's validation images."
    return _Comparison(rows, ("crop", "parameters (M)", "MACs (G)", "AP"), caption)


_CAPTION = "cited / measured; * differs by more than 1 %. Ours are measured in their merged form;"


def _both(cited: float, measured: float | None) -> str:
    """Return both counts and a mark; 0 stands for a count that the source does not state."""
    if measured is None:
        return f"{cited:g} / -  "
    mark = "*" if cited and abs(measured - cited) > 0.01 * cited else " "
    return f"{cited:g} / {measured:.4g} {mark}" if cited else f"- / {measured:.4g} {mark}"
