"""Small segmentation sets in published layouts; an image shows each class of its mask in one color, with noise.

Each ``write_*`` function writes a set and returns {split: [mask]}: what the set must read, in its order, uint8 (H, W)
with class indices and 255 for ignored pixels.
"""

import numpy as np
from PIL import Image

from widefield.data.cityscapes import published_values as city_values
from widefield.data.coco_stuff import published_values as coco_values
from widefield.data.segmentation import default_palette

COUNTS = {"train": 4, "val": 2}
CITIES = {"train": ("aachen", "bochum"), "val": ("lindau",)}


def draw(rng, height, width, classes, ignored=True):
    """Return a mask of rectangles of random classes on one of them, with a strip of ignored pixels."""
    mask = np.full((height, width), rng.integers(classes), dtype=np.uint8)
    for _ in range(5):
        top, left = rng.integers(height), rng.integers(width)
        mask[top : top + height // 2, left : left + width // 2] = rng.integers(classes)
    if ignored:
        mask[:, :2] = 255
    return mask


def write_image(path, mask, rng):
    """Write an image that shows each class in one color, with noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colors = np.array(default_palette(256))[mask]
    noisy = (colors + rng.integers(-20, 21, colors.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def write_labels(path, values, palette=None):
    """Write values as a gray PNG file, or with a palette as one of Pillow's mode P."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values)
    if palette is not None:
        picture = picture.convert("P") if picture.mode != "L" else picture
        picture.putpalette([value for color in palette for value in color])
    picture.save(path)


def write_all(rng, classes, paths, to_values, palette=None, size=(48, 64)):
    """Write a pair for each (image, label) in ``paths`` and return their masks; sizes differ slightly."""
    masks = []
    for number, (image, label) in enumerate(paths):
        mask = draw(rng, size[0] + 2 * number, size[1] + number, classes)
        write_image(image, mask, rng)
        write_labels(label, to_values[mask], palette)
        masks.append(mask)
    return masks


def _table(values):
    """Return class -> value in the files as an array of 256, from value -> class; 255 takes the least ignored value."""
    table = np.zeros(256, dtype=np.uint8)
    for value, index in sorted(values.items(), reverse=True):
        table[index] = value
    return table


def write_ade20k(root, counts=COUNTS, classes=150, seed=0, size=(48, 64)):
    """Write ``ADEChallengeData2016``: 0 means no class, 1 to 150 the classes."""
    rng, table = np.random.default_rng(seed), np.roll(np.arange(256, dtype=np.uint8), -1)
    table[255] = 0
    made = {}
    for split, part, short in (("train", "training", "train"), ("val", "validation", "val")):
        stems = [f"ADE_{short}_{number:08}" for number in range(1, counts[split] + 1)]
        paths = [(root / f"images/{part}/{s}.jpg", root / f"annotations/{part}/{s}.png") for s in stems]
        made[split] = write_all(rng, classes, paths, table, size=size)
    (root / "objectInfo150.txt").write_text("Idx\tRatio\n")
    return made


def write_cityscapes(root, counts=COUNTS, classes=19, seed=0, size=(48, 96), train_ids=False):
    """Write ``leftImg8bit`` and ``gtFine`` with all files of the archives; ``train_ids`` adds converted labels."""
    rng, ids = np.random.default_rng(seed), _table(city_values())
    made = {}
    for split, cities in CITIES.items():
        frames = [(cities[i * len(cities) // counts[split]], i) for i in range(counts[split])]
        stems = [f"{city}/{city}_{number:06}_000019" for city, number in frames]
        images = [root / f"leftImg8bit/{split}/{stem}_leftImg8bit.png" for stem in stems]
        labels = [root / f"gtFine/{split}/{stem}_gtFine_labelIds.png" for stem in stems]
        made[split] = write_all(rng, classes, list(zip(images, labels, strict=True)), ids, size=size)
        for label, mask in zip(labels, made[split], strict=True):
            write_labels(label.with_name(label.name.replace("labelIds", "instanceIds")), mask.astype(np.uint16) * 1000)
            write_image(label.with_name(label.name.replace("labelIds", "color")), mask, rng)
            label.with_name(label.name.replace("labelIds.png", "polygons.json")).write_text("{}")
            if train_ids:
                write_labels(label.with_name(label.name.replace("labelIds", "labelTrainIds")), mask)
    return made


def write_voc(root, counts=COUNTS, classes=21, seed=0, size=(48, 64), augmented=0):
    """Write ``VOC2012`` with palette labels; ``augmented`` images of SBD have gray labels and a list of their own."""
    rng = np.random.default_rng(seed)
    made = {}
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for split, year in (("train", 2007), ("val", 2011)):
        stems = [f"{year}_{number:06}" for number in range(counts[split])]
        paths = [(root / f"JPEGImages/{s}.jpg", root / f"SegmentationClass/{s}.png") for s in stems]
        made[split] = write_all(rng, classes, paths, np.arange(256, dtype=np.uint8), default_palette(256), size)
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{s}\n" for s in stems))
    if augmented:
        stems = [f"2008_{number:06}" for number in range(augmented)]
        paths = [(root / f"JPEGImages/{s}.jpg", root / f"SegmentationClassAug/{s}.png") for s in stems]
        made["train"] += write_all(rng, classes, paths, np.arange(256, dtype=np.uint8), size=size)
        (root / "ImageSets/Segmentation/aug.txt").write_text("".join(f"{s}\n" for s in stems))
    (root / "JPEGImages/2012_000001.jpg").write_bytes((root / "JPEGImages/2007_000000.jpg").read_bytes())
    return made


def write_coco_stuff(root, counts=COUNTS, classes=171, seed=0, size=(48, 64), converted=False):
    """Write ``images`` and ``annotations`` of COCO-Stuff 164k, with the published or with converted values."""
    rng = np.random.default_rng(seed)
    table = np.arange(256, dtype=np.uint8) if converted else _table(coco_values())
    made = {}
    for split, first in (("train", 9), ("val", 139)):
        stems = [f"{first + number:012}" for number in range(counts[split])]
        ending = "_labelTrainIds" if converted else ""
        paths = [
            (root / f"images/{split}2017/{s}.jpg", root / f"annotations/{split}2017/{s}{ending}.png") for s in stems
        ]
        made[split] = write_all(rng, classes, paths, table, size=size)
    return made


def write_masks(root, counts=COUNTS, classes=3, seed=0, size=(48, 64)):
    """Write ``images/SPLIT`` and ``masks/SPLIT`` with the class at each pixel."""
    rng = np.random.default_rng(seed)
    made = {}
    for split in ("train", "val"):
        names = [f"{number % 2}/{split}{number}" for number in range(counts[split])]
        names.sort()
        paths = [(root / f"images/{split}/{n}.jpg", root / f"masks/{split}/{n}.png") for n in names]
        made[split] = write_all(rng, classes, paths, np.arange(256, dtype=np.uint8), size=size)
    return made
