"""Rows over the longest length: dropped, cut or split, with nothing learned twice and nothing lost by a split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.overlong import fitted
from qlora.render import IGNORED, Tokens

X = IGNORED
TOKENS = Tokens([1, 10, 11, 12, 13, 20, 21, 2], [X] * 5 + [20, 21, 2], False, 1)
POLICIES = ("drop", "cut_prompt", "cut_completion", "split")


def learned(rows: list[Tokens]) -> list[int]:
    return [label for row in rows for label in row.labels if label != IGNORED]


@pytest.mark.parametrize("overlong", POLICIES)
def test_row_that_fits_is_left_alone(overlong):
    assert fitted(TOKENS, 8, overlong) == [TOKENS]


def test_dropped_row():
    assert fitted(TOKENS, 7, "drop") == []


def test_cut_prompt_keeps_the_bos_the_end_of_the_prompt_and_the_answer():
    assert fitted(TOKENS, 6, "cut_prompt") == [Tokens([1, 12, 13, 20, 21, 2], [X] * 3 + [20, 21, 2], False, 1)]
    assert fitted(TOKENS, 5, "cut_prompt") == [Tokens([1, 13, 20, 21, 2], [X] * 2 + [20, 21, 2], False, 1)]
    assert fitted(TOKENS, 4, "cut_prompt") == []


def test_cut_prompt_keeps_no_first_token_that_is_not_a_bos():
    without = Tokens(TOKENS.input_ids[1:], TOKENS.labels[1:], False)
    assert fitted(without, 5, "cut_prompt") == [Tokens([12, 13, 20, 21, 2], [X] * 2 + [20, 21, 2], False)]


def test_cut_completion_keeps_the_beginning_while_something_is_left_to_learn():
    assert fitted(TOKENS, 6, "cut_completion") == [Tokens([1, 10, 11, 12, 13, 20], [X] * 5 + [20], False, 1)]
    assert fitted(TOKENS, 5, "cut_completion") == []


def test_conversation_is_split_where_a_turn_begins():
    ids = [1, 10, 20, 2, 11, 21, 2, 12, 13, 22, 2, 14]
    labels = [X, X, 20, 2, X, 21, 2, X, X, 22, 2, X]
    assert fitted(Tokens(ids, labels, False, 1), 8, "split") == [
        Tokens([1, 10, 20, 2, 11, 21, 2], [X, X, 20, 2, X, 21, 2], False, 1),
        Tokens([1, 12, 13, 22, 2], [X, X, X, 22, 2], False, 1),
    ]


def test_long_answer_goes_on_behind_half_a_row_of_what_came_before():
    ids = [1, 10, 11, 20, 21, 22, 23, 24, 25, 26, 2]
    tokens = Tokens(ids, [X] * 3 + ids[3:], False, 1)
    assert fitted(tokens, 7, "split") == [
        Tokens([1, 10, 11, 20, 21, 22, 23], [X] * 3 + [20, 21, 22, 23], False, 1),
        Tokens([1, 21, 22, 23, 24, 25, 26], [X] * 4 + [24, 25, 26], False, 1),
        Tokens([1, 22, 23, 24, 25, 26, 2], [X] * 6 + [2], False, 1),
    ]


LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5)


@given(LENGTHS, st.integers(8, 40), st.booleans(), st.sampled_from(POLICIES))
def test_rows_fit_and_a_split_learns_each_token_once_behind_its_context(lengths, max_length, opens, overlong):
    labels = [X] * opens + [number for p, a in lengths for number in [X] * p + [0] * a]
    ids = list(range(100, 100 + len(labels)))
    labels = [label if label == X else token for label, token in zip(labels, ids, strict=True)]
    tokens = Tokens(ids, labels, False, int(opens))
    rows = fitted(tokens, max_length, overlong)
    for row in rows:
        assert len(row.input_ids) == len(row.labels) <= max_length
        assert row.supervised
        assert row.input_ids[: int(opens)] == ids[: int(opens)]
        rest = row.input_ids[int(opens) :]
        assert rest == list(range(rest[0], rest[0] + len(rest))), "what stands in a row stood together before"
        assert row.labels[0] == IGNORED, "the first token of a row is never predicted"
        assert all(label in (IGNORED, token) for label, token in zip(row.labels, row.input_ids, strict=True))
    if overlong == "split" or (overlong == "cut_prompt" and rows):
        assert learned(rows) == learned([tokens])


def test_split_writes_no_second_bos_where_a_turn_begins_with_its_own():
    ids = [1, 10, 20, 2, 1, 11, 21, 2, 1, 12, 22, 2]
    labels = [X, X, 20, 2, X, X, 21, 2, X, X, 22, 2]
    rows = fitted(Tokens(ids, labels, False, 1), 5, "split")
    assert [row.input_ids for row in rows] == [ids[:4], ids[4:8], ids[8:]]
    assert learned(rows) == [20, 2, 21, 2, 22, 2]
