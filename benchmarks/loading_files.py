"""Files for loading.py: made-up photographs, objects and label images, of COCO's and ADE20K's forms and sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COCO_SIZE, ADE_SIZE = (480, 640), (512, 683)
OBJECTS, CORNERS = 7, 25
"""Objects of an image and corners of an object's polygon: about the means of COCO."""
COCO_CLASSES, ADE_CLASSES = 80, 150


def photograph(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return noise with the spectrum of photographs, 1 / f, some of which is common to all colors: (H, W, 3)."""
    rows, columns = np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None]
    amplitude = 1 / np.maximum(np.hypot(rows, columns), 1 / max(size))
    phases = rng.uniform(0, 2 * np.pi, (4, *amplitude.shape))
    planes = np.fft.irfft2(amplitude * np.exp(1j * phases), s=size)
    planes /= planes.std((1, 2), keepdims=True)
    colors = 118 + 45 * planes[:1] + 15 * planes[1:] + rng.normal(0, 2, (3, *size))
    return colors.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def objects(rng: np.random.Generator, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Return the entries of an image's objects, without ids."""
    found = []
    for _ in range(OBJECTS):
        half = np.exp(rng.uniform(np.log(8), np.log(150), 2))
        middle = half + rng.uniform(0, 1, 2) * (np.array(size[::-1]) - 2 * half)
        angle = np.sort(rng.uniform(0, 2 * np.pi, CORNERS))
        circle = np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(0.7, 1, (CORNERS, 1))
        corners = (middle + half * circle).round(2)
        low, high = corners.min(0), corners.max(0)
        found.append(
            {
                "category_id": int(rng.integers(COCO_CLASSES)) + 1,
                "bbox": [*low.tolist(), *(high - low).tolist()],
                "area": float((high - low).prod() * 0.7),
                "iscrowd": 0,
                "segmentation": [corners.ravel().tolist()],
            }
        )
    return found


def make_coco(root: Path, count: int) -> None:
    """Write ``count`` images of COCO's form below ``root``; both splits are the same."""
    rng = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    folder = root / "train2017"
    folder.mkdir(parents=True)
    for index in range(count):
        name = f"{index:012d}.jpg"
        Image.fromarray(photograph(rng, COCO_SIZE)).save(folder / name, quality=90)
        images.append({"id": index, "file_name": name, "height": COCO_SIZE[0], "width": COCO_SIZE[1]})
        for entry in objects(rng, COCO_SIZE):
            entries.append({**entry, "id": len(entries) + 1, "image_id": index})
    (root / "val2017").symlink_to(folder)
    (root / "annotations").mkdir()
    categories = [{"id": index + 1, "name": f"class {index}"} for index in range(COCO_CLASSES)]
    content = json.dumps({"images": images, "annotations": entries, "categories": categories})
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").write_text(content)


def make_ade20k(root: Path, count: int) -> None:
    """Write ``count`` images and label images of ADE20K's form below ``root``; both splits are the same."""
    rng = np.random.default_rng(1)
    for part, other in (("images", ".jpg"), ("annotations", ".png")):
        (root / part / "training").mkdir(parents=True)
        (root / part / "validation").symlink_to(root / part / "training")
        for index in range(count):
            path = root / part / "training" / f"ADE_{index:08d}{other}"
            if part == "images":
                Image.fromarray(photograph(rng, ADE_SIZE)).save(path, quality=90)
            else:
                Image.fromarray(labels(rng, ADE_SIZE)).save(path)


def labels(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the nearest of 30 points of 12 classes at each pixel, with a class of its own where two are as near."""
    points, classes = rng.uniform(0, 1, (30, 2)) * size, rng.integers(0, ADE_CLASSES + 1, 12)
    y, x = np.mgrid[: size[0], : size[1]]
    wave = 6 * np.sin(x / 9) + 6 * np.cos(y / 7)
    distances = (y + wave - points[:, 0, None, None]) ** 2 + (x + wave - points[:, 1, None, None]) ** 2
    found: NDArray[np.uint8] = classes.astype(np.uint8)[distances.argmin(0) % len(classes)]
    return found
