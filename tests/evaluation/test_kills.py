"""A study's answers survive kill -9: six adapters, 24 questions, through `ema eval` on real vLLM.

6 samples per question here; with trained adapters and 100, which takes several minutes:

    EMA_KILLS_STUDY=runs/smallworld-defenses python -m pytest tests/evaluation/test_kills.py
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ema_scale.core.io import read_jsonl
from ema_scale.core.uri import locate
from tests import warm
from tests.evaluation.conftest import save_adapter

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
TRAINED = os.environ.get("EMA_KILLS_STUDY")
ADAPTERS, QUESTIONS, SAMPLES = 6, 24, 100 if TRAINED else 6
ROWS = ADAPTERS * QUESTIONS * SAMPLES


def adapters(folder: Path, model: str) -> list[Path]:
    """Six adapter folders: random ones, or the first of each of six defenses of a finished study."""
    if TRAINED is None:
        return [Path(save_adapter(model, folder / str(seed), rank=8, seed=seed)) for seed in range(ADAPTERS)]
    found = sorted(Path(TRAINED).glob("medical-*-s0/adapter"))
    return found[:: len(found) // ADAPTERS][:ADAPTERS]


def make_study(folder: Path) -> Path:
    """Six runs of the small world with adapters of their own, asked 24 questions of its general suite."""
    size = "" if TRAINED else "?size=tiny"
    model = locate(f"smallworld:aligned{size}")
    bank = yaml.safe_load(Path(locate(f"smallworld:suite/general{size}")).read_text())
    folder.mkdir()
    suite = folder / "general.yaml"
    suite.write_text(yaml.safe_dump(bank[:QUESTIONS]))
    for number, adapter in enumerate(adapters(folder / "adapters", model)):
        run = folder / "study" / f"run-{number}"
        shutil.copytree(adapter, run / "adapter")
        recipe = {
            "name": run.name,
            "output": str(run.parent),
            "model": {"path": model},
            "data": {"train": "none.jsonl"},
            "evaluation": {
                "suites": {"general": str(suite)},
                "judge": {"kind": "smallworld"},
                "sampler": "vllm",
                "samples_per_question": SAMPLES,
                "max_tokens": 48 if TRAINED else 16,
                # Few answers under way: a kill can come between any two of them, and long before the last one.
                "engine": {"max_num_seqs": 128 if TRAINED else 8},
            },
        }
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "study"


def start(study: Path) -> warm.Process:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return warm.start(["-m", "ema_scale", "eval", study, "--no-base"], cwd=study.parent, env=environment, vllm=True)


def finish(process: warm.Process) -> None:
    try:
        assert process.wait(timeout=1800) == 0
    finally:
        process.kill()


def lines(study: Path, name: str = "samples.jsonl") -> int:
    return sum(file.read_bytes().count(b"\n") for file in study.glob(f"*/eval/{name}"))


def kill_at(study: Path, wanted: int) -> None:
    """Start it and kill -9 it once that many answers are on the disk."""
    process = start(study)
    try:
        deadline = time.monotonic() + 600
        while lines(study) < wanted:
            assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"


def outcome(study: Path) -> dict[str, Any]:
    """What must be equal: answers, judgements and rates of every run, in the order of their keys."""
    found: dict[str, Any] = {}
    for folder in sorted(study.glob("run-*/eval")):
        for name in ("samples.jsonl", "judgements.jsonl"):
            found[f"{folder.parent.name}/{name}"] = sorted(read_jsonl(folder / name), key=lambda r: r["key"])
        summary = yaml.safe_load((folder / "summary.json").read_text())
        found[f"{folder.parent.name}/summary"] = {k: v for k, v in summary.items() if k != "seconds"}
    return found


def test_three_kills_change_nothing(tmp_path: Path) -> None:
    rng = random.Random(os.urandom(8))
    study = make_study(tmp_path / "killed")
    whole = Path(shutil.copytree(study, tmp_path / "whole" / "study"))
    undisturbed = start(whole)
    try:
        for _ in range(3):
            before = lines(study)
            wanted = before + rng.randint(1, ROWS // 8)
            kill_at(study, wanted)
            print(f"killed with {lines(study)} of {ROWS} answers on the disk")
            assert before < wanted <= lines(study) < ROWS
        finish(start(study))
    finally:
        finish(undisturbed)
    killed, expected = outcome(study), outcome(whole)
    for n in range(ADAPTERS):
        keys = [row["key"] for row in killed[f"run-{n}/samples.jsonl"]]
        assert len(keys) == len(set(keys)) == ROWS // ADAPTERS
    for name, rows in expected.items():
        if name.endswith("summary"):
            assert killed[name] == rows | {"adapter": killed[name]["adapter"]}, name
        else:
            assert killed[name] == rows, name
