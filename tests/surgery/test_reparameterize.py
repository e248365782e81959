import json
import logging

import pytest
import timm
import torch
from test_convert import unsettled
from test_folded_networks import shaken_a_little
from timm.layers import BatchNormAct2d
from timm.utils import reparameterize_model
from torch import nn

import widefield
from tolerances import FLOAT32, NETWORK, close
from widefield.nn import FusedMoRFConv2d, LargeKernelConv2d, MoRFConv2d
from widefield.surgery.folding import is_norm
from widefield.surgery.reparameterize import FusedLayer


def count(model, kind):
    return sum(isinstance(m, kind) for m in model.modules())


SMALL = {
    "morf_convnext_tiny": {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)},
    "morf_resnet18": {"layers": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("routing", ["soft", "hard"])
@pytest.mark.parametrize("name", SMALL)
def test_timms_own_function_and_ours_agree_with_the_unfused_model(name, routing):
    model = unsettled(timm.create_model(name, routing=routing, num_classes=10, **SMALL[name]))
    x = torch.randn(2, 3, 64, 64)
    for fused in (reparameterize_model(model), widefield.reparameterize(model, x)):
        assert count(fused, MoRFConv2d) == 0
        assert count(fused, FusedMoRFConv2d) == count(model, MoRFConv2d)
        assert widefield.compare(model, fused, x).relative < NETWORK
    assert count(model, MoRFConv2d) > 0


def test_batch_norms_behind_mixtures_are_folded():
    model = unsettled(timm.create_model("morf_resnet18", num_classes=10, **SMALL["morf_resnet18"]))
    fused = widefield.reparameterize(model, torch.randn(1, 3, 64, 64))
    # Every block has two mixtures, each followed by its norm. Those of the stem and the three shortcuts follow
    # convolutions.
    assert count(model, nn.BatchNorm2d) == 12
    assert count(fused, nn.BatchNorm2d) == 0
    assert sum(m.shift is not None for m in fused.modules() if isinstance(m, FusedMoRFConv2d)) == 8
    assert widefield.compare(model, fused, torch.randn(2, 3, 64, 64)).relative < NETWORK


class Residual(nn.Module):
    """A mixture whose output is read by its norm and by other code, so the norm must stay."""

    def __init__(self):
        super().__init__()
        self.mix, self.norm = MoRFConv2d(4, 4, (3, 5)), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.mix(x)
        return self.norm(y) + y


class Twice(nn.Module):
    """One mixture read by two norms, and one norm that reads two mixtures."""

    def __init__(self):
        super().__init__()
        self.a, self.b = MoRFConv2d(4, 4, (3, 5)), MoRFConv2d(4, 4, (3, 5))
        self.n, self.m = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.a(x)
        return self.n(y) + self.m(y) + self.n(self.b(x))


class Returned(nn.Module):
    """The mixture's output is itself a result."""

    def __init__(self):
        super().__init__()
        self.mix, self.norm = MoRFConv2d(4, 4, (3, 5)), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.mix(x)
        return self.norm(y), {"features": y}


@pytest.mark.parametrize("kind", [Residual, Twice, Returned])
def test_a_norm_that_is_not_alone_is_not_folded(kind):
    model = unsettled(kind())
    fused = widefield.reparameterize(model)
    assert count(fused, nn.BatchNorm2d) == count(model, nn.BatchNorm2d)
    assert widefield.compare(model, fused, torch.randn(2, 4, 8, 8)).relative < FLOAT32


def test_timms_norms_with_activation_are_folded_and_keep_it():
    model = unsettled(timm.create_model("regnetx_002", num_classes=5))
    mixture = widefield.convert(model, widefield.MoRF((3, 5)))
    reports = []
    fused = widefield.reparameterize(mixture, torch.randn(1, 3, 64, 64), report=reports.append)
    assert count(fused, BatchNormAct2d) == 0
    assert reports[0].counts() == {
        "convolution + BatchNormAct2d": count(mixture, BatchNormAct2d) - count(mixture, MoRFConv2d),
        "mixture + BatchNormAct2d": count(mixture, MoRFConv2d),
    }
    assert widefield.compare(model, fused, torch.randn(2, 3, 64, 64)).relative < NETWORK


@pytest.mark.parametrize(("report", "passes"), [(None, 2), (id, 4)])
def test_verification_takes_a_pass_before_and_one_after(report, passes, monkeypatch):
    """One watches all norms and gives the outputs to compare with; a report counts costs before and after."""
    calls = []
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3))).eval()
    plain = nn.Sequential.forward

    def forward(self, x):
        calls.extend([self] if len(self) == 3 and isinstance(self[0], nn.Sequential) else [])
        return plain(self, x)

    monkeypatch.setattr(nn.Sequential, "forward", forward)
    fused = widefield.reparameterize(model, torch.randn(2, 3, 8, 8), report=report)
    assert count(fused, nn.BatchNorm2d) == 0
    assert len(calls) == passes


def test_the_root_is_fused():
    layer = MoRFConv2d(4, 4, (3, 5)).eval()
    fused = widefield.reparameterize(layer)
    assert isinstance(fused, FusedMoRFConv2d)
    x = torch.randn(2, 4, 8, 8)
    close(fused(x), layer(x), FLOAT32)


def test_timms_own_mergeable_blocks_are_fused_too():
    model = unsettled(timm.create_model("mobileone_s0", num_classes=10))
    fused = widefield.reparameterize(model, torch.randn(1, 3, 64, 64))
    assert sum(p.numel() for p in fused.parameters()) < sum(p.numel() for p in model.parameters())
    assert widefield.compare(model, fused, torch.randn(2, 3, 64, 64)).relative < NETWORK


def test_an_output_that_changes_is_an_error_and_the_model_stays():
    class Broken(nn.Module):
        def forward(self, x):
            return x

        def fuse(self):
            return nn.Sequential(nn.LeakyReLU(0.5))

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Broken()).eval()
    with pytest.raises(RuntimeError, match=r"changed the outputs by .* tolerance=1e-04. Look at: 1"):
        widefield.reparameterize(model)
    assert isinstance(model[1], Broken)
    assert isinstance(widefield.reparameterize(model, tolerance=10.0)[1], nn.Sequential)


def test_a_layer_that_the_network_hides_is_verified_all_the_same(monkeypatch):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = MoRFConv2d(4, 4, (3, 5))

        def forward(self, x):
            return x + 0 * self.mix(x)

    fuse = MoRFConv2d.fuse

    def wrong(self, norm=None):
        fused = fuse(self, norm)
        fused.bank.data *= 1.01
        return fused

    monkeypatch.setattr(MoRFConv2d, "fuse", wrong)
    with pytest.raises(RuntimeError, match=r"single layers by up to .* Look at: mix"):
        widefield.reparameterize(Hidden().eval())


class Outputs(nn.Module):
    def __init__(self, *values):
        super().__init__()
        self.values = values

    def forward(self, x):
        return self.values if len(self.values) > 1 else self.values[0]


def test_compare_measures_the_worst_tensor_and_refuses_what_it_cannot_compare():
    x, nan, one = torch.zeros(1), torch.full((2,), torch.nan), torch.ones(2)
    assert widefield.compare(Outputs(1e6 * one, one), Outputs(1e6 * one, 2 * one), x).relative == 1
    assert widefield.compare(Outputs(one, one), Outputs(one, nan), x).max_abs == float("inf")
    for first, second in (
        (Outputs(torch.ones(4, 3)), Outputs(torch.ones(1, 3))),
        (Outputs("text"), Outputs("text")),
        (Outputs(one, one), Outputs(one)),
    ):
        with pytest.raises(ValueError, match="cannot be compared"):
            widefield.compare(first, second, x)
    with pytest.raises(ValueError, match="not finite"):
        widefield.compare(Outputs(nan), Outputs(one), x)


def test_hooks_are_not_lost_in_silence():
    model = nn.Sequential(MoRFConv2d(4, 4, (3, 5))).eval()
    model[0].register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="0 has hooks"):
        widefield.reparameterize(model)
    model = nn.Sequential(LargeKernelConv2d(4, 4, 5, small=3)).eval()
    model[0].lkb_origin.conv.register_forward_pre_hook(lambda *a: None)
    with pytest.raises(ValueError, match=r"0\.lkb_origin\.conv has hooks"):
        widefield.reparameterize(model)


def test_a_fuse_of_another_kind_is_nobodys_business():
    class Attention(nn.Module):
        def fuse(self, a, b):
            return a + b

        def forward(self, x):
            return x

    fused = widefield.reparameterize(nn.Sequential(MoRFConv2d(4, 4, (3, 5)), Attention()).eval())
    assert isinstance(fused[1], Attention)


def test_the_example_has_the_channels_of_the_model():
    model = timm.create_model("morf_convnext_tiny", in_chans=1, num_classes=3, **SMALL["morf_convnext_tiny"]).eval()
    assert count(widefield.reparameterize(model), MoRFConv2d) == 0


def test_what_cannot_be_done_is_refused_with_the_mend():
    model = nn.Sequential(MoRFConv2d(4, 4, (3, 5)))
    with pytest.raises(RuntimeError, match=r"0 is in training mode|Sequential is in training mode"):
        widefield.reparameterize(model)
    model.eval()[0].train()
    with pytest.raises(RuntimeError, match=r"0 is in training mode: call model.eval\(\)"):
        widefield.reparameterize(model)
    with pytest.raises(ValueError, match="nothing to fuse"):
        widefield.reparameterize(nn.Sequential(nn.Conv2d(3, 3, 3)).eval())
    with pytest.raises(ValueError, match="nothing to fuse"):
        widefield.reparameterize(nn.Sequential(nn.Conv2d(3, 3, 3), nn.InstanceNorm2d(3)).eval())
    with pytest.raises(ValueError, match="pass example_input"):
        widefield.reparameterize(nn.Sequential(MoRFConv2d(3, 4, (3,)), nn.Flatten(), nn.Linear(7, 2)).eval())
    with pytest.raises(ValueError, match="pass example_input"):
        widefield.reparameterize(nn.Linear(3, 3).eval())
    with pytest.raises(ValueError, match="not finite"):
        widefield.reparameterize(model.eval(), torch.full((1, 4, 5, 5), float("nan")))
    with pytest.raises(TypeError, match="tolerance"):
        widefield.reparameterize(model.eval(), tolerance="small")


def test_example_input_inplace_and_report(caplog):
    model = nn.Sequential(MoRFConv2d(3, 4, (3, 5)), nn.Flatten(), nn.Linear(4 * 25, 2)).eval()
    with caplog.at_level(logging.INFO, "widefield"):
        fused = widefield.reparameterize(model, torch.randn(1, 3, 5, 5), inplace=True)
    assert fused is model
    assert isinstance(model[0], FusedMoRFConv2d)
    assert "Sequential: fused 1 layer (1 mixture)" in caplog.text
    assert not model[0]._forward_hooks


# The report


def test_the_report_says_it_all(caplog):
    model, reports = shaken_a_little(timm.create_model("resnet18", num_classes=5)), []
    with caplog.at_level(logging.INFO, "widefield"):
        widefield.reparameterize(model, torch.randn(1, 3, 32, 32), report=reports.append)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("widefield")]
    assert line.startswith("ResNet: fused 20 layers (20 convolution + BatchNorm2d); outputs differ by ")
    assert "layer1" not in line
    (report,) = reports
    norms = sum(m.num_features for m in model.modules() if is_norm(m))
    assert report.before.parameters - report.after.parameters == norms  # two numbers per channel became one
    assert report.before.macs == report.after.macs > 0
    assert (
        report.difference
        == widefield.compare(
            model, widefield.reparameterize(model, torch.randn(1, 3, 32, 32)), torch.randn(1, 3, 32, 32)
        )
        or report.difference.relative < report.tolerance
    )
    assert report.fused[0] == FusedLayer(
        "conv1", "bn1", "convolution + BatchNorm2d", "Conv2d", "Conv2d", report.fused[0].difference
    )
    assert report.worst.difference.relative == max(layer.difference.relative for layer in report.fused)
    rows = report.rows()
    assert len(rows) == 20
    assert {frozenset(row) for row in rows} == {frozenset(rows[0])}
    assert all(isinstance(value, str) for row in rows for value in row.values())
    assert json.loads(json.dumps(report.to_dict()))["before"] == {
        "parameters": report.before.parameters, "macs": report.before.macs, "uncounted": []
    }  # fmt: skip
    assert "20 layers" in str(report)
    assert "| layer4.1.conv2 |" in str(report)


def test_a_report_of_what_was_not_reached():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = MoRFConv2d(3, 4, (3,)), MoRFConv2d(3, 4, (3,))

        def forward(self, x):
            return self.used(x)

    reports = []
    fused = widefield.reparameterize(Skipping().eval(), report=reports.append)
    assert [layer.difference is None for layer in reports[0].fused] == [False, True]
    assert count(fused, FusedMoRFConv2d) == 2


def test_a_model_that_reads_a_norm_as_it_runs_fails_with_the_reason():
    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x)) * self.norm.num_features

    with pytest.raises(RuntimeError, match=r"no longer runs with its layers fused \(AttributeError: .*num_features"):
        widefield.reparameterize(Peeking().eval())


class Ranks(nn.Module):
    """Returns an integer, like a ranking, that changes as soon as the norm is folded."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)

    def forward(self, x):
        y = self.norm(self.conv(x)).flatten(1)
        turned = (self.norm.__class__ is not nn.BatchNorm2d) * torch.ones(len(x), dtype=torch.long)
        return y, turned


def test_a_ranking_that_turns_is_told_from_roundings_that_grow():
    with pytest.raises(RuntimeError, match="Each layer alone is within it, and an output of integers differs") as told:
        widefield.reparameterize(Ranks().eval(), torch.randn(2, 1, 3, 3))
    assert "float64" not in str(told.value)


class Detector(nn.Module):
    """Detects a given number of objects."""

    def __init__(self, found):
        super().__init__()
        self.conv, self.norm, self.found = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), found

    def forward(self, x):
        return {"boxes": self.norm(self.conv(x)).mean((2, 3))[: self.found]}


def test_a_detector_that_detects_nothing_proves_nothing():
    x = torch.randn(2, 3, 8, 8)
    widefield.reparameterize(unsettled(Detector(1)), x)
    with pytest.raises(ValueError, match="nothing to compare: the outputs hold no numbers"):
        widefield.reparameterize(unsettled(Detector(0)), x)
