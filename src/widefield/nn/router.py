"""Router network, which computes the weights of experts, and the loss that balances their use.

Router: MoRF (Lian, Yu, Wang 2024), section 3.2 and eq. 4-6: global average pooling, FC, GELU, FC. Balance: Shazeer et
al. 2017, "Outrageously Large Neural Networks", section 4 and appendix A.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widefield import _checks
from widefield.nn._leaf import is_symbolic, recorded
from widefield.ops._autocast import without_autocast

ROUTING = ("soft", "hard")
ATTENTION = ("none", "softmax", "sigmoid")


def default_width(in_channels: int) -> int:
    """Return the hidden width of a router unless one is asked for: a sixteenth of the channels, at least 16.

    The paper does not state it, and no single width fits its three parameter counts; docs/morf.md compares the counts
    of this rule with the paper's.
    """
    return max(16, in_channels // 16)


@dataclass(frozen=True)
class Gate:
    """Values of a hard router for one batch, as the balance loss needs them. All (N, n), with gradients."""

    clean: Tensor
    noisy: Tensor
    noise_std: Tensor
    weights: Tensor
    top_k: int


class Router(nn.Module):
    """Global average pool, FC, GELU, FC: (N, C, H, W) -> routing weights (N, n).

    Soft routing (eq. 6): the weights are the outputs as they are (``attention="none"``, unnormalized), or their
    softmax or sigmoid. Hard routing (eq. 4, 5): softmax over the ``top_k`` largest outputs, exactly 0 for the others;
    in training mode Gaussian noise with standard deviation ``softplus(noise(h))`` is added before the choice, where h
    is the hidden layer. Eq. 5 computes gate and noise by two further matrices after the last FC. Two linear maps in a
    row are one, so here the last FC is the gate, and the noise is next to it.

    With ``top_k=1`` the weight is a softmax over a single number, always 1. The task then has no gradient with respect
    to the router, which learns from :func:`load_balancing` only. Shazeer et al. require k > 1 for this reason.

    Routing weights are computed in the parameters' precision, also under autocast. The choice of experts and the sum of
    unnormalized weights are sensitive to rounding, and cheap.

    Args:
        in_channels: C.
        experts: n.
        width: hidden width; default :func:`default_width`.
        routing, attention, top_k: see above; ``attention`` is for soft routing, ``top_k`` for hard.
    """

    def __init__(
        self,
        in_channels: int,
        experts: int,
        *,
        width: int | None = None,
        routing: str = "soft",
        attention: str = "none",
        top_k: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.routing = _checks.choice("routing", routing, ROUTING)
        self.attention = _checks.choice("attention", attention, ATTENTION)
        self.experts = _checks.integer("experts", experts)
        if self.routing == "hard":
            top_k = _checks.integer("top_k", top_k)
            if top_k > experts:
                raise ValueError(
                    f"top_k must not exceed the number of experts; got top_k={top_k} of {experts} "
                    f"expert{'s' if experts > 1 else ''}. Lower top_k or add kernel sizes."
                )
        self.top_k = top_k
        width = default_width(in_channels) if width is None else _checks.integer("router_width", width)
        self.hidden = nn.Linear(in_channels, width, device=device, dtype=dtype)
        self.gate = nn.Linear(width, experts, device=device, dtype=dtype)
        self.noise = nn.Linear(width, experts, device=device, dtype=dtype) if self.routing == "hard" else None
        self._record: list[Gate] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from a nearly even mixture that depends slightly on the input, with the noise of Shazeer et al."""
        self.hidden.reset_parameters()
        self.gate.reset_parameters()
        with torch.no_grad():
            self.gate.bias.fill_(self._rest())
            if self.noise is not None:
                self.noise.weight.zero_()
                self.noise.bias.zero_()

    def _rest(self) -> float:
        """Return the output of the last FC that makes all weights equal, with a sum of 1 unless they are sigmoids."""
        return 1 / self.experts if self.routing == "soft" and self.attention == "none" else 0.0

    def settle(self, keeper: int) -> Tensor:
        """Make the weights independent of the input in evaluation mode, and return them: (n,).

        Soft routing gives every expert the same weight. Hard routing ranks expert ``keeper`` first, then the others
        from the last to the first, so that ties do not depend on the device. The margin is 2, three times the initial
        noise: the keeper is nearly always chosen, and the noise distributes the other places among the rest. With
        ``top_k=1`` the margin is 0.5, or the others would never be chosen.
        """
        with torch.no_grad():
            self.gate.weight.zero_()
            self.gate.bias.fill_(self._rest())
            if self.noise is not None:
                order = torch.arange(self.experts, device=self.gate.bias.device, dtype=self.gate.bias.dtype)
                self.gate.bias.copy_((order - self.experts) * 1e-3)
                self.gate.bias[keeper] = 2.0 if self.top_k > 1 else 0.5
                self.noise.weight.zero_()
                self.noise.bias.zero_()
            return self._weigh(self.gate.bias[None])[0]

    def forward(self, x: Tensor) -> Tensor:
        """Weigh the experts for each image: (N, C, H, W) -> (N, n) in the parameters' dtype."""
        if is_symbolic(x):
            return recorded(self, x)
        with without_autocast(x):
            pooled = x.mean((2, 3), dtype=self.hidden.weight.dtype)
            hidden = F.gelu(self.hidden(pooled))
            logits = self.gate(hidden)
            if self.noise is None or not self.training:
                return self._weigh(logits)
            std = F.softplus(self.noise(hidden))
            noisy = logits + std * torch.randn_like(logits)
            weights = self._weigh(noisy)
            if self._record is not None:
                self._record.append(Gate(logits, noisy, std, weights, self.top_k))
            return weights

    def _weigh(self, logits: Tensor) -> Tensor:
        if self.routing == "hard":
            values, chosen = logits.topk(self.top_k, dim=1)
            return torch.zeros_like(logits).scatter(1, chosen, values.softmax(1))
        if self.attention == "softmax":
            return logits.softmax(1)
        if self.attention == "sigmoid":
            return logits.sigmoid()
        return logits

    def for_inference(self) -> Router:
        """Return a copy without the noise layer, which evaluation does not use."""
        twin = copy.deepcopy(self)
        twin.noise = None
        return twin

    def extra_repr(self) -> str:
        """Show the arguments that the submodules do not show."""
        how = f"top_k={self.top_k}" if self.routing == "hard" else f"attention={self.attention}"
        return f"experts={self.experts}, routing={self.routing}, {how}"


@contextmanager
def load_balancing(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Collect the load-balancing loss of every hard router in ``model`` during the forward passes inside the block.

    Shazeer et al. 2017: the squared coefficient of variation of the importance (eq. 6, 7: routing weights summed over
    the batch) plus that of the load (eq. 8-11: a smooth count of the samples for which an expert is chosen), averaged
    over routers. It is 0 if all experts are used equally. MoRF does not use it, and it is off by default::

        with load_balancing(model) as balance:
            loss = criterion(model(images), labels) + 0.01 * balance()

    Yields:
        a function () -> scalar tensor with gradients to the routers, over the forward passes so far.

    Raises:
        ValueError: the model has no hard router; or, from the function, there was no forward pass in training mode.
    """
    routers = [m for m in model.modules() if isinstance(m, Router) and m.routing == "hard"]
    if not routers:
        raise ValueError("load_balancing found no hard router in the model: convert it with routing='hard' first.")
    records: list[Gate] = []

    def loss() -> Tensor:
        if not records:
            raise ValueError(
                "no routing was recorded: call the model inside the block, in training mode (model.train())."
            )
        return torch.stack([_imbalance(gate) for gate in records]).mean()

    for router in routers:
        router._record = records
    try:
        yield loss
    finally:
        for router in routers:
            router._record = None


def _imbalance(gate: Gate) -> Tensor:
    n, k = gate.weights.shape[1], gate.top_k
    loss = _squared_variation(gate.weights.sum(0))
    if k == n:  # all experts are always chosen
        return loss
    # Eq. 9: the probability that expert i is chosen if its noise is drawn again and the others' is kept. It must exceed
    # the k-th largest of the others: the (k+1)-th of all if i itself is among the top k, else the k-th.
    top = gate.noisy.topk(k + 1, dim=1).values
    chosen = gate.noisy > top[:, k, None]
    threshold = torch.where(chosen, top[:, k, None], top[:, k - 1, None])
    load = torch.special.ndtr((gate.clean - threshold) / gate.noise_std).sum(0)
    return loss + _squared_variation(load)


def _squared_variation(values: Tensor) -> Tensor:
    return values.var(correction=0) / (values.mean().square() + 1e-10)
