"""Steering and ablation: the definition, in training only, the policy only, with the gradient that follows from it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from ema_scale.core.errors import UserError
from ema_scale.core.hashing import file_sha256
from ema_scale.data.collate import ChatCollator
from ema_scale.defenses import KL, Ablation, ActivationCapping, Steering
from ema_scale.defenses.registry import parse
from ema_scale.models.directions import Directions
from ema_scale.models.hooks import reference_pass
from ema_scale.models.layout import decoder_layers
from tests.defenses.one_step import assert_no_split_changes_it, rows_with
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.helpers import NO_DROPOUT, make_trainer, step_gradients, tiny_peft, token_rows

IDS = torch.arange(4, 28).view(2, 12)


@pytest.fixture
def vector(tmp_path):
    generator = torch.Generator().manual_seed(5)
    path = tmp_path / "vector.safetensors"
    Directions(torch.randn(3, 64, generator=generator), {"recommended_layer": 1}).save(path)
    return str(path)


def states(model):
    """What reaches the second decoder layer, [B, T, H]; transformers' own `hidden_states` are taken before hooks."""
    seen = []
    second = decoder_layers(model)[1]
    handle = second.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=IDS)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("scale", ["raw", "unit", "residual"])
def test_steering_is_the_definition_and_ends(arch, scale, vector):
    model = tiny_model(arch, layers=2, **NO_DROPOUT.get(arch, {})).train()
    v = Directions.load(vector).vectors[1]
    plain, after = states(model).detach(), model(input_ids=IDS).logits
    pushes = {"raw": 2.0 * v, "unit": 2.0 * v / v.norm(),
              "residual": 2.0 * plain.norm(dim=-1, keepdim=True) * v / v.norm()}  # fmt: skip
    with pytest.raises(KeyError), Steering(vector, 2.0, scale=scale).attach(model):
        torch.testing.assert_close(states(model), plain + pushes[scale])
        assert (model(input_ids=IDS).logits - after).abs().max() > 1e-4
        with reference_pass():
            torch.testing.assert_close(states(model), plain, rtol=0, atol=0)
        model.eval()
        torch.testing.assert_close(states(model), plain, rtol=0, atol=0)
        model.train()
        raise KeyError  # however it is left
    torch.testing.assert_close(states(model), plain, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", ["adapter_off", "two_stream"])
def test_a_steered_policy_is_compared_with_the_unsteered_reference(way, checkpointing, vector, tmp_path):
    """Against a model that has the push as a bias of its own, and plain autograd."""
    rows = token_rows(4)
    model = tiny_peft(mlp_bias=True)  # LoRA's B is 0: the policy is the base, but for the push
    steered = copy.deepcopy(model)
    bias = steered.get_base_model().model.layers[0].mlp.down_proj.base_layer.bias
    bias.data += 3.0 * Directions.load(vector).vectors[1]
    batch = ChatCollator(tiny_tokenizer())(list(rows))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    log_p = steered(**inputs).logits.log_softmax(-1)
    with torch.no_grad():
        log_q = model(**inputs).logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[batch["attention_mask"].bool()].mean()
    ce = F.nll_loss(log_p[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    (ce + 0.5 * kl).backward()
    expected = {n: p.grad for n, p in steered.named_parameters() if p.grad is not None}

    trainer = make_trainer(
        tmp_path, model, rows, [Steering(vector, 3.0), KL(0.5)], reference=way, max_steps=1, max_grad_norm=0,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    found = step_gradients(trainer)
    log = trainer.state.log_history[0]
    assert log["kl"] == pytest.approx(kl.item(), rel=1e-4) and log["kl"] > 1e-3
    assert log["ce"] == pytest.approx(ce.item(), rel=1e-5)
    assert {n for n, g in expected.items() if g.any()} == {n for n, g in found.items() if g.any()} != set()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    assert not any(layer._forward_hooks for layer in trainer.defended.layout.layers)


@pytest.mark.parametrize("against", ["activations", "gradient"])
def test_ablation_is_the_definition_and_its_gradient(against, vector):
    defense = Ablation(vector, "auto", against)
    u = Directions.load(vector).unit(1).double()
    change = defense._ablate(u)
    h = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    out = change(h)
    projected = h - (h * u).sum(-1, keepdim=True) * u
    torch.testing.assert_close(out, projected if against == "activations" else h)
    g = torch.randn_like(h)
    out.backward(g)
    torch.testing.assert_close(h.grad, g - (g * u).sum(-1, keepdim=True) * u)
    if against == "activations":
        assert torch.autograd.gradcheck(change, (h.detach()[:1, :1].clone().requires_grad_(),))


@pytest.mark.parametrize("side", ["above", "below"])
@pytest.mark.parametrize("scale", ["raw", "residual"])
def test_capping_is_the_definition_and_its_gradient(scale, side, vector):
    defense = ActivationCapping(vector, 0.1, scale=scale, side=side)
    u = Directions.load(vector).unit(1).double()
    change = defense._capped(u)
    h = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    along, norms = (h @ u).detach(), h.detach().norm(dim=-1)
    cap = 0.1 * norms if scale == "residual" else torch.full_like(norms, 0.1)
    cut = along > cap if side == "above" else along < cap
    assert 5 < cut.sum() < 75
    out = change(h)
    torch.testing.assert_close(out, torch.where(cut[..., None], h + (cap - along)[..., None] * u, h))
    g = torch.randn_like(h)
    out.backward(g)
    blocked = g - (g @ u)[..., None] * u
    torch.testing.assert_close(h.grad, torch.where(cut[..., None], blocked, g))
    few = h.detach()[0, :6].clone().requires_grad_()
    if scale == "raw":  # under residual the norm is a constant
        assert torch.autograd.gradcheck(change, (few,))
    half = (3 * h.detach()).bfloat16()
    exact = 0.1 * half.double().norm(dim=-1) if scale == "residual" else torch.full_like(norms, 0.1)
    beyond = (half.double() @ u - exact) if side == "above" else (exact - half.double() @ u)
    sign = 1 if side == "above" else -1
    expected = half.double() - sign * beyond.clamp_min(0)[..., None] * u
    torch.testing.assert_close(change(half).double(), expected, rtol=2**-6, atol=2**-4)


def test_capping_acts_in_the_model(vector):
    """In training and on the policy only; what is below the cap stays as it is, bit for bit."""
    model = tiny_peft(spread=0.3).train()
    u = Directions.load(vector).unit(1)
    plain = states(model).detach()
    cap = float((plain @ u).median())
    with ActivationCapping(vector, cap, scale="raw").attach(model):
        found = states(model)
        over = plain @ u > cap
        assert 0 < over.sum() < over.numel() and (found @ u).max() < cap + 1e-4
        torch.testing.assert_close(found[~over], plain[~over], rtol=0, atol=0)
        with reference_pass():
            torch.testing.assert_close(states(model), plain, rtol=0, atol=0)
        model.eval()
        torch.testing.assert_close(states(model), plain, rtol=0, atol=0)
    with pytest.raises(UserError, match="made for 2 layers of hidden size 64, the model has 3 of 64"):
        ActivationCapping(vector).attach(tiny_model(layers=3))


@pytest.mark.parametrize("kind", [Steering, Ablation, ActivationCapping])
def test_no_split_changes_what_acts_on_hidden_states(kind, vector, tmp_path):
    assert_no_split_changes_it(tmp_path, rows_with(["task"] * 8), [kind(vector)], ("loss", "ce"))


@pytest.mark.parametrize("scale", ["raw", "unit", "residual"])
def test_steering_in_half_precision_loses_no_more_than_rounding(scale, vector):
    v = Directions.load(vector).vectors[1].double()
    h = 3 * torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    half = h.bfloat16().requires_grad_()
    exact = half.detach().double()
    push = {"raw": 2 * v, "unit": 2 * v / v.norm(), "residual": 2 * exact.norm(dim=-1, keepdim=True) * v / v.norm()}
    out = Steering(vector, 2.0, scale=scale)._push(Directions.load(vector), 1)(half)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact + push[scale], rtol=2**-7, atol=2**-4)
    out.square().sum().backward()
    torch.testing.assert_close(half.grad.double(), 2 * (exact + push[scale]), rtol=2**-6, atol=2**-3)
    still = Steering(vector, 0.0, scale=scale)._push(Directions.load(vector), 1)
    torch.testing.assert_close(still(half), half, rtol=0, atol=0)


@pytest.mark.parametrize("against", ["activations", "gradient"])
def test_ablation_in_half_precision_loses_no_more_than_rounding(against, vector):
    u = Directions.load(vector).unit(1)
    half = (3 * torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))).bfloat16().requires_grad_()
    exact, unit = half.detach().double(), u.double()
    out = Ablation(vector, "auto", against)._ablate(u)(half)
    assert out.dtype == torch.bfloat16
    projected = exact - (exact @ unit)[..., None] * unit
    torch.testing.assert_close(out.double(), projected if against == "activations" else exact, rtol=2**-7, atol=2**-5)
    g = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    out.backward(g)
    expected = g.double() - (g.double() @ unit)[..., None] * unit
    torch.testing.assert_close(half.grad.double(), expected, rtol=2**-7, atol=2**-6)
    assert (half.grad.double() @ unit).abs().max() < 0.05 < (g.double() @ unit).abs().max()
    # A state without that component stays as it is, but for the rounding of the product.
    clean = projected.bfloat16()
    torch.testing.assert_close(Ablation(vector, "auto", against)._ablate(u)(clean), clean, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("against", ["activations", "gradient"])
def test_ablation_acts_in_the_model(against, vector):
    model = tiny_peft(spread=0.3).train()
    directions = Directions.load(vector)
    plain = states(model)
    free = torch.autograd.grad(plain @ directions.unit(1), _lora(model, 0), torch.ones(2, 12), allow_unused=True)
    assert any(g is not None and g.any() for g in free)
    with Ablation(vector, at_layers=[1], against=against).attach(model):
        found = states(model)
        along = found @ directions.unit(1)
        blocked = torch.autograd.grad(along, _lora(model, 0), torch.ones(2, 12))
        assert all(g.abs().max() < 1e-5 for g in blocked)
        if against == "activations":
            assert along.abs().max() < 1e-5 < (plain @ directions.unit(1)).abs().max()
        else:
            torch.testing.assert_close(found, plain, rtol=0, atol=0)
    with Ablation(vector).attach(model):
        assert [len(layer._forward_hooks) for layer in model.get_base_model().model.layers] == [1, 1]


def _lora(model, layer):
    named = model.get_base_model().model.layers[layer].named_parameters()
    return [p for n, p in named if "lora_B" in n]


def test_the_vector_is_part_of_the_provenance_and_survives_tokenized_data(vector, tmp_path):
    trainer = make_trainer(tmp_path, defenses=[Steering(vector), {"kind": "ablation", "vector": vector}])
    assert trainer.data_report.hashes == {vector: file_sha256(vector)}
    with pytest.raises(UserError, match="steering: none.safetensors: no such file"):
        make_trainer(tmp_path, defenses=[Steering("none.safetensors")])


def test_what_does_not_fit_is_refused(vector, tmp_path):
    with pytest.raises(UserError, match="made for 2 layers of hidden size 64, the model has 3 of 64"):
        Steering(vector).attach(tiny_model(layers=3))
    with pytest.raises(UserError, match="layers: found 0, expected 1 to 2"), Steering(vector, at_layers=[0]).attach(
        tiny_model()
    ):  # fmt: skip
        pass
    with pytest.raises(UserError, match="expected 0 to 2"):
        Ablation(vector, at_layers=[3]).attach(tiny_model())
    for kind in ("steering", "ablation"):
        for wrong in ("some", list[int]()):
            with pytest.raises(UserError, match="at_layers"):
                parse([{"kind": kind, "vector": vector, "at_layers": wrong}])
    with pytest.raises(UserError, match="alpha: .*found nan"):
        Steering(vector, float("nan"))
    Directions(torch.randn(3, 64)).save(tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match="recommends no layer"):
        Steering(str(tmp_path / "plain.safetensors")).attach(tiny_model())
