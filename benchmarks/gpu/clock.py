"""Tokens and seconds between the end of the warm-up and the last step, whoever trains."""

import statistics
import time
from typing import Any

import torch


class Clock:
    """Steps before `warm_up` are not counted; those after it, to the last, `steps`, are `repeats` of as many each."""

    def __init__(self, warm_up: int, steps: int, repeats: int = 1) -> None:
        self.each = (steps - warm_up) // repeats
        if self.each < 1 or warm_up + repeats * self.each != steps:
            raise ValueError(f"{steps - warm_up} steps after the warm-up are not {repeats} times as many")
        self.steps = steps
        self.bounds = range(warm_up, steps + 1, self.each)
        self.marks: list[float] = []
        self.times: list[float] = []  # of Unix, by which another process knows when that was
        self.started = time.monotonic()

    def at(self, step: int) -> None:
        """Take the time where `step` begins or ends a repeat."""
        if step in self.bounds:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append(time.monotonic())
            self.times.append(time.time())

    def result(self, counts: list[torch.Tensor]) -> dict[str, float | list[float]]:
        """The figures, given the tokens of each step, warm-up included; those of all repeats are lists."""
        seconds = [ended - began for began, ended in zip(self.marks, self.marks[1:], strict=False)]
        tokens = [sum(int(count.sum()) for count in counts[first : first + self.each]) for first in self.bounds[:-1]]
        speeds = [count / passed for count, passed in zip(tokens, seconds, strict=True)]
        return {
            "tokens per second": round(statistics.median(speeds), 1),
            "seconds a step": round(statistics.median(seconds) / self.each, 5),
            "repeats": [round(speed, 1) for speed in speeds],
            "timed": [round(self.times[0], 2), round(self.times[-1], 2)],
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
