"""Which positions each scope covers."""

import torch

from ema_scale.defenses import Streams
from ema_scale.training.scopes import count_tokens, scope_masks, targets

#                         prompt | assistant | end of turn | padding
LABELS = torch.tensor([[-100, -100, 7, 8, -100, -100], [-100, 5, -100, 6, 9, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])


def test_scopes():
    masks = {k: v.int().tolist() for k, v in scope_masks(MASK, LABELS).items()}
    assert masks["all"] == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert masks["assistant"] == [[0, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 0]]
    assert masks["prompt"] == [[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert targets(LABELS)[0].tolist() == [-100, 7, 8, -100, -100, -100]


def test_counts_add_over_batches():
    batch = {"input_ids": LABELS, "labels": LABELS, "attention_mask": MASK}
    assert count_tokens([batch, batch]).tolist() == [22, 12, 6]
    without_mask = {"input_ids": LABELS, "labels": LABELS}
    assert count_tokens([without_mask]).tolist() == [12, 6, 4]


def test_left_padding_counts_the_same():
    flipped = {"input_ids": LABELS, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]]).repeat(2, 1)}
    labels = torch.tensor([[-100, -100, -100, 7, 8, -100]] * 2)
    assert count_tokens([{**flipped, "labels": labels}]).tolist() == [10, 4, 4]


def test_streams_mean_normalises_by_the_whole_step_and_ignores_what_is_outside():
    masks = scope_masks(MASK, LABELS)
    streams = Streams({}, {}, MASK, LABELS, masks, {"assistant": torch.tensor(12)})
    values = torch.where(masks["assistant"], 2.0, float("nan"))
    assert streams.mean(values, "assistant").item() == 6 * 2.0 / 12
