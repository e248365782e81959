from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from train.recipe_pages import shipped
from widefield.data.catalog import SETS, create
from widefield.tasks import TASKS
from widefield.train import (
    CheckpointSpec,
    ConversionSpec,
    DataSpec,
    DistillationSpec,
    EmaSpec,
    GroupSpec,
    LayerDecaySpec,
    ModelSpec,
    OptimizerSpec,
    Recipe,
    ScheduleSpec,
    SparsitySpec,
    TaskSpec,
    describe_keys,
    load_recipe,
    save_recipe,
    shipped_recipes,
)
from widefield.train.recipe_io import SHIPPED

YAML = """
name: tiny
model: {name: convnext_atto, args: {dims: [8, 16], eps: 1e-6}}
data: {name: digits}
optimizer: {lr: 4e-3, lr_base_size: 4096, betas: [0.9, 0.99]}
mixed_precision: no
ema: {decay: 0.99}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(YAML)
    return path


def everything() -> Recipe:
    return Recipe(
        name="all",
        model=ModelSpec(
            "m", {"a": (1, (2, 3)), "b": {"c": 1e-7}, "s": "1e-3", "yes": "no", "t": "null", "u": "1:30"}, "w.pth"
        ),
        data=DataSpec("folder", {"root": "/päth with space"}),
        output="elsewhere",
        seed=7,
        conversion=ConversionSpec("morf", where=["stages.*", "head"], args={"kernel_sizes": [3, [5, 2]]}),
        task=TaskSpec(args={"mixup": 0.8}),
        optimizer=OptimizerSpec(
            "sgd",
            1,
            256,
            0,
            (0.9, 1 / 3),
            {"momentum": 0.9},
            [GroupSpec("*.router.*", 0.1), GroupSpec(["a", "b"], 2, 0)],
            LayerDecaySpec(0.9, "stage_wise", 6),
        ),
        schedule=ScheduleSpec("step", 2, 1e-6, 1e-9, {"decay_rate": 0.1}),
        epochs=3,
        batch_size=8,
        workers=0,
        clip_grad=1,
        ema=EmaSpec(0.9999, warmup=True),
        distillation=DistillationSpec("resnet50", 0.3, 2),
        sparsity=SparsitySpec(0.3, 0.2, 50, "gradient", "erk", ["a.*", "b"]),
        mixed_precision="bf16",
        channels_last=True,
        balance=0.01,
        log_every=5,
        checkpoint=CheckpointSpec(keep=5, every=100),
        accumulate=2,
        repeats=3,
        freeze=["stem.*", "*.bias"],
        nonfinite="skip",
        compile=True,
        trackers=["wandb"],
    )


@pytest.mark.parametrize("recipe", [everything(), Recipe("few", ModelSpec("m"), DataSpec("d"))], ids=["all", "few"])
def test_round_trip_is_exact(recipe: Recipe, tmp_path: Path) -> None:
    save_recipe(recipe, tmp_path / "r.yaml")
    again = load_recipe(tmp_path / "r.yaml")
    assert again == recipe
    assert [type(v) for v in dataclasses.asdict(again).values()] == [
        type(v) for v in dataclasses.asdict(recipe).values()
    ]


def test_saved_recipe_reads_the_same_by_plain_yaml(tmp_path: Path) -> None:
    save_recipe(everything(), tmp_path / "r.yaml")
    plain = yaml.safe_load((tmp_path / "r.yaml").read_text())
    assert plain["mixed_precision"] == "bf16"
    assert plain["model"]["args"] == {**everything().model.args}


def test_yaml_as_people_write_it(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.optimizer.lr == 0.004
    assert recipe.model.args == {"dims": [8, 16], "eps": 1e-6}
    assert recipe.optimizer.betas == (0.9, 0.99)
    assert recipe.mixed_precision == "no"
    assert recipe.ema == EmaSpec(0.99)


def test_overrides(path: Path) -> None:
    words = ["--optimizer.lr", "0.01", "--model.args.kernel_sizes", "[3,5]", "--model.args.deep.er=1e-6"]
    words += ["--name", "3", "--ema", "null", "--conversion.kind=morf", "--conversion.where", "a.*", "--clip_grad=1"]
    recipe = load_recipe(path, words)
    assert recipe.optimizer.lr == 0.01
    assert recipe.optimizer.lr_base_size == 4096
    assert recipe.model.args == {"dims": [8, 16], "eps": 1e-6, "kernel_sizes": [3, 5], "deep": {"er": 1e-6}}
    assert recipe.name == "3"
    assert recipe.ema is None
    assert recipe.conversion == ConversionSpec("morf", "a.*")
    assert recipe.clip_grad == 1.0
    assert load_recipe(path, ["--model.pretrained", "true"]).model.pretrained is True
    assert load_recipe(path, ["--model.pretrained", "w.pth"]).model.pretrained == "w.pth"
    groups = load_recipe(path, ["--optimizer.groups", "[{where: a.*, lr_scale: 0.1}, {where: [b]}]"]).optimizer.groups
    assert groups == [GroupSpec("a.*", 0.1), GroupSpec(["b"])]
    for text, where in (("[a, b]", ["a", "b"]), ("*.conv_dw", "*.conv_dw"), ("null", None), ("3", "3")):
        assert load_recipe(path, ["--conversion.kind=morf", "--conversion.where", text]).conversion == ConversionSpec(
            "morf", where
        )


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--optimizer.lrr", "1"], ValueError, "optimizer.lrr: unknown key. Did you mean 'lr'?"),
        (["--lr", "1"], ValueError, "lr: unknown key. Did you mean 'optimizer.lr'?"),
        (["--optimzer.lr", "1"], ValueError, "optimzer: unknown key. Did you mean 'optimizer'?"),
        (["--conversion", "{kind: morf, wher: a}"], ValueError, "conversion.wher: unknown key. Did you mean 'where'?"),
        (["--zzz", "1"], ValueError, "zzz: unknown key. Known here: name, model"),
        (["--optimizer.lr", "fast"], TypeError, "optimizer.lr must be float; got 'fast'"),
        (["--optimizer.lr", "null"], TypeError, "optimizer.lr must be float; got None"),
        (["--seed", "1.5"], TypeError, "seed must be int; got 1.5"),
        (["--seed", "true"], TypeError, "seed must be int; got True"),
        (["--channels_last", "3"], TypeError, "channels_last must be bool; got 3"),
        (["--optimizer.betas", "[1]"], TypeError, "optimizer.betas must be tuple[float, float] | null; got [1]"),
        (["--optimizer.betas", "[0.9, 2]"], ValueError, "optimizer.betas must be from 0.0 to 1.0; got 2"),
        (["--optimizer", "3"], TypeError, "optimizer must hold keys (name, lr"),
        (["--optimizer", "null"], TypeError, "optimizer must hold keys (name, lr"),
        (["--optimizer.lr.x", "3"], ValueError, "optimizer.lr is a value and has no keys of its own; got 'x'"),
        (["--epochs.x", "3"], ValueError, "epochs is a value and has no keys of its own"),
        (["--model.args.dims.x", "3"], TypeError, "model.args.dims is [8, 16] and has no keys of its own"),
        (["--model.args", "3"], TypeError, "model.args must be a mapping of names to values; got 3"),
        (["--model.args", "{1: 2}"], TypeError, "model.args must have names as its keys; got 1"),
        (["--conversion.where", "x"], ValueError, "conversion.kind: missing"),
        (["--conversion.kind", "mrf"], ValueError, "'token_mixer'; got 'mrf'. Did you mean 'morf'?"),
        (["--optimizer.lr", "-1"], ValueError, "optimizer.lr must be from 0.0 to inf; got -1.0"),
        (["--ema.decay", "1.1"], ValueError, "ema.decay must be from 0.0 to 1.0; got 1.1"),
        (["--schedule.name", "cosin"], ValueError, "Did you mean 'cosine'?"),
        (["--schedule.warmup_epochs", "101"], ValueError, "must not exceed epochs; got 101 of 100"),
        (["--mixed_precision", "bf61"], ValueError, "mixed_precision must be one of"),
        (["--name", "a/b"], ValueError, "name of a folder, without separators; got 'a/b'"),
        (["--name", ".."], ValueError, "name of a folder"),
        (["--batch_size", "0"], ValueError, "batch_size must be at least 1; got 0"),
        (["--epochs"], ValueError, "--epochs needs a value"),
        (["--epochs", "--seed", "1"], ValueError, "--epochs needs a value"),
        (["epochs", "3"], ValueError, "expected an option such as --optimizer.lr 0.01; got 'epochs'"),
        (["--model.args.x", "[1"], ValueError, "--model.args.x: '[1' is not valid YAML"),
        (["--model.args.pretrained", "true"], ValueError, "model.args.pretrained: write model.pretrained instead"),
        (
            ["--optimizer.groups", "{where: a}"],
            TypeError,
            "optimizer.groups must be a list of mappings (where, lr_scale",
        ),
        (
            ["--optimizer.groups", "[{were: a}]"],
            ValueError,
            "optimizer.groups[0].were: unknown key. Did you mean 'where'",
        ),
        (["--optimizer.groups", "[{where: a, lr_scale: x}]"], TypeError, "groups[0].lr_scale must be float; got 'x'"),
        (["--optimizer.groups", "[{lr_scale: 1}]"], ValueError, "optimizer.groups[0].where: missing"),
        (["--optimizer.groups", "[{where: a, lr_scale: -1}]"], ValueError, "lr_scale must be from 0.0 to inf; got -1"),
        (
            ["--trackers", "[wand]"],
            ValueError,
            "every entry of trackers must be one of 'tensorboard', 'wandb', 'mlflow'",
        ),
        (["--nonfinite", "ignore"], ValueError, "nonfinite must be one of 'stop', 'skip'; got 'ignore'"),
        (["--fsdp", "true"], ValueError, "fsdp shards the weights, and ema needs them unsharded"),
        (["--fsdp", "true", "--compile", "true"], ValueError, "fsdp and compile cannot be combined"),
        (["--accumulate", "0"], ValueError, "accumulate must be at least 1; got 0"),
        (["--checkpoint.every", "0"], ValueError, "checkpoint.every must be at least 1; got 0"),
    ],
)
def test_overrides_refused(path: Path, words: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        load_recipe(path, words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (YAML + "epoch: 3", ValueError, "epoch: unknown key. Did you mean 'epochs'?"),
        (YAML.replace("lr:", "lrr:"), ValueError, "optimizer.lrr: unknown key. Did you mean 'lr'?"),
        (YAML.replace("4e-3", "[4]"), TypeError, "optimizer.lr must be float; got [4]"),
        (YAML.replace("name: tiny", "name: 3"), TypeError, "name must be str; got 3"),
        (YAML.replace("{decay: 0.99}", "0.99"), TypeError, "ema must hold keys (decay, warmup); got 0.99"),
        (YAML.replace("name: tiny", ""), ValueError, "name: missing; it is name of the run"),
        (YAML.replace("data: {name: digits}", "data: {}"), ValueError, "data.name: missing"),
        ("- a", ValueError, "must hold the keys of a recipe"),
        ("a: [", ValueError, "is not valid YAML"),
    ],
)
def test_yaml_refused(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(error) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    if "unknown" in message:
        assert str(path) in str(caught.value)


def test_values_that_yaml_cannot_hold_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model.args.dtype must be made of .* got torch.float32"):
        ModelSpec("m", {"dtype": torch.float32})
    with pytest.raises(TypeError, match=r"optimizer.lr must be a number; got '1'"):
        OptimizerSpec(lr="1")  # type: ignore[arg-type]


def test_recipes_are_found_by_name_and_by_run(tmp_path: Path) -> None:
    recipe = load_recipe("digits_morf")
    save_recipe(recipe, tmp_path / "config.yaml")
    assert load_recipe(tmp_path) == recipe
    with pytest.raises(FileNotFoundError, match=r"no recipe 'digit_morf'.*Did you mean 'digits_morf'"):
        load_recipe("digit_morf")
    with pytest.raises(FileNotFoundError):
        load_recipe(tmp_path / "nowhere.yaml")


class TestBase:
    @pytest.fixture
    def write(self, tmp_path: Path) -> Callable[[str, str], Path]:
        def to(name: str, text: str) -> Path:
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            return path

        return to

    def test_a_variant_states_its_difference(self, write: Callable[[str, str], Path], tmp_path: Path) -> None:
        write("tiny.yaml", YAML)
        write(
            "more/second.yaml",
            "base: ../tiny.yaml\nname: second\noptimizer: {betas: [0.8, 0.9]}\nmodel: {args: {a: 1}}\n",
        )
        third = load_recipe(write("third.yaml", "base: more/second.yaml\nema: null\nmodel: {args: {a: null, b: 2}}\n"))
        first, second = load_recipe(tmp_path / "tiny.yaml"), load_recipe(tmp_path / "more/second.yaml")
        changed = replace(first.model, args={**first.model.args, "a": 1})
        optimizer = replace(first.optimizer, betas=(0.8, 0.9))
        assert second == replace(first, name="second", model=changed, optimizer=optimizer)
        assert third == replace(second, ema=None, model=replace(changed, args={**changed.args, "a": None, "b": 2}))

    def test_the_command_line_goes_last_and_a_run_stores_the_result(
        self, write: Callable[[str, str], Path], tmp_path: Path
    ) -> None:
        path = write("mine.yaml", "base: digits_morf\nname: mine\nepochs: 3\n")
        recipe = load_recipe(path, ["--epochs", "5", "--model.args.drop_rate", "0.2"])
        shipped = load_recipe("digits_morf")
        args = {**shipped.model.args, "drop_rate": 0.2}
        assert recipe == replace(shipped, name="mine", epochs=5, model=replace(shipped.model, args=args))
        save_recipe(recipe, tmp_path / "config.yaml")
        assert "base:" not in (tmp_path / "config.yaml").read_text()
        assert load_recipe(tmp_path) == recipe

    @pytest.mark.parametrize(
        ("text", "error", "message"),
        [
            ("base: digits_mrf", FileNotFoundError, "base: 'digits_mrf' is neither a file next to"),
            ("base: digits_mrf", FileNotFoundError, "nor a shipped recipe. Did you mean 'digits_morf'?"),
            ("base: [a]", TypeError, "base must be the name of a shipped recipe or a path; got ['a']"),
            ("base: mine.yaml", ValueError, "base: mine.yaml -> mine.yaml is a cycle; remove one of these bases"),
            ("base: other.yaml", ValueError, "base: mine.yaml -> other.yaml -> mine.yaml is a cycle"),
            ("base: broken.yaml", ValueError, "broken.yaml"),
            ("base: _imagenet", ValueError, "name: missing; it is name of the run"),
            ("base: digits_morf\nmodel: {base: a}", ValueError, "model.base: unknown key"),
        ],
    )
    def test_a_wrong_one_is_named(
        self, write: Callable[[str, str], Path], text: str, error: type[Exception], message: str
    ) -> None:
        path = write("mine.yaml", text)
        write("other.yaml", "base: mine.yaml")
        write("broken.yaml", "epoch: 3")  # the message names the file with the key
        with pytest.raises(error, match=re.escape(message)):
            load_recipe(path)

    def test_shipped_bases_are_not_listed(self) -> None:
        files = {path.stem for path in SHIPPED.glob("*.yaml")}
        bases = {name for name in files if name.startswith("_")}
        assert bases
        assert set(shipped_recipes()) == files - bases


def test_shipped_recipes_read() -> None:
    recipes = {name: shipped(name) for name in shipped_recipes()}
    assert {"digits_morf", "morf_convnext_tiny_in1k", "morf_resnet50_in1k"} <= set(recipes)
    assert all(recipe.name == name for name, recipe in recipes.items())
    for name in ("morf_convnext_tiny_in1k", "morf_resnet50_in1k"):
        assert recipes[name].optimizer.lr_at(4096) == pytest.approx(4e-3)
        assert recipes[name].optimizer.lr_at(1024) == pytest.approx(1e-3)


def test_lr_without_a_base_is_taken_as_it_is() -> None:
    assert OptimizerSpec(lr=0.1).lr_at(12345) == 0.1


def test_describe_keys_names_every_key() -> None:
    keys: list[str] = []

    def walk(values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict) and key != "args":
                walk(value, f"{prefix}{key}.")
            else:
                keys.append(f"  --{prefix}{key} (")

    walk(dataclasses.asdict(everything()), "")
    lines = describe_keys().splitlines()
    assert len(lines) == len(keys)
    assert all(any(line.startswith(key) for line in lines) for key in keys)


KNOWN_SETS, KNOWN_TASKS = set(SETS), set(TASKS)
"""Before any test adds its own."""


def test_the_help_names_every_data_set_and_task() -> None:
    lines = {line.split()[0]: line for line in describe_keys().splitlines()}
    for key, known in (("--data.name", KNOWN_SETS), ("--task.name", KNOWN_TASKS)):
        words = lines[key].replace(",", " ").split()
        assert known <= set(words)
    assert set(re.findall(r'``"(\w+)"``', str(create.__doc__))) >= KNOWN_SETS
