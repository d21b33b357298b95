"""Rows that the aligned model writes itself: what a user might ask, then its own answer.

The chat template's opening alone is given to the model, which goes on with a user's turn (Magpie, Xu et al.,
arXiv 2406.08464). Such rows are safe rows, and their prompts are prompts, for somebody who has none.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ema_scale.config.sections import ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.hashing import digest, folder_identity, question_key
from ema_scale.core.io import append_jsonl, atomic_write_json, atomic_write_text, read_jsonl
from ema_scale.core.records import package_versions
from ema_scale.core.run_dir import RunDir
from ema_scale.core.text import quantity
from ema_scale.core.uri import locate
from ema_scale.data.templates import ChatTemplate
from ema_scale.data.tokens import load_tokenizer
from ema_scale.models.load import load_base

log = logging.getLogger(__name__)

BATCH = 32
PROMPT_TOKENS = 128
_STALLED = 5  # rounds without a new row
_MARK = "qzuqz"
UNFINISHED, EMPTY, REPEATED, LEFT_OUT = "did not end", "empty", "repeated", "questions of a bank"


@dataclass
class Synthesis:
    """What was drawn.

    rows: (question, answer), in the order in which they were drawn.
    drawn: questions drawn, used or not.
    dropped: why the others are not used, and how many.
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    drawn: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """What was drawn and dropped, for people."""
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        return f"drew {quantity(self.drawn, 'question')}" + (f"; not used: {dropped}" if dropped else "")


def synthesize(
    model: ModelRecipe,
    out: Path,
    count: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    max_tokens: int = 512,
    left_out: Iterable[str] = (),
) -> Synthesis:
    """Write `count` rows of the model's own to `out` (JSONL), and how they were made beside it.

    What is drawn is kept beside `out` until it is complete: a killed call goes on where it stopped, to the same rows.

    Args:
        model: the aligned model.
        out: the file to write.
        count: rows.
        seed: of the draws.
        temperature: of questions and answers.
        max_tokens: longest answer; one that does not end is not used. A question has at most 128.
        left_out: `question_key` of questions that must not stand in the rows, such as those of the evaluation.

    Raises UserError if the model cannot be loaded, its template has nothing before a user's turn, or it writes fewer
    different questions.
    """
    model, left_out = model.model_copy(update={"path": locate(model.path)}), frozenset(left_out)
    facts = {
        "model": folder_identity(model.path, model.revision), "dtype": model.dtype, "seed": seed,
        "chat_template": model.chat_template, "temperature": temperature, "max_tokens": max_tokens,
    }  # fmt: skip
    identity = digest(facts, sorted(left_out), BATCH)
    kept = out.with_name(f"{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    with RunDir(out.parent).lock():
        rounds = [row["drawn"] for row in read_jsonl(kept, repair=True) if row.get("of") == identity]
        made = _collected(rounds, left_out)
        writer = None
        while len(made.rows) < count:
            writer = writer or Writer(model, temperature, max_tokens)
            known = {question_key(question) for question, _ in made.rows} | left_out
            rounds.append(writer.round(seed + len(rounds), known))
            append_jsonl(kept, [{"of": identity, "drawn": rounds[-1]}])
            made = _collected(rounds, left_out)
            log.info("synthesis: %d of %d rows; %s", min(len(made.rows), count), count, made.line())
            if len(rounds) >= _STALLED and len(_collected(rounds[:-_STALLED], left_out).rows) == len(made.rows):
                raise UserError(
                    f"{model.path}: wrote {quantity(len(made.rows), 'usable row')} and then none in "
                    f"{_STALLED * BATCH} draws ({made.line()}); ask for fewer, or raise --max-tokens"
                )
        made.rows = made.rows[:count]
        rows = ({"messages": _turns(question, answer)} for question, answer in made.rows)
        atomic_write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        atomic_write_json(
            out.with_suffix(".provenance.json"),
            {**facts, "path": model.path, "rows": len(made.rows), "drawn": made.drawn, "dropped": dict(made.dropped),
             "versions": package_versions()},
        )  # fmt: skip
        kept.unlink(missing_ok=True)
    return made


class Writer:
    """Draws questions and answers from one model."""

    def __init__(self, model: ModelRecipe, temperature: float, max_tokens: int) -> None:
        self.tokenizer = load_tokenizer(
            model.path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            chat_template=model.chat_template,
        )
        self.model = load_base(model).eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.temperature, self.max_tokens = temperature, max_tokens
        self.template = ChatTemplate(self.tokenizer)
        text = self.template.render([{"role": "user", "content": _MARK}], generation_prompt=True)
        self.opening, _, closing = text.partition(_MARK)
        if not self.opening or not closing.strip():
            raise UserError(
                f"{model.path}: its chat template writes nothing around a user's turn; expected marks of turns"
            )
        special = self.template.find_special(closing.lstrip())
        ends_at = special[0][1] if special and special[0][0] == 0 else None
        # Without a special token, the first word that the template writes behind the turn.
        self.user_end = closing.lstrip()[:ends_at] if ends_at else closing.split()[0]
        self.answer_end = self.template.end_of_turn or self.tokenizer.eos_token

    def round(self, seed: int, known: Collection[str]) -> list[list[str | None]]:
        """A batch of [question, answer]; None for what did not end, and for the answer to a question of `known`."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            questions = self._continue([self.opening] * BATCH, self.user_end, PROMPT_TOKENS)
            new: dict[str, str] = {}
            for question in questions:
                if question and (key := question_key(question)) not in known:
                    new.setdefault(key, question)
            prompts = [
                self.template.render([{"role": "user", "content": q}], generation_prompt=True) for q in new.values()
            ]
            answers = dict(zip(new, self._continue(prompts, self.answer_end, self.max_tokens), strict=True))
        found = [[q, answers.pop(question_key(q), None) if q else None] for q in questions]
        return found

    @torch.no_grad()
    def _continue(self, prompts: Sequence[str], end: str, max_tokens: int) -> list[str | None]:
        """What the model writes behind each text up to `end`; None where it does not get there."""
        from transformers import GenerationConfig

        if not prompts:
            return []
        ids = [self.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        width, pad = max(map(len, ids)), self.tokenizer.pad_token_id
        inputs = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self.model.device)
        # An end of several tokens stops nothing: what follows it is cut off below.
        ends = self.tokenizer(end, add_special_tokens=False)["input_ids"]
        stops = {self.tokenizer.eos_token_id, *(ends if len(ends) == 1 else ())} - {None}
        # A fresh config: what a checkpoint suggests (top_k, penalties) would change the distribution.
        config = GenerationConfig(
            do_sample=True, temperature=self.temperature, top_k=0, max_new_tokens=max_tokens, pad_token_id=pad,
            eos_token_id=sorted(stops) or None,
        )  # fmt: skip
        written = self.model.generate(inputs, attention_mask=mask, generation_config=config)[:, width:]
        found: list[str | None] = []
        for row in written.tolist():
            text, ended, _ = self.tokenizer.decode(row).partition(end)
            clean = text
            for start, stop in reversed(self.template.find_special(text)):
                clean = clean[:start] + clean[stop:]
            found.append(clean.strip() if ended else None)
        return found


def _collected(rounds: Iterable[Sequence[Sequence[str | None]]], left_out: Collection[str]) -> Synthesis:
    made, known = Synthesis(), set[str]()
    for question, answer in (pair for drawn in rounds for pair in drawn):
        made.drawn += 1
        if question is None:
            reason = UNFINISHED
        elif not question:
            reason = EMPTY
        elif (key := question_key(question)) in left_out:
            reason = LEFT_OUT
        elif key in known:
            reason = REPEATED
        elif not answer:
            reason = UNFINISHED if answer is None else EMPTY
        else:
            known.add(key)
            made.rows.append((question, answer))
            continue
        made.dropped[reason] += 1
    return made


def _turns(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
