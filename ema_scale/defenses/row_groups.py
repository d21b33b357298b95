"""Whose rows are whose: rows that a defense brings in only to look at are its own part of the mix, whatever stands
beside it in the list.

A defense calls its rows `prompts` or `bad`, and its terms name these. In a list of several, each gets a part of its own
(`bad`, `bad_2`, ...), so that no defense looks at another's rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar, get_args

from ema_scale.core.errors import UserError
from ema_scale.data.rows import LEARNED, TAGS
from ema_scale.defenses.base import Defense, Divergence, RowsContext, Scope, token_set_name

if TYPE_CHECKING:
    from ema_scale.data.rows import Row

OWN_GROUPS = tuple(tag for tag in TAGS if tag not in LEARNED)


Value = TypeVar("Value")


def unique(name: str, taken: Sequence[str]) -> str:
    """`name`, with a number if it was taken before."""
    count = sum(other == name for other in taken)
    return f"{name}_{count + 1}" if count else name


def token_set_names(tags: Sequence[str] = TAGS) -> tuple[str, ...]:
    """The names of all scopes of all parts: the order in which tokens are counted."""
    return tuple(token_set_name(scope, part) for part in ("learned", *tags) for scope in get_args(Scope))


@dataclass(frozen=True)
class NamedDivergence:
    """A divergence under the name that it is logged by, on the part of its defense. own: its name there."""

    divergence: Divergence
    owner: int
    own: str


@dataclass(frozen=True)
class RowGroups:
    """names: for each defense of a list, what its own tags are called in it."""

    defenses: tuple[Defense, ...] = ()
    names: tuple[Mapping[str, str], ...] = ()

    @classmethod
    def of(cls, defenses: Sequence[Defense]) -> RowGroups:
        names: list[dict[str, str]] = [{} for _ in defenses]
        for tag in OWN_GROUPS:
            taken: list[str] = []
            for defense, own in zip(defenses, names, strict=True):
                if any(term.part == tag for term in defense.divergences()) or (
                    defense.changes_rows and type(defense).overrides("penalty")
                ):
                    own[tag] = unique(tag, taken)
                    taken.append(tag)
        return cls(tuple(defenses), tuple(names))

    @property
    def tags(self) -> tuple[str, ...]:
        """TAGS, and what further defenses call theirs. A row's place in it is what a batch holds."""
        return (*TAGS, *(name for own in self.names for name in own.values() if name not in TAGS))

    @property
    def covers(self) -> tuple[str, ...]:
        return token_set_names(self.tags)

    @property
    def looked_at(self) -> frozenset[str]:
        """Tags whose rows some term covers apart from the others."""
        own = {name for names in self.names for name in names.values()}
        return frozenset(own | ({term.divergence.part for term in self.terms} & set(self.tags)))

    def rows(self, rows: Sequence[Row], ctx: RowsContext) -> Sequence[Row]:
        """The rows after all defenses, each brought-in row under the name of its defense's part.

        Raises UserError for rows that no term of the defense looks at, and as defenses do.
        """
        final = {f"{tag} given": tag for tag in {row.tag for row in rows} & set(OWN_GROUPS)}
        rows = (
            [replace(row, tag=f"{row.tag} given") if row.tag in OWN_GROUPS else row for row in rows] if final else rows
        )
        for index, (defense, own) in enumerate(zip(self.defenses, self.names, strict=True)):
            rows = defense.rows(rows, ctx)
            # Until all are through, no row but a defense's own new ones has a plain name.
            for tag in {row.tag for row in rows} & set(OWN_GROUPS):
                if tag not in own:
                    raise UserError(f"{defense.kind}: brings rows of the part {tag}, and no term of it looks at them")
                final[f"{tag} {index}"] = own[tag]
                rows = [replace(row, tag=f"{tag} {index}") if row.tag == tag else row for row in rows]
        return [replace(row, tag=final[row.tag]) if row.tag in final else row for row in rows] if final else rows

    def check(self, tags: Collection[str]) -> None:
        """Raises UserError if a term looks at a part of which no row is there: it would be 0 throughout, in silence.

        tags: of the rows to train on.
        """
        for term in self.terms:
            part = term.divergence.part
            if part != "learned" and part not in tags:
                hint = "; mix some in (interleaving)" if part == "safe" else ""
                raise UserError(f"{self.defenses[term.owner].kind}: looks at {part} rows, and there are none{hint}")

    @property
    def terms(self) -> tuple[NamedDivergence, ...]:
        """The divergences of all defenses in their order."""
        found: list[NamedDivergence] = []
        for owner, (defense, own) in enumerate(zip(self.defenses, self.names, strict=True)):
            for term in defense.divergences():
                name = unique(term.name, [other.own for other in found])
                part = own.get(term.part, term.part)
                found.append(NamedDivergence(replace(term, name=name, part=part), owner, term.name))
        return tuple(found)

    def view(self, index: int, values: Mapping[str, Value]) -> dict[str, Value]:
        """Values by `cover` as the defense at `index` names them: `bad` is its own."""
        renamed = {
            token_set_name(scope, tag): values[token_set_name(scope, name)]
            for tag, name in self.names[index].items()
            for scope in get_args(Scope)
        }
        return {**values, **renamed}
