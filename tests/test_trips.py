"""The trips that ARCHITECTURE.md and docs/life_of_a_step.md describe are those of the code, and go one way."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

from ema_scale.data.rows import load_rows
from ema_scale.defenses import KL, LDIFS
from tests.training.helpers import make_trainer

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ema_scale"
TRIPS = {
    "rows": ("ARCHITECTURE.md", "## A row's trip to the loss", "## An answer's trip"),
    "answers": ("ARCHITECTURE.md", "## An answer's trip to the report", "## Decisions"),
    "steps": ("docs/life_of_a_step.md", "| # |", "## Why"),
}
Node = ast.FunctionDef | ast.ClassDef


def definitions() -> dict[str, Node | ast.Module]:
    """Dotted name below ema_scale -> what is defined there: modules, classes, functions and methods."""
    found: dict[str, Node | ast.Module] = {}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        waiting: list[tuple[str, Node | ast.Module]] = [(module, ast.parse(path.read_text()))]
        while waiting:
            name, node = waiting.pop()
            found[name] = node
            waiting += [(f"{name}.{c.name}", c) for c in node.body if isinstance(c, ast.FunctionDef | ast.ClassDef)]
    return found


DEFINED = definitions()


def steps(trip: str) -> list[str]:
    """The numbered steps of a trip, as text; of a table, the last column."""
    page, begin, end = TRIPS[trip]
    text = (ROOT / page).read_text().partition(begin)[2].partition(end)[0]
    return re.findall(r"^\| \d+ \|.*\| ([^|]+) \|$", text, re.M) or re.split(r"^\d+\. ", text, flags=re.M)[1:]


def named(step: str) -> list[str]:
    """The dotted names below ema_scale of the code that a step names. Fails for a name that is not there."""
    found = []
    for name in re.findall(r"`([A-Za-z_][\w.]*)`", step):
        if name == "forward":  # the model's own
            continue
        places = [full for full in DEFINED if f".{full}".endswith(f".{name}")]
        assert places, f"{name} is nowhere in ema_scale: {step}"
        found += places
    return found


@pytest.mark.parametrize("trip", TRIPS)
def test_every_name_on_a_trip_is_in_the_code(trip):
    found = [named(step) for step in steps(trip)]
    assert len(found) >= 10 and sum(map(bool, found)) >= len(found) - 2


def test_every_file_on_a_trip_defines_what_is_named_beside_it():
    for step in steps("steps"):
        last = tuple(f".{name.rpartition('.')[2]}" for name in re.findall(r"`([\w.]+)`", step))
        for path in (PACKAGE / f for file in re.findall(r"\b\w+/[\w{},]+\.py", step) for f in expanded(file)):
            module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            assert [full for full in DEFINED if full.startswith(f"{module}.") and full.endswith(last)], (path, last)


def expanded(file: str) -> list[str]:
    """reference/{a,b}.py -> the files."""
    inner = re.search(r"\{(.*)\}", file)
    return [file.replace(inner[0], name) for name in inner[1].split(",")] if inner else [file]


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """(file below ema_scale, qualified name) of every call of the package in one packed training step, in order."""
    folder, found = tmp_path_factory.mktemp("step"), []
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
    (folder / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8)

    def profile(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            found.append((Path(code.co_filename).relative_to(PACKAGE), code.co_qualname))

    make_trainer(folder)  # imports much, which nobody needs to see
    sys.setprofile(profile)
    try:
        make_trainer(
            folder, dataset=load_rows(str(folder / "rows.jsonl")), defenses=[KL(0.5), LDIFS(0.1, count=2)], max_steps=1,
            packing=True, max_length=64, save_strategy="steps",
        ).train()  # fmt: skip
    finally:
        sys.setprofile(None)
    return found


def test_rows_go_one_way(calls):
    begun = first_calls("rows", calls)
    assert list(begun) == list(range(1, 12)) and list(begun.values()) == sorted(begun.values()), begun


def test_a_step_happens_in_its_order(calls):
    begun = first_calls("steps", calls)
    # The first three fetch rows, and the loader may be one batch ahead.
    rest = [at for number, at in begun.items() if number > 3]
    assert len(begun) >= 16 and max(begun[number] for number in (1, 2, 3)) < rest[0] and rest == sorted(rest), begun


def first_calls(trip, calls):
    """Number of a step -> where in `calls` what it names begins; without those that never do."""
    found = {}
    for number, step in enumerate(steps(trip), start=1):
        names = named(step)
        at = next((i for i, call in enumerate(calls) if is_of(call, names)), None)
        if at is not None:
            found[number] = at
    return found


def is_of(call, names):
    """Whether this is a call of one of a trip's names: a function, or a method of a class or of one of its kind."""
    file, qualified = call
    for name in names:
        kind, method = ["", *name.split(".")][-2:]
        anywhere = kind in ("Reference", "Defense") and file.parts[0] == name.partition(".")[0]
        if qualified.endswith(f".{method}") if anywhere else qualified in (method, f"{kind}.{method}"):
            return True
        if isinstance(DEFINED[name], ast.ClassDef) and qualified in (f"{method}.__iter__", f"{method}.__call__"):
            return True
    return False
