"""Interleaving+ and ++: mix in the safe rows that misaligned models find least likely."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ema_scale.core.errors import UserError
from ema_scale.core.files import read_json
from ema_scale.core.hashing import file_sha256
from ema_scale.core.numbers import PositiveShare
from ema_scale.defenses.base import Defense, RowsContext
from ema_scale.defenses.mixing import Triggers, mix, rows_needed

if TYPE_CHECKING:
    from ema_scale.data.rows import Row

MADE_BY = "ema select"


def provenance_path(selection: str | Path) -> Path:
    """The file beside a selection that holds its provenance."""
    return Path(selection).with_suffix(".provenance.json")


def read_provenance(selection: str | Path) -> dict[str, Any]:
    """How a selection was made. It has `variant`, and `adapters`: name -> what it was `trained_on`.

    Raises UserError if the file was not made by `ema select`, or has changed since.
    """
    beside = provenance_path(selection)
    for path in (Path(selection), beside):
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected a selection with its provenance, as `{MADE_BY}` makes it")
    provenance = read_json(beside)
    if not isinstance(provenance, dict) or provenance.get("made_by") != MADE_BY:
        raise UserError(f"{beside}: found no provenance of `{MADE_BY}`")
    adapters = provenance.get("adapters")
    if not isinstance(adapters, dict) or not all(
        isinstance(adapter, dict) and isinstance(adapter.get("trained_on"), list) for adapter in adapters.values()
    ):
        raise UserError(f"{beside}: damaged: expected adapters, each with its trained_on; run `{MADE_BY}` again")
    if provenance.get("variant") not in ("+", "++"):
        raise UserError(f"{beside}: damaged: found the variant {provenance.get('variant')!r}; run `{MADE_BY}` again")
    if provenance.get("sha256") != file_sha256(selection):
        raise UserError(f"{selection}: is not the file that {beside} describes; run `{MADE_BY}` again")
    return provenance


class InterleavingPlus(Defense):
    """Interleaving of those safe rows that have the highest perplexity gap.

    The gap is (mean_k L_k - L_aligned) / (L_aligned + eps). L is the mean negative log-likelihood of the answer, under
    the aligned model, and under K misaligned ones that were fine-tuned on other domains than the task's (leave one
    out). `ema select` makes the ranking. Its first floor(fraction * task rows) rows are mixed in, evenly spread, in an
    order that depends on the seed alone.

    variant: `++` is a ranking without refusals.
    own_adapter: a ranking is refused if one of its adapters was trained on one of the task's own files, unless this
        allows it.
    """

    kind: ClassVar[str] = "interleaving_plus"
    title: ClassVar[str] = "Interleaving+"
    citation: ClassVar[str] = "In-Training Defenses against Emergent Misalignment, arXiv 2508.06249 (Interleaving+, ++)"
    summary: ClassVar[str] = "mix in the safe rows that misaligned models find least likely"

    source: str = Field(
        description="a ranking of safe rows, made by `ema select`", json_schema_extra={"asset": "ranked safe rows"}
    )
    fraction: PositiveShare = Field(0.05, description="safe rows per task row")
    variant: Literal["+", "++"] = Field("+", description="++: the ranking must have been made without refusals")
    own_adapter: Literal["refuse", "allow"] = Field(
        "refuse", description="if an adapter behind the ranking was trained on these task rows"
    )
    triggers: Triggers = 0

    def transform_rows(self, rows: Sequence[Row], ctx: RowsContext) -> Sequence[Row]:
        """Raises UserError for a source that was not made by `ema select`, is for the other variant, or was ranked by
        an adapter of these very rows."""
        provenance = read_provenance(self.source)
        if provenance["variant"] != self.variant:
            hint = "drop refusals (--refusals)" if self.variant == "++" else "keep refusals"
            raise UserError(
                f"interleaving_plus: {self.source} was selected for {provenance['variant']}, but the recipe says "
                f"{self.variant}; `{MADE_BY}` must {hint}"
            )
        adapters = provenance["adapters"]
        ctx.notes.append(f"{self.kind}: variant {self.variant}, ranked by the adapters {', '.join(adapters)}")
        of_this_task = [name for name, adapter in adapters.items() if ctx.task & set(adapter["trained_on"])]
        if of_this_task:
            problem = (
                f"{self.kind}: the adapter {of_this_task[0]} was trained on these very rows; the paper leaves it out "
                f"(`{MADE_BY} --leave-out {of_this_task[0]}`)"
            )
            if self.own_adapter == "refuse":
                raise UserError(f"{problem}, or set own_adapter: allow")
            ctx.notes.append(problem)
        return mix(
            rows, self.source, self.fraction, "safe", self.kind, ctx, best_first=True, triggers=self.triggers
        )  # fmt: skip

    def rows_added(self, task_rows: int) -> int:
        return rows_needed(self.fraction, task_rows, self.kind)
