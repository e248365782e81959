import copy

import pytest
import torch

from tolerances import FLOAT32, FLOAT64, close
from widefield.nn import MoRFConv2d, Router, load_balancing
from widefield.nn.router import default_width


def test_soft_weights_are_the_attention_functions_of_the_same_logits():
    routers = {a: Router(8, 5, attention=a).double() for a in ("none", "softmax", "sigmoid")}
    for router in routers.values():
        router.load_state_dict(routers["none"].state_dict())
    x = torch.randn(3, 8, 6, 5).double()
    logits = routers["none"](x)
    hidden = torch.nn.functional.gelu(routers["none"].hidden(x.mean((2, 3))))
    close(logits, routers["none"].gate(hidden), FLOAT64)
    close(routers["softmax"](x), logits.softmax(1), FLOAT64)
    close(routers["sigmoid"](x), logits.sigmoid(), FLOAT64)


@pytest.mark.parametrize("size", [(5, 7), (1, 3), (1, 1)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_one_image_is_weighed_as_in_a_batch(size, layout):
    router = Router(8, 5, attention="softmax").eval()
    maps = torch.randn(3, 8, size[0] + 2, size[1]).contiguous(memory_format=layout)
    x = maps[:, :, 1:-1]  # with gaps between images and, in NCHW, between maps
    expected = Router(8, 5, attention="softmax").double()
    expected.load_state_dict(router.state_dict())
    with torch.inference_mode():
        for image in x.split(1):
            close(router(image), expected(image.double()), FLOAT32)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_hard_weights_are_a_softmax_over_the_top_k_alone(top_k):
    router = Router(8, 4, routing="hard", top_k=top_k).double().eval()
    x = torch.randn(16, 8, 3, 3).double()
    weights = router(x)
    assert ((weights > 0).sum(1) == top_k).all()
    close(weights.sum(1), torch.ones(16).double(), FLOAT64)
    logits = router.gate(torch.nn.functional.gelu(router.hidden(x.mean((2, 3)))))
    for row, values in zip(weights, logits, strict=True):
        chosen = values.topk(top_k).indices
        close(row[chosen], values[chosen].softmax(0), FLOAT64)


def test_noise_is_drawn_in_training_only_with_the_learned_deviation():
    router = Router(8, 4, routing="hard", top_k=4).double()
    torch.nn.init.normal_(router.noise.weight)
    x = torch.randn(1, 8, 3, 3).double().expand(4000, -1, -1, -1)
    router.train()
    with load_balancing(router), torch.no_grad():
        router(x)
        gate = router._record[0]
    hidden = torch.nn.functional.gelu(router.hidden(x[:1].mean((2, 3))))
    expected = torch.nn.functional.softplus(router.noise(hidden))[0]
    assert torch.allclose((gate.noisy - gate.clean).std(0), expected, rtol=0.05)
    router.eval()
    assert torch.equal(router(x)[0], router(x)[1])


def test_weights_stay_in_the_parameters_precision_under_autocast():
    router = Router(8, 3)
    x = torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert router(x.bfloat16()).dtype == torch.float32


def test_default_width_and_the_width_asked_for():
    assert (default_width(96), default_width(768)) == (16, 48)
    assert Router(96, 5).hidden.out_features == 16
    assert Router(96, 5, width=24).hidden.out_features == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"routing": "sofd"}, "routing must be one of 'soft', 'hard'; got 'sofd'. Did you mean 'soft'"),
        ({"attention": "relu"}, "attention must be one of 'none', 'softmax', 'sigmoid'; got 'relu'"),
        ({"routing": "hard", "top_k": 0}, "top_k must be at least 1; got 0"),
        ({"routing": "hard", "top_k": 4}, "top_k=4 of 3 experts"),
        ({"width": 0}, "router_width must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Router(8, 3, **arguments)


def test_balance_is_near_zero_when_all_experts_share_and_large_when_one_takes_all():
    def loss(logits):
        router = Router(4, 4, width=4, routing="hard", top_k=2).double().train()
        with torch.no_grad():
            router.hidden.weight.copy_(torch.eye(4))
            router.hidden.bias.zero_()
            router.gate.weight.copy_(torch.eye(4))
            router.gate.bias.zero_()
            router.noise.bias.fill_(-8)
        with load_balancing(router) as balance:
            router(logits[:, :, None, None])
            return balance().item()

    even = torch.stack([torch.roll(torch.tensor([6.0, 4, 1, 1]), i) for i in range(4)]).double()
    lonely = torch.tensor([[6.0, 4, 1, 1]]).double().expand(4, -1)
    assert loss(even) < 1e-3
    assert loss(lonely) > 1.5


def test_load_follows_the_smooth_estimator_of_the_paper():
    router = Router(6, 4, routing="hard", top_k=2).double().train()
    torch.nn.init.normal_(router.gate.weight)
    x = torch.randn(5, 6, 2, 2).double()
    with load_balancing(router) as balance:
        router(x)
        gate = router._record[0]
        actual = balance()
    normal = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double())
    load = torch.zeros(4).double()
    for s in range(5):
        for i in range(4):
            others = torch.cat([gate.noisy[s, :i], gate.noisy[s, i + 1 :]])
            load[i] += normal.cdf((gate.clean[s, i] - others.topk(2).values[-1]) / gate.noise_std[s, i])
    importance = gate.weights.sum(0)
    expected = sum(v.var(correction=0) / v.mean() ** 2 for v in (importance, load))
    close(actual, expected, 1e-8)


def test_balance_reaches_the_routers_and_leaves_no_trace():
    model = torch.nn.Sequential(MoRFConv2d(4, 4, (3, 5, 7), routing="hard"), MoRFConv2d(4, 4, (3, 5), routing="hard"))
    x = torch.randn(8, 4, 6, 6)
    with load_balancing(model) as balance:
        model(x)
        balance().backward()
    assert model[0].router.gate.weight.grad.abs().max() > 0
    assert model[1].router.gate.weight.grad.abs().max() > 0
    assert model[1].kernels()[0].grad is None
    copy.deepcopy(model)
    model(x)
    assert model[0].router._record is None


def test_balance_says_what_is_missing():
    with pytest.raises(ValueError, match="no hard router"), load_balancing(MoRFConv2d(4, 4, (3, 5))):
        pass
    layer = MoRFConv2d(4, 4, (3, 5), routing="hard").eval()
    with load_balancing(layer) as balance:
        layer(torch.randn(2, 4, 5, 5))
        with pytest.raises(ValueError, match="training mode"):
            balance()
