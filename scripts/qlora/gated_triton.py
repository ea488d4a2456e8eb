"""act(gate) · up and its gradients in one pass over memory each: Triton."""

import torch
import triton
import triton.language as tl

ENTRIES = 2048  # a program


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
def _forward(gate, up, product, entries, silu: tl.constexpr, step: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * step + tl.arange(0, step)
    inside = place < entries
    active, _ = _active(tl.load(gate + place, mask=inside, other=0.0).to(tl.float32), silu)
    value = active * tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(product + place, value.to(product.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gate, up, grad, entries, silu: tl.constexpr, step: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * step + tl.arange(0, step)
    inside = place < entries
    active, slope = _active(tl.load(gate + place, mask=inside, other=0.0).to(tl.float32), silu)
    above = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    below = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    kind = grad.dtype.element_ty
    tl.store(gate + place, (below * above * slope).to(kind), mask=inside)
    tl.store(up + place, (below * active).to(kind), mask=inside)
    tl.store(grad + place, (active * above).to(kind), mask=inside)


def forward(gate: torch.Tensor, up: torch.Tensor, silu: bool) -> torch.Tensor:
    """The product, like the contiguous `gate` and `up`."""
    product = torch.empty_like(gate)
    entries = gate.numel()
    _forward[(triton.cdiv(entries, ENTRIES),)](gate, up, product, entries, silu=silu, step=ENTRIES)
    return product


def backward(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, silu: bool) -> None:
    """Write the gradients of gate and up over them, and the product over its own gradient."""
    entries = gate.numel()
    _backward[(triton.cdiv(entries, ENTRIES),)](gate, up, grad, entries, silu=silu, step=ENTRIES)
