"""Read and write checkpoint files of OpenMMLab's libraries, without their classes and without running their code."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeGuard

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from widefield import _checks, _files
from widefield.dense._pose_config import is_involution

_NESTS = ("state_dict", "model", "module", "net")
"""Names under which training scripts store the weights, best first."""

_WRAPPERS = ("module.", "_orig_mod.", "state_dict.")
"""Prefixes that wrappers add to every key: data parallelism, ``torch.compile``, nested saving."""

_LEGACY_PICKLES = 4
"""A file of ``torch.save`` before version 1.6 starts with three small pickles and then the object."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        path: the file.
        weights: key -> tensor, on the CPU, without wrappers' prefixes.
        skipped: keys of the file that are no weights of the model: copies of the moving average, and statistics of the
            preprocessing.
        classes: class names, if the file has them.
        palette: a color (red, green, blue) from 0 to 255 for each class, if the file has it.
        config: the text of the configuration that OpenMMLab's tools store, or an empty text.
        keypoints: names of key points in their order, and the one that each becomes in a mirrored image, if the file
            has them next to its configuration.
        converted: what was changed to get OpenMMLab's form, or None for nothing.
    """

    path: Path
    weights: dict[str, Tensor]
    skipped: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None
    config: str = ""
    converted: str | None = None
    keypoints: tuple[list[str], list[int] | None] | None = None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file of mmsegmentation, mmdetection or mmpose, of ``torch.save``, or in the safetensors format.

    Only tensors and plain values are unpickled. Objects of other classes, which OpenMMLab stores next to the weights,
    become empty placeholders: their code is neither imported nor run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no weights, or cannot be read in this way.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}.")
    content, info = _safetensors(path) if path.suffix == ".safetensors" else _unpickled(path)
    weights, skipped = _weights(path, content)
    classes, palette = _classes(info)
    texts = [info[key] for key in ("config", "cfg") if isinstance(info.get(key), str)]  # mmdet 2.x, 3.x
    return Checkpoint(path, weights, skipped, classes, palette, "\n".join(texts), keypoints=_keypoints(info))


def write_checkpoint(path: str | Path, weights: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write weights atomically: in the safetensors format if the name ends so, otherwise as OpenMMLab does.

    Args:
        path: the file.
        weights: key -> tensor.
        meta: plain values to store with them.

    Raises:
        OSError: the place cannot be written.
    """
    path = Path(path).expanduser()
    _files.check_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    own = OrderedDict((key, value.detach().cpu().contiguous().clone()) for key, value in weights.items())
    if path.suffix == ".safetensors":
        _files.write_whole(path, safetensors.torch.save(own, {"format": "pt", "meta": json.dumps(meta)}))
        return
    buffer = io.BytesIO()
    torch.save({"meta": dict(meta), "state_dict": own}, buffer)
    _files.write_whole(path, buffer.getvalue())


# Reading


def _safetensors(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {}).get("meta", "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, info  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _unpickled(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, AttributeError, KeyError, TypeError):
        content = _with_placeholders(path)
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        _unreadable(path, error)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no weights: it holds a {type(content).__name__}, not a dictionary.")
    info = content.get("meta")
    return dict(content), info if isinstance(info, Mapping) else {}


class _Placeholder(list):  # type: ignore[type-arg]
    """The stand-in for an object of any class. It ignores its state. A list, since pickles may append to objects."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


class _DictPlaceholder:
    """The stand-in for a subclass of dict, which keeps its items: the restricted unpickler fills only plain ones."""

    def __new__(cls, *args: object, **kwargs: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


def _with_placeholders(path: Path) -> Any:
    """Load a file in which every unknown class is replaced by a placeholder."""
    known = {entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"
             for entry in torch.serialization.get_safe_globals()}  # fmt: skip
    try:
        names = set(_globals(path)) - known
        stand_ins = [(_DictPlaceholder if name.lower().endswith("dict") else _Placeholder, name) for name in names]
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the content of a file decides what is raised
        _unreadable(path, error)


def _globals(path: Path) -> Iterator[str]:
    """Yield the names of the classes and functions that the pickles in a file refer to; runs nothing."""
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for member in archive.namelist():
                    if member.endswith("/data.pkl"):
                        yield from _names(io.BytesIO(archive.read(member)))
            return
        file.seek(0)
        for _ in range(_LEGACY_PICKLES):
            yield from _names(file)


def _names(file: BinaryIO) -> Iterator[str]:
    for code, argument, _ in pickletools.genops(file):
        if code.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            yield f"{ {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}.get(module, module) }.{name}"


def _unreadable(path: Path, error: Exception) -> NoReturn:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    raise ValueError(
        f"{path} cannot be read without running code that it names: {reason} If you trust the file, extract its "
        "weights once: torch.save({'state_dict': torch.load(path, weights_only=False)['state_dict']}, new_path)."
    ) from error


def _weights(path: Path, content: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    for nest in (*_NESTS, *_NESTS):  # twice: {"state_dict": {"model": ...}}
        inner = content.get(nest)
        if isinstance(inner, Mapping):
            content = inner
    state = {str(key): value for key, value in content.items()}
    while state and (wrapper := next((w for w in _WRAPPERS if all(key.startswith(w) for key in state)), None)):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    skipped = tuple(key for key in state if _is_no_weight(key))
    weights = {key: value for key, value in state.items() if key not in skipped}
    wrong = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if wrong or not weights:
        first = f"{wrong[0]!r} is a {type(weights[wrong[0]]).__name__}" if wrong else "there are none"
        raise ValueError(f"{path} holds no weights: its entries must be tensors by name, and {first}.")
    return weights, skipped


def _is_no_weight(key: str) -> bool:
    """Return whether a key is a hook's copy of the moving average (mmcv replaces dots), or of the preprocessing."""
    return (key.startswith("ema_") and "." not in key) or key.startswith("data_preprocessor.")


def _classes(info: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, tuple[tuple[int, int, int], ...] | None]:
    """Return class names and palette, from mmseg 1.x (``dataset_meta``) or 0.x (``CLASSES``)."""
    nested = info.get("dataset_meta")
    found = {**info, **(nested if isinstance(nested, Mapping) else {})}
    names, colors = (found.get(key) or found.get(key.upper()) for key in ("classes", "palette"))
    classes = tuple(names) if _is_list(names) and all(isinstance(name, str) for name in names) else None
    palette = tuple((c[0], c[1], c[2]) for c in colors) if _is_list(colors) and all(map(_is_color, colors)) else None
    return classes, palette


def _keypoints(info: Mapping[str, Any]) -> tuple[list[str], list[int] | None] | None:
    """Return names of key points and their mirrored ones, from ``dataset_meta`` of mmpose 1.x."""
    nested = info.get("dataset_meta")
    names = nested.get("keypoint_id2name") if isinstance(nested, Mapping) else None
    if not isinstance(names, Mapping):
        return None
    by_number = {int(key): str(name) for key, name in names.items() if str(key).isdecimal()}
    ordered = [by_number[key] for key in sorted(by_number)]
    if sorted(by_number) != list(range(len(names))) or len(set(ordered)) < len(names):
        return None
    swapped = nested.get("flip_indices") if isinstance(nested, Mapping) else None
    usable = _is_list(swapped) and len(swapped) == len(names) and is_involution(swapped)
    return ordered, list(swapped) if usable and swapped is not None else None


def _is_color(value: object) -> bool:
    return _is_list(value) and len(value) == 3 and all(isinstance(part, int) for part in value)


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple)) and not isinstance(value, _Placeholder)


def meta_of(
    classes: Sequence[str] | None = None, palette: Sequence[Sequence[int]] | None = None, count: int | None = None
) -> dict[str, Any]:
    """Return the ``meta`` of a file that both mmseg 0.x and 1.x read.

    Args:
        classes: class names.
        palette: a color of three integers from 0 to 255 for each class.
        count: the model's number of classes.

    Raises:
        TypeError, ValueError: names or colors of the wrong type or number.
    """
    meta: dict[str, list[Any]] = {}
    if classes is not None:
        if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
            raise TypeError(f"classes must be a sequence of names; got {classes!r}.")
        meta["classes"] = list(classes)
    if palette is not None:
        meta["palette"] = [_color(color) for color in palette]
    for name, value in meta.items():
        if count is not None and len(value) != count:
            raise ValueError(f"{name} must have one entry for each of the model's {count} classes; got {len(value)}.")
    return {"dataset_meta": meta, **{name.upper(): value for name, value in meta.items()}} if meta else {}


def _color(color: Sequence[int]) -> list[int]:
    if len(color) != 3:
        raise ValueError(f"every entry of palette must have three numbers; got {color!r}.")
    return [_checks.integer("every number of palette", int(value), minimum=0, maximum=255) for value in color]
