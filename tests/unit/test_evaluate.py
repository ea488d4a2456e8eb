"""Evaluation of one file of predictions."""

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic import BOOTSTRAP, DATASETS, SUITE, make_datasets, make_predictions, message, write_jsonl

from evaluate_predictions import completion_of, evaluate_predictions, question_of, trivial_answers
from qlora.errors import UserError
from qlora.results import METRIC_COLUMNS, read_table


class Case:
    """A base model's predictions on the synthetic datasets, with whatever a test changes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tests = make_datasets(root, 6)
        self.predictions = make_predictions(root / "base.jsonl", ["base", "few_shot"], self.tests, 0)

    def evaluate(self, **changed: Any) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
        arguments: dict[str, Any] = {
            "predictions": self.predictions,
            "folders": [self.root / "datasets" / name for name in DATASETS],
            "metrics": self.root / "metrics.csv",
            "scores": self.root / "scores.jsonl",
            "datasets": DATASETS,
            "suite": SUITE,
            "model": "tiny",
            "baselines": ["few_shot", "trivial"],
            "bootstrap": BOOTSTRAP,
        }
        evaluate_predictions(**(arguments | changed))
        lines = (self.root / "scores.jsonl").read_text(encoding="utf-8").splitlines()
        return read_table(self.root / "metrics.csv"), [json.loads(line) for line in lines]

    def rewrite(self, change: Any) -> None:
        rows = [json.loads(line) for line in self.predictions.read_text(encoding="utf-8").splitlines()]
        write_jsonl(self.predictions, change(rows))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_a_base_has_its_own_metrics_and_those_of_its_baselines(case: Case) -> None:
    table, scores = case.evaluate()
    assert tuple(table[0]) == METRIC_COLUMNS
    assert {(row["run"], row["model"], row["seed"], row["suite"]) for row in table} == {("", "tiny", "", SUITE)}
    assert {row["subject"] for row in table} == {"base", "few_shot", "trivial"}
    metrics = {
        subject: [
            row["metric"] for row in table if (row["subject"], row["dataset"], row["slice"]) == (subject, "sql", "all")
        ]
        for subject in ("base", "few_shot", "trivial")
    }
    assert metrics == {
        "base": ["execution_accuracy", "exact_match", "loss", "perplexity", "stop_rate"],
        "few_shot": ["execution_accuracy", "exact_match", "stop_rate"],
        "trivial": ["execution_accuracy", "exact_match"],
    }
    slices = {row["slice"]: row["n"] for row in table if row["dataset"] == "sql"}
    assert slices == {"all": "18", "unseen values": "6", "unseen wordings": "6", "unseen tables": "6"}
    assert {row["slice"] for row in table if row["dataset"] == "titles"} == {"all"}
    assert len(scores) == 3 * (18 + 12 + 6)
    assert set(scores[0]) == {"subject", "dataset", "slice", "id", "scores"}


def test_values_are_those_of_the_rows(case: Case) -> None:
    table, scores = case.evaluate()
    of_base = [row["scores"] for row in scores if (row["subject"], row["dataset"]) == ("base", "sql")]
    by_hand = sum(row["nll"] for row in of_base) / sum(row["tokens"] for row in of_base)
    found = next(row for row in table if (row["subject"], row["metric"], row["slice"]) == ("base", "loss", "all"))
    assert float(found["value"]) == pytest.approx(by_hand, rel=1e-5)
    assert float(found["ci_low"]) < by_hand < float(found["ci_high"])
    stops = [row for row in table if (row["subject"], row["metric"]) == ("base", "stop_rate")]
    assert {row["value"] for row in stops} == {"0"}
    assert all(row["ci_low"] == "0" and float(row["ci_high"]) > 0 for row in stops)


def test_a_run_has_one_subject_and_its_identity(case: Case) -> None:
    make_predictions(case.predictions, ["tuned"], case.tests, 0)
    identity = {"run": "r", "mixture": "all", "recipe": "demo", "seed": 3}
    table, _ = case.evaluate(**identity, baselines=[])
    assert {row["subject"] for row in table} == {"tuned"}
    assert {tuple(row[key] for key in identity) for row in table} == {("r", "all", "demo", "3")}


def test_the_order_of_predictions_and_a_second_time_change_no_byte(case: Case) -> None:
    case.evaluate()
    before = [(case.root / name).read_bytes() for name in ("metrics.csv", "scores.jsonl")]
    case.rewrite(lambda rows: rows[::-1])
    case.evaluate()
    assert [(case.root / name).read_bytes() for name in ("metrics.csv", "scores.jsonl")] == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows[1:], r"base\.jsonl: no prediction of base for sql, row 'test\.jsonl:0'"),
        (lambda rows: [*rows, rows[0]], r"more than one prediction of base for sql, row 'test\.jsonl:0'"),
        (lambda rows: [*rows, rows[0] | {"id": "x"}], "a prediction of base for sql, row 'x', which is not asked for"),
        (lambda rows: [*rows, rows[0] | {"subject": "tuned"}], "a prediction of tuned for sql"),
        (lambda rows: [row for row in rows if row["subject"] == "base"], "no prediction of few_shot for sql"),
        (lambda _: [], "no prediction of base for sql"),
    ],
)
def test_every_test_row_has_exactly_one_prediction(case: Case, change: Any, expected: str) -> None:
    case.rewrite(change)
    with pytest.raises(UserError, match=expected):
        case.evaluate()
    assert not (case.root / "metrics.csv").exists()


def test_test_sets_that_mean_nothing_are_refused(case: Case) -> None:
    path = case.root / "datasets" / "sql" / "test.jsonl"
    rows = case.tests["sql"]
    for content, expected in (
        ([], "no test rows; give dataset 'sql' a test file"),
        ([*rows, rows[0]], "the id 'test.jsonl:0' stands twice"),
        ([rows[0] | {"slice": "all"}], "'all' names the whole test set"),
    ):
        write_jsonl(path, content)
        with pytest.raises(UserError, match=expected):
            case.evaluate()


def test_a_reference_that_fails_names_its_row(case: Case) -> None:
    broken = case.tests["sql"][0] | {"messages": [message("user", "?"), message("assistant", "SELECT nothing")]}
    write_jsonl(case.root / "datasets" / "sql" / "test.jsonl", [broken, *case.tests["sql"][1:]])
    with pytest.raises(UserError, match=r"sql, row 'test\.jsonl:0': the reference SQL fails"):
        case.evaluate()


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {"id": question, "slice": "", "messages": [message("user", question), message("assistant", answer)]}


def test_majority_answers_with_the_most_frequent_training_answer() -> None:
    train = [conversation(str(i), answer) for i, answer in enumerate(["c", "b", "b", "c", "a"])]
    answers = trivial_answers("d", "majority", [conversation("q", "a")], train)
    assert answers == [{"subject": "trivial", "dataset": "d", "id": "q", "generated": "b"}]


def test_first_words_takes_as_many_as_the_median_training_answer_has() -> None:
    train = [
        conversation(str(i), answer) for i, answer in enumerate(["one", "one two three", "one two three four five"])
    ]
    answers = trivial_answers("d", "first_words", [conversation("how do I  mix paint", "a")], train)
    assert [answer["generated"] for answer in answers] == ["how do I"]
    even = trivial_answers("d", "first_words", [conversation("how do I mix paint", "a")], train[:2])
    assert [answer["generated"] for answer in even] == ["how do I"]


def test_without_training_rows_there_is_no_trivial_baseline() -> None:
    with pytest.raises(UserError, match="dataset 'd': the trivial baseline needs training rows"):
        trivial_answers("d", "majority", [], [])


def test_of_many_turns_the_last_one_is_asked() -> None:
    row = {
        "messages": [
            message("system", "be brief"),
            *(message("user", "first"), message("assistant", "one")),
            *(message("user", "second"), message("assistant", "two")),
        ]
    }
    assert (question_of(row), completion_of(row)) == ("second", "two")
