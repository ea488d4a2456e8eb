"""Scores of single answers, metrics of many rows, and their intervals."""

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from qlora.bootstrap import Bootstrap, Estimate, disjoint, interval_of_constant
from qlora.errors import UserError
from qlora.metrics import (
    METRICS,
    TASK_METRICS,
    available,
    columns_of,
    last_number,
    normalised,
    rouge_l,
    score_answer,
    statistic,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18", "18"),
        ("The answer is 2,200.", "2200"),
        ("200", "200"),
        ("$1,234,567.50 in all", "1234567.5"),
        ("3 boxes of 4 make 12", "12"),
        ("He has 9 <<16-3-4=9>>9 eggs.\n#### 18", "18"),
        ("#### 18\n\nQuestion: how many are 3 and 4?\n#### 7", "18"),
        ("#### -5", "-5"),
        ("so it is −5 degrees", "-5"),
        ("16-3", "3"),
        ("x = -3.50", "-3.5"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        ("1,2345", "2345"),
        (".5", "0.5"),
        ("v2", "2"),
        ("50%", "50"),
        ("19.", "19"),
        ("12 so far #### none", "12"),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(text: str, expected: str | None) -> None:
    assert last_number(text) == (None if expected is None else Decimal(expected))


@given(st.integers(-(10**12), 10**12))
def test_a_number_is_found_however_it_is_written(number: int) -> None:
    for text in (f"{number}", f"{number:,}", f"so {number:,}.", f"7 and\n#### {number:,}", f"{number}.00"):
        assert last_number(text) == number


def test_2200_is_not_200() -> None:
    assert score_answer("number", "#### 2,200", "It is 200", None, "") == {"number_match": 0.0}
    assert score_answer("number", "#### 2,200", "It is 2200.0", None, "") == {"number_match": 1.0}
    assert score_answer("number", "#### 2,200", "I do not know", None, "") == {"number_match": 0.0}


def test_scores_by_task() -> None:
    script = "CREATE TABLE t (a); INSERT INTO t VALUES (1), (2);"
    assert score_answer("sql", "SELECT a FROM t", "SELECT  a AS b FROM t", script, "") == {
        "execution_accuracy": 1.0,
        "exact_match": 0.0,
    }
    assert score_answer("label", "refund", " refund\n", None, "") == {
        "accuracy": 1.0,
        "reference": "refund",
        "answer": "refund",
    }
    assert score_answer("title", "a b c", "a c", None, "") == {"rouge_l": pytest.approx(0.8), "exact_match": 0.0}
    assert score_answer("text", "a", "a", None, "") == {"rouge_l": 1.0, "exact_match": 1.0}


def test_every_task_has_scores_for_all_of_its_metrics() -> None:
    for task, metrics in TASK_METRICS.items():
        text = "SELECT 1" if task == "sql" else "1"
        assert tuple(available(columns_of([score_answer(task, text, text, "", "")] * 2))) == metrics
        assert set(metrics) <= set(METRICS)


def test_references_that_cannot_be_scored_name_the_row() -> None:
    with pytest.raises(UserError, match="sql, row 3: a row of task sql needs a database"):
        score_answer("sql", "SELECT 1", "SELECT 1", None, "sql, row 3")
    with pytest.raises(UserError, match=r"maths, row 3: the reference .* has no number"):
        score_answer("number", "none", "1", None, "maths, row 3")


def test_normalisation_is_what_it_says() -> None:
    assert normalised("  a\t\n b\u00a0") == "a b"
    assert normalised("e\u0301") == "\u00e9"
    assert normalised("A.") != normalised("a")


@given(st.text(st.characters(max_codepoint=127, exclude_characters="_")), st.text(st.characters(max_codepoint=127)))
@settings(max_examples=50)
def test_rouge_is_the_packages_own_on_ascii(reference: str, answer: str) -> None:
    answer = answer.replace("_", " ")
    expected = rouge_scorer.RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert rouge_l(reference, answer) == expected


def test_rouge_keeps_letters_of_other_scripts() -> None:
    assert rouge_l("как дела", "как дела") == 1.0
    assert rouge_l("niño", "nino") == 0.0


def ones(n: int) -> np.ndarray:
    return np.ones((1, n))


def test_loss_is_weighted_by_tokens_and_perplexity_is_its_exponential() -> None:
    columns = columns_of([{"nll": 2.0, "tokens": 1}, {"nll": 4.0, "tokens": 9}])
    assert statistic("loss", columns, ones(2))[0] == pytest.approx(0.6)
    assert statistic("perplexity", columns, ones(2))[0] == pytest.approx(math.exp(0.6))
    assert available(columns) == ["loss", "perplexity"]


def plain_macro_f1(pairs: list[tuple[str, str]]) -> float:
    """By the definition, label by label, through precision and recall."""
    values = []
    for label in {reference for reference, _ in pairs}:
        hits = sum(pair == (label, label) for pair in pairs)
        given = sum(answer == label for _, answer in pairs)
        precision = hits / given if given else 0.0
        recall = hits / sum(reference == label for reference, _ in pairs)
        values.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(values) / len(values)


PAIRS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["a", "b", "c", "none"])), min_size=1, max_size=12)


@given(PAIRS, st.randoms(use_true_random=False))
def test_macro_f1_of_weighted_rows_is_that_of_repeated_rows(pairs: list[tuple[str, str]], random: Any) -> None:
    columns = columns_of([{"reference": reference, "answer": answer} for reference, answer in pairs])
    counts = [random.randint(0, 3) for _ in pairs]
    counts[0] += 1
    repeated = [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]
    values = statistic("macro_f1", columns, np.array([np.ones(len(pairs)), counts]))
    assert values == pytest.approx([plain_macro_f1(pairs), plain_macro_f1(repeated)])


def slow_interval(columns: Mapping[str, np.ndarray], metric: str, samples: int, seed: int) -> tuple[float, float]:
    """The bootstrap in plain steps: draw rows, compute the metric on them, take percentiles."""
    n = len(next(iter(columns.values())))
    generator = np.random.default_rng(seed)
    values = []
    for drawn in generator.integers(0, n, size=(samples, n)):
        resample = {name: column[drawn] for name, column in columns.items()}
        values.append(statistic(metric, resample, ones(n))[0])
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "loss", "perplexity", "stop_rate"])
def test_the_bootstrap_agrees_with_a_plain_one(metric: str) -> None:
    generator = np.random.default_rng(7)
    n = 40
    columns = {
        "reference": generator.choice(list("abc"), n),
        "answer": generator.choice(list("abc"), n),
        "stop_rate": generator.integers(0, 2, n).astype(float),
        "nll": generator.exponential(3.0, n),
        "tokens": generator.integers(1, 9, n),
    }
    columns["accuracy"] = (columns["reference"] == columns["answer"]).astype(float)
    estimate = Bootstrap(samples=200, seed=3).estimate(metric, columns)
    assert estimate.value == pytest.approx(statistic(metric, columns, ones(n))[0])
    assert (estimate.low, estimate.high) == pytest.approx(slow_interval(columns, metric, 200, 3))
    assert estimate.n == n
    assert estimate.low < estimate.value < estimate.high
    assert estimate == Bootstrap(samples=200, seed=3).estimate(metric, columns)
    assert estimate != Bootstrap(samples=200, seed=4).estimate(metric, columns)


def test_blocks_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"accuracy": np.array([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0])}
    whole = Bootstrap(samples=150).estimate("accuracy", columns)
    monkeypatch.setattr("qlora.bootstrap._BLOCK", 7 * 32)
    assert Bootstrap(samples=150).estimate("accuracy", columns) == whole


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    bootstrap = Bootstrap(samples=300)
    covered = 0
    for _ in range(400):
        estimate = bootstrap.estimate("accuracy", {"accuracy": (generator.random(80) < 0.7).astype(float)})
        covered += estimate.low <= 0.7 <= estimate.high
    assert 0.91 <= covered / 400 <= 0.98


def test_the_difference_is_paired() -> None:
    generator = np.random.default_rng(1)
    hard = generator.random(200)
    base = {"accuracy": (hard < 0.5).astype(float)}
    tuned = {"accuracy": (hard < 0.6).astype(float)}
    difference = Bootstrap().difference("accuracy", tuned, base)
    apart = [Bootstrap().estimate("accuracy", columns) for columns in (tuned, base)]
    assert difference.value == pytest.approx(apart[0].value - apart[1].value)
    assert difference.low > 0  # the same rows get better, though the two intervals overlap
    assert not disjoint(*apart)


def test_all_right_and_all_wrong_get_the_exact_bounds_of_clopper_and_pearson() -> None:
    for n in (1, 30, 500):
        wrong = Bootstrap().estimate("accuracy", {"accuracy": np.zeros(n)})
        right = Bootstrap().estimate("accuracy", {"accuracy": np.ones(n)})
        assert (wrong.value, wrong.low, right.value, right.high) == (0, 0, 1, 1)
        # The bound is the share at which all of n rows agree with a probability of 2.5%.
        assert (1 - wrong.high) ** n == pytest.approx(0.025)
        assert right.low**n == pytest.approx(0.025)
    assert Bootstrap().estimate("accuracy", {"accuracy": np.zeros(100)}).high == pytest.approx(0.0362, abs=1e-4)


def test_a_constant_difference_has_an_interval_too() -> None:
    n = 100
    gain = Bootstrap().difference("accuracy", {"accuracy": np.ones(n)}, {"accuracy": np.zeros(n)})
    none = Bootstrap().difference("accuracy", {"accuracy": np.ones(n)}, {"accuracy": np.ones(n)})
    assert (gain.value, gain.high) == (1, 1)
    assert 0.9 < gain.low < 1
    assert none.value == 0
    assert none.low == pytest.approx(-none.high)
    assert none.high > 0.03


@given(st.floats(0, 1), st.integers(1, 1000), st.floats(0.5, 0.999))
def test_the_interval_of_a_constant_holds_it_and_stays_in_bounds(value: float, n: int, level: float) -> None:
    low, high = interval_of_constant(value, n, level)
    assert -1e-12 <= low <= value + 1e-12
    assert value - 1e-12 <= high <= 1 + 1e-12


def test_disjoint_is_symmetric_and_touching_intervals_are_not() -> None:
    low, high = Estimate(0.1, 0.0, 0.2, 9), Estimate(0.5, 0.3, 0.7, 9)
    assert disjoint(low, high)
    assert disjoint(high, low)
    assert not disjoint(low, Estimate(0.3, 0.2, 0.4, 9))
    assert not disjoint(high, high)
