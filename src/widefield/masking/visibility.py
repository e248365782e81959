"""Let a network see visible patches only: masks and their rules, on the user's own modules.

Sparse convolutions would skip masked positions. The same numbers come from dense ones if three rules hold (Tian et al.,
"Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", ICLR 2023, section 3.2):

- an operation that mixes positions finds zeros at masked ones;
- statistics over positions are over visible ones;
- everything else works on each position by itself, and needs no rule.

:func:`treat` applies the rules of :mod:`widefield.masking.rules` to the modules of a network. They act while a mask is
set, and the network is unchanged otherwise; its parameters, buffers and names always are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from widefield.masking.patches import stretched

GRN_NORMS = ("image", "batch", "jax")
"""What a global response norm takes its norm over: the visible positions of each image; of the whole batch, as the
published PyTorch code; or of each image under ``sqrt(sum + 1e-6)``, as the published JAX snippet."""


class Visibility:
    """Which patches of the current batch are visible; the rules read it.

    Attributes:
        mask: bool (N, h, w), True where a patch is masked; None: everything is visible, and no rule acts.
        visible: number of visible patches of each image.
        grn: one of :data:`GRN_NORMS`.
    """

    def __init__(self, grn: str = "image") -> None:
        self.grn = grn
        self.mask: Tensor | None = None
        self.visible = 0
        self._last: tuple[Tensor, int] | None = None

    @contextmanager
    def of(self, mask: Tensor, visible: int | None = None) -> Iterator[None]:
        """Set the mask for the calls inside the block.

        Args:
            mask: bool (N, h, w), with as many masked patches in each image.
            visible: number of visible patches of each image, if it is known; otherwise it is counted.
        """
        self.mask = mask
        self.visible = int((~mask[0]).sum()) if visible is None else visible
        self._last = (mask, self.visible)
        try:
            yield
        finally:
            self.mask = None

    def again(self) -> AbstractContextManager[None]:
        """Set the last mask once more, for blocks that are recomputed in the backward pass."""
        return nullcontext() if self._last is None else self.of(*self._last)

    def at(self, x: Tensor, *, channels_last: bool = False) -> Tensor:
        """Return 1 at visible and 0 at masked positions of a map, in its dtype, to be multiplied by it.

        Args:
            x: (N, C, H, W), or (N, H, W, C) if ``channels_last``.
        """
        seen = self.positions(x, channels_last=channels_last)
        return seen.to(x.dtype)

    def positions(self, x: Tensor, *, channels_last: bool = False) -> Tensor:
        """Return the visible positions of a map, bool (N, 1, H, W), or (N, H, W, 1) if ``channels_last``."""
        if self.mask is None:
            raise RuntimeError("no mask is set; call the network inside Visibility.of(mask).")
        height, width = x.shape[1:3] if channels_last else x.shape[2:]
        seen = ~stretched(self.mask, height, width)
        return seen[..., None] if channels_last else seen[:, None]

    def count(self, x: Tensor) -> int:
        """Return the number of visible positions of a map (N, C, H, W) in all images; it follows from shapes."""
        if self.mask is None:
            raise RuntimeError("no mask is set; call the network inside Visibility.of(mask).")
        images, rows, columns = self.mask.shape
        height, width = x.shape[2:]
        return images * self.visible * (height // rows) * (width // columns)

    def rows(self, x: Tensor) -> Tensor:
        """Return the places of the visible positions of a map (N, C, H, W) among all N * H * W, int64 (rows,).

        Their number follows from shapes and :attr:`visible`, so that graphs need not branch on it.
        """
        if self.mask is None:
            raise RuntimeError("no mask is set; call the network inside Visibility.of(mask).")
        images, rows, columns = self.mask.shape
        height, width = x.shape[2:]
        tall, wide = height // rows, width // columns
        patches = self.mask.flatten(1).to(torch.uint8).argsort(dim=1, stable=True)[:, : self.visible]
        first = torch.arange(images, device=x.device)[:, None] * height * width
        first = first + patches // columns * tall * width + patches % columns * wide
        down = torch.arange(tall, device=x.device)[:, None] * width
        inside = (down + torch.arange(wide, device=x.device)).flatten()
        return (first[..., None] + inside).flatten()

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over visible positions: (N, C, H, W) -> (N, C, 1, 1)."""
        seen = self.at(x)
        return (x * seen).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True)


Forward = Callable[..., Tensor]
Computed = Callable[[Any, Visibility, Forward, Tensor], Tensor]
"""(module, visibility, what the module computes without a mask, input) -> output under the mask."""


@dataclass(frozen=True)
class Rule:
    """How a kind of module computes under a mask.

    Attributes:
        treatment: in words, for plans.
        compute: the function.
        inside: whether the modules inside have rules of their own; otherwise this one speaks for them.
    """

    treatment: str
    compute: Computed
    inside: bool = False


class Treated:
    """The ``forward`` of a module that has a rule; an attribute of the module, so that copies have their own."""

    def __init__(self, module: nn.Module, visibility: Visibility, rule: Rule) -> None:
        self.module, self.visibility, self.rule = module, visibility, rule

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """Compute as the module's class does, or by the rule while a mask is set."""
        if self.visibility.mask is None or args or options:
            return type(self.module).forward(self.module, x, *args, **options)
        return self.rule.compute(self.module, self.visibility, self.plain, x)

    def plain(self, x: Tensor) -> Tensor:
        """Compute as the module's class does."""
        y: Tensor = type(self.module).forward(self.module, x)
        return y


def treat(model: nn.Module, visibility: Visibility, rule_of: Callable[[nn.Module], Rule | None]) -> list[str]:
    """Give every module its rule, in place, and return the names of those that have one."""
    names = []
    for name, module, rule in treated(model, rule_of):
        if rule is not None:
            module.forward = Treated(module, visibility, rule)
            names.append(name)
    return names


def release(model: nn.Module) -> nn.Module:
    """Remove the rules from a network, in place, and return it."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Treated):
            del module.forward
    return model


def treated(
    model: nn.Module, rule_of: Callable[[nn.Module], Rule | None], prefix: str = ""
) -> Iterator[tuple[str, nn.Module, Rule | None]]:
    """Return name, module and rule of all modules, without those for which an outer one speaks."""
    rule = rule_of(model)
    yield prefix, model, rule
    if rule is None or rule.inside:
        for name, child in model.named_children():
            yield from treated(child, rule_of, f"{prefix}.{name}" if prefix else name)
