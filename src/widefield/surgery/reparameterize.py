"""From the structure that trains to the structure that serves, and the proof that they compute the same."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from functools import partial
from typing import Any, cast

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from widefield import _checks
from widefield.surgery.outputs import Difference, difference
from widefield.surgery.walk import MERGE_METHODS, fuse_layers, takes_norm

log = logging.getLogger(__name__)


def reparameterize(
    model: nn.Module,
    example_input: Tensor | None = None,
    *,
    tolerance: float = 1e-4,
    inplace: bool = False,
) -> nn.Module:
    """Return the model with every mergeable layer fused, the root included, and its outputs verified.

    A batch norm that is the only reader of a mixture's or masked convolution's output, as seen on the example input, is
    folded into its kernels: of the model's ways, keep to those that the example takes. Verified are the outputs of the
    model, and those of every such layer on its own input, as a network can hide its layers (timm starts the last norm
    of each residual branch at zero). What was fused and the differences are logged at INFO.

    Args:
        model: in evaluation mode.
        example_input: what to verify on, (N, C, H, W). Default: noise of the input size in timm's configuration, or of
            64x64 with the channels of the first convolution.
        tolerance: largest difference allowed, in units of the output's largest absolute value.
        inplace: fuse ``model`` itself instead of a copy.

    Raises:
        RuntimeError: the model is in training mode; or outputs differ by more than the tolerance (the model passed is
            then unchanged, unless ``inplace``).
        ValueError: there is nothing to fuse; a layer has hooks, which would be lost; no example input could be made
            up; or the outputs hold nothing that can be compared.
    """
    tolerance = _checks.number("tolerance", tolerance)
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise RuntimeError(
            f"re-parameterisation computes the evaluation-mode function, but {training[0]} is in training mode: "
            "call model.eval() first."
        )
    hooked = [n for n, m in model.named_modules() if takes_norm(m) and (m._forward_hooks or m._forward_pre_hooks)]
    if hooked:
        raise ValueError(f"{', '.join(hooked)} has hooks, which fusing would lose: remove them first.")
    if not inplace:
        model = copy.deepcopy(model)
    x = _example(model) if example_input is None else example_input
    with torch.no_grad(), _Watch(model) as seen:
        before = _run(model, x, made_up=example_input is None)
        norms = seen.norms(before)
    fused, names = fuse_layers(model, norms=norms)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has nothing to fuse: no module in it has a method {' or '.join(MERGE_METHODS)}."
        )
    with torch.no_grad():
        apart = difference(before, fused(x))
    worst = max(seen.layers.values(), key=lambda d: d.relative, default=Difference(0.0, 0.0))
    log.info(
        "fused %d layers (%s); outputs differ by %.1e of their scale, those of single layers by at most %.1e",
        len(names),
        ", ".join(names),
        apart.relative,
        worst.relative,
    )
    if not max(apart.relative, worst.relative) <= tolerance:
        guilty = [name for name, d in seen.layers.items() if not d.relative <= tolerance] or names
        raise RuntimeError(
            f"re-parameterisation changed the outputs by {apart.relative:.2e} of their scale "
            f"({apart.max_abs:.2e} absolute) and those of single layers by up to {worst.relative:.2e}, "
            f"more than tolerance={tolerance:.0e}. Look at: {', '.join(guilty)}."
        )
    return fused


def _example(model: nn.Module) -> Tensor:
    channels = [getattr(m, "in_channels", None) for m in model.modules()]
    first = next((count for count in channels if isinstance(count, int)), None)
    if first is None:
        raise ValueError("no example input could be made up for this model: pass example_input=.")
    config = getattr(model, "pretrained_cfg", None) or {}
    _, height, width = config.get("input_size") or (None, 64, 64)
    x = torch.randn(2, first, height, width, generator=torch.Generator().manual_seed(0))
    return x.to(next(model.parameters()))


def _run(model: nn.Module, x: Tensor, *, made_up: bool) -> Any:
    if not made_up:
        return model(x)
    try:
        return model(x)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"the model does not run on the example input made up for it, {tuple(x.shape)}: pass example_input=."
        ) from error


class _Watch(TorchFunctionMode):
    """Watches a forward pass: which batch norm alone reads a mixture's output, and is every mixture what it fuses to?

    Every torch function called outside a batch norm with a mixture's output among its arguments is another reader, and
    so is the caller of the model. Mixtures are compared at once, before an in-place activation can change anything.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers: dict[str, Difference] = {}
        self._outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # holds the tensors, so that ids stay theirs
        self._calls: Counter[nn.Module] = Counter()
        self._readers: dict[nn.Module, list[_BatchNorm]] = {}
        self._others: set[nn.Module] = set()
        self._inside: list[nn.Module] = []
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            if takes_norm(module):
                self._handles.append(module.register_forward_hook(partial(self._mixed, name)))
            elif type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d) and module.track_running_stats:
                self._handles.append(module.register_forward_pre_hook(self._enter))
                self._handles.append(module.register_forward_hook(self._leave))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside:
            self._read(tree_leaves((args, kwargs or {})))
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._outputs.clear()

    def norms(self, result: Any) -> dict[nn.Module, _BatchNorm]:
        """Return mixture -> batch norm that can be folded into it, given what the model returned."""
        self._read(tree_leaves(result))
        return {
            mixture: norms[0]
            for mixture, norms in self._readers.items()
            if len(norms) == 1 and mixture not in self._others and self._calls[mixture] == self._calls[norms[0]] == 1
        }

    def _read(self, leaves: list[Any]) -> None:
        self._others |= {self._outputs[id(leaf)][0] for leaf in leaves if id(leaf) in self._outputs}

    def _mixed(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self._inside.append(module)  # what follows is no reader
        self.layers[name] = difference(output, cast(Any, module).fuse()(args[0]))
        self._inside.pop()
        self._calls[module] += 1
        self._outputs[id(output)] = (module, output)

    def _enter(self, module: _BatchNorm, args: Any) -> None:
        self._calls[module] += 1
        self._inside.append(module)
        if id(args[0]) in self._outputs:
            self._readers.setdefault(self._outputs[id(args[0])][0], []).append(module)

    def _leave(self, module: _BatchNorm, args: Any, output: Tensor) -> None:
        self._inside.pop()
