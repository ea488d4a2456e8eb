"""When a training's steps begin and end, counted from the start of its process, and how many tokens they see."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback


class Watch(TrainerCallback):
    """Takes the time of the first step, and from the end of `warm_up` steps to the last; ends training in time.

    `tokens` says how many tokens were seen so far, without padding, and `age` how many seconds old the process is.
    Training ends after the step in which it gets older than `seconds`, as if that were its last.
    """

    def __init__(self, tokens: Callable[[], int], age: Callable[[], float], warm_up: int, seconds: float) -> None:
        self.tokens, self.age, self.warm_up, self.limit = tokens, age, warm_up, seconds
        self.steps = 0  # that are wanted
        self.marks: list[tuple[int, float, int]] = []  # step, seconds, tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:  # noqa: ARG002 (the trainer's)
        """A short training has a shorter warm-up."""
        self.steps = state.max_steps
        self.warm_up = min(self.warm_up, self.steps // 2)

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:  # noqa: ARG002
        """Called before each step."""
        if state.global_step in (0, self.warm_up):
            self.mark(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:  # noqa: ARG002
        """Called after each step."""
        if self.age() > self.limit:
            control.should_training_stop = True
        if control.should_training_stop or state.global_step == state.max_steps:
            self.mark(state.global_step)

    def mark(self, step: int) -> None:
        """Wait for the device, and note the time and the tokens."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append((step, self.age(), self.tokens()))

    def figures(self) -> dict[str, float | None]:
        """What was seen; speeds are over the steps after the warm-up, None where training ended before."""
        (first, began, before), (last, ended, after) = self.marks[-2:]
        warm = first == self.warm_up
        return {
            "steps": last,
            "steps in all": self.steps,
            "tokens": after,
            "seconds before the first step": round(self.marks[0][1], 1),
            "seconds a step": round((ended - began) / (last - first), 4) if warm else None,
            "tokens per second": round((after - before) / (ended - began), 1) if warm else None,
            "allocated GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "reserved GiB": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        }
