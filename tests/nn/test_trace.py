"""torch.jit.trace records plain PyTorch, without warnings, for batches and maps of any size."""

import io

import onnxruntime
import pytest
import timm
import torch
from test_autograd import shaken
from torch import nn

from tolerances import FLOAT32, NETWORK, close
from widefield.nn import (
    GRN,
    LKA,
    DeformConv2d,
    DepthwiseConv2d,
    DynamicGMConv2d,
    GMConv2d,
    GnConv,
    MoRFConv2d,
    SameAligned,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")

LAYERS = {
    "depthwise": lambda: DepthwiseConv2d(8, 8, 7, padding="same"),
    "depthwise even": lambda: DepthwiseConv2d(8, 8, 4, padding="same"),
    "depthwise strided": lambda: DepthwiseConv2d(8, 8, 15, stride=2, padding=7),
    "reflected": lambda: DepthwiseConv2d(8, 8, 5, padding=2, padding_mode="reflect"),
    "soft": lambda: MoRFConv2d(8, 8, (3, 5, 31), groups=8),
    "dense": lambda: MoRFConv2d(8, 12, (3, 5), groups=2, stride=2),
    "of one kind": lambda: MoRFConv2d(8, 8, (3, 3, 3, 3), groups=8),
    "hard": lambda: MoRFConv2d(8, 8, (3, 5, 7), groups=8, routing="hard"),
    "hard dense": lambda: MoRFConv2d(8, 8, (3, 5, 7), routing="hard"),
    "branches": lambda: MoRFConv2d(8, 8, (3, 5), groups=8, routing="hard", backend="branches"),
    "fused": lambda: MoRFConv2d(8, 8, (3, 5, (3, 3)), groups=8).eval().fuse(),
    "fused hard": lambda: MoRFConv2d(8, 8, (3, 5, (3, 3)), groups=8, routing="hard").eval().fuse(),
    "masked": lambda: GMConv2d(8, 8, 5, padding=2, groups=8),
    "dynamic": lambda: shaken(DynamicGMConv2d(8, 8, 5, padding=2, groups=8)),
    "dynamic dense": lambda: shaken(DynamicGMConv2d(8, 6, 4, padding="same")),
    "deformable": lambda: shaken(DeformConv2d(8, 8, 3, padding=1, groups=2)),
    "deformable gated": lambda: shaken(DeformConv2d(8, 8, 3, 2, padding=1, center_feature_scale=True)),
    "deformable gather": lambda: shaken(DeformConv2d(8, 8, 3, padding=1, groups=2, backend="gather")),
    "aligned": lambda: SameAligned(MoRFConv2d(8, 8, (3, 5), stride=2, groups=8), 2),
    "aligned deformable": lambda: SameAligned(shaken(DeformConv2d(8, 8, 3, 3, padding=1)), 3),
    "gated": lambda: GnConv(8, 2, global_filter=(9, 5)),
    "attention": lambda: LKA(8),
    "normalized": lambda: nn.Sequential(GRN(8)),
}


def traced(layer, x):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, x), buffer)  # fails for graphs with Python calls
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    assert "widefield::" not in str(loaded.inlined_graph)
    return loaded


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_traces_serve_every_batch_and_map(name, layout, learning):
    layer = LAYERS[name]().eval()

    def images(batch, rows, columns):
        x = torch.randn(batch, 8, rows, columns).contiguous(memory_format=layout)
        return x.permute(0, 2, 3, 1) if name == "normalized" else x

    with torch.set_grad_enabled(learning):
        trace = traced(layer, images(2, 9, 8))
        for batch, size in ((1, (9, 8)), (3, (9, 8)), (1, (12, 15))):
            x = images(batch, *size)
            close(trace(x), layer(x), 10 * FLOAT32)


def test_traces_can_be_trained():
    layer = MoRFConv2d(8, 8, (3, 5), groups=8)
    trace, x = torch.jit.trace(layer, torch.randn(2, 8, 6, 6)), torch.randn(3, 8, 6, 6, requires_grad=True)
    actual = torch.autograd.grad(trace(x).square().sum(), [x, *layer.expert_weights])
    expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.expert_weights])
    for a, b in zip(actual, expected, strict=True):
        close(a, b, 10 * FLOAT32)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # from timm's own checks
@pytest.mark.parametrize("name", ["morf_resnet18", "morf_convnext_tiny"])
def test_traces_of_networks_serve_every_batch(name):
    model = timm.create_model(name, num_classes=5).eval()
    with torch.no_grad():
        trace = traced(model, torch.randn(2, 3, 32, 32))
        for batch in (1, 3):
            x = torch.randn(batch, 3, 32, 32)
            close(trace(x), model(x), NETWORK)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_torchs_older_exporter_to_onnx_serves_every_batch_and_map(name):
    layer, file = LAYERS[name]().eval(), io.BytesIO()
    if name in ("reflected", "gated", "normalized"):
        pytest.skip("what it is made of is not exported for maps of any size")
    x = torch.randn(2, 8, 9, 8)
    axes = {"x": {0: "batch", 2: "rows", 3: "columns"}}
    torch.onnx.export(layer, (x,), file, dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(file.getvalue())
    for size in ((1, 9, 8), (3, 12, 15)):
        x = torch.randn(size[0], 8, *size[1:])
        close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), layer(x), 10 * FLOAT32)
