"""benchmarks/gpu.py as it runs on a GPU, but at tiny sizes on a CPU: every section makes its rows, and what is checked
holds here too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def rehearse(out, *sections, vllm=False):
    """Section -> name -> row, and the Markdown."""
    return read(out, sections, warm.run(command(out, sections), cwd=out, vllm=vllm))


def command(out, sections):
    return [str(SCRIPT), "--rehearse", "--out", str(out), "--only", *sections]


def read(out, sections, done, code=0):
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((out / "gpu.json").read_text())
    assert found["rehearsal"]
    rows = {part["section"]: {row["name"]: row for row in part["rows"]} for part in found["sections"]}
    assert list(rows) == list(sections)
    return rows, (out / "gpu.md").read_text()


@pytest.mark.slow
def test_correctness_and_figures(tmp_path):
    rows, table = rehearse(tmp_path, "ceilings", "exact", "ways", "loss", "step-0.5b", "step-7b")
    assert len(rows["exact"]) == 8 and all(row["ok"] for row in rows["exact"].values())
    assert len(rows["ways"]) == 8 and all(row["ok"] for row in rows["ways"].values())
    assert all(row["first loss"] > row["last loss"] for row in rows["ways"].values())
    loss = rows["loss"]
    for part in ("CE + KL", "CE"):
        for way in ("full logits", "ema_scale, fused", "candidate: torch.compile"):
            assert loss[f"a small head, {part}: {way}"]["off"] < 1e-5
        assert "needs a GPU" in loss[f"a small head, {part}: candidate: a Triton kernel"]["error"]
    step = rows["step-0.5b"]
    assert len(step) == 10 and not any("error" in row for row in step.values())
    for kind in ("checkpointing", "activations stored"):
        plain, two, cached = (step[f"{way}, {kind}"] for way in ("plain", "two_stream", "cached"))
        assert plain["ratio"] == plain["floor"] == 1 < cached["floor"] < two["floor"] < 2
        assert two["ratio"] == two["seconds"] / plain["seconds"] and two["planned"] > 0
    # What cannot be rehearsed, or fails, is a row and not the end.
    assert rows["step-7b"]["step-7b"]["error"] == "not part of a rehearsal"
    assert "| cross-entropy, float32 |" in table and "## A step, Qwen2.5 7B" in table


@pytest.mark.zero3
@pytest.mark.slow
def test_sharded(tmp_path):
    rows, _ = rehearse(tmp_path, "zero3", "fsdp2")
    for section in rows.values():
        assert len(section) == 3 and all(row["ok"] for row in section.values())


@pytest.mark.vllm
@pytest.mark.slow
def test_engine(tmp_path):
    rows, _ = rehearse(tmp_path, "vllm", vllm=True)
    same, speed = rows["vllm"].values()
    assert same["ok"] and same["told apart"] == 3 and speed["answers_per_second"] > 0


def test_a_section_whose_process_dies_is_a_row(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text("import os\nos.register_at_fork(after_in_child=lambda: os._exit(3))\n")
    sections = ("exact", "loss")
    done = subprocess.run(  # a new process, which reads sitecustomize
        [sys.executable, *command(tmp_path, sections)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{broken}:{ROOT}"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    rows, table = read(tmp_path, sections, done)
    assert all("exit code 3" in section[name]["error"] for name, section in rows.items())
