"""Launching recipes on a test's cluster, and disturbing them."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from ema_scale.core.io import read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.defenses.registry import plugins
from ema_scale.slurm.submit import jobs_of, log_of, ranks_log_of
from tests import warm

ROOT = Path(__file__).resolve().parents[2]

# A defense from somebody else's package that makes training slow enough to be disturbed, and can disturb it itself.
PLUGIN = """
import os, signal, time
from ema_scale.defenses.base import Defense

class Trouble(Defense):
    kind = "trouble"
    citation = summary = "for tests"
    pause: float = 0.0
    rank: int = -1
    at: int = 0
    way: str = "raise"
    once: str = ""  # a file that the first trouble leaves: then there is no more

    def before_optimizer_step(self, model, state):
        time.sleep(self.pause)
        if int(os.environ.get("RANK", "0")) == self.rank and state.global_step == self.at:
            if self.once and os.path.exists(self.once):
                return
            if self.once:
                open(self.once, "w").close()
            if self.way != "raise":
                os.kill(os.getpid(), getattr(signal, self.way))
                time.sleep(60)
            raise ValueError("the disk of this rank is on fire")
"""


def write_plugin(folder: Path) -> None:
    """A plug-in as pip installs it, which is looked for anew."""
    (folder / "trouble.py").write_text(PLUGIN)
    info = folder / "trouble-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trouble\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ema_scale.defenses]\ntrouble = trouble:Trouble\n")
    plugins.cache_clear()


def environment(slurm: Any, *paths: Path) -> dict[str, str]:
    """Where Slurm's commands are the cluster's, and Python finds plugins in `paths`."""
    found = [str(ROOT), *map(str, paths)]
    return {**os.environ, "PATH": f"{slurm.bin}:{os.environ['PATH']}", "PYTHONPATH": ":".join(found)}


def attempt(*arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`ema` with these arguments, however it ends."""
    return warm.run(["-m", "ema_scale", *arguments], env=env)


def ema(*arguments: object, env: dict[str, str]) -> str:
    done = attempt(*arguments, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def launch(recipe: Any, folder: Path, *options: object, env: dict[str, str]) -> str:
    """`ema launch` on CPU nodes; the job's id."""
    path = folder / f"{recipe.name}.yaml"
    path.write_text(recipe.to_yaml())
    ema("launch", path, "--gpus-per-node", 0, "--time", "10:00", *options, env=env)
    return str(jobs_of(RunDir(recipe.run_path))[-1]["job"])


def step_of_run(run: RunDir) -> int:
    rows = read_jsonl(run.metrics_path)
    return int(rows[-1]["step"]) if rows else 0


def wait_for_step(run: RunDir, step: int, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while step_of_run(run) < step:
        assert time.monotonic() < end, everything(run)
        time.sleep(0.05)


def everything(run: RunDir) -> str:
    """All logs of a run's jobs, for a test's message."""
    texts = [f"status: {run.status()}"]
    for job in jobs_of(run):
        for path in (log_of(run, job), ranks_log_of(run, job)):
            texts.append(f"--- {path.name}\n" + (path.read_text(errors="replace")[-6000:] if path.exists() else ""))
    return "\n".join(texts)
