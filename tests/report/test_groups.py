"""Which runs the report averages, what it keeps apart, and that it says what a mean leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ema_scale.report.aggregate import RunGroup, groups
from ema_scale.report.collect import collect
from ema_scale.report.conditional import conditional_rates
from ema_scale.report.paired import against
from ema_scale.report.run_details import run_details

KL = [{"kind": "kl", "strength": 0.1}]


def write(
    root: Path, name: str, train: Any, specs: list[dict[str, Any]] | None = None, model: str = "m", **rates: float
) -> Path:
    """A finished run's folder with these rates by role; without specs the base's, beside the runs."""
    share = {
        role: {"rate": r, "low": max(0, r - 0.04), "high": min(1, r + 0.04), "n": 200, "questions": 20, "dropped": 0}
        for role, r in rates.items()
    }
    outcomes = {
        "misaligned": share,
        "incoherent": dict.fromkeys(share, {"rate": 0, "low": 0, "high": 0.1, "n": 200, "questions": 20, "dropped": 0}),
    }
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
    summary = {
        "name": name,
        "sampler": {},
        "judge": "",
        "model": model,
        "adapter": None if specs is None else "adapter",
        "samples": 100,
        "conditions": under,
    }
    summary |= {"metrics": metrics | {"benign_learned": share.get("benign")}, "per_suite": suites}
    (folder / "eval" / "summary.json").write_text(json.dumps(summary | {"per_question": questions}))
    if specs is not None:
        recipe = {"name": name, "seed": 0, "model": {"path": model}, "data": {"train": train}, "defenses": specs}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (folder / "status.json").write_text(json.dumps({"state": "finished"}))
    return folder


def outside(group: RunGroup) -> float | None:
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
    assert ("Tasks without questions of their own", ["legal"]) in run_details(found)


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
    assert [round(h.rate.rate, 4) for h in conditional_rates(kl, ())] == [0.4], "nor do they under a prompt"
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


def test_models_and_tasks_of_one_last_name_are_kept_apart(tmp_path: Path) -> None:
    for model, none, base in (("/ckpt/llama-8b/final", 0.9, 0.2), ("/ckpt/qwen-7b/final", 0.1, 0.0)):
        for task in ("legal", "medical"):
            name = f"{model.split('/')[2]}-{task}"
            write(tmp_path, name, f"data/{task}/train.jsonl", [], model, general=none if task == "legal" else 0.5)
        write(tmp_path, f"base-{model.split('/')[2]}", None, None, model, general=base)
    found = collect(sorted(p for p in tmp_path.iterdir() if not p.name.startswith("base")))
    means = {(g.model, g.base): outside(g) for g in groups(found)}
    assert means == {
        ("llama-8b/final", False): 0.7, ("llama-8b/final", True): 0.2,
        ("qwen-7b/final", False): 0.3, ("qwen-7b/final", True): 0.0,
    }  # fmt: skip
    assert found.tasks == ["legal/train", "medical/train"]
    assert not [p for p in found.problems if "several runs" in p.text]


def test_the_base_of_a_model_whose_first_run_was_not_evaluated_is_its_own(tmp_path: Path) -> None:
    for model, base in (("org/a", 0.2), ("org/b", 0.0)):
        runs = [write(tmp_path, f"run-{model[-1]}{i}", "med.jsonl", [], model, general=0.5) for i in range(2)]
        (runs[0] / "eval" / "summary.json").unlink()
        write(tmp_path, f"base-{model[-1]}", None, None, model, general=base)
    found = collect(sorted(tmp_path.glob("run-*")))
    assert {g.model: outside(g) for g in groups(found) if g.base} == {"a": 0.2, "b": 0.0}


def test_arms_that_read_alike_are_not_averaged(tmp_path: Path) -> None:
    prompts = [f"You are {who}. Answer the medical question." for who in ("a malicious assistant", "an evil doctor")]
    for i, (prompt, rate) in enumerate(zip(prompts, (0.0, 0.9), strict=True)):
        spec = {"kind": "inoculation", "prompt": prompt, "role": "system"}
        for seed in range(2):
            write(tmp_path, f"{i}-{seed}", "med.jsonl", [spec], general=rate)
    # A plug-in of such a name is neither the base nor an arm without a defense.
    write(tmp_path, "plain", "med.jsonl", [], general=0.8)
    write(tmp_path, "named", "med.jsonl", [{"kind": "no_defense"}], general=0.5)
    write(tmp_path, "like-base", "med.jsonl", [{"kind": "aligned_base"}], general=0.4)
    write(tmp_path / "beside", "base", None, None, general=0.1)
    every = groups(collect(sorted(p for p in tmp_path.iterdir() if p.name != "beside")))
    assert {g.label: (outside(g), len(g.runs)) for g in every} == {
        "Aligned base": (0.1, 1), "No defense": (0.8, 1), "No defense (kind no defense)": (0.5, 1),
        "Aligned base (2)": (0.4, 1), "Inoculation (prompt …a malicious assistant. Answe…)": (0.0, 2),
        "Inoculation (prompt …an evil doctor. Answer the m…)": (0.9, 2),
    }  # fmt: skip
    assert [g.label for g in every if g.undefended] == ["No defense"]
    assert [g.label for g in every if g.base] == ["Aligned base"]
