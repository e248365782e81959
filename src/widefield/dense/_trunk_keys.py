"""Relate the weights of a backbone to the key names of its family's published segmentation files.

One entry of :data:`FAMILIES` per family. Its rules go from our names to the published ones, so that one table serves
loading and saving. Names were read in the families' own repositories and in mmsegmentation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from timm.models import resnet
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.convnext import ConvNeXtStage
from timm.models.focalnet import FocalNetStage
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from widefield.surgery.walk import is_ours

_LEAF = r"\.(?:weight|bias|running_mean|running_var|num_batches_tracked)"


@dataclass(frozen=True)
class Family:
    """The key names of a family.

    Attributes:
        name: as the paper writes it.
        signature: regular expression that a published key of every file of the family starts with, and of no other.
        rules: (regular expression of our key, its published name as a template of ``re.sub``), the first that fits the
            whole key counts. Keys that fit none have no published name.
        accepts: whether a network is of the family; None for networks whose own names are the published ones.
        mmpretrain: (name in the family's own code, name in mmpretrain) for parts of keys that differ.
        classifier: regular expression of published keys that only classifiers have.
        flat: regular expression of published weights that are stored as matrices.
        notes: (regular expression of a published key, what to do if its shape differs).
        merges: whether the authors' code also writes files in which parallel kernels are merged.
    """

    name: str
    signature: str
    rules: tuple[tuple[str, str], ...]
    accepts: Callable[[nn.Module], bool] | None = None
    mmpretrain: tuple[tuple[str, str], ...] = ()
    classifier: str = r"(?:norm|head)\."
    flat: str = r"(?!)"
    notes: tuple[tuple[str, str], ...] = ()
    merges: bool = False

    def published(self, key: str) -> str | None:
        """Return the published name of one of our keys, or None if it has none."""
        for pattern, template in self.rules:
            found = re.fullmatch(pattern, key)
            if found:
                return found.expand(template)
        return None

    def common(self, key: str) -> str:
        """Return the name in the family's own code of a key that may have the name in mmpretrain."""
        for own, other in self.mmpretrain:
            key = key.replace(f".{other}.", f".{own}.")
        return key

    def stored(self, key: str, value: Tensor, mmpretrain: bool = False) -> tuple[str, Tensor]:
        """Return the name and the shape in which the published code, or mmpretrain, has a weight."""
        if key.endswith((".grn.gamma", ".grn.beta")):
            value = value.flatten() if mmpretrain else value.reshape(1, 1, 1, -1)
        elif re.fullmatch(self.flat, key):
            value = value.flatten(1)
        for own, other in self.mmpretrain if mmpretrain else ():
            key = key.replace(f".{own}.", f".{other}.")
        return key, value


def _own(*patterns: str) -> tuple[tuple[str, str], ...]:
    """Return rules for networks that have the published names themselves."""
    return ((rf"(?:{'|'.join(patterns)})", r"\g<0>"),)


def _has(*classes: type[nn.Module]) -> Callable[[nn.Module], bool]:
    """Return a test for networks with modules of these classes."""
    return lambda network: any(isinstance(module, classes) for module in network.modules())


CONVNEXT = Family(
    "ConvNeXt",
    r"stages\.\d+\.\d+\.(?:dwconv|depthwise_conv)\.weight",
    (
        (rf"stem\.(\d{_LEAF})", r"downsample_layers.0.\1"),
        (rf"stages\.(\d+)\.downsample\.(\d{_LEAF})", r"downsample_layers.\1.\2"),
        (rf"stages\.(\d+)\.blocks\.(\d+)\.conv_dw({_LEAF})", r"stages.\1.\2.dwconv\3"),
        (rf"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc([12]{_LEAF})", r"stages.\1.\2.pwconv\3"),
        (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.grn\.weight", r"stages.\1.\2.grn.gamma"),
        (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.grn\.bias", r"stages.\1.\2.grn.beta"),
        (rf"stages\.(\d+)\.blocks\.(\d+)\.(gamma|norm{_LEAF})", r"stages.\1.\2.\3"),
    ),
    accepts=_has(ConvNeXtStage),
    mmpretrain=(("dwconv", "depthwise_conv"), ("pwconv1", "pointwise_conv1"), ("pwconv2", "pointwise_conv2")),
    flat=r".*\.pwconv[12]\.weight",
)

FOCALNET = Family(
    "FocalNet",
    r"layers\.\d+\.blocks\.\d+\.modulation\.",
    (
        (rf"stem\.((?:proj|norm){_LEAF})", r"patch_embed.\1"),
        *((rf"layers\.{i + 1}\.downsample\.((?:proj|norm){_LEAF})", rf"layers.{i}.downsample.\1") for i in range(3)),
        (rf"(layers\.\d+\.blocks\.\d+\.norm[12])(?:_post)?({_LEAF})", r"\1\2"),
        (r"(layers\.\d+\.blocks\.\d+)\.ls([12])\.gamma", r"\1.gamma_\2"),
        (rf"(layers\.\d+\.blocks\.\d+\.modulation)\.norm({_LEAF})", r"\1.ln\2"),
        (rf"layers\.\d+\.blocks\.\d+\.(?:modulation\.(?:f|h|proj|focal_layers\.\d+\.0)|mlp\.fc[12]){_LEAF}", r"\g<0>"),
    ),
    accepts=_has(FocalNetStage),
    flat=r".*\.(?:modulation\.(?:f|proj)|mlp\.fc[12])\.weight",
    notes=(
        (
            r".*\.focal_layers\.",
            "the file has other focal windows (published segmenters and detectors use 9): build the backbone with "
            "them, such as focal_windows=(9, 9, 9, 9)",
        ),
    ),
)

_RESNET_LAYER = rf"layer\d\.\d+\.(?:conv[123]|bn[123]|downsample\.\d){_LEAF}"

RESNETV1C = Family(
    "ResNet with a deep stem",  # ResNetV1c, ResNetV1d
    r"stem\.[036]\.weight",
    ((rf"conv1\.(\d{_LEAF})", r"stem.\1"), (rf"bn1({_LEAF})", r"stem.7\1"), (_RESNET_LAYER, r"\g<0>")),
    accepts=lambda network: any(isinstance(m._modules.get("conv1"), nn.Sequential) for m in network.modules()),
    classifier=r"fc\.",
)

RESNET = Family(
    "ResNet",
    r"layer1\.0\.conv1\.weight",
    ((rf"(?:conv1|bn1){_LEAF}", r"\g<0>"), (_RESNET_LAYER, r"\g<0>")),
    accepts=_has(resnet.BasicBlock, resnet.Bottleneck, torchvision_resnet.BasicBlock, torchvision_resnet.Bottleneck),
    classifier=r"fc\.",
)


def _mobile_rules() -> tuple[tuple[str, str], ...]:
    """Return rules that number mmsegmentation's layers from 1, as regular expressions cannot count."""
    parts = {
        0: (("conv_dw", "0.conv"), ("bn1", "0.bn"), ("conv_pw", "1.conv"), ("bn2", "1.bn")),
        1: (("conv_pw", "0.conv"), ("bn1", "0.bn"), ("conv_dw", "1.conv"), ("bn2", "1.bn"), ("conv_pwl", "2.conv"),
            ("bn3", "2.bn")),
    }  # fmt: skip
    layers = (
        (rf"blocks\.{i}\.(\d)\.{ours}({_LEAF})", rf"layer{i + 1}.\1.conv.{theirs}\2")
        for i in range(7)
        for ours, theirs in parts[min(i, 1)]
    )
    return ((rf"conv_stem({_LEAF})", r"conv1.conv\1"), (rf"bn1({_LEAF})", r"conv1.bn\1"), *layers)


def is_mobilenetv2(network: nn.Module) -> bool:
    """Return whether a network of timm's EfficientNet class is a MobileNetV2, perhaps with converted kernels."""
    convs = [module for module in network.modules() if type(module) is nn.Conv2d and module.groups > 1]
    mobile = any(isinstance(module, InvertedResidual) for module in network.modules())
    return mobile and _has(nn.ReLU6)(network) and all(conv.kernel_size == (3, 3) for conv in convs)


MOBILENETV2 = Family(
    "MobileNetV2",
    r"layer1\.0\.conv\.0\.conv\.weight",
    _mobile_rules(),
    accepts=is_mobilenetv2,
    classifier=r"(?:conv2|conv_head|bn2|classifier|fc)\.",
)

REPLKNET = Family(
    "RepLKNet",
    r"stages\.\d+\.blocks\.\d+\.(?:prelkb_bn|preffn_bn)\.",
    _own(
        rf"stem\.\d\.(?:conv|bn){_LEAF}",
        rf"stages\.\d\.blocks\.\d+\.(?:pw[12]\.(?:conv|bn)|prelkb_bn|preffn_bn){_LEAF}",
        rf"stages\.\d\.blocks\.\d+\.large_kernel\.(?:lkb_reparam|(?:lkb_origin|small_conv)\.(?:conv|bn)){_LEAF}",
        rf"transitions\.\d\.\d\.(?:conv|bn){_LEAF}",
    ),
    merges=True,
)

UNIREPLKNET = Family(
    "UniRepLKNet",
    r"stages\.\d+\.\d+\.se\.down\.",
    _own(
        rf"downsample_layers\.\d\.\d{_LEAF}",
        r"stages\.\d\.\d+\.gamma",
        rf"stages\.\d\.\d+\.(?:dwconv|norm|se\.(?:down|up)|pwconv1\.1|pwconv2\.[02]){_LEAF}",
        rf"stages\.\d\.\d+\.dwconv\.(?:lk_origin|origin_bn|dil_(?:conv|bn)_k\d+_\d+){_LEAF}",
        r"stages\.\d\.\d+\.act\.1\.(?:gamma|beta)",
    ),
    merges=True,
)

VAN = Family(
    "VAN",
    r"patch_embed1\.proj\.",
    _own(
        rf"patch_embed\d\.(?:proj|norm){_LEAF}",
        r"block\d\.\d+\.layer_scale_[12]",
        rf"block\d\.\d+\.(?:norm[12]|mlp\.(?:fc[12]|dwconv\.dwconv)){_LEAF}",
        rf"block\d\.\d+\.attn\.(?:proj_[12]|spatial_gating_unit\.conv(?:0|_spatial|1)){_LEAF}",
        rf"norm\d{_LEAF}",
    ),
    classifier=r"head\.",
)

MOGANET = Family(
    "MogaNet",
    r"patch_embed1\.projection\.",
    _own(
        rf"patch_embed\d\.(?:projection(?:\.\d)?|norm){_LEAF}",
        r"blocks\d\.\d+\.(?:layer_scale_[12]|(?:attn|mlp)\.sigma\.scale)",
        rf"blocks\d\.\d+\.(?:norm[12]|mlp\.(?:fc[12]|dwconv|decompose)){_LEAF}",
        rf"blocks\d\.\d+\.attn\.(?:proj_[12]|gate|value\.(?:DW_conv[012]|PW_conv)){_LEAF}",
        rf"norm\d{_LEAF}",
    ),
    classifier=r"head\.",
)

HORNET = Family(
    "HorNet",
    r"stages\.\d+\.\d+\.gnconv\.",
    _own(
        rf"downsample_layers\.\d\.\d{_LEAF}",
        r"stages\.\d\.\d+\.gamma[12]",
        rf"stages\.\d\.\d+\.(?:norm[12]|pwconv[12]|gnconv\.(?:proj_in|proj_out|dwconv|pws\.\d)){_LEAF}",
        r"stages\.\d\.\d+\.gnconv\.dwconv\.complex_weight",
        rf"stages\.\d\.\d+\.gnconv\.dwconv\.(?:dw|pre_norm|post_norm){_LEAF}",
    ),
    notes=(
        (
            r".*\.complex_weight",
            "the file has global filters of another size (published segmentation models use those of 384 pixels, "
            "detectors those of 224): "
            "build the backbone with them, or call set_input_size(384) of the HorNet in it first",
        ),
    ),
)

SLAK = Family(
    "SLaK",
    r"stages\.\d+\.\d+\.large_kernel\.",
    _own(
        rf"downsample_layers\.\d\.\d{_LEAF}",
        r"stages\.\d\.\d+\.gamma",
        rf"stages\.\d\.\d+\.(?:norm|pwconv[12]){_LEAF}",
        rf"stages\.\d\.\d+\.large_kernel\.(?:lkb_reparam|(?:LoRA[12]|lkb_origin|small_conv)\.(?:conv|bn)){_LEAF}",
    ),
    merges=True,
)

INTERNIMAGE = Family(
    "InternImage",
    r"levels\.\d+\.blocks\.\d+\.dcn\.",
    _own(
        rf"patch_embed\.(?:conv[12]|norm[12]\.\d){_LEAF}",
        rf"levels\.\d\.(?:norm\.\d|post_norms\.\d+\.\d|downsample\.(?:conv|norm\.\d)){_LEAF}",
        rf"levels\.\d\.blocks\.\d+\.(?:(?:res_post_)?norm[12]\.\d|mlp\.fc[12]){_LEAF}",
        rf"levels\.\d\.blocks\.\d+\.dcn\.(?:dw_conv\.(?:0|1\.\d)|offset|mask|input_proj|output_proj){_LEAF}",
        r"levels\.\d\.blocks\.\d+\.(?:gamma[12]|dcn\.center_feature_scale_proj_(?:weight|bias))",
    ),
    classifier=r"(?:conv_head|head|dcnv3_head_x[34]|clip_projector|fc_norm)\.",
)

FAMILIES = (
    UNIREPLKNET, HORNET, SLAK, REPLKNET, VAN, MOGANET, INTERNIMAGE, FOCALNET, MOBILENETV2, RESNETV1C, RESNET,
    CONVNEXT,
)  # fmt: skip
"""All families; those whose signature is the most particular come first."""


def family_of_file(keys: Iterable[str]) -> Family | None:
    """Return the family of published keys of a backbone, without prefix, or None if it is not known."""
    keys = list(keys)
    return next((family for family in FAMILIES if any(re.match(family.signature, key) for key in keys)), None)


@dataclass(frozen=True)
class TrunkNames:
    """The published names of a backbone's weights; all without the prefix "backbone".

    Attributes:
        family: the network's family, or None if it is not known.
        names: our key -> its published name.
        others: our keys without a published name, such as those of converted or merged layers.
        by_timm: our key -> its name in a file of mmsegmentation's ``TIMMBackbone``.
        lacking: our keys of layers that the code for the published names lacks.
    """

    family: Family | None
    names: dict[str, str]
    others: tuple[str, ...]
    by_timm: dict[str, str]
    lacking: tuple[str, ...]


def trunk_names(backbone: nn.Module) -> TrunkNames:
    """Return the published names of a :class:`widefield.dense.FeatureMaps`.

    Networks of unknown families are named as mmsegmentation's ``TIMMBackbone`` does.
    """
    body = backbone.get_submodule("body")
    norms = [key for key in backbone.state_dict() if not key.startswith("body.")]
    by_timm = {f"body.{key}": f"timm_model.{key}" for key in body.state_dict()} | {key: key for key in norms}
    plain, network = plain_keys(body)
    family = _family_of_network(body, plain.values())
    found = {f"body.{key}": family.published(name) if family else None for key, name in plain.items()}
    others = tuple(key for key, name in found.items() if name is None)
    if family is None or (family.accepts and not all(_is_converted(backbone, key) for key in others)):
        converted = () if is_ours(network) else tuple(key for key in by_timm if _is_converted(backbone, key))
        return TrunkNames(None, by_timm, (), by_timm, converted)
    stage_norm = "stages.{}.norm" if family is REPLKNET else "norm{}"  # RepLKNet-XL
    numbers: Sequence[int] = backbone.numbers  # type: ignore[assignment]
    names = {key: name for key, name in found.items() if name is not None}
    names |= {key: re.sub(r"^norm(\d)", lambda found: stage_norm.format(numbers[int(found[1])]), key) for key in norms}
    return TrunkNames(family, names, others, by_timm, others)


def _family_of_network(network: nn.Module, keys: Iterable[str]) -> Family | None:
    keys = list(keys)
    for family in FAMILIES:
        named = [name for name in map(family.published, keys) if name is not None]
        if family.accepts is None:
            if any(re.match(family.signature, name) for name in named):
                return family
        elif named and family.accepts(network):
            return family
    return None


def _is_converted(root: nn.Module, key: str) -> bool:
    """Return whether a weight below "body" belongs to a layer of this package, at any depth."""
    parts = key.split(".")
    return any(is_ours(root.get_submodule(".".join(parts[:end]))) for end in range(1, len(parts)))


def plain_keys(network: nn.Module) -> tuple[dict[str, str], nn.Module]:
    """Return key -> the key in the whole network, as it was before it was wrapped to return features; and the network.

    timm's ``FeatureListNet`` joins two names ("stages_0" for "stages.0"). Other wrappers call the network "model" or
    "body".
    """
    prefix, inner = "", network
    while wrapped := next((name for name in ("model", "body") if set(inner._modules) == {name}), None):
        prefix, inner = f"{prefix}{wrapped}.", inner.get_submodule(wrapped)
    flat = isinstance(inner, nn.ModuleDict)
    plain = {key: key.removeprefix(prefix) for key in network.state_dict()}
    if flat:
        plain = {key: re.sub(r"^([a-z_]+)_(\d+)\.", r"\1.\2.", name) for key, name in plain.items()}
    return plain, inner


def depths(keys: Iterable[str]) -> list[int]:
    """Return the number of blocks of each stage, from published keys of a backbone."""
    counts: dict[str, int] = {}
    for key in keys:
        found = re.match(r"((?:stages|levels|layers)\.\d+(?:\.blocks)?|(?:blocks?|layer)\d)\.(\d+)\.", key)
        if found:
            counts[found[1]] = max(counts.get(found[1], 0), int(found[2]) + 1)
    return [counts[stage] for stage in sorted(counts)]
