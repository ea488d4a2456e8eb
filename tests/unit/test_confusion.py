"""The confusion matrix: every answer is counted once, and what is left out is said."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from qlora.confusion import ANOTHER, NONE, matrix_of

LABELS = st.sampled_from("abcdef")
ANSWERS = st.sampled_from(["a", "b", "c", "d", "e", "f", "", "a b"])


def test_the_matrix_of_three_labels() -> None:
    counts = Counter({("card", "card"): 3, ("card", "cash"): 2, ("cash", "cash"): 4, ("loan", "a loan"): 1})
    columns, rows, left_out = matrix_of(counts, 20)
    assert columns == ["card", "cash", "loan", NONE]
    assert rows == {"card": [3, 2, 0, 0], "cash": [0, 4, 0, 0], "loan": [0, 0, 0, 1]}
    assert left_out == 0


def test_of_many_labels_those_with_the_most_wrong_answers_are_shown() -> None:
    counts = Counter({("a", "a"): 9, ("b", "a"): 1, ("c", "b"): 2, ("c", "c"): 1, ("d", "?"): 2})
    columns, rows, left_out = matrix_of(counts, 2)
    assert columns == ["c", "d", ANOTHER, NONE]
    assert rows == {"c": [1, 0, 2, 0], "d": [0, 0, 0, 2]}
    assert left_out == 2


def test_a_label_may_be_called_no_label() -> None:
    columns, rows, _ = matrix_of(Counter({(NONE, NONE): 2, (NONE, "?"): 1}), 20)
    assert (columns, rows) == ([NONE, NONE], {NONE: [2, 1]})


@given(st.lists(st.tuples(LABELS, ANSWERS), min_size=1), st.integers(1, 6))
def test_each_shown_row_counts_its_answers(pairs: list[tuple[str, str]], most: int) -> None:
    columns, rows, left_out = matrix_of(Counter(pairs), most)
    references = [reference for reference, _ in pairs]
    assert len(rows) == min(most, len(set(references)))
    assert len(rows) + left_out == len(set(references))
    for place, (label, counts) in enumerate(rows.items()):
        assert sum(counts) == references.count(label)
        assert counts[place] == pairs.count((label, label))
        assert counts[-1] == sum(reference == label and answer not in references for reference, answer in pairs)
    assert len(columns) == len(rows) + 1 + (left_out > 0)
