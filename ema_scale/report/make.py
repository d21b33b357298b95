"""Runs side by side in one self-contained HTML file, with its figures and table as files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write_report(run_dirs: list[Path], out: Path, title: str = "Emergent misalignment report") -> Path:
    """Read run folders and write `out`/report.html, and beside it figures/*.png and *.svg, table.csv, table.md and
    differences.csv.

    Returns the page's path. Runs that failed or were not evaluated are listed in the page; broken files
    become notes. The same run folders give the same bytes. Raises UserError if `run_dirs` holds no run.
    """
    # matplotlib and scipy take a second to import; `ema --help` does not wait for them.
    from ema_scale.report.write import write

    return write([Path(p) for p in run_dirs], Path(out), title)


def write_partial_report(run_dirs: Sequence[Path], out: Path, title: str) -> Path:
    """Write only `out`/report.html, of what is there of a study that is not done: tables and two figures. It says so.

    Returns the page's path. Raises UserError as `write_report` does.
    """
    from ema_scale.report.write import write_partial

    return write_partial(run_dirs, out, title)
