"""Cross-entropy over the learned positions alone, so that logits exist for no other."""

import functools
import types
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qlora.errors import UserError
from qlora.packed_attention import no_mask
from qlora.render import IGNORED

try:
    from qlora import nll_triton
except ImportError:  # Triton comes with the CUDA build of torch alone
    nll_triton = None  # type: ignore[assignment]

TILE = 2048  # positions whose logits exist at a time
GPU_TILE = 1024  # the same on a GPU, as many as keep it busy: 0.5 GiB of logits in 16 bits for 256,000 labels


def add_supervised_loss(network: PreTrainedModel) -> None:
    """Let `network(input_ids=…, …, labels=…, loss_items=n)` return the summed loss over n, a scalar in nats.

    A batch may bring the places of its labels, as `places_of` gives them and perhaps padded: a GPU need not wait for
    their number then. The loss is computed inside the forward, so that wrappers around the model (PEFT, Accelerate)
    keep working. (TRL's own tiles score all positions on a CPU.)
    """
    original = network.forward
    softcap = softcap_of(network)

    @functools.wraps(type(network).forward)
    def forward(self: PreTrainedModel, *args: Any, loss_items: Any = None, **rest: Any) -> Any:
        if loss_items is None:
            return original(*args, **rest)
        labels = rest.pop("labels")
        learned, wanted = (rest.pop("learned"), rest.pop("wanted")) if "learned" in rest else places_of(labels)
        rest["use_cache"] = False
        if "cu_seq_lens_q" in rest:
            rest["attention_mask"] = no_mask(labels.device)
        hidden = self.base_model(*args, **rest).last_hidden_state.flatten(0, 1).index_select(0, learned)
        return summed_nll(hidden, wanted, self.get_output_embeddings(), softcap, loss_items)

    network.forward = types.MethodType(forward, network)  # type: ignore[method-assign]


def places_of(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the flattened batch predicts a learned label, and that label: both (positions,); `labels` (rows, width)."""
    rows, places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return rows * labels.shape[1] + places, labels[rows, places + 1]


def softcap_of(network: PreTrainedModel) -> float | None:
    """Where the family's logits are capped, or None. Raises UserError for families that scale them otherwise."""
    config = network.config.get_text_config()
    if any(getattr(config, name, 1.0) not in (None, 1.0) for name in ("logit_scale", "logits_scaling")):
        raise UserError(f"{config.model_type}: this family scales its logits, which the loss here does not")
    return getattr(config, "final_logit_softcapping", None)


def token_nll(hidden: torch.Tensor, wanted: torch.Tensor, head: torch.nn.Module, softcap: float | None) -> torch.Tensor:
    """-log p of each wanted token in nats, (positions,) in float32, without gradients; shapes as in `summed_nll`."""
    return torch.cat([_tile_nll(hidden[tile], wanted[tile], head, softcap, "none") for tile in _tiles(wanted)])


def summed_nll(
    hidden: torch.Tensor, wanted: torch.Tensor, head: torch.nn.Module, softcap: float | None, items: Any
) -> torch.Tensor:
    """Sum of -log p(wanted) in nats over `items`, in float32; `hidden` is (positions, width), `wanted` (positions,)."""
    if any(weight.requires_grad for weight in head.parameters()):  # a bias of the head that is learned too
        random = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in head.modules())
        again = functools.partial(checkpoint, _tile_nll, use_reentrant=False, preserve_rng_state=random)
        parts = [again(hidden[tile], wanted[tile], head, softcap) for tile in _tiles(wanted)]
        return torch.stack([hidden.sum() * 0, *parts]).sum() / items
    loss: torch.Tensor = _SummedNll.apply(hidden, wanted, head, softcap, items)
    return loss


class _SummedNll(torch.autograd.Function):
    """Logits of one tile exist at a time, and once: the gradient of `hidden` is made beside the loss."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, wanted: torch.Tensor, head: torch.nn.Module, softcap: float | None, items: Any
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        gradients = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for tile in _tiles(wanted):
            if gradients is None:
                total += _tile_nll(hidden[tile], wanted[tile], head, softcap)
                continue
            part, gradients[tile] = _tile_gradient(hidden[tile], wanted[tile], head, softcap)
            total += part
        ctx.gradients, ctx.items = gradients, items  # divided last: float16 would lose small ones before its scaling
        return total / items

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None  # else the loss would hold them to the end of the backward
        return gradients.mul_(grad / ctx.items), None, None, None, None


def _tiles(wanted: torch.Tensor) -> list[slice]:
    positions = GPU_TILE if wanted.is_cuda else TILE
    return [slice(start, start + positions) for start in range(0, len(wanted), positions)]


def _tile_gradient(
    hidden: torch.Tensor, wanted: torch.Tensor, head: torch.nn.Module, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of a tile, and the gradient of `hidden`."""
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        if nll_triton is None or not hidden.is_cuda:
            part = _tile_nll(leaf, wanted, head, softcap)
            (gradient,) = torch.autograd.grad(part, leaf)
            return part.detach(), gradient
        logits = head(leaf)
    of_logits = logits.detach()
    part = nll_triton.nll_and_gradient(of_logits, wanted, softcap).sum()
    (gradient,) = torch.autograd.grad(logits, leaf, of_logits)
    return part, gradient


def _tile_nll(
    hidden: torch.Tensor, wanted: torch.Tensor, head: torch.nn.Module, softcap: float | None, reduction: str = "sum"
) -> torch.Tensor:
    logits = head(hidden).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, wanted, reduction=reduction)
