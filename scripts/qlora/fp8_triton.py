"""Rows scaled into 8-bit floats (e4m3, arXiv 2209.05433), and NF4 weights made whole into them: Triton."""

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState

from qlora.nf4_triton import scale_of, tables

COLUMNS, BLOCKS = 128, 2  # rows of the weight, and quantisation blocks of each, that a program transposes


@triton.jit
def _scale_rows(x, columns, eighth, scales, width, weighted: tl.constexpr, step: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, step)
    inside = place < width
    values = tl.load(x + row * width + place, mask=inside, other=0.0).to(tl.float32)
    if weighted:
        values *= tl.load(columns + place, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(values)), 1e-12) / 448.0
    tl.store(eighth + row * width + place, (values / scale).to(eighth.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def scaled_rows(x: torch.Tensor, columns: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of `x` (rows, width), times `columns` (width,) where given, in e4m3, and each row's scale (rows, 1)."""
    x = x.contiguous()
    rows, width = x.shape
    eighth = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, 1, device=x.device)
    _scale_rows[(rows,)](
        x,
        x if columns is None else columns,
        eighth,
        scales,
        width,
        weighted=columns is not None,
        step=triton.next_power_of_2(width),
        num_warps=8,
    )
    return eighth, scales


@triton.jit
def _dequantize(
    packed,
    eighth,
    code,
    scales,
    scale_code,
    outer,
    offset,
    row_scales,
    out,
    blocks,
    size: tl.constexpr,
    group_size: tl.constexpr,
    double: tl.constexpr,
    transposed: tl.constexpr,
    tall: tl.constexpr,
    wide: tl.constexpr,
):
    half: tl.constexpr = size // 2
    row = tl.program_id(0).to(tl.int64) * tall + tl.arange(0, tall)
    for number in range(wide):
        column = tl.program_id(1) * wide + number
        block = row * blocks + column
        inside = (row < out) & (column < blocks)
        scale = scale_of(scales, block, inside, scale_code, outer, offset, group_size, double)
        scale = scale / tl.load(row_scales + row, mask=inside, other=1.0)
        place = block[:, None] * half + tl.arange(0, half)[None, :]
        pair = tl.load(packed + place, mask=inside[:, None], other=0).to(tl.int32)
        high = tl.load(code + (pair >> 4)) * scale[:, None]
        low = tl.load(code + (pair & 15)) * scale[:, None]
        values = tl.interleave(high, low).to(eighth.dtype.element_ty)
        entry = column.to(tl.int64) * size + tl.arange(0, size)
        if transposed:
            target = eighth + entry[:, None] * out + row[None, :]
            tl.store(target, tl.trans(values), mask=inside[None, :] & (entry[:, None] < blocks * size))
        else:
            target = eighth + row[:, None] * blocks * size + entry[None, :]
            tl.store(target, values, mask=inside[:, None] & (entry[None, :] < blocks * size))


def dequantize(
    packed: torch.Tensor, state: QuantState, row_scales: torch.Tensor, eighth: torch.Tensor, transposed: bool
) -> torch.Tensor:
    """Write W / row scale (out, in), or its transpose, into `eighth` (e4m3), and return that."""
    out, width = state.shape
    blocks = width // state.blocksize
    _dequantize[(triton.cdiv(out, COLUMNS), triton.cdiv(blocks, BLOCKS))](
        packed,
        eighth,
        *tables(state),
        row_scales,
        out,
        blocks,
        size=state.blocksize,
        group_size=state.state2.blocksize if state.nested else 1,
        double=state.nested,
        transposed=transposed,
        tall=COLUMNS,
        wide=BLOCKS,
    )
    return eighth
