"""Loss curves as points of a drawing that is 100 wide and 100 high, with round numbers along its edges."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from qlora.results import read_table

MOST_POINTS = 300  # of a curve; more are no wider than a pixel

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """Round numbers from the first to the last tick, which are the ends of the axis."""

    ticks: list[float]

    def place(self, value: float) -> float:
        """Where on the axis a value lies, from 0 to 100."""
        return 100 * (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])

    def labels(self) -> list[tuple[str, float]]:
        """The text of each tick and where it stands."""
        return [(f"{tick:,.10g}", self.place(tick)) for tick in self.ticks]


@dataclass(frozen=True)
class Curve:
    """The loss of one run while it trained: per logged step, and on the validation rows."""

    run: str
    training: Points
    validation: Points


def round_axis(high: float, low: float = 0.0) -> Axis:
    """At most five steps of 1, 2 or 5 × 10^k that span `low` to `high`."""
    rough = max(high - low, 1e-9) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis([step * number for number in range(first, max(last, first + 1) + 1)])


def read_curve(run: str, path: Path) -> Curve:
    """The curves in a training_log.csv, whose cells are empty where a row has no such value."""
    table = read_table(path)
    training = [(float(row["step"]), float(row["loss"])) for row in table if row["loss"]]
    validation = [(float(row["step"]), float(row["eval_loss"])) for row in table if row["eval_loss"]]
    return Curve(run, thinned(training), thinned(validation))


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points, each the mean of as many neighbours; all of them where they are few."""
    if len(points) <= most:
        return points
    edges = [round(place * len(points) / most) for place in range(most + 1)]
    groups = [points[start:end] for start, end in pairwise(edges)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def axes_of(curves: Sequence[Curve]) -> tuple[Axis, Axis]:
    """One pair of axes, steps and loss, for all curves, so that they can be compared."""
    points = [point for curve in curves for point in (*curve.training, *curve.validation)]
    return (
        round_axis(max((x for x, _ in points), default=1.0)),
        round_axis(max((y for _, y in points if math.isfinite(y)), default=1.0)),
    )


def placed(points: Points, horizontal: Axis, vertical: Axis) -> Points:
    """Points in the drawing, whose y grows downwards; what is no number is left out."""
    return [(round(horizontal.place(x), 2), round(100 - vertical.place(y), 2)) for x, y in points if math.isfinite(y)]
