import copy
import itertools
import json
import logging
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_specialize import classifier, images_of, loader, routed

import widefield
from tolerances import FLOAT64
from widefield import bench, data
from widefield.surgery import walk
from widefield.surgery.compare import compare
from widefield.surgery.specialize import specialize


def test_the_report_says_what_each_layer_and_all_of_them_change():
    model, batches, reports = classifier(std=0.5), loader(), []
    static = specialize(model, batches, report=reports.append)
    (done,) = reports
    x, labels = images_of(batches), torch.cat([batch["label"] for batch in batches])
    y = model(x)
    assert (done.policy, done.images, done.static) == ("mean", 7, tuple(routed(model)))
    assert [layer.kind for layer in done.layers] == ["MoRFConv2d"] * 3 + ["DynamicGMConv2d"]

    inputs = {}
    for name in done.static:
        model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: inputs.update({name: args[0]}))
    model(x)
    for name in done.static:
        model.get_submodule(name)._forward_hooks.clear()
    total, squares = y.clone(), 0.0
    for entry in done.layers:
        layer, conv = model.get_submodule(entry.name), static.get_submodule(entry.name)
        twin = copy.deepcopy(model)
        walk.replace(twin, {twin.get_submodule(entry.name): conv})
        moved = twin(x)
        assert entry.change == compare(model, twin, batches)
        assert entry.change.rms == pytest.approx(((moved - y).norm() / y.norm()).item(), rel=FLOAT64)
        out = layer(inputs[entry.name])
        own = (conv(inputs[entry.name]) - out).norm() / out.norm()
        assert entry.own == pytest.approx(own.item(), rel=FLOAT64)
        decided = layer.router(inputs[entry.name]) if entry.kind == "MoRFConv2d" else layer.masks(inputs[entry.name])
        decided = decided.flatten(1)
        spread = (decided - decided.mean(0)).square().sum(1).mean().sqrt() / decided.mean(0).norm()
        assert entry.variation == pytest.approx(spread.item(), rel=FLOAT64)
        assert min(entry.variation, entry.own, entry.change.rms) > 1e-4
        total += moved - y
        squares += entry.change.rms**2
    assert done.predicted.rms == pytest.approx(((total - y).norm() / y.norm()).item(), rel=FLOAT64)
    assert done.predicted.accuracy_after == (total.argmax(1) == labels).double().mean()
    assert done.predicted.agreement == (total.argmax(1) == y.argmax(1)).double().mean()
    assert done.independent == pytest.approx(math.sqrt(squares), rel=FLOAT64)
    assert done.together == done.measured == compare(model, static, batches)
    assert done.measured.accuracy_before == (y.argmax(1) == labels).double().mean()
    assert done.before == bench.cost(model, x[:1])
    assert done.after == bench.cost(static, x[:1])
    assert done.after.parameters < done.before.parameters

    assert json.loads(json.dumps(done.to_dict()))["layers"][1]["change"]["rms"] == done.layers[1].change.rms
    assert [row["layer"] for row in done.rows()] == list(done.static)
    assert {row["static"] for row in done.rows()} == {"yes"}
    assert str(done).startswith("specialized 4 of 4 routed layers, policy 'mean': outputs on 7 images change by ")
    assert f"| {done.static[0]} | 1 | MoRFConv2d |" in str(done)


def test_without_labels_there_is_no_accuracy_and_without_classes_no_agreement():
    reports = []
    specialize(classifier(1), loader(labels=False), report=reports.append)
    assert reports[0].measured.accuracy_before is None
    assert reports[0].measured.agreement is not None
    specialize(classifier(1)[:2].append(torch.nn.Flatten(2)).eval(), loader(labels=False), report=reports.append)
    assert reports[1].measured.agreement is None
    assert reports[1].rows()[0]["same top-1"] == "-"
    assert "accuracy" not in str(reports[1]).split("\n")[0]


class Counting:
    """A loader that counts how often it is iterated."""

    def __init__(self, batches):
        self.batches, self.rounds = batches, 0

    def __iter__(self):
        self.rounds += 1
        return iter(self.batches)


@pytest.fixture(scope="module")
def six():
    """Return a model of six routed layers, and by brute force the changes from each number of least important
    layers."""
    torch.manual_seed(1)
    model, batches, reports = classifier(6, std=0.4), loader((4, 3)), []
    static = specialize(model, batches, report=reports.append)
    order = sorted(reports[0].layers, key=lambda layer: layer.change.rms)
    runs = []
    for length in range(1, 7):
        twin = copy.deepcopy(model)
        names = [layer.name for layer in order[:length]]
        walk.replace(twin, {twin.get_submodule(name): static.get_submodule(name) for name in names})
        runs.append((names, compare(model, twin, batches).rms))
    assert all(0 < a[1] < b[1] for a, b in itertools.pairwise(runs))
    return model, batches, runs, [layer.change.rms for layer in order]


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.0, 1.2))
def test_auto_keeps_as_many_as_fit_and_never_exceeds_the_tolerance(six, share):
    model, batches, runs, alone = six
    tolerance = runs[0][1] * (1.5 * runs[-1][1] / runs[0][1]) ** share * 0.9  # from too little to more than enough
    counting, reports = Counting(batches), []
    result = specialize(model, counting, policy="auto", tolerance=tolerance, report=reports.append)
    (done,) = reports
    change = compare(model, result, batches)
    assert change.rms <= tolerance
    assert done.measured == change
    assert sorted(routed(result) + list(done.static)) == sorted(routed(model))
    fitting = [
        names
        for (names, rms), single in zip(runs, alone, strict=True)
        if rms <= tolerance and single <= tolerance
    ]  # fmt: skip
    assert set(done.static) == set(fitting[-1] if fitting else [])
    assert counting.rounds <= 2 + 3
    for layer in done.layers:
        assert (layer.reason is None) == (layer.name in done.static)


def test_auto_takes_some_all_or_none(six, caplog):
    model, batches, runs, _ = six
    for tolerance, expected in ((runs[2][1] * 1.0001, 3), (1e3, 6)):
        reports = []
        result = specialize(model, batches, policy="auto", tolerance=tolerance, report=reports.append)
        assert len(routed(result)) == 6 - expected
        assert not caplog.records
    x = images_of(batches)
    result = specialize(model, batches, policy="auto", tolerance=runs[0][1] / 2, report=reports.append)
    assert result is not model
    assert torch.equal(result(x), model(x))
    assert list(result.state_dict()) == list(model.state_dict())
    done = reports[-1]
    assert done.static == ()
    assert (done.measured.rms, done.measured.agreement) == (0, 1)
    assert done.measured.accuracy_before == done.measured.accuracy_after
    assert done.after == done.before
    assert "no: outputs would change by more than the tolerance" in str(done)
    assert f"nothing was specialized: {runs[0][0][0]}" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("reported", [True, False])
def test_mean_takes_two_rounds_and_three_passes_and_for_a_report_one_more_for_each_layer(layers, reported):
    model, calls = classifier(layers), []
    counting = Counting(loader())
    model[0].register_forward_hook(lambda *a: calls.append(len(a[2])))  # existing hooks are kept
    static = specialize(model, counting, report=id if reported else None)
    assert counting.rounds == 2
    # Two more forward passes of one image, before and after, count the cost.
    assert sum(calls) == (7 * (layers + 3) + 2 if reported else 7 * 3)
    assert len(static[0]._forward_hooks) == 1


def test_predicted_and_measured_change_agree_on_the_trained_model_of_the_demo():
    """The network of recipes/demo_digits.yaml with soft mixtures, for four epochs instead of ten."""
    sets = {split: data.create("digits", split, size=32) for split in ("train", "val")}
    arrays = {
        split: (torch.stack([s["image"] for s in found]), torch.tensor([s["label"] for s in found]))
        for split, found in ((split, [dataset[i] for i in range(len(dataset))]) for split, dataset in sets.items())
    }
    shape = {"patch_size": 2, "depths": (1, 1, 2, 1), "dims": (16, 32, 64, 96), "ls_init_value": 1e-6}
    model = timm.create_model("convnext_tiny", num_classes=10, **shape)
    model = widefield.convert(model, widefield.MoRF(), "*.conv_dw").train()
    images, labels = arrays["train"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    for _ in range(4):
        for chosen in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.1).backward()
            optimizer.step()
    images, labels = arrays["val"]
    batches = list(zip(images.split(100), labels.split(100), strict=True))
    reports = []
    model.eval()
    static = specialize(model, batches, report=reports.append)
    (done,) = reports
    assert done.measured.accuracy_before > 0.85
    assert done.measured.rms > 1e-3  # the routing is learned
    assert done.measured == compare(model, static, batches)
    assert 1 / 1.2 < done.predicted.rms / done.measured.rms < 1.2
    assert 1 / 1.5 < done.independent / done.measured.rms < 1.5
    assert abs(done.predicted.accuracy_after - done.measured.accuracy_after) * len(images) <= 5
    specialize(model, batches, policy="auto", tolerance=done.measured.rms / 3, report=reports.append)
    assert reports[1].measured.rms <= done.measured.rms / 3
    assert 0 < len(reports[1].static) < 5
    assert (reports[1].predicted, reports[1].together) == (done.predicted, done.together)
