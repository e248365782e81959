"""Quantization to 8 bits: reported numbers equal onnxruntime's, and kernels that lose precision are found."""

import json
import math

import onnx
import pytest
import torch
from torch import nn

from widefield import deploy
from widefield.deploy.quantize import NOISY
from widefield.nn import MoRFConv2d


def network(routing="soft"):
    mixture = MoRFConv2d(8, 8, (3, 7), groups=8, routing=routing, **({"top_k": 1} if routing == "hard" else {})).eval()
    with torch.no_grad():
        for parameter in mixture.router.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), mixture.fuse(), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


def images(count=3):
    return [(torch.randn(8, 3, 12, 12), torch.randint(4, (8,))) for _ in range(count)]


def spiked(size, peak):
    conv = nn.Conv2d(2, 2, size, padding=size // 2, groups=2).eval()
    with torch.no_grad():
        conv.weight.fill_(1.0)
        conv.weight[:, :, size // 2, size // 2] = peak
    return conv


@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_what_is_told_is_what_the_file_computes(tmp_path, routing):
    model, held_out = network(routing), images()
    done = deploy.quantize(model, tmp_path / "int8.onnx", images(), images=held_out)
    exported = deploy.load(tmp_path / "int8.onnx")
    x, labels = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    with torch.no_grad():
        before, after = model(x), exported(x)
        assert after.shape == before.shape  # nothing inserted for measuring remains
    change = done.change
    assert change.images == 24
    assert change.agreement == (before.argmax(1) == after.argmax(1)).double().mean().item()
    assert change.accuracy_before == (before.argmax(1) == labels).double().mean().item()
    assert change.accuracy_after == (after.argmax(1) == labels).double().mean().item()
    assert change.rms == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-3)
    assert 0 < change.rms < 0.1
    assert [flips.name for flips in done.flips] == ["1"]
    assert done.bytes == (tmp_path / "int8.onnx").stat().st_size
    told = json.loads((tmp_path / "int8.onnx.json").read_text())
    assert told["change"]["rms"] == change.rms
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx", "int8.onnx.json"]
    graph = onnx.load(tmp_path / "int8.onnx").graph
    assert [value.name for value in graph.output] == ["output"]
    assert any(node.op_type == "QuantizeLinear" for node in graph.node)


def test_flips_are_counted(tmp_path, monkeypatch):
    model, x = network("hard"), torch.randn(8, 3, 12, 12)
    real = deploy.Runtime.__call__

    def turned(self, batch):  # half of the images use the other expert
        y, weights = real(self, batch)
        weights[:4] = weights[:4].flip(1)
        return y, weights

    monkeypatch.setattr(deploy.Runtime, "__call__", turned)
    done = deploy.quantize(model, tmp_path / "int8.onnx", [x])
    assert done.flip_rate == 0.5
    assert "routing flips for 50.00%" in str(done)


def test_signal_to_noise_of_a_kernel_is_what_rounding_does(tmp_path):
    done = deploy.quantize(spiked(9, 10.0), tmp_path / "a.onnx", [torch.randn(4, 2, 12, 12)])
    (kernel,) = done.kernels
    step = 10 / 127  # of the outlier; all other taps are 1
    noise = 80 * (1 - round(1 / step) * step) ** 2
    assert kernel.noise_ratio == pytest.approx(10 * math.log10((100 + 80) / noise), rel=1e-4)
    assert kernel.peak == pytest.approx(10 / math.sqrt(180 / 81), rel=1e-5)
    assert kernel.vanished == 0
    assert kernel.shape == (2, 1, 9, 9)
    assert done.outliers == ()


def test_outliers_are_warned_of_refused_or_kept_in_float(tmp_path, caplog):
    model = nn.Sequential(spiked(31, 300.0), nn.Conv2d(2, 3, 1)).eval()  # taps of 1 next to 300 round to 0
    x = [torch.randn(4, 2, 12, 12)]
    done = deploy.quantize(model, tmp_path / "warned.onnx", x)
    (worst,) = done.outliers
    assert (worst.name, worst.kept_float) == ("0", False)
    assert worst.noise_ratio < NOISY
    assert worst.vanished == pytest.approx(960 / 961)
    assert "1 kernels have outliers" in caplog.text
    assert "100 % of its taps round to 0" in caplog.text
    with pytest.raises(ValueError, match=r"0 \(20 dB, peak 31 times the rms, 100 % .*outliers='float' leaves"):
        deploy.quantize(model, tmp_path / "refused.onnx", x, outliers="refuse")
    assert not list(tmp_path.glob("refused*"))
    kept = deploy.quantize(model, tmp_path / "kept.onnx", x, outliers="float")
    assert kept.outliers[0].kept_float
    assert kept.change.rms < done.change.rms
    assert {row["computes in"] for row in kept.rows()} == {"float32", "int8"}


def test_a_kernel_that_rounding_leaves_alone_and_a_smaller_last_batch(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), nn.Conv2d(2, 3, 3)).eval()  # one tap per channel is exact
    ragged = [torch.randn(4, 2, 12, 12), torch.randn(1, 2, 12, 12)]
    for calibration in ("minmax", "entropy", "percentile"):
        done = deploy.quantize(model, tmp_path / "a.onnx", ragged, calibration=calibration)
        assert done.change.images == 5
        assert done.change.rms < 0.1
        assert done.kernels[0].noise_ratio is None
        assert done.by_noise[0] is done.kernels[1]
    told = json.loads((tmp_path / "a.onnx.json").read_text(), parse_constant=pytest.fail)
    assert told["kernels"][0]["noise_ratio"] is None


def test_several_outputs_keep_their_names(tmp_path, two_outputs):
    deploy.quantize(two_outputs, tmp_path / "a.onnx", [torch.randn(4, 3, 8, 8)])
    exported = deploy.load(tmp_path / "a.onnx")
    assert exported.outputs == ("map", "mean")
    assert [y.shape for y in exported(torch.randn(2, 3, 8, 8))] == [(2, 4, 6, 6), (2, 4)]


def test_what_cannot_be_quantized_is_refused(tmp_path):
    x = [torch.randn(4, 8, 12, 12)]
    with pytest.raises(ValueError, match=r"MoRFConv2d is not merged.*call reparameterize first"):
        deploy.quantize(MoRFConv2d(8, 8, (3, 5), groups=8).eval(), tmp_path / "a.onnx", x)
    with pytest.raises(RuntimeError, match="training mode"):
        deploy.quantize(nn.Conv2d(8, 8, 3), tmp_path / "a.onnx", x)
    conv = nn.Conv2d(8, 8, 3).eval()
    with pytest.raises(ValueError, match=r"suffix of path must be one of '.onnx'"):
        deploy.quantize(conv, tmp_path / "a.xml", x)
    with pytest.raises(ValueError, match="Did you mean 'minmax'"):
        deploy.quantize(conv, tmp_path / "a.onnx", x, calibration="min-max")
    with pytest.raises(TypeError, match="a generator runs out"):
        deploy.quantize(conv, tmp_path / "a.onnx", (batch for batch in x))
    with pytest.raises(ValueError, match="the loader gave no images"):
        deploy.quantize(conv, tmp_path / "a.onnx", [])
    with pytest.raises(ValueError, match="images must be finite; image 0 of 4"):
        deploy.quantize(conv, tmp_path / "a.onnx", [x[0] * torch.nan])
    assert not list(tmp_path.iterdir())
