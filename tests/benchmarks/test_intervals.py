"""The command behind docs/statistics.md prints its four tables."""

import pytest

from benchmarks.intervals import RATES, main


def test_the_tables_are_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--trials", "2"])
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert [len(table.splitlines()) for table in tables] == [2 + len(RATES), 2 + 2, 2 + 9, 2 + 3]
    shares = [cell for table in tables for cell in table.split("|") if cell.strip().endswith("%")]
    assert shares and all(0 <= float(cell.strip()[:-1]) <= 100 for cell in shares)
