"""What of a plan is stored already, target by target, and what is left to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ema_scale.config.sections import EvaluationRecipe
from ema_scale.evaluation.judges.assignment import JudgeSpec
from ema_scale.evaluation.plan import EvalTarget, PromptGroup
from ema_scale.evaluation.records import MANIFEST_FILE, SUMMARY_FILE, Manifest, Summary
from ema_scale.evaluation.store import Store, Stores
from ema_scale.inference.base import SamplerOptions

if TYPE_CHECKING:
    from ema_scale.inference.chat_prompts import Prompts


@dataclass(frozen=True)
class Remaining:
    """A target of which something is missing.

    unsampled, unjudged: answers and judgements that are missing.
    answered: whether a sampled answer is stored.
    """

    target: EvalTarget
    groups: list[PromptGroup]
    store: Store
    unsampled: int
    unjudged: int
    answered: bool

    def unsampled_groups(self) -> Iterator[PromptGroup]:
        """The groups with an answer that is missing."""
        there = self.store.samples
        return (group for group in self.groups if not all(key in there for key in group.keys))

    def unjudged_keys(self) -> Iterator[tuple[PromptGroup, str]]:
        """Every answer without a judgement, whether sampled or not."""
        there = self.store.judgements
        return ((g, key) for g in self.groups for key in g.keys if (key, g.judge.identity) not in there)


@dataclass
class Survey:
    """What is stored of a plan, over all targets.

    total: answers, of which `sampled` are there.
    to_judge: judgements by somebody, of which `judged` are there. Written answers bring theirs.
    judges: of any answer, by identity.
    prompts: one group for each different prompt.
    """

    total: int = 0
    sampled: int = 0
    to_judge: int = 0
    judged: int = 0
    remaining: list[Remaining] = field(default_factory=list)
    judges: dict[str, JudgeSpec] = field(default_factory=dict)
    prompts: dict[tuple[str, ...], PromptGroup] = field(default_factory=dict)


def survey(
    plan: Iterable[tuple[EvalTarget, list[PromptGroup]]],
    stores: Stores,
    begin: Callable[[EvalTarget, list[PromptGroup], Store], None],
    finish: Callable[[EvalTarget, list[PromptGroup], Store], None],
) -> Survey:
    """Look at one target's store after the other.

    Args:
        plan: the groups of each target.
        stores: those of the targets, by name.
        begin: is called for each target before its store is looked at.
        finish: is called, while its store is open, for a target of which nothing is missing. Its store is then closed.
    """
    found = Survey()
    for target, groups in plan:
        store = stores[target.name]
        begin(target, groups, store)
        samples, judgements = store.samples, store.judgements
        total = sampled = judged = 0
        answered = False
        for group in groups:
            total, keys = total + group.n, group.keys
            there = sum(key in samples for key in keys)
            sampled += there
            answered = answered or (there > 0 and not group.is_scored)
            told = sum((key, group.judge.identity) in judgements for key in keys)
            judged += told
            if group.is_judged:
                found.to_judge, found.judged = found.to_judge + group.n, found.judged + told
            found.judges.setdefault(group.judge.identity, group.judge)
            texts = [message["content"] for message in group.question.messages(group.paraphrase)]
            texts += [answer.text for answer in group.question.answers]  # which may be longer than what is sampled
            found.prompts.setdefault((target.date, *texts), group)
        found.total, found.sampled = found.total + total, found.sampled + sampled
        if sampled == judged == total and (Path(target.out_dir) / SUMMARY_FILE).is_file():
            finish(target, groups, store)
            stores.close(store)
        else:
            left = Remaining(target, groups, store, total - sampled, total - judged, answered)
            found.remaining.append(left)
    return found


def is_stored(groups: Iterable[PromptGroup], store: Store) -> bool:
    """Whether every answer and judgement is there and in use."""
    samples, judgements = store.samples, store.judgements
    return all(
        samples.place(key) >= 0 and judgements.place(key, group.judge.identity) >= 0
        for group in groups
        for key in group.keys
    )


def sampler_used(targets: Iterable[EvalTarget], settings: EvaluationRecipe) -> str | None:
    """The sampler of the recipe; for `auto` the one that earlier answers are from, None where there are none."""
    if settings.sampler != "auto":
        return settings.sampler
    for target in targets:
        summary = Summary.read_if_valid(Path(target.out_dir) / SUMMARY_FILE)
        asked = Manifest.read_if_valid(Path(target.out_dir) / MANIFEST_FILE)  # of one that was killed
        for sampler in (summary and summary.sampler, asked and asked.sampler):
            if sampler and (used := sampler.get("name")):
                return str(used)
    return None


def fitted(groups: Iterable[PromptGroup], remaining: Sequence[Remaining], options: SamplerOptions) -> SamplerOptions:
    """`options` with the adapters that are asked, and room for the longest prompt and answer.

    This takes less memory than the model's own limit.
    """
    from ema_scale.inference.chat_prompts import Prompts, load_config

    paths = (left.target.adapter_path for left in remaining)
    options = replace(options, adapters=tuple(str(path) for path in paths if path))
    if options.max_model_len is not None:
        return options
    model = options.model
    tokens = Prompts(model)
    need = max(_tokens_needed(tokens, group) for group in groups)
    config = load_config(model).get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or need
    return replace(options, max_model_len=min(need, int(limit)))


def _tokens_needed(tokens: Prompts, group: PromptGroup) -> int:
    """Tokens of the prompt and the longest answer."""
    if not group.is_scored:
        return len(tokens.ids(group.question.messages(group.paraphrase), group.target.date)) + group.max_tokens
    behind, alone = tokens.answers(group.score_request(), None)
    return max(len(row.ids) for row in (*behind, *alone)) + 1  # vLLM always samples one
