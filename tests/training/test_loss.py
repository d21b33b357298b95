"""The fused loss against plain autograd and finite differences, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from ema_scale.defenses.ceiling import excess
from ema_scale.models.head import Head
from ema_scale.training.chunk_size import tile_tokens
from ema_scale.training.divergence import divergence as divergence_whole
from ema_scale.training.loss import LossTerm, fused_loss

DIRECTIONS = ["policy_reference", "reference_policy", "jensen_shannon"]


def problem(seed=0, n=37, h=12, v=53, bias=False, scale=1.0, softcap=None, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    policy, reference = (torch.randn(n, h, generator=g, dtype=dtype) for _ in range(2))
    head = Head(
        torch.randn(v, h, generator=g, dtype=dtype) * 0.5,
        torch.randn(v, generator=g, dtype=dtype) if bias else None,
        scale,
        softcap,
    )
    labels = torch.randint(0, v, (n,), generator=g)
    labels[::5] = -100
    ce_weights = (labels != -100).to(dtype) * torch.rand(n, generator=g, dtype=dtype)
    return policy, reference, head, labels, ce_weights, g


def term(g, n, direction, temperature=1.0, dtype=torch.float64):
    active = torch.rand(n, generator=g) < 0.7
    return LossTerm(torch.rand(n, generator=g, dtype=dtype) + 0.1, active, direction, temperature)


def full_logits(x, head):
    z = x @ head.weight.T + (0 if head.bias is None else head.bias)
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def plain(policy, reference, head, labels, ce_weights, terms):
    """The definition, with full logits."""

    def logits(x):
        return full_logits(x, head)

    ce = F.cross_entropy(logits(policy), labels.clamp_min(0), reduction="none")
    loss = (ce * ce_weights).sum()
    values = []
    for t in terms:
        log_p, log_q = (F.log_softmax(logits(x) / t.temperature, -1) for x in (policy, reference))
        p, q = log_p.exp(), log_q.exp()
        m = ((p + q) / 2).log()
        value = {
            "policy_reference": (p * (log_p - log_q)).sum(-1),
            "reference_policy": (q * (log_q - log_p)).sum(-1),
            "jensen_shannon": ((p * (log_p - m)).sum(-1) + (q * (log_q - m)).sum(-1)) / 2,
        }[t.measure]
        values.append(value * t.active)
        loss = loss + (value * t.weights * t.active).sum()
    return loss, ce * (ce_weights != 0), values


@pytest.mark.parametrize("shape", [{}, {"bias": True}, {"scale": 0.3}, {"softcap": 2.0, "scale": 1.5, "bias": True}])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_the_definition(shape, direction, temperature):
    policy, reference, head, labels, ce_weights, g = problem(**shape)
    terms = [term(g, 37, direction, temperature), term(g, 37, "policy_reference")]
    ours, theirs = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    got = fused_loss(ours, reference, head, labels, ce_weights, terms, chunk=8)
    loss, ce, values = plain(theirs, reference, head, labels, ce_weights, terms)
    got.loss.backward()
    loss.backward()
    torch.testing.assert_close(got.loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.ce, ce, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.terms, torch.stack(values), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("direction", [*DIRECTIONS, excess])
def test_finite_differences(direction):
    policy, reference, head, labels, ce_weights, g = problem(n=5, h=4, v=11, softcap=3.0, bias=True)
    terms = [term(g, 5, direction, 1.7)]
    if direction is excess:
        terms = [LossTerm(terms[0].weights, labels != -100, direction)]
    assert torch.autograd.gradcheck(
        lambda x: fused_loss(x, reference, head, labels, ce_weights, terms, chunk=2).loss,
        policy.requires_grad_(),
        eps=1e-6,
        atol=1e-8,
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_divergence_and_gradient_are_exactly_zero_when_policy_is_reference(direction, dtype):
    policy, _, head, labels, _, g = problem(dtype=dtype)
    x = policy.clone().requires_grad_()
    got = fused_loss(x, policy, head, labels, torch.zeros(37), [term(g, 37, direction, dtype=torch.float32)])
    got.loss.backward()
    assert got.loss.item() == 0.0
    assert torch.count_nonzero(got.terms) == 0
    assert torch.count_nonzero(x.grad) == 0


def test_chunk_size_does_not_matter():
    policy, reference, head, labels, ce_weights, g = problem()
    terms = [term(g, 37, "policy_reference")]
    results = []
    for chunk in (1, 7, 37, 1000, None):
        x = policy.clone().requires_grad_()
        fused_loss(x, reference, head, labels, ce_weights, terms, chunk=chunk).loss.backward()
        results.append(x.grad)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [{}, {"softcap": 2.0, "scale": 1.5, "bias": True}])
@pytest.mark.parametrize("tile", [1, 3])
def test_reading_a_chunk_by_tiles_changes_nothing(shape, tile, monkeypatch):
    policy, reference, head, labels, ce_weights, g = problem(**shape)
    label_term = LossTerm(torch.rand(37, generator=g, dtype=torch.float64), labels != -100, excess, group=1)
    measured = LossTerm(torch.zeros(37), torch.ones(37, dtype=torch.bool), "jensen_shannon", 2.0)
    asked: list[list[LossTerm]] = [[], [measured], [term(g, 37, "policy_reference"), label_term, measured]]
    for terms in asked:
        found = []
        for size in (1000, tile):
            monkeypatch.setattr("ema_scale.training.loss.tile_tokens", lambda *_, size=size: size)
            x = policy.clone().requires_grad_()
            got = fused_loss(x, reference, head, labels, ce_weights, terms, chunk=8)
            got.loss.backward()
            found.append((x.grad, got.losses, got.ce, got.terms, got.correct, got.entropy))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_large_vocabulary_is_read_by_tiles_on_a_cpu():
    """In bfloat16, whose gradient by the logits is rounded on its way to the product with the head."""
    policy, reference, head, labels, ce_weights, g = problem(n=8, v=200_000, dtype=torch.bfloat16)
    assert tile_tokens(head.weight, torch.float32) < 8 <= tile_tokens(head.weight[:50_000], torch.float32)
    asked, ce_weights = [term(g, 8, "policy_reference", dtype=torch.float32)], ce_weights.float()
    small, exact = policy.clone().requires_grad_(), policy.double().requires_grad_()
    wide = Head(head.weight.double())
    got = fused_loss(small, reference, head, labels, ce_weights, asked)
    expected = fused_loss(exact, reference.double(), wide, labels, ce_weights.double(), asked)
    got.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(got.loss.double(), expected.loss, rtol=1e-3, atol=0)
    assert (small.grad.double() - exact.grad).norm() < 2e-2 * exact.grad.norm()


def test_tokens_without_weight_are_skipped():
    policy, reference, head, labels, ce_weights, g = problem()
    quiet = term(g, 37, "policy_reference")
    unused = (ce_weights == 0) & ~quiet.active
    assert unused.any()
    policy[unused], reference[unused] = float("nan"), float("nan")
    x = policy.requires_grad_()
    got = fused_loss(x, reference, head, labels, ce_weights, [quiet])
    got.loss.backward()
    assert torch.isfinite(got.loss) and torch.isfinite(x.grad).all()
    assert torch.count_nonzero(x.grad[unused]) == 0


def test_zero_weight_measures_without_a_gradient(monkeypatch):
    asked = []

    def divergence(*arguments, backward, **options):
        asked.append(backward)
        return divergence_whole(*arguments, backward=backward, **options)

    monkeypatch.setattr("ema_scale.training.loss.divergence", divergence)
    policy, reference, head, labels, ce_weights, g = problem()
    measured = LossTerm(torch.zeros(37), torch.ones(37, dtype=torch.bool))
    with_term, without = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    got = fused_loss(with_term, reference, head, labels, ce_weights, [measured])
    got.loss.backward()
    fused_loss(without, None, head, labels, ce_weights).loss.backward()
    assert got.terms.min() > 0
    torch.testing.assert_close(with_term.grad, without.grad, rtol=0, atol=1e-15)
    assert asked and not any(asked)


def test_jensen_shannon_of_disjoint_distributions_is_ln2():
    head = Head(torch.eye(4) * 200)
    one, other = torch.eye(4)[:1].requires_grad_(), torch.eye(4)[1:2]
    js = LossTerm(torch.ones(1), torch.ones(1, dtype=torch.bool), "jensen_shannon")
    got = fused_loss(one, other, head, torch.tensor([0]), torch.zeros(1), [js])
    got.loss.backward()
    assert math.isclose(got.loss.item(), math.log(2), rel_tol=1e-6)
    assert one.grad is not None and torch.isfinite(one.grad).all()


def test_accuracy_and_entropy():
    head = Head(torch.zeros(8, 3))
    policy = torch.zeros(2, 3, requires_grad=True)
    got = fused_loss(policy, None, head, torch.tensor([0, 5]), torch.ones(2))
    assert got.correct.tolist() == [1.0, 0.0]
    torch.testing.assert_close(got.entropy, torch.full((2,), math.log(8)))


def test_no_large_tensor_is_allocated():
    """One chunk of logits is 16 x 20,000; all 512 tokens would be 32 times that."""
    policy, reference, head, labels, ce_weights, g = problem(n=512, h=8, v=20_000, dtype=torch.float32)
    largest = 0

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    x = policy.requires_grad_()
    with Spy():
        loss = fused_loss(x, reference, head, labels, ce_weights, [term(g, 512, "policy_reference")], chunk=16)
        loss.loss.backward()
    assert 16 * 20_000 <= largest <= 20_000 * 16


def test_misuse_is_refused():
    policy, reference, head, labels, ce_weights, g = problem()
    with pytest.raises(ValueError, match="needs the reference"):
        fused_loss(policy, None, head, labels, ce_weights, [term(g, 37, "policy_reference")])
    with pytest.raises(ValueError, match="freeze"):
        fused_loss(policy, reference, Head(head.weight.requires_grad_()), labels, ce_weights)


@pytest.mark.parametrize("shape", [{}, {"bias": True, "scale": 0.3}, {"softcap": 2.0}])
def test_ceiling_equals_its_definition_and_only_pulls_down(shape):
    policy, reference, head, labels, ce_weights, g = problem(**shape)
    active = labels != -100
    ce_weights[active & (torch.rand(37, generator=g) < 0.5)] = 0  # a token may carry either term or both
    ceiling = LossTerm(torch.rand(37, generator=g, dtype=torch.float64) + 0.1, active, excess)
    ours, theirs = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    got = fused_loss(ours, reference, head, labels, ce_weights, [ceiling], chunk=8)
    log_p, log_q = (
        F.log_softmax(full_logits(x, head), -1).gather(1, labels.clamp_min(0)[:, None])[:, 0]
        for x in (theirs, reference)
    )
    value = F.relu(log_p - log_q) * active
    loss = plain(theirs, reference, head, labels, ce_weights, [])[0] + (value * ceiling.weights).sum()
    got.loss.backward()
    loss.backward()
    torch.testing.assert_close(got.loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.terms[0], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-12)
    assert 0 < (value > 0).sum() < active.sum(), "some labels became likelier, some did not"

    alone = policy.clone().requires_grad_()
    fused_loss(alone, reference, head, labels, torch.zeros_like(ce_weights), [ceiling]).loss.backward()
    assert (alone.grad[value == 0] == 0).all() and (alone.grad[value > 0] != 0).any(1).all()
    still = reference.clone().requires_grad_()
    at_zero = fused_loss(still, reference, head, labels, torch.zeros_like(ce_weights), [ceiling])
    at_zero.loss.backward()
    assert at_zero.loss == 0 and (still.grad == 0).all()
