"""A term whose gradient is formed in forward: the same value and gradient, nothing kept, checkpointing or not."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ema_scale.training.state_reader import eager_gradient


def term(state):
    return torch.nn.functional.normalize(state, dim=-1).diff(dim=0).square().sum()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_equals_autograd(checkpointed):
    weight: Any = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(4, 5, dtype=torch.float64)
    calls: list[torch.Tensor] = []

    def region(x, how):
        hidden = torch.tanh(x @ weight)
        if len(calls) == 0 or how is term:  # a recomputation does not call it
            calls.append(how(hidden))
        return torch.sin(hidden)

    def run(how):
        calls.clear()
        weight.grad = None
        out = (
            checkpoint(region, inputs, how, use_reentrant=False)
            if checkpointed and how is not term
            else region(inputs, how)
        )
        (out.sum() + 3 * calls[0]).backward()
        return calls[0].item(), weight.grad.clone()

    expected, found = run(term), run(lambda state: eager_gradient(term, state))
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-12)


def test_only_the_gradient_is_kept():
    state = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        value = eager_gradient(lambda s: term(s.float()), state)
    assert saved == [] and value.requires_grad
    value.backward()
    assert state.grad.dtype == torch.bfloat16 and state.grad.abs().max() > 0


def test_without_a_gradient_or_a_value():
    state = torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        assert not eager_gradient(term, state).requires_grad
    assert not eager_gradient(lambda s: term(s.detach()), state).requires_grad
    assert eager_gradient(lambda s: None, state) is None
