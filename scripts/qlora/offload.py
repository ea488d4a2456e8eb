"""Checkpointed hidden states in host memory: copied beside the compute, and fetched a layer ahead of their use.

Transformers' `offload` copies in the compute's stream; TRL's waits for the GPU, which a recorded step may not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass(eq=False)
class Kept:
    """A layer's input, copied to the host."""

    room: Tensor  # bytes of host memory
    host: Tensor  # the input, in the first of them
    below: Kept | None  # that of the layer before, which the backward wants next
    here: Tensor | None  # on the device: until it has left, and again from when it is fetched
    moved: torch.cuda.Event | None  # the end of the copy begun last


class HostStates:
    """Hooks for the inputs of checkpointed layers. Without a GPU their copies are made at once.

    Device memory is allocated and freed in the compute's own stream, which waits for a copy before it goes on with
    what was copied. Host memory is used again and never freed, since recorded steps write to it.
    """

    def __init__(self, device: str, tell: Callable[[str], Any]) -> None:
        self.device, self.tell = device, tell
        self.side = torch.cuda.Stream() if device != "cpu" else None
        self.last: Kept | None = None  # of the forward that goes on
        self.free: list[Tensor] = []  # host memory
        self.refused = False

    def pack(self, state: Tensor) -> Kept | Tensor:
        """Begin to copy a layer's input to the host, and let go of the one before."""
        if state.is_leaf:  # a mask; or embeddings, which autograd holds on the device nevertheless
            return state
        if self.last is not None:
            self._join(self.last)
            self.last.here = None
        room = self._room(state.nbytes)
        if room is None:
            return state
        host = room[: state.nbytes].view(state.dtype).view(state.shape)
        self.last = Kept(room, host, self.last, state.detach(), self._copied(host, state))
        return self.last

    def unpack(self, kept: Kept | Tensor) -> Tensor:
        """The input again; that of the layer before is on its way from now on."""
        if isinstance(kept, Tensor):
            return kept
        self.last = None
        state = self._fetched(kept)
        self._join(kept)
        if kept.below is not None:
            self._fetched(kept.below)
        self.free.append(kept.room)  # what is written to it next comes later in the same stream
        kept.below = kept.here = None
        return state

    def _fetched(self, kept: Kept) -> Tensor:
        if kept.here is None:
            kept.here = torch.empty_like(kept.host, device=self.device)
            kept.moved = self._copied(kept.here, kept.host)
        return kept.here

    def _copied(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Begin a copy after what was computed so far; gives the event of its end."""
        if self.side is None:
            target.copy_(source)
            return None
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            target.copy_(source, non_blocking=True)
        return self.side.record_event()

    def _join(self, kept: Kept) -> None:
        if kept.moved is not None:
            torch.cuda.current_stream().wait_event(kept.moved)

    def _room(self, needed: int) -> Tensor | None:
        """Host memory for `needed` bytes, pinned beside a GPU; None where there is no more."""
        fitting = [place for place, room in enumerate(self.free) if room.nbytes >= needed]
        if fitting:
            return self.free.pop(min(fitting, key=lambda place: self.free[place].nbytes))
        if not self.refused:
            size = 1 << (needed - 1).bit_length()  # so that batches of many lengths share a few sizes
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=self.side is not None)
            except RuntimeError as error:
                self.refused = True
                self.tell(
                    f"hidden states on the GPU where no more pinned memory was to be had ({str(error).splitlines()[0]})"
                )
        return None


def keep_on_host(network: PreTrainedModel, states: HostStates) -> str:
    """Let checkpointing, when it is switched on, keep the layers' inputs in `states`; say in a line whether it will.

    The last layer is not checkpointed then: its backward comes first, and would compute again what is just there.
    A model's own code from before transformers had such layers is left as it is.
    """
    original = network._set_gradient_checkpointing
    layers = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or "value" in inspect.signature(original).parameters:
        return "checkpointed hidden states on the GPU: the model's code checkpoints in an older way"

    def switch(enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **rest: Any) -> None:
        def kept(*args: Any, **options: Any) -> Any:
            with saved_tensors_hooks(states.pack, states.unpack):  # what a layer itself saves does not come here
                return gradient_checkpointing_func(*args, **options)

        original(enable, kept, **rest)
        layers[-1].gradient_checkpointing = False

    network._set_gradient_checkpointing = switch  # type: ignore[method-assign, assignment]
    return "checkpointed hidden states in host memory"
