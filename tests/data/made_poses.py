"""Small sets of people with key points in COCO's layout: crowd regions, unlabeled people, boxes of a detector."""

import json

from data.made_objects import write_image
from widefield.data import Skeleton

COCO = Skeleton.load("coco")


def person_of(rng, identity, image, height, width, labeled=17):
    """Return an annotation of a person inside the image, with some key points labeled."""
    w, h = rng.uniform(0.3, 0.6) * width, rng.uniform(0.4, 0.8) * height
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    keypoints = []
    for place in range(17):
        if place < labeled:
            x, y = left + rng.uniform(0.05, 0.95) * w, top + rng.uniform(0.05, 0.95) * h
            keypoints += [int(x), int(y), int(rng.integers(1, 3))]
        else:
            keypoints += [0, 0, 0]
    return {
        "id": identity,
        "image_id": image,
        "category_id": 1,
        "bbox": [round(value, 2) for value in (left, top, w, h)],
        "area": round(0.6 * w * h, 2),
        "iscrowd": 0,
        "num_keypoints": labeled,
        "keypoints": keypoints,
        "segmentation": [[1, 2, 3, 4, 5, 6]],
    }


def keypoint_content(rng, count=4, first=1):
    """Return the content of a file of annotations: the first image has a crowd region, the last one no people.

    The second image has a person without a labeled key point.
    """
    images, annotations = [], []
    for number in range(count):
        identity = first + 7 * number
        height, width = int(rng.integers(60, 90)), int(rng.integers(60, 110))
        images.append({"id": identity, "file_name": f"{identity:012}.png", "height": height, "width": width})
        if number == count - 1:
            continue
        for labeled in (17, 10, 3 if number != 1 else 0):
            annotations.append(person_of(rng, len(annotations) + 100, identity, height, width, labeled))
        if number == 0:
            crowd = person_of(rng, len(annotations) + 100, identity, height, width, 0)
            annotations.append({**crowd, "iscrowd": 1, "segmentation": {"size": [height, width], "counts": [1]}})
    links = [[first + 1, second + 1] for first, second in COCO.links]
    category = {"id": 1, "name": "person", "keypoints": list(COCO.names), "skeleton": links}
    order = rng.permutation(len(annotations))
    return {"images": images, "annotations": [annotations[i] for i in order], "categories": [category]}


def detections(rng, content, every=2):
    """Return boxes of a detector around the labeled people, moved a little; images alternate with none at all."""
    found = []
    ids = [image["id"] for image in content["images"]]
    for one in content["annotations"]:
        if ids.index(one["image_id"]) % every == 0:
            box = [round(value + float(rng.uniform(-3, 3)), 2) for value in one["bbox"]]
            score = round(float(rng.uniform(0.1, 1)), 3)
            found.append({"image_id": one["image_id"], "category_id": 1, "bbox": box, "score": score})
    return found


def write_keypoints(root, rng, counts=(4, 4)):
    """Write the layout of COCO 2017 with a file of boxes, and return {split: content of the file of annotations}."""
    made = {}
    for split, count, first in zip(("train", "val"), counts, (1, 500), strict=True):
        made[split] = keypoint_content(rng, count, first)
        for image in made[split]["images"]:
            write_image(root / f"{split}2017" / image["file_name"], image["height"], image["width"], rng)
        write_people(root, split, made[split])
    (root / "boxes.json").write_text(json.dumps(detections(rng, made["val"])))
    return made


def write_people(root, split, content):
    """Write the file of annotations of a split and return its path."""
    path = root / f"annotations/person_keypoints_{split}2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path
