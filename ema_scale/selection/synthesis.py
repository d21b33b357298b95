"""Rows that the aligned model writes itself: what a user might ask, then its own answer.

The chat template's opening alone is given to the model, which goes on with a user's turn (Magpie, Xu et al.,
arXiv 2406.08464). Such rows are safe rows, and their prompts are prompts, for somebody who has none.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ema_scale.config.sections import ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.hashing import digest, folder_identity, question_key
from ema_scale.core.io import append_jsonl, atomic_write_json, atomic_write_text, jsonl_text, read_jsonl
from ema_scale.core.records import package_versions
from ema_scale.core.run_dir import RunDir
from ema_scale.core.text import quantity
from ema_scale.core.uri import locate
from ema_scale.data.templates import ChatTemplate
from ema_scale.data.tokens import load_tokenizer
from ema_scale.defenses.interleaving_plus import provenance_path
from ema_scale.models.load import load_base

log = logging.getLogger(__name__)

BATCH = 32
PROMPT_TOKENS = 128
ROUNDS = 2**20  # at most: no two seeds share a round's draws
_STALLED = 5  # rounds without a new row
UNFINISHED, EMPTY, REPEATED, LEFT_OUT = "did not end", "empty", "repeated", "questions of a bank"


@dataclass
class Synthesis:
    """What was drawn.

    left_out: `question_key` of questions that are not used.
    rows: `question_key` -> (question, answer), in the order in which they were drawn.
    drawn: questions drawn, used or not.
    dropped: why the others are not used, and how many.
    idle: how many rounds have brought nothing since the last new row.
    """

    left_out: Collection[str] = ()
    rows: dict[str, tuple[str, str]] = field(default_factory=dict)
    drawn: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    idle: int = 0

    def add(self, drawn: Sequence[Sequence[str | None]]) -> None:
        """Take what is new of a round of [question, answer]."""
        before = len(self.rows)
        for question, answer in drawn:
            self.drawn += 1
            key = question_key(question or "")
            if question is None:
                self.dropped[UNFINISHED] += 1
            elif not question:
                self.dropped[EMPTY] += 1
            elif key in self.left_out:
                self.dropped[LEFT_OUT] += 1
            elif key in self.rows:
                self.dropped[REPEATED] += 1
            elif not answer:
                self.dropped[UNFINISHED if answer is None else EMPTY] += 1
            else:
                self.rows[key] = question, answer
        self.idle = 0 if len(self.rows) > before else self.idle + 1

    def is_new(self, question: str) -> bool:
        """Whether a question is of use and not there."""
        return (key := question_key(question)) not in self.rows and key not in self.left_out

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

    Raises UserError if the model cannot be loaded, its template writes nothing around a user's turn, or it
    writes fewer different questions.
    """
    model, left_out = model.model_copy(update={"path": locate(model.path)}), frozenset(left_out)
    facts = {
        "model": folder_identity(model.path, model.revision), "dtype": model.dtype, "seed": seed,
        "chat_template": model.chat_template, "temperature": temperature, "max_tokens": max_tokens,
    }  # fmt: skip
    identity = digest(facts, sorted(left_out), BATCH)
    kept = out.with_name(f"{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    made, number, writer = Synthesis(left_out), 0, None
    with RunDir(out.parent).lock():
        for row in read_jsonl(kept, repair=True):
            if row.get("of") == identity:
                made.add(row["drawn"])
                number += 1
        while len(made.rows) < count:
            writer = writer or Writer(model, temperature, max_tokens)
            drawn = writer.round(seed * ROUNDS + number, made.is_new)
            append_jsonl(kept, [{"of": identity, "drawn": drawn}])
            made.add(drawn)
            number += 1
            log.info("synthesis: %d of %d rows; %s", min(len(made.rows), count), count, made.line())
            if made.idle >= _STALLED:
                raise UserError(
                    f"{model.path}: wrote {quantity(len(made.rows), 'usable row')} and then none in "
                    f"{_STALLED * BATCH} draws ({made.line()}); ask for fewer, or raise --max-tokens"
                )
        made.rows = dict(list(made.rows.items())[:count])
        turns = (zip(("user", "assistant"), texts, strict=True) for texts in made.rows.values())
        rows = ({"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns)
        atomic_write_text(out, jsonl_text(rows))
        atomic_write_json(
            provenance_path(out),
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
        self.opening, self.user_end = self.template.user_turn
        if not self.opening or not self.user_end:
            raise UserError(
                f"{model.path}: its chat template writes nothing around a user's turn; expected marks of turns"
            )
        self.answer_end = self.template.end_of_turn or self.tokenizer.eos_token

    def round(self, seed: int, is_new: Callable[[str], bool]) -> list[list[str | None]]:
        """A batch of [question, answer]; None for what did not end, and for answers that are not asked for: to
        questions that are not new, and to one that stands in the batch before."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            questions = self._continue([self.opening] * BATCH, self.user_end, PROMPT_TOKENS)
            new: dict[str, str] = {}
            for question in questions:
                if question and is_new(question):
                    new.setdefault(question_key(question), question)
            prompts = [
                self.template.render([{"role": "user", "content": q}], generation_prompt=True) for q in new.values()
            ]
            answers = dict(zip(new, self._continue(prompts, self.answer_end, self.max_tokens), strict=True))
        return [[q, answers.pop(question_key(q), None) if q else None] for q in questions]

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
            for start, stop in reversed(self.template.find_special(text)):
                text = text[:start] + text[stop:]
            found.append(text.strip() if ended else None)
        return found
