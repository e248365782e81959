"""The feature pyramid network, a neck: every level gets the context of the coarser ones.

Paper: Lin, Dollár, Girshick, He, Hariharan, Belongie, "Feature Pyramid Networks for Object Detection", CVPR 2017,
section 3. Extra levels: RetinaNet (Lin et al., ICCV 2017, section 4) and FCOS (Tian et al., ICCV 2019, section 3.2).
Structure and names are those of OpenMMLab's ``FPN``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from widefield import _checks
from widefield.dense.layers import ConvModule

EXTRA = ("max_pool", "on_input", "on_lateral", "on_output")
"""Where extra levels come from: see :class:`FPN`."""


class FPN(nn.Module):
    """A top-down pyramid with ``num_outs`` levels of ``out_channels`` each.

    Coarser maps are enlarged to the size of the finer one by the nearest neighbor. Weights start as Xavier uniform,
    biases as 0.

    Args:
        in_channels: channels of the backbone's maps, finest first.
        out_channels: channels of each level.
        num_outs: levels of the result. None: as many as the maps in use.
        start_level: first map in use.
        end_level: last map in use, -1 for the last one. Extra levels need -1.
        extra: where levels beyond the maps come from. "max_pool": every second pixel of the coarsest level; "on_input":
            convolutions of stride 2 on the last map; "on_lateral": on that map with ``out_channels``, with the coarser
            context; "on_output": on the coarsest level.
        relu_before_extra: whether a ReLU is applied between extra convolutions.
        norm: of every convolution: "batch", "group" or None.
        norm_on_lateral: whether the lateral convolutions have the norm too.

    Raises:
        ValueError: levels out of range, or an unknown ``extra``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        *,
        num_outs: int | None = None,
        start_level: int = 0,
        end_level: int = -1,
        extra: str = "max_pool",
        relu_before_extra: bool = False,
        norm: str | None = None,
        norm_on_lateral: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = tuple(_checks.integer("every entry of in_channels", count) for count in in_channels)
        count = len(self.in_channels)
        self.start_level = _checks.integer("start_level", start_level, minimum=0, maximum=count - 1)
        last = _checks.integer("end_level", end_level, minimum=-1, maximum=count - 1) % count
        self.end_level = last + 1
        used = self.in_channels[self.start_level : self.end_level]
        if not used:
            raise ValueError(f"end_level={end_level} is before start_level={start_level}; no map would be used.")
        self.out_channels = _checks.integer("out_channels", out_channels)
        self.num_outs = len(used) if num_outs is None else _checks.integer("num_outs", num_outs, minimum=len(used))
        if self.num_outs > len(used) and self.end_level < count:
            raise ValueError(f"extra levels need the last map; end_level={end_level} leaves it out.")
        self.extra = _checks.choice("extra", extra, EXTRA)
        self.relu_before_extra = relu_before_extra
        lateral = norm if norm_on_lateral else None
        self.lateral_convs = nn.ModuleList(
            ConvModule(width, out_channels, 1, norm=lateral, activation=False) for width in used
        )
        self.fpn_convs = nn.ModuleList(
            ConvModule(out_channels, out_channels, 3, padding=1, norm=norm, activation=False) for _ in used
        )
        if self.extra != "max_pool":
            for index in range(self.num_outs - len(used)):
                width = used[-1] if index == 0 and self.extra == "on_input" else out_channels
                conv = ConvModule(width, out_channels, 3, stride=2, padding=1, norm=norm, activation=False)
                self.fpn_convs.append(conv)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps, finest first -> ``num_outs`` levels (N, out_channels, H_i, W_i), finest first."""
        if len(maps) != len(self.in_channels):
            raise ValueError(f"this neck was built for {len(self.in_channels)} maps; got {len(maps)}.")
        used = maps[self.start_level : self.end_level]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, used, strict=True)]
        for index in range(len(laterals) - 1, 0, -1):
            finer = laterals[index - 1]
            laterals[index - 1] = finer + F.interpolate(laterals[index], size=finer.shape[2:], mode="nearest")
        convs = list(self.fpn_convs)
        levels = [conv(x) for conv, x in zip(convs, laterals, strict=False)]
        source = {"on_input": maps[self.end_level - 1], "on_lateral": laterals[-1]}.get(self.extra, levels[-1])
        for index in range(len(levels), self.num_outs):
            if self.extra == "max_pool":
                levels.append(F.max_pool2d(levels[-1], 1, stride=2))
            else:
                first = index == len(used)
                x = source if first else levels[-1]
                levels.append(convs[index](F.relu(x) if self.relu_before_extra and not first else x))
        return levels
