"""Define the recipe of a run as frozen dataclasses that check their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from widefield import _checks
from widefield._checks import SPARSE_GROWTH, SPARSE_INIT
from widefield.data.catalog import SETS
from widefield.tasks import TASKS

CONVERSIONS = {
    "deformable": "Deformable",
    "elastic": "Elastic",
    "fast_depthwise": "FastDepthwise",
    "gmconv": "GMConv",
    "inception_split": "InceptionSplit",
    "large_kernel": "LargeKernel",
    "morf": "MoRF",
    "resize": "Resize",
    "token_mixer": "TokenMixer",
}
"""Kind of conversion -> name of the config in widefield.surgery."""
SCHEDULES = ("cosine", "tanh", "poly", "step", "multistep", "none")
PRECISIONS = ("no", "bf16", "fp16")
TRACKERS = ("tensorboard", "wandb", "mlflow")
NONFINITE = ("stop", "skip")
LAYER_RULES = ("layer_wise", "pair_wise", "stage_wise", "block_wise", "single", "grouped")
WARMUPS = ("linear", "constant")


@dataclass(frozen=True)
class ModelSpec:
    """``widefield.train.create_model``: ``timm.create_model(name, **args)``, except that arguments may be None."""

    name: Annotated[str, "model name, as in timm.list_models()"]
    args: Annotated[dict[str, Any], "further arguments of timm.create_model"] = field(default_factory=dict)
    pretrained: Annotated[
        bool | str,
        "weights to start from: true for those of timm, or a path: a file of weights or the folder of a run",
    ] = False

    def __post_init__(self) -> None:
        _set(self, args=_arguments("model.args", self.args))
        if not isinstance(self.pretrained, (bool, str)):
            raise TypeError(f"model.pretrained must be true, false or a path; got {self.pretrained!r}.")
        if "pretrained" in self.args:
            raise ValueError("model.args.pretrained: write model.pretrained instead.")


@dataclass(frozen=True)
class ConversionSpec:
    """``widefield.surgery.convert(model, Config(**args), where)``, Config being ``MoRF``, ``GMConv`` and so on."""

    kind: Annotated[str, f"what the layers become: {', '.join(CONVERSIONS)}"]
    where: Annotated[
        str | list[str] | None, "which layers: a glob over module names, or several; null: all that can"
    ] = None
    args: Annotated[
        dict[str, Any], "arguments of the configuration in widefield.surgery, such as kernel_sizes of MoRF"
    ] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _checks.choice("conversion.kind", self.kind, tuple(CONVERSIONS))
        _set(self, where=_plain("conversion.where", self.where), args=_arguments("conversion.args", self.args))


@dataclass(frozen=True)
class DataSpec:
    """``widefield.data.create(name, split, **args)`` for the splits train and val."""

    name: Annotated[
        str,
        f"data set: {', '.join(SETS)}, or one of yours",
    ]
    args: Annotated[dict[str, Any], "options of the data set"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _set(self, args=_arguments("data.args", self.args))


@dataclass(frozen=True)
class TaskSpec:
    """``widefield.tasks.create(name, dataset, **args)``."""

    name: Annotated[str, f"task: {', '.join(TASKS)}, or one of yours"] = "classification"
    args: Annotated[dict[str, Any], "options of the task, such as mixup and label_smoothing"] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        _set(self, args=_arguments("task.args", self.args))


@dataclass(frozen=True)
class GroupSpec:
    """Parameters with their own learning rate or weight decay."""

    where: Annotated[str | list[str], "which parameters: globs over their names, or backbone, stem, neck, head"]
    lr_scale: Annotated[float, "their learning rate relative to the others"] = 1.0
    weight_decay: Annotated[float | None, "their weight decay; null: the usual one"] = None

    def __post_init__(self) -> None:
        _set(
            self,
            where=_plain("optimizer.groups.where", self.where),
            lr_scale=_checks.number("optimizer.groups.lr_scale", self.lr_scale),
        )
        if self.weight_decay is not None:
            _set(self, weight_decay=_checks.number("optimizer.groups.weight_decay", self.weight_decay))


@dataclass(frozen=True)
class LayerDecaySpec:
    """Learning rates that fall with the distance from the heads, as in published recipes for dense prediction."""

    rate: Annotated[float, "factor from one layer to the one below it, such as 0.9"]
    rule: Annotated[str, f"what a layer is, one of {', '.join(LAYER_RULES)}"] = "layer_wise"
    num_layers: Annotated[
        int | None,
        "number of layers: 6 or 12 in published recipes; null: 12, or as many as the rule makes of the blocks",
    ] = None
    group_sizes: Annotated[
        list[int] | None, "grouped: number of blocks that are one layer, for each stage, such as [3, 2, 3, 3]"
    ] = None

    def __post_init__(self) -> None:
        _set(self, rate=_checks.number("optimizer.layer_decay.rate", self.rate, maximum=1.0))
        if not self.rate:
            raise ValueError("optimizer.layer_decay.rate must be above 0: at 0 only the heads would learn. Use freeze.")
        _checks.choice("optimizer.layer_decay.rule", self.rule, LAYER_RULES)
        if self.num_layers is not None:
            _checks.integer("optimizer.layer_decay.num_layers", self.num_layers)
        if (self.rule == "grouped") != bool(self.group_sizes):
            raise ValueError(
                "optimizer.layer_decay.group_sizes and rule: grouped belong together; got "
                f"group_sizes {self.group_sizes} and rule {self.rule!r}. Set both, or neither."
            )
        for size in self.group_sizes or ():
            _checks.integer("every entry of optimizer.layer_decay.group_sizes", size)


@dataclass(frozen=True)
class OptimizerSpec:
    """``timm.optim.create_optimizer_v2``."""

    name: Annotated[str, "optimizer, as timm calls it"] = "adamw"
    lr: Annotated[float, "peak learning rate"] = 1e-3
    lr_base_size: Annotated[
        int | None,
        "batch size that lr is meant for: the rate is lr * whole batch / lr_base_size; null: lr is not scaled",
    ] = None
    weight_decay: Annotated[float, "weight decay"] = 0.05
    betas: Annotated[
        tuple[float, float] | None, "running-average coefficients of Adam and similar; null: its default"
    ] = None
    args: Annotated[dict[str, Any], "further arguments of create_optimizer_v2, such as eps or layer_decay"] = field(
        default_factory=dict
    )
    groups: Annotated[
        list[GroupSpec], "parameters with their own rate, such as routers and sigmas; the first match wins"
    ] = field(default_factory=list)
    layer_decay: Annotated[
        LayerDecaySpec | None,
        "learning rates by depth, as OpenMMLab's recipes count it; null: none, or args.layer_decay",
    ] = None
    weight_decay_end: Annotated[
        float | None, "weight decay at the end of the run, reached along a cosine; null: it stays as it is"
    ] = None

    def __post_init__(self) -> None:
        if self.layer_decay is not None and "layer_decay" in self.args:
            raise ValueError(
                "optimizer.layer_decay and optimizer.args.layer_decay, which is timm's, cannot both be given."
            )
        _set(
            self,
            lr=_checks.number("optimizer.lr", self.lr),
            weight_decay=_checks.number("optimizer.weight_decay", self.weight_decay),
            betas=_betas(self.betas),
            args=_arguments("optimizer.args", self.args),
        )
        if self.lr_base_size is not None:
            _checks.integer("optimizer.lr_base_size", self.lr_base_size)
        if self.weight_decay_end is not None:
            _set(self, weight_decay_end=_checks.number("optimizer.weight_decay_end", self.weight_decay_end))
            if not self.weight_decay:
                raise ValueError("optimizer.weight_decay_end needs a weight_decay above 0 to start from.")

    def lr_at(self, batch_size: int) -> float:
        """Return the peak learning rate for a whole batch of ``batch_size`` (Goyal et al. 2017, linear scaling)."""
        return self.lr if self.lr_base_size is None else self.lr * batch_size / self.lr_base_size


@dataclass(frozen=True)
class ScheduleSpec:
    """``timm.scheduler.create_scheduler_v2``, stepped at every update.

    With ``warmup_ratio`` the warm-up multiplies the schedule, as in OpenMMLab's mmcv: at step t of w the rate is the
    schedule's times 1 - (1 - t / w)(1 - warmup_ratio), or times warmup_ratio if ``warmup_shape`` is constant. Without
    it the rate rises from ``warmup_lr`` to the peak.
    """

    name: Annotated[str, f"one of {', '.join(SCHEDULES)}"] = "cosine"
    warmup_epochs: Annotated[int, "epochs of linear warm-up, counted in epochs"] = 0
    warmup_lr: Annotated[float, "learning rate at the start of the warm-up"] = 0.0
    min_lr: Annotated[float, "learning rate at the end"] = 0.0
    args: Annotated[
        dict[str, Any],
        "further arguments of create_scheduler_v2, such as decay_rate, the power of poly (default: 1); with max_steps "
        "they count steps in place of epochs",
    ] = field(default_factory=dict)
    warmup_steps: Annotated[int | None, "steps of linear warm-up, instead of warmup_epochs"] = None
    warmup_ratio: Annotated[
        float | None,
        "learning rate at the start of the warm-up relative to the schedule's, which the warm-up multiplies, as in "
        "OpenMMLab; null: warmup_lr",
    ] = None
    warmup_shape: Annotated[
        str, f"how the factor of warmup_ratio goes on, one of {', '.join(WARMUPS)}: up to 1, or unchanged"
    ] = "linear"
    before: Annotated[int, "epochs, or steps with max_steps, of the schedule that another run has done"] = 0
    after: Annotated[int, "epochs, or steps, of the schedule that are left to another run"] = 0

    def __post_init__(self) -> None:
        _checks.choice("schedule.name", self.name, SCHEDULES)
        for key in ("before", "after"):
            _checks.integer(f"schedule.{key}", getattr(self, key), minimum=0)
        _checks.choice("schedule.warmup_shape", self.warmup_shape, WARMUPS)
        if self.warmup_shape == "constant" and self.warmup_ratio is None:
            raise ValueError("schedule.warmup_shape: constant needs warmup_ratio, the factor of the learning rate.")
        _checks.integer("schedule.warmup_epochs", self.warmup_epochs, minimum=0)
        if self.warmup_steps is not None:
            _checks.integer("schedule.warmup_steps", self.warmup_steps, minimum=0)
            _one_of("schedule.warmup_epochs", self.warmup_epochs, "schedule.warmup_steps", self.warmup_steps)
        if self.warmup_ratio is not None:
            _set(self, warmup_ratio=_checks.number("schedule.warmup_ratio", self.warmup_ratio, maximum=1.0))
            _one_of("schedule.warmup_lr", self.warmup_lr, "schedule.warmup_ratio", self.warmup_ratio)
            if not self.warmup_epochs and not self.warmup_steps:
                raise ValueError("schedule.warmup_ratio needs a warm-up: set warmup_steps or warmup_epochs.")
            if "warmup_prefix" in self.args:
                raise ValueError("schedule.args.warmup_prefix has no effect with warmup_ratio: leave it out.")
        _set(
            self,
            warmup_lr=_checks.number("schedule.warmup_lr", self.warmup_lr),
            min_lr=_checks.number("schedule.min_lr", self.min_lr),
            args=_arguments("schedule.args", self.args),
        )


@dataclass(frozen=True)
class EmaSpec:
    """``timm.utils.ModelEmaV3``: an exponential moving average of the weights, which is evaluated, too."""

    decay: Annotated[float, "fraction of the average that is kept at each update, such as 0.9999"]
    warmup: Annotated[bool, "start with a small decay that grows towards this one"] = False

    def __post_init__(self) -> None:
        _set(self, decay=_checks.number("ema.decay", self.decay, maximum=1.0))


@dataclass(frozen=True)
class DistillationSpec:
    """A trained classifier whose answers are learned besides the labels (Hinton et al. 2015; Touvron et al. 2021)."""

    teacher: Annotated[
        str, "the folder of a run on the same classes, or the name of a pretrained model of timm or torchvision"
    ]
    weight: Annotated[float, "share of the teacher in the loss, from 0 to 1"] = 0.5
    temperature: Annotated[float, "divides the logits of both; above 1, small probabilities count more"] = 1.0
    hard: Annotated[bool, "learn the class that the teacher says, instead of its probabilities"] = False

    def __post_init__(self) -> None:
        _set(
            self,
            weight=_checks.number("distillation.weight", self.weight, maximum=1.0),
            temperature=_checks.number("distillation.temperature", self.temperature),
        )
        if not self.temperature:
            raise ValueError("distillation.temperature must be above 0.")
        if self.hard and self.temperature != 1:
            raise ValueError("distillation.temperature is for probabilities: leave it out with hard: true.")


@dataclass(frozen=True)
class SparsitySpec:
    """``widefield.surgery.DynamicSparsity``: a fraction of the weights is zero, and the zeros move."""

    sparsity: Annotated[float, "fraction of the weights that is zero"] = 0.4
    exploration: Annotated[float, "fraction of the active weights that moves at a time; falls to 0 over the run"] = 0.3
    interval: Annotated[int, "steps between moves"] = 100
    growth: Annotated[str, f"where weights grow, one of {', '.join(SPARSE_GROWTH)}"] = "random"
    init: Annotated[str, f"how the first weights are chosen, one of {', '.join(SPARSE_INIT)}"] = "snip"
    where: Annotated[
        str | list[str] | None, "which layers: a glob over module names, or several; null: all that are trained"
    ] = None

    def __post_init__(self) -> None:
        _set(
            self,
            sparsity=_checks.number("sparsity.sparsity", self.sparsity, maximum=1.0),
            exploration=_checks.number("sparsity.exploration", self.exploration, maximum=1.0),
            where=_plain("sparsity.where", self.where),
        )
        if self.sparsity == 1:
            raise ValueError("sparsity.sparsity must be below 1: at 1 no weight is left.")
        _checks.integer("sparsity.interval", self.interval)
        _checks.choice("sparsity.growth", self.growth, SPARSE_GROWTH)
        _checks.choice("sparsity.init", self.init, SPARSE_INIT)


@dataclass(frozen=True)
class CheckpointSpec:
    """Which checkpoints are written in addition to those before each evaluation, and which are kept."""

    keep: Annotated[int, "number of newest checkpoints to keep; the best one is always kept"] = 2
    every: Annotated[int | None, "steps between further checkpoints; null: before each evaluation only"] = None

    def __post_init__(self) -> None:
        _checks.integer("checkpoint.keep", self.keep)
        if self.every is not None:
            _checks.integer("checkpoint.every", self.every)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run. ``describe_keys()`` explains each key; keys nest like the classes.

    Raises TypeError or ValueError with the key and the value.
    """

    name: Annotated[str, "name of the run; its folder is output/name"]
    model: Annotated[ModelSpec, "the model"]
    data: Annotated[DataSpec, "the data"]
    output: Annotated[str, "folder that holds the runs"] = "runs"
    seed: Annotated[int, "seed of the weights, the order of the data, mixing and dropping"] = 0
    conversion: Annotated[ConversionSpec | None, "layers of the model to replace; null: none"] = None
    more_conversions: Annotated[
        list[ConversionSpec], "further layers to replace after conversion, such as those of other stages; in this order"
    ] = field(default_factory=list)
    task: Annotated[TaskSpec, "the task"] = field(default_factory=TaskSpec)
    optimizer: Annotated[OptimizerSpec, "the optimizer"] = field(default_factory=OptimizerSpec)
    schedule: Annotated[ScheduleSpec, "the learning rate over time"] = field(default_factory=ScheduleSpec)
    epochs: Annotated[int | None, "epochs to train, with an evaluation after each; null: 100, or max_steps"] = None
    max_steps: Annotated[int | None, "steps to train, instead of epochs; epochs of the data follow each other"] = None
    evaluate_every: Annotated[
        int | None, "steps between evaluations, with max_steps; null: the steps of one epoch of the data"
    ] = None
    patience: Annotated[
        int | None, "evaluations without a better headline after which the run ends; null: it goes on to its end"
    ] = None
    batch_size: Annotated[int, "images per batch and process"] = 128
    accumulate: Annotated[int, "number of batches per step"] = 1
    repeats: Annotated[int, "how often each image of an epoch is used, augmented anew; the epoch keeps its length"] = 1
    class_sampling: Annotated[
        float | None,
        "draw images by class, with replacement: a class of n images in proportion to n to this power, such as 0 (all "
        "classes alike) or 0.5; null: each image once in an epoch",
    ] = None
    workers: Annotated[int, "loader processes; 0: load in the training process"] = 4
    freeze: Annotated[
        str | list[str] | None,
        "parameters to freeze: globs over their names, or backbone, stem, neck, head; null: none",
    ] = None
    clip_grad: Annotated[float | None, "largest norm of the gradient; null: no clipping"] = None
    nonfinite: Annotated[str, "after a loss or gradient that is NaN or infinite: stop, or skip the step"] = "stop"
    ema: Annotated[EmaSpec | None, "moving average of the weights; null: none"] = None
    distillation: Annotated[
        DistillationSpec | None, "a trained classifier to learn from besides the labels; null: none"
    ] = None
    sparsity: Annotated[SparsitySpec | None, "sparse weights during training; null: none"] = None
    mixed_precision: Annotated[str, f"one of {', '.join(PRECISIONS)}"] = "no"
    channels_last: Annotated[bool, "keep images and weights in channels-last order"] = False
    compile: Annotated[bool, "torch.compile the model"] = False
    gradient_checkpointing: Annotated[
        bool, "recompute blocks in the backward pass instead of storing their activations"
    ] = False
    sync_batchnorm: Annotated[bool, "batch norms use the batches of all processes"] = False
    fsdp: Annotated[bool, "shard weights, gradients and optimizer state over the processes"] = False
    balance: Annotated[float, "coefficient of the load-balancing loss of hard routers"] = 0.0
    log_every: Annotated[int, "steps between loss entries in metrics.jsonl"] = 50
    trackers: Annotated[list[str], f"further logs: any of {', '.join(TRACKERS)}"] = field(
        default_factory=lambda: ["tensorboard"]
    )
    checkpoint: Annotated[CheckpointSpec, "the checkpoints"] = field(default_factory=CheckpointSpec)

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name in ("", ".."):
            raise ValueError(f"name must be the name of a folder, without separators; got {self.name!r}.")
        _checks.integer("seed", self.seed, minimum=0, maximum=2**32 - 1)
        self._check_length()
        for name in ("batch_size", "accumulate", "repeats", "log_every"):
            _checks.integer(name, getattr(self, name))
        if self.patience is not None:
            _checks.integer("patience", self.patience)
        if self.class_sampling is not None:
            _set(self, class_sampling=_checks.number("class_sampling", self.class_sampling, maximum=1.0))
        _set(self, freeze=_plain("freeze", self.freeze))
        if self.more_conversions and self.conversion is None:
            raise ValueError("more_conversions follow conversion, which is null: set conversion to the first of them.")
        _checks.choice("nonfinite", self.nonfinite, NONFINITE)
        for tracker in self.trackers:
            _checks.choice("every entry of trackers", tracker, TRACKERS)
        if self.fsdp and self.compile:
            raise ValueError("fsdp and compile cannot be combined here: drop one of the two.")
        for key in ("ema", "sparsity"):
            if self.fsdp and getattr(self, key) is not None:
                raise ValueError(f"fsdp shards the weights, and {key} needs them unsharded: drop one of the two.")
        _checks.integer("workers", self.workers, minimum=0)
        if self.clip_grad is not None:
            _set(self, clip_grad=_checks.number("clip_grad", self.clip_grad))
        _checks.choice("mixed_precision", self.mixed_precision, PRECISIONS)
        _set(self, balance=_checks.number("balance", self.balance))

    def _check_length(self) -> None:
        """Check and complete what says how long the run is and when it is evaluated."""
        if self.epochs is None and self.max_steps is None:
            _set(self, epochs=100)
        for key, warmup in (("epochs", "warmup_epochs"), ("max_steps", "warmup_steps")):
            length, part = getattr(self, key), getattr(self.schedule, warmup) or 0
            if length is not None and part > _checks.integer(key, length):
                raise ValueError(f"schedule.{warmup} must not exceed {key}; got {part} of {length}.")
        if self.evaluate_every is not None:
            _checks.integer("evaluate_every", self.evaluate_every)
        if self.max_steps is None:
            if self.evaluate_every is not None:
                raise ValueError("evaluate_every is for runs with max_steps; others are evaluated after each epoch.")
            return
        _one_of("epochs", self.epochs, "max_steps", self.max_steps)
        if self.schedule.warmup_epochs:
            raise ValueError("schedule.warmup_epochs is for runs with epochs; with max_steps set warmup_steps.")

    @property
    def folder(self) -> Path:
        """The run's folder, ``output/name``."""
        return Path(self.output).expanduser() / self.name


def _set(spec: Any, **values: Any) -> None:
    """Store normalized values in a frozen dataclass under construction."""
    for name, value in values.items():
        object.__setattr__(spec, name, value)


def _one_of(one: str, first: Any, other: str, second: Any) -> None:
    """Raise ValueError if two keys that replace each other are both given."""
    if first and second:
        raise ValueError(f"{one} and {other} cannot both be given; got {first} and {second}. Leave out one of them.")


def _betas(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"optimizer.betas must be two numbers; got {value!r}.")
    first, second = (_checks.number("every entry of optimizer.betas", entry, maximum=1.0) for entry in value)
    return first, second


def _arguments(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of names to values; got {value!r}.")
    return {_text(name, key): _plain(f"{name}.{key}", entry) for key, entry in value.items()}


def _text(name: str, key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{name} must have names as its keys; got {key!r}.")
    return key


def _plain(name: str, value: Any) -> Any:
    """Return a copy in YAML's types, so that a recipe equals its saved form; raises TypeError."""
    if isinstance(value, Mapping):
        return _arguments(name, value)
    if isinstance(value, (list, tuple)):
        return [_plain(name, entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name} must be made of numbers, strings, lists and mappings, which YAML can hold; got {value!r}.")
