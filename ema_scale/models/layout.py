"""Where the parts of a causal language model with adapters are: backbone, decoder layers, head, adapter switches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ema_scale.core.errors import UserError
from ema_scale.models.head import Head
from ema_scale.models.sharding import full_tensor

if TYPE_CHECKING:
    from torch import Tensor, nn

# If a model has a frozen adapter of this name beside the trained one, that adapter is the reference: the policy that
# training goes on from. Otherwise the reference is the base model.
FROZEN_ADAPTER = "reference"
# PEFT's initialisations that subtract the adapter from the base weights, or quantise these.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class ModelLayout:
    """core: the causal LM inside PEFT.
    backbone: the core without its head.
    layers: the decoder layers, in order.
    tuners: modules that carry adapters.
    frozen_adapter: the adapter that is the reference; None: the base model is.
    model: what holds all of it, PEFT's wrapper included.
    """

    core: Any
    backbone: nn.Module
    layers: list[nn.Module]
    tuners: list[Any]
    frozen_adapter: str | None = None
    model: Any = None

    @classmethod
    def of(cls, model: Any, *, adapters: bool = True) -> ModelLayout:
        """Find the parts of a PeftModel over a decoder-only transformers model.

        adapters: False for a model without adapters.

        Raises UserError for encoder-decoders, models whose decoder layers are not found, adapters or training on the
        embeddings or the head (policy and reference must share them), and heads of an unknown form.
        """
        core = causal_lm(model)
        name = type(core).__name__
        if getattr(core.config, "is_encoder_decoder", False):
            raise UserError(f"{name} is an encoder-decoder; expected a decoder-only language model")
        backbone = getattr(core, "base_model", core)
        if backbone is core:  # Llama 4's text model names another attribute
            backbone = getattr(core, "model", core)
        head = core.get_output_embeddings()
        if backbone is core or head is None:
            raise UserError(f"{name}: cannot find a backbone and a head")
        # PEFT's layers and its wrappers of fully trained modules share this switch.
        tuners = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
        frozen_adapter = FROZEN_ADAPTER if FROZEN_ADAPTER in getattr(model, "peft_config", {}) else None
        layout = cls(core, backbone, decoder_layers(core), tuners, frozen_adapter, model)
        if adapters:
            layout._check_shared(head)
            layout._check_switchable(model)
        return layout

    def _check_shared(self, head: nn.Module) -> None:
        shared = {
            "the head is trained or carries": head,
            "the embeddings are trained or carry": self.core.get_input_embeddings(),
        }
        for what, module in shared.items():
            trained = any(p.requires_grad for p in module.parameters())
            if trained or hasattr(module, "_disable_adapters"):
                raise UserError(
                    f"{what} an adapter, but policy and reference must share them: leave them out of target_modules, "
                    "modules_to_save and trainable_token_indices"
                )
        if "weight" not in dict(head.named_parameters(recurse=False)):
            raise UserError(f"the head is {type(head).__name__}, expected a linear layer")

    def _check_switchable(self, model: nn.Module) -> None:
        inside = {
            id(p)
            for tuner in self.tuners
            for name, p in tuner.named_parameters()
            if not {"base_layer", "original_module"} & set(name.split("."))
        }
        outside = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
        if outside or not self.tuners:
            found = f"{outside[0]} trained outside an adapter" if outside else "no adapter"
            raise UserError(f"found {found}; expected a LoRA adapter, off for the reference")
        for config in getattr(model, "peft_config", {}).values():
            start = getattr(config, "init_lora_weights", True)
            if isinstance(start, str) and start.lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
                raise UserError(
                    f"init_lora_weights: {start!r} also changes the base weights, so that the policy without its "
                    "adapter is not the base model any more; use true, gaussian, eva or orthogonal"
                )
        if any(getattr(tuner, "merged", False) for tuner in self.tuners):
            raise UserError("the adapter is merged into the base; call unmerge_adapter() first")

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """Weight and, if there is one, bias of the head; the objects that ZeRO-3 partitions in place."""
        module = self.core.get_output_embeddings()
        # Not by attribute: under ZeRO-3 that would gather the weight on the spot.
        parameters = dict(module.named_parameters(recurse=False))
        return [parameters[name] for name in ("weight", "bias") if parameters.get(name) is not None]

    def head(self) -> Head:
        """The head as `fused_loss` takes it. Call it where its parameters are `gathered`; under FSDP2 a collective."""
        weight, *bias = (full_tensor(p) for p in self.head_parameters)
        config = self.core.config.get_text_config()
        scale = 1.0
        if getattr(config, "logits_scaling", None):  # Granite divides, HyperCLOVA X multiplies
            scale = config.logits_scaling ** (1 if config.model_type == "hyperclovax" else -1)
        for name in ("logit_scale", "lm_head_multiplier"):  # Cohere and Falcon-H1 multiply
            if getattr(config, name, None):
                scale *= getattr(config, name)
        caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
        return Head(weight, bias[0] if bias else None, scale, next((cap for cap in caps if cap), None))

    def make_leaves(self) -> None:
        """Under ZeRO-3, have each decoder layer gathered and released as a whole, which moves fewest bytes. Call it
        before the model is prepared."""
        from transformers.integrations import is_deepspeed_zero3_enabled

        if is_deepspeed_zero3_enabled():
            from deepspeed.utils import set_z3_leaf_modules

            set_z3_leaf_modules(self.backbone, list({type(layer) for layer in self.layers}))

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the forward pass is that of the reference: base model or frozen adapter, no dropout."""
        return adapter_switched(self.tuners, self.core.modules(), self.frozen_adapter)


@contextlib.contextmanager
def adapter_switched(tuners: list[Any], modules: Iterable[nn.Module], adapter: str | None) -> Iterator[None]:
    """Inside, `adapter` is active (None: adapters are off) and `modules` run without dropout.

    Only the flags that PEFT's layers read are changed. PEFT's own `disable_adapter` and `set_adapter` also change
    `requires_grad`, which must not happen while autograd records a forward.
    """
    flag, value = ("_disable_adapters", True) if adapter is None else ("_active_adapter", [adapter])
    training = [m for m in modules if m.training]
    before = [getattr(m, flag) for m in tuners]
    try:
        for module in tuners:
            setattr(module, flag, value)
        for module in training:
            module.training = False
        yield
    finally:
        for module, old in zip(tuners, before, strict=True):
            setattr(module, flag, old)
        for module in training:
            module.training = True


def causal_lm(model: Any) -> Any:
    """The causal language model itself, inside PEFT's wrapper if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers in order, with or without PEFT's wrapper.

    Raises UserError if the model does not have exactly one stack of `num_hidden_layers` of them.
    """
    from torch import nn

    core = causal_lm(model)
    count = core.config.get_text_config().num_hidden_layers
    stacks = [
        m for m in core.modules() if isinstance(m, nn.ModuleList) and len(m) == count and all(map(_has_parameters, m))
    ]
    if len(stacks) != 1:
        raise UserError(f"{type(core).__name__}: cannot find one stack of {count} decoder layers")
    return list(stacks[0])


def hidden_size(model: Any) -> int:
    """H, the width of the residual stream."""
    return int(causal_lm(model).config.get_text_config().hidden_size)


def hidden_states_of(output: Tensor | tuple[Any, ...]) -> Tensor:
    """Hidden states of a decoder layer's output, which is a tensor or a tuple that starts with one."""
    return output[0] if isinstance(output, tuple) else output


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
