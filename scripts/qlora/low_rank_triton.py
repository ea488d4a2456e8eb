"""The product of two narrow matrices added onto a wide one, in one pass over memory: Triton."""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS, WARPS = 64, 128, 8  # of a program
LEAST_RANK = 16  # that a matrix product takes


@triton.jit
def _add(
    output,
    narrow,
    wide,
    height,
    width,
    stride,
    down,
    across,
    rank: tl.constexpr,
    ranks: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    place = row[:, None] * width + column[None, :]
    inside = (row < height)[:, None] & (column < width)[None, :]
    index = tl.arange(0, ranks)
    left = tl.load(
        narrow + row[:, None] * stride + index[None, :],
        mask=(row < height)[:, None] & (index < rank)[None, :],
        other=0.0,
    )
    right = tl.load(
        wide + index[:, None] * down + column[None, :] * across,
        mask=(index < rank)[:, None] & (column < width)[None, :],
        other=0.0,
    )
    values = tl.load(output + place, mask=inside, other=0.0).to(tl.float32)
    values += tl.dot(left, right, input_precision="ieee")
    tl.store(output + place, values.to(output.dtype.element_ty), mask=inside)


def add(output: torch.Tensor, narrow: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """Add narrow (tokens, rank; its rows dense) times wide (rank, width) to the contiguous `output`, rounded once."""
    (height, width), rank = output.shape, len(wide)
    _add[(triton.cdiv(width, COLUMNS), triton.cdiv(height, ROWS))](
        output,
        narrow,
        wide,
        height,
        width,
        narrow.stride(0),
        *wide.stride(),
        rank=rank,
        ranks=max(LEAST_RANK, triton.next_power_of_2(rank)),
        rows=ROWS,
        columns=COLUMNS,
        num_warps=WARPS,
    )
    return output
