"""The published claim, tuned minus base on each slice, and whether another computation agrees with it."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qlora.findings import primary_metrics
from qlora.results import Record

PLACE = ("model", "mixture", "recipe", "suite", "dataset", "slice", "metric")
SPREAD_COLUMNS = (*PLACE, "seed", "difference")
# Two-sided 95% points of Student's distribution by its degrees of freedom (Student, 1908); the last stands for more.
STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Claim:
    """One run on one slice: tuned minus base in the primary metric, as published and as computed anew."""

    run: str
    dataset: str
    part: str
    metric: str
    n: int
    seeds: int
    published: float
    recomputed: float | None
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the two differ by no more than the tolerance; a value that was not recomputed does not agree."""
        return self.recomputed is not None and abs(self.recomputed - self.published) <= self.tolerance


def tolerance(half_width: float, seeds: Sequence[float]) -> float:
    """How far two computations of one difference may lie apart: √2 · √((t·s)² + h²).

    Both are estimates with the same two errors, independent of each other, so that the variance of what lies between
    them is twice that of one (the variance of a difference of independent variables is the sum of theirs). The errors:
    - another processor's rounding leads training elsewhere, at worst as far as another seed does. s is the standard
      deviation over `seeds`, t the 95% point of Student's distribution with one degree of freedom less than seeds,
      since s itself was estimated from few of them. With fewer than two seeds this part is left out.
    - which of the n rows are right. h is the longer arm of the published 95% interval (bootstrap over the n rows). The
      two computations share their rows, so that this is more than is needed.
    """
    spread = 0.0
    if len(seeds) > 1:
        spread = STUDENT_95[min(len(seeds) - 1, len(STUDENT_95)) - 1] * statistics.stdev(seeds)
    return math.sqrt(2) * math.hypot(spread, half_width)


def claimed(comparison: Iterable[Record]) -> list[Record]:
    """The rows of a comparison that are claims: tuned minus base, in the primary metric of each dataset."""
    against_base = [record for record in comparison if record["baseline"] == "base"]
    primary = primary_metrics(against_base)
    return [record for record in against_base if primary[record["suite"], record["dataset"]] == record["metric"]]


def checked_claims(published: Iterable[Record], recomputed: Iterable[Record], spread: Iterable[Record]) -> list[Claim]:
    """Each claim of one comparison held against another; `spread` has the differences by seed (SPREAD_COLUMNS)."""
    anew = {_key(record): float(record["difference"]) for record in recomputed if record["baseline"] == "base"}
    seeds: dict[tuple[str, ...], list[float]] = {}
    for record in spread:
        seeds.setdefault(_place(record), []).append(float(record["difference"]))
    return [_claim(record, anew.get(_key(record)), seeds.get(_place(record), [])) for record in claimed(published)]


def _claim(record: Record, recomputed: float | None, seeds: Sequence[float]) -> Claim:
    value, low, high = (float(record[key]) for key in ("difference", "ci_low", "ci_high"))
    return Claim(
        run=record["run"],
        dataset=record["dataset"],
        part=record["slice"],
        metric=record["metric"],
        n=int(record["n"]),
        seeds=len(seeds),
        published=value,
        recomputed=recomputed,
        tolerance=tolerance(max(high - value, value - low), seeds),
    )


def _place(record: Record) -> tuple[str, ...]:
    return tuple(record[key] for key in PLACE)


def _key(record: Record) -> tuple[str, ...]:
    return (record["run"], *_place(record))


def spread_over_seeds(comparison: Iterable[Record]) -> Iterator[Record]:
    """The claims of an experiment that repeats runs with other seeds, as rows of SPREAD_COLUMNS."""
    for record in claimed(comparison):
        yield {column: record[column] for column in SPREAD_COLUMNS}


def claim_lines(claims: Sequence[Claim]) -> list[str]:
    """The claims as the lines of a table."""
    head = ("run", "dataset", "slice", "metric", "n", "seeds", "published", "recomputed", "tolerance", "")
    rows = [
        (
            *(claim.run, claim.dataset, claim.part, claim.metric, str(claim.n), str(claim.seeds)),
            *(_signed(claim.published), _signed(claim.recomputed), f"{claim.tolerance:.3f}"),
            "agrees" if claim.agrees else "DISAGREES",
        )
        for claim in claims
    ]
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


def _signed(value: float | None) -> str:
    return "missing" if value is None else f"{value:+.3f}"
