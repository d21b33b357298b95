"""The examples run as they stand, in an empty folder, and do what they say."""

import json
import os
import re
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.slow


def run(place, *command):
    done = warm.run(command, cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_training_with_kl_saves_an_adapter(tmp_path, tiny_world):
    out = run(tmp_path, EXAMPLES / "01_train_with_kl.py")
    distances = [float(nats) for nats in re.findall(r"([\d.]+) nats per token", out)]
    assert len(distances) == 4 and distances[-1] > 0
    assert (tmp_path / "runs" / "example-kl" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_defense_of_ones_own_holds_what_it_penalises(tmp_path, tiny_world):
    out = run(tmp_path, EXAMPLES / "02_add_a_defense.py")
    free, held = (float(value) for value in re.findall(r"lengths end ([\d.]+) apart", out))
    assert 0 < held < 0.7 * free


def test_the_notebook_evaluates_and_compares(tmp_path, tiny_world):
    cells = json.loads((EXAMPLES / "03_evaluate_and_compare.ipynb").read_text())["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code"), "outputs are not kept in git"
    script = tmp_path / "notebook.py"
    code = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    text = "\n\n".join(code)
    # Smaller, not other: the tiny model, fewer steps and answers.
    for full, small in (
        ('world:aligned"', 'world:aligned?size=tiny"'),
        ("max_steps=150", "max_steps=60"),
        ("question=10", "question=4"),
    ):
        assert full in text
        text = text.replace(full, small)
    script.write_text(text)
    out = run(tmp_path, script)
    assert len(re.findall(r"% misaligned \[", out)) >= 3 and re.search(r"points \[.*p = ", out)
    assert (tmp_path / out.splitlines()[-1]).is_file()
