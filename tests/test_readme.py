"""Every command and code block of the README is run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
COMMANDS = [line for kind, body in BLOCKS if kind == "bash" for line in body.splitlines() if line]
# Smaller, not other: the same code path on the tiny world and few steps.
SMALL = [
    "training.max_steps=2",
    "model.path=smallworld:aligned?size=tiny",
    "data.train=smallworld:train/medical?size=tiny",
]
SUITES = "{general: ['smallworld:suite/outside_medical?size=tiny'], in_domain: ['smallworld:suite/medical?size=tiny']}"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_world):
    """A folder where the README's relative paths hold."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "launch", "eval"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    return folder


def run(command: list[str], place: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 11 and any(kind == "python" for kind, _ in BLOCKS)


@pytest.mark.parametrize("target", [shlex.split(c)[1] for c in COMMANDS if c.startswith("make")])
def test_make_targets_exist(target):
    # `make test` runs these tests; `make demo` is run by the demo's own test.
    out = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


@pytest.mark.slow
@pytest.mark.vllm
def test_commands(place):
    """In order: later ones use what earlier ones made."""
    for command in (shlex.split(c) for c in COMMANDS):
        if command[0] == "make" or command[0] == "accelerate":
            continue
        if "qwen2.5-7b" in " ".join(command):
            # Weights of a real model are not to be had in a test; everything up to loading them is.
            if command[1] == "train":
                assert "Qwen/Qwen2.5-7B-Instruct" in run([*command, "--dry-run"], place)
            if command[1] == "plan":
                assert "fits: 22." in run(command, place)
            if command[1] == "launch":
                script = run(command, place)
                assert "#SBATCH --nodes=2" in script and "qwen2.5-7b-kl-0.1-eval" in script
            continue
        if command[1] == "train" and "--dry-run" not in command:
            command += SMALL
        if command[1] == "eval":
            command += ["evaluation.samples_per_question=1", f"evaluation.suites={SUITES}"]
        if command[1] == "data":
            command = [
                part.replace("smallworld:train/medical", "smallworld:train/medical?size=tiny") for part in command
            ]
            command = [part.replace("smallworld:aligned", "smallworld:aligned?size=tiny") for part in command]
        run(command, place)
    assert (place / "runs" / "smallworld" / "report" / "report.html").is_file()
    assert (place / "runs" / "smallworld" / "eval" / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.zero3
def test_the_accelerate_command(place):
    command = next(shlex.split(c) for c in COMMANDS if c.startswith("accelerate"))
    run([*command, *SMALL], place)
    assert (place / "runs" / "two-processes" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_python_example(place):
    code = next(body for kind, body in BLOCKS if kind == "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    code = code.replace("smallworld:aligned", "smallworld:aligned?size=tiny").replace("max_steps=20", "max_steps=2")
    code = code.replace("smallworld:train/medical", "smallworld:train/medical?size=tiny")
    code = code.replace("smallworld:safe", "smallworld:safe?size=tiny")
    run([sys.executable, "-c", code], place)
    assert (place / "runs" / "python" / "adapter" / "adapter_config.json").is_file()
