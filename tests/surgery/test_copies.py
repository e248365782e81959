"""Common behavior of all verbs: invalid arguments, copies or in place, reports, and example inputs."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from tolerances import FLOAT32, NETWORK, close
from widefield.nn import MoRFConv2d
from widefield.surgery import MoRF, convert, plan
from widefield.surgery.compare import compare
from widefield.surgery.inputs import example_input
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
    trimmed = trim(fused, 0.0, example_input=32)
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
    with pytest.raises(ValueError, match=f"^the forward of {name or 'Sequential'} was replaced with a function"):
        work(wrapped(make(), name))
    model = make()
    model.forward = torch.compile(model.forward, backend="eager")
    with pytest.raises(ValueError, match="wrap or compile the result instead"):
        work(model)


def test_wrappers_that_copy_well_are_copied():
    model = plain()
    compiled, called, graph = copy.deepcopy(model), copy.deepcopy(model), torch.fx.symbolic_trace(model)
    compiled.compile(backend="eager")
    called.forward = called.forward  # an instance attribute now
    for kept in (torch.compile(copy.deepcopy(model), backend="eager"), compiled, called, graph):
        twin = copied(kept)
        with torch.no_grad():
            close(twin(X), model(X), FLOAT32)
            next(p for p in twin.parameters() if p.ndim == 4).zero_()
            assert (twin(X) - model(X)).abs().max() > 1e-3  # the copy uses its own weights
            close(kept(X), model(X), FLOAT32)


@EACH
def test_meta_models_and_reports_that_are_not_callable_are_refused_first(make, work):
    with pytest.raises(ValueError, match=r"^0\.weight is on the meta device .* load the model's weights first"):
        work(make().to("meta"))
    with pytest.raises(TypeError, match=r"report must be callable, such as print or the append of a list; got \[\]"):
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


@EACH
def test_in_place_the_model_itself_computes_what_the_copy_does(make, work):
    model, reports = make(), []
    bias = next(parameter for parameter in model.parameters() if parameter.ndim == 1)
    made = work(model, report=reports.append)
    assert made is not model
    assert not any(a is b for a in made.parameters() for b in model.parameters())
    assert work(model, inplace=True, report=reports.append) is model
    close(model(X), made(X), 0.0)
    assert any(bias is parameter for parameter in model.parameters()) or isinstance(model[1], nn.Identity)
    assert reports[0] == reports[1]
    assert [type(module) for module in model.modules()] == [type(module) for module in made.modules()]


def test_in_place_conversions_report_the_plan_that_they_executed():
    model, reports = plain(), []
    planned = plan(model, MoRF((3, 5)), "2")
    assert convert(model, MoRF((3, 5)), "2", inplace=True, report=reports.append) is model
    assert reports == [planned]
    assert isinstance(model[2], MoRFConv2d)
    with pytest.raises(TypeError, match="report must be callable"):
        convert(model, MoRF((3, 5)), report="table")
    assert plan(model, MoRF((3, 5)), "2").steps[0].name == "0"  # nothing was converted


@pytest.mark.parametrize(
    ("example", "shape"),
    [
        (16, (2, 3, 16, 16)),
        ((16, 12), (2, 3, 16, 12)),
        ([16, 12], (2, 3, 16, 12)),
        ((3, 16, 12), (2, 3, 16, 12)),
        ((4, 3, 16, 12), (4, 3, 16, 12)),
        (torch.ones(1, 3, 16, 12), (1, 3, 16, 12)),
    ],
)
def test_an_example_input_is_a_tensor_or_its_size(example, shape):
    model, reports = plain(), []
    assert example_input(model, example).shape == shape
    reparameterize(mixed(), example)
    trim(model, 0.0, example_input=example, report=reports.append)
    assert reports[0].input_size == shape[2:]
    assert reports[0].macs_before == 3 * 4 * 25 * shape[2] * shape[3] + 4 * 4 * 9 * shape[2] * shape[3]


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        ("224", TypeError, "example_input must be a tensor .* got '224'"),
        (1.5, TypeError, "example_input must be a tensor .* got 1.5"),
        ((1, 2, 3, 4, 5), ValueError, r"example_input must be .* got \(1, 2, 3, 4, 5\)"),
        (0, ValueError, "every side in example_input must be at least 1; got 0"),
    ],
)
def test_other_example_inputs_are_refused(example, error, message):
    with pytest.raises(error, match=message):
        reparameterize(mixed(), example)
    with pytest.raises(error, match=message):
        trim(plain(), example_input=example)


@EACH
def test_reports_display_themselves_in_notebooks(make, work):
    reports = []
    work(make(), report=reports.append)
    shown = reports[0]._repr_html_()
    assert shown.count("<tr>") == 1 + len(reports[0].rows())
    assert shown.startswith("<p>")
    assert str(reports[0]).startswith(reports[0].summary())


def test_plans_display_themselves_in_notebooks():
    found = plan(plain(), MoRF((3, 5)))
    assert found._repr_html_().startswith("<p>1 replaced, 1 passed over</p>")
    assert found._repr_html_().count("<tr>") == 1 + len(found.steps)
