import time

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from widefield import bench
from widefield.nn import DCNv3


def test_rows_hold_the_percentiles_of_interleaved_calls():
    order = []
    rows = bench.measure(
        {"short": lambda: order.append("s"), "long": lambda: (order.append("l"), time.sleep(0.005))},
        repeats=4,
        warmup=2,
    )
    assert "".join(order) == "sllslsslslls"  # each is first as often as last, and rarely twice in a row
    assert rows["long"].repeats == 4
    assert rows["short"].p20 <= rows["short"].p50 <= rows["short"].p80
    assert rows["long"].p50 >= 0.005
    assert rows["long"].to_dict()["name"] == "long"


def test_environment_names_what_a_reader_needs():
    environment = bench.environment()
    assert {"device", "threads", "python", "torch", "timm", "widefield", "date"} <= environment.keys()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="candidates is empty"):
        bench.measure({})
    with pytest.raises(ValueError, match="repeats must be at least 1; got 0"):
        bench.measure({"a": lambda: None}, repeats=0)


def test_a_budget_spares_repeats_but_leaves_two():
    rows = bench.measure({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, repeats=6, budget_s=0.03)
    assert rows["slow"].repeats == 2
    assert rows["fast"].repeats == 6


def test_an_untimed_call_beyond_the_budget_counts():
    calls = []
    rows = bench.measure({"slow": lambda: (calls.append(0), time.sleep(0.02))}, repeats=6, budget_s=0.01)
    assert rows["slow"].repeats == len(calls) == 2


def test_short_calls_are_repeated_within_a_timing_and_rows_stay_seconds_of_one():
    calls = []
    rows = bench.measure({"short": lambda: (calls.append(0), time.sleep(0.001))}, repeats=3, shortest_s=0.01)
    assert rows["short"].repeats == 3
    assert 1 + 3 * 2 < len(calls) <= 1 + 3 * 2 * 10
    assert 0.001 <= rows["short"].p50 < 0.01


class Applied(nn.Module):
    """A function of one tensor as a module, with its layers."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleDict(layers)

    def forward(self, x):
        return self.function(x, **self.layers)


def recurrent(cls, **options):
    return Applied(lambda x, layer: layer(x)[0], layer=cls(8, 6, batch_first=True, **options))


def attention(queries, keys, width):
    """Count scores and weighted sums."""
    return 2 * queries * keys * width


ENCODER = 5 * (8 * 24 + 8 * 8 + 2 * 8 * 16)  # of one layer: queries, keys and values; output; MLP
COUNTED = {
    "attention": (
        lambda: Applied(lambda x: F.scaled_dot_product_attention(x, x, x)),
        (3, 2, 5, 8),
        6 * attention(5, 5, 8),
    ),
    "grouped attention": (
        lambda: Applied(lambda x: F.scaled_dot_product_attention(x, x[:, :1], x[:, :1], enable_gqa=True)),
        (3, 2, 5, 8),
        6 * attention(5, 5, 8),
    ),
    "nn.MultiheadAttention": (
        lambda: Applied(
            lambda x, a: a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(8, 2, batch_first=True)
        ),
        (1, 5, 8),
        5 * (8 * 24 + 8 * 8) + attention(5, 5, 8),
    ),
    "nn.MultiheadAttention with weights": (
        lambda: Applied(lambda x, a: a(x, x, x)[0], a=nn.MultiheadAttention(8, 2, batch_first=True)),
        (1, 5, 8),
        5 * (8 * 24 + 8 * 8) + attention(5, 5, 8),
    ),
    "nn.TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (1, 5, 8),
        ENCODER + attention(5, 5, 8),
    ),
    "nn.TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3),
        (2, 5, 8),
        2 * 3 * (ENCODER + attention(5, 5, 8)),
    ),
    "nn.LSTM": (lambda: recurrent(nn.LSTM, num_layers=2), (3, 5, 8), 15 * 4 * 6 * ((8 + 6) + (6 + 6))),
    "nn.LSTM both ways": (lambda: recurrent(nn.LSTM, bidirectional=True), (3, 5, 8), 15 * 2 * 4 * 6 * (8 + 6)),
    "nn.GRU": (lambda: recurrent(nn.GRU), (3, 5, 8), 15 * 3 * 6 * (8 + 6)),
    "nn.RNN": (lambda: recurrent(nn.RNN), (3, 5, 8), 15 * 6 * (8 + 6)),
    "nn.LSTMCell": (lambda: Applied(lambda x, c: c(x)[0], c=nn.LSTMCell(8, 6)), (3, 8), 3 * 4 * 6 * (8 + 6)),
    "DeformConv2d": (
        lambda: Applied(
            lambda x, conv: conv(x, x.new_zeros(len(x), 2 * 9, 4, 4)),
            conv=torchvision.ops.DeformConv2d(4, 6, 3, stride=2, padding=1, groups=2),
        ),
        (2, 4, 7, 8),
        2 * 6 * 4 * 4 * 2 * 9,
    ),
    "matrix and vector": (lambda: Applied(lambda x: x @ x[0]), (7, 8), 7 * 8),
    "added to a vector": (lambda: Applied(lambda x: torch.addmv(x[:, 0], x, x[0])), (7, 8), 7 * 8),
    "two vectors": (lambda: Applied(lambda x: x @ x), (8,), 8),
    "sums of products": (lambda: Applied(lambda x: torch.addbmm(x[0], x, x)), (3, 8, 8), 3 * 8**3),
    "nn.ConvTranspose2d": (lambda: nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2), (1, 8, 5, 5), 8 * 5 * 5 * 2 * 9),
}


@pytest.mark.parametrize("case", COUNTED)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_costs_are_those_counted_by_hand_on_every_device(case, device):
    make, shape, macs = COUNTED[case]
    found = bench.cost(make().eval().to(device), torch.zeros(shape, device=device))
    assert (found.macs, found.uncounted) == (macs, ())


def test_the_recurrent_layers_of_cudnn_are_counted_from_their_weights():
    layer = nn.LSTM(8, 6, num_layers=2, bidirectional=True, device="meta")
    weights, state = layer._flat_weights, torch.zeros(4, 3, 6, device="meta")

    def run(x):
        return torch.ops.aten._cudnn_rnn(
            x, weights, 4, None, state, state, 2, 6, 0, 2, False, 0.0, False, True, [], None
        )[0]

    found = bench.cost(Applied(run), torch.zeros(5, 3, 8, device="meta"))
    assert (found.macs, found.uncounted) == (15 * 2 * 4 * 6 * ((8 + 6) + (12 + 6)), ())


def test_a_vision_transformer_costs_the_same_on_numbers_as_on_the_meta_device():
    model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    tokens, width, mlp = 197, 192, 768
    layer = tokens * (4 * width * width + 2 * width * mlp) + attention(tokens, tokens, width)
    expected = 196 * 3 * 16 * 16 * width + 2 * layer + 1000 * width
    costs = [bench.cost(model.to(d), torch.zeros(1, 3, 224, 224, device=d)) for d in ("cpu", "meta")]
    assert [found.macs for found in costs] == [expected] * 2


@pytest.mark.parametrize(
    ("model", "shape", "uncounted"),
    [
        (Applied(lambda x: torch.fft.irfft2(torch.fft.rfft2(x))), (1, 2, 8, 8), ("aten._fft_c2r", "aten._fft_r2c")),
        (
            Applied(lambda x: F.grid_sample(x, x[:, :, :, :2], align_corners=False)),
            (1, 2, 2, 2),
            ("aten.grid_sampler_2d",),
        ),
        (Applied(lambda x: torch.cdist(x, x)), (30, 8), ("aten._euclidean_dist",)),
        (
            Applied(lambda x: torchvision.ops.roi_align(x, [x.new_zeros(1, 4)], 2)),
            (1, 2, 8, 8),
            ("torchvision.roi_align",),
        ),
        (DCNv3(32, groups=2), (1, 8, 8, 32), ("aten._embedding_bag_forward_only",)),
    ],
    ids=["fft", "sampling", "distances", "another library", "deformable"],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_not_counted_is_named(model, shape, uncounted, device):
    assert bench.cost(model.eval().to(device), torch.zeros(shape, device=device)).uncounted == uncounted


def test_elementwise_operators_norms_and_pooling_are_not_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1))
    model.extend([nn.Upsample(scale_factor=2, mode="bilinear"), nn.Dropout(), nn.LayerNorm(2), nn.Softmax(dim=1)])
    found = bench.cost(model.eval(), torch.zeros(1, 3, 8, 8))
    assert (found.macs, found.uncounted) == (4 * 36 * 27, ())


def test_counting_leaves_the_fused_layers_of_pytorch_as_they_were():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        bench.cost(layer, torch.zeros(1, 5, 8))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    torch.backends.mha.set_fastpath_enabled(True)
    assert all(parameter.requires_grad for parameter in layer.parameters())
