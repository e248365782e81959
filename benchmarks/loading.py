"""Measure how fast batches of COCO and ADE20K are loaded, against torchvision's data sets and transforms.v2.

python benchmarks/loading.py [--loaders "COCO, boxes, train"] [--images 48] [--rounds 3] [--out DIR] [--suffix before]

Files are made up, with the forms and usual sizes of the data sets (`loading_files.py`). The reference is
``torchvision.datasets.CocoDetection`` in ``wrap_dataset_for_transforms_v2``, or a folder of images and label images;
its transforms.v2 do the same work as ours, and the batches of both have the same form. Ours and the reference take
turns, an epoch each, with 0, 1 and 2 worker processes.

- Images per second are the best of the rounds: others may use the machine.
- *CPU* is the time of all processes for an image; *main* is that of the main process with two workers. Workers are
  busy as long as the main process needs less than half of a worker's time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from loading_files import ADE_SIZE, COCO_SIZE, make_ade20k, make_coco
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2

from widefield import report
from widefield.benchmarks.record import Bar, bar, publish
from widefield.data import Ade20k, Coco, SampleSet
from widefield.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from widefield.tasks import Detection, Segmentation
from widefield.train.loaders import batches, shut_down, train_loader, val_loader

SCALE, ADE_SCALE, CROP = (1333, 800), (2048, 512), 512
BATCH = {"COCO": 2, "ADE20K": 4}
WORKERS = (0, 1, 2)

Loader = Callable[[int], DataLoader[Any]]
"""Makes a loader with so many workers."""


# The reference


def colors() -> list[Any]:
    to_float = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return [to_float, v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD))]


def reference_coco(root: Path, split: str, masks: bool) -> Dataset[Any]:
    flip = [v2.RandomHorizontalFlip(0.5), v2.SanitizeBoundingBoxes()] if split == "train" else []
    steps = [v2.ToImage(), v2.Resize(min(SCALE), max_size=max(SCALE), antialias=False), *flip, *colors()]
    keys = ["image_id", "boxes", "labels", *(["masks"] if masks else [])]
    file = str(root / f"annotations/instances_{split}2017.json")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports
        found = datasets.CocoDetection(str(root / f"{split}2017"), file, transforms=v2.Compose(steps))
    made: Dataset[Any] = datasets.wrap_dataset_for_transforms_v2(found, target_keys=keys)
    return made


def padded(samples: list[Any]) -> dict[str, Any]:
    """Return a batch of images that are padded to a multiple of 32, and a list of targets."""
    images = [image for image, _ in samples]
    height, width = (-(-max(image.shape[axis] for image in images) // 32) * 32 for axis in (1, 2))
    return {
        "image": torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images]),
        "target": [target for _, target in samples],
    }


class Folder(Dataset[Any]):
    """Images and label images, whose value 0 is ignored."""

    def __init__(self, root: Path, split: str) -> None:
        part = {"train": "training", "val": "validation"}[split]
        self.images = sorted((root / "images" / part).glob("*.jpg"))
        self.labels = sorted((root / "annotations" / part).glob("*.png"))
        short, long = min(ADE_SCALE), max(ADE_SCALE)
        if split == "train":
            geometry = [
                v2.RandomResize(short // 2, 2 * short, antialias=False),
                v2.RandomCrop(CROP, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: 255}),
                v2.RandomHorizontalFlip(0.5),
                v2.RandomPhotometricDistort(p=0.5),
            ]
        else:
            geometry = [v2.Resize(short, max_size=long, antialias=False)]
        self.split, self.transform = split, v2.Compose([*geometry, *colors()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = tv_tensors.Image(Image.open(self.images[index]).convert("RGB"))
        mask = tv_tensors.Mask(Image.open(self.labels[index]))
        if self.split == "train":
            image, mask = self.transform(image, mask)
        else:  # predictions are compared at the size of the file
            image = self.transform(image)
        labels = mask.as_subclass(Tensor).long()[0]
        return {"image": image.as_subclass(Tensor), "mask": torch.where(labels == 0, 255, labels - 1)}


def reference(dataset: Dataset[Any], split: str, batch: int, collate: Callable[[list[Any]], Any]) -> Loader:
    def make(workers: int) -> DataLoader[Any]:
        return DataLoader(
            dataset, batch, shuffle=split == "train", num_workers=workers, collate_fn=collate, drop_last=True,
            persistent_workers=workers > 0,
        )  # fmt: skip

    return make


def ours(dataset: SampleSet, task: Any, split: str, batch: int) -> Loader:
    def make(workers: int) -> DataLoader[Any]:
        if split == "train":
            return train_loader(dataset, task.collate, batch, workers, seed=0)
        return val_loader(dataset, task.collate, batch, workers)

    return make


def loaders(root: Path) -> dict[str, dict[str, Loader]]:
    """Return "DATA SET, CONTENT, SPLIT" -> ours and the reference."""
    found = {}
    for masks in (False, True):
        for split in ("train", "val"):
            data = Coco(split, root=root / "coco", masks=masks, scale=SCALE)
            task = Detection.for_data(data, model="mask_rcnn" if masks else "faster_rcnn")
            theirs = reference_coco(root / "coco", split, masks)
            found[f"COCO, {'masks' if masks else 'boxes'}, {split}"] = {
                "ours": ours(data, task, split, BATCH["COCO"]),
                "reference": reference(theirs, split, BATCH["COCO"], padded),
            }
    for split in ("train", "val"):
        ade = Ade20k(split, root=root / "ade20k", size=CROP, scale=ADE_SCALE)
        found[f"ADE20K, {split}"] = {
            "ours": ours(ade, Segmentation.for_data(ade), split, BATCH["ADE20K"]),
            "reference": reference(Folder(root / "ade20k", split), split, BATCH["ADE20K"], default_collate),
        }
    return found


# Measurement


def epoch(loader: Iterable[Any], images: int) -> tuple[float, float, float]:
    """Return images per second, and the CPU seconds of an image in all processes and in this one alone."""
    this = psutil.Process(os.getpid())

    def spent() -> tuple[float, float]:
        own = time.process_time()
        return own, sum(sum(child.cpu_times()[:2]) for child in this.children())

    own, children = spent()
    start, count = time.perf_counter(), 0
    for batch in batches(loader):
        count += len(batch["image"])
    seconds = time.perf_counter() - start
    if count != images:
        raise RuntimeError(f"the loader gave {count} of {images} images.")
    own_after, children_after = spent()
    return images / seconds, (own_after - own + children_after - children) / images, (own_after - own) / images


def row_of(name: str, candidates: dict[str, Loader], images: int, rounds: int) -> dict[str, Any]:
    row: dict[str, Any] = {"loader": name}
    for workers in WORKERS:
        made = {key: loader(workers) for key, loader in candidates.items()}
        found: dict[str, list[tuple[float, float, float]]] = {key: [] for key in made}
        for turn in range(-1 if workers else 0, rounds):  # the first epoch starts the workers
            for key, loader in made.items():
                measured = epoch(loader, images)
                if turn >= 0:
                    found[key].append(measured)
        for key, loader in made.items():
            if workers:
                shut_down(loader)
            rates, cpu, main = zip(*found[key], strict=True)
            row[f"{key}, {workers}"] = {
                "images_per_s": max(rates),
                "cpu_ms": 1e3 * statistics.median(cpu),
                "main_ms": 1e3 * statistics.median(main),
            }
    return row


def bars_of(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """Return the bars."""
    labeled = [{**row, "label": row["loader"]} for row in rows]
    return [
        bar(
            "CPU time to load an image, torchvision's reference / ours",
            labeled,
            lambda row: float(row["reference, 0"]["cpu_ms"] / row["ours, 0"]["cpu_ms"]),
            at_least=1,
        ),
        bar(
            "images/s of two workers, ours / torchvision's reference",
            labeled,
            lambda row: float(row["ours, 2"]["images_per_s"] / row["reference, 2"]["images_per_s"]),
            at_least=1,
        ),
    ]


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Return a row as text."""

    def rate(key: str) -> str:
        return " / ".join(f"{row[f'{key}, {workers}']['images_per_s']:.1f}" for workers in WORKERS)

    mine, theirs = row["ours, 0"], row["reference, 0"]
    return {
        "loader": row["loader"],
        "CPU, ms": f"{mine['cpu_ms']:.1f}",
        "reference's": f"{theirs['cpu_ms']:.1f}",
        "reference / ours": f"{theirs['cpu_ms'] / mine['cpu_ms']:.2f}",
        "images/s, 0 / 1 / 2 workers": rate("ours"),
        "reference's images/s": rate("reference"),
        "2 workers: CPU, main, ms": f"{row['ours, 2']['cpu_ms']:.1f}, {row['ours, 2']['main_ms']:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loaders", nargs="+", help="names of rows; default: all")
    parser.add_argument("--images", type=int, default=48, help="images of an epoch, a multiple of 4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--suffix", default="", help="added to the names of the files, such as 'before'")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_coco(root / "coco", args.images)
        make_ade20k(root / "ade20k", args.images)
        sizes = [
            sum(file.stat().st_size for file in place.iterdir()) / args.images / 1024
            for place in (
                root / "coco/train2017",
                root / "ade20k/images/training",
                root / "ade20k/annotations/training",
            )
        ]
        for name, candidates in loaders(root).items():
            if args.loaders is None or name in args.loaders:
                rows.append(row_of(name, candidates, args.images, args.rounds))
                print(" | ".join(shown(rows[-1]).values()), flush=True)
    table = report.markdown([shown(row) for row in rows])
    arguments = sys.argv[1:]
    if "--out" in arguments:
        place = arguments.index("--out")
        del arguments[place : place + 2]
    text = (
        f"COCO: images of {COCO_SIZE[1]}x{COCO_SIZE[0]}, JPEG files of {sizes[0]:.0f} KiB. ADE20K: {ADE_SIZE[1]}x"
        f"{ADE_SIZE[0]}, {sizes[1]:.0f} KiB, with PNG files of {sizes[2]:.0f} KiB. CPU time is of an image; a ratio "
        f"above 1 means that ours needs less.\n\n{table}"
    )
    stem = args.out / "_".join(filter(None, ("loading_cpu", args.suffix)))
    command = shlex.join(["python", "benchmarks/loading.py", *arguments])
    publish(stem, command, {"rows": rows}, text, bars=bars_of(rows), beside=("torchvision", "pillow"))


if __name__ == "__main__":
    main()
