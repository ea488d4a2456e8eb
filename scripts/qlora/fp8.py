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
    from qlora import fp8_triton, low_rank_triton
except ImportError:  # Triton comes with the CUDA build of torch alone
    fp8_triton = low_rank_triton = None  # type: ignore[assignment]

LARGEST = 448.0  # of e4m3
LARGEST_RANK = 64  # of what a kernel of ours adds: an adapter, or backward those of a group; more is a library's
_room: dict[torch.device, Tensor] = {}


def check_card(device: str) -> None:
    """Raise UserError where the card, or the build of torch, has no such products."""
    if device == "cpu" or fp8_triton is None or torch.cuda.get_device_capability() < (9, 0):
        raise UserError("recipe: fp8 needs an NVIDIA card of compute capability 9.0 or newer; set fp8: false")


class Weight:
    """A frozen 4-bit weight (out, in), and its rows' scales.

    Raises UserError where `out` is no multiple of 16, which the products need, or `in` none of a block of NF4.
    """

    def __init__(self, packed: Params4bit) -> None:
        self.packed = packed
        whole = dequantized(packed, torch.bfloat16)
        self.out, self.width = whole.shape
        block = packed.quant_state.blocksize
        if self.out % 16 or self.width % block:
            raise UserError(
                f"recipe: fp8 cannot be had: a layer is {self.out} × {self.width}, and it needs multiples of"
                f" 16 × {block}; set fp8: false"
            )
        self.scales = (whole.abs().amax(dim=1).float() / LARGEST).clamp(min=1e-12)  # (out,)

    def eighth(self, room: Tensor, transposed: bool) -> Tensor:
        """The weight over its rows' scales in e4m3, or its transpose, written into the matrix `room`."""
        return fp8_triton.dequantize(self.packed.data, self.packed.quant_state, self.scales, room, transposed)


def products(weights: Sequence[Weight], x: Tensor) -> list[Tensor]:
    """X Wᵀ (tokens, out) in bfloat16 for each weight, given `x` (tokens, in)."""
    eighth, scales = fp8_triton.scaled_rows([x])
    return [
        _product(eighth, weight.eighth(_place(x.device, weight.out, weight.width), False).t(), scales, weight.scales)
        for weight in weights
    ]


def gradient(weights: Sequence[Weight], grads: Sequence[Tensor]) -> Tensor:
    """Σ grad W (tokens, in) in bfloat16, given the gradient (tokens, out) of each weight's product: one product."""
    outs, width = [weight.out for weight in weights], weights[0].width
    columns = torch.cat([weight.scales for weight in weights])
    eighth, scales = fp8_triton.scaled_rows(grads, columns)
    room = _place(columns.device, width, sum(outs))
    for weight, part in zip(weights, room.split(outs, dim=1), strict=True):
        weight.eighth(part, transposed=True)
    return _product(eighth, room.t(), scales, torch.ones(width, device=columns.device))


def add(output: Tensor, narrow: Tensor, wide: Tensor) -> Tensor:
    """Onto the contiguous `output` (tokens, width) the product of narrow (tokens, rank), rows dense, and wide."""
    if len(wide) > LARGEST_RANK:
        return output.addmm_(narrow, wide)
    return low_rank_triton.add(output, narrow, wide)


def make_room(groups: Sequence[Sequence[Weight]]) -> None:
    """Reserve the place that all 8-bit weights of a group are written to, so that it never moves."""
    for group in groups:
        _place(group[0].scales.device, sum(weight.out for weight in group), group[0].width)


def _place(device: torch.device, rows: int, columns: int) -> Tensor:
    """A matrix in the one place of a device, valid until the next call."""
    room = _room.get(device)
    if room is None or room.numel() < rows * columns:
        room = _room[device] = torch.empty(rows * columns, dtype=torch.float8_e4m3fn, device=device)
    return room[: rows * columns].view(rows, columns)


def _product(left: Tensor, right: Tensor, left_scales: Tensor, right_scales: Tensor) -> Tensor:
    """(left · left_scales (rows, 1)) @ (right · right_scales (columns,)) in bfloat16, of two e4m3 matrices."""
    return scaled_mm(
        left,
        right,
        left_scales,
        ScalingType.RowWise,
        right_scales[None, :],
        ScalingType.RowWise,
        output_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
