"""Training: recipes, the loop, checkpoints."""

from widefield.train.build import build_model, create_model, load_trained
from widefield.train.engine import RunResult, train
from widefield.train.evaluation import evaluate
from widefield.train.recipe import (
    CheckpointSpec,
    ConversionSpec,
    DataSpec,
    EmaSpec,
    GroupSpec,
    ModelSpec,
    OptimizerSpec,
    Recipe,
    ScheduleSpec,
    SparsitySpec,
    TaskSpec,
)
from widefield.train.recipe_io import describe_keys, load_recipe, save_recipe, shipped_recipes

__all__ = [
    "CheckpointSpec",
    "ConversionSpec",
    "DataSpec",
    "EmaSpec",
    "GroupSpec",
    "ModelSpec",
    "OptimizerSpec",
    "Recipe",
    "RunResult",
    "ScheduleSpec",
    "SparsitySpec",
    "TaskSpec",
    "build_model",
    "create_model",
    "describe_keys",
    "evaluate",
    "load_recipe",
    "load_trained",
    "save_recipe",
    "shipped_recipes",
    "train",
]
