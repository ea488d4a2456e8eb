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


def dequantized(weight: Params4bit, dtype: torch.dtype) -> torch.Tensor:
    """The weight as a matrix (out, in) of `dtype`, valid until the next call.

    On a GPU all weights are written to one place, in the order of the stream: use each before asking for the next.
    """
    state = weight.quant_state
    if (
        nf4_triton is not None
        and weight.is_cuda
        and state.quant_type == "nf4"
        and not state.shape.numel() % state.blocksize
    ):
        entries = state.shape.numel()
        room = _room.get((weight.device, dtype))
        if room is None or room.numel() < entries:
            room = _room[weight.device, dtype] = torch.empty(entries, device=weight.device, dtype=dtype)
        return nf4_triton.dequantize(weight.data, state, room[:entries].view(state.shape))
    return dequantize_4bit(weight.data, state).to(dtype)


def make_room(weights: Sequence[Params4bit], dtype: torch.dtype) -> None:
    """Let the largest of `weights` be the first to be made whole, so that the place of all never moves."""
    dequantized(max(weights, key=lambda weight: weight.quant_state.shape.numel()), dtype)
