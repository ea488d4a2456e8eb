"""act(gate) · up and its gradients in one pass over memory each, LoRA's products added as they are read: Triton."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

ENTRIES = 2048  # a program without adapters
ROWS, COLUMNS, WARPS = 32, 128, 8  # of one with adapters: three of them fit on a multiprocessor of an H100
RANKS = 16  # of an adapter at a time, the fewest that a matrix product takes


@triton.jit
def _active(gate, silu: tl.constexpr):
    """The function of `gate` and its derivative, in float32: SiLU, or GELU's tanh approximation (arXiv 1606.08415)."""
    if silu:
        part = tl.sigmoid(gate)
        active = gate * part
        slope = part * (1 + gate * (1 - part))
    else:
        curve = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        tanh = 2 * tl.sigmoid(2 * curve) - 1
        active = 0.5 * gate * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * 0.7978845608028654 * (1 + 0.134145 * gate * gate)
    return active, slope


@triton.jit
def _add(values, narrow, b, row, column, height, width, stride, rank: tl.constexpr, ranks: tl.constexpr):
    """A tile in float32 plus that of narrow (height, rank) bᵀ; `stride`: from one row of narrow to the next."""
    for first in tl.static_range(0, rank, ranks):
        index = first + tl.arange(0, ranks)
        left = tl.load(
            narrow + row[:, None] * stride + index[None, :],
            mask=(row < height)[:, None] & (index < rank)[None, :],
            other=0.0,
        )
        right = tl.load(
            b + column[None, :] * rank + index[:, None],
            mask=(index < rank)[:, None] & (column < width)[None, :],
            other=0.0,
        )
        values += tl.dot(left, right, input_precision="ieee")
    return values


@triton.jit
def _forward(
    gate,
    up,
    product,
    narrow,
    gate_b,
    up_b,
    height,
    width,
    silu: tl.constexpr,
    gate_rank: tl.constexpr,
    up_rank: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    ranks: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, columns)
    place = row[:, None] * width + column[None, :]
    inside = (row < height)[:, None] & (column < width)[None, :]
    before = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    above = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    stride: tl.constexpr = gate_rank + up_rank
    before = _add(before, narrow, gate_b, row, column, height, width, stride, gate_rank, ranks)
    above = _add(above, narrow + gate_rank, up_b, row, column, height, width, stride, up_rank, ranks)
    active, _ = _active(before, silu)
    tl.store(product + place, (active * above).to(product.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gate,
    up,
    grad,
    narrow,
    gate_b,
    up_b,
    height,
    width,
    silu: tl.constexpr,
    gate_rank: tl.constexpr,
    up_rank: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    ranks: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, columns)
    place = row[:, None] * width + column[None, :]
    inside = (row < height)[:, None] & (column < width)[None, :]
    before = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    above = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    below = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    stride: tl.constexpr = gate_rank + up_rank
    before = _add(before, narrow, gate_b, row, column, height, width, stride, gate_rank, ranks)
    above = _add(above, narrow + gate_rank, up_b, row, column, height, width, stride, up_rank, ranks)
    active, slope = _active(before, silu)
    kind = grad.dtype.element_ty
    tl.store(gate + place, (below * above * slope).to(kind), mask=inside)
    tl.store(up + place, (below * active).to(kind), mask=inside)
    tl.store(grad + place, (active * above).to(kind), mask=inside)


def _run(kernel: Any, *wide: torch.Tensor, silu: bool, adapters: Sequence[torch.Tensor]) -> None:
    """`kernel` over three matrices (tokens, width): by tiles, or where there are no adapters as one long row."""
    if adapters:
        narrow, *bs = adapters
        (height, width), (rows, columns), ranks = wide[0].shape, (ROWS, COLUMNS), [b.shape[1] for b in bs]
    else:
        narrow, *bs = wide  # which are not read
        height, width, rows, columns, ranks = 1, wide[0].numel(), 1, ENTRIES, [0, 0]
    kernel[(triton.cdiv(width, columns), triton.cdiv(height, rows))](
        *wide,
        narrow,
        *bs,
        height,
        width,
        silu=silu,
        gate_rank=ranks[0],
        up_rank=ranks[1],
        rows=rows,
        columns=columns,
        ranks=RANKS,
        num_warps=WARPS if adapters else 4,
    )


def forward(gate: torch.Tensor, up: torch.Tensor, silu: bool, adapters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The product, like the contiguous `gate` and `up`; `adapters` as in Activation."""
    product = torch.empty_like(gate)
    _run(_forward, gate, up, product, silu=silu, adapters=adapters)
    return product


def backward(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, silu: bool, adapters: Sequence[torch.Tensor]
) -> None:
    """Write the gradients of gate and up over them, and the product over its own gradient."""
    _run(_backward, gate, up, grad, silu=silu, adapters=adapters)
