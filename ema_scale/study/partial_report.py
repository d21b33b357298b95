"""A report of a study that is not done: drawn when the first run is evaluated, and again where that costs little."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)
SHARE = 0.02  # of the study's time, for all drawing but the first after an evaluation
EXPECTED = 5.0  # seconds that the first drawing takes


class PartialReport:
    """Draws what there is of a study into its report's page, which the final report replaces.

    Args:
        runs: the folders of all runs.
        out: the report's folder.
    """

    def __init__(self, runs: Sequence[Path], out: Path, title: str) -> None:
        self._runs, self._out, self._title = runs, out, title
        self._began = time.monotonic()
        self._spent, self._last = 0.0, EXPECTED
        self._evaluated = False  # whether a page shows answers

    def trained(self) -> None:
        """A run has ended. Its training curves are drawn, if that costs little."""
        if self._last <= self._affordable():
            self._draw()

    def wants(self) -> bool:
        """Whether it would draw what is evaluated now."""
        return not self._evaluated or self._last <= self._affordable()

    def look(self) -> None:
        """Draw it."""
        self._draw()
        self._evaluated = True

    def _affordable(self) -> float:
        """Seconds that drawing may take now."""
        return SHARE * (time.monotonic() - self._began) - self._spent

    def _draw(self) -> None:
        from ema_scale.report.make import write_partial_report

        began = time.monotonic()
        try:
            page = write_partial_report(self._runs, self._out, self._title)
            if not self._spent:
                log.info("what there is so far is in %s; it is drawn again as runs end", page)
        except Exception as error:  # a fault of the page is no reason to stop the study
            log.warning("%s: a partial report could not be drawn (%s)", self._out, error)
        self._last = time.monotonic() - began
        self._spent += self._last
