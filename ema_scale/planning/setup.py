"""The settings of a recipe and a DeepSpeed config that decide memory, communication and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.files import read_json
from ema_scale.core.paths import find_file
from ema_scale.defenses.base import Defense
from ema_scale.defenses.registry import steps_per_drift_reading
from ema_scale.defenses.terms import Divergence
from ema_scale.planning.model_shapes import Shape, shape_of
from ema_scale.recipe import Recipe
from ema_scale.reference.strategy import choose_strategy
from ema_scale.training.chunk_size import CROSS_ENTROPY, live_buffers

_DEFAULT_LIVE = _DEFAULT_REUSE = 10**9
_DEFAULT_PREFETCH = 5 * 10**7
_DEFAULT_BUCKET = 5 * 10**8


@dataclass(frozen=True)
class Zero:
    """A DeepSpeed config. None: `auto`.

    Args:
        stage: ZeRO stage.
        max_live, reuse, prefetch: of stage 3, in parameters.
        reduced: gradients per bucket.
        weights_away, optimizer_away: whether these are offloaded to host memory.
    """

    stage: int = 0
    max_live: int = _DEFAULT_LIVE
    reuse: int = _DEFAULT_REUSE
    prefetch: int | None = _DEFAULT_PREFETCH
    reduced: int | None = None
    weights_away: bool = False
    optimizer_away: bool = False

    def live(self, hidden: int) -> int:
        """Parameters that may stay gathered beside the layer that runs: those soon used again, and those fetched ahead
        (`auto` is transformers' 0.9 hidden^2)."""
        ahead = int(0.9 * hidden**2) if self.prefetch is None else self.prefetch
        return min(self.max_live, self.reuse + ahead)

    def bucket(self, hidden: int) -> int:
        """Gradients that are reduced together (`auto` is transformers' hidden^2)."""
        return hidden**2 if self.reduced is None else self.reduced


def read_zero(path: str | None) -> Zero:
    """Of a DeepSpeed JSON config; None: no DeepSpeed. Raises UserError if it cannot be read."""
    if path is None:
        return Zero()
    try:
        values: dict[str, Any] = read_json(find_file(path)).get("zero_optimization") or {}
        stage = int(values.get("stage", 0))
        return Zero(
            stage,
            _count(values, "stage3_max_live_parameters", _DEFAULT_LIVE) or _DEFAULT_LIVE,
            _count(values, "stage3_max_reuse_distance", _DEFAULT_REUSE) or 0,
            _count(values, "stage3_prefetch_bucket_size", _DEFAULT_PREFETCH),
            _count(values, "reduce_bucket_size", _DEFAULT_BUCKET),
            stage == 3 and _away(values, "offload_param"),
            stage > 0 and _away(values, "offload_optimizer"),
        )
    except (UserError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"training.deepspeed: {path}: expected a DeepSpeed JSON config; {error}") from None


def _count(values: Mapping[str, Any], name: str, default: int) -> int | None:
    found = values.get(name, default)
    return None if found == "auto" else int(float(found))


def _away(values: Mapping[str, Any], name: str) -> bool:
    return str((values.get(name) or {}).get("device", "none")) != "none"


@dataclass(frozen=True)
class Precision:
    """Bytes per element.

    Args:
        weights: of the base and its hidden states.
        adapter: of the trained adapter.
        copies: of the copy that each LoRA module keeps of its input; 0 where modules share the input itself.
        cast: of autocast's copy of the adapter.
        master: of the optimizer's float32 copy of the adapter.

    PEFT keeps an adapter of a bfloat16 model in float32, and casts each module's input to it: under autocast (bfloat16
    on a GPU) back to bfloat16, without (on a CPU) not. DeepSpeed trains a bfloat16 adapter and keeps a float32 master,
    which it has of a float32 adapter, too.
    """

    weights: int
    adapter: int
    copies: int = 0
    cast: int = 0
    master: int = 0


FLOAT32 = Precision(4, 4)
AUTOCAST = Precision(2, 4, copies=2, cast=2)
BFLOAT16 = Precision(2, 4, copies=4)
DEEPSPEED = Precision(2, 2, master=4)
DEEPSPEED_FLOAT32 = Precision(4, 4, master=4)


@dataclass(frozen=True)
class Setup:
    """One process of one run.

    Args:
        tokens: tokens of the longest row, or of a packed sequence.
        row_tokens: tokens of the mean row.
        way: how the reference runs; None if no defense needs it.
        other: the second model, where the reference is a model of its own.
        drift_every: steps between drift readings, which also run the reference; 0: none.
        states: hidden states per token that penalties keep from forward to backward.
        cached_states: hidden states per token in a reference cache: the last one, and one per layer that is read.
        buffers: logits buffers of the fused loss.
        optimizer: bytes of optimizer state per trained parameter.
        zero: ZeRO stage.
        live: parameters that ZeRO-3 keeps gathered beside the layer that runs.
        bucket: gradients that ZeRO reduces together.
        fsdp: FSDP2 shards the model, in place of ZeRO.
        weights_away: shards of weights and adapter are offloaded to host memory.
        optimizer_away: the optimizer and its gradients are offloaded to host memory.
        offload: the layers' inputs are offloaded to host memory.
        masked: attention takes a mask: rows are padded or packed, and no flash attention reads their bounds.
        learned: share of the tokens with a cross-entropy; a plan takes all.
    """

    shape: Shape
    batch: int
    tokens: int
    row_tokens: float
    accumulation: int
    checkpointing: bool
    rank: int
    targets: tuple[str, ...] | None
    precision: Precision
    way: str | None = None
    why: str = ""
    other: Shape | None = None
    drift_every: int = 0
    states: int = 0
    cached_states: int = 1
    buffers: int = CROSS_ENTROPY
    optimizer: int = 8
    zero: int = 0
    live: int = 0
    bucket: int = 0
    fsdp: bool = False
    weights_away: bool = False
    optimizer_away: bool = False
    masked: bool = True
    learned: float = 1.0
    offload: bool = False

    @property
    def sharded(self) -> bool:
        """Whether every GPU holds only a part of the weights, and layers are gathered."""
        return self.zero == 3 or self.fsdp

    @property
    def adapter(self) -> int:
        """Trained parameters."""
        return self.shape.lora(self.rank, None if self.targets is None else list(self.targets))

    @property
    def in_a_batch(self) -> int:
        """Tokens that a micro-batch may hold, padding included."""
        return self.batch * self.tokens

    @property
    def mean_in_a_batch(self) -> float:
        """Tokens that a micro-batch holds on average."""
        return self.batch * self.row_tokens

    @property
    def reads_reference(self) -> bool:
        """Whether some step holds the reference's last states: drift readings do, too."""
        return self.way is not None or self.drift_every > 0


def setup_of(
    recipe: Recipe, *, zero: int | None = None, row_tokens: float | None = None, passes: float | None = None
) -> Setup:
    """A recipe's setup on GPUs that have bfloat16.

    Args:
        zero: ZeRO stage; None: as training.deepspeed or training.fsdp say.
        row_tokens: tokens of the mean row; None: data.max_length.
        passes: how often training sees a row; None: training.num_train_epochs.

    Raises UserError for an unknown model or module, or a DeepSpeed file that cannot be read.
    """
    t = recipe.training
    if recipe.adapter.start is not None:
        raise UserError("adapter.start: ema plan does not know the adapter that is gone on from; plan without it")
    given = read_zero(t.deepspeed)
    if t.fsdp and given.stage:
        raise UserError("training: both fsdp and deepspeed were asked for; leave one out")
    if zero not in (None, given.stage):
        given = Zero(zero or 0)
    fsdp = t.fsdp and zero is None
    half = recipe.model.dtype != "float32"
    precision = precision_of(half, given.stage > 0)
    shape = shape_of(recipe.model.path, recipe.model.revision)
    targets = recipe.adapter.target_modules
    packed = t.packing
    passes = (t.num_train_epochs if passes is None else passes) * recipe.reference_runs
    way, why = _way(recipe, fsdp or given.stage == 3, passes)
    found = Setup(
        shape,
        batch=t.per_device_train_batch_size,
        tokens=recipe.data.max_length,
        row_tokens=recipe.data.max_length
        if packed
        else min(row_tokens or recipe.data.max_length, recipe.data.max_length),
        accumulation=t.gradient_accumulation_steps,
        checkpointing=t.gradient_checkpointing,
        rank=recipe.adapter.r,
        targets=None if targets == "auto" else tuple(targets),
        precision=precision,
        way=way,
        why=why,
        other=None
        if isinstance(recipe.reference, str)
        else shape_of(recipe.reference.model, recipe.reference.revision),
        drift_every=steps_per_drift_reading(t.drift_every, recipe.defenses),
        states=kept_states(recipe.defenses, shape.layers),
        cached_states=1 + len({k for d in recipe.defenses for k in d.penalty_layers(shape.layers)}),
        buffers=logits_buffers(recipe.defenses, t.drift_every),
        optimizer=2 if "8bit" in t.optim else 0 if t.optim == "sgd" else 8,
        zero=given.stage,
        live=given.live(shape.hidden),
        bucket=given.bucket(shape.hidden),
        fsdp=fsdp,
        weights_away=given.weights_away,
        optimizer_away=given.optimizer_away,
        offload=t.activation_offload,
        masked=("flash" not in (recipe.model.attn_implementation or ""))
        and (packed or t.per_device_train_batch_size > 1),
    )
    found.adapter  # noqa: B018 - raises for unknown target modules, before anything is computed
    return found


def precision_of(half: bool, zero: bool) -> Precision:
    """On a GPU. half: weights in bfloat16; zero: by DeepSpeed."""
    if zero:
        return DEEPSPEED if half else DEEPSPEED_FLOAT32
    return AUTOCAST if half else FLOAT32


def kept_states(defenses: Sequence[Defense], layers: int) -> int:
    """Hidden states of each token that penalties keep: a layer-by-layer one its gradient, any other both streams'."""
    readers = [d for d in defenses if type(d).overrides("penalty") or type(d).overrides("token_weights")]
    return sum(len(d.penalty_layers(layers)) * (1 if d.layer_by_layer else 2) for d in readers)


def logits_buffers(defenses: Sequence[Defense], drift_every: int) -> int:
    """[chunk, vocabulary] buffers of the fused loss, at the most that some step takes: drift readings measure a
    divergence where no defense has one."""
    terms = [term for d in defenses for term in d.token_terms]
    weights = [weight for d in defenses for weight in d.label_weights()]
    if drift_every and not any(term.reads_reference for term in terms):
        terms.append(Divergence("kl", 0.0))
    slots = 1 + sum(type(d).overrides("join_gradients") for d in defenses)
    return live_buffers(
        terms,
        slots=slots + bool(terms and any(weight.per_row for weight in weights)) + sum(term.per_row for term in terms),
        weights_read=any(weight.reads_reference for weight in weights),
    )


def _way(recipe: Recipe, sharded: bool, passes: float) -> tuple[str | None, str]:
    if not isinstance(recipe.reference, str):
        return "separate", "asked for"
    if not any(d.needs_reference for d in recipe.defenses):
        return None, "no defense needs it"
    if recipe.reference != "auto":
        return recipe.reference, "asked for"
    choice = choose_strategy(needed=True, sharded=sharded, passes=passes)
    return choice.way, choice.why
