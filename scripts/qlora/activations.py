"""act(gate) · up of a gated MLP, and its gradients: Triton kernels on a GPU, PyTorch's own operations elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

try:
    from qlora import gated_triton
except ImportError:  # Triton comes with the CUDA build of torch alone
    gated_triton = None  # type: ignore[assignment]

SILU, GELU_TANH = {"SiLU", "SiLUActivation"}, {"GELUTanh", "PytorchGELUTanh"}
LARGEST_RANK = 8  # of an adapter that is added as gate and up are read; at 16 that takes as long as adding it before


@dataclass(frozen=True)
class Activation:
    """The function of a gated MLP, as its family names it.

    Adapters are those of gate and up: s x Aᵀ of both (tokens, sum of ranks), then B (width, rank) of each. Where they
    are given, gate and up come without their low-rank products.
    """

    function: nn.Module

    def _in_triton(self, gate: Tensor) -> bool:
        return gated_triton is not None and gate.is_cuda and type(self.function).__name__ in SILU | GELU_TANH

    def can_add(self, x: Tensor, ranks: Sequence[int]) -> bool:
        """Whether adapters of these ranks can be given, and gain by it, where gate and up are on the device of `x`."""
        return self._in_triton(x) and max(ranks) <= LARGEST_RANK

    def forward(self, gate: Tensor, up: Tensor, adapters: Sequence[Tensor] = ()) -> Tensor:
        """act(gate) · up, all (tokens, width); raises ValueError where adapters are given that nothing here adds."""
        if self._in_triton(gate):
            return gated_triton.forward(gate, up, type(self.function).__name__ in SILU, adapters)
        if adapters:
            raise ValueError("no adapters can be added here")
        return self.function(gate) * up

    def backward(
        self, gate: Tensor, up: Tensor, grad: Tensor, adapters: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of gate and up, and the product again; all three wide arguments may be overwritten."""
        if self._in_triton(gate):
            gated_triton.backward(gate, up, grad, type(self.function).__name__ in SILU, adapters)
            return gate, up, grad
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = self.function(leaf)
        (of_gate,) = torch.autograd.grad(active, leaf, grad * up)
        return of_gate, grad * active.detach(), active.detach() * up


def activation_of(module: nn.Module) -> Activation | None:
    """A gated MLP's function, or None where a module has none."""
    function = getattr(module, "act_fn", None)
    return Activation(function) if isinstance(function, nn.Module) else None
