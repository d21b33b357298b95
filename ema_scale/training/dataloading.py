"""What a DefendedTrainer reads: prepared rows, their order, and batches that hold what the loss needs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import PredictionOutput

from ema_scale.core.errors import UserError
from ema_scale.core.records import DataReport
from ema_scale.data.collate import ChatCollator, OtherCollator
from ema_scale.data.packing import is_packed
from ema_scale.data.report import cut_line
from ema_scale.data.rows import LEARNED
from ema_scale.defenses.base import Defense
from ema_scale.defenses.row_groups import RowGroups
from ema_scale.models.sharding import weights_are_sharded
from ema_scale.reference.cached import Cached
from ema_scale.reference.hidden_state_store import RowKeys
from ema_scale.training import reference_setup
from ema_scale.training.data import check_vocabulary, is_prepared, prepare_data, using_template
from ema_scale.training.forward import DefendedForward
from ema_scale.training.token_masks import count_tokens, pad_right, token_masks

log = logging.getLogger(__name__)


class DataMixin(Trainer):
    """The Trainer's data handling, which knows token ids alone, made to know rows, tags and token sets."""

    defenses: Sequence[Defense]
    row_groups: RowGroups
    data_report: DataReport
    defended: DefendedForward
    prepare_options: dict[str, Any]
    evaluated_first: bool = False  # under DeepSpeed: the model was prepared without an optimizer

    # ---- batches ----

    def _make_collator(self, given: Any, args: Any, model: Any, tokenizer: Any, rows: Any) -> Any:
        """Our collator, or the given one made to carry what the loss needs."""
        tags = self.row_groups.tags
        if given is None:
            flash = "flash" in str(getattr(model.get_base_model().config, "_attn_implementation", ""))
            joined = flash and is_packed(rows)
            multiple = None if joined else getattr(args, "pad_to_multiple_of", None)  # joined rows have no padding
            return ChatCollator(tokenizer, multiple, one_sequence=joined, tags=tags)
        if isinstance(given, ChatCollator):
            return dataclasses.replace(given, tags=tags)
        return OtherCollator(given, bool(self._needed_tags))

    @property
    def _needed_tags(self) -> list[str]:
        """Tags that the loss depends on: those that a term looks at apart, and those that are not learned."""
        return sorted(self.row_groups.separate_tags | ({*self.data_report.rows} - {*LEARNED}))

    @cached_property
    def _required_tensors(self) -> dict[str, str]:
        """Tensors that every batch must hold -> what needs them."""
        required = {"input_ids": "every batch", "labels": "the loss"}
        if tags := self._needed_tags:
            required["tags"] = f"the part {tags[0]} of the rows"
        if kinds := using_template(self.defenses):
            required["template"] = kinds[0]
        return required

    def prepare_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as `compute_loss` takes it: padded on the right, with token_masks and, for a cached reference, keys.

        Raises UserError for a batch without a required tensor: all its tokens would be learned, and terms on some of
        them would be 0, with no message.
        """
        for name, user in self._required_tensors.items():
            if batch.get(name) is None:
                raise UserError(
                    f"data_collator: found a batch without {name}, which {user} needs; leave it out, or extend "
                    "ema_scale.data.collate.ChatCollator"
                )
        prepared = pad_right(batch)
        prepared["token_masks"] = token_masks(prepared, self.row_groups.tags)
        if self.is_in_train and isinstance(self.defended.reference, Cached):
            # Here, where the token counts are waited for anyway, and not once more in each forward.
            prepared["row_keys"] = RowKeys.of(prepared)
        return prepared

    def count_step_tokens(self, batches: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
        """int64 [token sets]: tokens of prepared batches, on this process."""
        total = torch.zeros(len(self.row_groups.token_sets), dtype=torch.int64, device=device)
        for batch in batches:
            total += count_tokens(batch["token_masks"]).to(device)
        return total

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of each process's values. A collective."""
        if self.accelerator.num_processes == 1:
            return values
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """int64 [token sets]: tokens of these batches on all processes.

        transformers counts labels alone; a loss term may cover other tokens.
        """
        return self.sum_over_ranks(self.count_step_tokens(batch_samples, device))

    # ---- evaluation ----

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. Raises UserError before training if a model can only be prepared with its optimizer.

        That is so under FSDP, ZeRO-1 and ZeRO-2. Under ZeRO-3 it can be evaluated first, but then not trained.
        """
        first = not self.is_in_train and not self.accelerator._models
        if first and (self.is_fsdp_enabled or (self.is_deepspeed_enabled and not weights_are_sharded())):
            raise UserError("under FSDP and ZeRO-1 and -2 a model is prepared for training: train first, then evaluate")
        self.evaluated_first |= first and self.is_deepspeed_enabled
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, on a prepared batch. Puts a second model in place if no training has done so; a collective."""
        reference_setup.place_reference(self.defended.reference, self.accelerator)
        return super().prediction_step(model, self.prepare_batch(inputs), *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As Trainer.evaluate; also takes rows such as training takes, or their file. Raises UserError for others.

        A text that names one of several eval datasets is that one.
        """
        several = self.eval_dataset
        if not (isinstance(eval_dataset, str) and isinstance(several, dict) and eval_dataset in several):
            eval_dataset = self._prepare_for_evaluation(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """As Trainer.predict; also takes rows such as training takes, or their file. Raises UserError for others.

        Gives the loss alone, in nats per assistant token, as `metrics["test_loss"]`. Logits are never formed, so
        `predictions` and `label_ids` are None.
        """
        if test_dataset is None or isinstance(test_dataset, dict):
            found = "None" if test_dataset is None else "a mapping; one row goes into a list, several sets to evaluate"
            raise UserError(f"predict: test_dataset: expected rows or their file; found {found}")
        return super().predict(self._prepare_for_evaluation(test_dataset), ignore_keys, metric_key_prefix)

    def _prepare_for_evaluation(self, dataset: Any) -> Any:
        """Rows prepared like training rows, but not packed, and without what defenses mix in or write into them."""
        if isinstance(dataset, dict):
            return {name: self._prepare_for_evaluation(rows) for name, rows in dataset.items()}
        if dataset is None or (is_prepared(dataset) and not hasattr(dataset, "__len__")):  # an iterable dataset
            return dataset
        reading = RowGroups.of([d for d in self.defenses if not d.changes_rows])
        prepared, report = prepare_data(dataset, reading, self.processing_class, **self.prepare_options)
        self._check_tags(report)
        self._warn_of_cuts("evaluation rows", report)
        check_vocabulary(prepared, self.processing_class, self.model)
        return prepared

    def _warn_of_cuts(self, what: str, report: DataReport) -> None:
        if (cut := cut_line(report)) and self.accelerator.is_main_process:
            log.warning("%s: %s", what, cut)

    # ---- rows ----

    def _check_tags(self, report: DataReport) -> None:
        """Raises UserError for a column `tag` that means something else."""
        for tag in report.rows:
            if tag not in self.row_groups.tags:
                raise UserError(
                    f"column tag: found {tag!r}, expected {', '.join(self.row_groups.tags)}, which name the parts of "
                    "the mix; rename a column of that name that means something else"
                )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        if args.train_sampling_strategy == "sequential":
            return SequentialSampler(dataset)
        rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        return EpochSampler(
            len(dataset),
            seed=args.seed if args.data_seed is None else args.data_seed,
            epoch=lambda: int((self.state.epoch or 0) + 1e-6),
            rows_per_step=rows_per_step,
            lengths=dataset["length"] if rows_per_step > args.train_batch_size else None,
            kinds=self._row_kinds(dataset),
        )

    def _row_kinds(self, dataset: Any) -> list[int] | None:
        """For each row, a number for the part that some term looks at apart, or 0."""
        parts = sorted(self.row_groups.separate_tags)
        if "tag" not in (getattr(dataset, "column_names", None) or ()) or not parts:
            return None
        return [parts.index(tag) + 1 if tag in parts else 0 for tag in dataset["tag"]]


class EpochSampler(Sampler[int]):
    """Shuffles by (seed, epoch) alone. Which rows share an optimizer step never depends on their lengths.

    transformers' own sampler draws from the global generator, which a resumed second epoch does not repeat. Its
    grouping by length puts long rows into steps of their own: safe rows that are longer than the task's would then be
    missing from most steps, and rows would weigh alike in the mean over a step's tokens.

    count: rows in the dataset.
    epoch: called at the start of each pass.
    rows_per_step: rows per optimizer step on all processes.
    lengths: if given, the rows of a step stand in the order of their lengths, longest first, so that its batches hold
        rows of similar length and little padding. The loss is a mean over the step, so that nothing else changes.
    kinds: if given, a number per row. The rows of each kind are spread evenly over the steps, so that every step has
        its share of them (give or take a row), and a loss term on them its strength. Within a kind the order is random.
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
        self.lengths = None if lengths is None else list(lengths)
        self.kinds = kinds

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        order = self._spread(torch.randperm(self.count, generator=generator).tolist())
        if self.lengths is None:
            return iter(order)
        size, lengths = self.rows_per_step, self.lengths
        steps = (order[start : start + size] for start in range(0, self.count, size))
        return (row for step in steps for row in sorted(step, key=lambda row: lengths[row], reverse=True))

    def _spread(self, order: list[int]) -> list[int]:
        """The same rows, each kind in its own order: of a kind of n rows, one in every len(order) / n rows."""
        if self.kinds is None:
            return order
        members: dict[int, list[int]] = {}
        for row in order:
            members.setdefault(self.kinds[row], []).append(row)
        # The j-th of n rows stands in the middle of the j-th n-th. The sort is stable, so all processes get one order.
        placed = [((j + 0.5) / len(rows), row) for _, rows in sorted(members.items()) for j, row in enumerate(rows)]
        return [row for _, row in sorted(placed, key=lambda pair: pair[0])]
