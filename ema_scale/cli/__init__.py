"""`ema`: the command line. Thin: it reads arguments and calls the library. One file per group of commands."""

from ema_scale.cli import bench, data, explain, judge, launch, plan, results, runs, safelora, study  # noqa: F401
from ema_scale.cli.app import app
from ema_scale.cli.main import main

__all__ = ["app", "main"]
