"""act(gate) · up and its gradients in one pass over memory each, LoRA's products added as they are read: Triton."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

ROWS, COLUMNS, WARPS = 32, 128, 4  # of a program


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
def _added(values, narrow, b, row, column, height, width, stride, rank: tl.constexpr):
    """A tile in float32 plus that of narrow (height, rank) bᵀ; `stride`: from one row of narrow to the next.

    A rank after the other: tensor cores would leave their sums where the tile's other values are not.
    """
    for index in tl.static_range(rank):
        left = tl.load(narrow + row * stride + index, mask=row < height, other=0.0).to(tl.float32)
        right = tl.load(b + column * rank + index, mask=column < width, other=0.0).to(tl.float32)
        values += left[:, None] * right[None, :]
    return values


@triton.jit
def _read(
    gate,
    up,
    narrow,
    gate_b,
    up_b,
    height,
    width,
    gate_rank: tl.constexpr,
    up_rank: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """This program's tile: where its entries are, which of them there are, and gate's and up's whole outputs there."""
    row = tl.program_id(1).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    place = row[:, None] * width + column[None, :]
    inside = (row < height)[:, None] & (column < width)[None, :]
    before = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    above = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    stride: tl.constexpr = gate_rank + up_rank
    before = _added(before, narrow, gate_b, row, column, height, width, stride, gate_rank)
    above = _added(above, narrow + gate_rank, up_b, row, column, height, width, stride, up_rank)
    return place, inside, before, above


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
):
    place, inside, before, above = _read(
        gate, up, narrow, gate_b, up_b, height, width, gate_rank, up_rank, rows, columns
    )
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
):
    place, inside, before, above = _read(
        gate, up, narrow, gate_b, up_b, height, width, gate_rank, up_rank, rows, columns
    )
    below = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    active, slope = _active(before, silu)
    kind = grad.dtype.element_ty
    tl.store(gate + place, (below * above * slope).to(kind), mask=inside)
    tl.store(up + place, (below * active).to(kind), mask=inside)
    tl.store(grad + place, (active * above).to(kind), mask=inside)


def _run(kernel: Any, *wide: torch.Tensor, silu: bool, adapters: Sequence[torch.Tensor]) -> None:
    """`kernel` over three matrices (tokens, width)."""
    height, width = wide[0].shape
    narrow, *bs = adapters or wide  # without adapters they are not read
    gate_rank, up_rank = [b.shape[1] for b in bs] if adapters else (0, 0)
    kernel[(triton.cdiv(width, COLUMNS), triton.cdiv(height, ROWS))](
        *wide,
        narrow,
        *bs,
        height,
        width,
        silu=silu,
        gate_rank=gate_rank,
        up_rank=up_rank,
        rows=ROWS,
        columns=COLUMNS,
        num_warps=WARPS,
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
