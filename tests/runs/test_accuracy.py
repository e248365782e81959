"""evaluate_model, and evaluation of models whose outputs are not the data's classes."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tolerances
from train.helpers import log
from train.patches import Patches
from widefield import data, tasks
from widefield.data import LabeledImages
from widefield.loading import load_trained
from widefield.loading.labels import MappedClassification, imagenet_names, output_places, real_labels
from widefield.runs import Evaluation, evaluate_model
from widefield.tasks.class_scores import AnyOf
from widefield.train import EmaSpec, Recipe, RunResult, evaluate
from widefield.train.evaluation import Share

Run = Callable[..., RunResult]


class Told(LabeledImages):
    """Images whose first pixels are the expected logits; sample 1 is unreadable on request."""

    def __init__(self, logits: Tensor, labels: list[int], classes: int, *, broken: bool = False) -> None:
        super().__init__("val", 8, 0)
        self.classes = tuple(f"c{index:04}" for index in range(classes))
        self.mean, self.std = (0.0,) * 3, (1.0,) * 3
        self.logits, self.labels, self.broken = logits, labels, broken

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index: int) -> data.Sample | None:
        if self.broken and index == 1:
            return None
        image = torch.zeros(3, 8, 8)
        image.view(-1)[: self.logits.shape[1]] = self.logits[index]
        return {"image": image, "label": self.labels[index], "name": f"ILSVRC2012_val_{index + 1:08}.JPEG"}


class Says(nn.Module):
    """Reads its logits from the image."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        return self.scale * image.flatten(1)[:, : self.outputs]


def told(images: int = 23, classes: int = 12, **options: Any) -> Told:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (images,), generator=generator).tolist()
    logits = torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), labels] += 0.8
    return Told(logits, labels, classes, **options)


def measured(model: nn.Module, dataset: LabeledImages, task: tasks.Task, **options: Any) -> Evaluation:
    return evaluate_model(model, dataset, task, **{"workers": 0, "batch_size": 5, "device": "cpu", **options})


# evaluate_model


def test_numbers_are_those_of_a_plain_loop() -> None:
    dataset, model = told(), Says(12).train()
    found = measured(model, dataset, tasks.create("classification", dataset))
    target = torch.tensor(dataset.labels)
    hits = dataset.logits.topk(5).indices == target[:, None]
    assert found.metrics["top1"] == pytest.approx(hits[:, 0].float().mean().item())
    assert found.metrics["top5"] == pytest.approx(hits.any(1).float().mean().item())
    assert 0 < found.metrics["top1"] < found.metrics["top5"] < 1
    loss = nn.functional.cross_entropy(dataset.logits, target).item()
    assert found.metrics["loss"] == pytest.approx(loss, rel=tolerances.FLOAT32)
    assert (found.images, found.size, found.batch_size, found.processes, found.device) == (23, 8, 5, 1, "cpu")
    assert (found.forward, found.images_per_second) == (None, None)
    assert found.seconds > 0
    assert model.training


@pytest.mark.parametrize("changes", [{}, {"mixed_precision": "bf16", "channels_last": True}])
def test_a_run_is_evaluated_as_it_evaluated_itself(changes: dict[str, Any], run: Run, recipe: Recipe) -> None:
    result = run(ema=EmaSpec(0.5), batch_size=20, **changes)
    val = data.create("scales", "val", **recipe.data.args)
    found = measured(
        load_trained(result.folder, "last"), val, tasks.create("classification", val), batch_size=20, **changes
    )
    last = log(result.folder)[-1]
    assert {f"ema_{name}": value for name, value in found.metrics.items()} == {
        name: last[name] for name in ("ema_loss", "ema_top1", "ema_top5")
    }


def test_unreadable_images_are_left_out_and_counted_so() -> None:
    dataset = told(broken=True)
    found = measured(Says(12), dataset, tasks.create("classification", dataset), batch_size=1)
    assert found.images == 22
    kept = [index for index in range(23) if index != 1]
    right = dataset.logits.argmax(1) == torch.tensor(dataset.labels)
    assert found.metrics["top1"] == pytest.approx(right[kept].float().mean().item())


def test_nothing_to_evaluate_is_an_error() -> None:
    dataset = told(images=2, broken=True)
    dataset.labels = dataset.labels[:0]
    with pytest.raises(ValueError, match="nothing to evaluate"):
        measured(Says(12), dataset, tasks.create("classification", dataset))


def test_throughput_is_of_one_batch_and_written() -> None:
    dataset = told()
    found = measured(Says(12), dataset, tasks.create("classification", dataset), throughput=True, channels_last=True)
    assert found.forward is not None
    assert found.images_per_second == 5 / found.forward.p50
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["images_per_second"] == found.images_per_second
    assert written["forward"]["repeats"] >= 2
    assert written["metrics"] == found.metrics
    assert replace(found, metrics={"real_top1": float("nan")}).to_dict()["metrics"] == {"real_top1": None}


def test_random_numbers_of_others_are_left_alone() -> None:
    dataset = told()
    before = torch.get_rng_state()
    measured(Says(12), dataset, tasks.create("classification", dataset), throughput=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"workers": -1}, "workers must be at least 0; got -1"),
        ({"mixed_precision": "bf61"}, "got 'bf61'. Did you mean 'bf16'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    dataset = told()
    with pytest.raises(ValueError, match=message):
        measured(Says(12), dataset, tasks.create("classification", dataset), **options)


def test_a_model_that_refuses_the_size_is_found_before_any_image_is_read() -> None:
    import timm

    model = timm.create_model("test_vit", num_classes=12)  # accepts only 160x160
    dataset = told()
    dataset.broken = None  # type: ignore[assignment]  # reading would fail
    dataset.sample = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"VisionTransformer refuses images of 3x8x8 .*height"):
        measured(model, dataset, tasks.create("classification", dataset))


@pytest.mark.parametrize(("images", "processes"), [(7, 2), (7, 3), (2, 3), (8, 2)])
def test_shares_hold_every_image_once(images: int, processes: int) -> None:
    dataset = told(images)
    shares = [Share(dataset, process, processes) for process in range(processes)]
    names = [share[index]["name"] for share in shares for index in range(len(share))]
    assert sorted(names) == [dataset[index]["name"] for index in range(images)]


def _process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in environment.items()})
    found = []
    for dataset in (told(broken=True), told(images=1)):  # with one image, the second process gets none
        task = MappedClassification(
            range(12), 12, real={f"ILSVRC2012_val_{i + 1:08}.JPEG": [i % 12] for i in range(23)}
        )
        found.append(measured(Says(12), dataset, task).to_dict())
    patches = Patches("val", count=5)
    found.append(measured(Colors(), patches, tasks.create("segmentation", patches)).to_dict())
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_count_every_image_once(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    real = {f"ILSVRC2012_val_{i + 1:08}.JPEG": [i % 12] for i in range(23)}
    for dataset, images, mine, other in zip((told(broken=True), told(1)), (22, 1), first[:2], second[:2], strict=True):
        alone = measured(Says(12), dataset, MappedClassification(range(12), 12, real=real))
        assert mine["metrics"] == other["metrics"]
        assert mine["images"] == other["images"] == alone.images == images
        assert mine["processes"] == 2
        for name, value in alone.metrics.items():  # image counts are exact, a sum of losses is exact up to rounding
            expected = pytest.approx(value, rel=tolerances.FLOAT32) if name == "loss" else value
            assert mine["metrics"][name] == expected
    patches = Patches("val", count=5)
    alone = measured(Colors(), patches, tasks.create("segmentation", patches))
    for process in (first, second):  # the results of each class cover the images of both, as the means do
        assert process[2]["scores"] == alone.to_dict()["scores"]
        assert process[2]["metrics"]["miou"] == process[2]["scores"]["metrics"]["miou"]


class Colors(nn.Module):
    """Logits of three classes: the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * images


def test_images_are_rated_only_for_examples() -> None:
    patches = Patches("val", count=5)
    rated: list[int] = []

    class Counting(tasks.Segmentation):
        def rate(self, outputs: Any) -> Tensor:
            rated.append(len(outputs["preds"]))
            return super().rate(outputs)

    without = measured(Colors(), patches, Counting.for_data(patches))
    assert not without.examples
    assert without.each is None
    assert not rated
    found = measured(Colors(), patches, Counting.for_data(patches), examples=1)
    assert found.examples
    assert sum(rated) >= 5
    assert found.each is not None
    assert found.each.places.tolist() == list(range(5))
    assert found.each.ratings.max() == found.examples[0].rating
    assert found.each.parts is None  # the mean IoU is not a mean over images


def test_parts_of_the_headline_have_it_as_their_mean() -> None:
    dataset = told()
    found = measured(Says(12), dataset, tasks.create("classification", dataset), examples=1)
    assert found.each is not None
    assert found.each.parts is not None
    assert found.each.parts.mean() == pytest.approx(found.metrics["top1"])
    assert "each" not in found.to_dict()


# Assignment of outputs to classes


def test_known_names_find_their_places_in_any_order() -> None:
    assert output_places(["cat", "dog"], 3, ["dog", "bird", "cat"]) == (2, 0)


def test_imagenet_subsets_go_by_their_identifiers() -> None:
    names = imagenet_names(1000)
    assert names == tuple(ImageNetInfo("imagenet-1k").label_names())
    subset = sorted(names[index] for index in (999, 3, 500))  # WordNet's order is ImageNet's
    assert output_places(subset, 1000, names) == (3, 500, 999)
    assert imagenet_names(7) is None


def test_imagenet_v2_goes_by_number_as_a_whole_set_and_by_word_as_a_part() -> None:
    folders = sorted(map(str, range(1000)))
    assert folders[:3] == ["0", "1", "10"]
    assert output_places(folders, 1000, imagenet_names(1000)) == tuple(map(int, folders))
    assert output_places(["10", "2"], 1000, imagenet_names(1000), "integer") == (10, 2)
    with pytest.raises(ValueError, match=r"2 of the data's 2 classes \('10', '2'\) are not among the model's 1000"):
        output_places(["10", "2"], 1000, imagenet_names(1000))


def test_a_file_names_the_outputs(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("tench\ngoldfish\nshark\n")
    assert output_places(["goldfish", "tench"], 1000, imagenet_names(1000), file) == (1, 0)
    with pytest.raises(ValueError, match="lacks 'whale'"):
        output_places(["whale"], 1000, None, file)
    with pytest.raises(ValueError, match=r"puts 'shark' beyond the last of the model's 2 outputs"):
        output_places(["shark", "tench"], 2, None, file)


@pytest.mark.parametrize(
    ("classes", "outputs", "names", "class_map", "message"),
    [
        (["a", "b", "c"], 2, None, "auto", r"2 outputs and the data 3 classes \('a', 'b', 'c'\).*class map"),
        (["a", "b"], 3, None, "sorted", "3 outputs and the data 2 classes"),
        (["a", "b"], 2, ("a", "c"), "auto", r"1 of the data's 2 classes \('b'\) are not among the model's 2"),
        ([str(i) for i in (0, 1, 10, *range(2, 10))], 11, None, "auto", "'integer'.*'sorted'"),
        (["0", "x"], 2, None, "integer", "got 'x'"),
        (["0", "2"], 2, None, "integer", "puts '2' beyond"),
    ],
)
def test_classes_that_do_not_fit_are_an_error(
    classes: list[str], outputs: int, names: tuple[str, ...] | None, class_map: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        output_places(classes, outputs, names, class_map)


def test_a_misspelt_map_is_no_missing_file_alone() -> None:
    with pytest.raises(FileNotFoundError, match=r"no file 'intger'\. Did you mean 'integer'\?"):
        output_places(["0"], 1, None, "intger")


def test_classes_without_names_go_in_order() -> None:
    assert output_places(["a", "b"], 2) == (0, 1)
    assert output_places(["0", "1"], 2) == (0, 1)  # both orders are the same


# Evaluation


def test_only_the_datas_classes_compete_unless_all_may() -> None:
    logits = torch.tensor([[9.0, 1, 0, 5, 0, 0, 0], [0, 0, 0, 0, 9, 0, 1]])
    dataset = Told(logits, [0, 1], 2)  # the classes are outputs 3 and 6
    alone = measured(Says(7), dataset, MappedClassification((3, 6), 7))
    assert alone.metrics["top1"] == 1.0
    assert "top5" not in alone.metrics
    assert alone.metrics["loss"] == pytest.approx(
        nn.functional.cross_entropy(logits[:, [3, 6]], torch.tensor([0, 1])).item()
    )
    among_all = measured(Says(7), dataset, MappedClassification((3, 6), 7, restrict=False))
    assert (among_all.metrics["top1"], among_all.metrics["top5"]) == (0.0, 1.0)
    assert among_all.metrics["loss"] == pytest.approx(nn.functional.cross_entropy(logits, torch.tensor([3, 6])).item())


def test_outputs_in_another_order_change_nothing() -> None:
    dataset = told()
    order = torch.randperm(12).tolist()  # class i is output order[i]
    moved = Told(dataset.logits[:, torch.tensor(order).argsort()], dataset.labels, 12)
    straight = measured(Says(12), dataset, MappedClassification(range(12), 12)).metrics
    assert measured(Says(12), moved, MappedClassification(order, 12)).metrics == straight
    assert measured(Says(12), moved, MappedClassification(range(12), 12)).metrics["top1"] < straight["top1"]


def test_reassessed_labels_count_as_timm_counts_them(tmp_path: Path) -> None:
    dataset = told(images=40)
    labels = [torch.randperm(12)[: torch.randint(4, ())].tolist() for _ in range(40)]
    assert sum(not found for found in labels) > 3  # unlabeled images
    file = tmp_path / "real.json"
    file.write_text(json.dumps(labels))
    found = measured(Says(12), dataset, MappedClassification(range(12), 12, real=real_labels(file))).metrics
    oracle = RealLabelsImagenet([dataset[index]["name"] for index in range(40)], str(file))
    oracle.add_result(dataset.logits)
    assert found["real_top1"] == pytest.approx(oracle.get_accuracy(1) / 100)
    assert found["real_top5"] == pytest.approx(oracle.get_accuracy(5) / 100)
    assert 0 < found["real_top1"] < found["real_top5"] < 1
    assert found["top1"] != found["real_top1"]
    # The same with a model whose outputs are in another order, and labels in that order.
    order = torch.randperm(12).tolist()
    file.write_text(json.dumps([[order[place] for place in places] for places in labels]))
    moved = Told(dataset.logits[:, torch.tensor(order).argsort()], dataset.labels, 12)
    assert measured(Says(12), moved, MappedClassification(order, 12, real=real_labels(file))).metrics == found


def test_timm_carries_the_labels_of_all_validation_images() -> None:
    known = real_labels()
    assert len(known) == 50_000
    assert sum(not labels for labels in known.values()) == 50_000 - 46_837  # Beyer et al. keep 46,837


def test_reassessed_labels_need_files_of_their_own_and_enough_outputs(tmp_path: Path) -> None:
    dataset = told(images=4)
    real = {"ILSVRC2012_val_00000001.JPEG": [11]}
    with pytest.raises(ValueError, match=r"no reassessed labels of 'ILSVRC2012_val_00000002.JPEG'"):
        measured(Says(12), dataset, MappedClassification(range(12), 12, real=real))
    with pytest.raises(ValueError, match="go up to 11, and the model has 10 outputs"):
        MappedClassification(range(10), 10, real=real)
    scales = data.create("scales", "val", count=4)
    with pytest.raises(ValueError, match="by file names"):
        measured(Says(12), scales, MappedClassification(range(8), 12, real=real))
    for text in ("{", "[1, 2]", '{"a": ["b"]}'):
        (tmp_path / "real.json").write_text(text)
        with pytest.raises(ValueError, match=r"real.json must hold a list of lists"):
            real_labels(tmp_path / "real.json")


def test_any_of_several_right_answers_counts_once() -> None:
    metric = AnyOf(2)
    preds = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1]])
    metric.update(preds, torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0]]).bool())
    assert metric.compute() == 0.5


def test_a_folder_called_by_numbers_is_evaluated_by_them(tmp_path: Path) -> None:
    """ImageNet-V2's format, end to end: the folder 10 is class 10 in any sorting order."""
    for name in ("0", "1", "10", "2"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (int(name) * 20, 0, 0)).save(tmp_path / name / "a.png")
    dataset = data.create("folder", "val", root=tmp_path, size=8, mean=[0.0] * 3, std=[1.0] * 3)

    class Red(nn.Module):
        weight = nn.Parameter(torch.zeros(()))

        def forward(self, image: Tensor) -> Tensor:
            shade = (image[:, 0].mean((1, 2)) * 255 / 20).round().long()
            return nn.functional.one_hot(shade, 11).float()

    places = output_places(dataset.classes, 11, None, "integer")
    assert measured(Red(), dataset, MappedClassification(places, 11)).metrics["top1"] == 1.0
    assert measured(Red(), dataset, MappedClassification((0, 1, 2, 3), 11)).metrics["top1"] == 0.5


def test_evaluate_keeps_to_its_contract() -> None:
    """The training loop passes its own batches, those of one process's shard."""
    dataset = told()
    task = tasks.create("classification", dataset)
    batches = [*DataLoader(dataset, 5, collate_fn=data.collate), {}]
    plain = evaluate(Says(12), batches, task)
    assert plain == measured(Says(12), dataset, task).metrics
    assert evaluate(Says(12), batches, task, shares=True) == plain  # the only process's shard is the whole set
