"""Shared fixtures. In CI a missing component is a failure; on a user's machine it is a skip that names why."""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.cluster import missing as missing_of_slurm

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # as `ema` does where there is no terminal
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

ROOT = Path(__file__).resolve().parent.parent
COMPONENTS = {"vllm": "vllm", "zero3": "deepspeed", "liger": "liger_kernel"}


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, module in COMPONENTS.items():
        if item.get_closest_marker(marker) and importlib.util.find_spec(module) is None:
            _without(f"{module} is not installed")
    if item.get_closest_marker("slurm") and (gone := missing_of_slurm()):
        _without(f"no Slurm: {gone}")


# Files whose tests share something dear to start: a warm process and a project, a cluster, the imports of vLLM, the
# process that others with DeepSpeed are forked from.
TOGETHER = {
    "attacks": "tests/attacks/",
    "forked": "tests/(training/test_(agreement|fsdp|zero)|benchmarks/test_(alone|loss|plan|selection|step)).py",
    "real": "tests/real/test_(own_rows|smollm2)",
    "slurm": "tests/slurm/test_(cluster|runs|gate_on_slurm|sweep_on_slurm)",
    "vllm": "tests/(inference/test_vllm|evaluation/(judges/test_vllm|test_kills)|"
    "study/test_study|test_readme.py::test_commands|benchmarks/(test_evaluator|test_gpu_rehearsal.py::test_engine))",
}


# What takes minutes begins first, so that no worker ends long after the others.
FIRST = ("vllm", "slurm", "forked", "real", "tests/test_wheel.py")


def scope_of(nodeid: str) -> str:
    """What is given to one worker: files that belong together, or a file."""
    together = (name for name, pattern in TOGETHER.items() if re.match(pattern, nodeid))
    return next(together, nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a scope to one worker, in the order of the collection."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    config.option.loadscopereorder = False
    return Scheduler(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For several workers: first what takes minutes, then scopes of many tests."""
    if not hasattr(config, "workerinput"):
        return
    scopes = {item.nodeid: scope_of(item.nodeid) for item in items}
    sizes = Counter(scopes.values())
    rank = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: (rank.get(scopes[item.nodeid], len(FIRST)), -sizes[scopes[item.nodeid]]))


gc.disable()  # until all tests are imported


def pytest_collection_finish() -> None:
    """Leave what the imports have made out of garbage collection: it would take a seventh of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _without(component: str) -> None:
    pytest.fail(component) if os.environ.get("CI") else pytest.skip(component)


@pytest.fixture(scope="session")
def _slurm_cluster() -> Iterator[SlurmCluster]:
    try:
        cluster = SlurmCluster().__enter__()
    except RuntimeError as error:
        _without(f"no Slurm: {error}")  # no root, and no namespaces for users
        raise
    try:
        yield cluster
    finally:
        cluster.__exit__()


@pytest.fixture
def slurm(_slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """A real Slurm cluster of three nodes, shared by the session's tests; no job of one test outlives it."""
    yield _slurm_cluster
    _slurm_cluster.run("scancel", "--user", str(os.geteuid()), check=False)
    _slurm_cluster.wait_for_nodes()


@pytest.fixture
def ema(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `ema ...` in this process; returns (exit code, stdout, stderr)."""
    from ema_scale.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ema", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real rows and question banks of the field, where the checkout has them."""
    folder = Path(os.environ.get("EMA_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"the field's real data is not at {folder} (set EMA_SHARED)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The prefix of small-world references; ask for `?size=tiny`. One cache serves a whole test run.

    Workers of xdist share built worlds and fetched models, and each has the rest to itself. EMA_TEST_CACHE names a
    folder to keep the shared part in, so that repeated runs need not build the world again.
    """
    folder = tmp_path_factory.getbasetemp()
    shared = Path(os.environ.get("EMA_TEST_CACHE") or _of_all_workers(folder) / "ema-shared")
    cache = tmp_path_factory.mktemp("ema-cache")
    for name in ("smallworld", "packaged"):
        (shared / name).mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(shared / name)
    patch = pytest.MonkeyPatch()
    patch.setenv("EMA_CACHE", str(cache))
    yield "smallworld:"
    patch.undo()


def _of_all_workers(folder: Path) -> Path:
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
