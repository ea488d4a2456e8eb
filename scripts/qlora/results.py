"""The tables of results: their columns, and one way to write a number, so that equal results are equal bytes."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora.files import replacing

Record = dict[str, str]

IDENTITY = ("run", "model", "mixture", "recipe", "seed")
METRIC_COLUMNS = (*IDENTITY, "subject", "suite", "dataset", "slice", "metric", "value", "ci_low", "ci_high", "n")
COMPARISON_COLUMNS = (
    *(*IDENTITY, "baseline", "suite", "dataset", "slice", "metric"),
    *("difference", "ci_low", "ci_high", "n", "disjoint"),
)
WHOLE = "all"  # the slice that is the whole test set


def slices_of(row: Mapping[str, Any]) -> list[str]:
    """The slices that a test row counts in: the whole test set, and its own where it has one."""
    return [WHOLE, row["slice"]] if row["slice"] else [WHOLE]


def number(value: float) -> str:
    """Six significant digits, without padding."""
    return f"{value:.6g}"


def read_table(path: Path) -> list[Record]:
    """The rows of a CSV file as text."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a CSV file with these columns, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
