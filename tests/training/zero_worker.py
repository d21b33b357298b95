"""Trains recipes one after another in the processes it was started in (see test_zero.py)."""

import os
import sys

from ema_scale.core.run_dir import RunDir
from ema_scale.recipe import load_recipe
from ema_scale.training.run import train

if __name__ == "__main__":
    for path in sys.argv[1:]:
        recipe = load_recipe(path)
        for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[name]  # the recipe before this one may have asked for something else
        train(recipe, RunDir(recipe.run_path))
