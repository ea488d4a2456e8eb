"""Rows scaled into 8-bit floats (e4m3, arXiv 2209.05433), and NF4 weights made whole into them: Triton."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState

from qlora.nf4_triton import scale_of, tables

COLUMNS, BLOCKS = 128, 2  # rows of the weight, and quantisation blocks of each, that a program transposes
NARROW = 4096  # entries of a row that fewer warps take less time for


@triton.jit
def _entries(x, columns, row, place, width, first, weighted: tl.constexpr):
    inside = place < width
    values = tl.load(x + row * width + place, mask=inside, other=0.0).to(tl.float32)
    if weighted:
        values *= tl.load(columns + first + place, mask=inside, other=0.0)
    return values


@triton.jit
def _largest(x, columns, row, width, first, largest, weighted: tl.constexpr, step: tl.constexpr):
    """The larger of `largest` (step,) and the sizes of the row's entries, `step` by `step`."""
    for start in range(0, width, step):
        values = _entries(x, columns, row, start + tl.arange(0, step), width, first, weighted)
        largest = tl.maximum(largest, tl.abs(values))
    return largest


@triton.jit
def _write(x, columns, target, scale, row, width, first, weighted: tl.constexpr, step: tl.constexpr):
    for start in range(0, width, step):
        place = start + tl.arange(0, step)
        values = _entries(x, columns, row, place, width, first, weighted)
        tl.store(target + first + place, (values / scale).to(target.dtype.element_ty), mask=place < width)


@triton.jit
def _scale_rows(
    x,
    second,
    third,
    columns,
    eighth,
    scales,
    width,
    second_width,
    third_width,
    weighted: tl.constexpr,
    step: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    third_first = width + second_width
    largest = tl.zeros((step,), tl.float32)
    largest = _largest(x, columns, row, width, 0, largest, weighted, step)
    largest = _largest(second, columns, row, second_width, width, largest, weighted, step)
    largest = _largest(third, columns, row, third_width, third_first, largest, weighted, step)
    scale = tl.maximum(tl.max(largest), 1e-12) / 448.0
    tl.store(scales + row, scale)
    target = eighth + row * (third_first + third_width)
    _write(x, columns, target, scale, row, width, 0, weighted, step)
    _write(second, columns, target, scale, row, second_width, width, weighted, step)
    _write(third, columns, target, scale, row, third_width, third_first, weighted, step)


def scaled_rows(
    parts: Sequence[torch.Tensor], columns: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to three (rows, width) side by side, times `columns` where given, in e4m3, and each row's scale (rows, 1)."""
    first, *others = parts = [part.contiguous() for part in parts]
    second, third = [*others, first, first][:2]
    widths = [part.shape[1] for part in parts]
    _, second_width, third_width = [*widths, 0, 0][:3]
    eighth = torch.empty(len(first), sum(widths), device=first.device, dtype=torch.float8_e4m3fn)
    scales = torch.empty(len(first), 1, device=first.device)
    many = sum(widths) > NARROW
    _scale_rows[(len(first),)](
        first,
        second,
        third,
        first if columns is None else columns,
        eighth,
        scales,
        widths[0],
        second_width,
        third_width,
        weighted=columns is not None,
        step=4096 if many else 2048,
        num_warps=16 if many else 8,
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
    stride,
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
            target = eighth + entry[:, None] * stride + row[None, :]
            tl.store(target, tl.trans(values), mask=inside[None, :] & (entry[:, None] < blocks * size))
        else:
            target = eighth + row[:, None] * stride + entry[None, :]
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
        eighth.stride(0),
        size=state.blocksize,
        group_size=state.state2.blocksize if state.nested else 1,
        double=state.nested,
        transposed=transposed,
        tall=COLUMNS,
        wide=BLOCKS,
    )
    return eighth
