"""What a DefendedTrainer reads: rows prepared, their order, batches that hold what the loss asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch.utils.data import Sampler, SequentialSampler

from ema_scale.chat.collate import ChatCollator, OtherCollator
from ema_scale.chat.packing import is_packed
from ema_scale.chat.rows import LEARNED
from ema_scale.errors import UserError
from ema_scale.reference.sharding import weights_are_sharded
from ema_scale.training import references
from ema_scale.training.data import check_vocabulary, on_template, prepare
from ema_scale.training.sampler import EpochSampler
from ema_scale.training.tokenized import is_prepared

if TYPE_CHECKING:
    from ema_scale.defenses.base import Defense
    from ema_scale.defenses.parts import Parts
    from ema_scale.training.data import DataReport
    from ema_scale.training.forward import DefendedForward


class Feeding:
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
    parts: Parts
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
                    "ema_scale.chat.collate.ChatCollator"
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
        references.place(self.defended.reference, self.accelerator)
        return super().prediction_step(*args, **kwargs)  # type: ignore[misc]

    # ---- rows ----

    def _prepared_for_evaluation(self, dataset: Any) -> Any:
        """Rows as training rows are prepared, apart, and without what defenses mix in or write into them."""
        if isinstance(dataset, dict):
            return {name: self._prepared_for_evaluation(one) for name, one in dataset.items()}
        if dataset is None or (is_prepared(dataset) and not hasattr(dataset, "__len__")):  # a stream
            return dataset
        kept = [d for d in self.defenses if not d.changes_rows]
        prepared, report = prepare(dataset, kept, self.processing_class, **self._preparing)
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
