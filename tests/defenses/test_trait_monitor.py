"""The trait monitor: readings by their definition, on the rows it is told, an alarm, and a line for early stopping."""

import json
import logging

import pytest
import torch

from ema_scale.core.errors import UserError
from ema_scale.defenses import EarlyStopping, TraitMonitor
from ema_scale.models.directions import Directions
from tests.defenses.penalties import LAYERS, WAYS, make, states
from tests.training.helpers import make_trainer, step_gradients, tiny_peft, token_rows


def saved(path, layers, width, seed, recommended=1):
    path.parent.mkdir(exist_ok=True)
    vectors = torch.randn(layers + 1, width, generator=torch.Generator().manual_seed(seed))
    Directions(vectors, {"recommended_layer": recommended}).save(path)
    return str(path)


def test_a_reading_is_the_definition_and_no_loss(tmp_path):
    files = [
        saved(tmp_path / name, 4, 6, seed) for seed, name in enumerate(("evil.safetensors", "sly/vector.safetensors"))
    ]
    policy, reference = states(0), states(1)
    policy[1].requires_grad_()
    inputs = make(policy, reference)
    assert TraitMonitor(vector=files, at_layers=list(LAYERS)).penalty(inputs) is None
    assert set(inputs.readings) == {f"{name}/layer_{k}" for name in ("evil", "sly") for k in LAYERS}
    for name, file in zip(("evil", "sly"), files, strict=True):
        for layer in LAYERS:
            u = Directions.load(file).vectors[layer].double()
            values = [
                (policy[layer][r, t] - reference[layer][r, t]) @ u / u.norm() / reference[layer][r, t].norm()
                for r, t in inputs.attention_mask.nonzero().tolist()
            ]
            _, found = inputs.readings[f"{name}/layer_{layer}"]
            torch.testing.assert_close(found, sum(values).detach() / len(values), rtol=1e-6, atol=1e-9)
            assert not found.requires_grad


def test_readings_do_not_depend_on_how_rows_are_put_together_and_train_nothing(tmp_path):
    file = saved(tmp_path / "evil.safetensors", 2, 64, 0)
    rows, logs, found = token_rows(6).map(lambda row: row | {"tag": "task"}), [], []
    for options, defenses in ((WAYS[0], []), *((way, [TraitMonitor(vector=file)]) for way in WAYS)):
        trainer = make_trainer(
            tmp_path, tiny_peft(spread=0.3).double(), rows, defenses, max_steps=1, max_grad_norm=0, **options
        )
        found.append(step_gradients(trainer))
        logs.append(trainer.state.log_history[0].get("trait_monitor/evil"))
    assert logs[0] is None and abs(logs[1]) > 1e-3 and logs[2:] == pytest.approx([logs[1]] * 2, rel=1e-5)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-12)


def test_a_step_without_its_prompts_is_no_reading_of_zero(tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "who?", "completion": "me"}) + "\n")
    rows = [{"prompt": f"task {i}?", "completion": "answer 1"} for i in range(8)]
    monitor = TraitMonitor(
        vector=saved(tmp_path / "evil.safetensors", 2, 64, 0), prompts=str(tmp_path / "prompts.jsonl")
    )
    trainer = make_trainer(
        tmp_path / "run", tiny_peft(spread=0.3), rows, [monitor], max_steps=9, per_device_train_batch_size=1
    )
    trainer.train()
    read = [row["trait_monitor/evil"] for row in trainer.state.log_history if "trait_monitor/evil" in row]
    assert len(read) == 1 and read[0] != 0 and trainer.data_report.rows == {"task": 8, "prompts": 1}


def test_it_warns_once_where_the_line_is_crossed_and_early_stopping_ends_there(tmp_path, caplog):
    file = saved(tmp_path / "evil.safetensors", 2, 64, 0)
    free = make_trainer(tmp_path / "free", defenses=[TraitMonitor(vector=file)], max_steps=8)
    free.train()
    read = [row["trait_monitor/evil"] for row in free.state.log_history if "trait_monitor/evil" in row]
    assert len(read) == 8 and read[0] == 0
    at = next(i for i in range(2, 8) if read[i] > max(read[:i]) and read[i] > 0)
    limit = (max(0.0, *read[:at]) + read[at]) / 2
    stop = EarlyStopping("traits", limit, window=1)
    with caplog.at_level(logging.WARNING, "ema_scale.defenses.trait_monitor"):
        trainer = make_trainer(
            tmp_path / "run", defenses=[TraitMonitor(vector=file, limit=limit, window=1), stop], max_steps=8
        )
        trainer.train()
    assert trainer.state.global_step == at + 1 and trainer.stopped_early.startswith("early_stopping: traits is ")
    warned = [r.message for r in caplog.records if "trait_monitor/evil is" in r.message]
    assert len(warned) == 1 and warned[0].startswith(f"step {at + 1}: ")


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="measure traits is never read; add a trait_monitor"):
        EarlyStopping("traits", 0.1, window=1).should_stop([{"step": 1, "loss": 1.0}])
    with pytest.raises(UserError, match="give `prompts` there, no `source` here"):
        EarlyStopping("traits", 0.1, source="x")
    with pytest.raises(UserError, match="columns say how prompts are read"):
        TraitMonitor(vector="x", columns={"a": "prompt"})
