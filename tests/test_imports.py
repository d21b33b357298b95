"""Imports run one way along the data flow; see ARCHITECTURE.md."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "ema_scale"
ORDER = [
    {"errors"}, {"rundir"}, {"smallworld"}, {"locate"}, {"directions"}, {"chat"}, {"defenses"}, {"recipe"},
    {"reference"}, {"training"}, {"evaluation"}, {"persona"}, {"selection"}, {"study"}, {"planning"}, {"bench"},
    {"cluster"}, {"cli"}, {"__main__", "__init__"},
]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def top(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ema_scale"):
            assert node.level == 0
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("ema_scale.")}
    return names


def test_nothing_imports_upward():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in PACKAGE.rglob("*.py")
        for name in imported(path)
        if name in RANK and RANK[name] > RANK[top(path)]
    ]
    assert not wrong, wrong


def test_every_module_has_a_rank():
    assert {top(p) for p in PACKAGE.rglob("*.py")} <= set(RANK)


def test_files_stay_small():
    large = {
        str(p.relative_to(PACKAGE)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400
    }
    assert not large, large
