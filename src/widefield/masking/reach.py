"""Count the masked pixels that reach the encoder, for methods that do not hide patches from every layer."""

from __future__ import annotations

import copy

import torch

from widefield.masking.autoencoder import MaskedAutoencoder
from widefield.masking.patches import stretched
from widefield.masking.probe import leaking_pixels

_REASONS = {
    "replace": "the layers before the token overlap the patches",
    "scale": "the token leaves a share of the features, mask_gamma",
    "add": "the token is added and hides nothing",
}


def reach(model: MaskedAutoencoder, shape: tuple[int, int, int]) -> str:
    """Return one line that says how many masked pixels reach the encoder, and why.

    Where the answer depends on the network, a copy in float64 is differentiated on one image of noise in evaluation
    mode.

    Args:
        model: it is not changed.
        shape: (C, H, W) of the images.
    """
    method = model.method
    if method.visible:
        return "no masked pixel reaches visible features"
    if method.fill == "mean":
        return "masked pixels reach the encoder through the mean color of their image alone, which takes their place"
    if method.fill == "zero":
        return "no masked pixel reaches the encoder"
    twin = copy.deepcopy(model).double().eval()
    place = next(twin.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, *shape, dtype=torch.float64, generator=generator).to(place)
    mask = method.mask.draw(1, *shape[1:], generator).to(place)
    hidden = stretched(mask, *shape[1:])
    found = leaking_pixels(lambda x: torch.cat([y.flatten() for y in twin.encode(x, mask)]), images, hidden)
    leaking, total = int(found.sum()), int(hidden.sum())
    if not leaking:
        return "no masked pixel reaches the encoder"
    share = 100 * leaking / total
    return f"{leaking} of {total} masked pixels ({share:.1f} %) reach the encoder: {_REASONS[method.token]}"
