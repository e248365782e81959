"""Models by name (timm, torchvision, widefield, runs) with their expected image format."""

import dataclasses
import re

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from rich.console import Console

from tolerances import NETWORK, close
from widefield.loading import Weights, load
from widefield.tasks import Classification
from widefield.train import ConversionSpec, DataSpec, ModelSpec, Recipe, build_model, train


def test_timms_and_ours_take_arguments_in_braces():
    found = load("test_resnet{num_classes: 5, in_chans: 1}", seed=3)
    assert found.model.num_classes == 5
    assert not found.model.training
    assert (found.size, found.weights) == (160, Weights("random"))
    ours = load("unireplknet_a{depths: [1, 1, 1, 1], widths: [8, 16, 24, 32]}")
    assert ours.model.num_features == 32
    assert ours.mean == (0.485, 0.456, 0.406)


def test_outputs_have_names_where_they_are_known():
    def names(word, origin="pretrained"):
        return dataclasses.replace(load(word), weights=Weights(origin, "weights.pth")).classes

    assert load("test_resnet").classes == ()
    assert names("test_resnet")[0].startswith("tench")
    assert names("test_resnet", "file")[967].startswith("espresso")
    assert names("test_resnet{num_classes: 5}", "file") == ()  # the head differs
    assert names("torchvision:squeezenet1_1")[967] == "espresso"


def test_random_weights_are_a_function_of_the_seed():
    one, again, other = (load("test_resnet", seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


def test_torchvisions():
    found = load("torchvision:squeezenet1_1{num_classes: 7}")
    assert isinstance(found.model, torchvision.models.SqueezeNet)
    assert found.size == 224
    assert found.model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert found.pictures(count=2, size=40).tensor().shape == (2, 3, 40, 40)


def test_a_network_for_images_of_one_size_gets_that_size():
    assert load("torchvision:vit_b_32{image_size: 64, num_classes: 2}").size == 64


def test_a_run_brings_its_own_images(tmp_path):
    args = {"patch_size": 2, "depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8]}
    recipe = Recipe(
        name="tiny",
        model=ModelSpec("convnext_atto", {**args, "in_chans": 1}),
        data=DataSpec("digits", {"size": 32, "channels": 1, "augment": True}),
        output=str(tmp_path),
        epochs=1,
        batch_size=721,
        workers=0,
    )
    result = train(recipe, console=Console(quiet=True))
    found = load(str(result.folder))
    assert (found.name, found.size, found.weights.origin) == ("tiny", 32, "run")
    pictures = found.pictures(count=3)
    assert pictures.classes == tuple("0123456789")
    assert torch.equal(found.model(pictures.tensor()), result.model.cpu()(pictures.tensor()))
    assert found.pictures("photographs", count=1).tensor().shape == (1, 1, 32, 32)


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        ("resnet51", ValueError, "Did you mean 'resnet51q'"),
        ("torchvision:resnet51", ValueError, "torchvision knows no model 'resnet51'. Did you mean 'resnet50'"),
        ("torchvision:resnet18{nmu_classes: 1}", ValueError, "nmu_classes"),
        ("test_resnet{layers", ValueError, "a name and arguments in braces; got 'test_resnet{layers'"),
        ("test_resnet{a: [}", ValueError, "hold no YAML"),
        ("torchvision:r3d_18", ValueError, "torchvision's 'r3d_18' is not an image classifier"),
        ("test_resnet{checkpoint_path: a.pth}", FileNotFoundError, "there is no file 'a.pth'"),
        (".", FileNotFoundError, "is not the folder of a run"),
    ],
)
def test_what_cannot_be_built_is_refused(word, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(message)):
        load(word)


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="the device 'cuda:7' is not available"):
        load("test_resnet", device="cuda:7")


def test_a_recipe_may_train_torchvisions(tmp_path):
    def recipe(name, **model):
        spec = ModelSpec("torchvision:squeezenet1_1", **model)
        return Recipe(
            name=name, model=spec, data=DataSpec("digits", {"size": 32}), output=str(tmp_path), epochs=1,
            batch_size=721, workers=0,
        )  # fmt: skip

    first = train(recipe("first"), console=Console(quiet=True))
    second = build_model(recipe("second", pretrained=str(first.folder)), Classification(10)).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(second(x), first.model.cpu()(x))
    masked = dataclasses.replace(recipe("masked", pretrained=str(first.folder)), conversion=ConversionSpec("gmconv"))
    close(build_model(masked, Classification(10)).eval()(x), second(x), NETWORK)
    with pytest.raises(ValueError, match="does not fit SqueezeNet"):
        build_model(recipe("other", pretrained=str(first.folder)), Classification(9))
    with pytest.raises(ValueError, match="comes with a head for ImageNet"):
        build_model(recipe("other", pretrained=True), Classification(9))


def test_runs_of_one_name_are_told_apart_and_keep_the_order_of_their_classes(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("1", "2", "10"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / split / name / f"{i}.png")
    model = ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8]})
    data = DataSpec("folder", {"root": str(tmp_path / "set"), "size": 32, "class_map": "integer"})
    words = []
    for output in ("a", "b"):
        recipe = Recipe(
            name="same", model=model, data=data, output=str(tmp_path / output), epochs=1, batch_size=3, workers=0
        )
        words.append(str(train(recipe, console=Console(quiet=True)).folder))
    assert [load(word, together_with=words).name for word in words] == words
    found = load(words[0])
    assert found.name == "same"
    pictures = found.pictures(count=None)
    assert pictures.classes == tuple(map(str, range(11)))
    assert [pictures[i]["label"] for i in range(6)] == [1, 1, 10, 10, 2, 2]


def test_a_network_for_gray_images_gets_gray_images():
    found = load("resnet10t{in_chans: 1, num_classes: 3}")
    assert len(found.mean) == len(found.std) == 1
    (batch,) = found.pictures(count=2, size=32).batches()
    assert found.model(batch["image"]).shape == (2, 3)


def saved(folder, **options):
    """Return a file with weights of test_resnet."""
    import timm

    file = folder / "weights of mine.pth"
    torch.manual_seed(7)
    torch.save(timm.create_model("test_resnet", **options).state_dict(), file)
    return file


def test_weights_from_files_are_recorded_as_such(tmp_path):
    file = saved(tmp_path)
    stored = torch.load(file)
    words = {
        f"test_resnet{{checkpoint_path: {file}}}": {},
        f"test_resnet{{pretrained: true, pretrained_cfg_overlay: {{file: {file}}}}}": {},
        f"test_resnet{{pretrained_cfg_overlay: {{file: {file}}}}}": {"pretrained": True},
        f"test_resnet{{pretrained: true, checkpoint_path: {file}, pretrained_cfg_overlay: {{file: {file}}}}}": {
            "pretrained": True
        },
    }
    for word, options in words.items():
        found = load(word, **options)
        assert found.weights == Weights("file", str(file)), word
        assert torch.equal(found.model.state_dict()["fc.weight"], stored["fc.weight"])
    untouched = load(f"test_resnet{{pretrained_cfg_overlay: {{file: {file}}}}}")
    assert untouched.weights == Weights("random")  # timm reads the file only if pretrained weights are requested
    assert not torch.equal(untouched.model.state_dict()["fc.weight"], stored["fc.weight"])


def test_a_run_that_started_from_a_file_is_loaded_without_it(tmp_path):
    args = {"patch_size": 2, "depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8], "in_chans": 1}
    import timm

    file = tmp_path / "start.pth"
    torch.save(timm.create_model("convnext_atto", num_classes=10, **args).state_dict(), file)
    recipe = Recipe(
        name="tiny",
        model=ModelSpec("convnext_atto", {**args, "checkpoint_path": str(file)}),
        data=DataSpec("digits", {"size": 32, "channels": 1}),
        output=str(tmp_path),
        epochs=1,
        batch_size=721,
        workers=0,
    )
    result = train(recipe, console=Console(quiet=True))
    file.unlink()
    found = load(str(result.folder))
    assert found.weights.origin == "run"
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(found.model(x), result.model.cpu()(x))


@pytest.mark.parametrize("word", ["runs/nowhere", "./nowhere", "~/no such folder", "../nowhere{depth: 1}"])
def test_a_path_without_a_folder_is_no_model(word):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*: give the folder of a run, a file or folder"):
        load(word)


def test_a_word_that_is_neither_a_folder_nor_a_model():
    with pytest.raises(ValueError, match=r"neither a folder 'nofolder', nor does timm know a model of that name\.$"):
        load("nofolder")
