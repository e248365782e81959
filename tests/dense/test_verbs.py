"""convert, specialize, reparameterize, trim, export and quantize on whole segmentation models."""

import copy

import pytest
import timm
import torch
from networks import SMALL, settled

import widefield
from dense.networks import BUILDERS, deeplab, upernet
from tolerances import NETWORK, close
from widefield import deploy
from widefield.nn import FusedMoRFConv2d, MoRFConv2d
from widefield.surgery import compare

NARROW = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)}
ANY_SIZE = ("batch", "size")


def small(name, build=upernet):
    """Return a segmenter on a narrow network, with weights like those of a trained one."""
    return settled(build(name, **next((given for prefix, given in SMALL.items() if name.startswith(prefix)), {})))


def shaken(model):
    """Give a trained look to a converted segmenter, and routing that depends on the image."""
    settled(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def labeled(model, *sizes):
    """Return batches of two images with the masks that the model predicts, some rows unlabeled and some wrong."""
    found = []
    for size in sizes:
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            masks = model(images).argmax(1)
        masks[:, :4], masks[:, -4:] = 255, 0
        found.append({"image": images, "mask": masks})
    return found


CONVERSIONS = {
    "mixtures": widefield.MoRF((3, 7, 11)),
    "hard mixtures": widefield.MoRF((3, 7), routing="hard", top_k=1),
    "masks": widefield.GMConv(stem="none"),
    "masks for each image": widefield.GMConv(body="dynamic", stem="none"),
    "large kernels": widefield.LargeKernel(13),
}
ROUTED = ("mixtures", "hard mixtures", "masks for each image")


@pytest.mark.parametrize("name", CONVERSIONS)
def test_from_a_converted_segmenter_to_a_trimmed_one(name):
    model = widefield.convert(upernet("convnext_atto", **NARROW), CONVERSIONS[name])
    model = shaken(model)
    loader = labeled(model, (48, 64))
    static, reports = model, []
    if name in ROUTED:
        static = widefield.specialize(model, loader, report=reports.append)
        assert len(reports[0].static) == 4
        assert all(layer.name.startswith("backbone.body.stages") for layer in reports[0].layers)
        assert reports[0].measured.scores is not None
    fused = widefield.reparameterize(static, loader[0]["image"], report=reports.append)
    change = compare(static, fused, [*loader, torch.randn(1, 3, 33, 47)])
    assert change.relative <= NETWORK
    assert change.agreement > 0.999
    assert not any(isinstance(module, MoRFConv2d | FusedMoRFConv2d) for module in fused.modules())
    small = widefield.trim(fused, 0.03, loader=loader, report=reports.append)
    trimmed = compare(fused, small, loader)
    assert reports[-1].change == trimmed
    assert 0 < trimmed.rms <= 0.03
    assert trimmed.agreement > 0.9
    assert abs(trimmed.miou_after - trimmed.miou_before) < 0.1
    assert all(kernel.after == kernel.before or kernel.name.startswith("backbone") for kernel in reports[-1].kernels)


@pytest.mark.parametrize("features_only", [False, True])
def test_conversion_before_and_after_building_is_the_same(features_only):
    network = timm.create_model("convnext_atto", features_only=features_only, **NARROW)
    before = upernet(widefield.convert(network, widefield.MoRF((3, 7))))
    after = widefield.convert(upernet(network), widefield.MoRF((3, 7)))
    after.load_state_dict(before.state_dict())
    x = torch.randn(2, 3, 48, 65)
    with torch.no_grad():
        close(after.eval()(x), before.eval()(x), 0.0)


@pytest.mark.parametrize("build", [upernet, deeplab])
def test_both_memory_formats_agree_and_convolutions_in_heads_may_be_replaced(build):
    model = settled(build())
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    mixed = widefield.convert(model, widefield.MoRF((3, 5)), "decode_head.*bottleneck.conv").eval()
    x = torch.randn(2, 3, 64, 97)
    with torch.no_grad():
        expected = model(x)
        close(last(x.to(memory_format=torch.channels_last)), expected, NETWORK)
        close(mixed(x), expected, NETWORK)


def merged_and_exported(model, path):
    x = torch.randn(2, 3, 64, 96)
    fused = widefield.reparameterize(model, x)
    done = deploy.export(fused, path, x, dynamic=ANY_SIZE, tolerance=NETWORK)
    assert {check.shape[2:] for check in done.checks} == {(64, 96), (80, 144), (73, 85)}
    exported = deploy.load(path)
    for size in ((33, 47), (97, 161)):
        change = compare(model, exported, torch.randn(1, 3, *size))
        assert change.relative <= NETWORK
        assert change.agreement > 0.999


@pytest.mark.parametrize("suffix", [".onnx", pytest.param(".xml", marks=pytest.mark.slow)])
@pytest.mark.parametrize("build", [pytest.param(b, marks=[pytest.mark.slow] * (b is not upernet)) for b in BUILDERS])
def test_every_segmenter_is_exported_for_any_size(tmp_path, build, suffix):
    merged_and_exported(settled(build()), tmp_path / f"model{suffix}")


FAMILIES = [
    "morf_convnext_tiny", "replknet_31b", "unireplknet_a", "slak_tiny", "van_b0", "moganet_xtiny", "internimage_t",
    "hornet_tiny_7x7", "mobilenetv2_lk",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_upernet_on_every_family_is_exported_for_any_size(tmp_path, name):
    merged_and_exported(small(name), tmp_path / "model.onnx")


@pytest.mark.slow
def test_filters_of_one_size_are_refused_with_a_reason(tmp_path):
    model = small("hornet_tiny_gf")
    with pytest.raises(ValueError, match=r"no ONNX graph with a dynamic size: it computes .*fft.*pass dynamic="):
        deploy.export(model, tmp_path / "model.onnx", (2, 3, 64, 64), dynamic=ANY_SIZE)


@pytest.mark.slow
def test_eight_bits_for_any_size(tmp_path):
    model = small("morf_convnext_tiny")
    loader = labeled(model, (64, 96), (64, 96), (73, 85))
    fused = widefield.reparameterize(model, loader[0]["image"])
    done = deploy.quantize(fused, tmp_path / "int8.onnx", loader, dynamic=ANY_SIZE, compare_layers=0)
    assert done.change == compare(fused, deploy.load(tmp_path / "int8.onnx"), loader)
    assert done.change.agreement > 0.8
    assert done.change.miou_before > 0.5
    assert [flips.name for flips in done.flips]


@pytest.mark.slow
def test_compiled_with_symbolic_sizes(monkeypatch):
    """aot_eager traces with symbolic sizes as the default compiler does, without compiling C++."""
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    model = settled(upernet())
    compiled = torch.compile(model, dynamic=True, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for shape in ((2, 3, 64, 96), (3, 3, 73, 85)):
            x = torch.randn(shape)
            close(compiled(x), model(x), NETWORK)
