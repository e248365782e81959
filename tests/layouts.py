"""Memory layouts of input tensors."""

import torch
import torch.nn.functional as F

LAYOUTS = (
    "contiguous", "channels_last", "channels_last slice", "rows and columns swapped", "one sample expanded",
    "one row expanded",
)  # fmt: skip


def lay_out(x, layout):
    """Return a tensor with the shape of x, (N, C, H, W), in a layout; it has x's values unless the layout is
    expanded."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last slice":
        return F.pad(x, (1, 0, 0, 1, 2, 1)).contiguous(memory_format=torch.channels_last)[:, 2:-1, :-1, 1:]
    if layout == "rows and columns swapped":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "one sample expanded":
        return x[:1].expand(x.shape)
    if layout == "one row expanded":
        return x[:1, :, :1].expand(x.shape)
    return x
