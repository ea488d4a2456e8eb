"""Dropout whose mask is made again whenever it is needed, and so kept nowhere (arXiv 1207.0580)."""

import torch
from torch import Tensor

try:
    from qlora import dropout_triton
except ImportError:  # Triton comes with the CUDA build of torch alone
    dropout_triton = None  # type: ignore[assignment]


class Dropout:
    """Masks of one micro-step: one for each number that a caller gives.

    The seed of the step is drawn from the device's own random numbers, which a checkpoint keeps and a CUDA graph
    advances; nothing else draws, so that what is computed again needs no state of random numbers restored.
    """

    def __init__(self, share: float, device: torch.device) -> None:
        self.share = share
        self.seed = torch.zeros((), dtype=torch.int64, device=device)

    def draw(self) -> None:
        """Let the masks be others from now on."""
        self.seed.random_(0, 2**31)

    def __call__(self, x: Tensor, number: int) -> Tensor:
        """`x` with `share` of its entries at random set to 0 and the others divided by 1 - share; also the gradient."""
        if x.is_cuda and dropout_triton is not None:
            return dropout_triton.dropped(x, self.seed, number, self.share)
        generator = torch.Generator(x.device).manual_seed(int(self.seed) + number)
        return x * (torch.rand(x.shape, generator=generator, device=x.device) >= self.share) / (1 - self.share)
