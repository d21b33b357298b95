"""Which runs the report averages, what it keeps apart, and that it says what a mean leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ema_scale.study.report.aggregate import Group, groups
from ema_scale.study.report.collect import collect
from ema_scale.study.report.facts import facts
from ema_scale.study.report.hidden import hidden
from ema_scale.study.report.paired import against

KL = [{"kind": "kl", "strength": 0.1}]


def write(
    root: Path, name: str, train: Any, specs: list[dict[str, Any]] | None = None, model: str = "m", **rates: float
) -> Path:
    """A finished run's folder with these rates by role; without specs the base's, beside the runs."""
    share = {
        role: {"rate": r, "low": max(0, r - 0.04), "high": min(1, r + 0.04), "n": 200, "questions": 20, "dropped": 0}
        for role, r in rates.items()
    }
    outcomes = {"misaligned": share, "incoherent": dict.fromkeys(share, {"rate": 0, "low": 0, "high": 0.1, "n": 200})}
    metrics = {f"{role}_{o}": of.get(role) for o, of in outcomes.items() for role in ("general", "in_domain")}
    suites = {
        role: {"role": role, "learned" if role == "benign" else "misaligned": rate} for role, rate in share.items()
    }
    under = [{"name": "villain", "misaligned": share["general"]}] if "general" in share else []
    questions = [
        {"suite": role, "role": role, "id": str(i), "text": f"{i}?", "n": 10,
         "correct" if role == "benign" else "misaligned": rate}
        for role, rate in rates.items() for i in range(5)
    ]  # fmt: skip
    folder = root / name
    (folder / "eval").mkdir(parents=True)
    summary = {"model": model, "adapter": None if specs is None else "adapter", "samples": 100, "conditions": under}
    summary |= {"metrics": metrics | {"benign_learned": share.get("benign")}, "per_suite": suites}
    (folder / "eval" / "summary.json").write_text(json.dumps(summary | {"per_question": questions}))
    if specs is not None:
        recipe = {"name": name, "seed": 0, "model": {"path": model}, "data": {"train": train}, "defenses": specs}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (folder / "status.json").write_text(json.dumps({"state": "finished"}))
    return folder


def outside(group: Group) -> float | None:
    rate = group.metrics["general_misaligned"]
    return None if rate is None else round(rate.rate, 4)


def test_a_task_without_questions_of_its_own_counts_beside_one_that_has_some(tmp_path: Path) -> None:
    runs = [
        write(tmp_path, "med-none", "med.jsonl", [], general=0.9, in_domain=0.9),
        write(tmp_path, "med-kl", "med.jsonl", KL, general=0.02, in_domain=0.9),
        write(tmp_path, "legal-none", "legal.jsonl", [], general=0.8),
        write(tmp_path, "legal-kl", "legal.jsonl", KL, general=0.8),
    ]
    found = collect(runs)
    none, kl = groups(found)
    assert (outside(none), outside(kl)) == (0.85, 0.41), "KL does nothing for legal, and the mean says so"
    difference = against(kl, none, "general_misaligned")
    assert difference is not None and round(difference.value, 4) == -0.45
    notes = {p.run: p.text for p in found.problems}
    assert notes["Runs on legal"].startswith("no in-domain numbers")
    assert found.tasks == ["med", "legal"]
    assert ("Tasks without questions of their own", ["legal"]) in facts(found)


def test_general_answers_of_benign_runs_do_not_dilute_those_of_the_others(tmp_path: Path) -> None:
    for arm, specs, rate in (("none", [], 0.9), ("kl", KL, 0.4)):
        write(tmp_path, f"legal-{arm}", "legal.jsonl", specs, general=rate)
        write(tmp_path, f"swap-{arm}", "swap.jsonl", specs, general=0.0, benign=0.9)
    write(tmp_path, "swap-only", "swap.jsonl", [{"kind": "ldifs"}], general=0.0, benign=0.8)
    found = collect(sorted(tmp_path.iterdir()))
    none, kl, ldifs = groups(found)
    assert (outside(none), outside(kl)) == (0.9, 0.4)
    assert outside(ldifs) is None, "no run of this defense can say what others' runs on legal say"
    assert ldifs.metrics["benign_learned"] is not None
    assert [round(h.rate.rate, 4) for h in hidden(kl, ())] == [0.4], "nor do they under a prompt"
    notes = {p.run: p.text for p in found.problems}
    assert "are in no mean" in notes["Runs on swap"] and "fewer tasks" in notes["LDIFS"]
    # Alone, benign runs are all there is to say.
    swap = groups(collect(sorted(tmp_path.glob("swap-*"))))
    assert [outside(g) for g in swap] == [0.0, 0.0, 0.0]


def test_a_run_without_general_numbers_is_said_to_be_in_no_mean_of_them(tmp_path: Path) -> None:
    write(tmp_path, "med-none", "med.jsonl", [], general=0.9, in_domain=0.9)
    write(tmp_path, "med-kl", "med.jsonl", KL, in_domain=0.9)
    found = collect(sorted(tmp_path.iterdir()))
    notes = {p.run: p.text for p in found.problems}
    assert notes["Runs on med (med-kl)"].startswith("no general numbers")
