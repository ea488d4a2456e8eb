"""Percentile intervals of the bootstrap over rows (Efron, Tibshirani 1993, An Introduction to the Bootstrap, ch. 13).

Rows of the test set are drawn with replacement; the metric is computed on each such resample; the interval spans the
middle share (`level`) of these values. It says how much the value would vary with other test rows of the same kind. It
says nothing about another training seed.

Where all resamples give one value, the bootstrap knows nothing. Of a score that lies between two bounds, the interval
is then the exact one of Clopper and Pearson (1934, Biometrika 26) for "all of n rows the same".
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlora.metrics import LOWER_IS_BETTER, Columns, statistic

_BLOCK = 2_000_000  # weights in memory at once


class Estimate(NamedTuple):
    """A value with its interval and the number of rows that it is from."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Bootstrap:
    """How many resamples, from which seed, and the coverage of the interval."""

    samples: int = 1000
    seed: int = 0
    level: float = 0.95

    def estimate(self, metric: str, columns: Columns) -> Estimate:
        """The metric on all rows, with its interval."""
        n = len(next(iter(columns.values())))
        values = np.concatenate([statistic(metric, columns, weights) for weights in self._weights(n)])
        return self._spanned(metric, values, n, lowest=0.0)

    def difference(self, metric: str, columns: Columns, baseline: Columns) -> Estimate:
        """The metric minus that of a baseline on the same rows in the same order, resampled in pairs."""
        n = len(next(iter(columns.values())))
        values = np.concatenate(
            [statistic(metric, columns, weights) - statistic(metric, baseline, weights) for weights in self._weights(n)]
        )
        return self._spanned(metric, values, n, lowest=-1.0)

    def _weights(self, n: int) -> Iterator[NDArray[np.float64]]:
        """How often each of n rows is taken, in blocks (samples, n); the very first sample takes each once."""
        yield np.ones((1, n))
        generator = np.random.default_rng(self.seed)
        block = max(1, _BLOCK // n)
        for start in range(0, self.samples, block):
            size = min(block, self.samples - start)
            drawn = generator.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
            yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(float)

    def _spanned(self, metric: str, values: NDArray[np.float64], n: int, lowest: float) -> Estimate:
        """The first of `values` with the interval that the others span; scores lie between `lowest` and 1."""
        value = float(values[0])
        tail = (1 - self.level) / 2
        if metric not in LOWER_IS_BETTER and np.ptp(values) < 1e-12:
            return Estimate(value, *interval_of_constant(value, n, self.level, lowest), n)
        low, high = np.quantile(values[1:], [tail, 1 - tail])
        return Estimate(value, float(low), float(high), n)


def interval_of_constant(value: float, n: int, level: float, lowest: float = 0.0) -> tuple[float, float]:
    """Bounds of a mean when each of n rows scored `value`, and any score lies between `lowest` and 1.

    With q the share of rows that score `value`, all n do so with probability q^n; so q is at least
    ((1 − level) / 2)^(1/n), and the others may score anything. For value 0 or 1 of a proportion these are Clopper and
    Pearson's bounds. (macro F1 is no mean over rows: there the bounds are those of the share of right rows.)
    """
    share = ((1 - level) / 2) ** (1 / n)
    return share * value + (1 - share) * lowest, share * value + (1 - share)


def disjoint(first: Estimate, second: Estimate) -> bool:
    """Whether two intervals have no point in common."""
    return first.low > second.high or first.high < second.low
