"""Check fixtures of masked image modeling: numbers of the official codes against this library's.

Usage: ``python tests/masking/conformance.py FILE...``. It prints what differs, and exits with 1 if anything does, also
for a file of an unknown method. Weights are filled under their published names, and everything runs in float64.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dense.rules import Check, Differences, checked, filled, run_script
from widefield.dense._trunk_keys import plain_keys, trunk_names
from widefield.masking import METHODS, FrequencyLoss, MaskedAutoencoder, Method, release
from widefield.masking.objectives import masked_error
from widefield.masking.patches import stretched
from widefield.masking.probe import leaking_pixels

Document = Mapping[str, Any]

_FIELDS = ("source", "model", "method", "config", "fill", "input", "mask_convention", "params", "runs")


_PARTS = {
    "encoder": ("encoder",),
    "encoder_without_norm_and_head": ("encoder",),
    "backbone_with_token": ("encoder", "token"),
    "decoder": ("decoder",),
    "decoder_parts": ("decoder",),
    "rest": ("decoder",),
}
"""Name of a number of parameters in files -> the parts of our model."""


def images(run: Document) -> Tensor:
    """Return the input of the rule input-v1."""
    generator = np.random.Generator(np.random.PCG64(0))
    drawn = generator.standard_normal((run["n"], 3, *_sides(run)))
    return torch.from_numpy(drawn).float().double()


def masks(run: Document) -> Tensor:
    """Return the masks of a run, bool (N, h, w)."""
    height, width = _sides(run)
    return torch.tensor(run["mask"], dtype=torch.bool).view(-1, height // 32, width // 32)


def _sides(run: Document) -> tuple[int, int]:
    size = run["size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _network(document: Document) -> nn.Module:
    """Return the encoder of a file as timm has it."""
    config, name = document["config"], document["model"]
    if "dims" in config:
        return timm.create_model(
            "convnext_atto", depths=config["depths"], dims=config["dims"], conv_mlp=False, ls_init_value=1e-6
        )
    return timm.create_model(name)


class Prepared:
    """A model with filled weights in float64, and the published names of its weights."""

    def __init__(self, document: Document, method: Method) -> None:
        self.model = MaskedAutoencoder(_network(document), method)
        names = trunk_names(self.model.encoder)
        self.names, self._family = names.names, names.family
        plain = {f"body.{key}": name for key, name in plain_keys(self.model.encoder.body)[0].items()}
        if set(plain.values()) <= set(document.get("encoder_state_dict", ())):  # timm's own, such as those of ResNet-D
            self.names, self._family = plain, None
        self._is_a2mim = document["method"] == "a2mim"
        state = {}
        for key, value in self.model.state_dict().items():
            stored = self.stored(key, value)
            state[key] = filled(self.published(key), stored).reshape(value.shape)
        self.model.load_state_dict(state)
        self.model.double()

    def published(self, key: str) -> str:
        """Return the published name of a weight."""
        part, _, own = key.partition(".")
        if part == "encoder":
            return self.names[own]
        return own.replace("decoder.0", "decoder_pred.0") if self._is_a2mim else own

    def stored(self, key: str, value: Tensor) -> Tensor:
        """Return a weight in its published shape."""
        trunk = key.startswith("encoder.") and self._family is not None
        return self._family.stored(self.published(key), value)[1] if trunk else value

    def count(self, *parts: str) -> int:
        """Return the number of parameters of some parts."""
        return sum(p.numel() for name, p in self.model.named_parameters() if name.split(".")[0] in parts)

    def check_counts(self, document: Document, differences: Differences) -> None:
        """Compare the numbers of parameters of a file."""
        for name, value in document["params"].items():
            differences.equal(f"params.{name}", self.count(*_PARTS[name]), value)

    def shapes(self, *parts: str) -> dict[str, list[int]]:
        """Return published names and shapes of the weights of some parts."""
        found = self.model.state_dict()
        return {self.published(key): list(self.stored(key, value).shape)
                for key, value in found.items() if key.split(".")[0] in parts}  # fmt: skip

    def gradients(self) -> dict[str, float]:
        """Return the norms of all gradients by published name."""
        return {self.published(name): p.grad.norm().item()
                for name, p in self.model.named_parameters() if p.grad is not None}  # fmt: skip

    def buffers(self) -> dict[str, Tensor]:
        """Return the running statistics by published name."""
        return {self.published(name): value for name, value in self.model.named_buffers()}


def _summary(differences: Differences, where: str, found: Tensor, expected: Mapping[str, Any]) -> None:
    entry = {("first" if name == "first4" else name): value for name, value in expected.items()}
    differences.summary(where, found, entry)


def _gradients(differences: Differences, where: str, found: Mapping[str, float], expected: Mapping[str, float]) -> None:
    for name, value in expected.items():
        differences.numbers(f"{where}.grad_l2.{name}", found.get(name, float("nan")), value)


def _running(differences: Differences, where: str, found: Mapping[str, Tensor], expected: Document) -> None:
    for name, (norm, mean, first) in expected.items():
        value = found[name.removeprefix("sparse_encoder.sp_cnn.")]
        numbers = [value.norm().item(), value.mean().item(), value.flatten()[0].item()]
        differences.numbers(f"{where}.running.{name}", numbers, [norm, mean, first])


def _method(name: str, **changes: Any) -> Method:
    return replace(METHODS[name], **changes)


def check_fcmae(document: Document, differences: Differences) -> None:
    """Check encoder, prediction, losses, gradients and the influence of masked pixels of FCMAE."""
    differences.fields("file", document, (*_FIELDS, "encoder_state_dict_dense", "decoder_state_dict",
                                          "encoder_state_dict_as_saved_by_main_pretrain"))  # fmt: skip
    for index, run in enumerate(document["runs"]):
        for grn in ("batch", "image", "jax"):
            if f"grn_{grn}" in run:
                where = f"runs[{index}].grn_{grn}"
                _check_fcmae_run(document, run, run[f"grn_{grn}"], grn, where, differences)
        known = ("n", "size", "mask", "official_sparse_vs_dense_max_abs", "not_sparse_encoder_l2", "grn_batch",
                 "grn_image", "grn_jax")  # fmt: skip
        differences.fields(f"runs[{index}]", run, known)


def _check_fcmae_run(
    document: Document, run: Document, expected: Document, grn: str, where: str, differences: Differences
) -> None:
    config = document["config"]
    changes: dict[str, Any] = {"grn": grn}
    changes["decoder_args"] = {"width": config["decoder_width"], "depth": config["decoder_depth"]}
    prepared = Prepared(document, _method("fcmae", **changes))
    model = prepared.model.eval()
    trunk = {name: shape for name, shape in document["encoder_state_dict_dense"].items()
             if not name.startswith(("norm.", "head."))}  # fmt: skip
    differences.state(prepared.shapes("encoder"), trunk)
    differences.state(prepared.shapes("decoder"), document["decoder_state_dict"])
    prepared.check_counts(document, differences)
    x, mask = images(run).requires_grad_(), masks(run)
    raw: list[Tensor] = []
    model.decoder.pred.register_forward_hook(lambda module, inputs, output: raw.append(output))
    maps = model.encode(x, mask)
    prediction = model.decoder(maps, mask)
    (loss,) = model.losses(prediction, x, mask).values()
    loss.backward()
    _summary(differences, f"{where}.encoder", maps[-1], expected["encoder"])
    _summary(differences, f"{where}.prediction", raw[0], expected["prediction"])
    differences.numbers(f"{where}.loss", loss.item(), expected["loss"])
    plain = masked_error(prediction, x, stretched(mask, *x.shape[2:]))
    differences.numbers(f"{where}.loss_raw_pixels", plain.item(), expected["loss_raw_pixels"])
    _gradients(differences, where, prepared.gradients(), expected["grad_l2"])
    hidden = stretched(mask, *x.shape[2:])[:, None].expand_as(x)
    differences.numbers(f"{where}.grad_input_masked", x.grad[hidden].abs().max().item(),
                        expected["grad_input_masked_max_abs"])  # fmt: skip
    differences.numbers(f"{where}.grad_input_visible", x.grad[~hidden].norm().item(),
                        expected["grad_input_visible_l2"])  # fmt: skip
    if "not_sparse_encoder_l2" in run and grn == "image":
        norm = _masked_at_the_stem_alone(model, x, mask).norm().item()
        differences.numbers(f"{where}.not_sparse_encoder_l2", norm, run["not_sparse_encoder_l2"])
    differences.fields(where, expected, ("encoder", "prediction", "loss", "loss_raw_pixels", "grad_l2",
                                         "grad_input_masked_max_abs", "grad_input_visible_l2"))  # fmt: skip


@torch.no_grad()
def _masked_at_the_stem_alone(model: MaskedAutoencoder, x: Tensor, mask: Tensor) -> Tensor:
    """Return the last map of the encoder without rules, where only the stem's output is masked."""
    maps = release(copy.deepcopy(model.encoder))
    stem = maps.get_submodule("body.model.stem")
    stem.register_forward_hook(lambda module, inputs, y: y * ~stretched(mask, *y.shape[2:])[:, None])
    last: Tensor = maps(x)[-1]
    return last


def check_spark(document: Document, differences: Differences) -> None:
    """Check features, densified maps, reconstruction, loss, gradients and running statistics of SparK."""
    config = document["config"]
    norm = {"ln": "layer", "bn": "batch"}[config["densify_norm"]]
    method = _method("spark", decoder_args={"width": config["decoder_width"], "norm": norm})
    differences.fields("file", document, (*_FIELDS, "encoder_state_dict", "rest_state_dict"))
    for index, run in enumerate(document["runs"]):
        for mode in ("eval", "train"):
            prepared = Prepared(document, method)
            model = prepared.model.train(mode == "train")
            where, expected = f"runs[{index}].{mode}", run[mode]
            trunk = {name: shape for name, shape in document["encoder_state_dict"].items()
                     if not name.startswith(("norm.", "head.", "fc."))}  # fmt: skip
            differences.state(prepared.shapes("encoder"), trunk)
            differences.state(prepared.shapes("decoder"), document["rest_state_dict"])
            prepared.check_counts(document, differences)
            x, mask = images(run).requires_grad_(), masks(run)
            dense: list[Tensor] = []
            model.decoder.dense_decoder.register_forward_pre_hook(
                lambda module, inputs, found=dense: found.extend(inputs[0])
            )
            maps = model.encode(x, mask)
            with model.visibility.of(mask):
                prediction = model.decoder(maps, mask)
            (loss,) = model.losses(prediction, x, mask).values()
            loss.backward()
            for level, (one, wanted) in enumerate(zip(maps, expected["features"], strict=True)):
                _summary(differences, f"{where}.features[{level}]", one, wanted)
            for level, wanted in enumerate(expected["to_decoder"]):
                _summary(differences, f"{where}.to_decoder[{level}]", dense[level], wanted)
            _summary(differences, f"{where}.reconstruction", prediction, expected["reconstruction"])
            differences.numbers(f"{where}.loss", loss.item(), expected["loss"])
            hidden = stretched(mask, *x.shape[2:])[:, None].expand_as(x)
            differences.numbers(f"{where}.grad_input_masked", x.grad[hidden].abs().max().item(),
                                expected["grad_input_masked_max_abs"])  # fmt: skip
            found = prepared.gradients()
            wanted = {name.removeprefix("sparse_encoder.sp_cnn."): value for name, value in expected["grad_l2"].items()}
            _gradients(differences, where, found, wanted)
            _running(differences, where, prepared.buffers(), expected.get("running_after_one_step", {}))
            with model.visibility.of(mask):
                seen = [int(model.visibility.positions(one).sum()) for one in (maps[0], maps[-1])]
            differences.equal(f"{where}.visible_positions", seen, run["visible_positions"])
            differences.fields(where, expected, ("features", "to_decoder", "reconstruction", "loss", "grad_l2",
                                                 "running_after_one_step", "grad_input_masked_max_abs"))  # fmt: skip
        differences.fields(f"runs[{index}]", run, ("n", "size", "mask", "eval", "train", "visible_positions"))


def _check_linear_run(
    document: Document, run: Document, expected: Document, method: Method, where: str, training: bool,
    differences: Differences,
) -> None:  # fmt: skip
    """Check one run of a method with a token and a linear decoder."""
    prepared = Prepared(document, method)
    model = prepared.model.train(training)
    trunk = {name: shape for name, shape in document["encoder_state_dict"].items() if not name.startswith("fc.")}
    differences.state(prepared.shapes("encoder", "token"), trunk)
    differences.state(prepared.shapes("decoder"), document["decoder_state_dict"])
    prepared.check_counts(document, differences)
    x, mask = images(run), masks(run)
    if "input_filled" in run:
        _summary(differences, f"{where}.input_filled", model.filled(x, mask), run["input_filled"])
    maps = model.encode(x, mask)
    prediction = model.decoder(maps, mask)
    losses = model.losses(prediction, x, mask)
    total = sum(losses.values())
    total.backward()
    _summary(differences, f"{where}.encoder", maps[-1], expected["encoder"])
    _summary(differences, f"{where}.reconstruction", prediction, expected["reconstruction"])
    differences.numbers(f"{where}.loss", total.item(), expected["loss"])
    found = prepared.gradients()
    wanted = dict(expected["grad_l2"])
    decoder = wanted.pop("decoder", None)
    _gradients(differences, where, found, wanted)
    if decoder is not None:
        (weight,) = (value for name, value in found.items() if re.fullmatch(r"decoder\w*\.0\.weight", name))
        differences.numbers(f"{where}.grad_l2.decoder", weight, decoder)
    if expected.get("loss_spatial") is not None:
        differences.numbers(f"{where}.loss_spatial", losses["reconstruction"].item(), expected["loss_spatial"])
    if expected.get("loss_frequency_unweighted") is not None:
        raw = losses["frequency"].item() / method.frequency.weight
        differences.numbers(f"{where}.loss_frequency", raw, expected["loss_frequency_unweighted"])
    _running(differences, where, prepared.buffers(), expected.get("running_after_one_step", {}))
    differences.fields(where, expected, ("encoder", "reconstruction", "loss", "grad_l2", "running_after_one_step",
                                         "loss_spatial", "loss_frequency_unweighted"))  # fmt: skip


def check_simmim(document: Document, differences: Differences) -> None:
    """Check SimMIM on ResNets, with the share of masked pixels that its encoder sees."""
    differences.fields("file", document, (*_FIELDS, "encoder_state_dict", "decoder_state_dict"))
    for index, run in enumerate(document["runs"]):
        token = "replace" if run.get("replace", True) else "add"
        where = f"runs[{index}]"
        method = _method("simmim", token=token)
        for mode in ("eval", "train"):
            _check_linear_run(document, run, run[mode], method, f"{where}.{mode}", mode == "train", differences)
        if "leak_eval" in run:
            model = Prepared(document, method).model.eval()
            _check_leak(model, run, f"{where}.leak_eval", differences)
        differences.fields(where, run, ("n", "size", "mask", "replace", "eval", "train", "leak_eval"))


def _check_leak(model: MaskedAutoencoder, run: Document, where: str, differences: Differences) -> None:
    expected, mask = run["leak_eval"], masks(run)
    x = images(run).requires_grad_()
    hidden = stretched(mask, *x.shape[2:])[:, None].expand_as(x)
    (gradient,) = torch.autograd.grad(model.encode(x, mask)[-1].square().sum(), x)
    found = {
        "grad_masked_max_abs": gradient[hidden].abs().max().item(),
        "masked_pixels_with_gradient": int(leaking_pixels(lambda y: model.encode(y, mask)[-1], x, hidden[:, 0]).sum()),
        "masked_pixels": int(hidden[:, 0].sum()),
        "grad_visible_l2": gradient[~hidden].norm().item(),
        "grad_masked_l2": gradient[hidden].norm().item(),
    }
    if "grad_masked_spread_per_channel" in expected:
        rows = [one[:, seen[0]] for one, seen in zip(gradient, hidden, strict=True)]
        found["grad_masked_spread_per_channel"] = max((row.amax(1) - row.amin(1)).max().item() for row in rows)
    for name, value in expected.items():
        differences.numbers(f"{where}.{name}", found.get(name, float("nan")), value)


def check_a2mim(document: Document, differences: Differences) -> None:
    """Check A2MIM with each of the file's settings of its losses."""
    differences.fields("file", document, (*_FIELDS, "encoder_state_dict", "decoder_state_dict"))
    for index, run in enumerate(document["runs"]):
        for name, modes in run["heads"].items():
            settings = document["config"]["heads"][name]
            frequency = FrequencyLoss(
                settings["fft_weight"], settings["fft_unmask_weight"], settings["fft_unmask_replace"],
                settings["fft_focal"],
            )  # fmt: skip
            error = settings["loss"]["mode"].removesuffix("_loss")
            method = _method("a2mim", error=error, frequency=frequency)
            for mode, expected in modes.items():
                where = f"runs[{index}].{name}.{mode}"
                _check_linear_run(document, run, expected, method, where, mode == "train", differences)
        if "leak_eval" in run:
            _check_leak(Prepared(document, METHODS["a2mim"]).model.eval(), run, f"runs[{index}].leak_eval", differences)
        differences.fields(f"runs[{index}]", run, ("n", "size", "mask", "heads", "input_filled", "leak_eval"))


CHECKS: Mapping[str, Check] = {
    "fcmae": check_fcmae,
    "spark": check_spark,
    "simmim": check_simmim,
    "a2mim": check_a2mim,
}


def check(path: Path) -> Differences:
    """Return what differs between a file and this library."""
    return checked(path, lambda document: known if (known := document.get("method")) in CHECKS else None, CHECKS)


def main(arguments: Sequence[str]) -> int:
    """Check files and print the results; return the exit status."""
    return run_script(arguments, check, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
