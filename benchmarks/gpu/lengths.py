"""Rows of random tokens as long as the rows of an experiment's run are."""

import json
import random
from pathlib import Path
from typing import Any

from qlora.render import IGNORED

LENGTHS = Path(__file__).with_name("lengths.json")
Rows = tuple[list[list[int]], list[list[int]]]  # ids, and labels


def measured(run: str) -> dict[str, Any]:
    """What measure_lengths.py found of a run: dataset → its number of rows, and 101 of their lengths in order."""
    return json.loads(LENGTHS.read_text(encoding="utf-8"))[run]


def drawn_rows(run: str, count: int, vocabulary: int, seed: int = 0) -> Rows:
    """`count` rows of random tokens, each as long as a row of the run may be, of which as many as there are learned.

    Datasets are drawn by their number of rows; between two of the lengths that are known, all are as likely.
    """
    draw = random.Random(seed)
    datasets = list(measured(run).values())
    sizes = [dataset["rows"] for dataset in datasets]
    rows, labels = [], []
    for dataset in draw.choices(datasets, sizes, k=count):
        place, (low, high) = draw.random(), _neighbours(draw, dataset["lengths"])
        length, learned = (round(one + place * (other - one)) for one, other in zip(low, high, strict=True))
        ids = draw.choices(range(3, vocabulary), k=length)
        rows.append(ids)
        labels.append([IGNORED] * (length - learned) + ids[length - learned :])
    return rows, labels


def _neighbours(draw: random.Random, lengths: list[list[int]]) -> tuple[list[int], list[int]]:
    first = draw.randrange(len(lengths) - 1)
    return lengths[first], lengths[first + 1]
