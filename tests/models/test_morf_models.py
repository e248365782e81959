import copy

import pytest
import timm
import torch
from test_convert import unsettled

import widefield
from tolerances import BFLOAT16, FLOAT32, NETWORK, close
from widefield.nn import MoRFConv2d, Router

MODELS = ["morf_convnext_base", "morf_convnext_small", "morf_convnext_tiny", "morf_resnet18", "morf_resnet50"]
TINY = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 7}


def mixtures(model):
    return [m for m in model.modules() if isinstance(m, MoRFConv2d)]


def test_all_are_registered_by_the_import():
    assert timm.list_models("morf_*") == MODELS


LARGE = ("morf_convnext_base", "morf_convnext_small", "morf_resnet50")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in MODELS])
def test_fused_equals_unfused_on_every_registered_model(name):
    for routing in ("soft", "hard"):
        model = unsettled(timm.create_model(name, routing=routing))
        fused = widefield.reparameterize(model, torch.randn(2, 3, 64, 64))
        assert widefield.compare(model, fused, torch.randn(3, 3, 96, 64)).relative <= NETWORK


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("morf_resnet18", 22.75),
        ("morf_resnet50", 36.96),
        ("morf_convnext_tiny", 30.39),
        ("morf_convnext_small", 53.85),
        ("morf_convnext_base", 93.59),
    ],
)
def test_parameters_are_those_in_the_docs(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(("name", "blocks"), [("morf_convnext_tiny", 18), ("morf_resnet18", 16), ("morf_resnet50", 16)])
def test_every_block_has_its_mixtures(name, blocks):
    assert len(mixtures(timm.create_model(name))) == blocks


def test_arguments_reach_the_layers():
    model = timm.create_model(
        "morf_convnext_tiny", routing="hard", top_k=1, kernel_sizes=(3, 7), router_width=5, stages=(2, 4), **TINY
    )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MoRFConv2d)}
    assert list(layers) == ["stages.1.blocks.0.conv_dw", "stages.3.blocks.0.conv_dw"]
    for layer in layers.values():
        assert layer.kernel_sizes == (3, 7)
        assert (layer.router.routing, layer.router.top_k, layer.router.hidden.out_features) == ("hard", 1, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"stages": (0,)}, "from 1 to 4; got 0"), ({"stages": ()}, "stages is empty"), ({"routing": "sotf"}, "soft")],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("morf_convnext_tiny", **TINY, **arguments)


@pytest.mark.parametrize("name", ["morf_convnext_tiny", "morf_resnet18"])
def test_behaves_as_everywhere_in_timm(name):
    arguments = TINY if "convnext" in name else {"num_classes": 7}
    model = timm.create_model(name, in_chans=1, drop_path_rate=0.1, **arguments).eval()
    x = torch.randn(2, 1, 64, 64)
    assert model(x).shape == (2, 7)
    assert model.forward_head(model.forward_features(x)).shape == (2, 7)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.pretrained_cfg["architecture"] == name
    assert model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    features = timm.create_model(name, features_only=True, **arguments)
    assert features.feature_info.reduction()[-1] == 32
    assert [f.shape[1] for f in features(torch.randn(1, 3, 64, 64))] == features.feature_info.channels()
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model(name, pretrained=True, **arguments)


@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_every_parameter_gets_a_gradient_and_outputs_are_finite(routing):
    model = timm.create_model("morf_convnext_tiny", routing=routing, ls_init_value=0.1, **TINY)
    y = model(torch.randn(32, 3, 64, 64))
    assert y.isfinite().all()
    y.square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing
    still = [n for n, p in model.named_parameters() if not p.grad.abs().max() > 0]
    assert not still


def test_output_stride_dilates_the_experts():
    model = timm.create_model("morf_convnext_tiny", output_stride=8, **TINY)
    assert mixtures(model)[-1].dilations == (4,) * 5
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape[-2:] == (8, 8)


@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_export_of_the_fused_model_with_a_dynamic_batch(routing):
    fused = widefield.reparameterize(unsettled(timm.create_model("morf_convnext_tiny", routing=routing, **TINY)))
    program = torch.export.export(
        fused, (torch.randn(3, 3, 64, 64),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 64, 64)
        close(program.module()(x), fused(x), FLOAT32)


@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_compile_traces_training_and_inference_without_breaks(routing):
    model = unsettled(timm.create_model("morf_convnext_tiny", routing=routing, **TINY))
    x = torch.randn(3, 3, 64, 64)
    for module in (model, widefield.reparameterize(model)):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        with torch.no_grad():  # the training step below traces the backward pass
            close(compiled(x), module(x), FLOAT32)
    twin = copy.deepcopy(model)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    twin(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            assert p.grad is not None, name
            close(p.grad, q.grad, NETWORK)


@pytest.mark.slow
def test_compile_with_inductor():
    model = unsettled(timm.create_model("morf_convnext_tiny", **TINY))
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        close(torch.compile(model)(x), model(x), FLOAT32)


@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_deepcopy_state_dict_channels_last_and_autocast(routing):
    model = unsettled(timm.create_model("morf_convnext_tiny", routing=routing, **TINY))
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    twin = timm.create_model("morf_convnext_tiny", routing=routing, **TINY).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), expected)
    last = twin.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    close(last, expected, FLOAT32)
    if routing == "soft":  # rounding may change the two best experts
        with torch.autocast("cpu", torch.bfloat16):
            close(model(x), expected, BFLOAT16)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_moving_to_gpu(routing):
    model = unsettled(timm.create_model("morf_convnext_tiny", routing=routing, **TINY))
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    on_gpu = model.cuda()
    close(on_gpu(x.cuda()).cpu(), expected, 1e-3)  # cuDNN may use TF32
    on_gpu.train()(x.cuda()).square().sum().backward()
    assert all(r.gate.weight.grad is not None for r in on_gpu.modules() if isinstance(r, Router))
