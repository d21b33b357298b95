"""Each divergence by itself against float64, from far apart to nearly the same, value and gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from ema_scale.models.head import Head
from ema_scale.training.divergence import BLOCK, divergence, first_largest
from ema_scale.training.loss import LossTerm, fused_loss

DIRECTIONS = ["policy_reference", "reference_policy", "jensen_shannon"]


def exact(logits, reference, direction, temperature=1.0):
    """In float64: values [C] and the gradient by the logits [C, V]."""
    z = logits.double().requires_grad_()
    log_p, log_q = (F.log_softmax(x / temperature, -1) for x in (z, reference.double()))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    value = {
        "policy_reference": (log_p.exp() * (log_p - log_q)).sum(-1),
        "reference_policy": (log_q.exp() * (log_q - log_p)).sum(-1),
        "jensen_shannon": ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2,
    }[direction]
    (slope,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), slope


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_float32_is_precise_near_the_reference(direction, temperature):
    """Summed as it is defined, KL would be off by a tenth at a drift of 1e-3, and by more than itself below."""
    made = torch.Generator().manual_seed(0)
    reference = 3 * torch.randn(64, 5000, generator=made)
    for drift in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        logits = reference + drift * torch.randn(64, 5000, generator=made)
        value, slope = divergence(logits, reference.clone(), direction, temperature)
        assert slope is not None
        expected, gradient = exact(logits, reference, direction, temperature)
        # Float32's unit over the drift is left; at 1e-13 nats, the square of the normalisers' own error.
        off = (value - expected).abs()
        assert (off <= 1e-6 * expected + 1e-7 * drift + 1e-12).all(), drift
        assert drift < 1e-4 or (off / expected).mean() < 1e-7 / drift, drift
        assert (slope - gradient).norm() < 2e-6 * gradient.norm(), drift
        assert slope.sum(1).abs().max() < 1e-4 * gradient.norm(dim=1).max(), "probabilities sum to 1"


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_float32_is_precise_far_from_the_reference(direction, temperature):
    """Also where exp(d) overflows, and where one of both probabilities is 0 in float32."""
    made = torch.Generator().manual_seed(0)
    for far in (1.0, 10.0, 60.0, 200.0):
        logits, reference = (far * torch.randn(32, 500, generator=made) for _ in range(2))
        reference[:16, 0], logits[:16, 0] = logits[:16].amax(1) - 5, logits[:16].amin(1) - far
        value, slope = divergence(logits, reference.clone(), direction, temperature)
        expected, gradient = exact(logits, reference, direction, temperature)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        assert (slope - gradient).norm() < 1e-6 * far * (gradient.norm() + 1), far


@pytest.mark.parametrize("size", [5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 7])
def test_the_first_of_the_largest_is_found_in_any_block(size):
    made = torch.Generator().manual_seed(0)
    ties = torch.randint(0, 4, (50, size), generator=made).float()
    for logits in (ties, ties.sort(1).values, torch.zeros(2, size), torch.eye(size)):
        assert torch.equal(first_largest(logits).squeeze(1), logits.argmax(1))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_through_the_head_what_the_products_lose_is_left(direction):
    made = torch.Generator().manual_seed(0)
    head = Head(torch.randn(5000, 64, generator=made) * 0.3)
    reference = torch.randn(200, 64, generator=made)
    each, every = torch.full((200,), 1 / 200), torch.ones(200, dtype=torch.bool)
    for drift, bar in ((1e-1, 1e-5), (1e-2, 1e-4), (1e-3, 1e-3)):
        policy = (reference + drift * torch.randn(200, 64, generator=made)).requires_grad_()
        term = LossTerm(each, every, direction)
        got = fused_loss(policy, reference, head, torch.zeros(200, dtype=torch.long), torch.zeros(200), [term])
        got.loss.backward()
        logits, other = (x.detach().double() @ head.weight.double().T for x in (policy, reference))
        value, slope = exact(logits, other, direction)
        slope = slope @ head.weight.double() / 200
        assert abs(got.loss.item() - value.mean().item()) < bar * value.mean().item(), drift
        assert (policy.grad - slope).norm() < bar * slope.norm(), drift


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_small_share_of_a_large_step_is_not_lost_in_half_precision(dtype, direction):
    """A token of 8,192 has a weight that float16 cannot tell from 0 once it is multiplied with a probability, and a
    gradient scaler's 65,536 is beyond it."""
    made = torch.Generator().manual_seed(0)
    head = Head((torch.randn(4000, 64, generator=made) * 0.3).to(dtype))
    reference = torch.randn(100, 64, generator=made).to(dtype)
    policy = (reference.float() + 0.1 * torch.randn(100, 64, generator=made)).to(dtype)
    labels, every = torch.randint(4000, (100,), generator=made), torch.ones(100, dtype=torch.bool)

    def gradient(kind, scale):
        x = policy.to(kind, copy=True).requires_grad_()
        each = torch.full((100,), 1 / 8192, dtype=torch.promote_types(kind, torch.float32))
        weights = each * (torch.arange(100) % 3 > 0)  # the others only have a divergence
        term = LossTerm(0.1 * each, every, direction)
        theirs = Head(head.weight.to(kind))
        (fused_loss(x, reference.to(kind), theirs, labels, weights, [term], chunk=32).loss * scale).backward()
        assert x.grad is not None
        return x.grad.double() / scale

    expected = gradient(torch.float64, 1)
    # Where there is only the divergence, what rounding the logits to half precision leaves of their difference.
    unit = 1e-3 if dtype == torch.float16 else 1e-2
    for rows, bar in ((torch.arange(100) % 3 > 0, 2 * unit), (torch.arange(100) % 3 == 0, 20 * unit)):
        found = gradient(dtype, 65_536)[rows]
        assert (found - expected[rows]).norm() < bar * expected[rows].norm()
