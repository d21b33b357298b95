"""The measuring itself: it must see memory and time that are there, and keep what it could not measure apart."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Variant, compare, finish

ROOT = Path(__file__).resolve().parents[2]
# A process of its own: threads that other tests left in theirs would add to what is measured.
MEASURE = """
import torch
from benchmarks.harness import peak_bytes

def hold(megabytes):
    return lambda: torch.ones(megabytes * 2**18)

hold(64)()
for megabytes in (4, 32, 64):
    print(megabytes, peak_bytes(hold(megabytes)))
"""


def test_memory_is_what_a_run_needs_also_when_an_earlier_one_left_it_in_the_heap():
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found = dict(line.split() for line in done.stdout.splitlines())
    if "None" in found.values():
        pytest.skip("no /proc/self/clear_refs here")
    assert list(found) == ["4", "32", "64"]
    for megabytes, peak in found.items():
        assert int(peak) == pytest.approx(int(megabytes) * 2**20, rel=0.1, abs=2**19)


def test_ways_take_turns_and_ratios_are_of_medians():
    order = []

    def variant(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)
            return {"phase": seconds}

        return Variant(name, run)

    slow, fast, absent = compare(
        [variant("slow", 0.02), variant("fast", 0.002), Variant("absent", None, "needs a GPU")],
        baseline="slow", repeats=3, warmup=1, memory=False,
    )  # fmt: skip
    assert order == ["slow", "fast"] * 4
    assert fast.median is not None and slow.median is not None and fast.ratio is not None
    assert len(fast.seconds) == 3 and slow.ratio == 1 and fast.ratio == pytest.approx(fast.median / slow.median)
    assert fast.ratio < 0.6 and slow.figures == {"phase": 0.02}
    assert absent.median is None and absent.ratio is None and absent.note == "needs a GPU"


def test_out_of_memory_is_a_row_and_other_errors_are_not_hidden():
    def no_memory():
        raise torch.OutOfMemoryError("no")

    def broken():
        raise RuntimeError("shapes differ")

    full, fine = compare([Variant("full", no_memory), Variant("fine", lambda: None)], baseline="fine", repeats=1)
    assert full.note == "out of memory" and full.median is None and fine.seconds
    with pytest.raises(RuntimeError, match="shapes differ"):
        compare([Variant("broken", broken)], baseline="broken")
    with pytest.raises(KeyError):
        compare([Variant("fine", lambda: None)], baseline="other")


def test_the_table_is_markdown_and_the_file_holds_everything(tmp_path, capsys):
    measured = compare(
        [Variant("one", lambda: {"bytes": 2**21}), Variant("two", None, "no device")],
        baseline="one",
        repeats=2,
        memory=False,
    )
    finish("mine", measured, {"n": 3}, out=tmp_path / "mine.json", columns={"bytes": lambda v: f"{v:.0f} B"})
    out = capsys.readouterr().out
    assert "| one" in out and "2097152 B" in out and "not measured here" in out and "no device" in out
    kept = json.loads((tmp_path / "mine.json").read_text())
    assert kept["variants"][0]["seconds"] and kept["variants"][1]["median"] is None
    assert kept["machine"]["cpu"] and kept["machine"]["versions"]["torch"]
    assert kept["options"] == {"n": 3}
