"""One CUDA graph over a micro-step: its thousands of launches become one.

Clipping and the optimiser stay outside: the Trainer's own clipping, schedule and record of the loss are as users know
them, and fused they are about 1.5 of a step's 136 ms (Llama-2-7B, 2,048 tokens, an H100).
"""

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger("qlora")
EAGER = 2  # steps of a shape that run eagerly first: kernels are built and chosen in them
Inputs = Mapping[str, Any]
Step = Callable[[dict[str, Any], torch.Tensor], torch.Tensor]


@dataclass
class Captured:
    """A recorded step: its inputs and its loss stay where they are."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Any]
    items: torch.Tensor
    loss: torch.Tensor


class StepGraph:
    """Calls `step(inputs, items)`, forward and backward, and replays it for each shape that comes again.

    Gradients add up in memory of their own, which each parameter's `grad` points to. The step must not wait for the
    GPU, restore a state of random numbers, or depend on Python values that change between calls.
    """

    def __init__(self, step: Step, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.step, self.parameters = step, parameters
        self.gradients = [torch.zeros_like(parameter) for parameter in parameters]
        self.seen: dict[Any, int] = {}
        self.captured: dict[Any, Captured] = {}
        # One pool: an eager forward of another shape uses the memory that a recording leaves between its replays. Its
        # backward does not: autograd's own thread, which is not routed there, allocates for it.
        self.pool = torch.cuda.MemPool()
        self.largest = 0  # tokens of a recorded step
        self.stream = torch.cuda.Stream()  # one for all steps: a recording may depend on no other

    def __call__(self, inputs: Inputs, items: torch.Tensor) -> torch.Tensor:
        """The loss of one micro-step; the gradients are added to what is there."""
        self._point_to_gradients()
        if self.captured and inputs["input_ids"].numel() > self.largest:
            self._let_recordings_go()
        shape = tuple((name, getattr(value, "shape", value)) for name, value in sorted(inputs.items()))
        self.seen[shape] = self.seen.get(shape, 0) + 1
        if self.seen[shape] <= EAGER:
            return self._eagerly(inputs, items)
        if shape not in self.captured:
            self.captured[shape] = self._capture(inputs, items)
        recorded = self.captured[shape]
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                recorded.inputs[name].copy_(value)
        recorded.items.copy_(items)
        recorded.graph.replay()
        return recorded.loss.clone()

    def _point_to_gradients(self) -> None:
        """After the optimiser's step the trainer drops the gradients: bring their memory back, cleared."""
        dropped = [place for place, parameter in enumerate(self.parameters) if parameter.grad is None]
        if dropped:
            torch._foreach_zero_([self.gradients[place] for place in dropped])
        for place in dropped:
            self.parameters[place].grad = self.gradients[place]

    def _let_recordings_go(self) -> None:
        """Before a larger step, which would lie beside their memory; once it is recorded they are again, within its.

        Smaller steps between its eager ones are recorded, and let go, meanwhile: a larger size costs up to three times.
        After steps of 1, 2, 3 and 4 packs of 2,048 tokens, in this order, 50 GiB would be reserved for Llama-2-7B;
        after those of 4 alone it is 32.
        """
        torch.cuda.synchronize()  # a replay may still compute in what is given up
        self.largest = 0
        self.captured.clear()
        self.pool = torch.cuda.MemPool()
        torch.cuda.empty_cache()

    def _eagerly(self, inputs: Inputs, items: torch.Tensor) -> torch.Tensor:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
            loss = self.step(dict(inputs), items)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def _capture(self, inputs: Inputs, items: torch.Tensor) -> Captured:
        own = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        count = items.clone()
        gc.collect()
        torch.cuda.empty_cache()  # what the eager steps held would lie idle beside the graph's own memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool.id, stream=self.stream):  # type: ignore[arg-type]
            loss = self.step(dict(own), count)
        self.largest = max(self.largest, own["input_ids"].numel())
        log.info("step graph: recorded for %d tokens, %d learned", own["input_ids"].numel(), len(own["learned"]))
        return Captured(graph, own, count, loss)
