"""Model-FLOP utilisation of a run: what the policy's tokens need, of what the GPUs could do (PaLM, arXiv 2204.02311,
appendix B). The reference's forward and what checkpointing computes again do not count as done."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from ema_scale.chat.packing import lengths_of
from ema_scale.training.flops import flops, peak_flops

ROWS = 1000  # looked at


def device_peak() -> float | None:
    """bfloat16 operations a second of this process's GPU; None without one, or for one that is not known."""
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def utilisation_per_token(model: Any, dataset: Any, processes: int) -> float | None:
    """Utilisation at one token a second, all processes together; times tokens a second it is that of the run.

    dataset: tokenized rows, of which the first 1,000 tell how long rows are and how many tokens are learned. None where
    the device's peak is not known, or rows are not.
    """
    peak = device_peak()
    rows = list(islice(dataset or (), ROWS))
    if peak is None or not rows:
        return None
    lengths = [n for row in rows for n in lengths_of(row)]
    tokens = sum(lengths)
    learned = sum(label != -100 for row in rows for label in row["labels"])
    context = sum(n * n for n in lengths) / tokens / 2
    return flops(model, context, labelled=learned / tokens).training / (peak * processes)
