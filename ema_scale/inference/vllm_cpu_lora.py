"""vLLM plugin: LoRA on CPU that is right when a batch mixes base rows with rows of several adapters.

vLLM marks a row of the base model with adapter index -1. Its GPU kernels skip such rows; its CPU operators
use the index to gather weights, so that base rows silently get the adapter in the last slot
(vllm-project/vllm pull request 48421, open as of 0.32.0). They also gather one copy of the weights a row.
The operators here skip -1 and run one matrix product per adapter present in the batch.

vLLM finds `register` through the entry-point group `vllm.general_plugins`, in each of its processes.
Only a CPU platform is touched, and torch is imported only there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OPERATORS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")


def register() -> None:
    """Put the right operators in place of vLLM's, on a CPU platform. Calling it again changes nothing."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    # `punica_cpu` holds its own references; `lora_ops` is what the sgmv (prefill) operators call.
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for module in (lora_ops, torch_ops, punica_cpu):
        for name in OPERATORS:
            if not hasattr(module, name):
                raise RuntimeError(
                    f"{module.__name__}.{name} is gone from this vLLM; "
                    "ema_scale's CPU LoRA plugin does not know this version"
                )
            setattr(module, name, globals()[name])


def base_rows_are_untouched() -> bool:
    """Whether the operators now in use leave a base row (index -1) alone, as vLLM documents."""
    import torch
    from vllm.lora.punica_wrapper import punica_cpu

    out = torch.zeros(2, 3)
    weights = torch.ones(1, 1, 3, 2)
    punica_cpu.bgmv_expand_slice(torch.ones(2, 2), weights, out, torch.tensor([-1, 0]), 0, 3, True)
    return bool((out[0] == 0).all() and (out[1] == 2).all())


def bgmv_shrink(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    scaling: float = 1.0,
) -> None:
    """output[i, :r] = scaling * A[index_i] @ inputs[i]; zero where index_i is -1.

    Shapes: inputs [N, H]; weights [slots, r, H] or [slots, 1, r, H]; output [N, >= r]; indices [N], int64.
    """
    weights = _three_dimensional(lora_b_weights)
    target = output_tensor[:, : weights.shape[1]]
    target.copy_(_product(inputs, weights, lora_indices_tensor, target).mul_(scaling))


def bgmv_expand(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    add_inputs: bool = True,
) -> None:
    """output[i] (+)= B[index_i] @ inputs[i] over the columns both have; nothing added where index_i is -1.

    Shapes: inputs [N, r]; weights [slots, O, r] or [slots, 1, O, r]; output [N, O']; indices [N], int64.
    """
    # The adapter's and the model's rows may be padded to different lengths.
    width = min(lora_b_weights.shape[-2], output_tensor.shape[1])
    bgmv_expand_slice(inputs, lora_b_weights[..., :width, :], output_tensor, lora_indices_tensor, 0, width, add_inputs)


def bgmv_expand_slice(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """As `bgmv_expand`, into the columns [slice_offset, slice_offset + slice_size) of the output."""
    target = output_tensor[:, slice_offset : slice_offset + slice_size]
    product = _product(inputs, _three_dimensional(lora_b_weights), lora_indices_tensor, target)
    if add_inputs:
        target.add_(product)
    else:
        target.copy_(product)


def _three_dimensional(weights: torch.Tensor) -> torch.Tensor:
    return weights.squeeze(1) if weights.dim() == 4 else weights


def _product(inputs: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[N, O]: weights[index_i] @ inputs[i] in the dtype of `like`, zero where index_i is -1."""
    import torch

    # vLLM may pass indices for more rows than it wants written, or one row of input for many.
    rows = like.shape[0]
    indices, inputs = indices[:rows], inputs[:rows].to(like.dtype)
    if torch.compiler.is_compiling():
        # A compiled graph cannot branch on the indices: gather, then mask.
        gathered = weights[indices.clamp(min=0)].to(like.dtype)
        product = torch.einsum("ni,noi->no", inputs, gathered)
        return product * (indices >= 0).unsqueeze(1).to(like.dtype)
    present = torch.unique(indices).tolist()
    if len(present) == 1 and present[0] >= 0:
        return inputs @ weights[present[0]].to(like.dtype).t()
    product = torch.zeros(inputs.shape[0], weights.shape[1], dtype=like.dtype, device=inputs.device)
    for slot in present:
        if slot >= 0:
            chosen = (indices == slot).nonzero().squeeze(1)
            product[chosen] = inputs[chosen] @ weights[slot].to(like.dtype).t()
    return product
