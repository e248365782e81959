"""The rules for the fixtures in tests/fixtures/conformance, and the checks of a model against them.

The fixtures contain key names, shapes, counts and outputs of the papers' official implementations, computed in float64.
:func:`filled` derives the weights of every tensor from its key.
"""

import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "fixtures" / "conformance"
WITHIN = 1e-8
"""Tolerance of every printed number: ten significant digits are printed, and the order of float64 sums may differ."""

OPERATORS_WITHIN = 1e-10
"""Tolerance for single operators, of which twelve digits are printed."""


@cache
def fixture(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


@cache
def operators():
    """Case name -> case."""
    return {case["name"]: case for case in fixture("ops")["cases"]}


def array(entry):
    return torch.tensor(entry["data"], dtype=torch.float64).reshape(entry["shape"])


def filled(model):
    """Fill every entry of the state dict with the numbers that belong to its key; return the model in float64."""
    state = model.state_dict()
    for key, value in state.items():
        if key.endswith("num_batches_tracked") or not value.is_floating_point():
            continue
        v = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(size=tuple(value.shape))
        if key.endswith("running_var"):
            v = 1 + 0.1 * abs(v)
        elif key.endswith("running_mean"):
            v = 0.1 * v
        elif v.ndim >= 2:
            v = v / np.sqrt(np.prod(v.shape[1:]))
        elif key.endswith("bias"):
            v = 0.1 * v
        elif key.endswith("weight"):
            v = 1 + 0.1 * v
        else:
            v = 0.03 * (1 + 0.1 * v)
        state[key] = torch.from_numpy(np.asarray(v)).float()
    model.load_state_dict(state)
    return model.double().eval()


def image(size):
    height, width = (size, size) if isinstance(size, int) else size
    numbers = np.random.Generator(np.random.PCG64(0)).standard_normal((1, 3, height, width))
    return torch.from_numpy(numbers.astype(np.float32)).double()


def same_numbers(actual, expected):
    actual, expected = np.atleast_1d(actual).astype(float), np.atleast_1d(expected).astype(float)
    assert actual.shape == expected.shape
    gaps = np.abs(actual - expected) / np.maximum(1, np.abs(expected))
    assert gaps.max() <= WITHIN, f"{actual[gaps.argmax()]!r} is not {expected[gaps.argmax()]!r}"


def check_state(model, expected):
    """Check that keys and shapes are equal."""
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == expected


def check_logits(model, expected):
    """Check logits. ``expected`` is the file, an extra run (with its own input) or a merged form (with the file's
    input)."""
    size = expected.get("input", {"size": 64})["size"]
    with torch.no_grad():
        logits = model(image(size))[0]
    same_numbers(logits[:16], expected["logits_first16"])
    same_numbers(logits.norm(), expected["logits_l2"])
    same_numbers(logits.mean(), expected["logits_mean"])


def check_features(model, expected, key="stage_features"):
    size = expected["input"]["size"]
    with torch.no_grad():
        features = model.forward_intermediates(image(size), intermediates_only=True)
    assert len(features) == len(expected[key])
    for feature, entry in zip(features, expected[key], strict=True):
        assert list(feature.shape) == entry["shape"]
        same_numbers(feature.norm(), entry["l2"])
        same_numbers(feature.mean(), entry["mean"])
        if "first4" in entry:
            same_numbers(feature.flatten()[:4], entry["first4"])


def check_tensors(model, expected):
    """Return [L2 norm, mean, first element] of every tensor that a merge created or changed."""
    state = model.state_dict()
    for key, numbers in expected["tensor_checks"].items():
        value = state[key]
        same_numbers([value.norm(), value.mean(), value.flatten()[0]], numbers)


def loaded(module, case, key="state_dict"):
    """Load the weights of an operator's case into a module, with all keys; in float64 and evaluation mode."""
    module.double().load_state_dict({name: array(entry) for name, entry in case[key].items()})
    return module.eval()


def check_operator(run, case):
    """Check output and gradient. ``run`` maps input to output in the layout of the case; the gradient is of
    ``sum(output**2)``."""
    x = array(case["input"]).requires_grad_()
    y = run(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    for actual, expected in ((y, array(case["output"])), (grad, array(case["grad_input"]))):
        assert actual.shape == expected.shape
        gap = ((actual - expected).abs() / expected.abs().clamp(min=1)).max()
        assert gap <= OPERATORS_WITHIN
