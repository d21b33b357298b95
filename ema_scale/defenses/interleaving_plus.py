"""Interleaving+ and ++: mix in the safe rows that misaligned models find least likely."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ema_scale.core.errors import UserError
from ema_scale.core.hashing import file_sha256
from ema_scale.defenses.base import Defense, RowsContext
from ema_scale.defenses.mixing import mix, rows_needed

if TYPE_CHECKING:
    from ema_scale.data.rows import Row

MADE_BY = "ema select"


def provenance_path(selection: str | Path) -> Path:
    """Where the provenance of a selection stands: beside it."""
    return Path(selection).with_suffix(".provenance.json")


def read_provenance(selection: str | Path) -> dict[str, Any]:
    """How a selection was made: `variant`, and `adapters` by name with what each was `trained_on`, are there.

    Raises UserError if the file was not made by `ema select`, or changed since.
    """
    beside = provenance_path(selection)
    for path in (Path(selection), beside):
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected a selection with its provenance, as `{MADE_BY}` makes it")
    try:
        made = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{beside}: not JSON ({error})") from None
    if not isinstance(made, dict) or made.get("made_by") != MADE_BY:
        raise UserError(f"{beside}: found no provenance of `{MADE_BY}`")
    adapters = made.get("adapters")
    if not isinstance(adapters, dict) or not all(
        isinstance(found, dict) and isinstance(found.get("trained_on"), list) for found in adapters.values()
    ):
        raise UserError(f"{beside}: damaged: expected adapters, each with its trained_on; run `{MADE_BY}` again")
    if made.get("variant") not in ("+", "++"):
        raise UserError(f"{beside}: damaged: found the variant {made.get('variant')!r}; run `{MADE_BY}` again")
    if made.get("sha256") != file_sha256(selection):
        raise UserError(f"{selection}: is not the file that {beside} describes; run `{MADE_BY}` again")
    return made


class InterleavingPlus(Defense):
    """As Interleaving, but of the safe rows those with the highest perplexity gap.

    s = (mean_k L_k - L_aligned) / (L_aligned + eps), with L the mean negative log-likelihood of the answer under the
    aligned model and under K misaligned ones, fine-tuned on other domains than the one at hand (leave one out). `ema
    select` makes the ranking; exactly floor(fraction * task rows) of its first rows are mixed in, evenly spread, in an
    order that depends on the seed alone. `++` is the same with refusals dropped before ranking.

    A ranking in which an adapter voted that was trained on one of the task's own files is refused, unless `own_adapter`
    allows it.
    """

    kind: ClassVar[str] = "interleaving_plus"
    citation: ClassVar[str] = "In-Training Defenses against Emergent Misalignment, arXiv 2508.06249 (Interleaving+, ++)"
    summary: ClassVar[str] = "mix in the safe rows that misaligned models find least likely"

    source: str = Field(description="a ranking of safe rows, made by `ema select`")
    fraction: float = Field(0.05, gt=0, le=1, description="safe rows per task row")
    variant: Literal["+", "++"] = Field("+", description="++: the ranking must have been made without refusals")

    own_adapter: Literal["refuse", "allow"] = Field(
        "refuse", description="when an adapter that was trained on these very task rows had a vote"
    )

    def transform_rows(self, rows: Sequence[Row], ctx: RowsContext) -> Sequence[Row]:
        """Raises UserError for a source that `ema select` did not make, made for the other variant, or made with an
        adapter of these very rows."""
        made = read_provenance(self.source)
        if made["variant"] != self.variant:
            hint = "drop refusals (--refusals)" if self.variant == "++" else "keep refusals"
            raise UserError(
                f"interleaving_plus: {self.source} was selected for {made['variant']}, the recipe says {self.variant}; "
                f"`{MADE_BY}` must {hint}"
            )
        used = made["adapters"]
        ctx.notes.append(f"{self.kind}: variant {self.variant}, ranked by the adapters {', '.join(used)}")
        own = [name for name, adapter in used.items() if ctx.task & set(adapter["trained_on"])]
        if own:
            found = (
                f"{self.kind}: the adapter {own[0]} was trained on these very rows; the paper leaves it out "
                f"(`{MADE_BY} --leave-out {own[0]}`)"
            )
            if self.own_adapter == "refuse":
                raise UserError(f"{found}, or set own_adapter: allow")
            ctx.notes.append(found)
        return mix(rows, self.source, self.fraction, "safe", self.kind, ctx, best_first=True)

    def rows_added(self, task_rows: int) -> int:
        return rows_needed(self.fraction, task_rows, self.kind)
