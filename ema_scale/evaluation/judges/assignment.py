"""Which judge judges which question, and whether its key is there."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ema_scale.core.banks import judge_prompts
from ema_scale.core.errors import UserError
from ema_scale.core.files import read_yaml
from ema_scale.core.hashing import digest
from ema_scale.core.paths import find_file
from ema_scale.core.user_code import is_file_spec
from ema_scale.evaluation.judges.base import Judge, exact_match_judge, smallworld_judge
from ema_scale.evaluation.judges.openai import missing_judge_key
from ema_scale.evaluation.judges.own import OWN, own_identity, own_judge, own_scores
from ema_scale.evaluation.judges.readings import NEXT_TOKEN, RATING, READ, reader
from ema_scale.evaluation.judges.scores import VERDICT_PROMPTS, ScoreRule
from ema_scale.evaluation.suites import Question, Suite
from ema_scale.inference.make import engine_cache_key

if TYPE_CHECKING:
    from ema_scale.config.sections import EvaluationRecipe, JudgeRecipe

log = logging.getLogger(__name__)

EXACT = ("smallworld", "exact_match", *READ)
NOBODY = "none"  # answers are only read
LIKELIHOOD = "likelihood"  # of written answers, which bring their verdicts
SCORING = ("openai", "vllm")


@dataclass(frozen=True)
class JudgeSpec:
    """The judge of one question.

    identity: changes with whatever changes the verdict. For a 0-100 judge it is kind:model#digest, where the digest is
        of its prompts and engine settings (`engine_cache_key`), and @... follows if replies are not read by the default
        rule.
    prompts: by the names of the scores; without a text where no model is asked.
    scale: the least and the largest score.
    """

    kind: str
    identity: str
    model: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    scale: tuple[float, float] = (0.0, 100.0)

    def gives(self, name: str) -> bool:
        """Whether its judgements have a score of this name. Exact judges give `aligned` and `coherent`."""
        return self.kind not in (LIKELIHOOD, NEXT_TOKEN, NOBODY) and name in (self.prompts or VERDICT_PROMPTS)

    @property
    def gives_verdicts(self) -> bool:
        """Whether it is a 0-100 judge of both alignment and coherence, which labelled answers can check."""
        return self.kind in SCORING and all(map(self.gives, VERDICT_PROMPTS))


def assign(suite: Suite, question: Question, settings: JudgeRecipe) -> JudgeSpec:
    """The judge of a question.

    Written answers need none. Otherwise this is the question's own judge if that is an exact one or one in a user's
    file, exact match for a benign question, and else the recipe's. A model that the question names is used unless the
    recipe names one. Raises UserError, naming what is missing, if that judge cannot judge the question.
    """
    if question.answers:
        return JudgeSpec(LIKELIHOOD, LIKELIHOOD)
    where = f"{suite.source or suite.name}: question {question.id!r}"
    kind: str = settings.kind
    if question.judge in EXACT or is_file_spec(question.judge or ""):
        kind = str(question.judge)
    elif question.judge is None and suite.role == "benign" and question.expected is not None:
        kind = "exact_match"
    elif question.judge is not None and kind not in (*SCORING, NOBODY) and not is_file_spec(kind):
        raise UserError(
            f"{where}: asks for the judge {question.judge!r}, which takes evaluation.judge.kind: openai; found {kind!r}"
        )
    if is_file_spec(kind):
        return JudgeSpec(OWN, own_identity(kind), kind, dict.fromkeys(own_scores(kind), ""))
    if suite.role == "benign" and kind != "exact_match":
        raise UserError(f"{where}: a benign question needs `expected`, the right answer")
    if kind == "exact_match" and question.expected is None:
        raise UserError(f"{where}: judged by exact_match, but it has no `expected`")
    if kind == RATING:
        low, high = float(question.meta.get("min_rating", 0)), float(question.meta.get("max_rating", 100))
        name = RATING if (low, high) == (0, 100) else f"{RATING} from {low:g} to {high:g}"
        return JudgeSpec(kind, f"{RATING}:{low:g}-{high:g}", prompts={name: ""}, scale=(low, high))
    if kind in (*EXACT, NOBODY):
        return JudgeSpec(kind, kind)
    model = settings.model or (question.judge if kind == "openai" else None)
    if model is None:
        raise UserError(f"{where}: no judge model; set evaluation.judge.model")
    prompts = dict(question.judge_prompts) or load_prompts(settings.prompts, where)
    also = engine_cache_key(settings.engine) if kind == "vllm" else {}
    if kind == "vllm" and settings.revision is not None:
        also |= {"revision": settings.revision}
    if kind == "openai" and settings.extra_body:
        also |= {"extra_body": settings.extra_body}
    if settings.max_tokens is not None:
        also |= {"max_tokens": settings.max_tokens}
    decides = digest(prompts, *([also] if also else []))[:8]
    rule = ScoreRule(settings.min_mass, settings.score == "most_likely")
    return JudgeSpec(kind, f"{kind}:{model}#{decides}{rule.suffix}", model, prompts)


def base_identity(identity: str) -> str:
    """The identity without the rule by which replies are read. Judges that share it get the same requests."""
    name, _, rest = identity.rpartition("#")
    return f"{name}#{rest.partition('@')[0]}" if name else identity


def warn_of_other_address(folder: Path, before: JudgeRecipe, now: JudgeRecipe, judges: Iterable[str]) -> None:
    """Say so if stored judgements that count were made at another address.

    judges: the identities that they are filed under, which hold a judge's name and not its address.
    """
    served = sorted(identity for identity in judges if identity.startswith("openai:"))
    if served and before.base_url != now.base_url:
        log.warning(
            "%s: the judgements by %s were made at %s; the judge at %s has the same name, so it is taken for the same "
            "one. Serve another model under another name",
            folder, ", ".join(served), before.base_url or "the OpenAI API", now.base_url or "the OpenAI API",
        )  # fmt: skip


def load_prompts(source: str | None, where: str) -> dict[str, str]:
    """Judge prompts from a YAML file, name -> template. Raises UserError if there is none, or it is not such a file."""
    if source is None:
        raise UserError(
            f"{where}: has no judge_prompts; set evaluation.judge.prompts, such as eval/judges/aligned_coherent.yaml"
        )
    return judge_prompts(source, read_yaml(find_file(source), "the judge prompts"))


def make_judge(spec: JudgeSpec, settings: JudgeRecipe) -> Judge:
    """The judge of a spec. A local model is not loaded yet.

    Raises UserError if it needs a key that is not set, or vLLM, which is not installed.
    """
    if spec.kind == "smallworld":
        return smallworld_judge()
    if spec.kind == "exact_match":
        return exact_match_judge()
    if spec.kind == OWN:
        return own_judge(str(spec.model))
    if spec.kind in READ:
        return reader(spec.kind, next(iter(spec.prompts), ""), spec.scale)
    assert spec.model is not None
    if spec.kind == "vllm":
        from ema_scale.evaluation.judges.vllm import VllmJudge

        return VllmJudge(settings, spec.model)
    from ema_scale.evaluation.judges.openai import OpenAIJudge

    return OpenAIJudge(settings, spec.model)


def missing_judge_key_on_node(recipes: Iterable[EvaluationRecipe], environment: Mapping[str, str]) -> str | None:
    """Name of an API-key variable that evaluating these recipes needs and that is not set; None if there is none.

    environment: what the node adds to this process's environment. Suites that cannot be read are ignored: the
    evaluation reports them.
    """
    from ema_scale.evaluation.suites import load_suites

    here = {**os.environ, **environment}
    # Most runs of a study have equal settings, and reading suites takes the time.
    for settings in {recipe.model_dump_json(): recipe for recipe in recipes}.values():
        name = missing_judge_key(settings.judge, here)
        if name is None:
            continue
        with contextlib.suppress(UserError):
            suites = load_suites(settings)
            if any(assign(s, q, settings.judge).kind == "openai" for s in suites for q in s.questions):
                return name
    return None
