import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.stats import binomtest
from torch import nn

from widefield._intervals import wilson
from widefield.analysis import save
from widefield.analysis.shape_bias import ShapeBias, shape_bias
from widefield.data import Scales
from widefield.data.conflict import SIXTEEN, ConflictImages, write_conflicts

SMALL = {"size": 32, "mean": Scales.mean, "std": Scales.std, "classes": Scales.classes}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return write_conflicts(tmp_path_factory.mktemp("conflicts"), per_pair=1)


class Planted(nn.Module):
    """A model that recognizes every image of a folder, and predicts the class that ``answer`` gives for it."""

    def __init__(self, folder, answer, names=Scales.classes, **reading):
        super().__init__()
        self.images = ConflictImages(folder, **{"size": 32, "mean": Scales.mean, "std": Scales.std, **reading})
        cues = [(sample["shape"], sample["texture"]) for sample in map(self.images.sample, range(len(self.images)))]
        words = [answer(k, *(self.images.classes[label] for label in both)) for k, both in enumerate(cues)]
        self.known = {self.key(self.images.sample(k)["image"]): word for k, word in enumerate(words)}
        self.names = tuple(names)
        self.seen = 0

    @staticmethod
    def key(image):
        return image.numpy().tobytes()

    def forward(self, images):
        self.seen += len(images)
        return torch.stack([self.logits(self.known[self.key(image)]) for image in images])

    def logits(self, word):
        return torch.tensor([3.0 * (name == word) for name in self.names])


def paint(folder, names):
    for k, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return folder


def test_a_model_that_goes_by_shape_or_by_texture_is_found_out(drawn):
    shape = shape_bias(Planted(drawn, lambda k, shape, texture: shape), drawn, **SMALL)
    texture = shape_bias(Planted(drawn, lambda k, shape, texture: texture), drawn, **SMALL)
    assert (shape.bias, shape.cue_accuracy, texture.bias, texture.cue_accuracy) == (1, 1, 0, 1)
    assert shape.classes == tuple(sorted(Scales.classes))
    assert shape.images.tolist() == shape.shape.tolist() == texture.texture.tolist() == [7] * 8
    assert shape.texture.tolist() == texture.shape.tolist() == [0] * 8
    assert shape.interval[1] == 1
    assert texture.interval[0] == 0
    assert shape.about["images"] == 56
    assert shape.about["choice"] == "of 8 classes"


def test_counts_by_class_and_the_interval_of_a_mixed_model(drawn):
    def answer(k, shape, texture):
        # Hearts by shape; of the others, every third image by shape, every third by texture, the rest by neither.
        neither = next(name for name in Scales.classes if name not in (shape, texture))
        return shape if shape == "heart" else (shape, texture, neither)[k % 3]

    model = Planted(drawn, answer)
    found = shape_bias(model, drawn, **SMALL, batch_size=5)
    cues = [path.stem.split("-") for path in model.images.files]
    expected = {name: [0, 0] for name in found.classes}
    for k, (shape, texture) in enumerate((cue[:-1] for cue in pair) for pair in cues):
        word = answer(k, shape, texture)
        expected[shape][0] += word == shape
        expected[shape][1] += word == texture
    assert dict(zip(found.classes, zip(found.shape, found.texture, strict=True), strict=True)) == {
        name: tuple(counts) for name, counts in expected.items()
    }
    hits, decided = int(found.shape.sum()), int((found.shape + found.texture).sum())
    assert 7 < hits < decided < 56
    assert found.bias == hits / decided
    assert found.cue_accuracy == decided / 56
    wilson = binomtest(hits, decided).proportion_ci(method="wilson")
    assert found.interval == pytest.approx((wilson.low, wilson.high), abs=1e-6)
    assert found.shares()[found.classes.index("heart")] == 1
    rows = found.rows()
    assert [row["class"] for row in rows] == ["all", *found.classes]
    assert rows[0]["shape"] == str(hits)
    assert found.to_dict()["bias"] == found.bias


def test_imagenet_models_choose_by_the_mean_probability_of_the_sixteen(tmp_path):
    folder = paint(tmp_path, ["cat/cat1-dog1.png", "cat/cat2-dog1.png", "dog/dog1-cat1.png", "dog/dog2-dog1.png"])

    class Thousand(Planted):
        def logits(self, word):
            # The sum for the dogs is 0.545, the mean 0.005. A word is one class of its sixteen, at 0.3: a mean of 0.05
            # for
            # cats. The rest is outside of the sixteen.
            p = torch.full((1000,), 1e-30, dtype=torch.float64)
            p[list(SIXTEEN["dog"])] = 0.005
            p[SIXTEEN[word][0]] += 0.3
            p[0] = 1 - p.sum()
            return p.log() + 700

    model = Thousand(folder, lambda k, shape, texture: "cat", size=8)
    found = shape_bias(model, folder, size=8, mean=Scales.mean, std=Scales.std)
    assert found.classes == tuple(SIXTEEN)
    assert (found.shape.sum(), found.texture.sum()) == (2, 1)
    assert found.left_out == 1
    assert model.seen == 3  # an image without a conflict is never passed to the model
    assert found.about["choice"] == "of 16 classes, by mean probability"
    assert [row["class"] for row in found.rows()] == ["all", "cat", "dog"]
    far = Thousand(folder, lambda k, shape, texture: shape, size=8)
    far.logits = lambda word: torch.zeros(1000).index_fill(0, torch.tensor(SIXTEEN[word]), -1000.0).neg()
    # Probabilities of all other classes are zero even in float64.
    assert shape_bias(far, folder, size=8, mean=Scales.mean, std=Scales.std).bias == 1


def test_no_decision_for_either_cue_has_no_bias(tmp_path):
    folder = paint(tmp_path, ["cat/cat1-dog1.png"])
    model = Planted(folder, lambda *_: "bird", tuple(SIXTEEN), size=8)
    found = shape_bias(model, folder, size=8, mean=Scales.mean, std=Scales.std, classes=tuple(SIXTEEN))
    assert math.isnan(found.bias)
    assert found.cue_accuracy == 0
    assert found.to_dict()["interval"] == [None, None]
    assert found.rows()[0]["bias (95 %)"] == "-"
    found.plot()


def test_results_are_drawn_with_a_line_a_model_and_saved(drawn, tmp_path):
    answers = {"by shape": lambda k, s, t: s, "by turns": lambda k, s, t: (s, t)[k % 2]}
    results = {n: shape_bias(Planted(drawn, a), drawn, name=n, **SMALL) for n, a in answers.items()}
    (axis,) = ShapeBias.draw(results).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == sorted(Scales.classes)
    lines = [line for line in axis.lines if len(set(line.get_xdata())) == 1 and line.get_marker() == "None"]
    assert [line.get_xdata()[0] for line in lines] == [1, results["by turns"].bias]
    with pytest.raises(TypeError, match="takes no options"):
        ShapeBias.draw(results, log=True)
    turns = results["by turns"]
    bars = axis.collections[-1].get_segments()  # the intervals of the classes
    expected = [row["bias (95 %)"] for row in turns.rows()[1:]]
    assert [f"({100 * bar[0, 0]:.0f}–{100 * bar[1, 0]:.0f})" for bar in bars] == [text.split()[1] for text in expected]
    for suffix in ("png", "json", "html"):
        assert save(results, tmp_path / f"s.{suffix}").stat().st_size > 1000


def test_the_model_is_left_as_it_was_also_after_an_exception(drawn):
    model = timm.create_model("test_convnext", num_classes=8).train()
    model.stem.eval()
    model.head.fc.bias.requires_grad_(False)

    def state():
        return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]

    before, random = state(), torch.get_rng_state()
    shape_bias(model, drawn, **SMALL)
    assert state() == before
    handle = model.head.fc.register_forward_hook(lambda *_: {}["broken"])
    with pytest.raises(KeyError, match="broken"):
        shape_bias(model, drawn, **SMALL)
    handle.remove()
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_classes_that_do_not_fit_are_refused(drawn, tmp_path):
    model = timm.create_model("test_convnext", num_classes=8)
    with pytest.raises(ValueError, match=r"a class 'crescent', which is none of 'airplane'.*pass the names"):
        shape_bias(model, drawn, size=32)
    with pytest.raises(ValueError, match="ConvNeXt has 8 outputs, and classes names 9: pass"):
        shape_bias(model, drawn, **{**SMALL, "classes": [*Scales.classes, "oval"]})
    with pytest.raises(ValueError, match="name every output once"):
        shape_bias(model, drawn, **{**SMALL, "classes": [*Scales.classes, "ring"]})
    folder = paint(tmp_path / "published", ["cat/cat1-dog1.png"])
    with pytest.raises(ValueError, match=r"classes names 1000 \(those of ImageNet, the default\): pass"):
        shape_bias(model, folder, size=32)
    with pytest.raises(ValueError, match="a class 'airplane', which is none of 'disk'"):
        shape_bias(model, folder, **SMALL)
    agreeing = paint(tmp_path / "agreeing", ["cat/cat1-cat2.png"])
    with pytest.raises(ValueError, match=r"no image in .* of different classes"):
        shape_bias(model, agreeing, size=32)
    with pytest.raises(ValueError, match=r"Conv2d is a segmentation model: .* one score per class"):
        shape_bias(nn.Conv2d(3, 8, 1), drawn, **SMALL)
    with pytest.raises(ValueError, match="not finite"):
        shape_bias(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8), Endless()), drawn, **SMALL)


class Endless(nn.Module):
    def forward(self, x):
        return x / 0


def counts(shape, texture, images, name="net"):
    """Return the result of a model with these decisions."""
    bias = shape / (shape + texture) if shape + texture else math.nan
    interval = tuple(wilson(np.array(shape), np.array(shape + texture)).tolist())
    arrays = (np.array([value]) for value in (images, shape, texture))
    return ShapeBias(name, {}, ("cat",), *arrays, bias, interval, (shape + texture) / images, 0)


@pytest.mark.parametrize(
    ("shape", "texture", "images", "words"),
    [
        (30, 10, 50, "shape: 30 of 40 decisions for either cue chose the shape (75%, 95% interval 60 to 86%). It chose "
                     "another class in 10 of 50 images."),
        (2, 48, 50, "texture: 2 of 50 decisions for either cue chose the shape (4%, 95% interval 1 to 13%)."),
        (1, 0, 1, "neither cue for certain: 1 of 1 decision for either cue chose the shape (100%, 95% interval 21 to "
                  "100%)."),
        (0, 0, 1, "net chose neither the class of the shape nor that of the texture in 1 image."),
    ],
)  # fmt: skip
def test_words_hold_the_decisions(shape, texture, images, words):
    found = ShapeBias.reading({"net": counts(shape, texture, images)})
    assert found.removeprefix("net goes by ") == words


def test_words_rank_models_only_if_their_intervals_are_apart():
    by_shape, mixed, by_texture, silent = counts(45, 5, 50), counts(25, 25, 50), counts(5, 45, 50), counts(0, 0, 9)
    assert ShapeBias.reading({"t": by_texture, "s": by_shape}).endswith("s goes by shape more often than t.")
    assert ShapeBias.reading({"t": by_texture, "s": by_shape, "m": mixed}).endswith("more often than the others.")
    near = ShapeBias.reading({"m": mixed, "n": counts(28, 22, 50)})
    assert near.endswith("The intervals of n and m overlap: their order may be chance.")
    assert "more often" not in ShapeBias.reading({"s": by_shape, "none": silent})
