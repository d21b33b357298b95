"""A process of its own: what it returns, how it fails, and that it cannot take the machine's memory."""

import pytest

from benchmarks.alone import alone, free_memory
from ema_scale.core.errors import UserError

HERE = "tests.benchmarks.test_alone"


def take(elements):
    import torch

    return {"taken": torch.empty(elements, dtype=torch.uint8).nbytes}


def broken():
    raise ValueError("this broke")


@pytest.mark.slow
def test_it_returns_fails_and_runs_out_of_memory():
    assert alone(f"{HERE}:take", elements=1000) == {"taken": 1000}
    with pytest.raises(UserError, match="this broke"):
        alone(f"{HERE}:broken")
    free = free_memory()
    assert free is not None and alone(f"{HERE}:take", elements=4 * free) is None
