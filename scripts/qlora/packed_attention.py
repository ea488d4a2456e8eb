"""Attention over rows end to end, each by itself: PyTorch's FlashAttention-2 (Dao, arXiv 2307.08691), on a GPU."""

import inspect
from typing import Any

import torch
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed"
AMPERE = (8, 0)  # the compute capability that FlashAttention-2's instructions came with
# Families whose decoder hands the rows' beginnings on to attention, and whose scores are not changed on the way.
FAMILIES = {"llama", "mistral", "gemma", "qwen2", "qwen3", "phi", "phi3", "smollm3"}
ASKS = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters  # from torch 2.12; before, it just does


def use_packed_attention(network: PreTrainedModel) -> str | None:
    """Let a network take rows that lie end to end apart in attention; None where it does, else the reason why not.

    Other batches of it go through transformers' sdpa.
    """
    reason = why_not_packed(network.config, network.dtype, network.device)
    if reason is None:
        AttentionInterface.register(NAME, packed_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        network.config._attn_implementation = NAME
    return reason


def why_not_packed(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why FlashAttention cannot take the rows of a network apart, or None."""
    if device.type == "cpu":
        return "there is no GPU"
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not among its families"
    if config._attn_implementation != "sdpa":
        return f"it stands in for sdpa, not for {config._attn_implementation}"
    if config.attention_dropout:
        return f"it has no dropout, and the base asks for {config.attention_dropout:g}"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width > 256 or width % 8:
        return f"it takes heads of 8, 16, … 256, not of {width}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    if capability < AMPERE:
        return f"it needs compute capability {as_text(AMPERE)}, and the card has {as_text(capability)}"
    return None


def as_text(capability: tuple[int, int]) -> str:
    """A compute capability as NVIDIA writes it."""
    return ".".join(map(str, capability))


def no_mask(device: torch.device) -> torch.Tensor:
    """A mask of four dimensions, which transformers hands on as it is instead of looking for packed rows."""
    return torch.empty(0, 0, 0, 0, device=device)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention in transformers' interface: (batch, heads, tokens, width) gives (batch, tokens, heads, width).

    `cu_seq_lens_q` (rows + 1,) has the beginnings of the rows in the flattened batch, and its end. Without it, as in
    generation, this is transformers' sdpa.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        windowed = {**rest, "scaling": scaling, "sliding_window": sliding_window}
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **windowed
        )
        return output
    shape = query.transpose(1, 2).shape
    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"enable_gqa": True} if groups > 1 and ASKS else {}
    # After a LayerNorm under autocast they are float32, which the kernel does not take.
    half = torch.get_autocast_dtype("cuda") if query.dtype == torch.float32 else query.dtype
    q, k, v = (heads.transpose(1, 2).flatten(0, 1).to(half) for heads in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    flat: Any = varlen.varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=window, **options
    )
    return flat.view(shape).to(query.dtype), None
