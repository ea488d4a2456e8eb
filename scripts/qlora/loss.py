"""Cross-entropy over the learned positions alone, so that logits exist for no other."""

import functools
import types
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qlora.errors import UserError
from qlora.render import IGNORED

TILE = 2048  # positions whose logits exist at a time


def add_supervised_loss(network: PreTrainedModel) -> None:
    """Let `network(input_ids=…, attention_mask=…, labels=…, loss_items=n)` return the summed loss over n, a scalar.

    The loss is in nats, over positions whose next label is not IGNORED. It is computed inside the forward, so that
    wrappers around the model (PEFT, Accelerate) keep working. (TRL's own tiles score all positions on a CPU.)
    """
    original = network.forward
    softcap = softcap_of(network)

    @functools.wraps(type(network).forward)
    def forward(self: PreTrainedModel, *args: Any, loss_items: Any = None, **rest: Any) -> Any:
        if loss_items is None:
            return original(*args, **rest)
        wanted = rest.pop("labels")[:, 1:]
        rest["use_cache"] = False
        hidden = self.base_model(*args, **rest).last_hidden_state[:, :-1]
        chosen = wanted != IGNORED
        return summed_nll(hidden[chosen], wanted[chosen], self.get_output_embeddings(), softcap) / loss_items

    network.forward = types.MethodType(forward, network)  # type: ignore[method-assign]


def softcap_of(network: PreTrainedModel) -> float | None:
    """Where the family's logits are capped, or None. Raises UserError for families that scale them otherwise."""
    config = network.config.get_text_config()
    if any(getattr(config, name, 1.0) not in (None, 1.0) for name in ("logit_scale", "logits_scaling")):
        raise UserError(f"{config.model_type}: this family scales its logits, which the loss here does not")
    return getattr(config, "final_logit_softcapping", None)


def token_nll(hidden: torch.Tensor, wanted: torch.Tensor, head: torch.nn.Module, softcap: float | None) -> torch.Tensor:
    """-log p of each wanted token in nats, (positions,) in float32, without gradients; shapes as in `summed_nll`."""
    tiles = [slice(start, start + TILE) for start in range(0, len(wanted), TILE)]
    return torch.cat([_tile_nll(hidden[tile], wanted[tile], head, softcap, "none") for tile in tiles])


def summed_nll(
    hidden: torch.Tensor, wanted: torch.Tensor, head: torch.nn.Module, softcap: float | None
) -> torch.Tensor:
    """Sum of -log p(wanted) in nats as a float32 scalar; `hidden` is (positions, width), `wanted` (positions,).

    Logits of one tile exist at a time; the backward computes them anew (Chen et al., arXiv 1604.06174).
    """
    total = hidden.sum(dtype=torch.float32) * 0  # a batch with nothing to learn gives a zero that has a gradient
    for start in range(0, len(wanted), TILE):
        tile = slice(start, start + TILE)
        total = total + checkpoint(
            _tile_nll, hidden[tile], wanted[tile], head, softcap, use_reentrant=False, preserve_rng_state=False
        )
    return total


def _tile_nll(
    hidden: torch.Tensor, wanted: torch.Tensor, head: torch.nn.Module, softcap: float | None, reduction: str = "sum"
) -> torch.Tensor:
    logits = head(hidden).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, wanted, reduction=reduction)
