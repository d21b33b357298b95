"""`ema`: the command line. Thin: it reads arguments and calls the library. One file a group of commands."""

from ema_scale.cli import (
    bench,  # noqa: F401
    bench_eval,  # noqa: F401
    bench_plan,  # noqa: F401
    bench_selection,  # noqa: F401
    bench_training,  # noqa: F401
    cache,  # noqa: F401
    catalogue,  # noqa: F401
    compare,  # noqa: F401
    data,  # noqa: F401
    judge,  # noqa: F401
    launch,  # noqa: F401
    plan,  # noqa: F401
    runs,  # noqa: F401
    safelora,  # noqa: F401
    select,  # noqa: F401
    studies,  # noqa: F401
    sweep,  # noqa: F401
    vector,  # noqa: F401
)
from ema_scale.cli.app import app
from ema_scale.cli.main import main

__all__ = ["app", "main"]
