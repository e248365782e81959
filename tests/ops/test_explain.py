"""explain describes a call without computing it."""

from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.nn.functional as F

from widefield.ops import depthwise_conv2d, explain
from widefield.ops._problem import STEPS


def test_an_explanation_names_every_pass_its_backend_and_the_reasons():
    x, weight = torch.randn(2, 4, 20, 20), torch.randn(4, 1, 21, 21)
    explanation = explain(depthwise_conv2d, x, weight)
    assert explanation.operator == "depthwise_conv2d"
    assert [choice.step for choice in explanation.choices] == list(STEPS)
    assert explanation["forward"].backend == "onednn"
    for choice in explanation.choices:
        assert set(choice.others) == {"aten", "onednn", "fft", "direct", "gemm"} - {choice.backend}
        assert all(choice.others.values())
    text = str(explanation)
    assert text.startswith("depthwise_conv2d\n  forward: onednn (")
    assert "      not gemm: " in text
    with pytest.raises(KeyError, match="'backward'; there are 'forward', 'input_grad', 'weight_grad'"):
        explanation["backward"]
    with pytest.raises(FrozenInstanceError):
        explanation.operator = "else"


def test_explain_takes_names_meta_tensors_and_autocast():
    x, weight = torch.randn(2, 4, 20, 20), torch.randn(4, 1, 21, 21)
    asked = explain(depthwise_conv2d, x, weight, padding=3, backend="fft")
    assert {(choice.backend, choice.reason) for choice in asked.choices} == {("fft", "asked for")}
    assert "it could" in asked["forward"].others["onednn"]
    here, there = (explain(depthwise_conv2d, x.to(d), weight.to(d)) for d in ("cpu", "meta"))
    assert here == there
    with torch.autocast("cpu", torch.float16):
        assert "no torch.float16 arithmetic" in explain(depthwise_conv2d, x, weight)["forward"].reason


def test_explain_takes_meta_tensors_as_those_of_a_cpu_for_named_backends_too():
    x, weight = torch.randn(2, 4, 20, 20), torch.randn(4, 1, 21, 21)
    here, there = (explain(depthwise_conv2d, x.to(d), weight.to(d), backend="onednn") for d in ("cpu", "meta"))
    assert here == there


def test_explain_computes_nothing_and_refuses_what_the_call_would():
    x, weight = torch.randn(2, 4, 20, 20), torch.randn(4, 1, 21, 21)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "conv2d", None)
        explain(depthwise_conv2d, x, weight)
    with pytest.raises(ValueError, match="do not support stride"):
        explain(depthwise_conv2d, x, weight, stride=2, padding=3, backend="fft")
    with pytest.raises(ValueError, match="defined for stride 1"):
        explain(depthwise_conv2d, x, weight, stride=2)
    with pytest.raises(ValueError, match=r"explain knows depthwise_conv2d, mixture_conv2d, bank_conv2d; got 'relu'"):
        explain(torch.relu, x)
