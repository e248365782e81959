"""Files of masked pre-training in the published forms load in full, or are refused with the keys that differ."""

import copy

import pytest
import timm
import torch

from masking.conformance import _method
from widefield.dense._trunk_keys import trunk_names
from widefield.masking import MaskedAutoencoder, load_encoder, load_pretrained, read_pretrained

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}


def _published(model):
    """Return an autoencoder's encoder under its family's published names and shapes."""
    names = trunk_names(model.encoder)
    found = {}
    for key, value in model.encoder.state_dict().items():
        name = names.names[key]
        found[name] = names.family.stored(name, value)[1] if names.family else value
    return found


def _equal(network, model):
    body = model.encoder.body.state_dict()
    own = network.state_dict()
    return all(torch.equal(own[key], value) for key, value in body.items() if key in own)


def _convnext(method="fcmae", **changes):
    torch.manual_seed(1)
    return MaskedAutoencoder("convnextv2_atto", _method(method, **changes), **SMALL)


def _sparse(weights):
    """Return dense weights in the form of FCMAE's sparse encoder."""
    found = {}
    for key, value in weights.items():
        stem = key.startswith("downsample_layers.0.")
        if value.ndim == 4 and key.endswith("weight") and not stem:
            rows = value.transpose(2, 3).flatten(2)
            kernel = rows[:, 0].t() if value.shape[1] == 1 else rows.permute(2, 1, 0)
            found[key.removesuffix("weight") + "kernel"] = kernel.contiguous()
        elif ".grn." in key:
            found[key] = value.reshape(1, -1)
        elif "pwconv" in key:
            found[key.replace("pwconv1.", "pwconv1.linear.").replace("pwconv2.", "pwconv2.linear.")] = value
        elif not stem and (".norm." in key or (key.startswith("downsample_layers.") and key.split(".")[2] == "0")):
            head, _, last = key.rpartition(".")
            found[f"{head}.ln.{last}"] = value
        elif key.endswith("bias") and not stem:
            found[key] = value[None]
        else:
            found[key] = value
    return {f"encoder.{key}": value for key, value in found.items()}


def _forms():
    fcmae = _convnext(decoder_args={"width": 16})
    encoder, decoder = _published(fcmae), fcmae.decoder.state_dict()
    yield "FCMAE, as released", fcmae, {"model": encoder}, "an encoder alone", False
    yield "FCMAE, as saved", fcmae, {"model": {**_sparse(encoder), **decoder}, "epoch": 3}, "FCMAE", True
    spark = MaskedAutoencoder("resnet18", _method("spark", decoder_args={"width": 64}), **RESNET)
    plain = spark.encoder.body.state_dict()
    whole = {**{f"sparse_encoder.sp_cnn.{key}": value for key, value in plain.items()}, **spark.decoder.state_dict()}
    yield "SparK, with its decoder", spark, {"module": whole, "epoch": 3}, "SparK", True
    yield "SparK, timm's form", spark, plain, "an encoder alone", False
    for method, prefix in (("simmim", "neck.decoder."), ("a2mim", "neck.decoder_pred.")):
        model = MaskedAutoencoder("resnet18", method, **RESNET)
        rest = {prefix + key.removeprefix("decoder."): value for key, value in model.decoder.state_dict().items()}
        backbone = {**model.encoder.body.state_dict(), **model.token.state_dict()}
        content = {"state_dict": {**{f"backbone.{key}": value for key, value in backbone.items()}, **rest}}
        yield method, model, content, "openmixup", True
    yield "a run", fcmae, fcmae.state_dict(), "a run", True


@pytest.mark.parametrize(
    ("name", "model", "content", "kind", "whole"), list(_forms()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_published_files_load(name, model, content, kind, whole, tmp_path):
    path = tmp_path / "file.pth"
    torch.save(content, path)
    file = read_pretrained(path)
    assert file.kind == kind
    assert bool(file.decoder) == whole
    is_resnet = "conv1.weight" in model.encoder.body.state_dict()
    arch, args = ("resnet18", RESNET) if is_resnet else ("convnextv2_atto", SMALL)
    classifier = timm.create_model(arch, num_classes=7, **args)
    head = copy.deepcopy(classifier.get_classifier().state_dict())
    load_encoder(classifier, path)
    assert _equal(classifier, model)
    assert all(torch.equal(value, head[key]) for key, value in classifier.get_classifier().state_dict().items())
    features = timm.create_model(arch, features_only=True, **args)
    load_encoder(features, path)
    images = torch.randn(1, 3, 64, 64)
    classifier.eval(), features.eval()
    assert torch.allclose(
        features(images)[-1], classifier.forward_intermediates(images, intermediates_only=True, indices=1)[-1]
    )
    again = MaskedAutoencoder(arch, model.method, **args)
    load_pretrained(again, path)
    if whole:
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


def test_files_that_do_not_fit_are_refused_whole(tmp_path):
    model = _convnext()
    path = tmp_path / "file.pth"
    torch.save(_published(model), path)
    other = timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 40))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"does not fit ConvNeXt: .*stages.3.0.* is \[.*\], not \[.*\]"):
        load_encoder(other, path)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    deeper = timm.create_model("convnextv2_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
    with pytest.raises(ValueError, match=r"stages\.2\.1\.dwconv.weight is missing"):
        load_encoder(deeper, path)
    lacking = dict(list(_published(model).items())[:-1])
    torch.save({**lacking, "stages.9.0.gamma": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"stages\.9.0.gamma has no place"):
        load_encoder(timm.create_model("convnextv2_atto", **SMALL), path)


def test_another_decoder_is_refused(tmp_path):
    path = tmp_path / "file.pth"
    torch.save(_convnext(decoder_args={"width": 16}).state_dict(), path)
    wider = _convnext(decoder_args={"width": 24})
    with pytest.raises(ValueError, match=r"the decoder of .* is not that of this model: .*mask_token"):
        load_pretrained(wider, path)
