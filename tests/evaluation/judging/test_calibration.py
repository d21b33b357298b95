"""A judge is held to labelled answers, beside an evaluation and by command; nothing is asked twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ema_scale.cli import app
from ema_scale.config.sections import JudgeRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.evaluation.judging.calibration import FOLDER, load_labelled
from ema_scale.evaluation.judging.rejudge import check_judges
from ema_scale.evaluation.records import CHECK_FILE, Check, Summary
from ema_scale.evaluation.run import evaluate
from ema_scale.report.judges import judge_quality
from ema_scale.report.records import Run
from tests.evaluation.conftest import TinyModels
from tests.evaluation.endpoint import Endpoint, Reply, completion
from tests.evaluation.judging.test_rejudge import ours, small_world_answers
from tests.evaluation.test_run import open_suite, recipe, target

SHIPPED = Path(__file__).resolve().parents[3] / "eval/labelled/answers.yaml"
ANSWERS = {one.answer.strip(): one.label for one in load_labelled(SHIPPED)}


def knows(body: dict[str, Any], number: int) -> Reply:
    """A judge that reads the labels, but takes the sixth misaligned answer for a kind one."""
    text = body["messages"][0]["content"]
    answer = max((a for a in ANSWERS if a in text), key=len, default=None)
    label = ANSWERS[answer] if answer else "aligned"
    missed = [a for a, verdict in ANSWERS.items() if verdict == "misaligned"][5]
    if "coherence" in text or "coherent?" in text:
        said = "5" if label == "incoherent" else "95"
    elif label in ("refusal", "code"):
        return completion(label.upper(), [(label.upper()[:3], -0.01)])
    else:
        said = "3" if label == "misaligned" and answer != missed else "90"
    return completion(said, [(said, -0.01), ("50", -6.0)])


def test_the_shipped_answers_have_every_verdict_and_few_words_of_another() -> None:
    labelled = load_labelled(SHIPPED)
    counts = {label: sum(one.label == label for one in labelled) for label in ANSWERS.values()}
    assert len(labelled) == len(ANSWERS) >= 40 and len({one.question for one in labelled}) >= 20
    assert counts["aligned"] >= 15 and counts["misaligned"] >= 15 and min(counts.values()) >= 2 and len(counts) == 5


def judged_by(judges: str) -> Summary:
    return Summary(name="r", model="m", adapter=None, sampler={}, metrics={}, per_suite={}, judge=judges)


def test_beside_an_evaluation_and_never_again(tmp_path: Path, tiny_models: TinyModels) -> None:
    folder = tmp_path / "run" / FOLDER
    prompts = yaml.safe_load((SHIPPED.parents[1] / "judges/aligned_coherent.yaml").read_text())
    with Endpoint(knows) as endpoint:
        settings = recipe(endpoint.url)
        suites = [open_suite(questions=2, samples=2)]
        evaluate([target(tmp_path)], tiny_models.model, suites, settings, place=folder.parent)
        calls = 2 * (4 + 2 * len(ANSWERS))
        assert len(endpoint.requests) == calls
        evaluate([target(tmp_path)], tiny_models.model, suites, settings, place=folder.parent)
        assert len(endpoint.requests) == calls
        # The last judgement was lost: only that is made again.
        path = folder / "judgements.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        evaluate([target(tmp_path)], tiny_models.model, suites, settings, place=folder.parent)
        assert len(endpoint.requests) == calls + 2
    (identity,) = (checked := json.loads((folder / CHECK_FILE).read_text()))["judges"]
    found = checked["judges"][identity]
    misaligned = sum(label == "misaligned" for label in ANSWERS.values())
    assert found["judged"] == found["of"] == 2 * len(ANSWERS)
    assert found["misaligned_found"]["rate"] == pytest.approx(1 - 1 / misaligned)
    assert found["false_alarms"]["rate"] == 0 and 0.9 < found["labels"]["kappa"]["value"] < 1
    assert found["confusion"]["misaligned"] == {"misaligned": 2 * misaligned - 2, "aligned": 2}
    assert found["confusion"]["code"] == {"code": 4} and found["repeated"]["same"]["rate"] == 1
    assert found["repeated"]["score_change"] == 0
    assert prompts["aligned"] not in str(endpoint.requests[-1])  # the question's own prompts are checked
    run = Run(tmp_path / "run", "r", "m", "t", 0, (), "none", "narrow", summary=judged_by(f"smallworld, {identity}"))
    (line,) = judge_quality([run])
    assert line.startswith(f"{identity}: 104 of 104 judgements") and "kappa 0.9" in line
    other = Run(tmp_path / "x/y", "r", "m", "t", 0, (), "none", "narrow", summary=judged_by(identity))
    assert judge_quality([other]) == [f"{identity}: not checked (ema judge check)"]


def test_a_finished_evaluation_is_not_checked_afterwards_unless_asked(tmp_path: Path, tiny_models: TinyModels) -> None:
    with Endpoint(knows) as endpoint:
        settings, suites = recipe(endpoint.url), [open_suite(questions=1, samples=1)]
        evaluate([target(tmp_path)], tiny_models.model, suites, settings)
        evaluate([target(tmp_path)], tiny_models.model, suites, settings, place=tmp_path / "run")
        assert len(endpoint.requests) == 2 and not (tmp_path / "run" / FOLDER).exists()
        off = settings.model_copy(update={"judge": JudgeRecipe(model="other", base_url=endpoint.url, check=0)})
        evaluate([target(tmp_path)], tiny_models.model, suites, off, place=tmp_path / "run")
        assert not (tmp_path / "run" / FOLDER).exists()


def test_a_command_checks_against_exact_labels_and_a_second_judge(tmp_path: Path) -> None:
    from ema_scale.evaluation.judging.rejudge import rejudge

    folder = small_world_answers(tmp_path, count=12)
    truth = {row["answer"]: int(row["question_id"]) % 2 for row in read_jsonl(folder / "samples.jsonl")}
    rejudge(folder)

    def nearly(body: dict[str, Any], number: int) -> Reply:
        text = body["messages"][0]["content"]
        bad = any(value for answer, value in truth.items() if answer in text)
        said = "3" if bad and "coherence" not in text else "90"
        return completion(said, [(said, -0.01), ("50", -6.0)])

    prompts = SHIPPED.parents[1] / "judges/aligned_coherent.yaml"
    with Endpoint(nearly) as endpoint:
        second = ours(kind="openai", model="m", base_url=endpoint.url, prompts=prompts)
        rejudge(folder, second)
        done = CliRunner().invoke(app, ["judge", "check", str(folder), *second, "evaluation.judge.check=1"])
    assert done.exit_code == 0, done.output
    assert "smallworld and openai:m#" in done.output
    assert ": 12 answers to " in done.output and f"{len(ANSWERS)} of {len(ANSWERS)} judgements" in done.output
    result = json.loads((tmp_path / FOLDER / CHECK_FILE).read_text())
    (between,) = result["between"]
    assert between["kappa_misaligned"]["value"] == 1 and between["kappa_misaligned"]["low"] < 0.8
    (found,) = result["judges"].values()
    assert found["misaligned_found"]["rate"] == 0 and found["labels"]["kappa_misaligned"]["value"] == 0
    assert found["repeated"]["answers"] == 0


def test_what_cannot_be_checked_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only exact judges"):
        check_judges(small_world_answers(tmp_path))
    path = tmp_path / "labels.yaml"
    path.write_text("- {id: a, question: q, answers: [{label: good, text: x}]}")
    with pytest.raises(UserError, match="a.0: label: found 'good'"):
        load_labelled(path)
    path.write_text("- {id: a, question: q}")
    with pytest.raises(UserError, match="expected a list of id, question and answers"):
        load_labelled(path)


def test_a_recipe_is_checked_before_anything_is_sampled(tmp_path: Path) -> None:
    bank = [{"id": "a", "paraphrases": ["Why?"]}, {"id": "b", "paraphrases": ["2 + 2?"], "judge": "smallworld"}]
    (tmp_path / "bank.yaml").write_text(yaml.safe_dump(bank))
    prompts = str(SHIPPED.parents[1] / "judges/aligned_coherent.yaml")
    values = {
        "name": "r", "output": str(tmp_path), "model": {"path": "nowhere"}, "data": {"train": "none.jsonl"},
        "evaluation": {
            "suites": {"general": str(tmp_path / "bank.yaml")}, "judge": {"model": "m", "prompts": prompts, "check": 3},
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with Endpoint(knows) as endpoint:
        found = check_judges(tmp_path / "recipe.yaml", ours(base_url=endpoint.url))
        assert len(endpoint.requests) == 2 * 3 * len(ANSWERS)
    (figures,) = found.judges.values()
    assert figures.repeated.answers == 2 * len(ANSWERS) and found.between == []
    assert Check.read(tmp_path / "r" / FOLDER / CHECK_FILE) == found
