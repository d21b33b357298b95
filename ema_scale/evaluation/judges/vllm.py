"""A local model as judge, in vLLM: the prompts and scores of the endpoint judge, without a server."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ema_scale.config.sections import ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.paths import cache_root
from ema_scale.core.uri import locate
from ema_scale.evaluation.judges.base import JudgeFailure, JudgeItem
from ema_scale.evaluation.judges.prompt import fill_all
from ema_scale.evaluation.judges.scores import (
    MAX_TOKENS,
    TOO_LONG,
    TOP_LOGPROBS,
    Reply,
    ScoreRule,
    judgement,
)
from ema_scale.evaluation.records import Judgement
from ema_scale.inference.chat_prompts import Prompts

if TYPE_CHECKING:
    from ema_scale.config.sections import JudgeRecipe
    from ema_scale.inference.vllm_engine import Work


class VllmJudge:
    """Loads the judge in `finish`, when the sampler has freed its memory: one GPU is enough for policy and judge."""

    paid = False

    def __init__(self, settings: JudgeRecipe, model: str) -> None:
        """Raises UserError if vLLM or the judge's tokenizer is not there."""
        if importlib.util.find_spec("vllm") is None:
            raise UserError("evaluation.judge.kind: vllm is not installed; expected it here, or an endpoint's judge")
        self.model = ModelRecipe(path=locate(model))
        self.extra = settings.engine
        self._prompts = Prompts(self.model)
        self._waiting: dict[str, tuple[JudgeItem, Callable[[Judgement | JudgeFailure], None]]] = {}
        self.rule = ScoreRule(settings.min_mass, settings.score == "most_likely")

    def submit(self, item: JudgeItem, done: Callable[[Judgement | JudgeFailure], None]) -> None:
        self._waiting[item.key] = (item, done)

    def finish(self) -> None:
        """Judge everything. Answers that do not fit into the judge's context are dropped for that reason."""
        waiting, self._waiting = self._waiting, {}
        if not waiting:
            return
        from ema_scale.inference.vllm_engine import VllmEngine

        prompts = self._prompts
        engine = VllmEngine(self.model, {"max_logprobs": TOP_LOGPROBS}, self.extra, cache_root() / "logs" / "judge.log")
        try:
            reader = _Reader(prompts)
            replies: dict[str, dict[str, Reply]] = {key: {} for key in waiting}
            items, dropped = [item for item, _ in waiting.values()], list[JudgeItem]()
            for (key, name), output in engine.stream(self._work(items, prompts, engine.max_model_len, dropped)):
                replies[key][name] = reader.reply(output.outputs[0])
                item, done = waiting[key]
                if len(replies[key]) == len(item.prompts):
                    done(judgement(key, item.judge, replies.pop(key), self.rule))
            for item in dropped:
                waiting[item.key][1](Judgement(key=item.key, judge=item.judge, dropped=TOO_LONG))
        finally:
            engine.close()

    def abandon(self) -> None:
        self._waiting = {}

    @staticmethod
    def _work(
        items: Sequence[JudgeItem], prompts: Prompts, room: int, dropped: list[JudgeItem]
    ) -> Iterator[Work[tuple[str, str]]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from ema_scale.inference.vllm_engine import Work

        params = SamplingParams(
            temperature=0.0,
            max_tokens=MAX_TOKENS,
            logprobs=TOP_LOGPROBS,
            stop_token_ids=prompts.stops,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for item in items:
            filled = fill_all(item)
            ids = {name: prompts.ids([{"role": "user", "content": text}]) for name, text in filled.items()}
            if max(map(len, ids.values())) + MAX_TOKENS > room:
                dropped.append(item)
                continue
            for name, tokens in ids.items():
                yield Work((item.key, name), tokens, params)


class _Reader:
    """vLLM's output as a Reply, in the tokenizer's words."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        # Asked of the tokenizer itself: no guess from the reply is needed.
        self._splits = len(prompts.tokenizer.encode("85", add_special_tokens=False)) > 1

    def reply(self, output: Any) -> Reply:
        first = sorted(output.logprobs[0].items(), key=lambda pair: -pair[1].logprob)
        decode = self._prompts.tokenizer.decode
        top = tuple((str(decode([token])), float(found.logprob)) for token, found in first)
        return Reply(self._prompts.text(output.token_ids), top, self._splits)
