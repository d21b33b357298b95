"""Choose a trainer's reference, and make it ready: fill its cache, or place its second model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ema_scale.config.sections import WAYS, ModelRecipe, SeparateReference
from ema_scale.core.collectives import broadcast_from_main
from ema_scale.core.errors import UserError
from ema_scale.core.paths import cache_root
from ema_scale.core.uri import locate
from ema_scale.data.collate import ChatCollator
from ema_scale.data.packing import texts
from ema_scale.data.tokens import load_tokenizer
from ema_scale.defenses.base import Defense
from ema_scale.models.layout import FROZEN_ADAPTER, ModelLayout
from ema_scale.models.load import load_base
from ema_scale.models.sharding import weights_are_sharded
from ema_scale.reference.adapter_off import AdapterOff
from ema_scale.reference.base import Reference
from ema_scale.reference.cache_fill import FillStats, fill_store, free_bytes, unusable
from ema_scale.reference.cached import Cached
from ema_scale.reference.fingerprint import fingerprint
from ema_scale.reference.hidden_state_store import row_key
from ema_scale.reference.layerwise import Layerwise
from ema_scale.reference.make import make_reference
from ema_scale.reference.separate import Separate, check_tokenizer
from ema_scale.reference.strategy import START, WORTH_CACHING, Cost, ReferenceStrategy, choose_strategy
from ema_scale.training.distributed import is_main
from ema_scale.training.forward import CacheRequest

log = logging.getLogger(__name__)

ReferenceSpec = str | Mapping[str, Any] | SeparateReference


@dataclass(frozen=True)
class ReferenceContext:
    """What decides the reference.

    model: the PeftModel.
    rows: token ids of the training rows; None if they are not known beforehand.
    passes: how often each row is seen, in all trainings that share a cache together.
    autocast: see `fingerprint`.
    """

    model: Any
    defenses: Sequence[Defense]
    tokenizer: Any
    rows: Sequence[Sequence[int]] | None
    passes: float
    autocast: str | None

    @property
    def layers(self) -> tuple[int, ...]:
        count = self.model.get_base_model().config.get_text_config().num_hidden_layers
        return tuple(sorted({k for d in self.defenses for k in d.penalty_layers(count)}))

    @property
    def needed(self) -> bool:
        return bool(self.layers) or any(d.reads_reference_logits for d in self.defenses)


def reference_precision(accelerator: Any) -> str | None:
    """How forward is cast, for a fingerprint: by autocast, or by DeepSpeed, which casts the weights."""
    kind: str = accelerator.mixed_precision
    return None if kind == "no" else kind if accelerator.native_amp else f"{kind} weights"


def make_reference_for_run(spec: ReferenceSpec, setting: ReferenceContext) -> tuple[Reference, ReferenceStrategy]:
    """The reference, and why it is this one. Under ZeRO-3 a collective.

    spec: one of WAYS, or {kind: separate, model: ...}.

    Raises UserError for an unknown way, a cache without known rows, and a second model that does not fit the first.
    """
    if not isinstance(spec, str):
        other = SeparateReference.of(spec)
        return _separate(other, setting), ReferenceStrategy("separate", "asked for", f"another model, {other.model}")
    if spec not in WAYS:
        raise UserError(f"reference: found {spec!r}, expected {', '.join(WAYS)} or {{kind: separate, model: ...}}")
    reference, choice = _from_policy(spec, setting)
    if reference.layout.frozen_adapter:
        return reference, replace(choice, of=START)
    if setting.needed and is_main() and _was_trained(setting.model):
        log.warning(
            "the adapter was trained before, and the reference is the base model. To hold it near itself, give it as "
            "adapter.start (in Python: load it a second time, under the name %r)", FROZEN_ADAPTER
        )  # fmt: skip
    return reference, choice


def _from_policy(way: str, setting: ReferenceContext) -> tuple[Reference, ReferenceStrategy]:
    """A reference that runs on the policy's own weights."""
    sharded = weights_are_sharded()
    if way == "cached":
        if problem := unusable(cache_root()):
            raise UserError(f"reference: cached: {problem}; set it to one that all can write, or use another reference")
        return _cached(setting), ReferenceStrategy("cached", "asked for")
    if way != "auto":
        return make_reference(way, setting.model), ReferenceStrategy(way, "asked for")
    cached, cost = None, None
    problem = "the rows are not known beforehand" if setting.rows is None else None
    # Looking for a cache reads all weights once, so do it only if there may be one, or making one may pay. The main
    # process decides: each process may see another disk, and if they went different ways, they would deadlock.
    may_exist = (cache_root() / "reference").is_dir()
    worth_looking = setting.passes >= WORTH_CACHING or may_exist
    if broadcast_from_main(setting.needed and setting.rows is not None and worth_looking):
        problem = unusable(cache_root())
        if problem is None:
            cached = _cached(setting)
            cost = Cost(_missing_bytes(cached, setting), free_bytes(cached.folder))
    choice = broadcast_from_main(
        choose_strategy(needed=setting.needed, sharded=sharded, passes=setting.passes, cost=cost, problem=problem)
    )
    if choice.way == "cached" and cached is not None:
        return cached, choice
    reference = make_reference("auto", setting.model, sharded=sharded)
    if reference.name != choice.way:
        choice = ReferenceStrategy(reference.name, f"this architecture does not allow {choice.way}")
    return reference, choice


def check_after_first_step(reference: Reference, choice: ReferenceStrategy) -> ReferenceStrategy:
    """The choice, corrected if the reference fell back to another way."""
    if isinstance(reference, Layerwise) and reference.fell_back and choice.way == Layerwise.name:
        return replace(choice, way=AdapterOff.name, why="two_stream is not exact for this architecture")
    return choice


def _was_trained(model: Any) -> bool:
    """Whether LoRA's B is no longer 0, as it starts. False if ZeRO-3 has sharded it already: then it is not known."""
    fresh = model.peft_config["default"].init_lora_weights if "default" in model.peft_config else False
    if fresh is not True and fresh not in ("gaussian", "eva"):
        return False
    return any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name and p.requires_grad)


def place_reference(reference: Reference, accelerator: Any) -> None:
    """Place a second model, once, after the policy is prepared. A collective."""
    if isinstance(reference, Separate) and not reference.prepared:
        reference.prepare(accelerator)


def prepare_reference(reference: Reference, trainer: Any) -> FillStats | None:
    """What must wait until the policy is prepared: fill the cache, or place the second model. A collective."""
    place_reference(reference, trainer.accelerator)
    if not isinstance(reference, Cached):
        return None
    collate = ChatCollator(trainer.processing_class)
    model, device, autocast = trainer.model, trainer.accelerator.device, trainer.accelerator.autocast

    def run(rows: list[list[int]]) -> dict[str, torch.Tensor]:
        batch = collate([{"input_ids": row, "labels": row} for row in rows])
        request = CacheRequest()
        # A prepared model casts by itself, and casting twice changes nothing; `ema cache` does not prepare it.
        with torch.no_grad(), autocast():
            model(
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                defended=request,
            )
        return request.states

    stats = fill_store(
        reference,
        texts(trainer.train_dataset),
        run,
        trainer.accelerator,
        # As many as a training batch: with packing, rows are much shorter than the sequences of a batch.
        tokens_per_batch=trainer.args.per_device_train_batch_size * max(trainer.train_dataset["length"]),
        stop=lambda: trainer.stop.requested,
    )
    if stats.rows and trainer.accelerator.is_main_process:
        rate = stats.tokens / stats.seconds
        log.info("reference: %d tokens in %.1f s (%.0f per second)", stats.tokens, stats.seconds, rate)
    return stats


def bytes_per_token(cached: Cached) -> int:
    """Bytes per token in a cache, an estimate: autocast may keep some states in float32."""
    core = cached.layout.core
    width = core.config.get_text_config().hidden_size * cached.layout.head_parameters[0].dtype.itemsize
    return int(width * len(cached.stores))


def _cached(setting: ReferenceContext) -> Cached:
    if setting.rows is None:
        raise UserError("reference: cached needs training rows of a known number; use adapter_off")
    layout = ModelLayout.of(setting.model)
    name = fingerprint(layout, setting.model, setting.autocast)
    return Cached(layout, cache_root() / "reference" / name, setting.layers)


def _missing_bytes(cached: Cached, setting: ReferenceContext) -> int:
    lengths = {row_key(row): len(row) for row in setting.rows or ()}
    return sum(lengths[key] for key in cached.missing(list(lengths))) * bytes_per_token(cached)


def _separate(spec: SeparateReference, setting: ReferenceContext) -> Separate:
    path = locate(spec.model)
    check_tokenizer(setting.tokenizer, load_tokenizer(path, revision=spec.revision), spec.model)
    layout = ModelLayout.of(setting.model)
    recipe = ModelRecipe(path=spec.model, revision=spec.revision).model_dump()
    recipe["dtype"] = str(layout.head_parameters[0].dtype).removeprefix("torch.")
    base = load_base(ModelRecipe.model_construct(**recipe))
    reference = Separate(layout, base)
    reference.check_vocabulary(max(setting.tokenizer.get_vocab().values()) + 1)
    reference.check_layers(setting.layers)
    return reference
