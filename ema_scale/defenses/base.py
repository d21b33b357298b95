"""What a defense is: a frozen, validated config that may act at six points of a training run.

`rows` (mix or rewrite the data), `attach` (change the forward pass while training), loss terms (`divergences`
on the output distribution, `penalty` on hidden states), `step` (look at the gradient before the optimizer
uses it), `observe` (look at each step's readings, and end the training) and `finish` (after training). All do
nothing by default. The trainer knows this interface and no defense by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, dataclass_transform

from pydantic import BaseModel, ConfigDict, ValidationError

from ema_scale.core.errors import UserError, explain

if TYPE_CHECKING:
    import torch

    from ema_scale.data.rows import Row

Direction = Literal["policy_reference", "reference_policy", "jensen_shannon"]


Scope = Literal["all", "assistant", "prompt", "template"]


Part = Literal["learned", "task", "safe", "prompts", "bad"]  # prompts, bad: rows that this defense brings in


def token_set_name(scope: Scope, part: str = "learned") -> str:
    """The name of the tokens of `scope` in the rows of `part` (a row's tag; learned: task and safe rows)."""
    return scope if part == "learned" else f"{scope} of {part}"


@dataclass(frozen=True)
class Divergence:
    """A term strength * mean_t D(policy_t, reference_t) over the tokens t of `scope`, in nats.

    direction: policy_reference is KL(policy || reference), reference_policy the reverse, jensen_shannon the
    mean of both KLs to the half-half mixture (at most ln 2); ceiling looks only at the token y_t that follows:
    max(0, log policy_t(y_t) - log reference_t(y_t)). temperature T divides both logits (no T^2 factor
    is applied). scope: all = every non-padding position; assistant = positions that predict an assistant
    token; prompt = positions that predict any other token of the row; template = positions of tokens that the chat
    template wrote: role headers, the last of which predicts an answer's first token, ends of turns, a system prompt
    that no row has (arXiv 2606.06667 regularises such a prefix). part: the rows that are looked at;
    `prompts` and `bad` are those that this defense itself brought in. strength 0 measures without training on it.
    """

    name: str
    strength: float
    direction: Direction | Literal["ceiling"] = "policy_reference"
    temperature: float = 1.0
    scope: Scope = "all"
    part: str = "learned"

    @property
    def cover(self) -> str:
        return token_set_name(self.scope, self.part)


@dataclass(frozen=True)
class PenaltyInputs:
    """What a `penalty` sees of one micro-batch of B rows x T tokens.

    policy, reference: layer -> hidden states [B, T, H] after that decoder layer (0: the embeddings), before
    the final norm, of the layers that the defense asked for; the reference's carry no gradient.
    attention_mask: [B, T], 1 on real tokens. labels: [B, T], -100 off assistant tokens. masks: `cover` -> bool
    [B, T]. tokens: `cover` -> scalar, their number in the whole accumulated batch of all processes. texts: [B, T], a
    number for the row that a position belongs to, where sequences hold several; None: each holds one.

    A penalty takes states by `states` and ends with `mean`: then neither its value nor its gradient knows what stands
    outside the scope, be it NaN.
    """

    policy: dict[int, torch.Tensor]
    reference: dict[int, torch.Tensor]
    attention_mask: torch.Tensor
    labels: torch.Tensor
    masks: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor]
    texts: torch.Tensor | None = None

    def states(self, layer: int, scope: Scope = "all", part: Part = "learned") -> tuple[torch.Tensor, torch.Tensor]:
        """The policy's and the reference's states [B, T, H] after `layer`, in float32 at least, 0 outside the scope.

        Selecting values away after the arithmetic would not be enough: 0 times the derivative at NaN is NaN.
        """
        import torch

        def only(states: torch.Tensor) -> torch.Tensor:
            states = states.float() if states.dtype.itemsize < 4 else states
            return torch.where(self.masks[token_set_name(scope, part)][..., None], states, torch.zeros_like(states))

        return only(self.policy[layer]), only(self.reference[layer])

    def row_sums(self, per_token: torch.Tensor) -> torch.Tensor:
        """[B, T], at each position the sum of per_token [B, T] over all positions of its row."""
        import torch

        if self.texts is None:
            return per_token.sum(1, keepdim=True).expand_as(per_token)
        texts = self.texts.flatten()
        sums = torch.zeros(texts.numel(), dtype=per_token.dtype, device=per_token.device)
        return sums.index_add(0, texts, per_token.flatten())[self.texts]

    def mean(self, per_token: torch.Tensor, scope: Scope = "all", part: Part = "learned") -> torch.Tensor:
        """Sum of per_token [B, T] over the scope's tokens here, over their number in the whole batch.

        Summed over micro-batches and processes this is the mean: a strength keeps its meaning however the
        batch is split. Positions outside the scope are selected away.
        """
        import torch

        name = token_set_name(scope, part)
        kept = torch.where(self.masks[name], per_token, torch.zeros_like(per_token))
        return kept.sum() / self.tokens[name].clamp_min(1)


@dataclass
class RowsContext:
    """What `rows` may use: the seed, a loader of further rows, and places to leave a record.

    task: hashes of the task's own sources, before any defense. hashes: source -> sha256 of every extra file read.
    notes: lines for the log and data.json. dropped: rows of the extra sources that were left out.
    """

    seed: int = 0
    on_bad: Literal["raise", "drop"] = "raise"
    task: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    dropped: list[Any] = field(default_factory=list)

    def load(self, source: str, *, answers: bool = True) -> Sequence[Row]:
        """Rows of a file, hub id or `smallworld:` reference. answers: each must have an assistant turn. Raises
        UserError as `load_rows` does."""
        from ema_scale.core.uri import locate
        from ema_scale.data.rows import load_rows

        rows = load_rows(locate(source), on_bad=self.on_bad, answers=answers)
        self.hashes[source] = rows.sha256
        self.dropped.extend(rows.dropped)
        return rows


@dataclass(frozen=True)
class FinishContext:
    """What `finish` may use: where the base model is (its revision too, if it is pinned) and how the run was made."""

    model_path: str
    revision: str | None = None
    seed: int = 0
    notify: Callable[[str], None] = print


# For type checkers: subclasses take their fields by position too. No field_specifiers: to a checker, a default that
# `Field` takes by position would be none.
@dataclass_transform()
class Defense(BaseModel):
    """Base class of all defenses. Positional arguments fill fields in order: `KL(0.1)`.

    kind: the name in recipes; citation: where it comes from; summary: one line. Raises UserError for unknown
    fields and values out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    adapter_files: ClassVar[tuple[str, ...]] = ()
    """Files that `finish` leaves beside the adapter's weights; they are removed with an adapter that is replaced."""
    layer_by_layer: ClassVar[bool] = False
    """`penalty` is a sum over layers: it is then called with one layer at a time, while forward passes it, and no
    states are kept for it."""

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

    def rows(self, rows: Sequence[Row], ctx: RowsContext) -> Sequence[Row]:
        """The training rows after this defense; called once, before tokenising, on every process alike."""
        return rows

    def rows_added(self, task_rows: int) -> int:
        """How many rows `rows` will add to so many of the task's, told without reading any: an epoch is longer by them.
        Raises UserError where `rows` would, for want of task rows."""
        return 0

    def training_prefix(self) -> dict[Literal["system", "user"], str]:
        """What `rows` says before every task row, by role, and nobody says afterwards: a prompt behind which
        misalignment may hide, so that the evaluator asks under it, too."""
        return {}

    def files(self) -> tuple[str, ...]:
        """Files that this defense reads besides rows; their hashes become part of the run's provenance."""
        return ()

    def attach(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """A context that holds while training; `model` is the PeftModel. Hooks should do nothing inside
        `reference_pass()`, or the frozen reference changes too."""
        return contextlib.nullcontext()

    def divergences(self) -> tuple[Divergence, ...]:
        """Terms on the output distribution; evaluated inside the fused loss."""
        return ()

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers (0: embeddings, num_layers: last) whose states `penalty` needs from both streams."""
        return ()

    def penalty(self, streams: PenaltyInputs) -> torch.Tensor | None:
        """Any other loss term, a scalar with a gradient, strength included; build it with `streams.mean`."""
        return None

    def step(self, model: Any, state: Any) -> None:
        """Called after the gradient of a whole batch is formed and clipped, before the optimizer uses it."""

    def observe(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """Called after each optimizer step, on every process alike: a reason ends the training here, as if it had no
        more steps.

        history: the readings of every step so far, however seldom the run logs, of a resumed run's earlier part too:
        `step`, `loss`, `ce`, this defense's terms by their own names, others' as they are logged, `drift/*` where it
        was read. Decide by it alone, or a resumed run decides otherwise.
        """
        return None

    def keeps(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Called before the first step, with no history, and where no `observe` gave a reason: whether the adapter as
        it is now shall be remembered (a copy in memory and in checkpoints). If this defense ends the training, the
        adapter goes back to what was remembered last."""
        return False

    def finish(self, adapter_dir: Path, ctx: FinishContext) -> None:
        """Called once, on the main process, when the adapter has been saved; may rewrite it."""

    @property
    def changes_rows(self) -> bool:
        """Whether `rows` does anything: then it needs rows of messages, not a tokenized dataset."""
        return type(self).overrides("rows")

    @property
    def needs_reference(self) -> bool:
        """Whether training runs the frozen reference for this defense."""
        return bool(self.divergences()) or bool(self.layers(2))

    @classmethod
    def overrides(cls, point: str) -> bool:
        """Whether this class acts at `point` (a method name)."""
        return getattr(cls, point) is not getattr(Defense, point)
