"""Which positions each scope covers."""

import torch

from ema_scale.data.rows import TAGS
from ema_scale.defenses import PenaltyInputs
from ema_scale.defenses.row_groups import token_sets
from ema_scale.defenses.terms import TokenSet
from ema_scale.training.token_masks import count_tokens, targets, token_masks

#                         prompt | assistant | end of turn | padding
LABELS = torch.tensor([[-100, -100, 7, 8, -100, -100], [-100, 5, -100, 6, 9, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])


def named(token_set):
    """As the tables below write it: `all`, `all of bad`."""
    return token_set.scope if token_set.part == "learned" else f"{token_set.scope} of {token_set.part}"


def masks_of(mask, labels, tags=None, positions=None, template=None):
    batch = {"input_ids": labels, "attention_mask": mask, "labels": labels}
    batch |= {"tags": tags, "position_ids": positions, "template": template}
    return {named(token_set): value for token_set, value in token_masks(batch).items()}


def test_scopes():
    masks = {k: v.int().tolist() for k, v in masks_of(MASK, LABELS).items()}
    assert masks["all"] == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert masks["assistant"] == [[0, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 0]]
    assert masks["prompt"] == [[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert targets(LABELS)[0].tolist() == [-100, 7, 8, -100, -100, -100]


def counted(*batches):
    counts = torch.stack([count_tokens(token_masks(batch)) for batch in batches]).sum(0)
    return dict(zip(map(named, token_sets()), counts.tolist(), strict=True))


def learned(*batches):
    counts = counted(*batches)
    assert all(counts[f"{s} of task"] == counts[s] for s in ("all", "assistant", "prompt")), (
        "no tags: all is the task's"
    )
    return [counts[s] for s in ("all", "assistant", "prompt")]


def test_counts_add_over_batches():
    batch = {"input_ids": LABELS, "labels": LABELS, "attention_mask": MASK}
    assert learned(batch, batch) == [22, 12, 6]
    without_mask = {"input_ids": LABELS, "labels": LABELS}
    assert learned(without_mask) == [12, 6, 4]


def test_parts_are_rows_by_tag_and_learned_ones_are_the_task_s_and_safe_ones():
    labels, mask = LABELS[:1].repeat(4, 1), MASK[:1].repeat(4, 1)
    tags = torch.tensor([TAGS.index(tag) for tag in ("bad", "task", "prompts", "safe")])
    masks = masks_of(mask, labels, tags)
    assert set(masks) == set(map(named, token_sets()))
    for part, rows in {"learned": [1, 3], "task": [1], "safe": [3], "prompts": [2], "bad": [0]}.items():
        for scope in ("all", "assistant", "prompt"):
            plain = masks_of(mask, labels)[scope]
            where = masks[named(TokenSet(scope, part))]
            assert torch.equal(where[rows], plain[rows]) and where.sum() == plain[rows].sum()
    counts = counted({"input_ids": labels, "labels": labels, "attention_mask": mask, "tags": tags})
    assert counts["assistant"] == 4 and counts["assistant of bad"] == 2 and counts["all of prompts"] == 5


def test_the_template_s_tokens_are_a_scope_of_their_own():
    template = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 1]])
    masks = masks_of(MASK, LABELS, None, None, template)
    assert masks["template"].int().tolist() == [[1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]]
    batch = {"input_ids": LABELS, "labels": LABELS, "attention_mask": MASK, "template": template}
    assert counted(batch)["template"] == counted(batch)["template of task"] == 5
    assert not masks_of(MASK, LABELS)["template"].any()


def test_packed_rows_are_cut_where_positions_start_again():
    labels = torch.tensor([[-100, 7, 8, 5, -100, 6, -100]])
    mask, positions = torch.tensor([[1, 1, 1, 1, 1, 1, 0]]), torch.tensor([[0, 1, 2, 0, 1, 2, 0]])
    tags = torch.tensor([[TAGS.index("bad")] * 3 + [TAGS.index("task")] * 4])
    masks = {k: v.int().tolist()[0] for k, v in masks_of(mask, labels, tags, positions).items()}
    assert targets(labels, positions).tolist() == [[7, 8, -100, -100, 6, -100, -100]]
    assert masks["assistant of bad"] == [1, 1, 0, 0, 0, 0, 0] and masks["assistant"] == [0, 0, 0, 0, 1, 0, 0]
    assert masks["prompt of bad"] == [0] * 7 and masks["prompt of task"] == [0, 0, 0, 1, 0, 0, 0]
    assert masks["all of bad"] == [1, 1, 1, 0, 0, 0, 0] and masks["all"] == [0, 0, 0, 1, 1, 1, 0]


def test_left_padding_counts_the_same():
    flipped = {"input_ids": LABELS, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]]).repeat(2, 1)}
    labels = torch.tensor([[-100, -100, -100, 7, 8, -100]] * 2)
    assert learned({**flipped, "labels": labels}) == [10, 4, 4]


def test_the_mean_normalises_by_the_whole_step_and_ignores_what_is_outside():
    masks = token_masks({"input_ids": LABELS, "attention_mask": MASK, "labels": LABELS})
    assistant = TokenSet("assistant")
    inputs = PenaltyInputs({}, {}, MASK, LABELS, masks, {assistant: torch.tensor(12)})
    values = torch.where(masks[assistant], 2.0, float("nan"))
    assert inputs.mean(values, "assistant").item() == 6 * 2.0 / 12
