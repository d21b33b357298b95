"""What people install: a wheel that works in every folder, and names whose types their checker knows.

The environments are fresh. They borrow the libraries of the one that runs the tests, but not its ema_scale.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("ema_scale", "configs", "eval", "launch", "pyproject.toml", "setup.py", "README.md", "LICENSE")

pytestmark = pytest.mark.slow


def run(*command, cwd, **environment):
    # A shell may hold the path of a checkout, which these environments must not see.
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env={**plain, **environment}, capture_output=True, text=True, timeout=900
    )


def checked(*command, cwd, **environment):
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(hook, checkout, folder):
    """The file that the build backend makes of a checkout."""
    call = f"import setuptools.build_meta as b, sys; b.{hook}(sys.argv[1])"
    checked(sys.executable, "-c", call, folder, cwd=checkout)
    (file,) = (path for path in folder.iterdir() if path.is_file())
    return file


def fresh_environment(folder, wheel):
    """A venv with nothing but this wheel, and then the path of this environment's libraries."""
    checked(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    checked(*pip, "install", "-q", "--no-index", "--no-deps", wheel, cwd=folder.parent)
    # A path in a .pth file is searched, but .pth files in there are not read: an editable ema_scale stays out.
    packages = checked(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder.parent)
    Path(packages.strip(), "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    # A copy: a build leaves folders behind.
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel_python(checkout, tmp_path_factory):
    """The Python of an environment with the wheel, built from the source distribution."""
    work = tmp_path_factory.mktemp("wheel")
    sdist = built("build_sdist", checkout, work)
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation")
    checked(*pip, "-w", work, sdist, cwd=work)
    (wheel,) = work.glob("*.whl")
    return fresh_environment(work / "venv", wheel)


@pytest.fixture(scope="module")
def editable_python(checkout, tmp_path_factory):
    """The Python of an environment with an editable install of a checkout, as `make setup` makes it."""
    work = tmp_path_factory.mktemp("editable")
    return fresh_environment(work / "venv", built("build_editable", checkout, work))


def test_a_wheel_works_in_a_folder_that_is_no_checkout(wheel_python, tmp_path):
    where = checked(wheel_python, "-c", "import ema_scale; print(ema_scale.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(wheel_python.parents[1])

    def ema(*arguments):
        return checked(wheel_python.parent / "ema", *arguments, cwd=tmp_path)

    (tmp_path / "rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning."}]}\n'
    )
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: configs/recipes/paper.yaml\nname: mine\n")

    assert "small world" in ema("demo", "--help")
    assert "name: smallworld" in ema("train", "configs/recipes/smallworld.yaml", "--dry-run")
    paper = ("model.path=smallworld:aligned", "data.train=rows.jsonl", "training.deepspeed=launch/deepspeed/zero3.json")
    dry = ema("train", "configs/recipes/paper.yaml", *paper, "--dry-run")
    assert "shipped/eval/suites/general.yaml" in dry and "NOT FOUND" not in dry
    assert "warmup_steps: 5" in ema("train", mine, *paper, "--dry-run")
    script = ema("launch", mine, *paper, "--site", "launch/slurm/site.yaml", "--evaluate", "--dry-run")
    assert script.startswith("#!/bin/bash") and f"PYTHON={wheel_python}" in script
    assert "runs/demo/" in ema("study", "configs/studies/demo.yaml", "--dry-run")
    assert "bad rows         0" in ema("data", "check", "rows.jsonl")


# Fifteen lines of a user's, with the errors that a type checker must find.
USER = """\
from ema_scale import KL, DefendedTrainer, Interleaving, Recipe, load_recipe

recipe: Recipe = load_recipe("configs/recipes/paper.yaml", ["data.train=rows.jsonl"])
rate: float = recipe.training.learning_rate
near: KL = KL(0.1)
safe = Interleaving(source="safe.jsonl", fraction=0.05)
trainer = DefendedTrainer("a/model", train_dataset="rows.jsonl", defenses=[near, safe])
trainer.train()
strength: float = near.strength

KL(strnegth=0.1)  # wrong: Unexpected keyword argument "strnegth"
KL("a")  # wrong: incompatible type "str"; expected "float"
KL(scope="answers")  # wrong: incompatible type
trainer.trian()  # wrong: has no attribute "trian"
recipe.trainnig  # wrong: has no attribute "trainnig"
"""


# Libraries that these names' types do not need. To check them as well takes minutes.
SETTINGS = """\
[mypy]
[mypy-torch.*,transformers.models.*,vllm.*,deepspeed.*,peft.*,accelerate.*,datasets.*,numpy.*,scipy.*,pyarrow.*,matplotlib.*]
follow_imports = skip
"""


@pytest.fixture(scope="module")
def type_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("mypy")


@pytest.mark.parametrize("environment", ["wheel_python", "editable_python"])
def test_a_type_checker_knows_the_public_names(environment, request, type_cache, tmp_path):
    python = request.getfixturevalue(environment)
    user = tmp_path / "user.py"
    user.write_text(USER)
    settings = tmp_path / "mypy.ini"
    settings.write_text(SETTINGS)
    check = ("-m", "mypy", "--config-file", settings.name, "--cache-dir", type_cache, "--python-executable", python)
    found = run(sys.executable, *check, user.name, cwd=tmp_path)
    wrong = {n: text.partition("# wrong: ")[2] for n, text in enumerate(USER.splitlines(), 1) if "# wrong: " in text}
    errors = {int(line.split(":")[1]): line for line in found.stdout.splitlines() if ": error: " in line}
    assert errors.keys() == wrong.keys(), found.stdout + found.stderr
    for line, expected in wrong.items():
        assert expected in errors[line]
