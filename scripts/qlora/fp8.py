"""Products of the frozen base in 8-bit floats: an approximation that a recipe asks for, on cards that have it.

Both factors are scaled row by row into e4m3 (arXiv 2209.05433) and multiplied with sums in float32. The gradient of the
input takes the weight's row scales into its own, so that the transposed weight needs none. Adapters stay exact.
"""

from collections.abc import Sequence

import torch
from bitsandbytes.nn import Params4bit
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from qlora.errors import UserError
from qlora.nf4 import dequantized

try:
    from qlora import fp8_triton
except ImportError:  # Triton comes with the CUDA build of torch alone
    fp8_triton = None  # type: ignore[assignment]

LARGEST = 448.0  # of e4m3
_room: dict[torch.device, Tensor] = {}


def check_card(device: str) -> None:
    """Raise UserError where the card, or the build of torch, has no such products."""
    if device == "cpu" or fp8_triton is None or torch.cuda.get_device_capability() < (9, 0):
        raise UserError("recipe: fp8 needs an NVIDIA card of compute capability 9.0 or newer; set fp8: false")


class Weight:
    """A frozen 4-bit weight (out, in), and its rows' scales."""

    def __init__(self, packed: Params4bit) -> None:
        self.packed = packed
        whole = dequantized(packed, torch.bfloat16)
        self.scales = (whole.abs().amax(dim=1).float() / LARGEST).clamp(min=1e-12)  # (out,)
        self.ones = torch.ones(1, whole.shape[1], device=whole.device)

    def times(self, x: Tensor, scales: Tensor) -> Tensor:
        """X Wᵀ (tokens, out) in bfloat16, for `x` (tokens, in) in e4m3 with its rows' `scales`."""
        weight = self._eighth(transposed=False)
        return _product(x, weight.t(), scales, self.scales[None, :])

    def gradient(self, grad: Tensor) -> Tensor:
        """Grad W (tokens, in) in bfloat16, for `grad` (tokens, out)."""
        eighth, scales = fp8_triton.scaled_rows(grad, self.scales)
        return _product(eighth, self._eighth(transposed=True).t(), scales, self.ones)

    def _eighth(self, transposed: bool) -> Tensor:
        state = self.packed.quant_state
        out, width = state.shape
        room = _room.get(self.packed.device)
        if room is None or room.numel() < out * width:
            room = torch.empty(out * width, dtype=torch.float8_e4m3fn, device=self.packed.device)
            _room[self.packed.device] = room
        target = room[: out * width].view((width, out) if transposed else (out, width))
        return fp8_triton.dequantize(self.packed.data, state, self.scales, target, transposed)


def make_room(weights: Sequence[Params4bit]) -> None:
    """Let the largest of `weights` be the first to be made whole, so that the place of all never moves."""
    Weight(max(weights, key=lambda weight: weight.quant_state.shape.numel()))._eighth(transposed=False)


def scaled_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (tokens, in) in e4m3, and the scale of each row (tokens, 1)."""
    return fp8_triton.scaled_rows(x)


def _product(left: Tensor, right: Tensor, left_scales: Tensor, right_scales: Tensor) -> Tensor:
    """(left · its scales) @ (right · its scales) in bfloat16; the left by rows, the right by columns."""
    return scaled_mm(
        left,
        right,
        left_scales,
        ScalingType.RowWise,
        right_scales,
        ScalingType.RowWise,
        output_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
