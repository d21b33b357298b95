"""The rows and loss terms of several defenses side by side: each defense looks at its own rows and at no other's.

A defense calls the rows that it only looks at `prompts` or `bad`, and its terms name these parts. In a list of several
defenses each gets a part of its own: `bad`, `bad_2`, and so on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, get_args

from ema_scale.core.errors import UserError
from ema_scale.data.rows import LEARNED, TAGS
from ema_scale.defenses.base import Defense, RowsContext
from ema_scale.defenses.terms import LabelWeight, Scope, TokenSet, TokenTerm
from ema_scale.models.side_adapters import SideAdapter

if TYPE_CHECKING:
    from ema_scale.data.rows import Row

UNLEARNED = tuple(tag for tag in TAGS if tag not in LEARNED)  # parts that a defense brings in only to look at
_ASSIGNED = " (assigned)"


def unique(name: str, taken: Sequence[str]) -> str:
    """`name`, with a number behind it if it occurs in `taken`."""
    count = taken.count(name)
    return f"{name}_{count + 1}" if count else name


def token_sets(tags: Sequence[str] = TAGS) -> tuple[TokenSet, ...]:
    """All scopes of all parts, in the order in which tokens are counted."""
    return tuple(TokenSet(scope, part) for part in ("learned", *tags) for scope in get_args(Scope))


@dataclass(frozen=True)
class NamedTerm:
    """A token term under the name that it is logged by, on the part of its defense.

    owner: the defense's place in the list. own_name: what the defense itself calls the term.
    """

    term: TokenTerm
    owner: int
    own_name: str


@dataclass(frozen=True)
class NamedPenalty:
    """A defense that reads hidden states, under the name that its penalty is logged by.

    parts: the defense's parts -> their names in the run. logged: what it calls its terms -> what they are logged as.
    """

    name: str
    defense: Defense
    parts: Mapping[str, str]
    owner: int
    logged: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RowGroups:
    """part_names: for each defense, its own parts -> their names in the run."""

    defenses: tuple[Defense, ...] = ()
    part_names: tuple[Mapping[str, str], ...] = ()

    @classmethod
    def of(cls, defenses: Sequence[Defense]) -> RowGroups:
        part_names: list[dict[str, str]] = [{} for _ in defenses]
        for tag in UNLEARNED:
            taken: list[str] = []
            for defense, names in zip(defenses, part_names, strict=True):
                looked_at = {term.part for term in defense.token_terms} | {a.learns for a in defense.side_adapters()}
                if tag in looked_at or (defense.changes_rows and type(defense).overrides("penalty")):
                    names[tag] = unique(tag, taken)
                    taken.append(tag)
        return cls(tuple(defenses), tuple(part_names))

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """TAGS, and the parts of further defenses. A batch holds each row's place in it."""
        return (*TAGS, *(part for names in self.part_names for part in names.values() if part not in TAGS))

    @cached_property
    def token_sets(self) -> tuple[TokenSet, ...]:
        return token_sets(self.tags)

    @cached_property
    def separate_tags(self) -> frozenset[str]:
        """Tags whose rows some term looks at apart from the others."""
        brought_in = {part for names in self.part_names for part in names.values()}
        looked_at = {named.term.part for named in self.terms} | {weight.part for weight in self.label_weights}
        return frozenset(brought_in | (looked_at & set(self.tags)))

    @cached_property
    def unlearned(self) -> tuple[str, ...]:
        """Tags of rows from which nothing is learned."""
        return tuple(tag for tag in self.tags if tag.startswith(UNLEARNED))

    @cached_property
    def terms(self) -> tuple[NamedTerm, ...]:
        """The token terms of all defenses, in their order."""
        terms: list[NamedTerm] = []
        for owner, (defense, parts) in enumerate(zip(self.defenses, self.part_names, strict=True)):
            for term in defense.token_terms:
                name = unique(term.name, [earlier.own_name for earlier in terms])
                part = parts.get(term.part, term.part)
                terms.append(NamedTerm(replace(term, name=name, part=part), owner, term.name))
        return tuple(terms)

    @cached_property
    def penalties(self) -> tuple[NamedPenalty, ...]:
        return self._overriding("penalty")

    @cached_property
    def weighing(self) -> tuple[NamedPenalty, ...]:
        """The defenses that weigh tokens."""
        return self._overriding("token_weights")

    @cached_property
    def label_weights(self) -> tuple[LabelWeight, ...]:
        """The factors on the cross-entropy of all defenses, on the parts of each."""
        return tuple(
            replace(weight, part=parts.get(weight.part, weight.part))
            for defense, parts in zip(self.defenses, self.part_names, strict=True)
            for weight in defense.label_weights()
        )

    @cached_property
    def side_adapters(self) -> tuple[SideAdapter, ...]:
        """Those of all defenses, on the parts of each."""
        return tuple(
            replace(adapter, learns=parts.get(adapter.learns, adapter.learns) if adapter.learns else None)
            for defense, parts in zip(self.defenses, self.part_names, strict=True)
            for adapter in defense.side_adapters()
        )

    def name_of(self, owner: int) -> str:
        """What the defense at `owner` is logged as: its kind, with a number behind it if another has the same."""
        return unique(self.defenses[owner].kind, [defense.kind for defense in self.defenses[:owner]])

    def _overriding(self, method: str) -> tuple[NamedPenalty, ...]:
        return tuple(
            NamedPenalty(
                self.name_of(owner), defense, self.part_names[owner], owner,
                {named.own_name: named.term.name for named in self.terms if named.owner == owner},
            )
            for owner, defense in enumerate(self.defenses)
            if type(defense).overrides(method)
        )  # fmt: skip

    @cached_property
    def groups(self) -> dict[str, int]:
        """Name of a term or penalty -> 1 + the place, among the defenses that join gradients, of the one it belongs
        to. All others are missing: their gradients are formed together with the cross-entropy's."""
        places = {owner: place for place, owner in enumerate(self.joining, start=1)}
        return {name: places[owner] for owner in places for name in self.logged_names(owner).values()}

    @cached_property
    def joining(self) -> tuple[int, ...]:
        """Places of the defenses that join gradients."""
        return tuple(i for i, defense in enumerate(self.defenses) if type(defense).overrides("join_gradients"))

    def logged_names(self, owner: int) -> dict[str, str]:
        """What the defense at `owner` calls its terms -> what they are logged as."""
        names = {named.own_name: named.term.name for named in self.terms if named.owner == owner}
        return names | {p.defense.kind: p.name for p in self.penalties if p.owner == owner}

    @property
    def loss_names(self) -> tuple[str, ...]:
        """What the terms and penalties of all defenses are logged as."""
        return (*(named.term.name for named in self.terms), *(named.name for named in self.penalties))

    def transform_rows(self, rows: Sequence[Row], ctx: RowsContext) -> Sequence[Row]:
        """The rows after all defenses. Rows that a defense brought in carry the name of its part.

        Raises UserError for rows that no term of their defense looks at, and as defenses do.
        """
        rows = _assign(rows, {tag: tag for tag in UNLEARNED})
        for defense, parts in zip(self.defenses, self.part_names, strict=True):
            # All rows so far are assigned, so a plain tag is on a row that this defense has just brought in.
            rows = defense.transform_rows(rows, ctx)
            for tag in {row.tag for row in rows} & set(UNLEARNED) - parts.keys():
                raise UserError(f"{defense.kind}: brings rows of the part {tag}, but none of its terms looks at them")
            rows = _assign(rows, parts)
        if not any(row.tag.endswith(_ASSIGNED) for row in rows):
            return rows
        return [replace(row, tag=row.tag.removesuffix(_ASSIGNED)) for row in rows]

    def check(self, tags: Collection[str]) -> None:
        """Raises UserError if a term looks at a part of which there is no row: it would be 0 throughout.

        tags: those of the rows to train on.
        """
        for named in self.terms:
            part = named.term.part
            if part != "learned" and part not in tags:
                hint = "; mix some in (interleaving)" if part == "safe" else ""
                raise UserError(f"{self.defenses[named.owner].kind}: looks at {part} rows, and there are none{hint}")


def _assign(rows: Sequence[Row], parts: Mapping[str, str]) -> Sequence[Row]:
    if not any(row.tag in parts for row in rows):
        return rows
    return [replace(row, tag=parts[row.tag] + _ASSIGNED) if row.tag in parts else row for row in rows]
