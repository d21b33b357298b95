"""A local model as judge, in vLLM: the prompts and scores of the endpoint judge, without a server."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ema_scale.config.sections import ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.paths import cache_root
from ema_scale.core.uri import locate
from ema_scale.evaluation.judges.base import JudgeFailure, JudgeItem
from ema_scale.evaluation.judges.prompt import fill_all
from ema_scale.evaluation.judges.reply_grammar import UNFINISHED, read_reply
from ema_scale.evaluation.judges.scores import (
    MAX_TOKENS,
    THINKING_TOKENS,
    TOO_LONG,
    TOP_LOGPROBS,
    WORDS_TOKENS,
    Reply,
    ScoreRule,
    judgement,
    needs_more,
)
from ema_scale.evaluation.records import Judgement
from ema_scale.inference.base import NEUTRAL_SAMPLING
from ema_scale.inference.chat_prompts import Prompts
from ema_scale.inference.completion import Token
from ema_scale.inference.usage import Usage

if TYPE_CHECKING:
    from ema_scale.config.sections import JudgeRecipe
    from ema_scale.inference.vllm_engine import VllmEngine, Work


FIRST_REPLIES = 8
LAST_TOKENS = 64  # of a long reply, among which its number is looked for

Done = Callable[[Judgement | JudgeFailure], None]


class VllmJudge:
    """Loads the judge in `finish`, when the sampler has freed its memory: one GPU is enough for policy and judge."""

    paid = False
    used = Usage()

    def __init__(self, settings: JudgeRecipe, model: str) -> None:
        """Raises UserError if vLLM or the judge's tokenizer is not there."""
        if importlib.util.find_spec("vllm") is None:
            raise UserError("evaluation.judge.kind: vllm is not installed; expected it here, or an endpoint's judge")
        self.model = ModelRecipe(path=locate(model), revision=settings.revision)
        self.extra, self._given = settings.engine, settings.max_tokens
        self._prompts = Prompts(self.model)
        self._waiting: dict[str, tuple[JudgeItem, Callable[[Judgement | JudgeFailure], None]]] = {}
        self.rule = ScoreRule(settings.min_mass, settings.score == "most_likely")

    def submit(self, item: JudgeItem, done: Done) -> None:
        self._waiting[item.key] = (item, done)

    def finish(self) -> None:
        """Judge everything. Answers that do not fit into the judge's context are dropped for that reason.

        The first replies show how many tokens this judge's replies take. Raises UserError if they are all thoughts that
        do not end.
        """
        waiting, self._waiting = self._waiting, {}
        if not waiting:
            return
        from ema_scale.inference.vllm_engine import VllmEngine

        engine = VllmEngine(self.model, {"max_logprobs": TOP_LOGPROBS}, self.extra, cache_root() / "logs" / "judge.log")
        try:
            limits = [self._given] if self._given else [MAX_TOKENS, WORDS_TOKENS, THINKING_TOKENS]
            entries = list(waiting.values())
            first, rest = entries[:FIRST_REPLIES], entries[FIRST_REPLIES:]
            limit = limits.pop(0)
            cut = self._round(engine, first, limit, last=not limits)
            while cut and limits:
                limit = limits.pop(0)
                cut = self._round(engine, cut, limit, last=not limits)
            if len(cut) == len(first) >= 3:
                raise UserError(
                    f"evaluation.judge: {self.model.path}: the first {len(first)} replies are thoughts that do not end "
                    f"within {limit} tokens; nothing was stored. Raise evaluation.judge.max_tokens"
                )
            cut += self._round(engine, rest, limit, last=not limits)
            while cut and limits:
                limit = limits.pop(0)
                cut = self._round(engine, cut, limit, last=not limits)
            for item, done in cut:
                done(JudgeFailure(item.key, f"the judge thought for {limit} tokens and said nothing"))
        finally:
            engine.close()

    def abandon(self) -> None:
        self._waiting = {}

    def _round(
        self, engine: VllmEngine, entries: Sequence[tuple[JudgeItem, Done]], limit: int, last: bool
    ) -> list[tuple[JudgeItem, Done]]:
        """Judge items with replies of at most `limit` tokens; returns those that need more.

        last: there is no more, so that only thoughts without an end are returned.
        """
        by_key = {item.key: (item, done) for item, done in entries}
        reader = _Reader(self._prompts)
        replies: dict[str, dict[str, Reply]] = {key: {} for key in by_key}
        short = set[str]()
        for (key, name), output in engine.stream(self._work(by_key, engine.max_model_len, limit)):
            said = output.outputs[0]
            reply = replies[key][name] = reader.reply(output.prompt_token_ids, said)
            if said.finish_reason == "length" and needs_more(reply):
                if not last or read_reply(reply.text).missing == UNFINISHED:
                    short.add(key)
            if len(replies[key]) == len(by_key[key][0].prompts) and key not in short:
                item, done = by_key[key]
                done(judgement(key, item.judge, replies.pop(key), self.rule))
        return [by_key[key] for key in by_key if key in short]

    def _work(
        self, by_key: Mapping[str, tuple[JudgeItem, Done]], room: int, limit: int
    ) -> Iterator[Work[tuple[str, str]]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from ema_scale.inference.vllm_engine import Work

        params = partial(
            SamplingParams,
            temperature=0.0,
            # 20 alternatives for each token of a thought would fill the memory.
            logprobs=TOP_LOGPROBS if self._given or limit <= WORDS_TOKENS else None,
            stop_token_ids=self._prompts.stops,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **NEUTRAL_SAMPLING,
        )
        for item, done in by_key.values():
            filled = fill_all(item)
            ids = {name: self._prompts.ids([{"role": "user", "content": text}]) for name, text in filled.items()}
            longest = max(map(len, ids.values()))
            if longest + MAX_TOKENS > room:
                done(Judgement(key=item.key, judge=item.judge, dropped=TOO_LONG))
            else:
                for name, tokens in ids.items():
                    yield Work((item.key, name), tokens, params(max_tokens=min(limit, room - longest)))


class _Reader:
    """vLLM's output as a Reply, in the tokenizer's words."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        # Asked of the tokenizer itself: no guess from the reply is needed.
        self._splits = len(prompts.tokenizer.encode("85", add_special_tokens=False)) > 1

    def reply(self, prompt: Sequence[int], output: Any) -> Reply:
        text = self._prompts.opening(prompt) + self._prompts.text(output.token_ids)
        return Reply.of(text, self._tokens(output) if output.logprobs else None, self._splits)

    def _tokens(self, output: Any) -> list[Token]:
        """The tokens of a reply as they stand in its text; all but the last of a long one are together."""
        ids = list(output.token_ids)
        start = max(0, len(ids) - LAST_TOKENS)
        before = self._text(ids[:start])
        tokens = [Token(before)] if start else []
        for index in range(start, len(ids)):
            text = self._text(ids[: index + 1])
            tokens.append(Token(text[len(before) :], self._top(output.logprobs[index])))
            before = text
        return tokens

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._prompts.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _top(self, logprobs: Any) -> tuple[tuple[str, float], ...]:
        found = sorted(logprobs.items(), key=lambda pair: -pair[1].logprob)
        decode = self._prompts.tokenizer.decode
        return tuple((str(decode([token])), float(one.logprob)) for token, one in found)
