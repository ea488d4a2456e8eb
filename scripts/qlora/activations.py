"""act(gate) · up and its gradient: Liger's Triton kernels on a GPU, PyTorch's own operations elsewhere."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

try:
    from liger_kernel.ops.geglu import geglu_backward, geglu_forward
    from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward
except ImportError:  # it needs Triton, which comes with the CUDA build of torch alone
    swiglu_forward = swiglu_backward = geglu_forward = geglu_backward = None

KERNELS = {
    "SiLUActivation": (swiglu_forward, swiglu_backward),
    "SiLU": (swiglu_forward, swiglu_backward),
    "GELUTanh": (geglu_forward, geglu_backward),
    "PytorchGELUTanh": (geglu_forward, geglu_backward),
}


@dataclass(frozen=True)
class Activation:
    """An elementwise function of a gated MLP."""

    function: nn.Module

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) · up, all (tokens, width)."""
        kernel, _ = KERNELS.get(type(self.function).__name__, (None, None))
        if kernel is not None and gate.is_cuda:
            return kernel(gate, up)[-1]
        return self.function(gate) * up

    def backward(self, gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up, given that of the product; the kernels write them over gate and up."""
        _, kernel = KERNELS.get(type(self.function).__name__, (None, None))
        if kernel is not None and gate.is_cuda:
            return kernel(gate, up, grad)
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = self.function(leaf)
        (of_gate,) = torch.autograd.grad(active, leaf, grad * up)
        return of_gate, grad * active.detach()


def activation_of(module: nn.Module) -> Activation | None:
    """A gated MLP's function, as its family names it."""
    function = getattr(module, "act_fn", None)
    return Activation(function) if isinstance(function, nn.Module) else None
