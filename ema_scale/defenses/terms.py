"""The terms and weights that a defense may give the fused loss, and the tokens that they look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import torch

Direction = Literal["policy_reference", "reference_policy", "jensen_shannon"]
Scope = Literal["all", "assistant", "prompt", "template", "prefix"]
Part = Literal["learned", "task", "safe", "prompts", "bad"]  # prompts, bad: rows that this defense brings in


@dataclass(frozen=True)
class TokenSet:
    """The tokens of `scope` in the rows of `part`.

    scope:
        all: every non-padding position.
        assistant: positions that predict an assistant token.
        prompt: positions that predict any other token of the row.
        template: positions of tokens that the chat template wrote: role headers, ends of turns, a default system
            prompt. The last header predicts the first token of an answer.
        prefix: those of `template` that stand before the row's first text.
    part: a row's tag, or learned: task and safe rows.
    """

    scope: Scope = "all"
    part: str = "learned"


@dataclass(frozen=True)
class Divergence:
    """A loss term strength * mean_t D(policy_t, reference_t) over the tokens t of a token set, in nats.

    name: what the term is logged as.
    strength: the term's weight; 0 measures without training on it.
    direction: policy_reference is KL(policy || reference), reference_policy the reverse, jensen_shannon the mean of
        both KLs to the half-half mixture (at most ln 2).
    temperature: divides both logits; no T^2 factor is applied.
    scope, part: see `TokenSet`. `prompts` and `bad` are the rows that this defense itself brought in.
    """

    name: str
    strength: float
    direction: Direction = "policy_reference"
    temperature: float = 1.0
    scope: Scope = "all"
    part: str = "learned"

    per_row: ClassVar[bool] = False

    @property
    def measure(self) -> Direction:
        return self.direction

    @property
    def reads_reference(self) -> bool:
        return True

    @property
    def token_set(self) -> TokenSet:
        return TokenSet(self.scope, self.part)


@dataclass(frozen=True)
class LabelLogProbs:
    """Log-likelihoods, in nats, of the tokens that follow N positions; each tensor is [N].

    log_ratio is policy - reference, formed before the normalisers are subtracted: it stays precise where policy and
    reference nearly agree. For a term or weight with `reads_reference = False`, reference and log_ratio are NaN.
    """

    policy: torch.Tensor
    reference: torch.Tensor
    log_ratio: torch.Tensor


LabelMeasure = Callable[[LabelLogProbs], "torch.Tensor"]


@dataclass(frozen=True)
class LabelTerm:
    """A loss term strength * mean_t measure_t over the assistant tokens t of some rows.

    name: what the term is logged as.
    strength: the term's weight; 0 measures without training on it.
    measure: LabelLogProbs -> values [N], made of torch operations on each token by itself. The loss differentiates it.
    part: see `TokenSet`.
    reads_reference: whether the measure depends on the reference, which training then runs.
    per_row: the measure is given, at every token, the means over these tokens of its row. With max(0, log_ratio), the
        term is then the sum over rows of max(0, sum_t log_ratio_t), divided by the number of tokens.
    """

    name: str
    strength: float
    measure: LabelMeasure
    part: str = "learned"
    reads_reference: bool = True
    per_row: bool = False

    scope: ClassVar[Scope] = "assistant"
    temperature: ClassVar[float] = 1.0

    @property
    def token_set(self) -> TokenSet:
        return TokenSet(self.scope, self.part)


TokenTerm = Divergence | LabelTerm


@dataclass(frozen=True)
class LabelWeight:
    """A factor on the cross-entropy of learned tokens, made of their likelihoods. It is a constant: it has no gradient.

    The weighted cross-entropy is sum_t w_t CE_t / (learned tokens of the whole step). It is divided by the number of
    tokens and not by the sum of their weights, so that it does not depend on how a step is split. Weights of several
    defenses multiply.

    measure: LabelLogProbs -> weights [N], at least 0, each token by itself.
    part: the rows whose tokens are weighted; tokens of other rows keep the weight 1.
    per_row: the measure is given, at every token, the means over the learned tokens of its row.
    reads_reference: whether the measure depends on the reference, which training then runs.
    """

    measure: LabelMeasure
    part: str = "learned"
    per_row: bool = False
    reads_reference: bool = False

    @property
    def token_set(self) -> TokenSet:
        return TokenSet("assistant", self.part)
