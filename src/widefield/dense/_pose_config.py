"""Read the meaning of heatmaps in the configuration that OpenMMLab's tools store as text, without running it.

The text is Python or JSON: ``model = dict(type='TopDown', ...)`` or ``{"model": {"type": "TopDown", ...}}``. Fields of
mmpose 0.29 and 1.3 were read in its configurations.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from widefield.dense.heatmap_codec import HeatmapCodec
from widefield.dense.pose_convention import PoseConvention

_BLUR = 11
"""Side of the Gaussian before DARK, if a configuration does not state it."""

_NUMBER = r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"

_PAIRS = {"(": ")", "[": "]", "{": "}"}


def _start(name: str) -> str:
    """Return a regular expression for a field's name up to its value, in Python and JSON."""
    return rf"(?<!\w){name}['\"]?\s*[=:]\s*"


def _block(text: str, name: str) -> str:
    """Return the inside of the first dictionary of this name, or an empty text."""
    found = re.search(_start(name) + r"(?:dict\(\s*\{|dict\(|\{)", text)
    return "" if found is None else _inside(text, found.end())


def _inside(text: str, begin: int) -> str:
    """Return the text from ``begin`` to the bracket that closes it."""
    depth = 0
    for place in range(begin, len(text)):
        if text[place] in _PAIRS:
            depth += 1
        elif text[place] in _PAIRS.values():
            depth -= 1
            if depth < 0:
                return text[begin:place]
    return text[begin:]


def _outermost(text: str) -> str:
    """Return a text without what is in brackets."""
    while (shorter := re.sub(r"\([^()]*\)|\[[^][]*\]|\{[^{}]*\}", "", text)) != text:
        text = shorter
    return text


def _word(block: str, name: str) -> str | None:
    """Return the string or True, False of a field of a dictionary itself, not of those in it."""
    found = re.search(_start(name) + r"['\"]?(\w+)", _outermost(block))
    return found[1] if found else None


def _is_true(text: str, name: str) -> bool:
    return re.search(_start(name) + r"(?:True|true)\b", text) is not None


def _numbers(text: str, name: str) -> list[float]:
    """Return the numbers of a field: one, or those of a list."""
    found = re.search(_start(name) + rf"(?:(?:np\.)?array\(\s*)?(?:[\[(]([^][()]*)[\])]|({_NUMBER}))", text)
    values = [float(value) for value in re.findall(_NUMBER, found[1] or found[2] or "")] if found else []
    return values if all(map(math.isfinite, values)) else []


def _head(config: str) -> str:
    return _block(config, "keypoint_head") or _block(_block(config, "model"), "head")


def _coding(config: str) -> str:
    """Return the codec of mmpose 1.x, or an empty text."""
    return _block(_head(config), "decoder") or _block(config, "codec")


def head_type(config: str) -> str | None:
    """Return the name of the head's class, or None if it is not stated."""
    return _word(_head(config), "type")


def other_coding(config: str) -> str | None:
    """Return a name for heatmaps that no codec here reads, or None."""
    coding = _coding(config)
    kind = _word(coding, "type")
    if kind not in (None, "MSRAHeatmap", "UDPHeatmap"):
        return f"coded by {kind}"
    old = re.search(_start("target_type") + r"['\"]CombinedTarget", config)
    if old or _word(coding, "heatmap_type") == "combined":
        return "UDP's maps of offsets"
    if re.search(_start("encoding") + r"['\"]Megvii|" + _start("post_process") + r"['\"]megvii", config):
        return "coded by Megvii's rules"
    return None


def is_bgr(config: str) -> bool:
    """Return whether images have their channels in OpenCV's order."""
    preprocessor = _block(config, "data_preprocessor")
    if _numbers(preprocessor, "mean"):
        return not _is_true(preprocessor, "bgr_to_rgb")
    return re.search(_start("channel_order") + r"['\"]bgr", config) is not None


def convention(config: str) -> PoseConvention:
    """Return what a configuration says about images and heatmaps."""
    names, swapped = _keypoints(config)
    test = _block(_block(config, "model"), "test_cfg") or _block(config, "test_cfg")
    shift = True if _is_true(test, "shift_heatmap") else False if _is_true(test, "flip_test") else None
    mean, std = _normalization(config)
    return PoseConvention(names, swapped, _codec(config), shift, mean, std)


def written(convention: PoseConvention) -> str:
    """Return the part of a configuration of mmpose 1.x that states a convention, or an empty text."""
    lines, model = [], []
    codec = convention.codec
    if codec is not None:
        kind = "UDPHeatmap" if codec.kind == "udp" else "MSRAHeatmap"
        sizes = (f"{name}={(size[1], size[0])}" for name, size in
                 (("input_size", codec.image_size), ("heatmap_size", codec.heatmap_size)))  # fmt: skip
        dark = ", unbiased=True" if codec.kind == "unbiased" else ""
        coding = f"dict(type={kind!r}, {', '.join(sizes)}, sigma={codec.sigma}{dark}, blur_kernel_size={codec.blur})"
        lines.append(f"codec = {coding}")
        model.append("head=dict(type='HeatmapHead', decoder=codec)")
    if convention.mean is not None and convention.std is not None:
        mean, std = ([round(value * 255, 6) for value in values] for values in (convention.mean, convention.std))
        model.append(f"data_preprocessor=dict(type='PoseDataPreprocessor', mean={mean}, std={std}, bgr_to_rgb=True)")
    if convention.shift_heatmaps is not None:
        model.append(f"test_cfg=dict(flip_test=True, flip_mode='heatmap', shift_heatmap={convention.shift_heatmaps})")
    if model:
        lines.append(f"model = dict(type='TopdownPoseEstimator', {', '.join(model)})")
    return "\n".join(lines)


def _codec(config: str) -> HeatmapCodec | None:
    coding = _coding(config)
    if coding:
        kind = "unbiased" if _is_true(coding, "unbiased") else "msra"
        kind = "udp" if _word(coding, "type") == "UDPHeatmap" else kind
        sizes = _numbers(coding, "input_size"), _numbers(coding, "heatmap_size")
        sigma, blur = _numbers(coding, "sigma"), _numbers(coding, "blur_kernel_size")
    else:
        kind = _old_kind(config)
        data = _block(config, "data_cfg")
        sizes = _numbers(data, "image_size"), _numbers(data, "heatmap_size")
        target = re.search(r"['\"]TopDownGenerateTarget['\"]([^)}]*)", config)
        sigma, blur = _numbers(target[1] if target else "", "sigma"), _numbers(config, "modulate_kernel")
    if any(len(size) != 2 for size in sizes) or len(sigma) != 1:
        return None
    image, heatmap = ((int(height), int(width)) for width, height in sizes)
    with contextlib.suppress(ValueError, TypeError):
        return HeatmapCodec(image, heatmap, sigma[0], kind, int(blur[0]) if blur else _BLUR)
    return None


def _old_kind(config: str) -> str:
    """Return the kind of heatmaps that a configuration of mmpose 0.x states."""
    if _is_true(config, "use_udp") or re.search(_start("encoding") + r"['\"]UDP", config):
        return "udp"
    dark = re.search(_start("post_process") + r"['\"]unbiased", config)
    return "unbiased" if dark or _is_true(config, "unbiased_decoding") else "msra"


def _normalization(config: str) -> tuple[list[float] | None, list[float] | None]:
    """Return mean and std of values from 0 to 1."""
    preprocessor = _block(config, "data_preprocessor")
    old = re.search(r"['\"]NormalizeTensor['\"]([^)}]*)", config)
    text, scale = (preprocessor, 255.0) if preprocessor else (old[1] if old else "", 1.0)
    mean, std = ([value / scale for value in _numbers(text, name)] for name in ("mean", "std"))
    usable = len(mean) == len(std) == 3 and min(*mean, *std) >= 0
    return (mean, std) if usable else (None, None)


def _keypoints(config: str) -> tuple[list[str] | None, list[int] | None]:
    """Return the names of the key points in the order of the heatmaps, and the ones that they become when mirrored."""
    info = _block(config, "keypoint_info")
    entries = {}
    for entry in re.finditer(r"(\d+)['\"]?\s*:\s*(?:dict\(|\{)", info):
        inside = _inside(info, entry.end())
        name, swap = (re.search(_start(field) + r"['\"]([^'\"]*)['\"]", inside) for field in ("name", "swap"))
        if name is not None:
            entries[int(entry[1])] = (name[1], swap[1] if swap else "")
    return ordered(entries)


def ordered(entries: Mapping[int, tuple[str, str]]) -> tuple[list[str] | None, list[int] | None]:
    """Return names by their numbers, and the places of their mirrored ones; None for numbers that do not count from 0.

    Args:
        entries: number -> (name, name of the mirrored one or an empty text).
    """
    names = [entries[key][0] for key in sorted(entries)]
    if not names or sorted(entries) != list(range(len(names))) or len(set(names)) < len(names):
        return None, None
    places = {name: index for index, name in enumerate(names)}
    swapped = [places.get(entries[index][1], index) for index in range(len(names))]
    return names, swapped if is_involution(swapped) else None


def is_involution(swapped: Sequence[Any]) -> bool:
    """Return whether swapping twice changes nothing."""
    return all(
        isinstance(other, int) and 0 <= other < len(swapped) and swapped[other] == index
        for index, other in enumerate(swapped)
    )
