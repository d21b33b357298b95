"""`make setup` can be installed where this machine is not: with CUDA builds, and on the other Pythons."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The oldest that is supported (Debian 12 has this one), and the newest.
PYTHONS = ("3.11.2", "3.13")


def resolve(source, *options):
    command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--no-header", *options, source]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_the_cuda_builds_resolve_and_every_version_is_pinned(tmp_path):
    if importlib.util.find_spec("uv") is None:
        pytest.skip("uv is not installed; `make setup` does that")
    alone = tmp_path / "vllm.in"
    alone.write_text("vllm==0.32.0\n")
    if resolve(alone).returncode:
        pytest.skip("the CUDA build of vLLM is not in this machine's package index, or there is none")
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for python in PYTHONS:
        done = resolve("pyproject.toml", "-c", "constraints.txt", "--extra", "cuda", "--extra", "dev", "--no-annotate",
                       "--python-version", python)  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = {line.split("==")[0].lower() for line in done.stdout.splitlines() if "==" in line}
        # vLLM's builds for CPUs and for CUDA want different ones of setuptools.
        assert found > {"torch", "vllm", "triton"} and found - pinned == {"setuptools"}
