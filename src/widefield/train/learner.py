"""Define the training step and its state: the model and everything that changes its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from timm.models._features import FeatureDictNet, FeatureGetterNet
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from widefield.dense.backbone import FeatureMaps
from widefield.nn import Recomputing, load_balancing
from widefield.surgery import DynamicSparsity, anatomy, draw_sizes, elastic_layers
from widefield.tasks import Batch, Task
from widefield.tasks.base import sum_of
from widefield.train import checkpoint
from widefield.train.alarms import still_sigmas
from widefield.train.model import build_model
from widefield.train.optimization import create_optimizer, create_schedule, freeze
from widefield.train.plan import Plan
from widefield.train.processes import largest
from widefield.train.randomness import random_state, restore_random_state
from widefield.train.recipe import Recipe
from widefield.train.sharding import Sharded
from widefield.train.sync_norm import synchronized


class Step(NamedTuple):
    """The outcome of one step."""

    loss: Tensor
    """Mean over its batches, a scalar on the device."""
    skipped: bool
    """Whether the weights were left unchanged, because the loss or a gradient was not finite."""
    parts: dict[str, Tensor]
    """The parts of the loss by name, likewise."""


class Learner:
    """The model of a recipe with its optimizer, schedule, moving average and sparsity, on accelerate's device.

    Args:
        recipe: describes it.
        task: what it learns.
        accelerator: where it runs.
        classes: names of its outputs; see :func:`widefield.train.build_model`.
        shape: (C, H, W) of the images, if they are of one size: the model is tried on one.

    Attributes:
        raw: the model without wrappers.
        model: the model to call.
        ema: the moving average of the weights, or None.
        remark: what is to be said about the model before training, in the first process; may be empty.

    Raises ValueError or TypeError for a recipe that does not work, naming the key.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        accelerator: Accelerator,
        classes: Sequence[str] | None = None,
        shape: tuple[int, int, int] | None = None,
    ) -> None:
        self._recipe, self._task, self._accelerator = recipe, task, accelerator
        model = build_model(recipe, task, classes).to(accelerator.device)
        self.remark = "" if shape is None else _check_fit(accelerator, task, model, recipe.model.name, shape)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if recipe.gradient_checkpointing:
            _checkpoint_blocks(model)
        if recipe.sync_batchnorm and accelerator.num_processes > 1:
            model = synchronized(model, accelerator.device)
        self._resting = freeze(model, recipe.freeze) if recipe.freeze else []
        self.raw = model
        self._draws = bool(elastic_layers(model))
        # Copied before accelerate wraps the model's forward: a copy of the wrapper would still call the original.
        self.ema = ModelEmaV3(model, decay=recipe.ema.decay, use_warmup=recipe.ema.warmup) if recipe.ema else None
        spread = recipe.fsdp and accelerator.num_processes > 1
        self._sharded = Sharded(model, recipe.mixed_precision) if spread else None
        rate = recipe.optimizer.lr_at(recipe.batch_size * recipe.accumulate * accelerator.num_processes)
        optimizer = create_optimizer(model, recipe.optimizer, rate)
        self.model: nn.Module = self._sharded.model if self._sharded else accelerator.prepare(model)
        self._plain = optimizer
        # accelerate's wrapper is needed for scaling in fp16 only, and it searches for packages at every step.
        self.optimizer: Any = accelerator.prepare(optimizer) if accelerator.scaler is not None else optimizer
        self._scheduler: Any = None
        self._sparse: DynamicSparsity | None = None

    def schedule(self, steps_per_epoch: int) -> Plan:
        """Plan the learning rate, the weight decay and the sparsity for epochs of ``steps_per_epoch`` steps.

        Returns:
            The plan of the run. Its length may differ from the recipe's, for example by the schedule's cool-down.
        """
        recipe = self._recipe
        unit, length = ("step", recipe.max_steps) if recipe.max_steps else ("epoch", recipe.epochs or 0)
        unit_steps = 1 if unit == "step" else steps_per_epoch
        self._scheduler, steps = create_schedule(self._plain, recipe.schedule, length, unit_steps, recipe.optimizer)
        still = still_sigmas(self.raw, self._plain, self._scheduler, steps)
        self.remark = "\n".join(filter(None, (self.remark, still)))
        if recipe.sparsity:
            arguments = dataclasses.asdict(recipe.sparsity)
            self._sparse = DynamicSparsity(self.raw, **arguments, end=steps, seed=recipe.seed)
        return Plan(steps, steps_per_epoch, recipe.evaluate_every or steps_per_epoch, unit)

    def start(self, batch: Batch) -> None:
        """Choose the sparse weights from the gradients of a first batch; a no-op for a dense model."""
        if self._sparse is None:
            return
        # Without the scaler, gradients of 1e-6 vanish in fp16; a factor does not change their ranking.
        scaler = self._accelerator.scaler

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            value = self._task.loss(model, batch)
            return value if scaler is None else scaler.scale(value)

        with self._accelerator.autocast():
            self._sparse.start([batch], loss)
        if self.ema is not None:
            self._sparse.apply(self.ema.module)

    @property
    def is_sparse(self) -> bool:
        """Return whether :meth:`start` needs a batch."""
        return self._sparse is not None

    def gathered(self) -> AbstractContextManager[None]:
        """Let each process call the model on its own for one block; all processes must enter it."""
        return self._sharded.gathered() if self._sharded else nullcontext()

    def train(self) -> None:
        """Put the model into training mode, except the frozen norms."""
        self.model.train()
        for norm in self._resting:
            norm.eval()

    @property
    def lr(self) -> float:
        """Return the base learning rate, which groups multiply by their ``lr_scale``."""
        groups = self.optimizer.param_groups
        nearest = min(groups, key=lambda group: abs(group.get("lr_scale", 1.0) - 1.0))
        scale = nearest.get("lr_scale", 1.0)
        return float(nearest["lr"]) / scale if scale else 0.0

    def step(self, batches: Sequence[Batch], number: int, *, scheduled: bool = True) -> Step:
        """Take step ``number``, from 1, on the gradients of these batches; ``scheduled``: move the learning rate."""
        recipe, accelerator = self._recipe, self._accelerator
        if self._draws:
            draw_sizes(self.raw, recipe.seed, number)
        skips = recipe.nonfinite == "skip"
        before = [buffer.clone() for buffer in self.raw.buffers()] if skips else []  # a forward pass changes the norms
        losses: list[Tensor] = []
        parts: list[dict[str, Tensor]] = []
        for batch in batches:
            last = len(losses) == len(batches) - 1
            if self._sharded:
                self._sharded.model.set_requires_gradient_sync(last)
            with nullcontext() if last or self._sharded else accelerator.no_sync(self.model):
                loss, found = self._loss(batch)
                loss = loss / len(batches)
                with Recomputing(self.raw) if recipe.gradient_checkpointing else nullcontext():
                    accelerator.backward(loss)
            losses.append(loss.detach())
            parts.append({name: value.detach() / len(batches) for name, value in found.items()})
        if recipe.clip_grad is not None:
            accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_grad)
        loss = torch.stack(losses).sum()
        sums = {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}
        if skips and not self._finite(loss):
            if accelerator.scaler is not None and recipe.clip_grad is not None:
                accelerator.scaler.update()  # clipping has unscaled the gradients, which is allowed once per update
            self.optimizer.zero_grad()
            for buffer, old in zip(self.raw.buffers(), before, strict=True):
                buffer.copy_(old)
            return Step(loss, skipped=True, parts=sums)
        self.optimizer.step()
        if self._sparse is not None:
            self._sparse.step(self.optimizer)
        self.optimizer.zero_grad()
        if scheduled and self._scheduler is not None:
            self._scheduler.step_update(number)
        if self.ema is not None:
            self.ema.update(self.raw, number)
            if self._sparse is not None:
                self._sparse.apply(self.ema.module)
        return Step(loss, skipped=False, parts=sums)

    def _loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss of a batch, and the task's parts of it by name."""
        if self._recipe.channels_last:
            batch = {**batch, "image": _channels_last(batch.get("image"))}
        if not self._recipe.balance:
            parts = self._task.losses(self.model, batch)
            return sum_of(parts), parts
        with load_balancing(self.raw) as balance:
            parts = self._task.losses(self.model, batch)
            return sum_of(parts) + self._recipe.balance * balance(), parts

    def _finite(self, loss: Tensor) -> bool:
        """Return whether the losses and gradients of all processes are finite; the scaler checks those of fp16.

        The processes agree on the loss first, because a norm of sharded gradients must be computed by all or by none.
        """
        if largest(self._accelerator, not torch.isfinite(loss)):
            return False
        if self._accelerator.scaler is not None:
            return True
        return not largest(self._accelerator, not _finite(p.grad for p in self.raw.parameters() if p.grad is not None))

    def finite(self) -> bool:
        """Return whether all weights of all processes are finite; all processes must call it."""
        return not largest(self._accelerator, not _finite(self.raw.parameters()))

    def agree(self, *, one_size: bool = True) -> nn.Module:
        """Return the model to evaluate, with the first process's statistics of norms in all processes.

        It is not the training wrapper, whose forward pass would synchronize with processes whose shares of the images
        may be shorter. All processes must call this method.

        Args:
            one_size: whether the images to evaluate are of one size. If not, the model is not the compiled one, which
                would be compiled again for their sizes.
        """
        if self._accelerator.num_processes == 1:
            return self.model if one_size else self.raw
        for model in (self.raw, *([self.ema.module] if self.ema else [])):
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        return self.raw

    def _stateful(self) -> dict[str, Any]:
        """Return the parts besides the optimizer whose state a checkpoint holds; None for one that is not in use."""
        return {"scheduler": self._scheduler, "scaler": self._accelerator.scaler, "sparsity": self._sparse}

    def state_dict(self) -> dict[str, Any]:
        """Return all state except the weights, in types that a checkpoint accepts.

        All processes must call it; the first one's is complete.
        """
        return {
            "optimizer": self._sharded.optimizer_state(self._plain) if self._sharded else self.optimizer.state_dict(),
            **{name: None if part is None else part.state_dict() for name, part in self._stateful().items()},
        }

    def load_state_dict(self, state: dict[str, Any], average: Path) -> None:
        """Load what :meth:`state_dict` returned and, from its file, the moving average if there is one."""
        if self.ema is not None:
            checkpoint.load_weights(average, self.ema.module)
        if self._sharded:
            self._sharded.load_optimizer_state(self._plain, state["optimizer"])
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        for name, part in self._stateful().items():
            if part is not None:
                part.load_state_dict(state[name])

    def whole(self) -> nn.Module:
        """Return the model with all its weights, to save; all processes must call it, the first one's is complete."""
        return self._sharded.whole() if self._sharded else self.raw

    def load_weights(self, file: Path) -> None:
        """Load the weights of a checkpoint; raises ValueError for those of another model, with nothing changed."""
        checkpoint.load_weights(file, self._sharded.target() if self._sharded else self.raw)
        if self._sharded:
            self._sharded.spread()

    def result(self) -> nn.Module:
        """Return the trained model in evaluation mode, without wrappers; the moving average if there is one."""
        if self.ema is not None:
            average: nn.Module = self.ema.module
            return average.eval()
        if self._sharded:
            return self._sharded.whole().eval()
        trained: nn.Module = self._accelerator.unwrap_model(
            self.model, keep_fp32_wrapper=False, keep_torch_compile=False
        )
        return trained.eval()


def _finite(tensors: Iterable[Tensor]) -> bool:
    norm: Any = torch.nn.utils.get_total_norm([tensor.detach() for tensor in tensors])
    return bool(torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))


def _channels_last(image: Any) -> Any:
    """Return images in channels-last order: (N, C, H, W), or (C, H, W) of several sizes in a list."""
    if isinstance(image, list):
        return [_channels_last(one[None])[0] for one in image]
    return image.contiguous(memory_format=torch.channels_last) if isinstance(image, Tensor) else image


def _check_fit(accelerator: Accelerator, task: Task, model: nn.Module, name: str, shape: tuple[int, int, int]) -> str:
    """Return the task's remark on a model; draws no random number.

    The first process looks at the model, which is the same in all.

    Raises:
        ValueError: the model does not fit the task; in every process.
    """
    before, remark, failed = random_state(), "", None
    if accelerator.is_main_process:
        try:
            task.check(model, shape)
            remark = task.remark(model, shape)
        except Exception as error:
            failed = error
        finally:
            restore_random_state(before)
    if largest(accelerator, failed is not None):
        reason = failed or "the first process says why"
        if failed is not None and not isinstance(failed, ValueError):
            raise failed
        raise ValueError(f"model: {name} does not fit the task: {reason}") from failed
    return remark


def _checkpoint_blocks(model: nn.Module) -> None:
    place = anatomy(model).backbone
    backbone: Any = model.get_submodule(place)
    maps = model.get_submodule(place.rpartition(".")[0])
    if isinstance(maps, FeatureMaps) and maps.has_hooks:
        raise ValueError(
            f"gradient_checkpointing: the feature maps of {type(backbone).__name__} come from hooks, which "
            "recomputation does not call reliably; leave it out, or use a backbone of another feature_cls."
        )
    if isinstance(backbone, FeatureGetterNet):  # timm's wrapper has no such method, the network in it does
        backbone = backbone.model
    elif isinstance(backbone, FeatureDictNet):  # the wrapper's method recomputes whole stages, and spares the last
        stages = [part for part in backbone.modules() if part is not backbone and hasattr(part, "grad_checkpointing")]
        for stage in stages:
            stage.grad_checkpointing = True
        if stages:
            return
    try:
        backbone.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ValueError(
            f"gradient_checkpointing: {type(backbone).__name__} does not offer it (set_grad_checkpointing); leave it "
            "out."
        ) from error
