"""Small detection sets in published layouts, with objects of random outlines; sizes of images differ."""

import copy
import json
import math

import numpy as np
from hypothesis import strategies as st
from PIL import Image

CLASSES = ("person", "bicycle", "car")
IDS = (1, 2, 44)  # of the categories, with a gap as in COCO


def write_image(path, height, width, rng):
    """Write an image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def polygon(rng, height, width):
    """Return the corners of a star around a random center, inside the image, rounded as COCO rounds them."""
    reach = rng.uniform(4, min(height, width) / 2 - 1)
    cx, cy = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
    radii = rng.uniform(0.5, 1, len(angles)) * reach
    corners = np.stack([cx + radii * np.cos(angles), cy + radii * np.sin(angles)], 1)
    return np.round(corners, 2).reshape(-1).tolist()


def object_of(rng, identity, image, height, width):
    """Return an annotation with a polygon, and its box and area as COCO gives them."""
    corners = polygon(rng, height, width)
    x, y = corners[0::2], corners[1::2]
    box = [min(x), min(y), round(max(x) - min(x), 2), round(max(y) - min(y), 2)]
    area = 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    return {
        "id": identity,
        "image_id": image,
        "category_id": int(rng.choice(IDS)),
        "bbox": box,
        "area": float(area) + 1.0,
        "iscrowd": 0,
        "segmentation": [corners],
    }


def crowd_of(rng, identity, image, height, width):
    """Return a crowd region with run lengths."""
    mask = np.zeros((height, width), np.uint8)
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
    mask[top : top + height // 3, left : left + width // 3] = rng.random((height // 3, width // 3)) < 0.8
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()
    return {
        "id": identity,
        "image_id": image,
        "category_id": IDS[0],
        "bbox": [int(left), int(top), width // 3, height // 3],
        "area": int(mask.sum()),
        "iscrowd": 1,
        "segmentation": {"size": [height, width], "counts": counts if flat[0] == 0 else [0, *counts]},
    }


def coco_content(rng, count=4, objects=3, first=1, folder=""):
    """Return the content of a file of annotations; the last image has no objects, the first one a crowd region."""
    images, annotations = [], []
    for number in range(count):
        identity = first + 7 * number
        height, width = int(rng.integers(40, 70)), int(rng.integers(40, 90))
        images.append({"id": identity, "file_name": f"{folder}{identity:012}.png", "height": height, "width": width})
        if number == count - 1:
            continue
        for _ in range(objects):
            annotations.append(object_of(rng, len(annotations) + 100, identity, height, width))
        if number == 0:
            annotations.append(crowd_of(rng, len(annotations) + 100, identity, height, width))
    order = rng.permutation(len(annotations))
    categories = [{"id": i, "name": name} for i, name in zip(IDS, CLASSES, strict=True)]
    return {"images": images, "annotations": [annotations[i] for i in order], "categories": categories}


def write_coco(root, counts=(4, 3), seed=0):
    """Write the layout of COCO 2017 and return {split: content of the file of annotations}."""
    rng = np.random.default_rng(seed)
    made = {}
    for split, count, first in zip(("train", "val"), counts, (1, 500), strict=True):
        made[split] = coco_content(rng, count, first=first)
        for image in made[split]["images"]:
            write_image(root / f"{split}2017" / image["file_name"], image["height"], image["width"], rng)
        write_json(root, split, made[split])
    return made


def write_json(root, split, content):
    """Write the file of annotations of a split and return its path."""
    path = root / f"annotations/instances_{split}2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


JUNK = st.one_of(
    st.sampled_from([None, math.nan, math.inf, -1, 0, 1e30, 10**400, True, "", "x", [], {}, [1, 2, 3, 4], -0.5, [[]]]),
    st.integers(-3, 200),
    st.floats(-1e3, 1e3),
)


@st.composite
def mutations(draw):
    """Return how to damage a file: what to do, where (numbers choose from what is there), and a value."""
    kind = draw(st.sampled_from(["replace", "delete", "repeat", "truncate"]))
    return kind, draw(st.lists(st.integers(0, 1000), min_size=1, max_size=6)), draw(JUNK)


def damaged(content, mutation):
    """Return the text of the file after a mutation."""
    kind, steps, value = mutation
    content = copy.deepcopy(content)
    if kind == "truncate":
        text = json.dumps(content)
        return text[: steps[0] * len(text) // 1001]
    inside, key = content, None
    for step in steps:
        here = inside if key is None else inside[key]
        if not isinstance(here, (dict, list)) or not here:
            break
        inside, key = here, (sorted(here)[step % len(here)] if isinstance(here, dict) else step % len(here))
    if kind == "replace":
        inside[key] = value
    elif kind == "delete":
        del inside[key]
    elif isinstance(inside, list):
        inside.append(copy.deepcopy(inside[key]))
    return json.dumps(content)
