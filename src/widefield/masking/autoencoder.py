"""Pre-train any network by predicting what is masked: FCMAE, SparK, SimMIM and A2MIM, made of the same parts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.dense.backbone import Backboned, FeatureMaps, feature_maps
from widefield.masking.decoders import ConvNeXtDecoder, LinearDecoder, UNetDecoder
from widefield.masking.objectives import ERRORS, FrequencyLoss, Target, masked_error
from widefield.masking.patches import PatchMask, stretched
from widefield.masking.rules import rule_of
from widefield.masking.token import TOKENS, MaskToken, token_place
from widefield.masking.visibility import GRN_NORMS, Visibility, release, treat

DECODERS = ("linear", "convnext", "unet")
FILLS = ("none", "zero", "mean")


@dataclass(frozen=True)
class Method:
    """The parts of a method of masked image modeling. :data:`METHODS` has the published ones; all combine freely.

    Args:
        mask: how patches are drawn.
        visible: only visible patches take part in the encoder, by the rules of :mod:`widefield.masking.visibility`.
        fill: what the image has at masked pixels: "zero", the "mean" over the image of each channel, or "none": the
            pixels stay, and only ``visible`` or ``token_stage`` hide them.
        token_stage: the stage (from 0) before which a token is put at masked positions; None: no token.
        token: how it is put there: "replace", "scale" or "add", see :class:`widefield.masking.token.MaskToken`.
        decoder: "linear", "convnext" or "unet".
        decoder_args: further arguments of its class.
        target: what is predicted, see :class:`widefield.masking.Target`.
        error: "mse", "l1" or "focal_l1", averaged over masked places.
        eps: added to the number of masked places; that of SparK is 1e-8 patches.
        frequency: a further loss of the spectrum; None: none.
        grn: what global response norms take their norm over, one of ``visibility.GRN_NORMS``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    mask: PatchMask = field(default_factory=PatchMask)
    visible: bool = True
    fill: str = "none"
    token_stage: int | None = None
    token: str = "replace"
    decoder: str = "convnext"
    decoder_args: Mapping[str, Any] = field(default_factory=dict)
    target: str = "normalized_pixels"
    error: str = "mse"
    eps: float = 0.0
    frequency: FrequencyLoss | None = None
    grn: str = "image"

    def __post_init__(self) -> None:
        _checks.choice("fill", self.fill, FILLS)
        _checks.choice("token", self.token, TOKENS)
        _checks.choice("decoder", self.decoder, DECODERS)
        _checks.choice("error", self.error, ERRORS)
        _checks.choice("grn", self.grn, GRN_NORMS)
        Target(self.target, self.mask.patch)
        if self.token_stage is not None:
            _checks.integer("token_stage", self.token_stage, minimum=0)
            if self.visible:
                raise ValueError(
                    "token_stage puts a token into the encoder, which visible=True hides masked positions from: "
                    "choose one of the two."
                )
        if self.frequency is not None and self.target != "pixels":
            raise ValueError(f"a loss of the spectrum needs target='pixels'; got target={self.target!r}.")
        if not self.visible and self.fill == "none" and self.token_stage is None:
            raise ValueError("nothing is hidden from the encoder: set visible=True, a fill, or token_stage.")


METHODS: Mapping[str, Method] = {
    "fcmae": Method(),
    "spark": Method(
        PatchMask(rounding="keep_round"), fill="zero", decoder="unet", eps=1e-8 * 32**2,
    ),
    "simmim": Method(
        PatchMask(rounding="mask_ceil"), visible=False, token_stage=0, decoder="linear", target="pixels", error="l1",
        eps=1e-5,
    ),
    "a2mim": Method(
        PatchMask(rounding="mask_ceil"), visible=False, fill="mean", token_stage=3, token="scale", decoder="linear",
        target="pixels", error="focal_l1", eps=1e-5, frequency=FrequencyLoss(),
    ),
}  # fmt: skip
"""Name -> the published method: Woo et al. 2023 (FCMAE), Tian et al. 2023 (SparK), Xie et al. 2022 in its form for CNNs
(SimMIM), Li et al. 2023 (A2MIM, with the settings of ResNet-50). ``patch`` is 32 pixels."""


class MaskedAutoencoder(nn.Module):
    """An encoder that sees part of each image, and a decoder that predicts the rest.

    ``encoder`` is the network itself, with its own names and weights, and computes as always outside of
    :meth:`forward`.

    Args:
        backbone: a timm name or a module, see :func:`widefield.dense.feature_maps`.
        method: a name of :data:`METHODS`, or a :class:`Method`.
        out_indices: the maps that the decoder gets, by position; None: the last one, or the last four for "unet".
        backbone_args: further arguments of ``timm.create_model``.

    Attributes:
        encoder: the network as feature maps.
        decoder: see :mod:`widefield.masking.decoders`.
        token: the token of the encoder, or None.
        method: the parts.
        returns_features: True: outputs are features, not scores of classes; analyses read it.

    Raises:
        ValueError: the strides of the network do not divide the side of a patch, or do not suit the decoder; or a
            module's treatment is unknown, see :func:`widefield.masking.plan`.
        TypeError: an argument is of the wrong type.
    """

    returns_features = True

    def __init__(
        self,
        backbone: Backboned | FeatureMaps,
        method: str | Method = "fcmae",
        *,
        out_indices: Sequence[int] | None = None,
        **backbone_args: Any,
    ) -> None:
        super().__init__()
        if isinstance(method, str):
            method = METHODS[_checks.choice("method", method, tuple(METHODS))]
        self.method = method
        levels = 4 if method.decoder == "unet" else 1
        self.encoder = feature_maps(
            backbone, levels=levels, out_indices=out_indices, stage_norms="none", **backbone_args
        )
        stride = self.encoder.strides[-1]
        if method.mask.patch % stride:
            raise ValueError(
                f"the last map of the network has stride {stride}, which does not divide patches of "
                f"{method.mask.patch} pixels: use a multiple of {stride} as patch."
            )
        self.visibility = Visibility(method.grn)
        self.target = Target(method.target, method.mask.patch)
        if method.visible:
            treat(self.encoder, self.visibility, rule_of)
        self.token: MaskToken | None = None
        if method.token_stage is not None:
            place = token_place(self.encoder.body, method.token_stage)
            self.token = MaskToken(place.channels, mode=method.token)
            place.module.register_forward_pre_hook(_Inserted(self.token, self.visibility, place.channels_last))
        self.decoder = self._decoder()

    def _decoder(self) -> nn.Module:
        method, maps = self.method, self.encoder
        out = {"channels": self.target.channels, "step": self.target.step, **method.decoder_args}
        if method.decoder == "unet":
            return UNetDecoder(maps.channels, maps.strides, self.visibility, **out)
        kind = LinearDecoder if method.decoder == "linear" else ConvNeXtDecoder
        return kind(maps.channels[-1], maps.strides[-1], **out)

    def filled(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return images as the encoder gets them, (N, C, H, W)."""
        if self.method.fill == "none":
            return images
        hidden = stretched(mask, *images.shape[2:])[:, None]
        value = images.mean((2, 3), keepdim=True) if self.method.fill == "mean" else images.new_zeros(())
        return torch.where(hidden, value, images)

    def encode(self, images: Tensor, mask: Tensor, visible: int | None = None) -> list[Tensor]:
        """Return the encoder's maps, finest first; with ``method.visible``, zero at masked positions.

        Args:
            images: float (N, C, H, W).
            mask: bool (N, H / patch, W / patch), True where a patch is masked, as many in each image.
            visible: number of visible patches of each image, if it is known.
        """
        images = self.filled(images, mask)
        with self.visibility.of(mask, visible):
            maps = self.encoder(images)
            return [x * self.visibility.at(x) for x in maps] if self.method.visible else maps

    def predict(self, images: Tensor, mask: Tensor, visible: int | None = None) -> Tensor:
        """Return the prediction of the whole target, (N, channels, H / step, W / step); arguments as of `encode`."""
        maps = self.encode(images, mask, visible)
        with self.visibility.of(mask, visible):
            y: Tensor = self.decoder(maps, mask)
        return y

    def recomputing(self) -> AbstractContextManager[None]:
        """Set the mask of the last call once more, see :class:`widefield.nn.recompute.Recomputing`."""
        return self.visibility.again()

    def losses(self, prediction: Tensor, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the losses of a prediction by name, scalars whose sum is the loss; in float32 at least."""
        method = self.method
        with torch.autocast(images.device.type, enabled=False):
            wide = torch.promote_types(prediction.dtype, torch.float32)
            prediction, images = prediction.to(wide), images.to(wide)
            masked = stretched(mask, *prediction.shape[2:])
            found = {"reconstruction": masked_error(prediction, self.target(images), masked, method.error, method.eps)}
            if method.frequency is not None and method.frequency.weight:
                found["frequency"] = method.frequency.weight * method.frequency(prediction, images, masked)
        return found

    def forward(
        self, images: Tensor, mask: Tensor | None = None, visible: int | None = None
    ) -> dict[str, Tensor] | Tensor:
        """Return the losses of images by name; or without a mask the encoder's last map (N, C, H / stride, W / stride).

        Arguments are those of :meth:`encode`.
        """
        if mask is None:
            features: Tensor = self.encoder(images)[-1]
            return features
        return self.losses(self.predict(images, mask, visible), images, mask)


class Encoder(nn.Module):
    """The encoder of a masked autoencoder as a plain network, for analyses and exports. No mask acts in it.

    Args:
        model: its encoder is copied.

    Attributes:
        encoder: the copy.
        returns_features: True: outputs are features, not scores of classes; analyses read it.
    """

    returns_features = True

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.encoder = release(copy.deepcopy(model.encoder))
        for module in self.encoder.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, _Inserted):
                    del module._forward_pre_hooks[key]
        self.train(model.training)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the last map and its mean over positions.

        Args:
            images: (N, C, H, W).

        Returns:
            ``map`` (N, channels, H / stride, W / stride), and ``features`` (N, channels).
        """
        last = self.encoder(images)[-1]
        return {"map": last, "features": last.mean((2, 3))}


class _Inserted:
    """A hook that puts the token into the input of a module while a mask is set."""

    def __init__(self, token: MaskToken, visibility: Visibility, channels_last: bool) -> None:
        self.token, self.visibility, self.channels_last = token, visibility, channels_last

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.visibility.mask is None:
            return inputs
        x, *rest = inputs
        x = x.permute(0, 3, 1, 2) if self.channels_last else x
        y = self.token(x, self.visibility.at(x))
        return (y.permute(0, 2, 3, 1) if self.channels_last else y, *rest)
