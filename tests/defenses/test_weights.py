"""Weights of rows and tokens in the cross-entropy: each equals its plain formula, however a step is split."""

import math
import textwrap

import pytest
import torch
import torch.nn.functional as F

from ema_scale.core.errors import UserError
from ema_scale.defenses import DFT, KL, Antibody, StarDSS, parse
from ema_scale.defenses.row_groups import RowGroups
from ema_scale.models.directions import Directions
from ema_scale.models.head import Head
from ema_scale.training.loss import CrossEntropyFactor, LossTerm, fused_loss
from tests.defenses.one_step import Plain, assert_no_split_changes_it, assert_same_gradients, one_step, rows_with
from tests.tiny import tiny_model

TAGS = ("task", "safe", "task", "task", "safe", "task", "task", "task")


@pytest.fixture
def vector(tmp_path):
    path = tmp_path / "vector.safetensors"
    vectors = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
    Directions(vectors, {"recommended_layer": 1}).save(path)
    return str(path)


def by_label(labels):
    return (0.7 * labels.policy + 0.2 * labels.log_ratio).exp()


def by_row(labels):
    return (labels.policy - 2 * labels.reference + 1).sigmoid()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [5, 64])
def test_the_fused_loss_weighs_as_autograd_with_constants_does(softcap, chunk):
    """Per token and per row, known beforehand, and beside terms of the same and of another group."""
    g = torch.Generator().manual_seed(0)
    count, rows = 23, torch.arange(23) // 6
    policy, reference = (torch.randn(count, 8, generator=g, dtype=torch.float64) for _ in range(2))
    head = Head(torch.randn(31, 8, generator=g, dtype=torch.float64) * 0.5, None, 0.8, softcap)
    labels = torch.randint(31, (count,), generator=g)
    ce_weights = torch.rand(count, generator=g).double() * (torch.rand(count, generator=g) < 0.7)
    known = torch.rand(count, generator=g).double()
    active = [torch.rand(count, generator=g) < 0.7 for _ in range(4)]
    weights = torch.rand(count, generator=g).double()
    factors = [
        CrossEntropyFactor(active[0], by_label, reads_reference=True),
        CrossEntropyFactor(active[1], by_row, per_row=True, reads_reference=True),
    ]
    terms = [LossTerm(weights, active[2]), LossTerm(weights, active[3], "reference_policy", group=1)]

    def log_probs(x):
        logits = 0.8 * (x @ head.weight.T)
        return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)

    leaf, found = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    log_p, log_q = log_probs(leaf), log_probs(reference)
    on_label, ref_label = (x.gather(1, labels[:, None])[:, 0] for x in (log_p, log_q))
    learned = ce_weights != 0
    p, q = on_label.detach(), ref_label

    def means(x):
        return torch.stack([x[learned & (rows == r)].mean() for r in rows])

    product = torch.where(active[0], (0.7 * p + 0.2 * (p - q)).exp(), 1.0)
    product = product * torch.where(active[1], (means(p) - 2 * means(q) + 1).sigmoid(), 1.0) * known
    ce = (-on_label * ce_weights * product).sum()
    forward = ((log_p.exp() * (log_p - log_q)).sum(-1) * weights * active[2]).sum()
    backward = ((log_q.exp() * (log_q - log_p)).sum(-1) * weights * active[3]).sum()
    expected = [torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (ce + forward, backward)]

    result = fused_loss(
        found, reference, head, labels, ce_weights, terms, factors=factors, token_factors=known, row_ids=rows,
        chunk=chunk,
    )  # fmt: skip
    torch.testing.assert_close(result.losses, torch.stack([ce + forward, backward]), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(result.factors, product * learned, rtol=1e-11, atol=1e-12)
    for loss, gradient in zip(result.losses, expected, strict=True):
        (own,) = torch.autograd.grad(loss, found, retain_graph=True)
        torch.testing.assert_close(own, gradient, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        again = fused_loss(
            policy, reference, head, labels, ce_weights, terms, factors=factors, token_factors=known, row_ids=rows
        )
    torch.testing.assert_close(again.losses, result.losses.detach(), rtol=1e-12, atol=1e-12)


def test_a_factor_that_reads_a_reference_which_is_not_there_is_refused():
    factor = CrossEntropyFactor(torch.ones(1, dtype=torch.bool), by_row, per_row=True, reads_reference=True)
    with pytest.raises(ValueError, match="reference"):
        fused_loss(
            torch.ones(1, 2), None, Head(torch.ones(3, 2)), torch.ones(1).long(), torch.ones(1), factors=[factor]
        )


def weighted(plain, weight):
    """The sum over learned tokens of weight times cross-entropy, divided by their number."""
    return -(weight.detach() * plain.log_label)[plain.spoken].sum() / plain.spoken.sum()


@pytest.mark.parametrize("part", ["learned", "task"])
def test_dft_with_kl_is_asft(tmp_path, part):
    found, log, trainer = one_step(tmp_path, rows_with(TAGS), [DFT(part=part), KL(0.3)])
    plain = Plain(trainer)
    weight = torch.where(plain.of("task") | (part == "learned"), plain.log_label.exp(), 1.0)
    loss = weighted(plain, weight) + 0.3 * plain.kl()[plain.real].mean()
    assert math.isclose(log["loss"], loss.item(), rel_tol=2e-5)
    assert math.isclose(log["ce_weight"], weight[plain.spoken].mean().item(), rel_tol=2e-5)
    assert math.isclose(log["ce"], -plain.log_label[plain.spoken].mean().item(), rel_tol=2e-5), "and ce is unweighted"
    assert_same_gradients(found, plain.gradients(loss))


def test_dfts_gradient_is_that_of_the_probability(tmp_path):
    """Which is what the paper says of it; and it runs no reference."""
    found, _, trainer = one_step(tmp_path, rows_with(["task"] * 4), [DFT()])
    assert not DFT().needs_reference and trainer.reference_choice.why.startswith("no defense needs it")
    plain = Plain(trainer)
    assert_same_gradients(found, plain.gradients(-plain.log_label.exp()[plain.spoken].mean()))
    unweighted, log, _ = one_step(tmp_path, rows_with(["task"] * 4), [DFT(0.0)])
    assert log["ce_weight"] == 1
    assert_same_gradients(unweighted, one_step(tmp_path, rows_with(["task"] * 4), [])[0])


@pytest.mark.parametrize("model", ["policy", "reference"])
def test_antibody_is_its_formula(tmp_path, model):
    found, log, trainer = one_step(tmp_path, rows_with(TAGS), [Antibody(-5.0, 0.4, model)])
    plain = Plain(trainer)
    likelihood = plain.log_label if model == "policy" else plain.ref_label
    mean = (likelihood * plain.spoken).sum(1, keepdim=True) / plain.spoken.sum(1, keepdim=True)
    weight = torch.where(plain.of("task"), ((mean + 5.0) / 0.4).sigmoid(), 1.0).expand_as(likelihood)
    assert 0.05 < weight.min() < 0.95 and weight[:, 0].unique().numel() == 7, "one weight for each task row"
    loss = weighted(plain, weight)
    assert math.isclose(log["loss"], loss.item(), rel_tol=2e-5)
    assert_same_gradients(found, plain.gradients(loss))


def test_star_dss_is_its_formula(tmp_path, vector):
    defense = StarDSS(vector, 0.02, 0.6, 0.05)
    found, log, trainer = one_step(tmp_path, rows_with(["task"] * 5), [defense])
    plain = Plain(trainer)
    states, u = plain.reference_states[1].double(), Directions.load(vector).unit(1).double()
    cosine = F.cosine_similarity(states, u, dim=-1) * plain.spoken
    so_far = cosine.cumsum(1) / plain.spoken.cumsum(1).clamp_min(1)
    safety = ((0.02 - so_far) / 0.05).sigmoid()
    assert safety[plain.spoken].min() < 0.4 and safety[plain.spoken].max() > 0.6
    kl = plain.kl()[plain.spoken]
    loss = weighted(plain, safety) + 0.6 * ((1 - safety[plain.spoken]) * kl).mean()
    assert math.isclose(log["loss"], loss.item(), rel_tol=2e-5)
    assert math.isclose(log["star_dss"], kl.mean().item(), rel_tol=2e-5), "read without its weights"
    assert_same_gradients(found, plain.gradients(loss))


def test_no_split_changes_weights(tmp_path, vector, monkeypatch):
    monkeypatch.setenv("EMA_CACHE", str(tmp_path / "cache"))
    defenses = [DFT(0.5), Antibody(-5.0, 0.4, part="learned"), StarDSS(vector, 0.02, 0.6, 0.05), KL(0.2)]
    assert_no_split_changes_it(tmp_path, rows_with(TAGS), defenses, ["loss", "ce", "ce_weight", "star_dss", "kl"])


def test_every_way_of_the_reference_gives_the_same_weights(tmp_path, vector, monkeypatch):
    monkeypatch.setenv("EMA_CACHE", str(tmp_path / "cache"))
    defenses = [StarDSS(vector, 0.02, 0.6, 0.05), Antibody(-5.0, 0.4, "reference", "learned")]
    first, *others = (
        one_step(tmp_path, rows_with(TAGS), defenses, reference=way, gradient_checkpointing=way == "two_stream")[0]
        for way in ("adapter_off", "two_stream", "cached")
    )
    for other in others:
        assert_same_gradients(other, first)


PLUG_IN = """
    from ema_scale.defenses import Defense, LabelWeight

    class Focal(Defense):
        '''(1 - p)^2, the focal loss, with a constant weight; and twice as much on odd positions.'''
        def label_weights(self):
            return (LabelWeight(lambda labels: (1 - labels.policy.exp()).square()),)

        def token_weights(self, inputs):
            import torch
            places = torch.arange(inputs.labels.shape[1]).expand_as(inputs.labels)
            return {"ce": 1.0 + places % 2}
"""


def test_a_file_of_ones_own_weighs_tokens(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(PLUG_IN))
    (defense,) = parse([f"{file}:Focal"])
    found, log, trainer = one_step(tmp_path, rows_with(["task"] * 4), [defense])
    plain = Plain(trainer)
    twice = 1.0 + torch.arange(plain.spoken.shape[1]) % 2
    loss = weighted(plain, (1 - plain.log_label.exp()).square() * twice)
    assert math.isclose(log["loss"], loss.item(), rel_tol=2e-5)
    assert_same_gradients(found, plain.gradients(loss))


def test_what_does_not_fit_is_refused(tmp_path, vector):
    with pytest.raises(UserError, match="made for 2 layers of hidden size 64, the model has 3 of 64"):
        StarDSS(vector, 0.1).attach(tiny_model(layers=3))
    with pytest.raises(UserError, match="expected 0 to 2"):
        StarDSS(vector, 0.1, at_layer=3).attach(tiny_model())
    with pytest.raises(UserError, match="refusal: expected a number of at most 0; found 1"):
        Antibody(1.0)
    with pytest.raises(UserError, match=r"none\.safetensors: no such file"):
        one_step(tmp_path, rows_with(["task"] * 2), [StarDSS("none.safetensors", 0.1)])
    assert RowGroups.of([DFT(part="safe")]).separate_tags == {"safe"}
