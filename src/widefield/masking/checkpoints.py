"""Read files of masked pre-training: those of FCMAE, SparK, SimMIM and A2MIM, and runs of this library.

Names were read in facebookresearch/ConvNeXt-V2, keyu-tian/SparK and Westlake-AI/openmixup.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from widefield.dense._checkpoint_files import read_checkpoint
from widefield.dense._trunk_keys import plain_keys, trunk_names
from widefield.dense.backbone import feature_maps
from widefield.masking.autoencoder import MaskedAutoencoder

PLAIN = "an encoder alone"

_HEADS = ("head.", "fc.", "norm.", "classifier.")
"""First parts of names behind the last map of a classifier."""
_TOKENS = ("mask_token", "mask_gamma")
_SHOWN = 6


@dataclass(frozen=True)
class PretrainedFile:
    """The content of a file of masked pre-training.

    Attributes:
        path: the file.
        kind: whose form it has, in words; :data:`PLAIN` if it has no decoder.
        encoder: name, without prefixes -> weight.
        token: of the encoder, by name.
        decoder: name -> weight; empty if the file has none.
    """

    path: Path
    kind: str
    encoder: dict[str, Tensor]
    token: dict[str, Tensor]
    decoder: dict[str, Tensor]

    @property
    def has_head(self) -> bool:
        """Return whether there are weights behind the last map, as of a trained classifier."""
        return self.kind == PLAIN and any(key.startswith(_HEADS) for key in self.encoder)


def read_pretrained(path: str | Path) -> PretrainedFile:
    """Read a file of masked pre-training, or any other file of weights as an encoder alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no weights.
    """
    file = read_checkpoint(path)
    weights = file.weights

    def part(*prefixes: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(prefix): value
            for key, value in weights.items()
            for prefix in prefixes
            if key.startswith(prefix)
        }

    def named(*starts: str) -> dict[str, Tensor]:
        return {key: value for key, value in weights.items() if key.startswith(starts)}

    kind, encoder, token, decoder = PLAIN, dict(weights), dict[str, Tensor](), dict[str, Tensor]()
    if any(key.startswith("encoder.body.") for key in weights):
        kind, encoder, token, decoder = "a run", part("encoder.body."), part("token."), part("decoder.")
    elif any(key.startswith("sparse_encoder.sp_cnn.") for key in weights):
        kind, encoder = "SparK", part("sparse_encoder.sp_cnn.")
        decoder = named("densify_", "mask_tokens.", "dense_decoder.")
    elif any(key.startswith(("neck.decoder", "backbone.mask_token")) for key in weights):
        kind, encoder, decoder = "openmixup", part("backbone."), part("neck.")
    elif any(key.startswith("encoder.downsample_layers.") for key in weights):
        kind, encoder = "FCMAE", _dense(part("encoder."))
        decoder = named("mask_token", "proj.", "decoder.", "pred.")
    token |= {key: encoder.pop(key) for key in _TOKENS if key in encoder and kind != "FCMAE"}
    decoder = {key.replace("decoder_pred.", "decoder."): value for key, value in decoder.items()}
    return PretrainedFile(file.path, kind, encoder, token, decoder)


def _dense(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return FCMAE's sparse weights as those of dense layers.

    A sparse kernel is (positions, in, out), or (positions, channels) if it is depthwise; positions run down the columns
    first.
    """
    found = {}
    for key, value in weights.items():
        name = key.replace(".ln.", ".").replace(".linear.", ".")
        if name.endswith(".kernel"):
            side = round(len(value) ** 0.5)
            if value.ndim == 3:
                value = value.permute(2, 1, 0).unflatten(2, (side, side)).transpose(2, 3)
            else:
                value = value.t().reshape(-1, 1, side, side).transpose(2, 3)
            name = name.removesuffix("kernel") + "weight"
        found[name] = value.contiguous()
    return found


def load_encoder(network: nn.Module, source: str | Path | PretrainedFile) -> PretrainedFile:
    """Load the encoder of a file of masked pre-training into a network, in place: all of it, or nothing.

    The layers behind the last map, such as a classifier, are left alone, as the file has none of them.

    Args:
        network: a classifier, or a network built with ``features_only=True``; converted, if the encoder was.
        source: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not fit; the message names keys that differ.
    """
    file = source if isinstance(source, PretrainedFile) else read_pretrained(source)
    own = network.state_dict()
    best: tuple[int, str] | None = None
    for names in _namings(network):
        state, problems = _matched(file.encoder, names, own)
        if not problems:
            network.load_state_dict(state, strict=False)
            return file
        if best is None or len(problems) < best[0]:
            shown = "; ".join(problems[:_SHOWN]) + (f"; and {len(problems) - _SHOWN} more" * (len(problems) > _SHOWN))
            best = len(problems), shown
    raise ValueError(
        f"{file.path} ({file.kind}) does not fit {type(network).__name__}: {best[1] if best else 'it has no maps'}. "
        "Use the network that was pre-trained, with the same arguments and conversions."
    )


def _namings(network: nn.Module) -> Iterator[dict[str, str]]:
    """Yield ways to name the weights of a network up to its last map: name in a file -> the network's own."""
    maps = feature_maps(copy.deepcopy(network), levels=1, stage_norms="none")
    own = {plain: key for key, plain in plain_keys(network)[0].items()}
    inside = {key: own[plain] for key, plain in plain_keys(maps.body)[0].items() if plain in own}
    plain = {plain: own[plain] for plain in plain_keys(maps.body)[0].values() if plain in own}
    yield plain
    yield {_flat(name): key for name, key in plain.items()}  # as encoders of runs are stored
    yield {f"model.{name}": key for name, key in plain.items()}
    names = trunk_names(maps)
    if names.family is not None:
        published = {names.names.get(f"body.{key}", key): mine for key, mine in inside.items()}
        yield published
        if names.family.mmpretrain:
            yield {_openmmlab(name, names.family.mmpretrain): key for name, key in published.items()}


def _flat(name: str) -> str:
    return re.sub(r"^([a-z_]+)\.(\d+)\.", r"\1_\2.", name)


def _openmmlab(name: str, words: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in words:
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _matched(
    given: Mapping[str, Tensor], names: Mapping[str, str], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights by the network's names, and what does not fit."""
    state, problems = {}, []
    for name, key in names.items():
        value = given.get(name)
        if value is None:
            if not name.endswith("num_batches_tracked"):
                problems.append(f"{name} is missing")
            continue
        if value.squeeze().shape != own[key].squeeze().shape:
            problems.append(f"{name} is {list(value.shape)}, not {list(own[key].shape)}")
            continue
        state[key] = value.reshape(own[key].shape)
    extra = [name for name in given if name not in names and not name.startswith(_HEADS)]
    return state, problems + [f"{name} has no place" for name in extra]


def load_pretrained(model: MaskedAutoencoder, source: str | Path | PretrainedFile) -> PretrainedFile:
    """Load a file of masked pre-training to go on with it: encoder, and decoder and token if the file has them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not fit, or its decoder is another one; the message names keys that differ.
    """
    file = source if isinstance(source, PretrainedFile) else read_pretrained(source)
    parts: list[tuple[str, nn.Module, Mapping[str, Tensor]]] = []
    if file.decoder:
        parts.append(("decoder", model.decoder, file.decoder))
    if file.token and model.token is not None:
        parts.append(("token", model.token, file.token))
    for what, module, weights in parts:
        own = module.state_dict()
        wrong = [key for key in {**own, **weights} if key not in own or key not in weights]
        wrong += [key for key in own if key in weights and own[key].shape != weights[key].shape]
        if wrong:
            raise ValueError(
                f"the {what} of {file.path} ({file.kind}) is not that of this model: {', '.join(wrong[:_SHOWN])} "
                f"differ. Choose the method and decoder_args that it was pre-trained with."
            )
    load_encoder(model.encoder.body, file)
    with torch.no_grad():
        for _, module, weights in parts:
            module.load_state_dict(weights)
    return file
