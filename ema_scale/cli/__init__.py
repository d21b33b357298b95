"""`ema`: the command line. Thin: it reads arguments and calls the library. One file per group of commands."""

from ema_scale.cli import (  # noqa: F401
    bench,
    cache,
    data,
    explain,
    judge,
    launch,
    look,
    plan,
    recommend,
    results,
    runs,
    safelora,
    share,
    study,
)
from ema_scale.cli.app import app
from ema_scale.cli.main import main

__all__ = ["app", "main"]
