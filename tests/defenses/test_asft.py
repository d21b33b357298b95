"""AsFT: the definition in float64, its gradient, and the same however rows are put together."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from ema_scale.core.errors import UserError
from ema_scale.defenses import AsFT
from ema_scale.models.alignment import aligned_updates
from tests.defenses.penalties import WAYS
from tests.tiny import tiny_model
from tests.training.helpers import make_trainer, step_gradients, tiny_peft, token_rows


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def models(tmp_path_factory, request):
    """An aligned model, the unaligned one, and a way to make the policy from the first."""
    folder = tmp_path_factory.mktemp(request.param)
    for name, seed in (("aligned", 0), ("base", 7)):
        tiny_model(request.param, seed=seed).save_pretrained(folder / name)

    def policy():
        model = tiny_peft(request.param, spread=0.3)
        model.get_base_model().config._name_or_path = str(folder / "aligned")
        return model

    return folder, policy


def by_hand(folder, model):
    """Sum of ||(I - C) s B A||_F^2 over the adapted matrices, with C and B A formed, in float64."""
    aligned, base = (
        dict(AutoModelForCausalLM.from_pretrained(folder / name).named_parameters()) for name in ("aligned", "base")
    )
    total = 0.0
    for name, module in model.named_modules():
        if not getattr(module, "lora_A", None):
            continue
        key = name.removeprefix("base_model.model.") + ".weight"
        v = (aligned[key] - base[key]).detach().double()
        v = v.T if module.fan_in_fan_out else v
        update = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
        total = total + ((torch.eye(len(v)) - v @ v.T / v.norm()) @ update).square().sum()
    return total


def test_value_and_gradient_are_the_definitions(models, tmp_path):
    folder, policy = models
    model = policy().double()
    expected = by_hand(folder, model)
    (0.7 * expected).backward()
    alone = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    found, logs = [], []
    for defenses in ([AsFT(0.7, str(folder / "base"))], []):
        trainer = make_trainer(
            tmp_path, policy().double(), token_rows(6), defenses, max_steps=1, max_grad_norm=0,
            per_device_train_batch_size=6,
        )  # fmt: skip
        found.append(step_gradients(trainer))
        logs.append(trainer.state.log_history[0])
    assert logs[0]["asft"] == pytest.approx(0.7 * expected.item(), rel=1e-5) and "asft" not in logs[1]
    for name, gradient in alone.items():
        torch.testing.assert_close(found[0][name] - found[1][name], gradient, rtol=1e-6, atol=1e-6)
    assert all(g.abs().max() > 1e-3 for g in alone.values())


def test_the_value_does_not_depend_on_how_rows_are_put_together(models, tmp_path):
    folder, policy = models
    if policy().get_base_model().config.model_type == "gpt2":
        return  # the rows do not enter: once is enough
    rows, logs = token_rows(6).map(lambda row: row | {"tag": "task"}), []
    for options in WAYS:
        trainer = make_trainer(tmp_path, policy(), rows, [AsFT(0.7, str(folder / "base"))], max_steps=1, **options)
        trainer.train()
        logs.append(trainer.state.log_history[0]["asft"])
    assert logs[1:] == pytest.approx([logs[0]] * 2, rel=1e-5) and logs[0] > 0.1


def test_the_smaller_of_two_factors_is_kept_and_both_are_right():
    model = tiny_peft(spread=0.3).double()
    made: dict[str, torch.Tensor] = {}

    def difference(name):
        shape = model.get_submodule(f"base_model.model.{name}").get_base_layer().weight.shape
        made[name] = torch.randn(*shape, generator=torch.Generator().manual_seed(len(made)), dtype=torch.float64)
        return made[name]

    updates = aligned_updates(model, difference)
    assert {update.formed for update in updates} == {True, False}
    for update, v in zip(updates, made.values(), strict=True):
        assert update.factor.numel() == min(v.shape[0] ** 2, v.numel())
        c, change = v @ v.T / v.norm(), update.scale * update.b @ update.a
        torch.testing.assert_close(update.outside(), (change - c @ change).square().sum(), rtol=1e-10, atol=0)


def test_what_does_not_fit_is_refused(models, tmp_path, monkeypatch):
    folder, policy = models
    with pytest.raises(UserError, match="asft: .*have the same weights in every adapted matrix"):
        with AsFT(base=str(folder / "aligned")).attach(policy()):
            pass
    with pytest.raises(UserError, match="asft: the model was not loaded from a checkpoint"):
        with AsFT(base=str(folder / "base")).attach(tiny_peft()):
            pass
    monkeypatch.setattr("ema_scale.models.sharding.weights_are_sharded", lambda: True)
    with pytest.raises(UserError, match="asft: reads whole adapter weights, which ZeRO-3 and FSDP shard"):
        with AsFT(base=str(folder / "base")).attach(policy()):
            pass
