"""Files stay short. Which package may import which is checked by import-linter (`make lint`, pyproject.toml)."""

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "ema_scale"


def test_files_stay_small():
    large = {
        str(p.relative_to(PACKAGE)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400
    }
    assert not large, large


def test_no_benchmark_hides_a_module_of_the_standard_library():
    """`python benchmarks/gpu.py` puts the folder in front of everything else."""
    names = {path.stem for path in (PACKAGE.parent / "benchmarks").glob("*.py")}
    assert "gpu" in names and not names & set(sys.stdlib_module_names)
