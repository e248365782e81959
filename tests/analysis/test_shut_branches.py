"""Residual branches that are shut, as many networks are before they are trained."""

import timm
import torch

import widefield  # noqa: F401
from widefield import cli
from widefield.analysis import shut_branches


def test_norms_at_zero_and_layer_scale_shut_branches():
    assert shut_branches(timm.create_model("resnet18")) == [
        f"layer{stage}.{block}.bn2.weight" for stage in (1, 2, 3, 4) for block in (0, 1)
    ]
    assert shut_branches(timm.create_model("resnet18", zero_init_last=False)) == []
    assert shut_branches(timm.create_model("test_convnext"))  # layer scale from 1e-6
    vit = timm.create_model("test_vit", init_values=1e-5)
    assert all(name.endswith("gamma") for name in shut_branches(vit))
    assert shut_branches(timm.create_model("test_vit")) == []


def test_what_is_open_is_left_alone():
    model = timm.create_model("resnet18")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bn2.weight"):
                parameter.fill_(0.1)
    assert shut_branches(model) == []


def test_commands_say_so(tmp_path, capsys):
    words = ["--size", "64", "--count", "1", "--out", str(tmp_path)]
    assert cli.main(["erf", "resnet18", *words]) == 0
    warning = "warning: 8 scales of resnet18 are nearly zero, such as layer1.0.bn2.weight: their residual branches are"
    assert warning in capsys.readouterr().err
    assert cli.main(["erf", "resnet18{zero_init_last: false}", *words]) == 0
    assert "warning" not in capsys.readouterr().err
