"""What test_agreement.py has two processes do: each scenario shows them different things and returns what
came of it.

A scenario that they do not agree on ends at the time-out of a collective.
"""

import os
import signal
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock
from transformers import TrainerCallback

from ema_scale.core.errors import UserError
from ema_scale.defenses import KL, LDIFS, GradientRouting, SafeGrad
from ema_scale.reference.cached import Cached
from ema_scale.reference.layerwise import Layerwise
from ema_scale.training.distributed import destroy_process_group_at_exit
from ema_scale.training.run import stop_on_signals
from tests.training.helpers import adapter_weights, make_trainer, tiny_peft, token_rows

RANK = int(os.environ.get("RANK", "0"))
ROWS = token_rows(16)


def made(folder, **options):
    model = tiny_peft(spread=options.pop("spread", 0.3))
    rows, defenses = options.pop("rows", ROWS), options.pop("defenses", [KL(0.5)])
    arguments = {"per_device_train_batch_size": 2, "drift_every": 0, **options}
    return make_trainer(folder, model, rows, defenses, **arguments)


def use_cache(folder):
    os.environ["EMA_CACHE"] = str(folder)


def a_signal_inside_a_step_on_one_process(folder):
    """After the step's beginning, where the processes speak to each other, and a step before the other gets it."""

    class Signals(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if RANK == 1 and state.global_step == 1:
                signal.raise_signal(signal.SIGUSR1)

    trainer = made(folder, max_steps=5, callbacks=[Signals()])
    with stop_on_signals(trainer.stop):
        trainer.train()
    saved = sorted(p.name for p in folder.glob("checkpoint-*"))
    return [trainer.state.global_step, trainer.stop.agreed, saved]


def a_stop_on_one_process_while_the_cache_is_filled(folder):
    use_cache(folder)
    trainer = made(folder, reference="cached")
    trainer.stop.requested = RANK == 1
    try:
        trainer.train()
    except KeyboardInterrupt:
        dist.barrier()
        return ["stopped", len(list(folder.glob("reference/*/last/*.json")))]


def a_stop_on_one_process_while_another_run_fills_the_cache(folder):
    use_cache(folder)
    trainer = made(folder, reference="cached")
    trainer.stop.requested = RANK == 1
    place = trainer.defended.reference.folder
    place.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    other = FileLock(place / ".lock")
    if RANK == 0:
        other.acquire()
    dist.barrier()
    try:
        trainer.train()
    except KeyboardInterrupt:
        other.release()
        return ["stopped", len(list(place.glob("last/*.json")))]


def a_folder_for_each_process(folder):
    """One has a whole cache, the other nothing."""
    use_cache(folder / "0")
    made(folder, reference="cached", max_steps=1).train()
    use_cache(folder / str(RANK))
    compute, Cached.compute = Cached.compute, None  # type: ignore[method-assign]  # no process computes
    try:
        made(folder, reference="cached")
    except UserError as error:
        refused = str(error)
    finally:
        Cached.compute = compute  # type: ignore[method-assign]
    trainer = made(folder, reference="auto", max_steps=-1, num_train_epochs=2)
    trainer.train()
    choice = trainer.reference_choice
    return [refused.replace(str(folder / str(RANK)), "FOLDER"), choice.way, "all processes share" in choice.why]


def a_check_that_fails_on_one_process(folder):
    trainer = made(folder, reference="two_stream")
    reference, told = trainer.defended.reference, []
    trainer.on_reference_changed = lambda: told.append(trainer.reference_choice.way)
    reference._fall_back = True
    alone = reference._adapter_off.reference_alone
    if RANK == 1:
        reference._adapter_off.reference_alone = lambda *args: 1.1 * alone(*args)
    trainer.train()
    choice = trainer.reference_choice
    return [isinstance(reference, Layerwise) and reference.fell_back, choice.way, choice.why, told]


def uneven_epochs(folder):
    """Three micro-batches a process and epoch in steps of two, of which some hold no assistant token."""
    trainer = made(folder, rows=uneven_rows(), gradient_accumulation_steps=2, **UNEVEN)
    trainer.train()
    if RANK == 0:
        torch.save([adapter_weights(trainer.model), logged(trainer)], folder / "uneven.pt")
    return [trainer.state.global_step]


UNEVEN = {
    "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 1, "defenses": [KL(0.5), LDIFS(0.1, count=2)]
}  # fmt: skip


JOINED = {"max_steps": 2, "max_grad_norm": 0.5, "logging_steps": 1}


def joining(folder, **options):
    """A trainer with a defense that joins gradients, and one that routes rows; all have rows of their own."""
    SafeGrad.changes_rows = GradientRouting.changes_rows = False  # type: ignore[method-assign, assignment]  # as if mixed in
    rows = token_rows(8, seed=1)
    rows = rows.remove_columns("tag").add_column("tag", ["task", "prompts", "task", "bad"] * 2)
    defenses = [SafeGrad(0.7, "unused"), GradientRouting("unused")]
    return made(folder, rows=rows, defenses=defenses, **{**JOINED, **options})


def gradients_that_are_joined(folder):
    """Each process sees other rows; accumulated over two batches of one row."""
    trainer = joining(folder, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "ce" in row]
    if RANK == 0:
        torch.save([adapter_weights(trainer.model), rows], folder / "joined.pt")
    return [trainer.state.global_step]


def uneven_rows():
    rows = token_rows(6)
    silent = [[-100] * len(row["labels"]) if i % 2 else row["labels"] for i, row in enumerate(rows)]
    return rows.remove_columns("labels").add_column("labels", silent)


def logged(trainer):
    names = ("loss", "ce", "kl", "ldifs", "grad_norm")
    return [[row[name] for name in names] for row in trainer.state.log_history if "ce" in row]


SCENARIOS = (
    a_signal_inside_a_step_on_one_process,
    a_stop_on_one_process_while_the_cache_is_filled,
    a_stop_on_one_process_while_another_run_fills_the_cache,
    a_folder_for_each_process,
    a_check_that_fails_on_one_process,
    uneven_epochs,
    gradients_that_are_joined,
)


def all_of_them(folder):
    """Scenario -> what it came to on this process."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=int(os.environ["EMA_TIMEOUT_SECONDS"])))
    destroy_process_group_at_exit()
    found = {}
    for scenario in SCENARIOS:
        place = Path(folder) / scenario.__name__
        place.mkdir(exist_ok=True)
        found[scenario.__name__] = scenario(place)
        dist.barrier()
    return found
