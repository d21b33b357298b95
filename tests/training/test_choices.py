"""Choice suites while training: read as the saved model would be, logged, resumed, and watched by early stopping."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from ema_scale.choices.bank import load_choices
from ema_scale.choices.margins import Likelihood, margins
from ema_scale.choices.tokens import encode_answers
from ema_scale.config.suites import DuringRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.data.tokens import Encoder
from ema_scale.defenses import EarlyStopping, Steering
from ema_scale.models.directions import Directions
from ema_scale.training.run import train
from tests.training.test_run import recipe_of, world

__all__ = ["world"]
SUITE = "choices/asked/margin_per_token"


def during(recipe, world, every=2):
    """The recipe with a suite whose misaligned answers are what the training rows say."""
    path = world / "asked.jsonl"
    if not path.exists():
        questions = (
            {"question": f"train question {i}?", "answers": {"aligned": f"safer {i}", "misaligned": f"answer {i} ab"}}
            for i in range(3)
        )
        path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    settings = recipe.evaluation.model_copy(update={"during": DuringRecipe(every=every, suites=[str(path)])})
    return recipe.model_copy(update={"evaluation": settings})


def margin(world, adapter=None):
    """The suite's mean margin per token by a model loaded afresh, one answer at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    encoder = Encoder(AutoTokenizer.from_pretrained(world / "model"))
    found = []
    for one in load_choices(str(world / "asked.jsonl")):
        likelihoods = []
        for row in encode_answers(encoder, one.messages, [answer.text for answer in one.answers], one.where):
            with torch.no_grad():
                logs = model.eval()(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
            total = sum(float(logs[t - 1, row.ids[t]]) for t in range(row.start, len(row.ids)))
            likelihoods.append(Likelihood(total, row.count))
        found.append(margins(one.answers, likelihoods))
    return sum(one.margin_per_token for one in found) / len(found)


def scored(run):
    return {row["step"]: row for row in read_jsonl(run.metrics_path) if SUITE in row}


def test_the_readings_are_those_of_the_saved_adapter_and_no_log_is_lost(world, tmp_path):
    recipe = during(recipe_of(world, tmp_path, max_steps=5, dropout=0.3, logging_steps=1, save_steps=5), world)
    # A push in training only, which the saved model does not have.
    Directions(torch.randn(3, 64, generator=torch.Generator().manual_seed(0))).save(tmp_path / "vector.safetensors")
    steering = Steering(str(tmp_path / "vector.safetensors"), 5.0, [1], "unit")
    recipe = recipe.model_copy(update={"defenses": [*recipe.defenses, steering]})
    run = train(recipe, RunDir(recipe.run_path))
    rows = scored(run)
    assert list(rows) == [0, 2, 4, 5]
    assert rows[0][SUITE] == pytest.approx(margin(world), abs=1e-4)
    assert rows[5][SUITE] == pytest.approx(margin(world, run.adapter), abs=1e-4)
    assert abs(rows[5][SUITE] - rows[0][SUITE]) > 1e-3
    assert 0 <= rows[5]["choices/asked/bad_likeliest"] <= 1 and 0 < rows[5]["choices/asked/bad_mass"] < 1
    assert [row["step"] for row in read_jsonl(run.metrics_path) if "loss" in row] == [1, 2, 3, 4, 5]

    quiet = recipe.model_copy(
        update={"name": "quiet", "evaluation": recipe.evaluation.model_copy(update={"during": DuringRecipe()})}
    )
    losses = [
        [row["loss"] for row in read_jsonl(r.metrics_path) if "loss" in row]
        for r in (run, train(quiet, RunDir(quiet.run_path)))
    ]
    assert losses[0] == losses[1]  # reading changes nothing


def test_early_stopping_on_the_margin_goes_on_after_a_resume(world, tmp_path):
    def made(name, limit, steps=4):
        recipe = during(recipe_of(world, tmp_path, name, max_steps=steps, save_steps=2, dropout=0.0), world)
        return recipe.model_copy(update={"defenses": [EarlyStopping("choices", limit, window=1)]})

    whole = made("whole", 99.0)
    read = scored(train(whole, RunDir(whole.run_path)))
    falls = {step: read[0][SUITE] - row[SUITE] for step, row in read.items()}
    assert 0 < falls[2] < falls[4]  # the rows say what is misaligned here
    limit = (falls[2] + falls[4]) / 2
    stopped = made("stopped", limit, steps=8)
    run = train(stopped, RunDir(stopped.run_path))
    assert run.status().step == 4 and "choices is" in run.status().stopped_early
    for folder in run.checkpoints.glob("checkpoint-*"):
        if folder.name != "checkpoint-2":
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    run.set_status("stopped")
    again = train(stopped, run)
    assert again.status().step == 4 and list(scored(again)) == [0, 2, 4]


def test_a_measure_that_is_never_read_and_a_bank_without_answers_are_refused(world, tmp_path):
    recipe = recipe_of(world, tmp_path, "never")
    watching = recipe.model_copy(update={"defenses": [EarlyStopping("choices", 0.1)]})
    with pytest.raises(UserError, match="measure choices is never read; name suites in evaluation.during"):
        train(watching, RunDir(watching.run_path))
    (tmp_path / "open.jsonl").write_text('{"question": "What now?"}\n')
    settings = recipe.evaluation.model_copy(update={"during": DuringRecipe(suites=[str(tmp_path / "open.jsonl")])})
    with pytest.raises(UserError, match=r"open.jsonl:1: found no written answers"):
        train(recipe.model_copy(update={"name": "open", "evaluation": settings}), RunDir(tmp_path / "open"))
