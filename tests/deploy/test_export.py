"""Exported files compute the same as the model, in onnxruntime, PyTorch's archive and OpenVINO; and export errors."""

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import pytest
import torch
from onnx_ir.passes import PassError
from timm.layers import CondConv2d
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from tolerances import FLOAT32, NETWORK, close
from widefield import deploy
from widefield.deploy import _trace
from widefield.nn import DCNv3, DepthwiseConv2d, DynamicGMConv2d, MoRFConv2d
from widefield.surgery import fuse_layers

FORMATS = ("onnx", "pt2", "xml")


def mixture(**options):
    layer = MoRFConv2d(6, 6, (3, 5, (3, 2)), **{"groups": 6, **options}).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # otherwise the router starts with even weights
    return layer


def named(path):
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_network_with_mixtures_in_every_format(tmp_path, suffix):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), mixture(), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    fused, _ = fuse_layers(model.eval())
    path = tmp_path / f"model.{suffix}"
    done = deploy.export(fused, path, torch.randn(2, 3, 20, 24))
    exported = deploy.load(path)
    for batch in (1, 3, 8):
        x = torch.randn(batch, 3, 20, 24)
        with torch.no_grad():
            close(exported(x), fused(x), FLOAT32)
    assert [check.shape[0] for check in done.checks] == [1, 3, 8]
    assert done.relative <= FLOAT32
    assert all(check.agreement == 1 for check in done.checks)
    assert done.routing == "branches"


class SideBySide(nn.ModuleList):
    def forward(self, x):
        return [layer(x) for layer in self]


@pytest.mark.parametrize("routing", deploy.ROUTING)
@pytest.mark.parametrize("fused", [True, False])
def test_both_forms_of_a_mixture(tmp_path, routing, fused):
    layers = SideBySide(
        mixture(**options)
        for options in (
            {},
            {"routing": "hard", "top_k": 2},
            {"attention": "softmax", "stride": 2, "bias": False},
            {"groups": 1},
            {"groups": 2, "attention": "sigmoid"},
        )
    )
    if fused:
        layers = SideBySide(layer.fuse() for layer in layers)
    deploy.export(layers.eval(), tmp_path / "layers.onnx", torch.randn(2, 6, 9, 7), routing=routing)
    exported = deploy.load(tmp_path / "layers.onnx")
    for batch in (1, 3, 8):
        x = torch.randn(batch, 6, 9, 7)
        with torch.no_grad():
            for actual, expected in zip(exported(x), layers(x), strict=True):
                close(actual, expected, FLOAT32)
    assert ("Scan" in named(tmp_path / "layers.onnx")) == (routing != "branches")


@pytest.mark.parametrize("dynamic", [("batch",), ("batch", "size"), ()])
def test_the_blocked_form_of_depthwise_mixtures(tmp_path, dynamic):
    layers = nn.Sequential(
        MoRFConv2d(32, 32, (3, (3, 2), 7), groups=32),  # whole blocks
        MoRFConv2d(32, 32, (3, 5), groups=32, stride=2, bias=False),
        MoRFConv2d(32, 24, (3, 5), groups=8),  # not depthwise
        MoRFConv2d(24, 24, (3, 5), groups=24),  # not a multiple of 16
    ).eval()
    x = torch.randn(3, 32, 11, 9)
    done = deploy.export(layers, tmp_path / "layers.onnx", x, routing="blocked", dynamic=dynamic)
    assert done.routing == "blocked"
    assert done.relative <= FLOAT32
    assert done.operators.get("Scan", 0) == (0 if dynamic == () else 4)
    domains = [node.domain for node in nodes_of(onnx.load(tmp_path / "layers.onnx").graph) if node.op_type == "Conv"]
    each = len(x) if dynamic == () else 1  # a convolution for each image, or one in a loop
    assert domains == ["com.microsoft.nchwc"] * 2 * each + [""] * 2 * each


class ChannelsLast(nn.Module):
    """A mixture of which only the maps with channels last are read, or the others too, or whose result they are."""

    def __init__(self, ending):
        super().__init__()
        self.mixture, self.ending = MoRFConv2d(32, 32, (3, 5), groups=32), ending

    def forward(self, x):
        y = self.mixture(x)
        last = y.permute(0, 2, 3, 1)
        if self.ending == "output":
            return last
        normed = nn.functional.layer_norm(last, last.shape[-1:])
        return normed if self.ending == "read" else normed + y.sum((2, 3))[:, None, None]


@pytest.mark.parametrize(("ending", "left"), [("read", 0), ("both", 1), ("output", 1)])
@pytest.mark.parametrize("dynamic", [("batch",), ()])
def test_the_blocked_form_writes_channels_last_where_only_they_are_read(tmp_path, ending, left, dynamic):
    network = ChannelsLast(ending).eval()
    x = torch.randn(2 if dynamic else 1, 32, 9, 7)
    deploy.export(network, tmp_path / "maps.onnx", x, routing="blocked", dynamic=dynamic)
    exported = deploy.load(tmp_path / "maps.onnx")
    for batch in (1, 3) if dynamic else (1,):
        images = torch.randn(batch, 32, 9, 7)
        with torch.no_grad():
            close(exported(images), network(images), FLOAT32)
    graph = onnx.load(tmp_path / "maps.onnx").graph
    assert sum(node.op_type == "Transpose" for node in graph.node) == left
    made = {name for node in nodes_of(graph) for name in node.input}
    assert {value.name for value in graph.initializer} <= made


def nodes_of(graph):
    """Yield the nodes of a graph and of the graphs inside of them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g)


@pytest.mark.parametrize("name", ["layer.xml", "layer.pt2"])
def test_the_blocked_form_is_for_onnxruntime_only(tmp_path, name):
    with pytest.raises(ValueError, match="routing='blocked' is a layout of onnxruntime"):
        deploy.export(mixture(), tmp_path / name, torch.randn(2, 6, 9, 7), routing="blocked")


@pytest.mark.parametrize(("batch", "convolutions"), [(1, 1), (2, 2), (32, 32), (33, 1)])
def test_openvino_mixes_kernels_without_a_loop_if_the_batch_is_fixed(tmp_path, batch, convolutions):
    pytest.importorskip("openvino")
    layer = MoRFConv2d(32, 32, (3, 5), groups=32).eval()
    done = deploy.export(layer, tmp_path / "m.xml", torch.randn(batch, 32, 9, 8), routing="per-sample", dynamic=())
    assert done.relative <= FLOAT32
    assert done.operators["GroupConvolution"] == convolutions
    assert "TensorIterator" not in done.operators


def test_norms_folded_into_a_mixture_stay(tmp_path):
    norm = nn.BatchNorm2d(6).eval()
    with torch.no_grad():
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            tensor.uniform_(0.5, 1.5)
    layer = mixture().fuse(norm)
    for routing in deploy.ROUTING:
        done = deploy.export(layer, tmp_path / "layer.onnx", torch.randn(2, 6, 9, 7), routing=routing)
        assert done.relative <= FLOAT32


def test_masks_that_depend_on_the_image_and_other_peoples_routing(tmp_path):
    masked = DynamicGMConv2d(4, 4, 5, padding=2, groups=4, sigma=2.0).eval()
    nn.init.normal_(masked.predictor.out.weight)
    assert deploy.export(masked, tmp_path / "masked.onnx", torch.randn(2, 4, 9, 8)).relative <= FLOAT32
    assert "Scan" in named(tmp_path / "masked.onnx")

    class Conditional(nn.Module):  # a small version of timm's EfficientNet-CC
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(4, 3)
            self.conv = CondConv2d(4, 6, 3, padding=1, bias=True, num_experts=3)

        def forward(self, x):
            return self.conv(x, self.router(x.mean((2, 3))).sigmoid())

    assert deploy.export(Conditional().eval(), tmp_path / "cond.onnx", torch.randn(2, 4, 9, 8)).relative <= FLOAT32


def test_a_graph_that_the_optimizer_fails_on_is_written_without_it(tmp_path, monkeypatch):
    def fail(self):
        raise PassError("as on the splits of RAFT")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "optimize", fail)
    done = deploy.export(nn.Conv2d(3, 4, 3).eval(), tmp_path / "a.onnx", torch.randn(2, 3, 9, 9))
    assert done.operators["Conv"] == 1
    assert done.relative < NETWORK


def test_operators_of_ours_become_plain_nodes(tmp_path):
    model = nn.Sequential(
        DepthwiseConv2d(4, 4, 13, padding="same", backend="direct"),
        DepthwiseConv2d(4, 4, 31, padding="same", backend="fft"),
    ).eval()
    twin = nn.Sequential(DepthwiseConv2d(4, 4, 13, padding="same"), DepthwiseConv2d(4, 4, 31, padding="same")).eval()
    twin.load_state_dict(model.state_dict())
    assert deploy.export(twin, tmp_path / "a.onnx", torch.randn(2, 4, 9, 9)).operators == {"Conv": 2}
    archive = deploy.export(twin, tmp_path / "a.pt2", torch.randn(2, 4, 9, 9))
    assert not any("widefield" in name for name in archive.operators)


def test_deformable_sampling_is_the_runtimes_own(tmp_path):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.sampling = DCNv3(8, groups=2)

        def forward(self, x):
            return self.sampling(x.permute(0, 2, 3, 1))

    model = Network().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    done = deploy.export(model, tmp_path / "deformable.onnx", torch.randn(2, 8, 9, 7))
    assert done.relative <= FLOAT32
    assert "GridSample" in done.operators
    assert model.sampling.backend == "auto"


def test_a_dynamic_size_is_verified_at_three(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    done = deploy.export(model, tmp_path / "any.onnx", torch.randn(2, 3, 16, 20), dynamic=("batch", "size"))
    assert {check.shape[2:] for check in done.checks} == {(16, 20), (20, 30), (19, 19)}
    images = onnx.load(tmp_path / "any.onnx").graph.input[0]
    sizes = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, "height", "width"]


@pytest.mark.parametrize("routing", deploy.ROUTING)
def test_a_dynamic_size_of_networks_with_strides_and_mixtures(tmp_path, routing):
    model = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), mixture(), nn.BatchNorm2d(6), nn.MaxPool2d(3, 2, 1)).eval()
    fused, _ = fuse_layers(model)
    example = torch.randn(1, 3, 32, 24)
    done = deploy.export(fused, tmp_path / "any.onnx", example, dynamic=("size", "batch"), routing=routing)
    assert done.relative <= FLOAT32
    assert {check.shape[2:] for check in done.checks} == {(32, 24), (40, 36), (37, 21)}
    assert vars(example) == {}  # torch.export writes to its example
    small = torch.randn(2, 3, 9, 12)  # much of the kernel falls outside this map
    with torch.no_grad():
        close(deploy.load(tmp_path / "any.onnx")(small), fused(small), FLOAT32)


def test_a_fixed_batch(tmp_path):
    model = nn.Conv2d(3, 4, 3).eval()
    done = deploy.export(model, tmp_path / "fixed.onnx", torch.randn(5, 3, 8, 8), dynamic=())
    assert [check.shape for check in done.checks] == [(5, 3, 8, 8)]
    with pytest.raises(ValueError, match=r"does not run on images of \(2, 3, 8, 8\)"):
        deploy.load(tmp_path / "fixed.onnx")(torch.randn(2, 3, 8, 8))


def test_several_outputs(tmp_path, two_outputs):
    model, x = two_outputs, torch.randn(3, 3, 8, 8)
    for suffix in FORMATS:
        done = deploy.export(model, tmp_path / f"two.{suffix}", x)
        first, second = deploy.load(tmp_path / f"two.{suffix}")(x)
        close(first, model(x)["map"], FLOAT32)
        close(second, model(x)["mean"], FLOAT32)
        assert done.checks[0].agreement is None
        assert done.outputs == (() if suffix == "pt2" else ("map", "mean"))


def test_the_proof_beside_the_file(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    model.pretrained_cfg = {"architecture": "tiny", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
    images = [(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long))] * 2
    done = deploy.export(model, tmp_path / "net.onnx", torch.randn(2, 3, 32, 32), loader=images, throughput=(2,))
    told = json.loads((tmp_path / "net.onnx.json").read_text())
    assert told["model"] == "tiny"
    assert told["files"] == {"net.onnx": hashlib.sha256((tmp_path / "net.onnx").read_bytes()).hexdigest()}
    assert told["bytes"] == (tmp_path / "net.onnx").stat().st_size
    assert told["input"]["dynamic"] == ["batch"]
    assert told["input"]["mean"] == list(model.pretrained_cfg["mean"])
    assert [(check["shape"][0], check["images"]) for check in told["checks"]] == [(1, 1), (3, 3), (8, 8), (4, 8)]
    assert max(check["relative"] for check in told["checks"]) == done.relative <= NETWORK
    assert {"torch", "onnx", "onnxruntime", "date"} <= set(told["environment"])
    assert {row["way"] for row in told["throughput"]} == {"eager", "compiled", "onnx"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.onnx.json"]


def test_the_model_is_left_alone(tmp_path):
    layer = mixture().fuse()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    deploy.export(layer, tmp_path / "layer.onnx", torch.randn(2, 6, 9, 7))
    assert layer.backend == "auto"
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


class FixedBatch(Branching):
    def forward(self, x):
        return self.conv(x).view(2, -1)


class FixedSize(Branching):
    def forward(self, x):
        return self.conv(x) + torch.ones(6, 6)


class Eigenvalues(Branching):
    def forward(self, x):
        return torch.linalg.eigvalsh(self.conv(x)[..., :4, :4])


REFUSED = [
    (Branching(), {}, ValueError, "Branching cannot be traced by torch.export: Could not guard"),
    (FixedBatch(), {}, ValueError, r"no graph with a dynamic batch: .*pass dynamic=\(\) and an example"),
    (FixedSize(), {"dynamic": ("batch", "size")}, ValueError, r"height 8 and width 8 only.*dynamic=\('batch',\)"),
    (Eigenvalues(), {}, ValueError, "no form in ONNX: there is none of the operator aten._linalg_eigh"),
    (nn.Conv2d(3, 4, 3).train(), {}, RuntimeError, "Conv2d is in training mode: call model.eval"),
    (nn.Conv2d(3, 4, 3).double(), {}, TypeError, r"this one has torch.float64: call model.float"),
    (nn.Conv2d(3, 4, 3), {"dynamic": "bath"}, ValueError, "Did you mean 'batch'"),
    (nn.Conv2d(3, 4, 3), {"routing": "branch"}, ValueError, "Did you mean 'branches'"),
    (nn.Conv2d(3, 4, 3), {"opset": 3}, ValueError, "opset must be from 18"),
    (nn.Conv2d(3, 4, 3), {"dynamic": (), "throughput": (9,)}, ValueError, "batch size is fixed to 2"),
    (nn.Conv2d(3, 4, 3), {"tolerance": float("inf")}, ValueError, "tolerance must be from 0"),
    (nn.Conv2d(3, 4, 3), {"normalization": ((0.5,), (0.5,))}, ValueError, "a mean and a std for each of 3 channels"),
    (nn.Conv2d(3, 4, 3), {"normalization": ((0.5,) * 3, (0.0, 1, 1))}, ValueError, "std above 0"),
]


@pytest.mark.parametrize(("model", "options", "kind", "match"), REFUSED, ids=lambda v: getattr(v, "__name__", None))
def test_what_cannot_be_exported_is_refused_and_leaves_no_file(tmp_path, model, options, kind, match):
    if kind is not RuntimeError:
        model.eval()
    with pytest.raises(kind, match=match):
        deploy.export(model, tmp_path / "x.onnx", torch.randn(2, 3, 8, 8), **options)
    assert not list(tmp_path.iterdir())


def test_an_export_that_differs_is_no_export(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy.Runtime, "__call__", lambda self, x: torch.zeros(len(x), 4, 6, 6))
    kept = tmp_path / "x.onnx"
    kept.write_bytes(b"what was there before")
    with pytest.raises(RuntimeError, match=r"differ by 1.00e\+00 of their scale.*Nothing was written"):
        deploy.export(nn.Conv2d(3, 4, 3).eval(), kept, torch.randn(2, 3, 8, 8))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"what was there before"]


def test_the_proof_is_against_the_model_not_against_what_was_made_of_it(tmp_path, monkeypatch):
    right = _trace._Branches.forward
    monkeypatch.setattr(_trace._Branches, "forward", lambda self, x: 2 * right(self, x) + 1)
    with pytest.raises(RuntimeError, match="does not compute the same as the model"):
        deploy.export(mixture().fuse(), tmp_path / "x.onnx", torch.randn(2, 6, 9, 7))
    assert not list(tmp_path.iterdir())


def test_a_wrong_output_beside_a_larger_one_is_seen(tmp_path, monkeypatch):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x).mean((2, 3))
            return {"boxes": 1e4 * y, "score": y.sigmoid()}

    real = deploy.Runtime.__call__
    monkeypatch.setattr(deploy.Runtime, "__call__", lambda self, x: (real(self, x)[0], real(self, x)[1] + 0.05))
    with pytest.raises(RuntimeError, match="does not compute the same as the model"):
        deploy.export(Two().eval(), tmp_path / "x.onnx", torch.randn(2, 3, 8, 8))


def test_names_of_inputs_and_outputs(tmp_path):
    class Clash(nn.Module):
        def __init__(self):
            super().__init__()
            self.images, self.output = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x):
            return x * self.images + self.output

    done = deploy.export(Clash().eval(), tmp_path / "clash.onnx", torch.randn(2, 3, 8, 8))
    assert done.outputs == ("output",)
    assert onnx.load(tmp_path / "clash.onnx").graph.input[0].name == "images"


def test_what_wraps_a_network_is_taken_off(tmp_path):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(2, 3, 8, 8)
    for wrapped in (torch.compile(model), nn.DataParallel(model).eval()):
        done = deploy.export(wrapped, tmp_path / "x.onnx", x)
        assert (done.model, done.relative <= FLOAT32) == ("Sequential", True)


def test_copies_stay_in_evaluation_mode_and_closures_are_refused(tmp_path):
    model = create_feature_extractor(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), ["1"]).eval()
    x = torch.randn(2, 3, 8, 8)  # copies of torchvision's extractors start in training mode
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).running_mean.normal_()
        deploy.export(model, tmp_path / "x.onnx", x)
        close(deploy.load(tmp_path / "x.onnx")(x), model(x)["1"], FLOAT32)
    conv = nn.Conv2d(3, 4, 3).eval()
    forward = conv.forward
    conv.forward = lambda x: 2 * forward(x)
    with pytest.raises(ValueError, match="was replaced with a function"):
        deploy.export(conv, tmp_path / "y.onnx", x)


def test_threads_export_one_after_the_other(tmp_path):
    def one(index):
        return deploy.export(nn.Conv2d(3, 4, 3).eval(), tmp_path / f"{index}.pt2", torch.randn(2, 3, 8, 8)).relative

    with ThreadPoolExecutor(3) as pool:
        assert max(pool.map(one, range(3))) <= FLOAT32
    assert logging.root.manager.disable == logging.NOTSET


def test_weights_of_a_larger_model_do_not_stay_behind(tmp_path):
    (tmp_path / "x.onnx.data").touch()
    deploy.export(nn.Conv2d(3, 4, 3).eval(), tmp_path / "x.onnx", torch.randn(2, 3, 8, 8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.onnx", "x.onnx.json"]


def test_paths(tmp_path):
    model, x = nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"suffix of path must be one of '.onnx', '.pt2', '.xml'; got '.onx'"):
        deploy.export(model, tmp_path / "x.onx", x)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        deploy.export(model, tmp_path / "file" / "x.onnx", x)
    assert deploy.export(model, tmp_path / "new" / "folder" / "x.onnx", x).path == "x.onnx"
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "x.onnx").mkdir()  # a folder has the name of the file
    with pytest.raises(OSError, match=r"x\.onnx"):
        deploy.export(model, locked / "x.onnx", x)
    assert [path.name for path in locked.iterdir()] == ["x.onnx"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_files_that_are_not_whole(tmp_path, suffix):
    whole = tmp_path / f"x.{suffix}"
    deploy.export(nn.Conv2d(3, 4, 3).eval(), whole, torch.randn(2, 3, 8, 8))
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"is not a whole \w+ model \(\d+ bytes\).*Export it anew"):
        deploy.load(whole)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        deploy.load(Path(f"nowhere.{suffix}"))
    with pytest.raises(ValueError, match="suffix of path"):
        deploy.load("x.txt")


def test_loaded_models_say_what_they_cannot_take(tmp_path):
    deploy.export(nn.Conv2d(3, 4, 3).eval(), tmp_path / "x.onnx", torch.randn(2, 3, 8, 8))
    exported = deploy.load(tmp_path / "x.onnx", threads=1)
    with pytest.raises(TypeError, match="images must be float32"):
        exported(torch.zeros(1, 3, 8, 8, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"does not run on images of \(1, 4, 8, 8\)"):
        exported(torch.zeros(1, 4, 8, 8))


def test_layers_that_would_merge_are_named(tmp_path, caplog):
    layer = mixture()
    deploy.export(layer, tmp_path / "layer.onnx", torch.randn(2, 6, 9, 7))
    assert "1 layers are exported in their training form (MoRFConv2d, ...): reparameterize first" in caplog.text


class ChangesViews(nn.Module):
    """Change parts of maps of two sizes in place. The exporter's graph then has unknown sizes."""

    def forward(self, x):
        large, small = x + 1, nn.functional.avg_pool2d(x, 2) + 1
        large[..., 1:, 1:].clamp_(max=0.5)
        small[..., 2:, 2:].clamp_(max=0.5)
        return large.mean((2, 3)) + small.mean((2, 3))


def test_sizes_that_are_not_known_have_no_name(tmp_path):
    """Runtimes treat sizes of the same name as equal, and overwrite one tensor with another."""
    deploy.export(ChangesViews().eval(), tmp_path / "model.onnx", torch.randn(2, 3, 12, 12))
    graph = onnx.load(tmp_path / "model.onnx").graph
    named = {dim.dim_param for value in graph.value_info for dim in value.type.tensor_type.shape.dim}
    assert named <= {"batch", ""}
