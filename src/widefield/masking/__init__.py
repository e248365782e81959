"""Masked image modeling: pre-train any convolutional network by predicting masked patches."""

from widefield.masking.autoencoder import METHODS, Encoder, MaskedAutoencoder, Method
from widefield.masking.checkpoints import PLAIN, PretrainedFile, load_encoder, load_pretrained, read_pretrained
from widefield.masking.objectives import FrequencyLoss, Target
from widefield.masking.patches import PatchMask
from widefield.masking.plan import MaskingPlan, plan, refuse_leak
from widefield.masking.probe import Leak, leak, leaking_pixels
from widefield.masking.reach import reach
from widefield.masking.visibility import Visibility, release, treat

__all__ = [
    "METHODS",
    "PLAIN",
    "Encoder",
    "FrequencyLoss",
    "Leak",
    "MaskedAutoencoder",
    "MaskingPlan",
    "Method",
    "PatchMask",
    "PretrainedFile",
    "Target",
    "Visibility",
    "leak",
    "leaking_pixels",
    "load_encoder",
    "load_pretrained",
    "plan",
    "reach",
    "read_pretrained",
    "refuse_leak",
    "release",
    "treat",
]
