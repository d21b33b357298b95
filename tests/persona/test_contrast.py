"""The difference of means, how it separates rows of other questions, and which layer is recommended."""

import pytest
import torch

from ema_scale.core.errors import UserError
from ema_scale.persona.contrast import LayerReading, difference, read_layers, recommend


def sides(gaps, rows=200, hidden=8, seed=0):
    """Standard normal states [rows, layers, H]; the positive ones of layer k are moved by gaps[k] along one axis."""
    generator = torch.Generator().manual_seed(seed)
    negative, positive = torch.randn(2, rows, len(gaps), hidden, generator=generator)
    positive[:, :, 3] += torch.tensor(gaps)
    asked = [f"question {i % 20}" for i in range(rows)]
    return positive, negative, asked


def test_readings_measure_the_gap_in_standard_deviations():
    positive, negative, asked = sides([0.0, 1.0, 3.0])
    none, small, large = read_layers(positive, negative, asked, asked)
    assert (large.cohens_d, small.cohens_d) == (pytest.approx(3.0, abs=0.4), pytest.approx(1.0, abs=0.35))
    assert large.auc == pytest.approx(0.983, abs=0.02)  # Phi(3 / sqrt 2)
    assert none.auc == pytest.approx(0.5, abs=0.1) and abs(none.cohens_d) < 0.4
    vectors = difference(positive, negative)
    torch.testing.assert_close(vectors[2, 3], torch.tensor(3.0), rtol=0, atol=0.4)
    assert large.norm == pytest.approx(float(vectors[2].norm())) and large.layer == 2
    assert large.residual_norm == pytest.approx(float(torch.cat([positive, negative])[:, 2].norm(dim=-1).mean()))


def test_the_separation_is_held_out():
    """Each question moves its rows along an axis of its own: within a question all is told apart, beyond it nothing."""
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 40, 1, 40, generator=generator)
    for i in range(40):
        positive[i, 0, i % 20] += 30.0
    asked = [f"{i % 20:02d}" for i in range(40)]
    (reading,) = read_layers(positive, negative, asked, asked)
    assert reading.auc < 0.8
    v = difference(positive, negative)[0]
    assert ((positive[:, 0] @ v)[:, None] > (negative[:, 0] @ v)[None]).float().mean() > 0.99


def test_the_recommended_layer_is_in_the_middle():
    def readings(*ds):
        return [LayerReading(i, 1.0, 1.0, 1.0, d) for i, d in enumerate(ds)]

    assert recommend(readings(9, 1, 2, 3, 9)) == 3
    assert recommend(readings(9, 8, 2, 3, 9, 1, 1, 9, 9)) == 4
    assert recommend(readings(5, 1)) == 1


def test_too_few_rows_are_refused():
    positive, negative, asked = sides([1.0], rows=3)
    with pytest.raises(UserError, match="3 positive and 3 negative rows over 3 questions"):
        read_layers(positive, negative, asked, asked)
