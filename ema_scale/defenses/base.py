"""What a defense is: a frozen, validated config that may act at six points of a training run.

1. `transform_rows` mixes in or rewrites training rows.
2. `attach` and `side_adapters` change the forward pass while training lasts.
3. `divergences`, `label_terms` and `penalty` add terms to the loss; `label_weights` and `token_weights` weigh it.
4. `join_gradients` and `before_optimizer_step` see the gradient before the optimizer uses it.
5. `should_stop` and `should_snapshot` read each step's metrics.
6. `after_training` may rewrite the saved adapter.

Each does nothing by default. The trainer and the loss know this interface and no defense by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, dataclass_transform

from pydantic import BaseModel, ConfigDict, ValidationError

from ema_scale.core.errors import UserError, explain
from ema_scale.core.names import defense_label
from ema_scale.defenses.terms import Divergence, LabelTerm, LabelWeight, Part, Scope, TokenSet, TokenTerm
from ema_scale.models.side_adapters import SideAdapter

if TYPE_CHECKING:
    import torch

    from ema_scale.data.rows import Row


@dataclass(frozen=True)
class PenaltyInputs:
    """What `penalty` and `token_weights` see of one micro-batch of B rows x T tokens.

    policy, reference: layer -> hidden states [B, T, H] after that decoder layer (0: the embeddings), before the final
        norm, of the layers that the defense asked for. The reference's carry no gradient.
    attention_mask: [B, T], 1 on real tokens.
    labels: [B, T], -100 off assistant tokens.
    masks: token set -> bool [B, T].
    step_tokens: token set -> scalar, its tokens in the whole optimizer step on all processes.
    segment_ids: [B, T], a number for the row that a position belongs to, if sequences are packed; else None.
    parts: this defense's own parts -> their names among those of all defenses.
    readings: what `read` has noted.

    A penalty takes states by `states` and ends with `mean`: then neither its value nor its gradient depends on what
    stands outside the scope, be it NaN.
    """

    policy: dict[int, torch.Tensor]
    reference: dict[int, torch.Tensor]
    attention_mask: torch.Tensor
    labels: torch.Tensor
    masks: Mapping[TokenSet, torch.Tensor]
    step_tokens: Mapping[TokenSet, torch.Tensor]
    segment_ids: torch.Tensor | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    readings: dict[str, tuple[TokenSet, torch.Tensor]] = field(default_factory=dict)

    def states(self, layer: int, scope: Scope = "all", part: Part = "learned") -> tuple[torch.Tensor, torch.Tensor]:
        """Policy and reference states [B, T, H] after `layer`, in float32 or better, 0 outside the scope.

        Masking after the arithmetic would not be enough: 0 times the derivative at NaN is NaN.
        """
        import torch

        mask = self.masks[self._token_set(scope, part)][..., None]

        def masked(states: torch.Tensor) -> torch.Tensor:
            states = states.float() if states.dtype.itemsize < 4 else states
            return torch.where(mask, states, torch.zeros_like(states))

        return masked(self.policy[layer]), masked(self.reference[layer])

    def row_sums(self, per_token: torch.Tensor) -> torch.Tensor:
        """[B, T]: at each position, the sum of per_token [B, T] over all positions of its row."""
        import torch

        if self.segment_ids is None:
            return per_token.sum(1, keepdim=True).expand_as(per_token)
        segments = self.segment_ids.flatten()
        sums = torch.zeros(segments.numel(), dtype=per_token.dtype, device=per_token.device)
        return sums.index_add(0, segments, per_token.flatten())[self.segment_ids]

    def means_so_far(self, per_token: torch.Tensor, scope: Scope = "all", part: Part = "learned") -> torch.Tensor:
        """[B, T]: at each position, the mean of per_token [B, T] over the scope's tokens of its row up to and with it;
        0 before the first."""
        import torch

        mask = self.masks[self._token_set(scope, part)]
        values = torch.where(mask, per_token, torch.zeros_like(per_token))
        pair = torch.stack([values, mask.to(values.dtype)])
        so_far = pair.cumsum(-1)
        if self.segment_ids is not None:
            begins = torch.nn.functional.pad(self.segment_ids.diff(dim=1) != 0, (1, 0), value=True)
            places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
            first = torch.where(begins, places, 0).cummax(1).values.expand_as(pair)
            so_far = so_far - (so_far - pair).gather(-1, first)  # less what stands before the row
        return so_far[0] / so_far[1].clamp_min(1)

    def mean(self, per_token: torch.Tensor, scope: Scope = "all", part: Part = "learned") -> torch.Tensor:
        """Sum of per_token [B, T] over the scope's tokens here, divided by their number in the whole step.

        Summed over micro-batches and processes this is the mean: a strength means the same however the step is split.
        """
        import torch

        tokens = self._token_set(scope, part)
        masked = torch.where(self.masks[tokens], per_token, torch.zeros_like(per_token))
        return masked.sum() / self.step_tokens[tokens].clamp_min(1)

    def read(self, name: str, per_token: torch.Tensor, scope: Scope = "all", part: Part = "learned") -> None:
        """Log the step's mean of per_token [B, T] as `KIND/name`. It is no part of the loss."""
        self.readings[name] = self._token_set(scope, part), self.mean(per_token.detach(), scope, part)

    def _token_set(self, scope: Scope, part: str) -> TokenSet:
        return TokenSet(scope, self.parts.get(part, part))


@dataclass
class RowsContext:
    """What `transform_rows` may use, and where it leaves a record.

    seed: the run's seed.
    on_bad: what to do with a bad row of an extra source.
    task: hashes of the task's own sources, before any defense.
    notes: lines for the log and data.json.
    hashes: source -> sha256 of every extra file read.
    dropped: rows of the extra sources that were left out.
    """

    seed: int = 0
    on_bad: Literal["raise", "drop"] = "raise"
    task: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    dropped: list[Any] = field(default_factory=list)

    def load(self, source: str, **read: Any) -> Sequence[Row]:
        """Rows of a file, hub id or `smallworld:` reference. Raises UserError as `load_rows` does.

        read: answers, columns and learn, as `load_rows` takes them.
        """
        from ema_scale.core.uri import locate
        from ema_scale.data.rows import load_rows

        rows = load_rows(locate(source), on_bad=self.on_bad, **read)
        self.hashes[source] = rows.sha256
        self.dropped.extend(rows.dropped)
        if rows.unread:
            self.notes.append(f"{source}: not read: {', '.join(rows.unread)}")
        return rows


@dataclass(frozen=True)
class FinishContext:
    """What `after_training` may use.

    model_path, revision: the base model; the revision is None unless it is pinned.
    seed: the run's seed.
    notify: prints a line for the user.
    """

    model_path: str
    revision: str | None = None
    seed: int = 0
    notify: Callable[[str], None] = print


# Methods that other packages may still define, and what each is called now.
_OLD_METHODS = {
    "rows": "transform_rows",
    "layers": "penalty_layers",
    "step": "before_optimizer_step",
    "observe": "should_stop",
    "keeps": "should_snapshot",
    "finish": "after_training",
}


# For type checkers: subclasses take their fields by position too. No field_specifiers: to a checker, a default that
# `Field` takes by position would be none.
@dataclass_transform()
class Defense(BaseModel):
    """Base class of all defenses. Positional arguments fill fields in order: `KL(0.1)`.

    kind: the name in recipes.
    title: the name in reports. Default: `kind` in words.
    citation: where the method comes from.
    summary: one line.
    adapter_files: files that `after_training` leaves beside the adapter's weights. They are removed when another
        adapter replaces it.
    defined_in: `file.py:Class` of a class in a user's own file, which recipes then name it by; "" for others.
    without_reference: its terms never depend on the reference.
    layer_by_layer: `penalty` is a sum over layers. It is then called with one layer at a time, while the forward pass
        is there, and no states are stored for it.
    whole_weights: it reads whole adapter weights, which ZeRO-3 and FSDP shard.

    Raises UserError for unknown fields and values out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str] = ""
    title: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    adapter_files: ClassVar[tuple[str, ...]] = ()
    defined_in: ClassVar[str] = ""
    without_reference: ClassVar[bool] = False
    layer_by_layer: ClassVar[bool] = False
    whole_weights: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Raises UserError for a method under the name it had in an earlier version: it would never be called."""
        super().__init_subclass__(**options)
        for old, new in _OLD_METHODS.items():
            if callable(vars(cls).get(old)):
                raise UserError(f"{cls.__module__}.{cls.__name__}: found the method {old}; rename it to {new}")

    def __init__(self, *args: Any, **values: Any) -> None:
        names = list(type(self).model_fields)
        if len(args) > len(names):
            raise UserError(f"{type(self).__name__}: found {len(args)} values, expected at most {len(names)}")
        for name, value in zip(names, args, strict=False):
            if name in values:
                raise UserError(f"{type(self).__name__}: {name} is given twice")
            values[name] = value
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError("; ".join(explain(problem, type(self)) for problem in error.errors())) from None

    def label(self) -> str:
        """This defense as reports name it, such as `KL 0.1`. A run stores it, so a plug-in chooses its own."""
        return defense_label({"kind": self.kind, **self.model_dump(mode="json")}, self.title)

    # ---- rows ----

    def transform_rows(self, rows: Sequence[Row], ctx: RowsContext) -> Sequence[Row]:
        """The training rows after this defense. Called once, before tokenizing, with the same rows on every process."""
        return rows

    def rows_added(self, task_rows: int) -> int:
        """How many rows `transform_rows` adds to `task_rows` rows. Reads no file.

        Raises UserError where `transform_rows` would, for too few task rows.
        """
        return 0

    def training_prefix(self) -> dict[Literal["system", "user"], str]:
        """Role -> text that `transform_rows` puts before every task row, and that inference leaves out.

        Misalignment may hide behind such a prompt, so the evaluator also asks with it.
        """
        return {}

    def files(self) -> tuple[str, ...]:
        """Files that this defense reads besides rows. Their hashes become part of the run's provenance."""
        return ()

    # ---- forward pass and loss ----

    def attach(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """A context that is entered for the training. `model` is the PeftModel.

        Hooks should do nothing inside `reference_pass()`, or they change the frozen reference.
        """
        return contextlib.nullcontext()

    def side_adapters(self) -> tuple[SideAdapter, ...]:
        """Adapters that are active beside the policy's while training, and dropped afterwards."""
        return ()

    def divergences(self) -> tuple[Divergence, ...]:
        """Loss terms on the output distribution, computed inside the fused loss."""
        return ()

    def label_terms(self) -> tuple[LabelTerm, ...]:
        """Loss terms on the labels' likelihoods, computed inside the fused loss."""
        return ()

    def penalty_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers (0: embeddings, num_layers: last) whose hidden states `penalty` and `token_weights` need."""
        return ()

    def penalty(self, inputs: PenaltyInputs) -> torch.Tensor | None:
        """Any other loss term: a scalar with a gradient, strength included. Build it with `inputs.mean`."""
        return None

    def label_weights(self) -> tuple[LabelWeight, ...]:
        """Factors on the cross-entropy of learned tokens, made of their likelihoods inside the fused loss."""
        return ()

    def token_weights(self, inputs: PenaltyInputs) -> Mapping[str, torch.Tensor]:
        """Factors on tokens that are known before the loss: "ce" or an own token term's name -> [B, T], at least 0.

        They are constants: no gradient passes through them. As with `LabelWeight`, a weighted term is divided by the
        number of its tokens, and weights of several defenses multiply.
        """
        return {}

    # ---- between steps ----

    def join_gradients(self, rest: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The gradient of a whole step, before it is clipped: by default the sum of both arguments.

        A defense that defines this has the gradient of its own terms formed apart, by a second backward pass. It is
        refused under DeepSpeed and FSDP, which give no process a whole gradient.

        rest, own: for each trained weight, the gradient of the loss without this defense's terms, and that of its
            terms, strengths included. Both are the whole step's, over all micro-batches and processes.
        """
        return [a + b for a, b in zip(rest, own, strict=True)]

    def before_optimizer_step(self, model: Any, state: Any) -> None:
        """Called when the gradient of a whole step is formed and clipped, before the optimizer uses it."""

    def should_stop(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """Called after each optimizer step, on every process: a reason ends the training here.

        history: the metrics of every step so far, whatever logging_steps is, and those before a resume: `step`,
            `loss`, `ce`, this defense's terms by their own names, other terms as they are logged, and `drift/*` where
            it was read. Decide by it alone, or a resumed run decides otherwise.
        """
        return None

    @property
    def drift_every(self) -> int | None:
        """Optimizer steps from one reading of drift to the next that `should_stop` needs; None: it needs none."""
        return None

    def should_snapshot(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Whether to remember the adapter as it is now, in memory and in checkpoints.

        Called before the first step, with an empty history, and after each step that `should_stop` does not end. If
        this defense ends the training, the adapter goes back to the latest snapshot.
        """
        return False

    # ---- after training ----

    def after_training(self, adapter_dir: Path, ctx: FinishContext) -> None:
        """Called once, on the main process, when the adapter has been saved. May rewrite it."""

    # ---- what others ask of a defense ----

    @property
    def token_terms(self) -> tuple[TokenTerm, ...]:
        """All terms that the fused loss computes."""
        return (*self.divergences(), *self.label_terms())

    @classmethod
    def assets(cls) -> dict[str, str]:
        """Field -> what a user must have to fill it, such as `bad rows`: the `asset` of its `json_schema_extra`."""
        extras = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        return {
            name: str(extra["asset"]) for name, extra in extras.items() if isinstance(extra, dict) and "asset" in extra
        }

    @property
    def needs(self) -> tuple[str, ...]:
        """What a user must have for this defense as it is set: the assets of the fields that are filled."""
        return tuple(dict.fromkeys(asset for name, asset in self.assets().items() if getattr(self, name)))

    @property
    def changes_rows(self) -> bool:
        """Whether `transform_rows` does anything: then it needs rows of messages, not a tokenized dataset."""
        return type(self).overrides("transform_rows")

    @property
    def needs_reference(self) -> bool:
        """Whether training runs the frozen reference for this defense."""
        return self.reads_reference_logits or bool(self.penalty_layers(2))

    @property
    def reads_reference_logits(self) -> bool:
        """Whether a term or weight of the fused loss depends on the reference."""
        return any(one.reads_reference for one in (*self.token_terms, *self.label_weights()))

    @classmethod
    def overrides(cls, method: str) -> bool:
        """Whether this class defines `method` itself."""
        return getattr(cls, method) is not getattr(Defense, method)
