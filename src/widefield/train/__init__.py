"""Train models: recipes, the training loop, checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from widefield._lazy import load_on_demand

if TYPE_CHECKING:
    from widefield.train.callbacks import Callback
    from widefield.train.engine import DryRun, dry_run, train
    from widefield.train.evaluation import evaluate
    from widefield.train.model import build_model
    from widefield.train.networks import create_model
    from widefield.train.recipe import (
        CheckpointSpec,
        ConversionSpec,
        DataSpec,
        DistillationSpec,
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
    from widefield.train.recipe_io import (
        ShippedRecipe,
        describe_keys,
        describe_recipes,
        load_recipe,
        recipe_text,
        save_recipe,
        shipped_recipes,
    )
    from widefield.train.run_data import RunData
    from widefield.train.run_result import RunResult
    from widefield.train.search import LearningRates, find_batch_size, find_learning_rate

load_on_demand(
    __name__,
    {
        "callbacks": "Callback",
        "engine": "DryRun dry_run train",
        "evaluation": "evaluate",
        "model": "build_model",
        "networks": "create_model",
        "recipe": "CheckpointSpec ConversionSpec DataSpec DistillationSpec EmaSpec GroupSpec LayerDecaySpec ModelSpec "
        "OptimizerSpec Recipe ScheduleSpec SparsitySpec TaskSpec",
        "recipe_io": "ShippedRecipe describe_keys describe_recipes load_recipe recipe_text save_recipe shipped_recipes",
        "run_data": "RunData",
        "run_result": "RunResult",
        "search": "LearningRates find_batch_size find_learning_rate",
    },
)

__all__ = [
    "Callback",
    "CheckpointSpec",
    "ConversionSpec",
    "DataSpec",
    "DistillationSpec",
    "DryRun",
    "EmaSpec",
    "GroupSpec",
    "LayerDecaySpec",
    "LearningRates",
    "ModelSpec",
    "OptimizerSpec",
    "Recipe",
    "RunData",
    "RunResult",
    "ScheduleSpec",
    "ShippedRecipe",
    "SparsitySpec",
    "TaskSpec",
    "build_model",
    "create_model",
    "describe_keys",
    "describe_recipes",
    "dry_run",
    "evaluate",
    "find_batch_size",
    "find_learning_rate",
    "load_recipe",
    "recipe_text",
    "save_recipe",
    "shipped_recipes",
    "train",
]
