"""Train models: recipes, the training loop, checkpoints."""

from widefield.train.engine import RunResult, train
from widefield.train.evaluation import evaluate
from widefield.train.model import build_model
from widefield.train.networks import create_model
from widefield.train.recipe import (
    CheckpointSpec,
    ConversionSpec,
    DataSpec,
    EmaSpec,
    GroupSpec,
    LayerDecaySpec,
    ModelSpec,
    OptimizerSpec,
    Recipe,
    ScheduleSpec,
    SparsitySpec,
    TaskSpec,
)
from widefield.train.recipe_io import describe_keys, load_recipe, save_recipe, shipped_recipes
from widefield.train.run_data import RunData

__all__ = [
    "CheckpointSpec",
    "ConversionSpec",
    "DataSpec",
    "EmaSpec",
    "GroupSpec",
    "LayerDecaySpec",
    "ModelSpec",
    "OptimizerSpec",
    "Recipe",
    "RunData",
    "RunResult",
    "ScheduleSpec",
    "SparsitySpec",
    "TaskSpec",
    "build_model",
    "create_model",
    "describe_keys",
    "evaluate",
    "load_recipe",
    "save_recipe",
    "shipped_recipes",
    "train",
]
