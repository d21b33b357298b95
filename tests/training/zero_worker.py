"""What test_zero.py and test_fsdp.py have each process do."""

import os

from ema_scale.core.run_dir import RunDir
from ema_scale.models.lora import build_model
from ema_scale.recipe import load_recipe
from ema_scale.training.arguments import training_arguments
from ema_scale.training.distributed import prepare_environment
from ema_scale.training.run import train


def train_all(*paths):
    """Recipes, one after another."""
    for path in paths:
        recipe = load_recipe(path)
        for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[name]  # the recipe before this one may have asked for something else
        train(recipe, RunDir(recipe.run_path))


def held(path):
    """A recipe's model, loaded: elements of its parameters, of this process's part of them, and of all parts."""
    recipe = load_recipe(path)
    prepare_environment(recipe.training.deepspeed)
    arguments = training_arguments(recipe, RunDir(recipe.run_path))  # noqa: F841 - ZeRO-3 shards while they live
    base = build_model(recipe.model, recipe.adapter).get_base_model()
    parts = [p for name, p in base.named_parameters() if "lora_" not in name]
    whole, own = (sum(p.numel() for p in parts), sum(p.ds_tensor.numel() for p in parts))
    return whole, own, sum(p.ds_numel for p in parts)
