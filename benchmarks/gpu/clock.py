"""Tokens and seconds between the end of the warm-up and the last step, whoever trains."""

import time
from typing import Any

import torch


class Clock:
    """Steps before `warm_up` are not counted; the last is `steps`."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.warm_up, self.steps, self.marks = warm_up, steps, [0.0, 0.0]
        self.started = time.monotonic()

    def at(self, step: int) -> None:
        """Take the time where `step` begins or ends what counts."""
        if step in (self.warm_up, self.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks[step == self.steps] = time.monotonic()

    def result(self, counts: list[torch.Tensor]) -> dict[str, float]:
        """The figures, given the tokens of each step, warm-up included."""
        seconds = self.marks[1] - self.marks[0]
        tokens = sum(int(count.sum()) for count in counts[self.warm_up :])
        return {
            "tokens per second": round(tokens / seconds, 1),
            "seconds a step": round(seconds / (self.steps - self.warm_up), 5),
            "start-up seconds": round(self.marks[0] - self.started, 1),
            "allocated GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "reserved GiB": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        }


def callback(clock: Clock) -> Any:
    """What tells the clock a trainer's steps."""
    from transformers import TrainerCallback  # after Unsloth, which changes it

    class Mark(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:  # noqa: ARG002 (the trainer's)
            clock.at(state.global_step)

    return Mark()
