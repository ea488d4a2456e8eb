"""Dropout from a seed in one kernel: Triton, with its counter-based random numbers (Philox)."""

import torch
import triton
import triton.language as tl

ENTRIES = 1024  # for each of the four random numbers that a call of Philox gives


@triton.jit
def _part(x, out, first, random, size, share, entries: tl.constexpr):
    place = first + tl.arange(0, entries)
    values = tl.load(x + place, mask=place < size, other=0.0).to(tl.float32)
    values = tl.where(random >= share, values / (1.0 - share), 0.0)
    tl.store(out + place, values.to(out.dtype.element_ty), mask=place < size)


@triton.jit
def _dropped(x, out, seed, number, size, share, entries: tl.constexpr):
    program = tl.program_id(0)
    counter = program * entries + tl.arange(0, entries)
    key = tl.load(seed) + number
    one, two, three, four = tl.rand4x(key, counter)
    first = program.to(tl.int64) * 4 * entries
    _part(x, out, first, one, size, share, entries)
    _part(x, out, first + entries, two, size, share, entries)
    _part(x, out, first + 2 * entries, three, size, share, entries)
    _part(x, out, first + 3 * entries, four, size, share, entries)


def dropped(x: torch.Tensor, seed: torch.Tensor, number: int, share: float) -> torch.Tensor:
    """As Dropout; `seed` is a scalar of 31 bits on the device of `x`."""
    x = x.contiguous()  # entries are numbered as they lie
    out = torch.empty_like(x)
    _dropped[(triton.cdiv(x.numel(), 4 * ENTRIES),)](x, out, seed, number, x.numel(), share, entries=ENTRIES)
    return out
