"""The learner: parameter groups, freezing, accumulation, skipped steps, start weights."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import is_compiled_module
from safetensors.torch import save_file
from torch import nn

import widefield
from tolerances import FLOAT32, close
from train.helpers import log, same_weights
from widefield.loading import load_trained
from widefield.tasks import Classification
from widefield.train import (
    CheckpointSpec,
    ConversionSpec,
    DataSpec,
    EmaSpec,
    GroupSpec,
    ModelSpec,
    OptimizerSpec,
    Recipe,
    RunResult,
    ScheduleSpec,
    build_model,
)
from widefield.train.learner import Learner
from widefield.train.optimization import create_optimizer, freeze
from widefield.train.pretrained import classes_of

Run = Callable[..., RunResult]
MORF = ConversionSpec("morf", "stages.*.conv_dw", {"kernel_sizes": [3, 5, 7]})


def names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[tuple[float, float, set[str]]]:
    """Return (learning rate, weight decay, names) of each group."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [(g["lr"], g["weight_decay"], {by_id[id(p)] for p in g["params"]}) for g in optimizer.param_groups]


class TestWhatDoesNotFit:
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (ModelSpec("convnext_atto", {"in_chans": 1}), "refuses images of 3x32x32 (channels, height, width): "),
            (ModelSpec("convnext_atto", {"features_only": True}), "it gives list with [0] (1, 40, 8, 8), [1]"),
            (ModelSpec("test_vit", {"img_size": 32, "global_pool": ""}), "it gives (1, 5, 8)"),
        ],
    )
    def test_of_a_model_is_found_before_the_run_begins(self, run: Run, model: ModelSpec, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            run(model=model)
        assert str(caught.value).startswith(f"model: {model.name} does not fit the task: ")

    def test_looking_changes_no_random_number(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        loss = run(epochs=1).metrics["train_loss"]
        monkeypatch.setattr(Classification, "check", lambda *args: torch.rand(1))
        assert run(epochs=1, name="other").metrics["train_loss"] == loss

    @pytest.mark.skipif(torch.accelerator.is_available(), reason="trains on the accelerator")
    def test_fp16_on_a_cpu_is_refused(self, run: Run) -> None:
        with pytest.raises(ValueError, match="mixed_precision: fp16 needs a GPU"):
            run(mixed_precision="fp16")


@pytest.mark.parametrize("one_size", [True, False])
def test_images_of_several_sizes_are_not_evaluated_by_the_compiled_model(recipe: Recipe, one_size: bool) -> None:
    """It would be compiled again for each size."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(dynamo_backend="inductor", cpu=True)
    learner = Learner(replace(recipe, compile=True), Classification(5), accelerator)
    compiled = is_compiled_module(learner.agree(one_size=one_size))
    AcceleratorState._reset_state()
    assert compiled == one_size


class TestGroups:
    def test_every_parameter_is_in_one_group_at_its_rate(self) -> None:
        model = widefield.convert(timm.create_model("test_convnext"), widefield.MoRF((3, 7)), "*.conv_dw")
        spec = OptimizerSpec(weight_decay=0.05, groups=[GroupSpec("*.router.*", 0.1, 0.0), GroupSpec("*.bias", 2.0)])
        found = names(create_optimizer(model, spec, 1e-3), model)
        assert sorted(itertools.chain(*(members for *_, members in found))) == sorted(
            name for name, _ in model.named_parameters()
        )
        for lr, decay, members in found:
            for name in members:
                assert lr == pytest.approx(1e-4 if ".router." in name else 2e-3 if name.endswith("bias") else 1e-3)
                weighs = dict(model.named_parameters())[name].ndim > 1 and ".router." not in name
                assert decay == (0.05 if weighs else 0.0)

    def test_without_groups_it_is_timms(self) -> None:
        model = timm.create_model("test_resnet")
        ours = create_optimizer(model, OptimizerSpec(weight_decay=0.1), 1e-3)
        theirs = timm.optim.create_optimizer_v2(model, "adamw", 1e-3, 0.1)
        assert names(ours, model) == names(theirs, model)

    def test_scales_multiply_those_of_layer_decay_and_schedules_keep_them(self) -> None:
        model = timm.create_model("test_convnext")
        spec = OptimizerSpec(args={"layer_decay": 0.5}, groups=[GroupSpec("stem.*", 0.1)])
        optimizer = create_optimizer(model, spec, 1.0)
        rates = {name: lr for lr, _, members in names(optimizer, model) for name in members}
        plain = create_optimizer(model, OptimizerSpec(args={"layer_decay": 0.5}), 1.0)
        expected = {name: lr for lr, _, members in names(plain, model) for name in members}
        assert rates == {n: pytest.approx(lr * (0.1 if n.startswith("stem.") else 1)) for n, lr in expected.items()}
        assert min(expected.values()) < max(expected.values()) == 1.0
        scheduler, _ = timm.scheduler.create_scheduler_v2(
            optimizer, "cosine", 2, step_on_epochs=False, updates_per_epoch=2
        )
        scheduler.step_update(2)
        halved = {name: lr for lr, _, members in names(optimizer, model) for name in members}
        assert halved == {name: pytest.approx(lr / 2, rel=1e-4) for name, lr in rates.items()}

    @pytest.mark.parametrize("name", ["adamw", "sgd", "lookahead_sgd", "lion"])
    def test_a_step_moves_each_group_at_its_rate(self, name: str) -> None:
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        with torch.no_grad():
            for layer in model:
                layer.weight.copy_(torch.eye(2))
        before = [layer.weight.clone() for layer in model]
        spec = OptimizerSpec(name, weight_decay=0, groups=[GroupSpec("0.*", 0.0)])
        optimizer = create_optimizer(model, spec, 0.1)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert torch.equal(model[0].weight, before[0])
        assert not torch.equal(model[1].weight, before[1])

    def test_layer_decay_follows_the_backbone_inside_a_model(self) -> None:
        spec = OptimizerSpec(args={"layer_decay": 0.5})
        bare, inner = timm.create_model("test_convnext"), timm.create_model("test_convnext")
        alone = {n: lr for lr, _, members in names(create_optimizer(bare, spec, 1.0), bare) for n in members}
        nested = Nested(inner)
        found = {n: lr for lr, _, members in names(create_optimizer(nested, spec, 1.0), nested) for n in members}
        heads = {"top.weight": 1.0, "top.bias": 1.0}  # an additional layer, with the full rate
        assert found == {**{f"body.{name}": lr / 2 for name, lr in alone.items()}, **heads}
        assert not hasattr(nested, "group_matcher")

    def test_layer_decay_follows_stages_where_timm_gives_no_layers(self) -> None:
        nested = Nested(timm.create_model("test_convnext", features_only=True))
        optimizer = create_optimizer(nested, OptimizerSpec(args={"layer_decay": 0.5}), 1.0)
        found = {name: lr for lr, _, members in names(optimizer, nested) for name in members}
        stages = {f"body.stages_{stage}.": 0.5 ** (4 - stage) for stage in range(4)}
        expected = {"body.stem_": 0.5**5, **stages, "top.": 1.0}
        for start, lr in expected.items():
            assert {rate for name, rate in found.items() if name.startswith(start)} == {lr}, start
        assert all(name.startswith(tuple(expected)) for name in found)

    def test_a_glob_without_a_match_is_named(self) -> None:
        spec = OptimizerSpec(groups=[GroupSpec(["fc.*", "router"])])
        with pytest.raises(ValueError, match=r"optimizer.groups\[0\].where: 'router' matches no parameter"):
            create_optimizer(timm.create_model("test_resnet"), spec, 0.1)


class Nested(nn.Module):
    """A wrapper module around a network, with a layer of its own."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.top = body, nn.Linear(4, 2)


class TestFreezing:
    @pytest.mark.parametrize("nested", [False, True])
    def test_parts_of_a_model_are_known_by_name(self, nested: bool) -> None:
        def learning(where: str | list[str]) -> set[str]:
            network = timm.create_model("test_resnet", num_classes=0 if nested else 3)
            model = Nested(network) if nested else network
            freeze(model, where)
            learn = {name.removeprefix("body.") for name, p in model.named_parameters() if p.requires_grad}
            return {name.partition(".")[0] for name in learn}

        head = "top" if nested else "fc"
        assert learning("backbone") == {head}
        assert learning("stem") == {"layer1", "layer2", "layer3", "layer4", head}
        assert learning(["stem", "*layer1.*", "head"]) == {"layer2", "layer3", "layer4"}
        with pytest.raises(ValueError, match=r"freeze: (ResNet|Nested) has no neck with parameters that learn"):
            learning("neck")

    @pytest.mark.parametrize(("network", "first"), [("van_b0", "block1"), ("moganet_xtiny", "blocks1")])
    def test_blocks_in_front_of_the_norm_of_a_stage_are_no_stem(self, network: str, first: str) -> None:
        with torch.device("meta"):
            model = timm.create_model(network, depths=(1, 1, 1, 1))
        freeze(model, "stem")
        resting = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
        assert resting == {"patch_embed1"}
        assert all(p.requires_grad for p in model.get_submodule(first).parameters())

    def test_frozen_parameters_and_their_norms_stay(self, run: Run) -> None:
        model = ModelSpec("test_resnet")
        start = build_model(Recipe("r", model, DataSpec("scales")), Classification(8)).state_dict()
        torch.manual_seed(0)
        result = run(model=model, freeze=["conv1.*", "bn1.*", "layer1.*"], epochs=1, seed=0)
        trained = result.model.state_dict()
        frozen = [k for k in start if k.startswith(("layer1.", "bn1.")) and not k.endswith("batches_tracked")]
        free = [k for k in start if k.startswith("layer4.") and k.endswith("weight")]
        again = run(model=model, name="again", freeze=["conv1.*", "bn1.*", "layer1.*"], epochs=1, seed=0)
        assert same_weights(result.model, again.model)
        running = [k for k in frozen if "running_mean" in k]
        assert running
        assert all(trained[k].abs().max() == 0 for k in running)
        assert trained["layer4.0.bn1.running_mean"].abs().max() > 0
        assert free

    def test_norms_stay_with_their_parameters_alone(self) -> None:
        model = timm.create_model("test_resnet")
        resting = freeze(model, ["layer1.*", "layer2.*.weight"])
        layer1 = [m for n, m in model.named_modules() if n.startswith("layer1") and isinstance(m, nn.BatchNorm2d)]
        assert set(resting) == set(layer1)
        assert not any(p.requires_grad for p in model.layer1.parameters())
        assert all(p.requires_grad for n, p in model.layer2.named_parameters() if n.endswith("bias"))

    def test_what_cannot_be_frozen_is_refused(self) -> None:
        model = timm.create_model("test_resnet")
        with pytest.raises(ValueError, match=r"freeze: 'layer9\.\*' matches no parameter"):
            freeze(model, "layer9.*")
        with pytest.raises(ValueError, match="matches every parameter"):
            freeze(model, "*")


class TestAccumulation:
    def test_two_batches_of_eight_are_one_of_sixteen(self, run: Run) -> None:
        plain = {"model": ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]})}
        whole = run(name="whole", **plain)
        parts = run(name="parts", batch_size=8, accumulate=2, **plain)
        assert (whole.steps, parts.steps) == (12, 12)
        for ours, theirs in zip(log(parts.folder), log(whole.folder), strict=True):
            loss = "loss" if ours["kind"] == "step" else "train_loss"
            assert ours[loss] == pytest.approx(theirs[loss], rel=1e-4)
            assert ours["lr"] == theirs["lr"]

    def test_a_rest_that_fills_no_step_is_left_out(self, run: Run) -> None:
        assert run(batch_size=16, accumulate=4, epochs=1).steps == 1  # of six batches
        with pytest.raises(ValueError, match="fewer than one batch of 112"):
            run(name="none", accumulate=7)


class TestRepeats:
    def test_each_image_comes_as_often_augmented_anew(self) -> None:
        from widefield.data import create
        from widefield.train.loaders import batches, train_loader

        digits = create("digits", "train", size=16, augment=True)
        loader = train_loader(digits, Classification(10).collate, 60, 0, seed=0, repeats=3)
        taken = list(batches(loader))
        images = torch.cat([batch["image"] for batch in taken])
        seen = list(zip(torch.cat([batch["index"] for batch in taken]).tolist(), images, strict=True))
        assert len(loader) == len(digits) // 60
        for start in range(0, len(seen), 3):
            triple = seen[start : start + 3]
            assert len({i for i, _ in triple}) == 1
            assert not torch.equal(triple[0][1], triple[1][1])
        assert len({i for i, _ in seen}) == len(seen) // 3
        assert torch.equal(seen[0][1], digits[seen[0][0]]["image"])  # the first repeat is the image without repeats


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], *, gradient: bool = False) -> None:
    """Make the loss, or only its gradient, NaN in the given calls, counted from 1."""
    plain, calls = Classification.loss, itertools.count(1)

    def loss(self: Any, model: nn.Module, batch: Any) -> torch.Tensor:
        value = plain(self, model, batch)
        if next(calls) in steps:
            value = value + (value - value.detach()).sqrt() if gradient else value * float("nan")
        return value

    monkeypatch.setattr(Classification, "loss", loss)


class TestNotFinite:
    @pytest.mark.parametrize("gradient", [False, True])
    def test_a_step_is_skipped_if_asked_and_logged(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, gradient: bool
    ) -> None:
        spoil(monkeypatch, {3, 8}, gradient=gradient)
        result = run(nonfinite="skip")
        assert all(torch.isfinite(tensor).all() for tensor in result.model.state_dict().values())
        entries = log(result.folder)
        skipped = [entry for entry in entries if entry["kind"] == "nonfinite"]
        assert [entry["step"] for entry in skipped] == [3, 8]
        assert all(len(set(entry["images"])) == 16 for entry in skipped)
        assert [entry["step"] for entry in entries if entry["kind"] == "step"] == [1, 2, 4, 5, 6, 7, 9, 10, 11, 12]

    def test_a_run_that_only_skips_gives_up(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        spoil(monkeypatch, set(range(5, 999)))
        with pytest.raises(FloatingPointError, match=r"at step 24 of 24, and so it was in the 20 steps up to it"):
            run(nonfinite="skip", epochs=4)

    def test_the_error_names_the_images_and_leaves_the_last_good_checkpoint(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spoil(monkeypatch, {5})
        with pytest.raises(FloatingPointError, match=r"the loss is nan at step 5 of 12 \(learning rate") as caught:
            run(checkpoint=CheckpointSpec(every=2))
        folder = Path(re.search(r"is in (\S+)/checkpoints", str(caught.value))[1])  # type: ignore[index]
        images = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["images"]
        assert f"images {', '.join(map(str, images[:16]))} of" in str(caught.value)
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]

    def test_norms_and_the_average_do_not_keep_what_a_skipped_step_saw(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain, calls = Classification.loss, itertools.count(1)

        def loss(self: Any, model: nn.Module, batch: Any) -> torch.Tensor:
            image = batch["image"] * float("nan") if next(calls) == 3 else batch["image"]
            return plain(self, model, {**batch, "image": image})

        monkeypatch.setattr(Classification, "loss", loss)
        result = run(model=ModelSpec("test_resnet"), nonfinite="skip", ema=EmaSpec(0.5), epochs=1)
        assert all(torch.isfinite(value) for value in map(torch.tensor, result.metrics.values()))
        assert all(torch.isfinite(tensor).all() for tensor in result.model.state_dict().values())

    def test_weights_that_are_no_numbers_are_never_saved(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        spoil(monkeypatch, {4}, gradient=True)
        with pytest.raises(FloatingPointError, match="weights are NaN or infinite after step 4 of 12") as caught:
            run(checkpoint=CheckpointSpec(keep=1, every=1))
        folder = Path(re.search(r"is in (\S+)/checkpoints", str(caught.value))[1])  # type: ignore[index]
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
        assert all(torch.isfinite(t).all() for t in load_trained(folder, "last").state_dict().values())


class TestLoggedRate:
    """The logged rate is the recipe's, independent of the groups' scales."""

    @pytest.mark.parametrize("args", [{}, {"layer_decay": 0.5}])
    @pytest.mark.parametrize(
        "groups",
        [
            [GroupSpec("stem.*", lr_scale=30)],
            [GroupSpec("*", lr_scale=30)],
            [GroupSpec("stem.*", lr_scale=0), GroupSpec("head.*", lr_scale=0.01)],
        ],
    )
    def test_in_the_log(self, run: Run, groups: list[GroupSpec], args: dict[str, Any]) -> None:
        schedule = ScheduleSpec("cosine", warmup_epochs=1, warmup_lr=1e-5)
        given = {"schedule": schedule, "epochs": 2}
        plain = run(name="plain", optimizer=OptimizerSpec(lr=4e-4), **given)
        grouped = run(name="grouped", optimizer=OptimizerSpec(lr=4e-4, groups=groups, args=args), **given)
        expected, found = ([entry["lr"] for entry in log(one.folder)] for one in (plain, grouped))
        assert found == pytest.approx(expected, rel=1e-12)
        assert max(expected) > 2e-4


class TestDisk:
    def test_too_little_room_is_found_before_training(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 9, 9))
        with pytest.raises(OSError, match=r"need about .* GB \(checkpoint.keep is 2\) and 0.00 GB are free"):
            run()


def test_checkpoints_within_epochs_are_pruned_by_the_rule(run: Run) -> None:
    result = run(checkpoint=CheckpointSpec(keep=1, every=2))
    steps = sorted(int(path.name[5:]) for path in (result.folder / "checkpoints").iterdir())
    assert steps[-1] == 12
    assert set(steps) <= {6, 12}  # the best one and the last


class TestPretrained:
    def test_a_file_gives_its_weights_and_a_fresh_head(self, recipe: Recipe, tmp_path: Path) -> None:
        source = build_model(recipe, Classification(5)).eval()
        for name, save in (("w.safetensors", save_file), ("w.pth", torch.save)):
            save(source.state_dict(), tmp_path / name)
            start = replace(recipe, model=replace(recipe.model, pretrained=str(tmp_path / name)))
            model = build_model(start, Classification(8)).eval()
            x = torch.randn(2, 3, 32, 32)
            assert torch.equal(model.forward_features(x), source.forward_features(x))
            assert model(x).shape == (2, 8)
            assert torch.equal(build_model(start, Classification(5)).eval()(x), source(x))

    def test_a_conversion_keeps_the_function_of_plain_weights(self, recipe: Recipe, tmp_path: Path) -> None:
        source = build_model(recipe, Classification(8)).eval()
        save_file(source.state_dict(), tmp_path / "w.safetensors")
        spec = replace(recipe.model, pretrained=str(tmp_path / "w.safetensors"))
        model = build_model(replace(recipe, model=spec, conversion=MORF), Classification(8)).eval()
        x = torch.randn(2, 3, 32, 32)
        close(model(x), source(x), FLOAT32)
        assert any("router" in name for name, _ in model.named_parameters())

    def test_a_run_is_a_start_too(self, run: Run, recipe: Recipe) -> None:
        first = run(name="first", conversion=MORF, epochs=1)
        start = replace(recipe, model=replace(recipe.model, pretrained=str(first.folder)), conversion=MORF)
        model = build_model(start, Classification(3)).eval()
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(model.forward_features(x), first.model.forward_features(x))  # type: ignore[operator]
        second = run(name="second", conversion=MORF, epochs=1, model=start.model)
        shutil.rmtree(first.folder)
        assert same_weights(load_trained(second.folder), second.model)  # without the file of its start weights

    def test_heads_are_found_where_timm_has_them(self) -> None:
        for name in ("levit_128s", "repvit_m0_9", "caformer_s18", "inception_v4", "resnet18", "test_convnext"):
            heads = timm.models.get_pretrained_cfg(name).classifier
            with torch.device("meta"):
                weights = timm.create_model(name, num_classes=7).state_dict()
            assert classes_of(weights, [heads] if isinstance(heads, str) else heads) == 7, name

    @pytest.mark.parametrize(
        ("content", "error", "message"),
        [
            (None, FileNotFoundError, "there is neither a file nor a run"),
            (b"nonsense", ValueError, "holds no weights"),
            ({"a": 1}, ValueError, "its entries must be tensors by name"),
            ({"stem.0.weight": torch.zeros(1)}, ValueError, "does not fit"),
        ],
    )
    def test_what_cannot_be_a_start_is_refused(
        self, recipe: Recipe, tmp_path: Path, content: Any, error: type[Exception], message: str
    ) -> None:
        path = tmp_path / "w.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(error, match=re.escape(message)):
            build_model(replace(recipe, model=replace(recipe.model, pretrained=str(path))), Classification(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freeze": "nothing.*"}, "freeze: 'nothing.*' matches no parameter"),
        ({"gradient_checkpointing": True, "model": ModelSpec("resnet20_cifar_x")}, "timm knows no model"),
        ({"trackers": ["wandb"]}, "trackers: 'wandb' needs the package wandb"),
    ],
)
def test_what_cannot_work_is_refused_before_training(run: Run, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(**change)
