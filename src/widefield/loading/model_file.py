"""Read and write files of models: weights in safetensors, and what they belong to as JSON in the same file.

The JSON is the entry ``widefield`` of the file's metadata::

    format, widefield   version of the format, and of widefield
    name                of the model
    history             origin (network and arguments) and the steps since: conversions, merged and cropped kernels
    subject             task, size, mean and std of images, names of classes, recipe of the run
    trained             checkpoint and metrics of the run, or null
    license, notes      from the author
    channels_last       names of the tensors that were stored in this memory format
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_model
from torch import nn

from widefield import _history
from widefield.loading.rebuilding import differences, late_rules, rebuild, tensors_of
from widefield.surgery.replay import replay
from widefield.train.checkpoint import system_errors

FORMAT = 1
"""Version of the format that is written, and the latest that is read."""
KEY = "widefield"
"""Entry of the metadata, and of ``config.json`` in a folder."""
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
"""Files of a folder, as the Hugging Face Hub and timm have them."""
ENDING = ".safetensors"
HUB, LOCAL = ("hf-hub:", "hf_hub:"), "local-dir:"
"""timm's prefixes of models on the Hugging Face Hub and in folders."""


class NoModelError(ValueError):
    """A file or folder without the description that `widefield.save` writes."""


def write(path: Path, model: nn.Module, content: Mapping[str, Any]) -> None:
    """Write the file of a model; it appears only if the model that is read back from it is the same.

    Args:
        path: of the file.
        model: in any mode, on any device.
        content: everything but ``history`` and ``channels_last``, in JSON types.

    Raises:
        ValueError: the model cannot be rebuilt from its history; the message names the first differences and the mend.
        OSError: the file cannot be written.
    """
    if any(tensor.is_meta for _, tensor in tensors_of(model)):
        raise ValueError(f"{type(model).__name__} is on the meta device and holds no numbers: load its weights first.")
    history = _refuse_unknown(model, _history.described(model))
    wide = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    ]
    _refuse_objects(model, history)
    twin = _rebuilt(model, history)
    text = json.dumps({**content, "history": history, "channels_last": wide}, ensure_ascii=False, allow_nan=False)
    handle, name = tempfile.mkstemp(suffix=ENDING, prefix=".unfinished-", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        with system_errors():
            save_model(model, str(part), metadata={"format": "pt", KEY: text})
        _fill(twin, part, wide)
        _refuse_differences(model, twin)
        part.chmod(0o644)  # mkstemp makes files private to their owner
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def refuse_wrapper(model: nn.Module) -> None:
    """Raise ValueError for what torch.compile and data parallel training make of a model."""
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner = "_orig_mod" if "_orig_mod" in model._modules else "module" if parallel else None
    if inner is not None:
        raise ValueError(f"{type(model).__name__} wraps another model: save its .{inner}.")


def _refuse_objects(model: nn.Module, history: Mapping[str, Any]) -> None:
    try:
        json.dumps(history, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be saved: JSON cannot hold one of its arguments ({error}). Save it with "
            "args={...}, the arguments of timm.create_model as numbers, words and lists."
        ) from error


def _refuse_unknown(model: nn.Module, history: dict[str, Any] | None) -> dict[str, Any]:
    """Return the history of a model; raises ValueError if it is not known in full."""
    kind = type(model).__name__
    if history is None:
        raise ValueError(
            f"it is not known how to build this {kind} again: it is neither a network of timm nor a model of "
            "widefield. For a model of torchvision, build it with widefield.loading.load('torchvision:NAME').model. A "
            "class of your own can be registered in timm (timm.models.register_model); else save its state_dict."
        )
    origin, steps = history["origin"], history["steps"]
    reasons = [entry["why"] for entry in (origin, *steps) if _history.UNKNOWN in (entry.get("kind"), entry.get("do"))]
    if reasons:
        raise ValueError(
            f"this {kind} cannot be built again in another process: {reasons[0]}. Use names and plain values, or save "
            "its state_dict and the code that builds it."
        )
    return history


def _rebuilt(model: nn.Module, history: dict[str, Any]) -> nn.Module:
    """Return a model of the same structure, made from its history, to which settings of now are added.

    Raises ValueError if it differs.
    """
    try:
        twin = rebuild(json.loads(json.dumps(history)))  # as it will be read
        late = late_rules(model, twin)
        history["steps"] += late
        twin = replay(twin, late)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"this {type(model).__name__} cannot be built again from its history: {error}{_MEND}"
        ) from error
    _refuse(model, list(differences(model, twin)))
    return twin


def _refuse_differences(model: nn.Module, twin: nn.Module) -> None:
    theirs = dict(tensors_of(twin))
    changed = [name for name, tensor in tensors_of(model) if _apart(tensor, theirs[name])]
    _refuse(model, [f"{name} has other values when read back" for name in changed])


def _refuse(model: nn.Module, found: list[str]) -> None:
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"this {type(model).__name__} is not what its history says, so that its file could not be loaded: "
            f"{'; '.join(found[:3])}{more}.{_MEND}"
        )


_MEND = (
    " Change models with the functions of widefield, which note what they do, and the whole model rather than one of "
    "its layers. If timm.create_model got arguments that are not known, give them: args={...}."
)


def _apart(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors differ in a bit, on any devices."""
    if first.dtype != second.dtype:
        return True
    bits = [tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in (first, second)]
    return not torch.equal(*bits)


def read_content(path: Path) -> dict[str, Any]:
    """Return the JSON of a model's file.

    Raises:
        NoModelError: a ValueError, the file holds weights alone, or is not a safetensors file.
        ValueError: it is of a later version of widefield.
        OSError: it cannot be read.
    """
    try:
        with system_errors(), safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except SafetensorError as error:
        raise NoModelError(f"{path} is not a safetensors file, or is incomplete: {error}") from error
    if text is None:
        raise NoModelError(
            f"{path} holds weights alone, and not what they belong to: write the file with widefield.save, or build "
            "the network by its name and load them (checkpoint_path)."
        )
    content: dict[str, Any] = json.loads(text)
    check_format(content, str(path))
    return content


def check_format(content: Mapping[str, Any], source: str) -> None:
    """Raise ValueError if a description has a later format than this version reads."""
    if content.get("format", 0) > FORMAT:
        raise ValueError(
            f"{source} was written by widefield {content.get('widefield', '?')} in format {content['format']}, and "
            f"this version reads format {FORMAT}: update widefield (pip install -U widefield)."
        )


def read_model(path: Path, content: Mapping[str, Any]) -> nn.Module:
    """Return the model of a file with its weights, on the CPU, in evaluation mode.

    Raises ValueError if the network cannot be built, or has other weights.
    """
    try:
        model = rebuild(content["history"])
    except (ValueError, TypeError, KeyError) as error:
        written = content.get("widefield", "?")
        raise ValueError(f"the model in {path}, written by widefield {written}, cannot be built: {error}") from error
    _fill(model, path, content.get("channels_last", ()))
    return model.eval()


def _fill(model: nn.Module, path: Path, channels_last: Iterable[str]) -> None:
    """Load the weights of a file into a model; raises ValueError if they do not fit.

    They are copied: tensors in the mapped file are not aligned as allocated ones are, and kernels for aligned memory
    round in another order.
    """
    tensors = load_file(str(path))
    with safe_open(str(path), framework="pt") as file:
        shared = {name: kept for name, kept in (file.metadata() or {}).items() if kept in tensors}
    own = model.state_dict(keep_vars=True)
    differing = own.keys() ^ (tensors.keys() | shared.keys())
    differing |= {name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape}
    if differing:
        raise ValueError(
            f"the weights in {path} do not fit the network that it describes: {', '.join(sorted(differing)[:3])}. The "
            "network has changed since the file was written."
        )
    wide = set(channels_last)
    for name, tensor in tensors.items():
        form = torch.channels_last if name in wide else torch.contiguous_format
        own[name].data = tensor.clone(memory_format=form)


def find_file(word: str) -> Path | None:
    """Return the file of a model that a word means; None if the word means something else.

    Args:
        word: a ``.safetensors`` file, a folder with ``model.safetensors``, ``local-dir:FOLDER``, or
            ``hf-hub:USER/NAME``, which is downloaded.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the download fails.
    """
    if word.startswith(HUB):
        return _downloaded(word.partition(":")[2])
    path = Path(word.removeprefix(LOCAL)).expanduser()
    if path.is_dir():
        return path / WEIGHTS if is_model_folder(path) else None
    if path.suffix == ENDING:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r}.")
        return path
    if word.startswith(LOCAL):
        raise FileNotFoundError(f"there is no folder {str(path)!r} with a model.")
    return None


def is_model_folder(path: Path) -> bool:
    """Return whether a folder holds a model that :func:`widefield.save` wrote, and is not that of a run."""
    if not (path / WEIGHTS).is_file() or not (path / CONFIG).is_file():
        return False
    try:
        return bool(KEY in json.loads((path / CONFIG).read_text(encoding="utf-8")))
    except ValueError:
        return False


def _downloaded(repository: str) -> Path | None:
    """Return the file of a model on the Hugging Face Hub; None if it is not one of widefield."""
    import huggingface_hub

    name, _, revision = repository.partition("@")
    config = Path(huggingface_hub.hf_hub_download(name, CONFIG, revision=revision or None))
    described = json.loads(config.read_text(encoding="utf-8")).get(KEY)
    if described is None:
        return None
    check_format(described, f"hf-hub:{repository}")
    return Path(huggingface_hub.hf_hub_download(name, WEIGHTS, revision=revision or None))
