"""Runs side by side in one self-contained HTML file, with its figures and table as files beside it."""

from __future__ import annotations

from pathlib import Path


def write_report(run_dirs: list[Path], out: Path, title: str = "Emergent misalignment report") -> Path:
    """Read run folders and write `out`/report.html, `out`/figures/*.png and *.svg, and `out`/table.csv.

    Returns the page's path. Runs that failed or were not evaluated are listed in the page; broken files
    become notes. The same run folders give the same bytes. Raises UserError if `run_dirs` holds no run.
    """
    # matplotlib and scipy take a second to import; `ema --help` does not wait for them.
    from ema_scale.report.write import write

    return write([Path(p) for p in run_dirs], Path(out), title)
