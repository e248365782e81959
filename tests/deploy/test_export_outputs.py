"""Models with output types unknown to PyTorch, or outputs that are not tensors, can be exported."""

import collections
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from tolerances import FLOAT32, close
from widefield import deploy


class ModelOutput(collections.OrderedDict):
    """An output class like Hugging Face's."""


@dataclasses.dataclass
class Data:
    logits: Tensor
    features: Tensor


class Net(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.conv, self.form = nn.Conv2d(3, 5, 3), form

    def forward(self, x):
        maps = self.conv(x)
        return self.form(maps.mean((2, 3)), maps)


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (lambda y, z: ModelOutput(loss=None, logits=y, features=z), ("logits", "features")),
        (Data, ("logits", "features")),
        (collections.namedtuple("Named", ["logits", "features"]), ("logits", "features")),
        (lambda y, z: {"logits": y, "features": z, "name": "text"}, ("logits", "features")),
        (lambda y, z: (None, y, z), ("output_0", "output_1")),
    ],
)
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_any_form_of_output_is_exported(form, names, suffix, tmp_path):
    model, x = Net(form).eval(), torch.randn(2, 3, 8, 8)
    done = deploy.export(model, tmp_path / f"net{suffix}", x)
    assert done.outputs == (names if suffix == ".onnx" else ())
    scores, maps = deploy.load(tmp_path / f"net{suffix}")(x)
    with torch.no_grad():
        close(maps, model.conv(x), FLOAT32)
        close(scores, model.conv(x).mean((2, 3)), FLOAT32)
    assert done.checks[0].agreement is None if names[0] != "logits" else done.checks[0].agreement == 1
