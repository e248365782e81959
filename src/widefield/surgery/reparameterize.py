"""From the structure that trains to the structure that serves, and the proof that they compute the same."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from widefield import _checks
from widefield.nn import MoRFConv2d
from widefield.surgery.walk import replace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Difference:
    """How far two models are apart on the same input."""

    max_abs: float
    """Largest absolute difference between their outputs."""
    scale: float
    """Largest absolute value of the first model's outputs."""

    @property
    def relative(self) -> float:
        """``max_abs`` in units of ``scale``."""
        return self.max_abs / self.scale if self.scale else self.max_abs


def reparameterize(
    model: nn.Module,
    example_input: Tensor | None = None,
    *,
    tolerance: float = 1e-4,
    inplace: bool = False,
) -> nn.Module:
    """Return the model with every mergeable layer fused, the root included, and its outputs verified.

    A batch norm that is the only reader of a mixture's output, as seen on the example input, is folded into the
    mixture's kernel bank. What was fused and the difference measured are logged at INFO.

    Args:
        model: in evaluation mode.
        example_input: what to verify on, (N, C, H, W). Default: noise of the input size in timm's configuration, or of
            64x64 with the channels of the first convolution.
        tolerance: largest difference allowed, in units of the output's largest absolute value.
        inplace: fuse ``model`` itself instead of a copy.

    Raises:
        RuntimeError: the model is in training mode; or the outputs differ by more than the tolerance (the model passed
            is then unchanged, unless ``inplace``).
        ValueError: there is nothing to fuse, or no example input could be made up.
    """
    tolerance = _checks.number("tolerance", tolerance)
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise RuntimeError(
            f"re-parameterisation computes the evaluation-mode function, but {training[0]} is in training mode: "
            "call model.eval() first."
        )
    if not inplace:
        model = copy.deepcopy(model)
    x = _example(model) if example_input is None else example_input
    with torch.no_grad(), _watch_norms(model) as norms:
        before = _run(model, x, made_up=example_input is None)
    if not all(leaf.isfinite().all() for leaf in tree_leaves(before) if isinstance(leaf, Tensor)):
        raise ValueError(
            "the model's own outputs are not finite on the example input, so nothing can be verified: "
            "pass example_input= with images that it can handle."
        )
    fused, names = _fuse(model, norms())
    if not names:
        raise ValueError(
            f"{type(model).__name__} has nothing to fuse: no module in it has a fuse() or reparameterize() method."
        )
    with torch.no_grad():
        difference = _difference(before, fused(x))
    log.info(
        "fused %d layers (%s); outputs differ by %.1e of their scale", len(names), ", ".join(names), difference.relative
    )
    if not difference.relative <= tolerance:
        raise RuntimeError(
            f"re-parameterisation changed the outputs by {difference.relative:.2e} of their scale "
            f"({difference.max_abs:.2e} absolute), more than tolerance={tolerance:.0e}. Fused were: {', '.join(names)}."
        )
    return fused


def compare(first: nn.Module, second: nn.Module, x: Tensor) -> Difference:
    """Run both models on ``x``, without gradients and in the mode they are in, and return how far they are apart."""
    with torch.no_grad():
        return _difference(first(x), second(x))


def _difference(first: Any, second: Any) -> Difference:
    pairs = list(zip(tree_leaves(first), tree_leaves(second), strict=True))
    tensors = [(a.double(), b.double()) for a, b in pairs if isinstance(a, Tensor)]
    return Difference(
        max(((a - b).abs().amax().item() for a, b in tensors if a.numel()), default=0.0),
        max((a.abs().amax().item() for a, _ in tensors if a.numel()), default=0.0),
    )


def _example(model: nn.Module) -> Tensor:
    tensor = next(model.parameters(), None)
    config = getattr(model, "pretrained_cfg", None) or {}
    shape = config.get("input_size")
    if shape is None:
        first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, MoRFConv2d))), None)
        if first is None:
            raise ValueError("no example input could be made up for this model: pass example_input=.")
        shape = (first.in_channels, 64, 64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape, generator=generator)
    return x if tensor is None else x.to(tensor.device, tensor.dtype)


def _run(model: nn.Module, x: Tensor, *, made_up: bool) -> Any:
    if not made_up:
        return model(x)
    try:
        return model(x)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"the model does not run on the example input made up for it, {tuple(x.shape)}: pass example_input=."
        ) from error


def _fuse(model: nn.Module, norms: Mapping[nn.Module, _BatchNorm]) -> tuple[nn.Module, list[str]]:
    """Fuse the outermost mergeable modules; ``norms``: mixture -> the batch norm that may be folded into it."""
    replacements: dict[nn.Module, nn.Module] = {}
    names: list[str] = []
    done: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in done):
            continue
        if isinstance(module, MoRFConv2d) and module in norms:
            replacements[module] = module.fuse(norms[module])
            replacements[norms[module]] = nn.Identity()
        elif callable(getattr(module, "fuse", None)):
            replacements[module] = module.fuse()
        elif callable(getattr(module, "reparameterize", None)):  # timm's MobileOne, RepVGG and FastViT blocks
            module.reparameterize()
        else:
            continue
        names.append(name or type(module).__name__)
        done.append(f"{name}." if name else "")
    return replace(model, replacements), names


@contextmanager
def _watch_norms(model: nn.Module) -> Iterator[Any]:
    """Watch a forward pass and find, for each mixture, the batch norm that alone reads its output.

    Every torch function called outside a batch norm with a mixture's output among its arguments is another reader.
    """
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}
    calls: dict[nn.Module, int] = {}
    readers: dict[nn.Module, list[_BatchNorm]] = {}
    others: set[nn.Module] = set()
    inside: list[_BatchNorm] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not inside:
                for leaf in tree_leaves((args, kwargs or {})):
                    if id(leaf) in outputs:
                        others.add(outputs[id(leaf)][0])
            return func(*args, **(kwargs or {}))

    def mixed(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[id(output)] = (module, output)  # held, so that its id stays its own
        calls[module] = calls.get(module, 0) + 1

    def enter(module: _BatchNorm, args: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        inside.append(module)
        if id(args[0]) in outputs:
            readers.setdefault(outputs[id(args[0])][0], []).append(module)

    def leave(module: nn.Module, args: Any, output: Tensor) -> None:
        inside.pop()

    def found() -> dict[nn.Module, _BatchNorm]:
        return {
            mixture: norms[0]
            for mixture, norms in readers.items()
            if len(norms) == 1 and mixture not in others and calls[mixture] == calls[norms[0]] == 1
        }

    handles = []
    for module in model.modules():
        if isinstance(module, MoRFConv2d):
            handles.append(module.register_forward_hook(mixed))
        elif type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) and module.track_running_stats:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with Watch():
            yield found
    finally:
        for handle in handles:
            handle.remove()
        outputs.clear()
