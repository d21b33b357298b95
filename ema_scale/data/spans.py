"""What is learned of a rendered conversation, and the one rule that every row is held to.

The rule: every message's text stands in the rendering; a learned span holds no text but the assistant's own; and the
token that ends a learned turn is learned, or the turn is counted as one without an end.

Where texts stand is found per row. What follows from it depends only on what the template writes between texts, and is
worked out once for each such skeleton.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from typing import Any, NamedTuple

from ema_scale.core.errors import UserError
from ema_scale.core.thoughts import TAGS
from ema_scale.data.formats import Message
from ema_scale.data.marks import RANGES, Marker, Part, Place
from ema_scale.data.templates import ChatTemplate

_SHAPES, _SKELETONS = 4096, 16  # how many are remembered: of conversations, and skeletons of each


@dataclass(frozen=True)
class Spans:
    """Character spans of a rendering.

    learned: what the assistant is taught to write. texts: what messages say, all else is the template's own.
    no_end: learned turns whose end is not learned, for the template writes none. unlike_prompt: turns that begin
    otherwise than the generation prompt does. reasoning_dropped: earlier turns whose reasoning the template leaves out.
    """

    full: str
    learned: list[tuple[int, int]]
    texts: list[tuple[int, int]] = field(default_factory=list)
    no_end: int = 0
    unlike_prompt: int = 0
    reasoning_dropped: int = 0


@dataclass(frozen=True)
class _Turn:
    """A learned turn: it begins `lead` characters before its first part and ends `tail` characters after its last."""

    first: int
    last: int
    lead: int
    tail: int
    ends: bool
    as_prompted: bool


@dataclass(frozen=True)
class _Plan:
    turns: tuple[_Turn, ...] = ()
    reasoning_dropped: int = 0
    problem: str | None = None


class _Skeleton(NamedTuple):
    """What the template writes between the parts that it shows: gaps[i] before shown[i], the last behind all."""

    shown: tuple[int, ...]
    gaps: tuple[str, ...]
    plan: _Plan

    def places(self, parts: Sequence[Part], full: str) -> list[Place] | None:
        """Where the parts stand in `full`, if it is this skeleton filled with them."""
        if "".join([x for n, gap in zip(self.shown, self.gaps, strict=False) for x in (gap, parts[n].text)]) != (
            full[: len(full) - len(self.gaps[-1])]
        ) or not full.endswith(self.gaps[-1]):
            return None
        found, position = [], 0
        for number, gap in zip(self.shown, self.gaps, strict=False):
            start = position + len(gap)
            position = start + len(parts[number].text)
            found.append(Place(number, start, position))
        return found


class SpanFinder:
    """Finds spans with one chat template."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._skeletons: dict[Any, list[_Skeleton]] = {}

    def find(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, texts: bool = False
    ) -> Spans:
        """Spans of messages that are as the template takes them (`ChatTemplate.prepare`). A conversation in which no
        assistant speaks ends where its answer would begin.

        texts: also what messages say. Raises UserError for a row that breaks the rule.
        """
        template = self.template
        opens = not any(m["role"] == "assistant" for m in messages)
        if tools and not template.shows_tools:
            raise UserError("the row has tools, and the chat template shows none")
        marked_by_template = template.marks_generation and not opens
        full, given = template.rendered(messages, tools, generation_prompt=opens, spans=marked_by_template)
        marker = Marker(messages, *RANGES[0])
        parts = marker.parts
        key = (tuple([(m["role"], m.get("learn", True)) for m in messages]), tuple(marker.shape))
        skeletons = self._skeletons.setdefault(key, [])
        for skeleton in skeletons:
            if (places := skeleton.places(parts, full)) is not None:
                break
        else:
            marker, places = self._places(messages, tools, full, opens)
            skeleton = self._skeleton(marker, messages, tools, full, places)
            if len(places) == len(skeleton.shown):  # a text that is shown twice is looked at in every row
                self._remember(skeletons, skeleton)
        spans = _spans(skeleton.plan, full, places, parts, messages)
        if marked_by_template:
            spans = self._given(spans, given, parts, places, messages)
        if texts:
            spans = replace(spans, texts=self._texts(full, messages, parts, places))
        return spans

    def _places(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], full: str, opens: bool
    ) -> tuple[Marker, list[Place]]:
        for start, size, inside in (*((*more, False) for more in RANGES), *((*more, True) for more in RANGES)):
            marker = Marker(messages, start, size, inside=inside)
            if not marker.fits:
                continue
            text, places = self._read(marker, marker.messages, tools, opens)
            if text == full and (not inside or all(full[p.start : p.end] == marker.parts[p.part].text for p in places)):
                return marker, places
        raise UserError("the chat template writes other things with other texts: where these texts stand is unknown")

    def _read(
        self, marker: Marker, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], opens: bool
    ) -> tuple[str, list[Place]]:
        try:
            return marker.read(self.template.render(messages, tools, generation_prompt=opens))
        except UserError:  # a template that looks into texts may refuse marks
            return "", []

    def _skeleton(
        self,
        marker: Marker,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        full: str,
        places: Sequence[Place],
    ) -> _Skeleton:
        shown, gaps = _between(full, places)
        try:
            plan = _Planner(self.template, marker, messages, tools, shown, gaps).plan()
        except UserError as problem:
            plan = _Plan(problem=str(problem))
        return _Skeleton(shown, gaps, plan)

    def _remember(self, skeletons: list[_Skeleton], skeleton: _Skeleton) -> None:
        skeletons.insert(0, skeleton)
        del skeletons[_SKELETONS:]
        if len(self._skeletons) > _SHAPES:
            self._skeletons.clear()

    def _given(
        self,
        spans: Spans,
        given: Sequence[tuple[int, int]],
        parts: Sequence[Part],
        places: Sequence[Place],
        messages: Sequence[Message],
    ) -> Spans:
        """The template's own `{% generation %}` blocks, held to the rule."""
        learned, no_end = [], 0
        for start, end in given:
            inside = [p for p in places if p.end > start and p.start < end]
            for place in inside:
                if messages[parts[place.part].message]["role"] != "assistant":
                    raise UserError(_within(place, parts, messages))
            if not inside or any(messages[parts[p.part].message].get("learn", True) for p in inside):
                learned.append((start, end))
        for start, end in spans.learned:
            own = [p for p in places if start <= p.start and p.end <= end]
            out = [p for p in own if not any(a <= p.start and p.end <= b for a, b in learned)]
            if out:
                number = parts[out[0].part].message
                raise UserError(f"the chat template's {{% generation %}} block leaves out the text of turn {number}")
            no_end += not any(a <= end - 1 < b for a, b in learned)
        return replace(spans, learned=learned, no_end=no_end + spans.no_end)

    def _texts(
        self, full: str, messages: Sequence[Message], parts: Sequence[Part], places: Sequence[Place]
    ) -> list[tuple[int, int]]:
        """What messages say: their parts, and what of the content stands around and between them as it does there."""
        found: list[tuple[int, int]] = []
        reached: tuple[int, int] | None = None  # message, and place in its content, where the last span ends
        for place in places:
            part = parts[place.part]
            if part.place < 0:
                found.append((place.start, place.end))
                reached = None
                continue
            content = messages[part.message]["content"]
            keeps_before, keeps_after = self.template.keeps_space.get(messages[part.message]["role"], (False, False))
            start, end, stop = place.start, place.end, part.place + len(part.text)
            if (
                reached
                and reached[0] == part.message
                and full[found[-1][1] : start] == content[reached[1] : part.place]
            ):
                start = found.pop()[0]
            else:
                lead = content[: part.place]
                if (keeps_before or lead.strip()) and full.endswith(lead, 0, start):
                    start -= len(lead)
            trail = content[stop:]
            if (keeps_after or trail.strip()) and not TAGS.search(trail) and full.startswith(trail, end):
                end, stop = end + len(trail), len(content)
            found.append((start, end))
            reached = (part.message, stop)
        return found


def _between(full: str, places: Sequence[Place]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The parts that are shown, each where it is shown first, and what stands before each and behind the last."""
    shown: dict[int, Place] = {}
    for place in places:
        shown.setdefault(place.part, place)
    gaps, position = [], 0
    for place in shown.values():
        gaps.append(full[position : place.start])
        position = place.end
    return tuple(shown), (*gaps, full[position:])


def _spans(
    plan: _Plan, full: str, places: Sequence[Place], parts: Sequence[Part], messages: Sequence[Message]
) -> Spans:
    if plan.problem is not None:
        raise UserError(plan.problem)
    firsts: dict[int, Place] = {}
    for place in places:
        firsts.setdefault(place.part, place)
    learned = [(firsts[turn.first].start - turn.lead, firsts[turn.last].end + turn.tail) for turn in plan.turns]
    if len(places) > len(firsts):  # texts that the template shows twice
        for place in places:
            inside = any(place.end > start and place.start < end for start, end in learned)
            if inside and messages[parts[place.part].message]["role"] != "assistant":
                raise UserError(_within(place, parts, messages))
    no_end = sum(not turn.ends for turn in plan.turns)
    unlike = sum(not turn.as_prompted for turn in plan.turns)
    return Spans(full, learned, [], no_end, unlike, plan.reasoning_dropped)


def _within(place: Place, parts: Sequence[Part], messages: Sequence[Message]) -> str:
    number = parts[place.part].message
    return f"the chat template shows the text of turn {number} ({messages[number]['role']}) within an answer"


class _Planner:
    """Works out where the learned spans of one skeleton begin and end."""

    def __init__(
        self,
        template: ChatTemplate,
        marker: Marker,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        shown: Sequence[int],
        gaps: Sequence[str],
    ) -> None:
        self.template, self.marker, self.parts = template, marker, marker.parts
        self.messages, self.tools = messages, tools
        self.shown = list(shown)
        self.gaps = gaps

    def plan(self) -> _Plan:
        dropped = self._check_all_shown()
        turns = []
        for index, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            own = [i for i, number in enumerate(self.shown) if self.parts[number].message == index]
            if not own:
                raise UserError(f"the chat template does not show the text of turn {index} (assistant)")
            if len(own) <= own[-1] - own[0]:
                raise UserError(f"the chat template shows other texts within the answer of turn {index}")
            lead, as_prompted = self._lead(index, own[0])
            tail, ends = self._tail(index, own[-1])
            if message.get("learn", True):
                turns.append(_Turn(self.shown[own[0]], self.shown[own[-1]], lead, tail, ends, as_prompted))
        return _Plan(tuple(turns), dropped)

    def _check_all_shown(self) -> int:
        """Earlier turns whose reasoning is not shown. Raises UserError for any other text that is not."""
        missing = [part for number, part in enumerate(self.parts) if number not in self.shown]
        last = max((i for i, m in enumerate(self.messages) if m["role"] == "assistant"), default=-1)
        for part in missing:
            role = self.messages[part.message]["role"]
            if part.kind != "thought":
                what = "a tool call" if part.kind == "call" else "the text"
                raise UserError(f"the chat template does not show {what} of turn {part.message} ({role})")
            if part.message == last:
                raise UserError(
                    f"the chat template does not show the reasoning of turn {part.message} ({role}); take it out of "
                    "the rows, or set model.chat_template to one that shows it"
                )
        return len({part.message for part in missing})

    def _lead(self, index: int, first: int) -> tuple[int, bool]:
        """Characters between where the answer is to begin, by the template's generation prompt, and its first text;
        and whether the whole prompt stands before them."""
        gap = self.gaps[first]
        # There is no prompt before the first turn; some templates refuse the beginning of a conversation.
        found = self._rendered(index, generation_prompt=True) if index else None
        if found is None:
            return self._lead_by_header(gap)
        shown, gaps = found
        self._check_history(index, shown, gaps, first)
        tail = gaps[-1]
        if list(shown[-1:]) != self.shown[first - 1 : first]:
            # The text before this answer is another one than in the prompt: the header is looked for by itself.
            return self._lead_by_header(gap)
        return _lead_behind(gap, 0, tail)

    def _lead_by_header(self, gap: str) -> tuple[int, bool]:
        """The header that begins an answer, looked for in `gap`; the row may go on otherwise behind it."""
        header = self.template.generation_prompt
        for length in range(len(header), 0, -1):
            place = gap.rfind(header[:length])
            if place >= 0 and 2 * length >= len(header):
                return _lead_behind(gap, place, header)
        return 0, not header

    def _rendered(self, until: int, generation_prompt: bool) -> tuple[tuple[int, ...], tuple[str, ...]] | None:
        """The parts and gaps of the conversation before turn `until`; None if the template refuses it."""
        try:
            marked = self.template.render(self.marker.messages[:until], self.tools, generation_prompt=generation_prompt)
        except UserError:
            return None
        return _between(*self.marker.read(marked))

    def _check_history(self, index: int, shown: Sequence[int], gaps: Sequence[str], first: int) -> None:
        """Raises UserError if the conversation so far is written otherwise than in the whole one."""
        before = self.shown[:first]
        thoughts = {number for number in {*shown} ^ {*before} if self.parts[number].kind == "thought"}
        both = [number for number in before if number in shown]
        ours = dict(zip(self.shown, zip([-1, *self.shown], self.gaps, strict=False), strict=False))
        theirs = dict(zip(shown, zip([-1, *shown], gaps, strict=False), strict=False))
        same = [n for n in shown if n not in thoughts] == [n for n in before if n not in thoughts]
        if not same or any(ours[number] != theirs[number] for number in both if ours[number][0] == theirs[number][0]):
            raise UserError(
                f"the chat template rewrites earlier turns when later ones follow: turn {index} cannot be found"
            )

    def _tail(self, index: int, last: int) -> tuple[int, bool]:
        """Characters after the last text that are learned, and whether the end of the turn is among them."""
        gap = self.gaps[last + 1]
        ends = [gap.find(token) + len(token) for token in self.template.ends if token and token in gap]
        if ends:
            return min(ends), True
        closing = self._rendered(index + 1, generation_prompt=False)
        own = closing[1][-1] if closing and closing[0][-1:] == (self.shown[last],) else ""
        shared = commonprefix([own, gap])
        special = self.template.find_special(shared)
        if special:
            return special[-1][1], True
        rest = gap[len(shared) :]
        blank = len(rest) - len(rest.lstrip())
        following = [end for start, end in self.template.find_special(rest) if start == blank]
        if following:  # the role marker that follows ends the turn
            return len(shared) + following[0], True
        calls = "tool_calls" in self.messages[index]
        return (len(shared.rstrip()) if calls else 0), False


def _lead_behind(gap: str, start: int, prompt: str) -> tuple[int, bool]:
    """Characters of `gap` behind what it shares with the prompt from `start` on; and whether that is all of it."""
    shared = len(commonprefix([prompt, gap[start:]]))
    end = start + shared
    if shared < len(prompt):
        # The prompt goes on otherwise (it opens a thought, say): no token is cut in two where they part.
        opened = max(gap.rfind("<", start, end), gap.rfind("[", start, end))
        closed = max(gap.rfind(">", start, end), gap.rfind("]", start, end))
        end = opened if opened > closed else end
    return len(gap) - end, shared == len(prompt)
