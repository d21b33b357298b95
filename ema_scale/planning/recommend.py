"""Which defenses fit what a user has: measured ones ranked by what a study found, the others named as unmeasured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.defenses.base import Defense
from ema_scale.defenses.registry import known, load, parse
from ema_scale.planning.evidence import STANDINGS, Arm, Evidence
from ema_scale.planning.plan import plan_run
from ema_scale.planning.setup import read_zero
from ema_scale.planning.speed import DEVICES, Cluster
from ema_scale.recipe import Recipe

OUTSIDE = "general_misaligned"
# Asset -> the option of `ema recommend` that says where it is.
OPTIONS = {
    "safe rows": "--safe",
    "bad rows": "--bad",
    "ranked safe rows": "--ranked",
    "directions": "--vector",
    "unaligned base model": "--base",
    "prompt for the bad behaviour": "--prompt",
}
RULE = (
    "Ranked by standing (does the defense keep the task and stay coherent?), then by the upper end of the interval of "
    "misaligned answers outside the task's domain, then by price. Intervals: 95 %, over its questions and seeds. "
    "Price: the plan's, which counts the reference pass and the rows that are mixed in."
)


@dataclass(frozen=True)
class Recommendation:
    """A list of defenses that the user can run.

    defenses: as a recipe writes them, with the user's own files.
    price: time per row of the task, relative to training without a defense; None where the model's shape is not known.
    evidence: what a study measured; None for an unmeasured defense.
    """

    defenses: tuple[Mapping[str, Any], ...]
    price: float | None = None
    evidence: Arm | None = None


@dataclass(frozen=True)
class Advice:
    """ranked: measured defenses, best first. unmeasured: those that fit as well. missing: kind -> what the user would
    need for it. refused: kind -> why the recipe forbids it."""

    ranked: tuple[Recommendation, ...]
    unmeasured: tuple[Recommendation, ...]
    missing: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, str]


def owned_by(recipe: Recipe) -> dict[str, Any]:
    """Asset -> what the recipe's own defenses name."""
    return {
        asset: getattr(defense, name)
        for defense in recipe.defenses
        for name, asset in defense.assets().items()
        if getattr(defense, name)
    }


def recommend(
    recipe: Recipe,
    evidence: Evidence,
    owned: Mapping[str, Any],
    *,
    budget: float | None = None,
    finished: bool = False,
    count: int = 3,
) -> Advice:
    """Advice for a recipe, whose own defenses do not count.

    Args:
        owned: asset -> the user's file, model or text.
        budget: the highest price.
        finished: the adapter is trained already: only what acts after training.
        count: how many ranked ones.
    """
    plain = recipe.model_copy(update={"defenses": []})
    refused = {kind: why for kind in sorted(known()) if (why := _refusal(load(kind), recipe, finished))}
    ranked = []
    for arm in evidence.arms:
        if not arm.defenses or not {spec["kind"] for spec in arm.defenses} <= known().keys() - refused.keys():
            continue
        filled = _filled(arm.defenses, owned)
        if filled is not None and _sensible(filled):
            found = Recommendation(filled, price_of(plain, filled), arm)
            if budget is None or found.price is None or found.price <= budget:
                ranked.append(found)
    measured = {spec["kind"] for arm in evidence.arms for spec in arm.defenses}
    unmeasured, missing = [], {}
    for kind in sorted(known().keys() - refused.keys()):
        cls = load(kind)
        needs = tuple(a for name, a in cls.assets().items() if cls.model_fields[name].is_required() and a not in owned)
        if needs:
            missing[kind] = needs
        elif kind not in measured and not _required_numbers(cls):
            filled = _filled([{"kind": kind}], owned)
            assert filled is not None
            price = price_of(plain, filled)
            if budget is None or price is None or price <= budget:
                unmeasured.append(Recommendation(filled, price))
    # What two studies measured is listed once, as the less favourable one found it.
    distinct: list[tuple[Sequence[Defense], Recommendation]] = []
    for one in sorted(ranked, key=_rank, reverse=True):
        defenses = parse(one.defenses)
        if all(defenses != others for others, _ in distinct):
            distinct.append((defenses, one))
    best = [one for _, one in reversed(distinct)]
    return Advice(tuple(best[:count]), tuple(unmeasured), missing, refused)


def price_of(plain: Recipe, defenses: Sequence[Mapping[str, Any]]) -> float | None:
    """Time per row of the task under these defenses over that under none, from the plan's formulas.

    It counts the reference pass and the rows that defenses mix in, not a defense's own small products.
    """
    rows = 1000
    cluster = Cluster(1, 1, 80 * 10**9, DEVICES["h100"])
    try:
        without = plan_run(plain, cluster, rows=rows)
        defended = plan_run(plain.model_copy(update={"defenses": parse(defenses)}), cluster, rows=rows)
    except UserError:
        return None
    return defended.speed.step / without.speed.step * (rows + (defended.added or 0)) / rows


def _rank(one: Recommendation) -> tuple[int, float, float]:
    arm = one.evidence
    assert arm is not None
    standing = STANDINGS.index(arm.standing) if arm.standing in STANDINGS else len(STANDINGS)
    return standing, arm.metrics[OUTSIDE].high, one.price or 0.0


def _refusal(cls: type[Defense], recipe: Recipe, finished: bool) -> str | None:
    training = recipe.training
    if finished and not cls.overrides("after_training"):
        return "acts in training, and the adapter is finished"
    sharded = training.fsdp or training.deepspeed is not None
    on_gradients = [name for name in ("before_optimizer_step", "join_gradients") if hasattr(Defense, name)]
    if sharded and any(cls.overrides(name) for name in on_gradients):
        return "acts on the gradient, which DeepSpeed and FSDP do not show whole"
    if cls.whole_weights and (training.fsdp or read_zero(training.deepspeed).stage == 3):
        return "reads whole adapter weights, which ZeRO-3 and FSDP shard"
    return None


def _filled(specs: Sequence[Mapping[str, Any]], owned: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    """The defenses with the user's own files in place of the study's; None if something is not owned."""
    filled = []
    for spec in specs:
        assets = load(spec["kind"]).assets()
        asked = {name: assets[name] for name in spec if name in assets and spec[name]}
        required = {name: a for name, a in assets.items() if load(spec["kind"]).model_fields[name].is_required()}
        if not {*asked.values(), *required.values()} <= owned.keys():
            return None
        filled.append({**spec, **{name: owned[asset] for name, asset in (required | asked).items()}})
    return tuple(filled)


def _sensible(specs: Sequence[Mapping[str, Any]]) -> bool:
    """Not what repeats a flaw of released code for comparison."""
    return not any(spec.get("detached") for spec in specs)


def _required_numbers(cls: type[Defense]) -> bool:
    """Whether the defense cannot be used without a number that nobody has measured."""
    return any(field.is_required() and name not in cls.assets() for name, field in cls.model_fields.items())
