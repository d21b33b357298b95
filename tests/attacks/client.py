"""Asks the warm process of `server.py` to run commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.attacks.corpus import HANG

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """The warm process of `server.py`."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        for name in [n for n in environment if n.startswith(("SLURM_", "SBATCH_", "OPENAI_"))]:
            del environment[name]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.attacks.server"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._read() == {"ready": True}

    def run(self, *argv: str, cwd: Path, **options: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        case = {"argv": argv, "cwd": str(cwd), "seconds": HANG, **options}
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the warm process has ended"
        return dict(json.loads(line))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
