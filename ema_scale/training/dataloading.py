"""What a DefendedTrainer reads: rows prepared, their order, batches that hold what the loss asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler, SequentialSampler

from ema_scale.core.errors import UserError
from ema_scale.data.collate import ChatCollator, OtherCollator
from ema_scale.data.packing import is_packed
from ema_scale.data.rows import LEARNED
from ema_scale.models.sharding import weights_are_sharded
from ema_scale.training import reference_setup
from ema_scale.training.data import check_vocabulary, is_prepared, on_template, prepare_data

if TYPE_CHECKING:
    from ema_scale.core.records import DataReport
    from ema_scale.defenses.base import Defense
    from ema_scale.defenses.row_groups import RowGroups
    from ema_scale.training.forward import DefendedForward


class DataMixin:
    """Mixed into the Trainer in front of transformers' own ways with data sets, which know token ids alone."""

    args: Any
    state: Any
    model: Any
    accelerator: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    is_in_train: bool
    # Under DeepSpeed: what was prepared has no optimizer.
    evaluated_first: bool = False
    processing_class: Any
    train_dataset: Any
    defenses: Sequence[Defense]
    parts: RowGroups
    data_report: DataReport
    defended: DefendedForward
    _preparing: dict[str, Any]

    # ---- batches ----

    def _collator(self, given: Any, args: Any, model: Any, tokenizer: Any, rows: Any) -> Any:
        """Ours, or the one that was given, made to carry what the loss asks for."""
        if given is None:
            flash = "flash" in str(getattr(model.get_base_model().config, "_attn_implementation", ""))
            joined = flash and is_packed(rows)
            multiple = None if joined else getattr(args, "pad_to_multiple_of", None)  # joined rows have no padding
            return ChatCollator(tokenizer, multiple, one_sequence=joined, tags=self.parts.tags)
        if isinstance(given, ChatCollator):
            return dataclasses.replace(given, tags=self.parts.tags)
        return OtherCollator(given, bool(self._told_apart))

    @property
    def _told_apart(self) -> list[str]:
        """Parts of the mix that some rows' loss depends on: those that a term looks at, and those not learned."""
        return sorted(self.parts.looked_at | ({*self.data_report.rows} - {*LEARNED}))

    @cached_property
    def _needed(self) -> dict[str, str]:
        """Of a batch: the tensors that the loss cannot do without, and what for; the same for every batch."""
        needed = {"input_ids": "every batch", "labels": "the loss"}
        if parts := self._told_apart:
            needed["tags"] = f"the part {parts[0]} of the rows"
        if kinds := on_template(self.defenses):
            needed["template"] = f"{kinds[0]}: scope template"
        return needed

    def _check_batch(self, batch: Mapping[str, Any]) -> None:
        """Raises UserError for a batch without a tensor by which rows or tokens are told apart: all would be learned,
        and terms on some of them be 0, without a word."""
        for name, what in self._needed.items():
            if batch.get(name) is None:
                raise UserError(
                    f"data_collator: found a batch without {name}, which {what} needs; leave it out, or extend "
                    "ema_scale.data.collate.ChatCollator"
                )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. Raises UserError before training where a model can be prepared with its optimizer alone: under
        FSDP, and under DeepSpeed but for ZeRO-3, which after that cannot train."""
        first = not self.is_in_train and not self.accelerator._models
        if first and (self.is_fsdp_enabled or (self.is_deepspeed_enabled and not weights_are_sharded())):
            raise UserError("under FSDP and ZeRO-1 and -2 a model is prepared for training: train first, then evaluate")
        self.evaluated_first |= first and self.is_deepspeed_enabled
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; a reference that nothing has trained beside yet is put in place, on every process alike."""
        reference_setup.place_reference(self.defended.reference, self.accelerator)
        return super().prediction_step(*args, **kwargs)  # type: ignore[misc]

    # ---- rows ----

    def _prepared_for_evaluation(self, dataset: Any) -> Any:
        """Rows as training rows are prepared, apart, and without what defenses mix in or write into them."""
        if isinstance(dataset, dict):
            return {name: self._prepared_for_evaluation(one) for name, one in dataset.items()}
        if dataset is None or (is_prepared(dataset) and not hasattr(dataset, "__len__")):  # a stream
            return dataset
        kept = [d for d in self.defenses if not d.changes_rows]
        prepared, report = prepare_data(dataset, kept, self.processing_class, **self._preparing)
        self._check_tags(report)
        check_vocabulary(prepared, self.processing_class, self.model)
        return prepared

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.evaluate, of rows such as training takes, too."""
        if not isinstance(eval_dataset, str):  # of these, a name
            eval_dataset = self._prepared_for_evaluation(eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[misc]

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.predict, of rows such as training takes, too: the loss, since logits are never formed."""
        return super().predict(self._prepared_for_evaluation(test_dataset), *args, **kwargs)  # type: ignore[misc]

    def _check_tags(self, report: DataReport) -> None:
        """Raises UserError for a column tag that is somebody's own."""
        for tag in report.rows:
            if tag not in self.parts.tags:
                raise UserError(
                    f"column tag: found {tag!r}, expected {', '.join(self.parts.tags)}, by which parts of the mix are "
                    "known; rename a column of that name which says something else"
                )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        if args.train_sampling_strategy == "sequential":
            return SequentialSampler(dataset)
        lengths = list(dataset["length"]) if args.train_sampling_strategy == "group_by_length" else None
        return EpochSampler(
            len(dataset),
            seed=args.seed if args.data_seed is None else args.data_seed,
            epoch=lambda: int((self.state.epoch or 0) + 1e-6),
            rows_per_step=args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes,
            lengths=lengths,
            kinds=self._kinds(dataset),
        )

    def _kinds(self, dataset: Any) -> list[int] | None:
        apart = sorted(self.parts.looked_at)
        if "tag" not in (getattr(dataset, "column_names", None) or ()) or not apart:
            return None
        return [apart.index(tag) + 1 if tag in apart else 0 for tag in dataset["tag"]]


class EpochSampler(Sampler[int]):
    """Shuffles by (seed, epoch) alone; with `lengths`, rows of one optimizer step have similar lengths.

    Grouping: a random permutation is cut into pools of 50 steps, each pool is sorted by length and cut into
    steps, the steps are shuffled; the step with the longest row comes first, so that memory runs out at once
    or never. transformers' own sampler draws from the global generator, which a resumed second epoch does not
    repeat, and groups by one process's rows, which ties the order to the number of processes.

    kinds: rows that some loss term looks at apart from the others have a number of their own; each kind is then spread
    evenly over the steps, so that every step has its share of it (give or take a row), and a term on it its strength.
    Within a kind the order is as random as without.

    rows_per_step: rows of one optimizer step on all processes. epoch: asked at the start of each pass.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int,
        epoch: Callable[[], int],
        rows_per_step: int,
        lengths: Sequence[int] | None = None,
        kinds: Sequence[int] | None = None,
    ) -> None:
        self.count = count
        self.seed = seed
        self.epoch = epoch
        self.rows_per_step = rows_per_step
        self.lengths = lengths
        self.kinds = kinds

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        order = self._spread(torch.randperm(self.count, generator=generator).tolist())
        if self.lengths is None:
            return iter(order)
        lengths = self.lengths
        steps: list[list[int]] = []
        pool = 50 * self.rows_per_step
        for start in range(0, self.count, pool):
            rows = self._spread(sorted(order[start : start + pool], key=lambda i: lengths[i], reverse=True))
            steps += [rows[i : i + self.rows_per_step] for i in range(0, len(rows), self.rows_per_step)]
        # A step that is not full must stay last, or it would shift the borders of all steps after it.
        tail = [steps.pop()] if len(steps[-1]) < self.rows_per_step else []
        steps = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()] if steps else []
        longest = max(range(len(steps)), key=lambda i: max(lengths[row] for row in steps[i]), default=None)
        if longest:
            steps[0], steps[longest] = steps[longest], steps[0]
        return (row for step in steps + tail for row in step)

    def _spread(self, order: list[int]) -> list[int]:
        """The same rows with each kind in its own order, one of a kind of n after every len(order) / n."""
        if self.kinds is None:
            return order
        members: dict[int, list[int]] = {}
        for row in order:
            members.setdefault(self.kinds[row], []).append(row)
        # The j-th of n stands in the middle of the j-th n-th; the sort is stable, and the order so the same everywhere.
        placed = [((j + 0.5) / len(rows), row) for _, rows in sorted(members.items()) for j, row in enumerate(rows)]
        return [row for _, row in sorted(placed, key=lambda pair: pair[0])]
