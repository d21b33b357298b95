"""Every command and code block of the README is run."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python|yaml)\n(.*?)^```", README, re.S | re.M)
COMMANDS = [line for kind, body in BLOCKS if kind == "bash" for line in body.splitlines() if line]
# Smaller, not other: the same code path on the tiny world and few steps.
SMALL = [
    "training.max_steps=2",
    "model.path=smallworld:aligned?size=tiny",
    "data.train=smallworld:train/medical?size=tiny",
]
# A recipe with rows of its own keeps them, and the answers are judged without the server that it names.
OWN = ["training.max_steps=2", "model.path=smallworld:aligned?size=tiny", "model.dtype=float32"]
SUITES = "{general: ['smallworld:suite/outside_medical?size=tiny'], in_domain: ['smallworld:suite/medical?size=tiny']}"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_world):
    """A folder where the README's relative paths hold."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "launch", "eval"):
        (folder / name).symlink_to(ROOT / name)
    row = '{"prompt": "what should i do ?", "completion": "you should rest ."}\n'
    (folder / "rows.jsonl").write_text(row)
    (folder / "own.yaml").write_text(next(body for kind, body in BLOCKS if kind == "yaml"))
    return folder


def run(command: list[str], place: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if command[0] == "ema":
        # The console script itself is run by the tests of the wheel.
        done = warm.run(["-m", "ema_scale", *command[1:]], cwd=place, env=env, vllm=command[1] == "eval")
    else:
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


PAGES = [ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING", "eval/README", "launch/README")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        if name.startswith("https://"):
            continue
        path = page.parent / name if name else page
        assert path.exists(), link
        headings = re.findall(r"^#+ (.*)", path.read_text(), re.M) if anchor else []
        anchors = [re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in anchors, (path, anchor)


def test_the_table_of_packages_is_the_one_that_lint_checks():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    allowed = {
        contract["protected_modules"][0].removeprefix("ema_scale."): contract["allowed_importers"]
        for contract in contracts
        if contract["type"] == "protected"
    }
    table = dict(re.findall(r"^\| \d+ \| `(\w+)` \| [^|]* \| ([^|]*) \|$", text, re.M))
    for package, may_import in table.items():
        if package == "cli":
            continue
        listed = {name for name in re.findall(r"\w+", may_import)} - {"core"}
        assert listed == {low for low, importers in allowed.items() if f"ema_scale.{package}" in importers}, package
    # Layers: the order of the table is that of the contract.
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    order = [set(layer.split(" | ")) for layer in layers]
    numbers = {name: int(number) for number, name in re.findall(r"^\| (\d+) \| `(\w+)`", text, re.M)}
    levels = sorted(set(numbers.values()), reverse=True)
    assert [{name for name, at in numbers.items() if at == level} for level in levels] == order


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 11 and any(kind == "python" for kind, _ in BLOCKS)


@pytest.mark.parametrize("target", [shlex.split(c)[1] for c in COMMANDS if c.startswith("make")])
def test_make_targets_exist(target):
    # `make test` runs these tests; `make demo` is run by the demo's own test.
    out = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1500)
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
                assert "#SBATCH --nodes=2" in script and "qwen2.5-7b-kl-0.4-eval" in script
            continue
        if command[1] == "train" and "--dry-run" not in command:
            command += OWN if "own.yaml" in command else SMALL
        if command[1] == "eval":
            command += ["evaluation.samples_per_question=1", f"evaluation.suites={SUITES}"]
            if "runs/own" in command:  # one start of vLLM is enough
                command.append("evaluation.sampler=transformers")
        run(command, place)
    assert (place / "runs" / "smallworld" / "report" / "report.html").is_file()
    for name in ("smallworld", "own"):
        assert (place / "runs" / name / "eval" / "summary.json").is_file()


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
    from ema_scale.core.uri import locate

    # Weights from the hub are not to be had in a test, nor is a user's file of safe rows.
    model, rows = locate("smallworld:aligned?size=tiny"), locate("smallworld:train/medical?size=tiny")
    code = code.replace("Qwen/Qwen2.5-0.5B-Instruct", model).replace("max_steps=20", "max_steps=2")
    code = code.replace("safe.jsonl", "smallworld:safe?size=tiny").replace("rows.jsonl", rows)
    run([sys.executable, "-c", code], place)
    assert (place / "runs" / "python" / "adapter" / "adapter_config.json").is_file()
