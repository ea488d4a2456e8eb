"""Cross-entropy and its gradient in one kernel, which writes the gradient where the logits were: Triton."""

import torch
import triton
import triton.language as tl

COLUMNS = 4096  # of the logits at a time


@triton.jit
def values_of(place, inside, cap: tl.constexpr):
    """Logits in float32, -inf where there are none, and their share of a cap (0 without one)."""
    values = tl.load(place, mask=inside, other=-float("inf")).to(tl.float32)
    share = tl.zeros_like(values)
    if cap > 0:
        share = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * (values / cap)))  # tanh
        values = tl.where(inside, cap * share, -float("inf"))
    return values, share


@triton.jit
def _nll(logits, wanted, nll, stride, width: tl.constexpr, cap: tl.constexpr, columns: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(wanted + row)
    counts = tl.where(target < 0, 0.0, 1.0)
    most, total, picked = -float("inf"), 0.0, 0.0
    for first in range(0, width, columns):
        column = first + tl.arange(0, columns)
        values, _ = values_of(logits + row * stride + column, column < width, cap)
        above = tl.maximum(most, tl.max(values, 0))
        total = total * tl.exp(most - above) + tl.sum(tl.exp(values - above), 0)
        most = above
        picked += tl.sum(tl.where(column == target, values, 0.0), 0)
    whole = most + tl.log(total)
    tl.store(nll + row, counts * (whole - picked))
    for first in range(0, width, columns):
        column = first + tl.arange(0, columns)
        place = logits + row * stride + column
        values, share = values_of(place, column < width, cap)
        gradient = counts * (tl.exp(values - whole) - tl.where(column == target, 1.0, 0.0))
        if cap > 0:
            gradient *= 1.0 - share * share
        tl.store(place, gradient.to(logits.dtype.element_ty), mask=column < width)


def nll_and_gradient(logits: torch.Tensor, wanted: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """-log p of each wanted label in nats, (positions,) float32; `logits` (positions, labels) become its gradient.

    A label below 0 is none: its loss and gradient are 0.
    A `softcap` c makes each logit l into c tanh(l / c) first, as Gemma 2 does (arXiv 2408.00118, section 2).
    """
    nll = torch.empty(len(wanted), device=logits.device, dtype=torch.float32)
    _nll[(len(wanted),)](
        logits, wanted, nll, logits.stride(0), logits.shape[1], softcap or 0.0, columns=COLUMNS, num_warps=8
    )
    return nll
