"""Backbones: any network gives maps with channels and strides, and nothing that training would wait for."""

import copy
import pickle

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import widefield
from dense.networks import Maps, deeplab, features, upernet, without_gradient
from tolerances import FLOAT64, close
from widefield import dense
from widefield.surgery.anatomy import is_inside

NAMES = [
    "test_convnext",
    "test_resnet",
    "test_efficientnet",
    "mobilenetv2_050",
    "van_b0",
    "hornet_tiny_7x7",
    "unireplknet_a",
    "moganet_xtiny",
    "focalnet_tiny_srf",
    "internimage_t",
    "morf_convnext_tiny",
    "replknet_31b",
    "slak_tiny",
    "metaformer_tiny",
]


def small(name):
    """Return arguments that make one of the library's networks small."""
    if name in ("hornet_tiny_7x7", "unireplknet_a", "moganet_xtiny", "van_b0"):
        return {"depths": (1, 1, 1, 1)}
    if name == "morf_convnext_tiny":
        return {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    if name in ("replknet_31b", "metaformer_tiny", "slak_tiny"):
        return {"depths": (1, 1, 1, 1), "widths": (8, 16, 24, 32)}
    if name == "internimage_t":
        return {"depths": (1, 1, 1, 1), "widths": (16, 32, 64, 128), "groups": (1, 2, 4, 8)}
    return {}


def measured(maps, images):
    found = maps(images)
    side = images.shape[2]
    return [x.shape[1] for x in found], [side // x.shape[2] for x in found]


@pytest.mark.parametrize("name", NAMES)
def test_names_give_four_maps_as_described_and_train_every_parameter(name):
    maps = dense.feature_maps(name, **small(name))
    images = torch.randn(2, 3, 64, 64)
    channels, strides = measured(maps.eval(), images)
    assert ([*maps.channels], [*maps.strides]) == (channels, strides)
    assert strides == [4, 8, 16, 32]
    assert without_gradient(maps, images) == []


UNREAD = "gemma4"
"""Family whose networks cannot run on the meta device."""


def families():
    """Yield a timm name of every family that timm builds as features, with at least four maps."""
    found = {}
    for name in timm.list_models():
        found.setdefault(timm.model_entrypoint(name).__module__, name)
    built_from_files = "widefield_shared"
    return sorted(name for name in found.values() if not name.startswith((UNREAD, built_from_files)))


@pytest.mark.slow
@pytest.mark.parametrize("name", families())
def test_every_family_of_timm(name):
    try:
        with torch.device("meta"):
            maps = dense.feature_maps(name)
    except ValueError as error:
        if "it has fewer" not in str(error) and "gives no feature maps" not in str(error):
            raise
        pytest.skip(str(error))
    channels, side, _ = maps.body.pretrained_cfg["input_size"]
    images = torch.zeros(2, channels, side, side, device="meta")
    for found, width, stride in zip(maps.eval()(images), maps.channels, maps.strides, strict=True):
        assert found.shape[1] == width
        assert side / found.shape[2] == pytest.approx(stride, rel=0.2)  # sides of unpadded networks are smaller
    assert without_gradient(maps, images) == []


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "mobilenetv2_050", "van_b0", "test_efficientnet"])
def test_a_classifier_gives_the_maps_of_its_feature_network(name):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=7).double().eval()
    before = copy.deepcopy(network.state_dict())
    maps = dense.feature_maps(network, stage_norms="none")
    wanted = dense.feature_maps(name, stage_norms="none").double()
    theirs = {key.replace("_", ".").removeprefix("body.model."): value for key, value in maps.state_dict().items()}
    renamed = {
        key: key.replace("_", ".").removeprefix("body.model.").removeprefix("body.") for key in wanted.state_dict()
    }
    theirs = {key.removeprefix("body."): value for key, value in theirs.items()}
    wanted.load_state_dict({key: theirs[name] for key, name in renamed.items()})
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert (maps.channels, maps.strides) == (wanted.channels, wanted.strides)
    for found, expected in zip(maps(images), wanted.eval()(images), strict=True):
        close(found, expected, FLOAT64)
    assert network.state_dict().keys() == before.keys()  # the classifier keeps its head
    assert network(images).shape == (1, 7)
    assert without_gradient(maps, images.repeat(2, 1, 1, 1)) == []


def test_torchvisions_classifier_gives_the_outputs_of_its_stages():
    network = torchvision.models.resnet18(weights=None).eval()
    maps = dense.feature_maps(network)
    assert (maps.channels, maps.strides) == ((64, 128, 256, 512), (4, 8, 16, 32))
    images = torch.randn(2, 3, 70, 64)
    expected = create_feature_extractor(network, ["layer1", "layer2", "layer3", "layer4"])(images)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(maps).eval()))
    for found, again, wanted in zip(maps.eval()(images), twin(images), expected.values(), strict=True):
        assert torch.equal(found, wanted)
        assert torch.equal(again, wanted)
    assert network(images).shape == (2, 1000)
    assert without_gradient(maps, images) == []
    assert sum(p.numel() for p in maps.parameters()) == sum(p.numel() for p in network.parameters()) - 513_000


@pytest.mark.parametrize(
    ("encoder", "channels"),
    [("resnet18", (64, 128, 256, 512)), ("tu-test_convnext", (24, 32, 48, 64)), ("mobilenet_v2", (24, 32, 96, 1280))],
)
def test_encoders_of_segmentation_models_pytorch(encoder, channels):
    network = smp.encoders.get_encoder(encoder, weights=None)
    maps = dense.feature_maps(network)
    assert (maps.channels, maps.strides) == (channels, (4, 8, 16, 32))
    assert without_gradient(maps, torch.randn(2, 3, 64, 64)) == []


@pytest.mark.parametrize("container", [list, tuple, lambda maps: {str(i): x for i, x in enumerate(maps)}])
def test_any_container_of_maps(container):
    maps = dense.feature_maps(Maps(container=container))
    assert (maps.channels, maps.strides) == ((8, 12, 16, 20), (4, 8, 16, 32))
    image = nn.Identity()
    maps = dense.feature_maps(Maps(container=container, first=(image, lambda x: x[:, :0])), out_indices=(0, 2))
    assert (maps.channels, maps.strides) == ((8, 16), (4, 16))


def test_channels_last_networks_give_channels_first():
    name = "swin_tiny_patch4_window7_224"
    network = timm.create_model(name, features_only=True, img_size=64, depths=(1, 1, 1, 1), embed_dim=24)
    maps = dense.feature_maps(network)
    channels, strides = measured(maps.eval(), torch.randn(1, 3, 64, 64))
    assert ([*maps.channels], [*maps.strides]) == (channels, strides)


def test_parameters_behind_the_last_map_are_frozen_if_they_cannot_be_removed():
    class Tail(Maps):
        def __init__(self):
            super().__init__()
            self.unused = nn.Conv2d(20, 5, 1)

        def forward(self, x):
            maps = super().forward(x)
            self.seen = self.unused(maps[-1])
            return maps

    maps = dense.feature_maps(Tail())
    assert not any(p.requires_grad for p in maps.body.unused.parameters())
    assert without_gradient(maps, torch.randn(2, 3, 32, 32)) == []


def test_measuring_leaves_modes_and_statistics_alone():
    network = Maps()
    network.norm = nn.BatchNorm2d(3)
    network.convs[0] = nn.Sequential(network.norm, network.convs[0])
    network.train()
    network.convs[1].eval()
    dense.feature_maps(network)
    assert network.training
    assert not network.convs[1].training
    assert network.norm.num_batches_tracked == 0


def test_grayscale_networks_are_measured_with_one_channel():
    network = torchvision.models.resnet18(weights=None)
    network.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    assert dense.feature_maps(network).strides == (4, 8, 16, 32)


# Norms


@pytest.mark.parametrize(
    ("name", "kind", "eps"),
    [
        ("test_convnext", nn.LayerNorm, 1e-6),
        ("morf_convnext_tiny", nn.LayerNorm, 1e-6),
        ("convnextv2_atto", nn.LayerNorm, 1e-6),
        ("hornet_tiny_7x7", nn.LayerNorm, 1e-6),
        ("unireplknet_a", nn.LayerNorm, 1e-6),
        ("focalnet_tiny_srf", nn.LayerNorm, 1e-5),
        ("replknet_xl", nn.BatchNorm2d, 1e-5),
        ("replknet_31b", None, None),
        ("van_b0", None, None),
        ("moganet_xtiny", None, None),
        ("internimage_t", None, None),
        ("inception_next_tiny", None, None),
        ("test_resnet", None, None),
    ],
)
def test_norms_follow_the_family_by_name_and_by_module(name, kind, eps):
    with torch.device("meta"):
        built = [dense.feature_maps(backbone) for backbone in (name, features(name), timm.create_model(name))]
    for maps in built:
        norms = [child for path, child in maps.named_children() if path.startswith("norm")]
        assert len(norms) == (4 if kind else 0)
        assert [path for path, _ in maps.named_children()] == ["body", *(f"norm{i}" for i in range(len(norms)))]
        for norm, channels in zip(norms, maps.channels, strict=False):
            assert isinstance(norm, kind)
            assert norm.eps == eps
            assert norm.weight.shape == (channels,)


def test_norms_are_applied_to_the_maps():
    torch.manual_seed(0)
    plain = dense.feature_maps("test_convnext", stage_norms="none").double().eval()
    normed = dense.feature_maps(plain.body).double().eval()
    images = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    for x, y in zip(plain(images), normed(images), strict=True):
        centered = x - x.mean(1, keepdim=True)
        close(y, centered / (centered.square().mean(1, keepdim=True) + 1e-6).sqrt(), FLOAT64)


def test_norms_of_a_choice():
    def norm(channels):
        return nn.GroupNorm(4, channels)

    for given, kind in (("batch", nn.BatchNorm2d), ("layer", nn.LayerNorm), (norm, nn.GroupNorm)):
        maps = dense.feature_maps("test_resnet", stage_norms=given, normed=(1, 3))
        assert [path for path, _ in maps.named_children()] == ["body", "norm1", "norm3"]
        assert isinstance(maps.norm3, kind)
    with pytest.raises(ValueError, match=r"stage_norms must be one of 'layer', 'batch', 'none'.*Did you mean 'layer'"):
        dense.feature_maps("test_resnet", stage_norms="layers")


def test_an_earlier_result_is_returned_as_it_is():
    maps = dense.feature_maps("test_convnext", normed=(0, 2, 3))
    assert dense.feature_maps(maps) is maps
    model = deeplab(maps)
    assert model.backbone is maps
    assert without_gradient(model, torch.randn(2, 3, 64, 64)) == []
    with pytest.raises(ValueError, match=r"Give normed=\(0, 2, 3\) to feature_maps"):
        deeplab(dense.feature_maps("test_convnext"))


# Conversions


def test_networks_converted_before_and_after_building():
    config = widefield.MoRF((3, 5, 7))
    before = upernet(widefield.convert(timm.create_model("test_convnext"), config))
    features_before = upernet(widefield.convert(features(), config))
    after = widefield.convert(upernet(), config)
    counts = [
        sum(isinstance(m, widefield.nn.MoRFConv2d) for m in net.modules()) for net in (before, features_before, after)
    ]
    assert counts[0] == counts[1] == counts[2] > 0
    plan = widefield.plan(upernet(), config)
    assert all(is_inside(step.name, "backbone.body") for step in plan.replaced)
    for net in (before, features_before, after):
        assert [path for path, _ in net.backbone.named_children()][1:] == ["norm0", "norm1", "norm2", "norm3"]
        assert without_gradient(net, torch.randn(2, 3, 64, 64)) == []


# Arguments and errors


def test_arguments_reach_timm():
    maps = dense.feature_maps("test_resnet", output_stride=16, in_chans=1)
    assert maps.strides == (4, 8, 16, 16)
    assert measured(maps.eval(), torch.randn(1, 1, 64, 64)) == ([*maps.channels], [*maps.strides])
    assert dense.feature_maps("test_resnet", out_indices=(0, 2)).strides == (2, 8)
    assert dense.feature_maps(timm.create_model("test_resnet"), out_indices=(0, 2)).strides == (2, 8)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("convnext_atto", {"ls_init_value": None, "depths": (1, 1, 1, 1)}),
        ("convnext_atto.d2_in1k", {"ls_init_value": None, "depths": (1, 1, 1, 1)}),
        ("hornet_tiny_7x7", {"layer_scale_init": None, "depths": (1, 1, 1, 1)}),
    ],
)
def test_none_reaches_the_network(name, args):
    def scaled(given):
        built = (dense.feature_maps(name, **given), dense.SemanticFPN(name, 3, **given))
        return [any("gamma" in key for key, _ in model.named_parameters()) for model in built]

    assert scaled(args) == [False, False]
    assert scaled({"depths": (1, 1, 1, 1)}) == [True, True]


@pytest.mark.parametrize(
    ("given", "options", "error", "text"),
    [
        ("convnext_tinny", {}, ValueError, "timm has no network 'convnext_tinny'. Did you mean 'convnext_tiny'?"),
        ("test_convnext", {"pretrainde": True}, TypeError, "has an argument 'pretrainde'. Did you mean 'pretrained'?"),
        ("test_convnext", {"levels": 5}, ValueError, "test_convnext has no feature maps at"),
        ("test_convnext", {"output_stride": None}, ValueError, "with output_stride None: leave out what it"),
        ("hf-hub:a/b", {"drop_rate": None}, ValueError, "drop_rate=None does not reach 'hf-hub:a/b': timm drops it"),
        (3, {}, TypeError, "backbone must be a timm name or a module; got 3 of int"),
        (Maps(), {"pretrained": True}, TypeError, "no argument 'pretrained' for a backbone that is a module"),
        (Maps((8, 8, 8)), {}, ValueError, "Maps gives 3 feature maps, and 4 are needed"),
        (Maps(), {"out_indices": (0, 4)}, ValueError, "Maps gives 4 feature maps, and out_indices asks for 4"),
        (Maps(), {"out_indices": (3, 0)}, ValueError, r"finest map first; its maps have strides \(32, 4\)"),
        (
            nn.Conv2d(3, 8, 3),
            {},
            ValueError,
            r"Conv2d returns one tensor \(1, 8, 126, 126\), and its stages are unknown",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), {}, ValueError, "Sequential refuses images of 3x128x128"),
        (
            dense.feature_maps("test_resnet"),
            {"out_indices": (0, 1)},
            ValueError,
            r"out_indices has no effect on the result of feature_maps.*got \(0, 1\). Give out_indices to that call",
        ),
        (dense.feature_maps("test_resnet"), {"stage_norms": "layer"}, ValueError, "stage_norms has no effect on the"),
        (dense.feature_maps("test_convnext"), {"normed": (0, 3)}, ValueError, r"maps \[0, 1, 2, 3\].* normed=\(0, 3\)"),
        (Maps(first=(lambda x: x.mean((2, 3)),)), {}, ValueError, r"must return feature maps \(N, C, H, W\) only"),
    ],
)
def test_errors_name_what_is_wrong(given, options, error, text):
    with pytest.raises(error, match=text):
        dense.feature_maps(given, **options)
