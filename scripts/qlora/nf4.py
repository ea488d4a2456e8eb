"""Frozen 4-bit weights made whole again for one product."""

from collections.abc import Sequence

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit

try:
    from qlora import nf4_triton
except ImportError:  # Triton comes with the CUDA build of torch alone
    nf4_triton = None  # type: ignore[assignment]

_room: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


Adapter = tuple[torch.Tensor, torch.Tensor]  # B (out, rank) and A (rank, in), the scaling in one of them


def can_add(weight: Params4bit) -> bool:
    """Whether an adapter can be added to a weight in the pass that makes it whole."""
    return _in_one_pass(weight) and not weight.quant_state.shape[1] % weight.quant_state.blocksize


def _in_one_pass(weight: Params4bit) -> bool:
    state = weight.quant_state
    whole_blocks = not state.shape.numel() % state.blocksize
    return nf4_triton is not None and weight.is_cuda and state.quant_type == "nf4" and whole_blocks


def dequantized(weight: Params4bit, dtype: torch.dtype, adapter: Adapter | None = None) -> torch.Tensor:
    """The weight as a matrix (out, in) of `dtype`, valid until the next call; plus B A of an adapter that `can_add`.

    On a GPU all weights are written to one place, in the order of the stream: use each before asking for the next.
    """
    state = weight.quant_state
    if adapter is not None and not can_add(weight):
        raise ValueError("no adapter can be added to this weight")
    if _in_one_pass(weight):
        entries = state.shape.numel()
        room = _room.get((weight.device, dtype))
        if room is None or room.numel() < entries:
            room = _room[weight.device, dtype] = torch.empty(entries, device=weight.device, dtype=dtype)
        whole = room[:entries].view(state.shape)
        if adapter is not None:
            return nf4_triton.add_adapter(weight.data, state, *adapter, whole)
        return nf4_triton.dequantize(weight.data, state, whole)
    return dequantize_4bit(weight.data, state).to(dtype)


def make_room(weights: Sequence[Params4bit], dtype: torch.dtype) -> None:
    """Let the largest of `weights` be the first to be made whole, so that the place of all never moves."""
    dequantized(max(weights, key=lambda weight: weight.quant_state.shape.numel()), dtype)
