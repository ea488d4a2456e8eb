"""NF4 with double quantisation made whole in one pass over memory (QLoRA, arXiv 2305.14314, section 3): Triton."""

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState

BLOCKS = 32  # quantisation blocks a program
ROWS = 64  # of a weight a program that adds an adapter; one block of each
RANKS = 16  # of an adapter at a time, the fewest that a matrix product takes


@triton.jit
def scale_of(scales, block, inside, scale_code, outer, offset, group_size: tl.constexpr, double: tl.constexpr):
    """Each block's largest absolute value: float32, or 8-bit codes with a scale a group of blocks and one offset."""
    if double:
        code = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
        group = tl.load(outer + block // group_size, mask=inside, other=0.0)
        scale = tl.load(scale_code + code) * group + tl.load(offset)
    else:
        scale = tl.load(scales + block, mask=inside, other=0.0)
    return scale


@triton.jit
def _dequantize(
    packed,
    whole,
    code,
    scales,
    scale_code,
    outer,
    offset,
    blocks,
    size: tl.constexpr,
    group_size: tl.constexpr,
    double: tl.constexpr,
    step: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * step + tl.arange(0, step)
    inside = block < blocks
    scale = scale_of(scales, block, inside, scale_code, outer, offset, group_size, double)[:, None]
    half: tl.constexpr = size // 2
    place = block[:, None] * half + tl.arange(0, half)[None, :]
    pair = tl.load(packed + place, mask=inside[:, None], other=0).to(tl.int32)
    high = tl.load(code + (pair >> 4)) * scale
    low = tl.load(code + (pair & 15)) * scale
    values = tl.interleave(high, low)
    place = block[:, None] * size + tl.arange(0, size)[None, :]
    tl.store(whole + place, values.to(whole.dtype.element_ty), mask=inside[:, None])


def dequantize(packed: torch.Tensor, state: QuantState, whole: torch.Tensor) -> torch.Tensor:
    """Write the values of `packed` (uint8, two a byte, the first in the high half) into `whole`, and return that."""
    blocks = whole.numel() // state.blocksize
    _dequantize[(triton.cdiv(blocks, BLOCKS),)](
        packed,
        whole,
        *tables(state),
        blocks,
        size=state.blocksize,
        group_size=state.state2.blocksize if state.nested else 1,
        double=state.nested,
        step=BLOCKS,
    )
    return whole


@triton.jit
def _add_adapter(
    packed,
    whole,
    code,
    scales,
    scale_code,
    outer,
    offset,
    b,
    a,
    height,
    width,
    rank: tl.constexpr,
    size: tl.constexpr,
    group_size: tl.constexpr,
    double: tl.constexpr,
    rows: tl.constexpr,
    ranks: tl.constexpr,
    precision: tl.constexpr,
):
    row = tl.program_id(1) * rows + tl.arange(0, rows)
    inside = row < height
    block = row.to(tl.int64) * (width // size) + tl.program_id(0)
    scale = scale_of(scales, block, inside, scale_code, outer, offset, group_size, double)[:, None]
    half: tl.constexpr = size // 2
    place = block[:, None] * half + tl.arange(0, half)[None, :]
    pair = tl.load(packed + place, mask=inside[:, None], other=0).to(tl.int32)
    values = tl.interleave(tl.load(code + (pair >> 4)) * scale, tl.load(code + (pair & 15)) * scale)
    column = tl.program_id(0) * size + tl.arange(0, size)
    for first in range(0, rank, ranks):
        index = first + tl.arange(0, ranks)
        left = tl.load(
            b + row[:, None] * rank + index[None, :], mask=inside[:, None] & (index < rank)[None, :], other=0.0
        )
        right = tl.load(a + index[:, None] * width + column[None, :], mask=(index < rank)[:, None], other=0.0)
        values += tl.dot(left, right, input_precision=precision)
    place = block[:, None] * size + tl.arange(0, size)[None, :]
    tl.store(whole + place, values.to(whole.dtype.element_ty), mask=inside[:, None])


def add_adapter(
    packed: torch.Tensor, state: QuantState, b: torch.Tensor, a: torch.Tensor, whole: torch.Tensor
) -> torch.Tensor:
    """As `dequantize`, plus b (out, rank) times a (rank, in), summed in float32 and rounded once."""
    height, width = whole.shape
    _add_adapter[(width // state.blocksize, triton.cdiv(height, ROWS))](
        packed,
        whole,
        *tables(state),
        b,
        a,
        height,
        width,
        b.shape[1],
        size=state.blocksize,
        group_size=state.state2.blocksize if state.nested else 1,
        double=state.nested,
        rows=ROWS,
        ranks=RANKS,
        precision="ieee",
    )
    return whole


def tables(state: QuantState) -> tuple[torch.Tensor, ...]:
    """The 16 values, the blocks' scales, and the code, scales and offset of these (any tensor where there are none)."""
    if not state.nested:
        return state.code, state.absmax, state.code, state.code, state.code
    return state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset
