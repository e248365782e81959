"""Small data sets of noise in published formats."""

import io
import json
import pickle
import struct
import tarfile

import numpy as np
from PIL import Image

from widefield.data._cifar_files import CIFAR10

CLASSES = ("cat", "dog", "eel")


def picture(rng, width=50, height=40, kind="png"):
    """Return the bytes of an image of noise."""
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def pictures(count, seed=0):
    """Return {class: [(file name, bytes)]}, ``count`` per class."""
    rng = np.random.default_rng(seed)
    kinds = ("png", "jpeg")
    return {
        name: [(f"{name}{i}.{kinds[i % 2]}", picture(rng, kind=kinds[i % 2])) for i in range(count)] for name in CLASSES
    }


def write_folder(root, split, found):
    for name, files in found.items():
        (root / split / name).mkdir(parents=True)
        for file, content in files:
            (root / split / name / file).write_bytes(content)


def write_tar(path, files, **options):
    """Write a tar file of [(name, bytes)]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.pop("mode", "w"), **options) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def tar_bytes(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def webdataset(found, label="cls"):
    """Return [(name, bytes)] in webdataset's layout; ``label`` is the extension of the label files."""
    members = []
    for index, name in enumerate(found):
        text = str(index) if label == "cls" else json.dumps({"label": index, "filename": name})
        for file, content in found[name]:
            members += [(file, content), (f"{file.partition('.')[0]}.{label}", text.encode())]
    return members


def write_cifar(root, files=CIFAR10, version="binary", archive=False, seed=0):
    """Write a version of CIFAR of noise; return {split: (pixels (N, 3072), labels (N,))}."""
    layout = files.versions[version]
    rng = np.random.default_rng(seed)
    names = [f"class_{i}" for i in range(files.classes)]
    binary = version == "binary"
    text = "".join(f"{name}\n" for name in names) + "\n"
    written = {layout.names: text.encode() if binary else python2_pickle({files.names_key: names})}
    made = {}
    for split, parts in layout.splits.items():
        each = files.counts[split]
        total = each * len(parts)
        pixels = np.frombuffer(rng.bytes(total * 3072), np.uint8).reshape(total, 3072)
        labels = rng.permutation(total) % files.classes
        made[split] = pixels, labels
        for part, name in enumerate(parts):
            span = slice(part * each, (part + 1) * each)
            coarse = [labels[span] // 5] * (files.label_bytes - 1)
            columns = np.stack([*coarse, labels[span]], axis=1).astype(np.uint8)
            written[name] = (
                np.concatenate([columns, pixels[span]], axis=1).tobytes()
                if binary
                else python2_pickle({"data": pixels[span], files.label_key: labels[span].tolist()})
            )
    if archive:
        members = [(f"{layout.folder}/{name}", content) for name, content in written.items()]
        write_tar(root / layout.archive, members, mode="w:gz")
    else:
        (root / layout.folder).mkdir(parents=True)
        for name, content in written.items():
            (root / layout.folder / name).write_bytes(content)
    return made


class _Python2Pickler(pickle._Pickler):
    """Pickles bytes like Python 2, and numpy's functions under their old names."""

    def _text(self, content):
        encoded = content if isinstance(content, bytes) else content.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(encoded)) + encoded)
        self.memoize(content)

    dispatch = pickle._Pickler.dispatch | {bytes: _text, str: _text}


def python2_pickle(content):
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_parquet(root, split, found, image_key="image", label_key="label", classes=CLASSES, labels=None):
    """Write a split of a Hugging Face data set; without class names, labels are plain values."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    root.mkdir(parents=True, exist_ok=True)
    rows = [(i, {"bytes": content, "path": file}) for i, name in enumerate(found) for file, content in found[name]]
    labels = [label for label, _ in rows] if labels is None else labels
    kind = datasets.ClassLabel(names=list(classes)) if classes else datasets.Value(pyarrow.array(labels).type.__str__())
    schema = datasets.Features({image_key: datasets.Image(), label_key: kind}).arrow_schema
    table = pyarrow.table({image_key: [image for _, image in rows], label_key: labels}, schema=schema)
    pyarrow.parquet.write_table(table, root / f"{split}.parquet")
