"""`ema demo`: the whole story in minutes on a small world trained on the spot."""

from __future__ import annotations

import os
from pathlib import Path

from ema_scale.errors import UserError
from ema_scale.study.grid import load_study
from ema_scale.study.local import run_study

_STUDY = Path(__file__).resolve().parents[2] / "configs" / "studies" / "demo.yaml"


def run_demo(output: Path) -> Path:
    """Run configs/studies/demo.yaml into `output`/demo; returns the report's path."""
    if not _STUDY.is_file():
        raise UserError("the demo's study file is not installed with the package: run `ema demo` from a git checkout")
    # A model this small is fastest on one thread; more only wait for each other. Must precede the import of torch.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return run_study(load_study(_STUDY).model_copy(update={"output": str(output)}))
