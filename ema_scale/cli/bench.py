"""`ema bench`: the benchmarks of the repository, which are no part of the installed package."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import typer

from ema_scale.cli.app import app
from ema_scale.core.errors import UserError
from ema_scale.core.paths import shipped_root


@app.command(
    "bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def bench(context: typer.Context) -> None:
    """Measure time, memory and communication.

    Needs a checkout of the repository.
    """
    root = str(shipped_root())
    sys.path.insert(0, root)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])  # for processes
    if find_spec("benchmarks") is None or find_spec("benchmarks.cli") is None:
        raise UserError(f"{root}: found no benchmarks/ there; `ema bench` runs in a checkout of the repository")
    from importlib import import_module

    import_module("benchmarks.cli").bench(context.args, prog_name="ema bench")
