"""The fused loss holds as many logits at once as a plan counts, and its chunk is what the memory has room for."""

import itertools

import pytest
import torch

from benchmarks.allocated import changes
from benchmarks.loss import FULL, MEMORY_LIMIT
from ema_scale.defenses.ceiling import excess
from ema_scale.models.head import Head
from ema_scale.training.chunk_size import CROSS_ENTROPY, chunk_tokens, live_buffers
from ema_scale.training.loss import LossTerm, fused_loss

DIRECTIONS = ["policy_reference", "reference_policy", "jensen_shannon", excess]
VOCABULARY, HIDDEN, CHUNK = 2000, 8, 64
ONE = [[(direction, t)] for direction in DIRECTIONS for t in (1.0, 2.0)]
SOME = [("policy_reference", 1.0), ("jensen_shannon", 2.0), (excess, 1.0)]
TWO = [*map(list, itertools.product(SOME, repeat=2)), [("policy_reference", 2.0)] * 3]


def buffers(asked, head_dtype, tokens=3 * CHUNK, softcap=None):
    """The most of torch's allocator in one call and its backward, in [CHUNK, VOCABULARY] float32 buffers."""
    made = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(tokens, HIDDEN, generator=made).to(head_dtype) for _ in range(2))
    head = Head(torch.randn(VOCABULARY, HIDDEN, generator=made).to(head_dtype), None, 0.5, softcap)
    labels = torch.randint(VOCABULARY, (tokens,), generator=made)
    weights = torch.full((tokens,), 1 / tokens)
    weights[: CHUNK + 5] = 0  # tokens without a cross-entropy, in chunks of their own
    terms = [LossTerm(torch.ones(tokens) / tokens, torch.ones(tokens, dtype=torch.bool), *term) for term in asked]
    policy.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        fused_loss(policy, reference, head, labels, weights, terms, chunk=CHUNK).loss.backward()
    most = max(itertools.accumulate(changes(profiler)))
    return live_buffers(terms), most / (4 * CHUNK * VOCABULARY)


def named(terms):
    """An id that is the same in every process, as a function's address is not."""
    return " + ".join(f"{getattr(measure, '__name__', measure)} at {temperature}" for measure, temperature in terms)


@pytest.mark.parametrize("asked", [[], *ONE, *TWO], ids=named)
@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, None), (torch.float32, 3.0), (torch.bfloat16, None)])
def test_as_many_logits_are_alive_as_a_plan_counts(asked, dtype, softcap):
    counted, found = buffers(asked, dtype, softcap=softcap)
    # What is not of the vocabulary's size is a hundredth of a buffer here; an earlier chunk's would be a whole one.
    assert counted <= found < counted + 0.1


@pytest.mark.parametrize("asked", [*ONE, *TWO], ids=named)
def test_a_7bs_head_stays_under_the_memory_bar_on_a_gpu(asked):
    count = live_buffers([LossTerm(torch.ones(1), torch.ones(1, dtype=torch.bool), *term) for term in asked])
    chunk = chunk_tokens(FULL.vocab, count, cuda=True)
    gradient = 2 * FULL.tokens * FULL.hidden
    # The gradient, once as a float32 product in backward, and hidden states of the chunk; the chunk has gone by then.
    assert 4 * chunk * FULL.vocab * count + gradient + 10 * chunk * FULL.hidden < 0.9 * MEMORY_LIMIT
    assert chunk >= 2 * 128, "and reading the head is not what takes the time"


def test_fewer_buffers_make_longer_chunks():
    assert chunk_tokens(152_000, CROSS_ENTROPY, cuda=True) > chunk_tokens(152_000, 6, cuda=True)
    assert chunk_tokens(152_000, 6, cuda=False) == 128
    assert chunk_tokens(32_000, 5, cuda=True, bytes_each=8) == chunk_tokens(64_000, 5, cuda=True) > 128
