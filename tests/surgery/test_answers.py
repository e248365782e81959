"""Models that return mappings, named tuples and dataclasses: comparison, ranking, and hints about wrapping."""

import collections
import dataclasses
import re

import pytest
import torch
from torch import Tensor, nn

from tolerances import FLOAT32, close
from widefield import reparameterize
from widefield.surgery import compare
from widefield.surgery.answers import described, exchanged, meant, plainly, tensors, wrapping


class ModelOutput(collections.OrderedDict):
    """A mapping type unknown to PyTorch, like Hugging Face's."""


Named = collections.namedtuple("Named", ["logits", "aux"])  # like torchvision's GoogLeNetOutputs


@dataclasses.dataclass
class Data:
    logits: Tensor
    features: Tensor


FORMS = {
    "tensor": lambda y, z: y,
    "alone": lambda y, z: (y,),
    "dict": lambda y, z: {"features": z, "logits": y},
    "mapping": lambda y, z: ModelOutput(loss=None, logits=y, features=z),
    "segmentation": lambda y, z: collections.OrderedDict(aux=z, out=y),
    "named": Named,
    "dataclass": Data,
    "nothing else": lambda y, z: (None, y, "text", 3),
}


class Net(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.form = form

    def forward(self, x):
        z = self.norm(self.conv(x))
        return self.form(self.fc(z.mean((2, 3))), z)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_any_form_is_compared_ranked_and_reparameterized(form):
    model, x = Net(form).eval(), torch.randn(4, 3, 8, 8)
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    plain = Net(FORMS["tensor"]).eval()
    plain.load_state_dict(model.state_dict())
    assert meant(model(x)) is not None
    close(meant(model(x)), plain(x), FLOAT32)
    merged = reparameterize(model)
    assert isinstance(merged.norm, nn.Identity)
    assert compare(model, merged, x).relative < 1e-4
    change = compare(model, merged, [(x, plain(x).argmax(1))])
    assert (change.agreement, change.accuracy_before, change.accuracy_after) == (1, 1, 1)
    other = Net(form).eval()
    assert compare(model, other, x).relative > 0.01


def test_what_is_not_obvious_is_described_with_the_way_out():
    output = {"boxes": torch.ones(2, 4), "more": [torch.ones(3), (torch.ones(1),)]}
    assert meant(output) is None
    assert described(output) == "dict with ['boxes'] (2, 4), ['more'][0] (3,), ['more'][1][0] (1,)"
    assert wrapping(output).endswith("return self.model(images)['boxes'].")
    assert wrapping({"map": torch.ones(2, 4, 8, 8), "scores": torch.ones(2, 4)}).endswith("(images)['scores'].")
    assert wrapping(torch.ones(2)) == ""
    assert described("text") == "str without a tensor"
    assert meant(Data(None, torch.ones(1))).shape == (1,)
    message = r"got \[\(2, 4\)\] and \[\(2, 3\)\]"
    with pytest.raises(ValueError, match=message):
        compare(nn.Identity(), nn.Linear(4, 3), torch.ones(2, 4))

    class Text(nn.Module):
        def forward(self, x):
            return "text"

    with pytest.raises(ValueError, match=r"cannot be compared: .* got str and str"):
        compare(Text(), Text(), torch.ones(1))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_tensors_are_exchanged_where_they_stand(form):
    output = form(torch.ones(2, 5), torch.zeros(2, 8))
    new = torch.full((2, 5), 7.0)
    found = exchanged(output, meant(output), new)
    assert type(found) is type(output)
    assert meant(found) is new
    assert [t.shape for t in tensors(found)] == [t.shape for t in tensors(output)]
    assert meant(output) is not new


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_tracers_see_is_plain(form):
    model, x = Net(form).eval(), torch.randn(2, 3, 8, 8)
    plain = plainly(model, x)
    known = (Tensor, tuple, dict, collections.OrderedDict)
    assert type(plain(x)) in known
    assert all(torch.equal(a, b) for a, b in zip(tensors(plain(x)), tensors(model(x)), strict=True))
    program = torch.export.export(plain, (x,))
    assert len(tensors(program.module()(x))) == len(tensors(model(x)))
    assert (plain is model) == (form in [FORMS[k] for k in ("tensor", "alone", "dict", "segmentation")])


def test_images_that_cannot_be_are_refused_in_one_place():
    model = nn.Conv2d(3, 2, 1)
    for value in (torch.nan, torch.inf):
        x = torch.zeros(3, 3, 4, 4)
        x[1, 0, 0, 0] = value
        with pytest.raises(ValueError, match=re.escape("image 1 of 3 in a batch holds nan or infinity")):
            compare(model, model, [x])
    with pytest.raises(TypeError, match=r"torch.uint8 tensor\. Divide by 255"):
        compare(model, model, [torch.zeros(1, 3, 4, 4, dtype=torch.uint8)])
    with pytest.raises(TypeError, match=r"ndarray\. Pass torch\.from_numpy\(images\)"):
        compare(model, model, [torch.zeros(1, 3, 4, 4).numpy()])
