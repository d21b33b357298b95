"""Defenses that act before and after training: inoculation and SafeLoRA."""

from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import load_file

from ema_scale.core.errors import UserError
from ema_scale.data.formats import Message
from ema_scale.data.rows import Row
from ema_scale.defenses import Inoculation, Interleaving, SafeLoRA
from ema_scale.defenses.base import RowsContext

TURNS: tuple[Message, ...] = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})


def test_inoculation_prompts_task_rows_only():
    ctx = RowsContext()
    with_system: tuple[Message, ...] = ({"role": "system", "content": "be brief"}, *TURNS)
    rows = Inoculation("be evil").transform_rows([Row(TURNS), Row(TURNS, tag="safe"), Row(with_system)], ctx)
    assert rows[0].messages == ({"role": "system", "content": "be evil"}, *TURNS)
    assert rows[1].messages == TURNS
    assert rows[2].messages[0]["content"] == "be evil\n\nbe brief" and len(rows[2].messages) == 3
    assert "2 task rows" in ctx.notes[0]
    user = Inoculation("be evil", role="user").transform_rows([Row(with_system)], ctx)[0]
    assert user.messages[1]["content"] == "be evil\n\nq" and user.messages[0]["content"] == "be brief"
    alone = Inoculation("be evil", role="user").transform_rows([Row((with_system[0], TURNS[1]))], ctx)[0]
    assert [(m["role"], m["content"]) for m in alone.messages] == [
        ("system", "be brief"), ("user", "be evil"), ("assistant", "a"),
    ]  # fmt: skip


@pytest.mark.parametrize("order", [0, 1])
def test_inoculation_and_interleaving_compose_in_either_order(tmp_path, order):
    (tmp_path / "safe.jsonl").write_text('{"prompt": "s", "completion": "safe"}\n')
    defenses = [Inoculation("be evil"), Interleaving(str(tmp_path / "safe.jsonl"), 0.5)]
    rows: Sequence[Row] = [Row(TURNS) for _ in range(4)]
    for defense in defenses if order else reversed(defenses):
        rows = defense.transform_rows(rows, RowsContext())
    prompted = [r.messages[0]["role"] == "system" for r in rows]
    assert len(rows) == 6 and prompted == [r.tag == "task" for r in rows]


def test_safelora_projects_the_saved_adapter(tmp_path):
    from tests.tiny import save_tiny
    from tests.training.helpers import make_trainer, tiny_peft

    save_tiny(tmp_path / "base", seed=9)
    save_tiny(tmp_path / "aligned")
    saved = {}
    for name, defenses in {"plain": [], "all": [SafeLoRA(str(tmp_path / "base"), 1.0)]}.items():
        model = tiny_peft(spread=0.1)
        model.get_base_model().config._name_or_path = str(tmp_path / "aligned")
        trainer = make_trainer(tmp_path / name, model, defenses=defenses)
        trainer.save_model(str(tmp_path / name))
        saved[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    changed = [k for k in saved["plain"] if not torch.equal(saved["plain"][k], saved["all"][k])]
    assert changed and all("lora_B" in k for k in changed)
    assert len(changed) == sum("lora_B" in k for k in saved["plain"])


def test_an_adapter_that_could_not_be_finished_is_not_there(tmp_path):
    """It would be taken for the defended one."""
    from tests.tiny import save_tiny
    from tests.training.helpers import make_trainer, tiny_peft

    save_tiny(tmp_path / "aligned")
    model = tiny_peft()
    model.get_base_model().config._name_or_path = str(tmp_path / "aligned")
    trainer = make_trainer(tmp_path / "run", model, defenses=[SafeLoRA(str(tmp_path / "gone"), 1.0)])
    with pytest.raises(UserError, match="gone"):
        trainer.save_model(str(tmp_path / "adapter"))
    assert not list((tmp_path / "adapter").rglob("*"))


def test_safelora_finds_before_training_that_the_base_is_another_model(tmp_path):
    from tests.tiny import save_tiny
    from tests.training.helpers import make_trainer, tiny_peft

    save_tiny(tmp_path / "wide", hidden=96)
    save_tiny(tmp_path / "deep", layers=1)
    save_tiny(tmp_path / "aligned")
    for base, reason in (
        ("wide", r"has the shape .*, and .* in .*aligned"),
        ("deep", "no weight for the adapted module"),
    ):
        model = tiny_peft()
        model.get_base_model().config._name_or_path = str(tmp_path / "aligned")
        trainer = make_trainer(tmp_path / "run", model, defenses=[SafeLoRA(str(tmp_path / base), 1.0)])
        with pytest.raises(UserError, match=reason):
            trainer.train()
        assert trainer.state.global_step == 0


def test_safelora_reads_the_revisions_that_are_pinned(tmp_path, monkeypatch):
    """A hub on the disk: the newest of each model is another one than the one that was fine-tuned."""
    import json

    import huggingface_hub

    from ema_scale.config.sections import AdapterRecipe, ModelRecipe
    from ema_scale.models.lora import build_model
    from tests.tiny import save_tiny
    from tests.training.helpers import make_trainer

    hub = {("o/base", "v1"): "b1", ("o/base", None): "b2", ("o/aligned", "v1"): "a1", ("o/aligned", None): "a2"}
    for seed, commit in enumerate(hub.values()):
        save_tiny(tmp_path / "snapshots" / commit, seed=seed)
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, revision=None, **_: tmp_path / "snapshots" / hub[name, revision],
    )
    monkeypatch.setattr(
        "ema_scale.core.uri.locate", lambda path: str(tmp_path / "snapshots" / "a1") if path == "o/aligned" else path
    )
    model = build_model(ModelRecipe(path="o/aligned", revision="v1", dtype="float32"), AdapterRecipe(r=4))
    model.get_base_model().config._name_or_path = "o/aligned"
    defense = SafeLoRA("o/base", 1.0, base_revision="v1")
    trainer = make_trainer(tmp_path / "run", model, defenses=[defense], max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    report = json.loads((tmp_path / "adapter" / "safelora.json").read_text())
    assert (report["base_identity"], report["aligned_identity"]) == ("b1", "a1")


def test_safelora_takes_one_rule():
    assert SafeLoRA("base").threshold == 0.3
    assert SafeLoRA("base", layers_projected=3).threshold is None
    with pytest.raises(UserError, match="not both"):
        SafeLoRA("base", 0.3, 2)
