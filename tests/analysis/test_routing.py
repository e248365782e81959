import pytest
import torch
from torch import nn

import widefield
from tolerances import FLOAT32, close
from widefield.analysis import Routing, routing_weights
from widefield.nn import MoRFConv2d


def test_weights_are_those_of_every_layer_in_order_and_the_model_is_left_as_it_was():
    model = nn.Sequential(
        MoRFConv2d(3, 4, (3, 5, (3, 2))), nn.ReLU(), MoRFConv2d(4, 4, (3, 5), routing="hard", top_k=1)
    )
    model.train()
    model[1].eval()
    batches = [torch.randn(4, 3, 8, 8), torch.randn(2, 3, 8, 8)]
    first, last = routing_weights(model, batches)
    assert [m.training for m in model] == [True, False, True]
    assert not model[0].router._forward_hooks
    assert (first.name, first.experts, first.hard) == ("0", ("3x3", "5x5", "3x3 d2"), False)
    assert (last.name, last.weights.shape, last.hard) == ("2", (6, 2), True)
    x = torch.cat(batches)
    close(first.weights, model[0].route(x), FLOAT32)
    fused = widefield.reparameterize(model.eval(), x)
    close(routing_weights(fused, batches)[1].weights, last.weights, FLOAT32)


def test_frequencies_count_choices_or_largest_weights():
    weights = torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.8, 0.0], [0.0, 1.0, 0.0], [0.6, 0.4, 0.0]])
    hard = Routing("a", ("3x3", "5x5", "7x7"), weights, hard=True)
    close(hard.frequencies(), torch.tensor([2, 4, 1]) / 7, FLOAT32)
    soft = Routing("a", ("3x3", "5x5", "7x7"), torch.tensor([[0.1, -2, 0.5], [3.0, 1, 1]]), hard=False)
    close(soft.frequencies(), torch.tensor([0.5, 0.5, 0]), FLOAT32)
    assert hard.to_dict()["mean_weights"] == pytest.approx([0.2, 0.675, 0.125])


def test_nothing_to_look_at_is_an_error():
    with pytest.raises(ValueError, match="no mixture"):
        routing_weights(nn.Conv2d(3, 3, 3), [torch.randn(1, 3, 8, 8)])
    with pytest.raises(ValueError, match="no images"):
        routing_weights(MoRFConv2d(3, 3), [])
