"""Snippets that a timm user would guess without the docs either work, or the error names the right argument."""

import inspect

import pytest
import timm
import torch

import widefield


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("convnext_atto", num_classes=4).eval()


def test_plan_and_convert_as_guessed(model):
    steps = widefield.plan(model, widefield.MoRF([3, 5, 7]))
    converted = widefield.convert(model, widefield.MoRF([3, 5, 7]))
    assert len(steps.replaced) == sum(type(m) is widefield.nn.MoRFConv2d for m in converted.modules())


def test_reparameterize_as_guessed(model):
    converted = widefield.convert(model, widefield.LargeKernel(13))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(widefield.reparameterize(converted)(x), model(x), atol=1e-4, rtol=1e-4)


def test_effective_receptive_field_as_guessed(model):
    field = widefield.analysis.effective_receptive_field(model, torch.randn(2, 3, 64, 64))
    assert field.scores.shape == (64, 64)


def test_export_as_guessed(model, tmp_path):
    written = widefield.export(model, tmp_path / "model.onnx", torch.randn(1, 3, 64, 64))
    assert (tmp_path / "model.onnx").stat().st_size == written.bytes


@pytest.mark.parametrize(
    ("guess", "right"),
    [
        (
            lambda m: widefield.MoRF(kernel_size=(3, 5)),
            "MoRF() has no argument 'kernel_size'. Did you mean 'kernel_sizes'?",
        ),
        (lambda m: widefield.LargeKernel(13, small_kernel=5), "Did you mean 'small'?"),
        (
            lambda m: widefield.plan(m, widefield.MoRF(), layers="*"),
            "plan() has no argument 'layers'. Did you mean 'where'?",
        ),
        (lambda m: widefield.convert(m, widefield.MoRF(), in_place=True), "Did you mean 'inplace'?"),
        (lambda m: widefield.reparameterize(m, input_size=224), "Did you mean 'example_input'?"),
        (lambda m: widefield.trim(m, tol=0.1), "Did you mean 'tolerance'?"),
        (lambda m: widefield.specialize(m, dataloader=[]), "Did you mean 'loader'?"),
        (lambda m: widefield.export(m, "m.onnx", opset_version=18), "Did you mean 'opset'?"),
        (lambda m: widefield.export(m, "m.onnx", dummy_input=None), "Did you mean 'example_input'?"),
        (lambda m: widefield.quantize(m, "m.onnx", dataset=[]), "Did you mean 'loader'?"),
        (lambda m: widefield.compare(m, m, x=None), "Did you mean 'images'?"),
        (lambda m: widefield.analysis.effective_receptive_field(m, 64, target_layer="x"), "Did you mean 'layer'?"),
        (lambda m: widefield.analysis.class_activation(m, 64, class_idx=3), "Did you mean 'targets'?"),
        (lambda m: widefield.trim(m, wrong=1), "It takes model, tolerance"),
    ],
)
def test_a_wrong_argument_names_the_right_one(model, guess, right):
    with pytest.raises(TypeError) as raised:
        guess(model)
    assert right in str(raised.value)


def test_every_verb_conversion_and_analysis_does():
    functions = (getattr(widefield.analysis, name) for name in widefield.analysis.__all__)
    analyses = {f for f in functions if inspect.isfunction(f) and "model" in inspect.signature(f).parameters}
    assert len(analyses) >= 10
    for called in {getattr(widefield, name) for name in widefield.__all__} | analyses:
        with pytest.raises(TypeError, match="has no argument 'qqq'"):
            called(qqq=1)
