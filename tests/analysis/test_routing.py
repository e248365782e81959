"""Routing statistics against prepared routers, plain references, and models from other libraries."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import timm
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import gelu

import widefield
from tolerances import FLOAT32, FLOAT64, close
from widefield.analysis import Routing, routing_weights, save
from widefield.analysis.routing import RoutingStatistics, collapse, routing_statistics
from widefield.nn import MoRFConv2d

KERNELS = ((3, 1), (5, 1), (3, 3))  # 3, 5 and 7 pixels wide
SIZES = np.array([3, 5, 7])
NAMES = ("3x3", "5x5", "3x3 d3")
COLORS = np.array([0, 0, 1, 1, 2, 2, 0, 1])
LABELS = np.array([0, 0, 0, 1, 1, 1, 2, -1])
WANTED = ([1, 2, 0], [0, 0, 2])  # of two mixtures: the expert for each color


def plant(layer, wanted):
    """Make a mixture route images of color c to expert wanted[c].

    The weight is gelu(8 * its brightness) if soft. The experts return the image unchanged.
    """
    router = layer.router
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        for color, expert in enumerate(wanted):
            router.hidden.weight[color, color] = 8
            router.gate.weight[expert, color] = 1
        for weight in layer.expert_weights:
            nn.init.dirac_(weight)
    return layer


def planted(**options):
    first, last = (plant(MoRFConv2d(3, 3, ((3, 1), (5, 1), (3, 3)), **options), wanted) for wanted in WANTED)
    return nn.Sequential(first, nn.ReLU(), last).eval()


def pictures():
    """Return images of one color each, with increasing brightness."""
    images = torch.zeros(len(COLORS), 3, 6, 6)
    for i, color in enumerate(COLORS):
        images[i, color] = 1 + i / 8
    return images


def state(model):
    return (
        {module: module.training for module in model.modules()},
        [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        [len(module._forward_hooks) for module in model.modules()],
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("options", [{}, {"routing": "hard", "top_k": 1}], ids=["soft", "hard"])
@pytest.mark.parametrize("form", ["pairs", "dictionaries", "fused"])
def test_a_planted_router_gives_back_what_was_planted(options, form):
    model, images, labels = planted(**options), pictures(), torch.from_numpy(LABELS)
    if form == "fused":
        model = widefield.reparameterize(model, images)
    parts = list(zip(images.split(3), labels.split(3), strict=True))
    batches = [{"image": x, "label": y} for x, y in parts] + [{}] if form == "dictionaries" else parts
    found = routing_statistics(
        model, batches, classes=("sky", "sun", "sea"), batch_size=2, about={"seed": 7, "images": 1}
    )
    assert [block.name for block in found.blocks] == ["0", "2"]
    assert {key: found.about[key] for key in ("seed", "images", "labeled")} == {"seed": 7, "images": 8, "labeled": 7}
    assert list(found.labels) == list(LABELS)
    for block, wanted in zip(found.blocks, map(np.array, WANTED), strict=True):
        given = wanted[COLORS]
        assert block.experts == NAMES
        assert np.array_equal(block.chosen(), np.eye(3)[given])
        assert np.array_equal(block.fields(), SIZES[given])
        assert block.frequencies().tolist() == pytest.approx(np.bincount(given, minlength=3) / 8)
        smallest, largest = block.extremes(3)
        assert list(smallest) == sorted(range(8), key=lambda i: (SIZES[given[i]], i))[:3]
        assert list(largest) == sorted(range(8), key=lambda i: (-SIZES[given[i]], i))[:3]
        assert block.depends_on_input
        for i, name in enumerate(found.classes):
            part = found.by_class()[name]
            of_class = next(b for b in part.blocks if b.name == block.name)
            assert np.array_equal(of_class.chosen().argmax(1), given[i == LABELS])
            assert of_class.frequencies().tolist() == pytest.approx(
                np.bincount(given[i == LABELS], minlength=3) / (i == LABELS).sum()
            )
    assert found.blocks[0].dead() == ()
    assert found.blocks[1].dead() == ("5x5",)
    assert collapse(found.blocks) == ["2 hardly uses 5x5"]
    brightness = torch.arange(8) / 8 + 1
    expected = gelu(8 * brightness) if not options else torch.ones(8)
    close(torch.from_numpy(found.blocks[0].weights).max(1).values, expected, FLOAT32)


def test_weights_are_those_of_every_layer_in_order_and_the_model_is_left_as_it_was():
    model = nn.Sequential(
        MoRFConv2d(3, 4, (3, 5, (3, 2))), nn.ReLU(), MoRFConv2d(4, 4, (3, 5), routing="hard", top_k=1)
    )
    model.train()
    model[1].eval()
    model[0].router.gate.bias.requires_grad_(False)
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    batches = [torch.randn(4, 3, 8, 8), torch.randn(2, 3, 8, 8)]
    before = state(model)
    first, last = routing_weights(model, batches)
    statistics = routing_statistics(model, torch.cat(batches), batch_size=4)
    assert state(model) == before
    assert (first.name, first.experts, first.hard) == ("0", ("3x3", "5x5", "3x3 d2"), False)
    assert (last.name, last.weights.shape, last.hard) == ("2", (6, 2), True)
    x = torch.cat(batches)
    close(torch.from_numpy(first.weights), model[0].route(x), FLOAT32)
    close(torch.from_numpy(statistics.blocks[0].weights), torch.from_numpy(first.weights), FLOAT32)
    wrong = [batches[0], torch.randn(2, 4, 8, 8)]
    before = state(model)
    with pytest.raises(ValueError, match=r"must be \(N, 3, H, W\); got shape \(2, 4, 8, 8\)"):
        routing_statistics(model, wrong)
    assert state(model) == before


def of(weights, *, hard=False, sizes=None):
    weights = np.asarray(weights, dtype=np.float32)
    return Routing("a", tuple((k, 1) for k in sizes or range(3, 3 + 2 * weights.shape[1], 2)), weights, hard)


def test_frequencies_count_choices_or_largest_weights():
    hard = of([[0.0, 0.5, 0.5], [0.2, 0.8, 0.0], [0.0, 1.0, 0.0], [0.6, 0.4, 0.0]], hard=True)
    assert hard.frequencies().tolist() == pytest.approx([2 / 7, 4 / 7, 1 / 7])
    soft = of([[0.1, -2, 0.5], [3.0, 1, 1]])
    assert soft.frequencies().tolist() == [0.5, 0.5, 0]
    assert hard.to_dict()["mean_weights"] == pytest.approx([0.2, 0.675, 0.125])
    assert of([[1, 1, 0], [0, 0, 0]]).frequencies().tolist() == pytest.approx([5 / 12, 5 / 12, 1 / 6])  # equals share
    assert of(np.zeros((2, 4))).shares().tolist() == [0.25] * 4


weights = st.integers(1, 5).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([0.0, 0.25, -0.5, 1.0]) | st.floats(-4, 4, width=32), min_size=n, max_size=n),
        min_size=1,
        max_size=20,
    )
)


@given(weights, st.booleans())
@settings(deadline=None)
def test_numbers_equal_plain_oracles(rows, hard):
    block = of(rows, hard=hard)
    n = len(rows[0])
    tally = Counter()
    shares = np.zeros(n)
    fields = []
    for row in rows:
        size = [abs(w) for w in row]
        chosen = [r for r in range(n) if (size[r] > 0 if hard else size[r] == max(size))]
        for r in chosen:
            tally[r] += 1 if hard else 1 / len(chosen)
        mine = [s / sum(size) if sum(size) else 1 / n for s in size]
        shares += np.array(mine) / len(rows)
        fields.append(sum((3 + 2 * r) * share for r, share in enumerate(mine)))
    total = sum(tally.values()) or 1
    assert block.frequencies() == pytest.approx([tally[r] / total for r in range(n)], rel=FLOAT64)
    assert block.shares() == pytest.approx(shares, abs=FLOAT64)
    assert block.fields() == pytest.approx(fields, abs=1e-6)  # they are rounded
    assert block.entropy() == pytest.approx(scipy.stats.entropy(shares) / np.log(n) if n > 1 else 1, abs=FLOAT64)
    lorenz = sum((2 * i - n - 1) * share for i, share in enumerate(sorted(shares), 1)) / n
    assert block.gini() == pytest.approx(lorenz, abs=FLOAT64)
    assert block.dead() == tuple(f"{3 + 2 * r}x{3 + 2 * r}" for r in range(n) if shares[r] < 0.01 / n)
    assert block.mean() == pytest.approx(np.mean(rows, 0), abs=FLOAT64)
    assert block.std() == pytest.approx(np.std(rows, 0), abs=FLOAT64)


@example([(0.0, 0), (0.0, 0), (0.0, 1), (1.0, -1)])
@given(st.lists(st.tuples(st.floats(-4, 4, width=32), st.integers(-1, 3)), min_size=2, max_size=20))
@settings(deadline=None)
def test_the_variance_splits_by_class(images):
    values, labels = (np.array(column) for column in zip(*images, strict=True))
    block = of(np.stack([values, 2 * values], 1))
    found = block.variance(labels)
    known, groups = values[labels >= 0], [values[labels == k] for k in set(labels.tolist()) - {-1}]
    if not len(known):
        assert np.isnan(found.within)
        return
    assert found.within + found.between == pytest.approx(5 * known.var(), abs=1e-9)
    assert found.within == pytest.approx(5 * sum(g.var() * len(g) for g in groups) / len(known), abs=1e-9)
    if np.isnan(found.f):
        assert len(groups) < 2 or len(groups) == len(known) or known.std() <= 1e-5 * np.abs(known).max()
    elif found.within > 1e-9:
        assert found.eta_squared == pytest.approx(found.between / (found.within + found.between))
        assert found.f == pytest.approx(scipy.stats.f_oneway(*groups).statistic, rel=1e-6)


def test_variation_is_that_of_the_weights_in_their_own_size():
    assert of([[1, 1], [1, 1]]).variation() == 0
    assert of([[1, 0], [0, 1]]).variation() == pytest.approx(0.5**0.5)
    assert of([[3.0], [-3.0]]).variation() == 1
    assert np.isnan(of([[1, 1]]).variation())
    assert of([[1, 1]]).depends_on_input  # one image gives no spread
    assert not of(np.zeros((3, 2))).depends_on_input
    for scale in (1e-3, 1, 1e3):
        assert not of(scale * np.array([[1, 1.0005], [1, 1]])).depends_on_input
        assert of(scale * np.array([[1, 1.01], [1, 1]])).depends_on_input


def test_one_kernel_several_times_has_several_names():
    block = Routing("a", ((3, 1), (3, 1), (3, 2), (3, 1)), np.ones((2, 4), np.float32), False)
    assert block.experts == ("3x3", "3x3 #2", "3x3 d2", "3x3 #3")
    assert block.sizes == (3, 3, 5, 3)
    assert collapse([block]) == ["a gives all images the same weights"]
    assert collapse([of([[1, 0], [0.9, 0]])]) == ["a hardly uses 5x5"]
    assert collapse([of([[1, 0], [1, 0]])]) == ["a hardly uses 5x5 and gives all images the same weights"]


@pytest.mark.parametrize("of", ["timm", "torchvision"])
def test_other_peoples_models_once_converted(of):
    model = timm.create_model("test_convnext") if of == "timm" else torchvision.models.resnet18()
    where = "*.conv_dw" if of == "timm" else "layer*.1.conv2"
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 0, 1, 1, 2, 2])
    model.eval()
    for init, looks in (("preserve", False), ("random", True)):
        mixture = widefield.convert(model, widefield.MoRF((3, 5, 7), init=init), where)
        found = routing_statistics(mixture, [(images, labels)])
        assert len(found.blocks) == sum(isinstance(m, MoRFConv2d) for m in mixture.modules()) > 0
        assert [block.depends_on_input for block in found.blocks] == [looks] * len(found.blocks)
        assert found.classes == ("0", "1", "2")
        if not looks:  # balanced: no expert is preferred
            assert found.blocks[0].frequencies().tolist() == pytest.approx([1 / 3] * 3)
            assert np.isnan(found.blocks[0].variance(found.labels).eta_squared)
            assert "(constant)" in found.rows()[0]["varies, %"]


def test_files_and_figures(tmp_path):
    images, labels = pictures(), torch.from_numpy(LABELS)
    found = {
        name: routing_statistics(planted(**options), [(images, labels)], name=name, names=[f"/a/{i}" for i in range(8)])
        for name, options in (("soft", {}), ("hard", {"routing": "hard"}))
    }
    stored = json.loads(save(found, tmp_path / "r.json").read_text())["results"]["soft"]
    first = stored["blocks"][0]
    assert np.array_equal(np.float32(first["weights"]), found["soft"].blocks[0].weights)
    assert first["frequencies"] == found["soft"].blocks[0].frequencies().tolist()
    assert first["by_class"]["2"]["shares"] == [0, 1, 0]
    assert (first["smallest_fields"][0], first["largest_fields"][0]) == ("/a/4", "/a/2")
    assert first["variance"]["eta_squared"] == found["soft"].blocks[0].variance(LABELS).eta_squared
    assert stored["names"][3] == "/a/3"
    assert save(found, tmp_path / "r.html").read_text().count("<figure>") == 4
    unknown = routing_statistics(planted(), images)
    assert unknown.save(tmp_path / "u.html").read_text().count("<figure>") == 3
    with pytest.raises(ValueError, match="needs images with labels"):
        unknown.plot(kind="classes")
    with pytest.raises(ValueError, match="kind must be one of 'choices', 'heat'"):
        unknown.plot(kind="heta")
    words = RoutingStatistics.reading(found)
    assert re.search(r"In soft \d of 2 blocks have dead experts, and \d ignore the image; in hard \d of 2", words)
    rows = found["hard"].rows()
    assert [row["block"] for row in rows] == ["0", "2"]
    assert {tuple(row) for result in found.values() for row in result.rows()} == {tuple(rows[0])}


def test_figures_show_the_numbers():
    found = routing_statistics(planted(), [(pictures(), torch.from_numpy(LABELS))], name="planted")
    heat = found.plot(kind="heat").axes[0]
    shares = np.stack([block.shares() for block in found.blocks])
    assert np.allclose(heat.images[0].get_array(), 100 * shares)
    # From the smallest field to the largest; three colors with three, three and two images.
    assert [text.get_text() for text in heat.texts] == ["25", "38", "38", "75", "dead", "25"]
    assert sorted(t.get_text() for t in heat.get_xticklabels()) == ["3x3", "3x3 d3", "5x5"]
    bars = found.plot(kind="choices").axes[0].patches
    widths = np.reshape([bar.get_width() for bar in bars], (len(found.blocks), -1))
    assert np.allclose(widths, [100 * block.frequencies() for block in found.blocks])
    ends = np.reshape([bar.get_x() + bar.get_width() for bar in bars], widths.shape)
    assert np.allclose(ends, widths.cumsum(1))  # stacked, and each block adds up to 100 %
    classes = [axis for axis in found.plot(kind="classes").axes if axis.images]
    table = np.stack([part.blocks[0].shares() for part in found.by_class().values()])
    assert np.allclose(classes[0].images[0].get_array(), 100 * (table - table.mean(0)))
    fields = found.plot(kind="fields").axes[0]
    assert [text.get_text() for text in fields.texts] == ["image 4", "image 2", "image 0", "image 4"]


def test_of_many_classes_those_that_differ_are_shown():
    given = np.ones((30, 2), np.float32)
    given[7, 0] = 9
    block = Routing("a", ((3, 1), (5, 1)), given, False)
    names = tuple(f"class {i}" for i in range(30))
    found = RoutingStatistics("m", {}, (block,), np.arange(30), names, names)
    shown = [label.get_text() for label in found.plot(kind="classes").axes[0].get_yticklabels()]
    assert len(shown) == 20
    assert "class 7" in shown


def test_what_cannot_be_asked_is_an_error():
    model, images = MoRFConv2d(3, 3), torch.randn(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"Conv2d has no mixture of receptive fields: convert it with widefield\.MoRF"):
        routing_weights(nn.Conv2d(3, 3, 3), [images])
    with pytest.raises(ValueError, match="images is empty"):
        routing_weights(model, [])
    with pytest.raises(ValueError, match="at least two images; got 1"):
        routing_statistics(model, images[:1])
    with pytest.raises(ValueError, match=r"labels must have the shape \(4,\).*\(2,\)"):
        routing_statistics(model, [(images, torch.zeros(2, dtype=torch.int64))])
    with pytest.raises(TypeError, match=r"labels must be tensors of integers.*torch.float32"):
        routing_statistics(model, [(images, torch.zeros(4))])
    with pytest.raises(TypeError, match=r"labels must be tensors of integers.*list"):
        routing_statistics(model, [(images, [0, 1, 2, 3])])
    with pytest.raises(ValueError, match="label 3 has no name: classes has 2"):
        routing_statistics(model, [(images, torch.arange(4))], classes=("a", "b"))
    with pytest.raises(ValueError, match="names has 1 entries for 4 images"):
        routing_statistics(model, images, names=("one",))
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        routing_statistics(model, images, batch_size=0)
    with pytest.raises(ValueError, match="calls '0' 8 times for 4 images"):
        routing_statistics(nn.Sequential(model, model), images)
    overflowing = MoRFConv2d(3, 3)
    nn.init.constant_(next(overflowing.router.parameters()), torch.nan)
    with pytest.raises(ValueError, match="weights of '' are not finite"):
        routing_statistics(overflowing, images)

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixture = model

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"Idle does not call its mixtures \['mixture'\]"):
        routing_weights(Idle(), [images])
