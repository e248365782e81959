"""Define the settings of a fit as a frozen dataclass that checks its values, and read and write them as YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from widefield import _checks
from widefield.train.checkpoint import write_text
from widefield.train.recipe import Recipe
from widefield.train.recipe_io import read_recipe, read_yaml, yaml_text

BY = ("stage", "layer")
BUDGETS = ("latency", "macs", "params")
FILE = "fit.yaml"


@dataclass(frozen=True)
class FitSpec:
    """What a fit does: the recipe of the unchanged network, the sizes to choose from, and the budget.

    Args:
        recipe: how the unchanged network is trained. Its epochs, or steps, are the budget of each of the two networks
            that are compared: probing and settling share them.
        kernel_sizes: the sizes to choose from, odd. Each convolution's own size is added, and sizes whose outer taps
            would never meet the map are left out.
        where: which convolutions, as globs over the names of the network's modules; None: those of the backbone without
            its stem, and only depthwise ones if there are any.
        by: which layers share a size: those of a ``"stage"`` that have the same size now, or each ``"layer"`` alone.
        budget: cost that is limited: ``"latency"``, measured on this machine, ``"macs"`` or ``"params"``.
        limit: largest cost relative to the unchanged network; None: no limit.
        probe: share of the epochs, or steps, for the network that learns all sizes.
        readings: largest number of size assignments that are read.
        batch: images of a latency measurement.
        device: where latency is measured.
        threads: of PyTorch in latency measurements; None: as they are.
        onnx: whether to write ``model.onnx`` at the end.
        unchanged: folder of a finished run of this recipe, to compare with; None: it is trained.
        out: folder of the fit; None: ``output/NAME-fit`` of the recipe.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range, or the recipe cannot be used.
    """

    recipe: Recipe
    kernel_sizes: tuple[int, ...] = (3, 5, 7, 11)
    where: tuple[str, ...] | None = None
    by: str = "stage"
    budget: str = "latency"
    limit: float | None = 1.0
    probe: float = 0.2
    readings: int = 64
    batch: int = 1
    device: str = "cpu"
    threads: int | None = None
    onnx: bool = True
    unchanged: str | None = None
    out: str | Path | None = None

    def __new__(cls, *args: Any, **options: Any) -> FitSpec:
        """Refuse unknown options, naming the right one."""
        _checks.known_arguments(cls.__name__, options, [field.name for field in dataclasses.fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, Recipe):
            raise TypeError(f"recipe must be a Recipe; got {self.recipe!r}. Read one with train.load_recipe.")
        sizes = sorted({size for size, _ in _checks.experts(self.kernel_sizes)})
        _set(self, kernel_sizes=tuple(sizes))
        if self.where is not None:
            given: Any = self.where
            where = (given,) if isinstance(given, str) else tuple(given)
            if not where or not all(isinstance(pattern, str) for pattern in where):
                raise TypeError(f"where must be globs over module names; got {self.where!r}.")
            _set(self, where=where)
        _checks.choice("by", self.by, BY)
        _checks.choice("budget", self.budget, BUDGETS)
        if self.limit is not None:
            _set(self, limit=_checks.number("limit", self.limit))
            if not self.limit:
                raise ValueError("limit must be above 0, as it is relative to the unchanged network; got 0.")
        _set(self, probe=_checks.number("probe", self.probe, maximum=1.0))
        if self.probe in (0, 1):
            raise ValueError(f"probe must be between 0 and 1, the share of the training to probe; got {self.probe:g}.")
        for name in ("readings", "batch"):
            _checks.integer(name, getattr(self, name))
        if self.threads is not None:
            _checks.integer("threads", self.threads)
        _check_recipe(self.recipe)
        self.shares()

    @property
    def folder(self) -> Path:
        """Return the folder of the fit."""
        if self.out is None:
            return self.recipe.folder.with_name(f"{self.recipe.name}-fit")
        return Path(self.out).expanduser()

    @property
    def seed(self) -> int:
        """Return the recipe's seed, which also decides which assignments are read."""
        return self.recipe.seed

    @property
    def unit(self) -> str:
        """Return what the length of the recipe counts in: "epoch" or "step"."""
        return "step" if self.recipe.max_steps else "epoch"

    def shares(self) -> tuple[int, int]:
        """Return the epochs, or steps, of the probe and of settling; raises ValueError if one would have none."""
        whole = self.recipe.max_steps or self.recipe.epochs or 0
        if whole < 2:
            raise ValueError(
                f"the recipe trains for {whole} {self.unit}, and a fit divides it among the probe and settling: set "
                f"{'max_steps' if self.recipe.max_steps else 'epochs'} to at least 2."
            )
        probe = min(max(round(self.probe * whole), 1), whole - 1)
        return probe, whole - probe

    def to_dict(self) -> dict[str, Any]:
        """Return the settings in YAML's types, without the folder."""
        found = dataclasses.asdict(self)
        del found["out"]
        return {
            **found,
            "kernel_sizes": list(self.kernel_sizes),
            "where": None if self.where is None else [*self.where],
        }

    def save(self) -> None:
        """Write ``fit.yaml`` into the folder; raises OSError."""
        write_text(self.folder / FILE, yaml_text(self.to_dict()))

    @classmethod
    def load(cls, folder: str | Path) -> FitSpec:
        """Read the settings of the fit in a folder.

        Raises:
            FileNotFoundError: there is no fit.
            ValueError, TypeError: the file was changed to something that does not work.
        """
        path = Path(folder).expanduser()
        file = path / FILE
        if not file.is_file():
            raise FileNotFoundError(f"{path} is not the folder of a fit: it has no {FILE}.")
        content = read_yaml(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
            raise ValueError(f"{file} is not as a fit writes it: it has no recipe.")
        recipe = read_recipe(content.pop("recipe"), str(file))
        return cls(recipe=recipe, **content, out=path)


def is_fit(folder: str | Path) -> bool:
    """Return whether a path is the folder of a fit."""
    return (Path(folder).expanduser() / FILE).is_file()


def _check_recipe(recipe: Recipe) -> None:
    if recipe.sparsity is not None:
        raise ValueError("sparsity: a fit trains dense kernels; set it to null, and make the settled network sparse.")
    if recipe.fsdp:
        raise ValueError("fsdp: a fit runs in one process; leave it out.")
    kinds = [spec.kind for spec in (recipe.conversion, *recipe.more_conversions) if spec is not None]
    for kind in ("elastic", "resize"):
        if kind in kinds:
            raise ValueError(f"conversion: a fit adds {kind!r} itself; leave it out of the recipe.")


def _set(spec: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(spec, name, value)
