"""Train with dynamic sparsity: a share of the weights is zero at every step, and their choice changes in training.

- Recipe (40 % of the weights pruned in a network 1.3 times as wide): Liu et al., "More ConvNets in the 2020s:
  Scaling up Kernels Beyond 51x51 using Sparsity" (SLaK), ICLR 2023, section 3; details by its code,
  github.com/VITA-Group/SLaK.
- Initial masks: Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection
  Sensitivity", ICLR 2019; Erdos-Renyi-Kernel densities: Evci et al., "Rigging the Lottery" (RigL), ICML 2020.
- Prune the smallest, grow at random: Mocanu et al., Nature Communications 2018 (SET), and SLaK's code. Grow where the
  gradient is largest: RigL.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from widefield import _checks
from widefield.surgery.convert import Where, selector
from widefield.surgery.walk import computed

log = logging.getLogger(__name__)

_SHOWN = 3
"""Number of layers that a message names."""
MOMENTA = ("momentum_buffer", "momentum", "exp_avg", "exp_avg_diff")
"""Names of running means of gradients in the optimizers of torch and timm."""


class DynamicSparsity:
    """Keep a share of a model's weights at zero while any loop and any optimizer train it.

    Every ``interval`` steps the smallest active weights of each tensor are pruned and as many others grow from zero, so
    the number of active weights per tensor is constant. Weights stay dense tensors with zeros: this saves neither time
    nor memory (each mask takes one byte per weight), but allows a wider network with the same number of active weights.
    ::

        sparse = DynamicSparsity(model, end=total_steps)
        sparse.start(first_batches, loss)         # loss(model, batch) -> scalar
        for batch in batches:
            loss(model, batch).backward()         # several times to accumulate gradients
            optimizer.step()
            sparse.step(optimizer)                # after the optimizer, before the gradients are cleared
            optimizer.zero_grad()

    Pruned weights still get gradients; the optimizer moves them and :meth:`step` resets them to zero. Weight decay
    therefore does not affect them, but they count in a gradient norm for clipping. With a ``GradScaler``, call
    :meth:`step` after every step, even a skipped one: growth by gradients that are not finite waits for the next step.

    All processes have the same masks, which depend on the weights, the gradients (averaged by
    DistributedDataParallel), saliencies (averaged here) and one seed. Weights must be whole tensors on every process.
    Optimizers that recompute weights from their own state (MADGRAD, schedule-free ones) keep the masks, but grown
    weights then do not start from zero.

    Args:
        model: the network itself, not a wrapper around it.
        sparsity: share of the selected weights that is zero, from 0 to below 1.
        exploration: share of each tensor's active weights that moves at a time.
        interval: steps between moves.
        growth: "random": anywhere with equal probability, as in SLaK's code by default and in its commands; "gradient":
            where the gradient of the last step is largest, as in RigL.
        init: initial masks. "snip": the weights with the largest saliency (weight times gradient) over all tensors.
            "snip_density": as many weights of each tensor as SNIP keeps, at random, as in SLaK's code. "erk": densities
            in proportion to the sum over the product of a tensor's sides, at random. "uniform": the same density
            everywhere, at random.
        where: the layers: a glob over module names, several globs, or a predicate ``(module, name) -> bool``. Default:
            the trained ``weight`` of every convolution and linear layer, as in SLaK's code. For SLaK's bands only:
            ``"*.large_kernel.LoRA*"``.
        end: step at which moves stop; until then ``exploration`` falls to 0 along half a cosine. SLaK uses the number
            of steps of the run. None: constant exploration.
        seed: seed of all random choices.

    Attributes:
        masks: parameter name -> its active entries (bool, same shape); empty before :meth:`start`.
        steps: number of calls of :meth:`step`.

    Raises:
        TypeError, ValueError: an argument out of range; ``where`` matches nothing (the message lists what it could
            match).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float = 0.4,
        exploration: float = 0.3,
        interval: int = 100,
        growth: str = "random",
        init: str = "snip",
        where: Where | None = None,
        end: int | None = None,
        seed: int = 0,
    ) -> None:
        self.sparsity = _checks.number("sparsity", sparsity, maximum=1.0)
        if self.sparsity == 1:
            raise ValueError("sparsity must be below 1: at 1 no weight is left.")
        self.exploration = _checks.number("exploration", exploration, maximum=1.0)
        self.interval = _checks.integer("interval", interval)
        self.growth = _checks.choice("growth", growth, _checks.SPARSE_GROWTH)
        self.init = _checks.choice("init", init, _checks.SPARSE_INIT)
        self.end = None if end is None else _checks.integer("end", end)
        self.model = model
        self.masks: dict[str, Tensor] = {}
        self.steps = 0
        self._names = _chosen(model, where)
        self._moved_at = 0
        self._generator = torch.Generator().manual_seed(_checks.integer("seed", seed, minimum=0))

    # Before training

    def start(
        self, batches: Iterable[Any] | None = None, loss: Callable[[nn.Module, Any], Tensor] | None = None
    ) -> None:
        """Choose the initial masks, and set the pruned weights to zero.

        SNIP computes gradients in the current mode of the model. Buffers (batch norm statistics) and existing gradients
        do not change. All batches count as one large batch.

        Args:
            batches: at least one batch for SNIP (SLaK uses one); different batches on different processes.
            loss: ``loss(model, batch)`` for SNIP, a scalar. A constant factor has no effect, but keeps small gradients
                from vanishing under float16 autocast.

        Raises:
            RuntimeError: masks exist already.
            ValueError: SNIP without batches or loss, or with gradients that are not finite; or it would keep no weight
                of a tensor, which could then never grow.
        """
        if self.masks:
            raise RuntimeError("sparse training has started already: start() or load_state_dict() is called once.")
        weights = self._weights(self.model)
        density = 1 - self.sparsity
        if self.init in ("snip", "snip_density"):
            if batches is None or loss is None:
                raise ValueError(f"init={self.init!r} needs gradients: call start(batches, loss).")
            masks = _snip(_saliencies(self.model, weights, batches, loss), density, self._generator)
            counts = {name: int(mask.sum()) for name, mask in masks.items()}
        else:
            shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
            densities = _erk(shapes, density) if self.init == "erk" else dict.fromkeys(shapes, density)
            counts = {name: max(1, round(densities[name] * weight.numel())) for name, weight in weights.items()}
        if self.init != "snip":
            masks = {name: self._any(weight, counts[name]) for name, weight in weights.items()}
        self.masks = masks
        self.apply()

    # In training

    @property
    def rate(self) -> float:
        """Return the share of the active weights that moves in the current step."""
        if self.end is None:
            return self.exploration
        return self.exploration * (1 + math.cos(math.pi * min(self.steps / self.end, 1.0))) / 2

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, *others: torch.optim.Optimizer) -> None:
        """Apply the masks after an optimizer step, and move them every ``interval`` steps.

        Pruned weights and their mean gradients in the optimizer become zero, so that a weight that grows later does not
        jump. Mean squared gradients stay, because they scale its steps.

        Args:
            optimizer, others: all optimizers of the model. Wrappers with a ``state`` work, such as accelerate's.

        Raises:
            RuntimeError: there are no masks yet, or gradients were cleared before growth by gradient.
        """
        self._check_started()
        self.steps += 1
        optimizers = (optimizer, *others)
        self._clear(optimizers)
        if self.steps - self._moved_at >= self.interval and self.rate > 0 and self._move():
            self._moved_at = self.steps
            self._clear(optimizers)

    @torch.no_grad()
    def apply(self, model: nn.Module | None = None) -> None:
        """Set the pruned weights of ``model`` to zero, in place.

        Args:
            model: a model with the same parameter names, such as a moving average (``ema.module``, after each
                update). Default: the model itself.

        Raises:
            RuntimeError: there are no masks yet.
            ValueError: ``model`` lacks some of the parameters. Nothing is changed.
        """
        self._check_started()
        for name, weight in self._weights(self.model if model is None else model).items():
            weight.masked_fill_(~self.masks[name].to(weight.device), 0)

    # State

    def densities(self) -> dict[str, float]:
        """Return the share of active weights in each tensor, by name."""
        self._check_started()
        return {name: int(mask.sum()) / mask.numel() for name, mask in self.masks.items()}

    def density(self) -> float:
        """Return the share of active weights over all tensors: 1 - ``sparsity``, up to rounding."""
        self._check_started()
        return sum(int(mask.sum()) for mask in self.masks.values()) / sum(mask.numel() for mask in self.masks.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which, with the model's and the optimizer's, a run can be resumed exactly.

        The state is a snapshot, and ``torch.load(weights_only=True)`` can load it.

        Raises:
            RuntimeError: there are no masks yet.
        """
        self._check_started()
        return {
            "sparsity": self.sparsity,
            "steps": self.steps,
            "moved_at": self._moved_at,
            "random": self._generator.get_state(),
            "masks": dict(self.masks),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict` instead of calling :meth:`start`, and apply its masks to the model.

        Raises:
            ValueError: the state belongs to another model, ``where`` or sparsity. Nothing is changed.
        """
        weights = self._weights(self.model)
        masks: Mapping[str, Tensor] = state["masks"]
        differ = [name for name in (*weights, *masks) if _shape(weights, name) != _shape(masks, name)]
        if differ:
            ours, theirs = _shape(weights, differ[0]), _shape(masks, differ[0])
            raise ValueError(
                f"this state is of another model or another where: {differ[0]} is {ours or 'not selected'} here and "
                f"{theirs or 'absent'} there, the first of {len(differ)} differences."
            )
        if state["sparsity"] != self.sparsity:
            raise ValueError(f"this state has sparsity={state['sparsity']}, but this object has {self.sparsity}.")
        self.steps, self._moved_at = state["steps"], state["moved_at"]
        self._generator.set_state(state["random"].cpu())
        self.masks = {name: masks[name].to(weight.device) for name, weight in weights.items()}
        self.apply()

    # Inside

    def _check_started(self) -> None:
        if not self.masks:
            raise RuntimeError("sparse training has not started: call start() or load_state_dict() first.")

    def _weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in self._names:
            if name not in parameters or (self.masks and _shape(parameters, name) != _shape(self.masks, name)):
                raise ValueError(
                    f"{type(model).__name__} has no parameter {name} with the shape of its mask: pass a model like the "
                    f"{type(self.model).__name__} in training, without wrappers and not reparameterized."
                )
        return {name: parameters[name] for name in self._names}

    def _clear(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        for name, weight in self._weights(self.model).items():
            self.masks[name] = self.masks[name].to(weight.device)  # the model may have been moved
            pruned = ~self.masks[name]
            weight.masked_fill_(pruned, 0)
            for optimizer in optimizers:
                state = optimizer.state.get(weight, {})
                for key in MOMENTA:
                    value = state.get(key)
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        value.masked_fill_(pruned, 0)

    def _move(self) -> bool:
        """Prune and grow in every tensor; return whether that was possible."""
        weights = self._weights(self.model)
        if self.growth == "gradient":
            grads = [weight.grad for weight in weights.values() if weight.grad is not None]
            if not grads:
                raise RuntimeError('growth="gradient" needs gradients: call step() before optimizer.zero_grad().')
            if not all(bool(grad.isfinite().all()) for grad in grads):
                return False
        for name, weight in weights.items():
            if self.growth == "random":
                promise = self._random(weight)
            elif weight.grad is None:  # the last step did not use it
                continue
            else:
                promise = weight.grad.abs()
            self.masks[name] = _moved(weight, self.masks[name], promise, self.rate, self._generator)
        return True

    def _any(self, weight: Tensor, count: int) -> Tensor:
        return _largest(self._random(weight), count, self._generator)

    def _random(self, weight: Tensor) -> Tensor:
        """Return random numbers in the shape of ``weight``, the same on every process and device type."""
        return torch.rand(weight.shape, generator=self._generator, dtype=torch.float32, device="cpu").to(weight.device)


def _moved(weight: Tensor, mask: Tensor, promise: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Return ``mask`` without the smallest active weights, and with as many others that have the largest ``promise``.

    Weights that were just pruned are among the others; if their promise (at least 0) is largest, they stay.
    """
    active = int(mask.sum())
    count = math.ceil(rate * active)
    kept = _largest(weight.abs().masked_fill(~mask, -1), active - count, generator)
    return kept | _largest(promise.masked_fill(kept, -1), count, generator)


def _largest(scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return a mask of the ``count`` largest scores; ties, often many zeros, are broken at random."""
    flat = scores.flatten()
    if count == 0:
        return torch.zeros_like(flat, dtype=torch.bool).view(scores.shape)
    smallest = flat.topk(count, sorted=False).values.amin()
    mask = flat > smallest
    equal, wanted = (flat == smallest).nonzero()[:, 0], count - int(mask.sum())
    if wanted < len(equal):
        equal = equal[torch.randperm(len(equal), generator=generator, device="cpu")[:wanted].to(equal.device)]
    mask[equal] = True
    return mask.view(scores.shape)


def _saliencies(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> dict[str, Tensor]:
    """Return |weight * gradient| of each parameter, the gradient summed over all batches of all processes.

    This does not use a copy of the model, whose ``forward`` may be a wrapper that calls the original (accelerate).
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    grads: list[Tensor] = []
    wanted = list(weights.values())
    try:
        for batch in batches:
            new = torch.autograd.grad(loss(model, batch), wanted, allow_unused=True, materialize_grads=True)
            grads = [old + grad for old, grad in zip(grads, new, strict=True)] if grads else list(new)
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
    if not grads:
        raise ValueError("SNIP needs gradients: batches is empty.")
    if dist.is_available() and dist.is_initialized():
        grads = [grad.contiguous() for grad in grads]
        for grad in grads:
            dist.all_reduce(grad)
    saliencies = {name: (weights[name].detach() * grad).abs() for name, grad in zip(weights, grads, strict=True)}
    if not all(bool(saliency.isfinite().all()) for saliency in saliencies.values()):
        raise ValueError("SNIP's gradients are not finite: check the loss of the first batches.")
    return saliencies


def _snip(saliencies: Mapping[str, Tensor], density: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Return masks of the most salient weights of all tensors together."""
    device = next(iter(saliencies.values())).device
    flat = torch.cat([saliency.flatten().to(device) for saliency in saliencies.values()])
    mask = _largest(flat, round(density * flat.numel()), generator)
    parts = mask.split([saliency.numel() for saliency in saliencies.values()])
    masks = {
        name: part.view(saliency.shape).to(saliency.device)
        for (name, saliency), part in zip(saliencies.items(), parts, strict=True)
    }
    lost = [name for name, mask in masks.items() if not mask.any()]
    if lost:
        others = f" and {len(lost) - 1} other tensors" if len(lost) > 1 else ""
        raise ValueError(
            f"SNIP would keep no weight of {lost[0]}{others}, because their initial gradients are too small, and "
            'nothing could ever grow there: use init="erk" or "uniform", a lower sparsity, or exclude them with where.'
        )
    return masks


def _erk(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """Return RigL's Erdos-Renyi-Kernel densities, in proportion to sum(shape) / prod(shape) and at most 1."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    full: set[str] = set()
    while True:
        rest = [name for name in shapes if name not in full]
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in full)
        scale = budget / sum(sum(shapes[name]) for name in rest) if rest else 0.0
        densities = {name: scale * sum(shapes[name]) / sizes[name] for name in rest}
        over = {name for name in rest if densities[name] > 1}
        if not over:
            return {name: densities.get(name, 1.0) for name in shapes}
        full |= over


def _chosen(model: nn.Module, where: Where | None) -> list[str]:
    """Return the names of the selected layers' weights. Computed weights are skipped, with a warning."""
    found: dict[str, tuple[nn.Module, str]] = {}
    seen: set[int] = set()
    selects, left = selector(where), []
    for name, module in model.named_modules():
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        weight, reason = module._parameters.get("weight"), computed(module)
        if reason is not None:
            if selects(module, name) is None:
                left.append(f"{name or type(model).__name__}: {reason}")
        elif weight is not None and weight.requires_grad and id(weight) not in seen:
            seen.add(id(weight))
            found[f"{name}.weight" if name else "weight"] = module, name
    if left:
        log.warning("%d layers stay dense. %s", len(left), "; ".join(left[:_SHOWN]))
    if not found:
        why = f" {'; '.join(left[:_SHOWN])}." if left else ""
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer whose weight is trained.{why}")
    chosen = [key for key, (module, name) in found.items() if selects(module, name) is None]
    if not chosen:
        names = ", ".join(name or "(the model itself)" for _, name in found.values())
        raise ValueError(f"where={where!r} matches no layer of {type(model).__name__}. These could match: {names}.")
    return chosen


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
