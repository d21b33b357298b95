"""Optimizer state put back where the optimizer looks for it."""

from pathlib import Path

import torch

from ema_scale.training.checkpointing import TrainedState


def test_the_count_of_steps_lies_where_torch_s_own_loading_puts_it():
    """On another device than the CPU, which meta is: a fused or capturable step refuses a count on the CPU."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(3)))
    flags: tuple[dict[str, bool], ...] = ({}, {"fused": True}, {"capturable": True})
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved, theirs = TrainedState(model, optimizer).read(), optimizer.state_dict()

    meta = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False, device="meta") for _ in range(3)))
    ours = torch.optim.AdamW([{"params": [p]} for p in meta.parameters()])
    for groups in (ours.param_groups, theirs["param_groups"]):
        for group, flag in zip(groups, flags, strict=True):  # steps are taken so on a GPU alone
            group.update(flag)
    TrainedState(meta, ours).write(saved, Path("checkpoint"))
    found = [{k: (v.device.type, v.dtype) for k, v in ours.state[p].items()} for p in meta.parameters()]
    ours.load_state_dict(theirs)
    expected = [{k: (v.device.type, v.dtype) for k, v in ours.state[p].items()} for p in meta.parameters()]
    assert found == expected
    assert [state["step"][0] for state in found] == ["cpu", "meta", "meta"]


def test_a_count_that_is_put_back_is_not_the_checkpoint_s_own():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = TrainedState(model, optimizer)
    saved = state.read()
    state.write(saved, Path("checkpoint"))
    optimizer.step()
    assert float(saved["weight|step"]) == 1 and float(optimizer.state[model.weight]["step"]) == 2
