"""Models by name and arguments: an argument without effect is an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import build_model_with_cfg
from timm.models._registry import _model_entrypoints
from torch import nn

from train.recipe_pages import shipped
from widefield import data, tasks
from widefield.loading import load
from widefield.tasks import Classification
from widefield.train import (
    ModelSpec,
    OptimizerSpec,
    Recipe,
    ScheduleSpec,
    build_model,
    create_model,
    load_recipe,
    shipped_recipes,
)
from widefield.train.optimization import create_optimizer, create_schedule

SMALL = {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8]}


def scales(model: nn.Module) -> list[str]:
    """Return the names of layer scales; unireplknet has another gamma in its GRN, act.1."""
    return [name for name, _ in model.named_parameters() if "gamma" in name and ".act." not in name]


class TestNone:
    @pytest.mark.parametrize(
        ("name", "args"),
        [
            ("convnext_tiny", {"ls_init_value": None, **SMALL}),
            ("convnext_tiny.fb_in22k", {"ls_init_value": None, **SMALL}),
            ("morf_convnext_tiny", {"ls_init_value": None, **SMALL}),
            ("hornet_tiny_7x7", {"layer_scale_init": None, "depths": [1, 1, 1, 1]}),
            ("unireplknet_a", {"layer_scale_init": None, "depths": [1, 1, 1, 1]}),
        ],
    )
    def test_reaches_the_model(self, name: str, args: dict[str, Any]) -> None:
        assert not scales(create_model(ModelSpec(name, args)))
        given = {key: value for key, value in args.items() if value is not None}
        assert scales(create_model(ModelSpec(name, given)))

    def test_in_a_recipe_and_in_a_word(self, recipe: Recipe) -> None:
        assert not scales(load("convnext_tiny{ls_init_value: null, depths: [1, 1, 1, 1], dims: [4, 4, 8, 8]}").model)
        spec = replace(recipe.model, args={**recipe.model.args, "ls_init_value": None})
        assert not scales(build_model(replace(recipe, model=spec), Classification(3)))

    def test_changes_nothing_where_it_is_the_default(self) -> None:
        torch.manual_seed(0)
        given = create_model(ModelSpec("test_resnet", {"block_args": None, "cache_dir": None}))
        torch.manual_seed(0)
        plain = timm.create_model("test_resnet")
        assert all(torch.equal(a, b) for a, b in zip(given.parameters(), plain.parameters(), strict=True))

    def test_that_the_model_does_not_have_or_stand_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"model.args.ls_int_value: convnext_tiny has no such .* 'ls_init_value'"):
            create_model(ModelSpec("convnext_tiny", {"ls_int_value": None}))
        with pytest.raises(TypeError, match=r"model.args.nonsense: mobilenetv2_lk has no such argument"):
            create_model(ModelSpec("mobilenetv2_lk", {"nonsense": None}))
        with pytest.raises(ValueError, match=r"timm cannot build 'test_convnext' with .*'drop_path_rate': None"):
            create_model(ModelSpec("test_convnext", {"drop_path_rate": None}))


class Deaf(nn.Linear):
    """A model that accepts any argument and uses one."""

    def __init__(self, width: int = 3, **kwargs: Any) -> None:
        super().__init__(width, 2)


@pytest.fixture
def deaf() -> Iterator[str]:
    def deaf_network(pretrained: bool = False, **kwargs: Any) -> Deaf:
        for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kwargs.pop(key)
        return Deaf(**kwargs)

    deaf_network.__module__ = __name__
    timm.models.register_model(deaf_network)
    yield "deaf_network"
    del _model_entrypoints["deaf_network"]


class TestIgnored:
    @pytest.mark.parametrize(
        ("name", "key"),
        [
            ("torchvision:convnext_tiny", "layer_scal"),
            ("torchvision:convnext_tiny", "width_mult"),
            ("torchvision:mobilenet_v3_small", "se_layer"),
            ("deaf_network", "widht"),
        ],
    )
    def test_arguments_are_refused(self, deaf: str, name: str, key: str) -> None:
        with pytest.raises(TypeError, match=f"model.args.{key}: {name} accepts and ignores this argument"):
            create_model(ModelSpec(name, {key: 1}))

    def test_those_that_a_class_builder_or_configuration_reads_are_not(self, deaf: str) -> None:
        assert create_model(ModelSpec(deaf, {"width": 5})).in_features == 5
        narrow = create_model(ModelSpec("torchvision:mobilenet_v3_small", {"width_mult": 0.5, "dropout": 0.1}))
        assert narrow.classifier[0].in_features == 288
        norm = create_model(ModelSpec("test_efficientnet", {"bn_eps": 0.5})).bn1
        assert norm.eps == 0.5
        create_model(ModelSpec("test_byobnet", {"downsample": ""}))  # a key of its configuration
        create_model(ModelSpec("torchvision:convnext_tiny", {"stochastic_depth_prob": 0.3, "layer_scale": 0.1}))

    def test_what_timm_filters_out_is_refused(self, deaf: str) -> None:
        with (
            torch.device("meta"),
            pytest.raises(TypeError, match=r"args.num_classes: test_efficientnet accepts and ign"),
        ):
            create_model(ModelSpec("test_efficientnet", {"features_only": True, "num_classes": 5}))

    def test_a_model_that_drops_the_number_of_classes_is_refused(self) -> None:
        def headless_network(pretrained: bool = False, **kwargs: Any) -> Any:
            return build_model_with_cfg(Deaf, "headless_network", pretrained, kwargs_filter=("num_classes",), **kwargs)

        headless_network.__module__ = __name__
        timm.models.register_model(headless_network)
        try:
            with pytest.raises(ValueError, match=r"model.name: headless_network has no head for num_classes=3"):
                create_model(ModelSpec("headless_network"), {"num_classes": 3})
        finally:
            del _model_entrypoints["headless_network"]

    def test_a_network_that_ignores_weights_gets_them(self, tmp_path: Path) -> None:
        """The function of the network drops `pretrained` and all that goes with it."""

        def plain_network(pretrained: bool = False, **kwargs: Any) -> nn.Module:
            kept = {key: value for key, value in kwargs.items() if not key.startswith("pretrained")}
            return timm.create_model("test_resnet", **kept)

        plain_network.__module__ = __name__
        timm.models.register_model(plain_network)
        try:
            weights = timm.create_model("test_resnet", num_classes=3).state_dict()
            torch.save(weights, tmp_path / "weights.pt")
            spec = ModelSpec("plain_network", pretrained=str(tmp_path / "weights.pt"))
            for classes in (3, 10):
                model = build_model(replace(load_recipe("demo_digits"), model=spec), Classification(classes))
                assert all(torch.equal(model.state_dict()[key], weights[key]) for key in weights if "fc" not in key)
        finally:
            del _model_entrypoints["plain_network"]

    def test_a_file_of_weights_that_is_not_there_is_named(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"model.args.checkpoint_path: there is no file 'nowhere.pth'"):
            create_model(ModelSpec("test_resnet", {"checkpoint_path": "nowhere.pth"}))

    def test_two_sources_of_weights_are_refused(self, recipe: Recipe) -> None:
        spec = replace(recipe.model, args={**recipe.model.args, "checkpoint_path": "a.pth"}, pretrained="b.pth")
        with pytest.raises(ValueError, match=r"both name weights to start from \('a.pth', 'b.pth'\); leave out one"):
            build_model(replace(recipe, model=spec), Classification(3))

    def test_looking_draws_no_random_number(self) -> None:
        torch.manual_seed(0)
        create_model(ModelSpec("test_efficientnet", {"bn_eps": 0.5}))
        after = torch.rand(1)
        torch.manual_seed(0)
        timm.create_model("test_efficientnet", bn_eps=0.5)
        assert torch.equal(torch.rand(1), after)


class TestOptimizerAndSchedule:
    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (OptimizerSpec("sgd", betas=(0.9, 0.99)), "optimizer.betas: the optimizer 'sgd' has no betas"),
            (OptimizerSpec("sgd", args={"eps": 1e-3}), "optimizer.args.eps: the optimizer 'sgd' has no eps"),
            (OptimizerSpec("adamw", args={"momentum": 0.5}), "optimizer.args.momentum: the optimizer 'adamw' has no"),
            (
                OptimizerSpec("adamw", args={"foo": 1}),
                "optimizer: 'adamw' refuses its args {'foo': 1}: AdamW.__init__()",
            ),
            (OptimizerSpec("adamw", args={"eps": None}), "optimizer: 'adamw' refuses its args {'eps': None}"),
            (OptimizerSpec("lookahead_sgd", args={"eps": 1e-3}), "the optimizer 'lookahead_sgd' has no eps"),
        ],
    )
    def test_what_an_optimizer_does_not_read(self, spec: OptimizerSpec, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            create_optimizer(nn.Linear(2, 2), spec, 0.1)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (ScheduleSpec(args={"decay_rate": 0.5}), "schedule.args.decay_rate: the schedule 'cosine' does not read"),
            (ScheduleSpec(args={"k_decay": None}), "schedule.args.k_decay: null is not a value of it"),
            (
                ScheduleSpec(args={"noise": [1, 2, 3], "warmup_prefix": True, "cycle_limit": "x"}),
                "schedule: 'cosine' ref",
            ),
            (ScheduleSpec(args={"cycle_mull": 2}), "Did you mean 'cycle_mul'?"),
            (ScheduleSpec("step", min_lr=1e-6), "schedule.min_lr: the schedule 'step' has no lowest rate"),
            (ScheduleSpec("none", warmup_epochs=2), "schedule.warmup_epochs: the schedule 'none' has no warm-up"),
            (ScheduleSpec("none", args={"noise": 0.5}), "schedule.args.noise: the schedule 'none' does not read it"),
        ],
    )
    def test_what_a_schedule_does_not_read(self, spec: ScheduleSpec, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            create_schedule(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), spec, 10, 5)

    def test_shipped_recipes_are_read_whole(self) -> None:
        for name in shipped_recipes():
            recipe = shipped(name)
            optimizer = create_optimizer(nn.Linear(2, 2), replace(recipe.optimizer, groups=[], layer_decay=None, args={
                key: value for key, value in recipe.optimizer.args.items() if "decay" not in key
            }), 0.1)  # fmt: skip
            length, unit = (recipe.epochs, 5) if recipe.max_steps is None else (recipe.max_steps, 1)
            create_schedule(optimizer, recipe.schedule, length, unit)


def test_short_numbers_in_braces_are_numbers() -> None:
    """As in recipes: YAML 1.1 reads 1e-3 as a string."""
    found = load("convnext_tiny{ls_init_value: 1e-3, depths: [1, 1, 1, 1], dims: [4, 4, 8, 8]}")
    assert torch.equal(found.model.stages[0].blocks[0].gamma, torch.full((4,), 1e-3))


NULLS: dict[str, Callable[[nn.Module], bool]] = {"ls_init_value": lambda model: not scales(model)}
"""Argument -> whether a model was built with None for it."""

WITH_NULLS = [name for name in shipped_recipes() if None in shipped(name).model.args.values()]


def test_some_recipes_have_nulls() -> None:
    assert {"demo_scenes", "demo_scenes_fcos", "demo_scenes_pose"} <= set(WITH_NULLS)


@pytest.mark.parametrize("name", WITH_NULLS)
def test_null_in_a_recipe_is_built(name: str) -> None:
    recipe = load_recipe(name)
    validation = data.create(recipe.data.name, "val", **recipe.data.args)
    model = build_model(recipe, tasks.create(recipe.task.name, validation, **recipe.task.args))
    for key, value in recipe.model.args.items():
        assert value is not None or NULLS[key](model), key  # a new one needs an entry in NULLS


@pytest.mark.parametrize("name", ["demo_digits", "demo_scales", "digits_morf"])
def test_the_recipes_of_the_demo_say_what_they_train(name: str) -> None:
    recipe = load_recipe(name)
    model = create_model(recipe.model, {"num_classes": 10})
    found = [gamma for key, gamma in model.named_parameters() if key.endswith("gamma")]
    stated = recipe.model.args["ls_init_value"]
    assert bool(found) == (stated is not None)
    assert all((gamma == stated).all() for gamma in found)
