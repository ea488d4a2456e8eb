"""How one answer is scored, and how the scores of many rows become the value of a metric.

Rows are scored once; a metric is a function of weighted rows, so that its bootstrap is a matrix product.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora.errors import UserError
from qlora.sqlite import same_result

Scores = dict[str, float | str]
Columns = Mapping[str, NDArray[Any]]

# Metrics by task; the first is the primary one.
TASK_METRICS: dict[str, tuple[str, ...]] = {
    "sql": ("execution_accuracy", "exact_match"),
    "label": ("accuracy", "macro_f1"),
    "title": ("rouge_l", "exact_match"),
    "number": ("number_match",),
    "text": ("rouge_l", "exact_match"),
}
# All metrics in the order of tables: of those that a dataset has, the first is its primary one.
METRICS = (
    *("execution_accuracy", "accuracy", "rouge_l", "number_match", "exact_match", "macro_f1"),
    *("loss", "perplexity", "stop_rate"),
)
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})
# The scores of a row that a metric is made of, where that is not one score of its own name.
_PARTS = {"loss": ("nll", "tokens"), "perplexity": ("nll", "tokens"), "macro_f1": ("reference", "answer")}

# A minus is a sign where no digit, letter or bracket stands before it: "5-3" holds 5 and 3.
_NUMBER = re.compile(r"(?:(?<![\w)\]])[-−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+")
_FINAL_ANSWER = "####"


def score_answer(task: str, reference: str, answer: str, database: str | None, where: str) -> Scores:
    """The scores of one answer, by name: numbers from 0 to 1, and for labels the two texts that macro F1 needs.

    Raises UserError, naming the row `where`, when the reference itself cannot be scored.
    """
    exact = float(normalised(reference) == normalised(answer))
    if task == "sql":
        if database is None:
            raise UserError(f"{where}: a row of task sql needs a database; give 'database' in the dataset's config")
        executed = float(same_result(reference, answer, database, where))
        return {"execution_accuracy": executed, "exact_match": exact}
    if task == "label":
        return {"accuracy": exact, "reference": normalised(reference), "answer": normalised(answer)}
    if task == "number":
        wanted = last_number(reference)
        if wanted is None:
            raise UserError(f"{where}: the reference of a row of task number has no number: {reference!r}")
        return {"number_match": float(last_number(answer) == wanted)}
    return {"rouge_l": rouge_l(reference, answer), "exact_match": exact}


def normalised(text: str) -> str:
    """Unicode NFC, each run of white space one space, none at the ends. Case and punctuation count."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def rouge_l(reference: str, answer: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, ROUGE), by the rouge-score package."""
    return float(_rouge().score(reference, answer)["rougeL"].fmeasure)


@cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer, tokenizers  # half a second, for texts alone

    class Words(tokenizers.Tokenizer):  # type: ignore[misc]
        """Letters and digits of any script; on ASCII the package's own, which drops every other letter."""

        def tokenize(self, text: str) -> list[str]:
            return re.findall(r"[^\W_]+", text.lower())

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())


def last_number(text: str) -> Decimal | None:
    """The answer in a text: the number behind the first `####`, or else its last number; None without one.

    Commas between groups of three digits are thousands separators.
    """
    before, marker, behind = text.partition(_FINAL_ANSWER)
    numbers = _NUMBER.findall(behind)[:1] if marker else []
    numbers = numbers or _NUMBER.findall(before)[-1:]
    return Decimal(numbers[0].replace(",", "").replace("−", "-")) if numbers else None


def columns_of(scores: Sequence[Scores]) -> dict[str, NDArray[Any]]:
    """Rows of scores as an array a score, in the order of the rows."""
    return {name: np.array([row[name] for row in scores]) for name in scores[0]}


def available(columns: Columns) -> list[str]:
    """The metrics that these scores give, in the order of METRICS."""
    return [metric for metric in METRICS if all(part in columns for part in _PARTS.get(metric, (metric,)))]


def statistic(metric: str, columns: Columns, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values of a metric on weighted rows: weights (samples, rows) → (samples,).

    loss is per token, in nats: the sum of the rows' losses over the sum of their tokens; perplexity is its exponential.
    macro_f1 is the mean F1 over the labels among the weighted references. All others are means over rows.
    """
    if metric == "loss":
        return (weights @ columns["nll"]) / (weights @ columns["tokens"])
    if metric == "perplexity":
        return np.exp(statistic("loss", columns, weights))
    if metric == "macro_f1":
        return _macro_f1(columns["reference"], columns["answer"], weights)
    return (weights @ columns[metric]) / weights.sum(axis=1)


def _macro_f1(
    references: NDArray[np.str_], answers: NDArray[np.str_], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """F1 of a label is 2 × hits / (references + answers with it); an answer that is no label is just a miss."""
    labels = np.unique(references)
    is_reference = (references[:, None] == labels).astype(float)
    is_answer = (answers[:, None] == labels).astype(float)
    occurs = weights @ is_reference
    hits = weights @ (is_reference * is_answer)
    f1 = 2 * hits / np.maximum(occurs + weights @ is_answer, 1)
    return f1.sum(axis=1, where=occurs > 0) / (occurs > 0).sum(axis=1)
