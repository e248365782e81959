from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from widefield import tasks
from widefield.tasks import Classification, count_outputs

CLASSES = 10


class Linear(nn.Module):
    """Computes logits from the mean color, and stores its last input."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.seen = image
        return self.fc(image.mean((2, 3)))


class Logits(nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.logits


def batch(n: int = 6, classes: int = CLASSES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.rand(n, 3, 8, 8, generator=generator),
        "label": torch.randint(classes, (n,), generator=generator),
        "size": torch.ones(n),
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_plain_loss_is_torchs_cross_entropy(smoothing: float) -> None:
    model, data = Linear(), batch()
    loss = Classification(CLASSES, label_smoothing=smoothing).loss(model, data)
    expected = cross_entropy(model(data["image"]), data["label"], label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.fc.weight.grad is not None


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
@pytest.mark.parametrize("n", [1, 5, 6])
def test_mixing_leaves_the_batch_and_takes_any_size(options: dict[str, float], n: int, mode: str) -> None:
    np.random.seed(0)
    model, data = Linear(), batch(n)
    before = {name: value.clone() for name, value in data.items()}
    loss = Classification(CLASSES, mix_mode=mode, **options).loss(model, data)
    assert loss.shape == ()
    assert loss.isfinite()
    assert all(torch.equal(data[name], before[name]) for name in data)
    if n > 1:
        assert not torch.equal(model.seen[:n], data["image"])


def test_mixing_is_linear_in_the_targets() -> None:
    """Mixup's loss is the mean of the losses against both labels, weighted by timm's lambda."""
    model, data = Linear(), batch()
    np.random.seed(3)
    loss = Classification(CLASSES, mixup=0.8).loss(model, data)
    np.random.seed(3)
    np.random.rand()
    lam = np.random.beta(0.8, 0.8)
    logits = model(lam * data["image"] + (1 - lam) * data["image"].flip(0))
    label = data["label"]
    expected = lam * cross_entropy(logits, label) + (1 - lam) * cross_entropy(logits, label.flip(0))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_loss_asks_for_each_class_whether_it_is_there(smoothing: float) -> None:
    model, data = Linear(), batch()
    targets = one_hot(data["label"], CLASSES) * (1 - smoothing) + smoothing / CLASSES
    loss = Classification(CLASSES, label_smoothing=smoothing, loss="binary").loss(model, data)
    torch.testing.assert_close(loss, binary_cross_entropy_with_logits(model(data["image"]), targets))
    np.random.seed(3)
    mixed = Classification(CLASSES, label_smoothing=smoothing, mixup=0.8, loss="binary").loss(model, data)
    np.random.seed(3)
    np.random.rand()
    lam = np.random.beta(0.8, 0.8)
    both = lam * targets + (1 - lam) * targets.flip(0)
    torch.testing.assert_close(mixed, binary_cross_entropy_with_logits(model(model.seen), both), rtol=1e-5, atol=1e-6)


def test_metrics_over_batches_equal_metrics_over_all() -> None:
    task = Classification(CLASSES, label_smoothing=0.1, mixup=0.8)
    torch.manual_seed(0)
    logits, label = torch.randn(40, CLASSES), torch.randint(CLASSES, (40,))
    logits[:8] += 100 * torch.eye(CLASSES)[label[:8]]  # a first batch without mistakes: top-1 agrees with top-5
    metrics = task.metrics()
    for part in (slice(0, 8), slice(8, 40)):
        metrics.update(**task.outputs(Logits(logits[part]), {"image": torch.zeros(1), "label": label[part]}))
    values = metrics.compute()
    assert set(values) == {"loss", "top1", "top5"}
    torch.testing.assert_close(values["loss"], cross_entropy(logits, label))
    torch.testing.assert_close(values["top1"], (logits.argmax(1) == label).float().mean())
    torch.testing.assert_close(values["top5"], (logits.topk(5).indices == label[:, None]).any(1).float().mean())
    assert values["top1"] != values["top5"]


@pytest.mark.parametrize(("classes", "names"), [(5, {"loss", "top1"}), (6, {"loss", "top1", "top5"})])
def test_top5_needs_more_than_five_classes(classes: int, names: set[str]) -> None:
    task = Classification(classes)
    metrics = task.metrics()
    metrics.update(**task.outputs(Linear(classes), batch(classes=classes)))
    assert set(metrics.compute()) == names
    assert task.headline in names


def test_half_precision_logits_are_evaluated_in_float32() -> None:
    outputs = Classification(CLASSES).outputs(Logits(torch.randn(6, CLASSES).bfloat16()), batch())
    assert outputs["preds"].dtype == outputs["value"].dtype == torch.float32
    assert {value.shape[0] for value in outputs.values()} == {6}


def test_create_reads_the_classes() -> None:
    task = tasks.create("classification", SimpleNamespace(classes=("a", "b", "c")), label_smoothing=0.1)
    assert isinstance(task, Classification)
    assert task.model_args == {"num_classes": 3}


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("clasification", {}, ValueError, "Did you mean 'classification'"),
        ("classification", {"mixpu": 1}, TypeError, "no option 'mixpu'. Did you mean 'mixup'"),
        ("classification", {"mixup": "a"}, TypeError, "mixup must be a number; got 'a'"),
        ("classification", {"mixup": -1}, ValueError, "mixup must be from 0.0"),
        ("classification", {"label_smoothing": 1.0}, ValueError, "below 1"),
        ("classification", {"loss": "binry"}, ValueError, "loss must be one of 'cross_entropy', 'binary'"),
        ("classification", {"mix_mode": "row"}, ValueError, "mix_mode must be one of"),
        ("classification", {"switch_prob": 2}, ValueError, "switch_prob"),
    ],
)
def test_create_refuses(name: str, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(")):
        tasks.create(name, SimpleNamespace(classes=("a", "b")), **options)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        Classification(1)


class Normed(nn.Sequential):
    """Computes logits with a batch norm whose map has one pixel."""

    def __init__(self) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, CLASSES))


def test_a_batch_of_one_before_a_batch_norm_is_explained() -> None:
    task, model = Classification(CLASSES), Normed()
    with pytest.raises(ValueError, match="a batch of 1 is too small to train a batch norm") as caught:
        task.loss(model, batch(1))
    for part in ("torch.Size([1, 3, 1, 1])", "batch_size of at least 2", "last batch of one", "drop_last=True"):
        assert part in str(caught.value)
    assert task.loss(model, batch(2)).isfinite()
    assert task.outputs(model.eval(), batch(1))["preds"].shape == (1, CLASSES)
    with pytest.raises(ValueError, match=r"^another$"):
        task.loss(Failing(), batch(1))


class Failing(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        raise ValueError("another")


def test_only_a_vector_per_image_counts_as_outputs() -> None:
    assert count_outputs(Linear(7), (3, 8, 8)) == 7
    with pytest.raises(ValueError, match=r"Conv2d gives no logits .*gives \(1, 4, 6, 6\)"):
        count_outputs(nn.Conv2d(3, 4, 3), (3, 8, 8))


def test_a_model_with_other_outputs_than_classes_is_refused() -> None:
    Classification(7).check(Linear(7), (3, 8, 8))
    with pytest.raises(ValueError, match="it gives 7 outputs, and the task needs 5, one for each class"):
        Classification(5).check(Linear(7), (3, 8, 8))
