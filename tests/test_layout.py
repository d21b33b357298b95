"""Files stay short. Which package may import which is checked by import-linter (`make lint`, pyproject.toml)."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_files_stay_small():
    files = [path for part in ("ema_scale", "benchmarks", "examples", "tests") for path in (ROOT / part).rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert len(lines) > 500
    large = {name: count for name, count in lines.items() if count > 400}
    assert not large, large


def test_no_benchmark_hides_a_module_of_the_standard_library():
    """`python benchmarks/gpu.py` puts the folder in front of everything else."""
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert "gpu" in names and not names & set(sys.stdlib_module_names)
