"""Which label was answered in place of which: a confusion matrix of each base and run on each dataset of labels."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.files import read_jsonl

MOST_LABELS = 20  # rows and columns of a matrix that is still read at a glance
ANOTHER, NONE = "another label", "no label"  # heads of the last columns


@dataclass(frozen=True)
class Confusion:
    """The answers of one subject to the test rows of one dataset, in one suite.

    `rows`: true label → number of answers under each of `columns`, which are those labels, ANOTHER where labels are
    left out, and NONE for an answer that is no label of the test set. `left_out` labels have the fewest wrong answers.
    """

    suite: str
    dataset: str
    name: str  # of the run, or of the base model
    subject: str
    columns: list[str]
    rows: dict[str, list[int]]
    left_out: int


def confusions_of(scores: Sequence[Path], most: int = MOST_LABELS) -> Iterator[Confusion]:
    """The confusion matrices of the files {suite}/{base,tuned}/{name}.scores.jsonl; none of one without labels."""
    for path in scores:
        suite, subject, name = path.parent.parent.name, path.parent.name, path.name.removesuffix(".scores.jsonl")
        pairs: dict[str, Counter[tuple[str, str]]] = {}
        for row in read_jsonl(path):
            if row["subject"] == subject and "reference" in row["scores"]:
                counts = pairs.setdefault(row["dataset"], Counter())
                counts[row["scores"]["reference"], row["scores"]["answer"]] += 1
        for dataset, counts in pairs.items():
            yield Confusion(suite, dataset, name, subject, *matrix_of(counts, most))


def matrix_of(counts: Counter[tuple[str, str]], most: int) -> tuple[list[str], dict[str, list[int]], int]:
    """Columns, rows and the number of left out labels of a Confusion, from how often each (reference, answer) occurs.

    At most `most` labels are shown, in the order of the alphabet: those with the most wrong answers.
    """
    wrong: Counter[str] = Counter()
    for (reference, answer), count in counts.items():
        wrong[reference] += count * (reference != answer)
    shown = sorted(sorted(wrong, key=lambda label: (-wrong[label], label))[:most])
    left_out = len(wrong) - len(shown)
    others = [ANOTHER] if left_out else []
    places = {label: place for place, label in enumerate(shown)}
    rows = {label: [0] * (len(shown) + len(others) + 1) for label in shown}
    for (reference, answer), count in counts.items():
        if reference in rows:
            rows[reference][places.get(answer, len(shown) if answer in wrong else -1)] += count
    return [*shown, *others, NONE], rows, left_out
