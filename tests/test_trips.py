"""The trips that ARCHITECTURE.md and docs/life_of_a_step.md describe are those of the code, and go one way."""

import ast
import re
import sys
from pathlib import Path

import pytest

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
    """The numbered steps of a trip, as text."""
    page, begin, end = TRIPS[trip]
    text = (ROOT / page).read_text().partition(begin)[2].partition(end)[0]
    return re.split(r"^(?:\d+\.|\| \d+ \|) ", text, flags=re.M)[1:]


def named(step: str) -> list[str]:
    """The dotted names below ema_scale of the code that a step names. Fails for a name that is not there."""
    found = []
    for name in filter(is_code, re.findall(r"`([A-Za-z_][\w.]*)`", step)):
        places = [full for full in DEFINED if f".{full}".endswith(f".{name}")]
        assert places, f"{name} is nowhere in ema_scale: {step}"
        found += places
    return found


def is_code(name: str) -> bool:
    """Neither a file, nor a key of a batch or of a recipe, nor a word of another library."""
    return not re.fullmatch(
        r"forward|backward|input_ids|labels|attention_mask|tags|position_ids|metrics\.jsonl|evaluation\.checkpoints|"
        r"transformers\.\w+|Trainer\.\w+",
        name,
    )


@pytest.mark.parametrize("trip", TRIPS)
def test_every_name_on_a_trip_is_in_the_code(trip):
    found = [named(step) for step in steps(trip)]
    assert len(found) >= 10 and sum(map(bool, found)) >= len(found) - 2


def test_every_file_on_a_trip_defines_what_is_named_beside_it():
    for step in steps("steps"):
        where = step.rsplit("|", 2)[1]
        last = tuple(f".{name.rpartition('.')[2]}" for name in re.findall(r"`([\w.]+)`", where))
        for path in (PACKAGE / f for file in re.findall(r"\b\w+/[\w{},]+\.py", where) for f in expanded(file)):
            module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            assert [full for full in DEFINED if full.startswith(f"{module}.") and full.endswith(last)], (path, last)


def expanded(file: str) -> list[str]:
    """reference/{a,b}.py -> the files."""
    inner = re.search(r"\{(.*)\}", file)
    return [file.replace(inner[0], name) for name in inner[1].split(",")] if inner else [file]


def traced(run):
    """(event, file below ema_scale, qualified name) of every call and return of the package's functions, in order."""
    events = []

    def profile(frame, event, _):
        code = frame.f_code
        if event in ("call", "return") and code.co_filename.startswith(str(PACKAGE)):
            events.append((event, Path(code.co_filename).relative_to(PACKAGE), code.co_qualname))

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return events


def test_the_steps_happen_in_their_order(tmp_path):
    trainer = make_trainer(tmp_path, defenses=[KL(0.5), LDIFS(0.1, count=2)], max_steps=1, save_strategy="steps")
    events = traced(trainer.train)
    begun = {}
    for number, step in enumerate(steps("steps"), start=1):
        at = [i for i, event in enumerate(events) if event[0] == "call" and is_of(event, named(step))]
        if at:
            begun[number] = at[0]
    # The first three fetch rows, and the loader may be one batch ahead.
    rest = [at for number, at in begun.items() if number > 3]
    assert len(begun) >= 16 and max(begun[number] for number in (1, 2, 3)) < rest[0] and rest == sorted(rest), begun


def is_of(event, names):
    """Whether this is a call of one of a trip's names: a function, or a method of a class or of one of its kind."""
    _, file, qualified = event
    for name in names:
        kind, method = ["", *name.split(".")][-2:]
        anywhere = kind in ("Reference", "Defense") and file.parts[0] == name.partition(".")[0]
        if qualified.endswith(f".{method}") if anywhere else qualified in (method, f"{kind}.{method}"):
            return True
        if isinstance(DEFINED[name], ast.ClassDef) and qualified in (f"{method}.__iter__", f"{method}.__call__"):
            return True
    return False
