"""Operations counted against torch's own counter on real forwards and backwards."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ema_scale.models.flops import flops, peak_flops
from tests.training.helpers import tiny_peft

TOKENS = 24


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
def test_operations_are_those_that_torch_counts(arch):
    model = tiny_peft(arch, spread=0.1, attn_implementation="eager")
    expected = flops(model, TOKENS)  # eager attention multiplies with the masked positions, too
    ids = torch.arange(4, 4 + TOKENS)[None]
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=ids, labels=ids).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    with model.disable_adapter(), torch.no_grad(), FlopCounterMode(display=False) as reference:
        model(input_ids=ids)
    counted = (forward.get_total_flops() / TOKENS, reference.get_total_flops() / TOKENS)
    assert counted == pytest.approx((expected.forward, expected.reference), rel=0.01)
    # The first layer's input needs no gradient, which is much of a model of two layers and nothing of a real one.
    assert 0.75 < (counted[0] + backward.get_total_flops() / TOKENS) / expected.training <= 1.01
    assert flops(model, TOKENS, labelled=0.5).head == expected.head / 2


def test_peaks_are_found_by_the_names_that_cuda_gives():
    names = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 PCIe": 756, "NVIDIA A100-SXM4-80GB": 312,
             "NVIDIA L40S": 362, "NVIDIA L4": 121, "NVIDIA GeForce RTX 4090": 165.2}  # fmt: skip
    assert {name: peak_flops(name) for name in names} == {n: pytest.approx(p * 1e12) for n, p in names.items()}
    assert [peak_flops(n) for n in ("AMD EPYC", "NVIDIA RTX A4000", "NVIDIA GeForce RTX 4090 Laptop GPU")] == [None] * 3
