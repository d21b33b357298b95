"""The options that commands of benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ema_scale.cli.numbers import whole

Out = Annotated[Path | None, typer.Option("--out", "-o", help="write all figures to this JSON file")]
Repeats = Annotated[int, whole(help="timed runs of every variant")]
Threads = Annotated[int, whole(help="CPU threads per process")]
