"""A plan of two groups, and lines as they are measured, for the tests of the benchmarks."""

from typing import Any

from plan import Group, Way
from run import Line

FIGURES = {
    "tokens per second": 1000.0,
    "seconds a step": 0.5,
    "allocated GiB": 5.0,
    "reserved GiB": 6.0,
    "gpu after": {"name": "NVIDIA H100 80GB HBM3"},
}
PAIR = Group("pair", "tiny", "full", (Way("ours", 4), Way("trl", 8)))
THREE = Group("three", "tiny", "mixed", (Way("ours", 4), Way("unsloth", 4), Way("notebook", 2)))


def line(way: str, stint: int, number: int, speed: float, **more: Any) -> Line:
    return {**FIGURES, "group": "pair", "way": way, "stint": stint, "round": number, "tokens per second": speed, **more}
