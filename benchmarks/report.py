"""Rows as they are measured, and the JSON and Markdown made of them."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ema_scale.core.io import atomic_write_json, atomic_write_text

Show = Callable[[Any], str]


class Rows:
    """The rows of one section, appended to a file at once, so that what was measured survives what comes after."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, name: str, **values: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, **values}) + "\n")
        told = values.get("error") or ", ".join(f"{k} {_short(v)}" for k, v in values.items() if not _long(v))
        print(f"  {name}: {str(told).splitlines()[-1] if told else ''}", flush=True)

    @contextlib.contextmanager
    def row(self, name: str) -> Iterator[dict[str, Any]]:
        """Collects one row's values; an error becomes the row's, and the next row is measured all the same."""
        found: dict[str, Any] = {}
        began = time.monotonic()
        try:
            yield found
        except Exception as error:  # whatever it is: one row must not end the others
            traceback.print_exc()
            found["error"] = f"{type(error).__name__}: {error}"[-2000:]
        self.add(name, **found, took=round(time.monotonic() - began, 1))

    def read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def write(folder: Path, report: Mapping[str, Any], tables: Mapping[str, tuple[str, Mapping[str, Show]]]) -> None:
    """gpu.json and gpu.md. tables: section -> title, and key -> how it is shown, in the order of columns."""
    atomic_write_json(folder / "gpu.json", dict(report))
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines = [
        f"# {machine.get('gpu') or machine.get('cpu', 'a machine that did not answer')}",
        "",
        f"`{' '.join(report['command'])}`, {report['seconds']:.0f} s, {machine.get('time', '')}. {versions}.",
    ]
    for section in report["sections"]:
        title, columns = tables[section["section"]]
        lines += ["", f"## {title}", ""]
        shown = {k: show for k, show in columns.items() if any(row.get(k) is not None for row in section["rows"])}
        noted = any("error" in row for row in section["rows"])
        heads = ["", *shown, *(["note"] if noted else [])]
        lines += ["| " + " | ".join(heads) + " |", "|---" + "|---:" * len(shown) + "|---" * noted + "|"]
        for row in section["rows"]:
            cells = [show(row[key]) if row.get(key) is not None else "" for key, show in shown.items()]
            lines.append(
                "| " + " | ".join([row["name"], *cells, *([_cell(row.get("error", ""))] if noted else [])]) + " |"
            )
    atomic_write_text(folder / "gpu.md", "\n".join(lines) + "\n")


def _cell(text: str) -> str:
    """The last line of an error, which says what it is."""
    last = (text.strip().splitlines() or [""])[-1]
    return last.replace("|", "\\|")[:300]


def _long(value: Any) -> bool:
    return isinstance(value, dict | list)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def number(form: str) -> Show:
    return lambda value: format(value, form)


def yes(value: Any) -> str:
    return "yes" if value else "**NO**"


def milliseconds(value: float) -> str:
    return f"{1000 * value:.1f}"


def gibibytes(value: float) -> str:
    return f"{value / 2**30:.2f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def signed(value: float) -> str:
    return f"{100 * value:+.1f} %"
