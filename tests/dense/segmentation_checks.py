"""Checks of the segmentation fixtures: decode heads and necks alone, and whole models."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dense.mmdet_configs import Settings, norm_of
from dense.rules import IGNORED, Differences, features, filled, images, labels, published_fill
from widefield import dense
from widefield._pixels import best_class
from widefield.dense.layers import resize
from widefield.tasks.pixel_losses import EPS, cross_entropy

Document = Mapping[str, Any]

REMARKS = ("fp32_max_abs_diff", "stated")
"""Fields without a value to compare."""

AUXILIARY_WEIGHT = 0.4
"""Factor of the loss of a head with the prefix ``auxiliary_head.``."""


# Heads


def _uper(config: dict[str, Any]) -> dense.DecodeHead:
    return dense.UPerHead(config.pop("in_channels"), pool_scales=config.pop("pool_scales", (1, 2, 3, 6)), **config)


def _fcn(config: dict[str, Any]) -> dense.DecodeHead:
    defaults = {"num_convs": 2, "concat_input": True}  # OpenMMLab's
    return dense.FCNHead(config.pop("in_channels"), **{**defaults, **config})


def _aspp(config: dict[str, Any]) -> dense.DecodeHead:
    return dense.DepthwiseSeparableASPPHead(config.pop("in_channels"), **config)


def _semantic_fpn(config: dict[str, Any]) -> dense.DecodeHead:
    return dense.FPNHead(config.pop("in_channels"), **config)


HEADS: Mapping[str, Callable[[dict[str, Any]], dense.DecodeHead]] = {
    "UPerHead": _uper,
    "FCNHead": _fcn,
    "DepthwiseSeparableASPPHead": _aspp,
    "FPNHead": _semantic_fpn,
}


NOT_BUILT = ("type", "loss_decode", "ignore_index", "input_transform", "sampler")
"""Entries of a head's configuration that are not arguments of the head; :func:`loss_options` reads them."""


def built_head(config: Mapping[str, Any]) -> tuple[dense.DecodeHead, Sequence[int]]:
    """Return the head of an OpenMMLab configuration, and which maps it takes (all of them if it takes one by index)."""
    given = {key: value for key, value in config.items() if key not in NOT_BUILT}
    given["dropout"] = max(given.pop("dropout_ratio", 0.1), 0)
    index = given.pop("in_index", -1)
    if not isinstance(index, int):
        return HEADS[config["type"]](given), index
    return HEADS[config["type"]]({**given, "in_index": index}), ()


def loss_options(config: Mapping[str, Any], prefix: str, differences: Differences) -> tuple[float, dict[str, Any]]:
    """Return the factor of a head's loss and the options of the cross-entropy, from an OpenMMLab configuration."""
    loss = {"loss_weight": AUXILIARY_WEIGHT if prefix == "auxiliary_head." else 1.0, **config.get("loss_decode", {})}
    known = {"loss_weight": loss["loss_weight"], "avg_non_ignore": loss.get("avg_non_ignore", False)}
    known |= {"class_weight": loss.get("class_weight"), "use_sigmoid": False, "type": "CrossEntropyLoss"}
    for name, value in loss.items():
        if known.get(name) != value:
            differences.lines.append(f"config.loss_decode: {name}={value!r} is unknown")
    for name, value in (("ignore_index", IGNORED), ("sampler", None)):
        if config.get(name, value) != value:
            differences.lines.append(f"config: {name}={config[name]!r} is unknown")
    return loss["loss_weight"], {"avg_non_ignore": known["avg_non_ignore"], "class_weights": known["class_weight"]}


def check_head(document: Document, differences: Differences) -> None:
    """Check a decode head: logits, features, losses, gradients, parameters."""
    config = document["config"]
    prefix = document.get("prefix") or next(iter(document["state_dict"])).split(".")[0] + "."
    head, taken = built_head(config)
    check_module(head, prefix, document, differences)
    loss = loss_options(config, prefix, differences)
    known = ("config", "params", "runs", "state_dict", "prefix", *REMARKS)
    differences.fields("the file", document, known)
    for number, run in enumerate(document["runs"]):
        _check_head_run(f"runs[{number}]", head, taken, run, loss, differences)


def _check_head_run(
    where: str,
    head: dense.DecodeHead,
    taken: Sequence[int],
    run: Document,
    loss: tuple[float, dict[str, Any]],
    differences: Differences,
) -> None:
    maps = [x.requires_grad_() for x in features(run["feature_shapes"])]
    given = [maps[index] for index in taken] if taken else maps
    logits = head(given)
    differences.summary(f"{where}.logits", logits, run["logits"])
    if "features_before_classifier" in run:
        # OpenMMLab's name for the ASPP head's map before it is joined with the finer one.
        aspp = isinstance(head, dense.DepthwiseSeparableASPPHead)
        before = head.pyramid(given[head.in_index]) if aspp else head.features(given)
        differences.summary(f"{where}.features_before_classifier", before, run["features_before_classifier"])
    if "input_grad_l2" in run:
        grads = torch.autograd.grad(logits.square().sum(), maps, allow_unused=True)
        norms = [None if grad is None else grad.norm().item() for grad in grads]
        differences.numbers(f"{where}.input_grad_l2", norms, run["input_grad_l2"])
    with torch.no_grad():
        _check_upsampled(where, logits, run, head, loss, differences)
    known = ("feature_shapes", "label_size", "logits", "upsampled_logits", "argmax_histogram", "losses",
             "ignored_fraction", "features_before_classifier", "input_grad_l2", *REMARKS)  # fmt: skip
    differences.fields(where, run, known)


def _check_upsampled(
    where: str,
    logits: Tensor,
    run: Document,
    head: dense.DecodeHead,
    loss: tuple[float, dict[str, Any]],
    differences: Differences,
) -> None:
    """Check logits at the size of the labels, and what follows from them."""
    size = run["label_size"]
    upsampled = resize(logits, size, head.align_corners)
    mask = labels(head.num_classes, size, len(logits))
    if "upsampled_logits" in run:
        differences.summary(f"{where}.upsampled_logits", upsampled, run["upsampled_logits"])
    if "argmax_histogram" in run:
        differences.histogram(f"{where}.argmax_histogram", upsampled.argmax(1), run["argmax_histogram"])
    weight, options = loss
    check_losses(f"{where}.losses", {"": (upsampled, weight)}, mask, run.get("losses", {}), differences, **options)
    if "ignored_fraction" in run:
        ignored = (mask == IGNORED).double().mean().item()
        differences.numbers(f"{where}.ignored_fraction", ignored, run["ignored_fraction"])


def check_losses(
    where: str,
    logits: Mapping[str, tuple[Tensor, float]],
    mask: Tensor,
    expected: Document,
    differences: Differences,
    **options: Any,
) -> None:
    """Check losses and accuracies. ``logits``: prefix of the names in the file -> logits and factor of the loss."""
    found: dict[str, float] = {}
    for prefix, (values, weight) in logits.items():
        found[f"{prefix}loss_ce"] = weight * cross_entropy(values, mask, **options).item()
        found[f"{prefix}acc_seg"] = pixel_accuracy(values, mask).item()
    for name, value in expected.items():
        if name in found:
            differences.numbers(f"{where}.{name}", found[name], value)
        else:
            differences.lines.append(f"{where}: the field {name!r} is unknown, so it is not checked")


def check_module(module: nn.Module, prefix: str, document: Document, differences: Differences) -> None:
    """Fill a module under published names, and check its names, shapes and number of parameters."""
    published_fill(module, lambda key: prefix + key)
    differences.state({prefix + key: value.shape for key, value in module.state_dict().items()}, document["state_dict"])
    differences.equal("params", sum(p.numel() for p in module.parameters()), document["params"])


# Necks


def built_fpn(config: Settings) -> dense.FPN:
    """Return the feature pyramid of an OpenMMLab configuration."""
    config.expect("type", "FPN")
    extra = config.take("add_extra_convs", False)
    for name in ("conv_cfg", "act_cfg"):
        config.expect(name, None)
    config.expect("upsample_cfg", {"mode": "nearest"})
    neck = dense.FPN(
        config.take("in_channels"),
        config.take("out_channels"),
        num_outs=config.take("num_outs"),
        start_level=config.take("start_level", 0),
        end_level=config.take("end_level", -1),
        extra="on_input" if extra is True else extra or "max_pool",
        relu_before_extra=config.take("relu_before_extra_convs", False),
        norm=norm_of(config),
        norm_on_lateral=not config.take("no_norm_on_lateral", False),
    )
    config.done()
    return neck


def check_fpn(document: Document, differences: Differences) -> None:
    """Check every case of a feature pyramid."""
    differences.fields("the file", document, ("cases",))
    for number, case in enumerate(document["cases"]):
        where = f"cases[{number}]"
        inner = Differences()
        neck = built_fpn(Settings("config", case["config"], inner))
        check_module(neck, case["prefix"], case, inner)
        with torch.no_grad():
            levels = neck(features(case["feature_shapes"]))
        inner.equal("number of outputs", len(levels), len(case["outputs"]))
        for level, (found, expected) in enumerate(zip(levels, case["outputs"], strict=False)):
            inner.summary(f"outputs[{level}]", found, expected)
        inner.fields("case", case, ("config", "feature_shapes", "outputs", "params", "state_dict", *REMARKS))
        differences.compared += inner.compared
        differences.lines += [f"{where}: {line}" for line in inner.lines]


# Whole models


def built_trunk(document: Document) -> nn.Module:
    """Return the network in the name of a whole model, such as upernet_convnext_tiny, or in its configuration.

    Depths and widths of ConvNeXts are those of the file's state dict.
    """
    state = document["state_dict"]
    name = _trunk_name(document)
    if "backbone.stem.6.weight" in state:  # OpenMMLab's ResNetV1c has a deep stem
        name += "c"
    args: dict[str, Any] = {"features_only": True}
    if "convnext" in name:
        blocks = [
            int(found[1]) for key in state if (found := re.match(r"backbone\.stages\.(\d)\.\d+\.dwconv\.weight", key))
        ]
        args["depths"] = [blocks.count(stage) for stage in range(4)]
        args["dims"] = [state[f"backbone.stages.{stage}.0.dwconv.weight"][0] for stage in range(4)]
        if not any(key.startswith("backbone.") and key.endswith(".gamma") for key in state):
            args["ls_init_value"] = None
    return timm.model_entrypoint(name)(**args)  # unlike create_model, it passes on arguments that are None


def _trunk_name(document: Document) -> str:
    config = document.get("backbone_cfg", {})
    words = document["model"].split("_")[1:]
    count = len(words)
    names = ["_".join(words[start:end]) for start in range(count) for end in range(count, start, -1)]
    names.append(f"resnet{config['depth']}" if "depth" in config else "")
    names.append("convnext_tiny" if str(config.get("type", "")).endswith("ConvNeXt") else "")
    name = next((name for name in names if timm.is_model(name)), None)
    if name is None:
        raise ValueError(f"no network is called {names[0]!r}, and its configuration {dict(config)} names none")
    return name


def built_upernet(document: Document) -> dense.UPerNet:
    """Return the UPerNet that a file describes."""
    config = document["config"]
    model = dense.UPerNet(
        built_trunk(document),
        config["classes"],
        channels=config["channels"],
        pool_scales=config["pool_scales"],
        align_corners=config["align_corners"],
        auxiliary=False,
    )
    if config.get("aux"):
        aux = config["aux"]
        head = {"in_channels": model.backbone.channels[aux["in_index"]], "num_classes": config["classes"], **aux}
        model.auxiliary_head, _ = built_head({"type": "FCNHead", "align_corners": config["align_corners"], **head})
    return model


def fill_through_files(model: dense.Segmenter, expected: Mapping[str, Sequence[int]], differences: Differences) -> None:
    """Check the names and shapes in a saved file, and load a file with the values of rule fill-v2.

    Afterwards the model is in float64 and in evaluation mode.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        dense.save_checkpoint(model, path)
        state = torch.load(path, weights_only=True)["state_dict"]
        differences.state({key: value.shape for key, value in state.items()}, expected)
        state = {key: filled(key, value) for key, value in state.items()}
        torch.save({"state_dict": state}, path)
        dense.load_checkpoint(model, path)
    model.double().eval()


def check_upernet(document: Document, differences: Differences) -> None:
    """Check a whole UPerNet: names, parameters, MACs, maps, logits, losses, sliding windows."""
    config = document["config"]
    known = ("classes", "channels", "pool_scales", "aux", "align_corners", "loss_weights", "layer_scale")
    differences.fields("config", config, known)
    model = built_upernet(document)
    fill_through_files(model, document["state_dict"], differences)
    differences.equal("params", sum(p.numel() for p in model.parameters()), document["params"])
    for number, run in enumerate(document["runs"]):
        with torch.no_grad():
            _check_upernet_run(f"runs[{number}]", model, run, config, differences)
    for number, run in enumerate(document.get("slide", ())):
        check_slide(f"slide[{number}]", model, run, differences)
    macs = {key: value for key, value in document.items() if key.startswith("macs_")}
    for key, expected in macs.items():
        check_macs(key, model, expected, differences)
    differences.fields("the file", document, ("config", "params", "runs", "slide", "state_dict", *macs, *REMARKS))


def _check_upernet_run(
    where: str, model: dense.UPerNet, run: Document, config: Document, differences: Differences
) -> None:
    x = images(run["size"], run["decode_logits"]["shape"][0])
    maps = model.backbone(x)
    differences.equal(f"{where}: number of maps", len(maps), len(run["stage_features"]))
    for stage, (found, expected) in enumerate(zip(maps, run["stage_features"], strict=False)):
        differences.summary(f"{where}.stage_features[{stage}]", found, expected)
    out, aux = model.forward_heads(x)
    differences.summary(f"{where}.decode_logits", out, run["decode_logits"])
    if "aux_logits" in run:
        differences.summary(f"{where}.aux_logits", aux, run["aux_logits"])
    upsampled = model(x)
    differences.summary(f"{where}.upsampled_logits", upsampled, run["upsampled_logits"])
    if "argmax_histogram" in run:
        differences.histogram(f"{where}.argmax_histogram", upsampled.argmax(1), run["argmax_histogram"])
    mask = labels(config["classes"], run["size"], len(x))
    logits = {"decode.": (upsampled, config["loss_weights"][0])}
    if aux is not None:
        logits["aux."] = (resize(aux, run["size"], model.align_corners), config["loss_weights"][1])
    check_losses(f"{where}.losses", logits, mask, run.get("losses", {}), differences)
    if "ignored_fraction" in run:
        ignored = (mask == IGNORED).double().mean().item()
        differences.numbers(f"{where}.ignored_fraction", ignored, run["ignored_fraction"])
    known = ("size", "stage_features", "decode_logits", "aux_logits", "upsampled_logits", "argmax_histogram", "losses",
             "ignored_fraction", *REMARKS)  # fmt: skip
    differences.fields(where, run, known)


def check_slide(where: str, model: nn.Module, run: Document, differences: Differences) -> None:
    """Check segmentation in windows, at another size, mirrored, and averaged."""
    x = images(run["size"], run["logits"]["shape"][0])
    windows = {"window": run["crop"], "stride": run["stride"]}
    size = run.get("ori_shape", run["size"])
    mean = dense.segment(model, x, **windows, size=size, flip=True)
    found = {
        "logits": dense.segment(model, x, **windows),
        "logits_at_ori_shape": dense.segment(model, x, **windows, size=size)[0],
        "flipped_logits_at_ori_shape_flipped_back": dense.segment(model, x.flip(-1), **windows, size=size)[0].flip(-1),
        "mean_softmax": mean[0],
    }
    for name, value in found.items():
        if name in run:
            differences.summary(f"{where}.{name}", value, run[name])
    if "argmax_histogram" in run:
        differences.histogram(f"{where}.argmax_histogram", mean.argmax(1), run["argmax_histogram"])
    differences.fields(where, run, ("size", "crop", "stride", "ori_shape", "argmax_histogram", *found, *REMARKS))


def check_macs(name: str, model: dense.Segmenter, expected: Document, differences: Differences) -> None:
    """Check multiply-accumulates of convolutions and matrix products, printed in billions with one decimal."""
    match = re.fullmatch(r"macs_(\d+)x(\d+)", name)
    if match is None:
        differences.lines.append(f"the field {name!r} is unknown, so it is not checked")
        return
    meta = model.to("meta")
    x = torch.empty(1, 3, int(match[1]), int(match[2]), dtype=torch.float64, device="meta")
    with torch.no_grad():
        maps = meta.backbone(x)
        parts: dict[str, tuple[nn.Module, object]] = {"backbone": (meta.backbone, x)}
        for part in ("decode_head", "auxiliary_head"):
            parts[part] = getattr(meta, part), maps
        for part, (module, given) in parts.items():
            if part in expected:
                with FlopCounterMode(display=False) as counter:
                    module(given)
                differences.numbers(f"{name}.{part}", round(counter.get_total_flops() / 2e9, 1) * 1e9, expected[part])
    differences.fields(name, expected, (*parts, *REMARKS))


def pixel_accuracy(logits: Tensor, mask: Tensor) -> Tensor:
    """Return mmsegmentation's ``acc_seg``: the percentage of pixels with a class whose largest logit is that class."""
    valid = mask != IGNORED
    right = (best_class(logits) == mask) & valid
    # The number of hits times a factor, both in float32, as there for logits of any dtype.
    return right.sum().float() * (100 / (valid.sum().double() + EPS)).float()


CHECKS = {**dict.fromkeys(HEADS, check_head), "FPN": check_fpn, "upernet": check_upernet}
"""Kind -> check."""
