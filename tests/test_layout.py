"""Files stay short. Which package may import which is checked by import-linter (`make lint`, pyproject.toml)."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "ema_scale"


def test_files_stay_small():
    large = {
        str(p.relative_to(PACKAGE)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400
    }
    assert not large, large
