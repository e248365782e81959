"""Groups, costs, recipes, halves and losses of a fit, for all tasks, without training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch.utils.data import default_collate

from fitting.planted import recipe_of
from widefield import bench, data, tasks
from widefield.fitting import FitSpec, halves
from widefield.fitting.costs import measure_costs, plain_model
from widefield.fitting.groups import Groups, find_groups
from widefield.fitting.losses import Losses, Norms
from widefield.fitting.read import Probed, Reader
from widefield.fitting.recipes import START, part_of, plain_recipe, probe_recipe
from widefield.surgery import choose_sizes, elastic_layers
from widefield.train import ModelSpec, Recipe, ScheduleSpec, build_model, load_recipe
from widefield.train.optimization import create_schedule

CPU = torch.device("cpu")


def small(name: str, **args: Any) -> Recipe:
    """Return a shipped recipe on few images."""
    recipe = load_recipe(name)
    return replace(recipe, data=replace(recipe.data, args={**recipe.data.args, "count": 16, **args}), batch_size=4)


def parts_of(recipe: Recipe, **settings: Any) -> tuple[FitSpec, tasks.Task, Groups, torch.Tensor]:
    spec = FitSpec(recipe, **settings)
    val = data.create(recipe.data.name, "val", **recipe.data.args)
    task = tasks.create(recipe.task.name, val, **recipe.task.args)
    images = task.collate([val[0]])["image"]
    return spec, task, find_groups(spec, task, images), images


def test_sizes_that_a_map_cannot_use_are_left_out_and_named() -> None:
    spec, task, groups, images = parts_of(small("demo_scales"), budget="macs")
    assert [(g.name, g.own, g.sizes, len(g.layers)) for g in groups] == [
        ("stage 1", 7, (3, 5, 7, 11), 1),
        ("stage 2", 7, (3, 5, 7), 1),
        ("stage 3", 7, (3, 7), 2),
    ]
    assert "stage 2: 11x11 left out, as a kernel on 4 pixels reaches at most 7" in groups.notes
    assert any(note.startswith("stage 4 keeps 7x7") for note in groups.notes)
    costs = measure_costs(spec, task, groups, images)
    for sizes in ({"stage 1": 3, "stage 2": 5, "stage 3": 3}, {"stage 1": 11, "stage 2": 7, "stage 3": 7}):
        counted = bench.cost(plain_model(spec, task, sizes, groups), images).macs
        assert costs.of(sizes, groups) == pytest.approx(counted / costs.unchanged)
    weights = measure_costs(replace(spec, budget="params"), task, groups, images)
    sizes = {"stage 1": 5, "stage 2": 3, "stage 3": 7}
    counted = bench.cost(plain_model(spec, task, sizes, groups), images).parameters
    assert weights.of(sizes, groups) == pytest.approx(counted / weights.unchanged)


def test_layers_may_choose_alone_and_be_chosen() -> None:
    _, _, groups, _ = parts_of(small("demo_scales"), by="layer", where=["stages.2.*.conv_dw"])
    assert [g.name for g in groups] == ["stages.2.blocks.0.conv_dw", "stages.2.blocks.1.conv_dw"]


def test_dense_models_name_layers_as_their_recipes_do() -> None:
    spec, task, groups, _ = parts_of(small("demo_scenes_fcos"))
    assert any("not depthwise" in note for note in groups.notes)
    recipe = probe_recipe(spec, groups)
    model = build_model(recipe, task)
    for group in groups:
        for layer in group.layers:
            assert list(model.get_submodule(layer.module).kernel_sizes) == list(group.sizes)
    stages = [{model.get_submodule(layer.module).stage for layer in group.layers} for group in groups]
    assert all(len(found) == 1 for found in stages)
    assert len(set.union(*stages)) == len(groups)  # so that each draws its own size


_LAYERS = {
    "torchvision:mobilenet_v3_small": ["features.2.*", "features.4.*"],
    "tf_efficientnet_lite0": ["blocks.1.*.conv_dw", "blocks.3.*.conv_dw"],  # some have TensorFlow's padding
}
"""Model -> layers whose size is chosen."""


@pytest.mark.parametrize("name", ["demo_scales", "demo_scenes", "demo_scenes_fcos", "demo_scenes_pose", *_LAYERS])
def test_settling_starts_from_the_probes_weights_at_the_chosen_sizes(name: str, tmp_path: Path) -> None:
    recipe, where = small("demo_scales" if name in _LAYERS else name), _LAYERS.get(name)
    if where:
        recipe = replace(recipe, model=ModelSpec(name))
    spec, task, groups, _ = parts_of(recipe, where=where, out=tmp_path)
    model = build_model(probe_recipe(spec, groups), task).eval()
    with torch.no_grad():
        for layer in elastic_layers(model).values():
            for expert in layer.experts:
                expert.normal_(std=0.1)
    probed = Probed(model, groups, recipe, task, data.create(recipe.data.name, "train", **recipe.data.args))
    assignment = {group.name: group.sizes[place % 2 - 1] for place, group in enumerate(groups)}  # larger and smaller
    plain = probed.plain(assignment)
    save_model(plain, str(tmp_path / START))
    settled = build_model(plain_recipe(spec, assignment, groups), task)
    assert settled.state_dict().keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(settled.state_dict()[key], value), key
    for group in groups:
        for layer in group.layers:
            module = settled.get_submodule(layer.module)
            assert getattr(module, "layer", module).kernel_size == (assignment[group.name],) * 2


@pytest.mark.parametrize("name", ["cosine", "multistep", "poly"])
def test_probe_and_settling_share_one_schedule(name: str) -> None:
    args = {"decay_milestones": [6, 9]} if name == "multistep" else {}
    recipe = replace(load_recipe("demo_scales"), epochs=10, schedule=ScheduleSpec(name, warmup_epochs=2, args=args))

    def rates(recipe: Recipe) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule, steps = create_schedule(optimizer, recipe.schedule, recipe.epochs or 0, 40)
        assert schedule is not None
        found = []
        for step in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            schedule.step_update(step + 1)
        return found

    parts = [part_of(recipe, 0, 3), part_of(recipe, 3, 7)]
    found = [rates(part) for part in parts]
    whole = rates(recipe)
    assert [len(part) for part in found] == [120, 280]
    assert found[0] == whole[:120]
    assert found[1][6:] == whole[126:]
    assert all(low < rate for low, rate in zip(found[1][:4], whole[120:], strict=False))  # the moments start anew
    assert rates(part_of(parts[1], 2, 3))[2:] == whole[202:320]


def test_a_cool_down_belongs_to_the_last_part() -> None:
    schedule = ScheduleSpec("cosine", args={"cooldown_epochs": 2})
    recipe = replace(load_recipe("demo_scales"), epochs=10, schedule=schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    parts = (part_of(recipe, 0, 3), part_of(recipe, 3, 4), part_of(recipe, 7, 3))
    lengths = [create_schedule(optimizer, part.schedule, part.epochs or 0, 5)[1] for part in parts]
    assert lengths == [15, 20, 25]
    assert sum(lengths) == create_schedule(optimizer, schedule, 10, 5)[1]


def test_networks_without_weights_start_alike_at_all_sizes() -> None:
    recipe = small("demo_scales")
    spec, task, groups, images = parts_of(recipe, by="layer")
    model = build_model(probe_recipe(spec, groups), task).eval()
    outputs = []
    for size in (3, 5, 7):
        choose_sizes(model, size)
        outputs.append(model(images))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)
    assert torch.allclose(outputs[0], outputs[2], atol=1e-6)


def test_halves_share_no_image_and_have_all_labels(tmp_path: Path) -> None:
    val = data.create("scales", "val", count=160)  # its labels alternate with the index
    select, report = halves(val)
    assert len(select) == len(report) == 80
    assert not set(select.indices) & set(report.indices)
    for half in (select, report):
        assert {half[index]["label"] for index in range(80)} == set(range(8))
    people = data.create("scene_poses", "val", count=20, crop_size=32)
    files = [{people.image_id(index) for index in half.indices} for half in halves(people)]
    assert len(files[0]) == len(files[1]) == 10
    assert not files[0] & files[1]


@pytest.mark.parametrize("name", ["demo_scenes_fcos", "demo_scenes_faster_rcnn"])
def test_detectors_have_the_loss_of_training_in_evaluation_mode(name: str) -> None:
    recipe = replace(small(name), batch_size=1)
    val = data.create(recipe.data.name, "val", **{**recipe.data.args, "count": 3})
    task = tasks.create(recipe.task.name, val, **recipe.task.args)
    model = build_model(recipe, task).eval()  # without batch norm and dropout: both modes compute the same
    found = Losses(val, task, recipe, CPU)(model)
    assert not model.training
    assert found == Losses(val, task, recipe, CPU)(model)
    model.train()
    for index, loss in enumerate(found):
        torch.manual_seed(0)
        with torch.no_grad(), data.base.seeded((index,)):
            expected = task.loss(model, task.collate([val[index]]))
        assert loss == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", ["demo_scales", "demo_scenes", "demo_scenes_pose"])
def test_other_tasks_have_a_loss_of_each_image(name: str) -> None:
    recipe = small(name)
    val = data.create(recipe.data.name, "val", **{**recipe.data.args, "count": 2 if "pose" in name else 10})
    task = tasks.create(
        recipe.task.name, val, **{**recipe.task.args, **({"mixup": 0.8} if name == "demo_scales" else {})}
    )
    model = build_model(recipe, task).eval()
    found = Losses(val, task, recipe, CPU)(model)
    assert len(found) == len(val)
    plain = tasks.create(
        recipe.task.name, val, **{**recipe.task.args, **({"label_smoothing": 0.0} if name == "demo_scales" else {})}
    )
    with torch.no_grad():
        for index in (0, len(val) - 1):
            loss = plain.loss(model, task.collate([val[index]]))
            assert found[index] == pytest.approx(float(loss), rel=1e-4)


class Constant(torch.nn.Module):
    """Return the same logits for every image."""

    def __init__(self, logits: torch.Tensor, dense: bool) -> None:
        super().__init__()
        self.logits, self.dense = logits, dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (len(x), len(self.logits), *x.shape[2:]) if self.dense else (len(x), len(self.logits))
        return self.logits.reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)


@pytest.mark.parametrize("name", ["demo_scales", "demo_scenes"])
def test_the_best_answer_without_an_image_has_the_blind_loss(name: str) -> None:
    recipe = small(name)
    val = data.create(recipe.data.name, "val", **{**recipe.data.args, "count": 10})
    task = tasks.create(recipe.task.name, val, **recipe.task.args)
    found = Losses(val, task, recipe, CPU)
    dense = name == "demo_scenes"
    classes = (
        torch.stack([val[i]["mask"] for i in range(10)])
        if dense
        else torch.tensor([val[i]["label"] for i in range(10)])
    )
    counts = classes.flatten().bincount(minlength=len(val.classes)).double()
    best = (counts / counts.sum()).clamp(min=1e-9).log().float()
    assert found.blind() == pytest.approx(sum(found(Constant(best, dense))) / 10, rel=1e-4)
    assert found.blind() < sum(found(Constant(best + 0.3 * torch.randn(len(best)), dense))) / 10


def test_what_is_known_without_an_image_is_not_learned_from_images(tmp_path: Path) -> None:
    """Most pixels are background, which a few steps teach: an untrained network's loss says little."""
    recipe = small("demo_scenes", object_sizes=[8, 10], objects=[1, 1])
    spec, task, groups, _ = parts_of(recipe, out=str(tmp_path))
    val = data.create(recipe.data.name, "val", **recipe.data.args)
    model = build_model(recipe, task).eval()
    half = halves(val)[0]
    reader = Reader(replace(spec), groups, task, half, lambda done, of: None)
    reader.read_untrained(model)
    losses = Losses(half, task, recipe, CPU)
    assert reader.readings.untrained == pytest.approx(losses.blind())
    assert losses.blind() < 0.5 * sum(losses(model)) / len(half)


def test_batch_norms_get_the_statistics_of_train_images_and_nothing_else_changes(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, (1, 2), data={"count": 64})
    train = data.create("pairs", "train", **recipe.data.args)
    task = tasks.create("classification", train)
    model = build_model(recipe, task).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Norms(model, train, task, recipe, CPU).update()
    seen: list[torch.Tensor] = []
    handle = model.norm.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        model(default_collate([train[index]["image"] for index in range(64)]))
    handle.remove()
    torch.testing.assert_close(model.norm.running_mean, seen[0].mean((0, 2, 3)))
    torch.testing.assert_close(model.norm.running_var, seen[0].var((0, 2, 3)), rtol=0.05, atol=1e-3)  # mean of batches'
    assert not model.norm.training
    assert model.norm.momentum == 0.1
    same = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert set(before) - set(same) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
