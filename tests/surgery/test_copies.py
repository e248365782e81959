"""What reparameterize, specialize and trim ask of a model, and the state that their copies are in."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from tolerances import FLOAT32, NETWORK, close
from widefield.nn import MoRFConv2d
from widefield.surgery.outputs import compare
from widefield.surgery.reparameterize import reparameterize
from widefield.surgery.specialize import specialize
from widefield.surgery.trim import trim
from widefield.surgery.walk import copied, unmerged

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def mixed():
    return nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.BatchNorm2d(4), MoRFConv2d(4, 4, (3, 5))).eval()


def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.GELU(), nn.Conv2d(4, 4, 3, padding=1)).eval()


SURGERY = {
    "reparameterize": (mixed, lambda model, **more: reparameterize(model, X, **more)),
    "specialize": (mixed, lambda model, **more: specialize(model, [X], **more)),
    "trim": (plain, lambda model, **more: trim(model, 0.8, **more)),
}
EACH = pytest.mark.parametrize(("make", "work"), SURGERY.values(), ids=SURGERY)


def test_feature_extractors_come_out_in_evaluation_mode():
    model = create_feature_extractor(resnet18(num_classes=3), {"layer1": "a", "layer2": "b"}).eval()
    x = torch.randn(2, 3, 32, 32)
    assert unmerged(model) == []
    fused = reparameterize(model, x)
    trimmed = trim(fused, 0.0, input_size=32)
    for made in (fused, trimmed):
        assert not any(module.training for module in made.modules())
        assert compare(model, made, x).relative < NETWORK
    mixture = create_feature_extractor(mixed(), {"2": "out"}, tracer_kwargs={"leaf_modules": [MoRFConv2d]}).eval()
    assert not any(module.training for module in specialize(mixture, [X]).modules())


def wrapped(model, name):
    inner = model.get_submodule(name)
    old = inner.forward
    inner.forward = lambda x: old(x)
    return model


@EACH
@pytest.mark.parametrize("name", ["", "0"])
def test_a_forward_that_was_replaced_is_refused(make, work, name):
    with pytest.raises(ValueError, match=f"^the forward of {name or 'Sequential'} was replaced by a function"):
        work(wrapped(make(), name))
    model = make()
    model.forward = torch.compile(model.forward, backend="eager")
    with pytest.raises(ValueError, match="wrap or compile the result instead"):
        work(model)


def test_wrappers_that_copy_well_are_copied():
    model = plain()
    compiled, called, graph = copy.deepcopy(model), copy.deepcopy(model), torch.fx.symbolic_trace(model)
    compiled.compile(backend="eager")
    called.forward = called.forward  # its own method
    for kept in (torch.compile(copy.deepcopy(model), backend="eager"), compiled, called, graph):
        twin = copied(kept)
        with torch.no_grad():
            close(twin(X), model(X), FLOAT32)
            next(p for p in twin.parameters() if p.ndim == 4).zero_()
            assert (twin(X) - model(X)).abs().max() > 1e-3  # the copy computes with its own numbers
            close(kept(X), model(X), FLOAT32)


@EACH
def test_meta_models_and_reports_that_are_no_functions_are_refused_first(make, work):
    with pytest.raises(ValueError, match=r"^0\.weight is on the meta device .* load the model's weights first"):
        work(make().to("meta"))
    with pytest.raises(TypeError, match="report must be a function of the report, such as print; got list"):
        work(make().train(), report=[])


@EACH
def test_autocast_changes_nothing(make, work):
    torch.manual_seed(3)
    model, reports = make(), []
    expected = work(model, report=reports.append)(X)
    with torch.autocast("cpu", torch.bfloat16):
        made = work(model, report=reports.append)
    close(made(X), expected, 0.0)
    assert reports[0] == reports[1]


def test_in_place_a_replaced_forward_stays():
    model = wrapped(mixed(), "")
    expected = model(X)
    assert reparameterize(model, X, inplace=True) is model
    close(model(X), expected, FLOAT32)
