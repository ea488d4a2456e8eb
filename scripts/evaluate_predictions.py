"""Score the predictions of one base model or one run against the references, with intervals."""

from qlora.stage import run_stage

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.bootstrap import Bootstrap
from qlora.errors import UserError
from qlora.files import read_jsonl, write_jsonl
from qlora.metrics import available, columns_of, score_answer
from qlora.results import METRIC_COLUMNS, WHOLE, number, slices_of, write_table

Row = dict[str, Any]


def evaluate_predictions(
    predictions: Path,
    folders: list[Path],
    metrics: Path,
    scores: Path,
    datasets: dict[str, dict[str, str]],
    suite: str,
    model: str,
    bootstrap: dict[str, Any],
    baselines: list[str] | None = None,
    run: str = "",
    mixture: str = "",
    recipe: str = "",
    seed: int | str = "",
) -> None:
    """Score one file of predictions and write its metrics.

    predictions: JSONL, a row for each subject in it (base and few_shot, or tuned) and test row.
    folders: the formatted `datasets`, in their order; their training rows are read for the trivial baseline alone.
    metrics: table to write, a row for each subject, dataset, slice and metric.
    scores: JSONL to write, the scores of each subject and test row.
    datasets: name → {task, trivial}; trivial is majority or first_words.
    baselines: few_shot and trivial, as far as they are asked for; none for a run.
    bootstrap: samples, seed and level of the intervals.
    run, mixture, recipe, seed: what was tuned; empty for a base model.
    Raises UserError where a test row has no prediction or more than one, or a reference cannot be scored.
    """
    baselines = baselines or []
    rows = {name: _rows_by_id(name, folder / "test.jsonl") for name, folder in zip(datasets, folders, strict=True)}
    subjects = ["tuned"] if run else ["base", *(["few_shot"] if "few_shot" in baselines else [])]
    answers = _complete(predictions, list(read_jsonl(predictions)), subjects, rows)
    if "trivial" in baselines:
        for (name, dataset), folder in zip(datasets.items(), folders, strict=True):
            train = list(read_jsonl(folder / "train.jsonl"))
            answers += trivial_answers(name, dataset["trivial"], rows[name].values(), train)
    scored = [
        scored_row(answer, rows[answer["dataset"]][answer["id"]], datasets[answer["dataset"]]["task"])
        for answer in answers
    ]
    identity = {"run": run, "model": model, "mixture": mixture, "recipe": recipe, "seed": seed, "suite": suite}
    write_jsonl(scores, scored)
    records = [{**identity, **record} for record in metrics_of(scored, Bootstrap(**bootstrap))]
    write_table(metrics, METRIC_COLUMNS, records)


def _rows_by_id(dataset: str, path: Path) -> dict[str, Row]:
    """The test rows of a dataset by their ids. Raises UserError for what makes its metrics meaningless."""
    rows: dict[str, Row] = {}
    for row in read_jsonl(path):
        if row["id"] in rows:
            raise UserError(
                f"{path}: the id '{row['id']}' stands twice; ids must tell the test rows of a dataset apart"
            )
        if row["slice"] == WHOLE:
            raise UserError(
                f"{path}, row '{row['id']}': '{WHOLE}' names the whole test set; give the slice another name"
            )
        rows[row["id"]] = row
    if not rows:
        raise UserError(f"{path}: no test rows; give dataset '{dataset}' a test file or a larger holdout.test")
    return rows


def _complete(
    path: Path, answers: list[Row], subjects: Sequence[str], rows: Mapping[str, Mapping[str, Row]]
) -> list[Row]:
    """`answers` by subject, dataset and test row; raises UserError unless there is exactly one for each."""
    wanted = [(subject, name, id_) for subject in subjects for name in rows for id_ in rows[name]]
    given = Counter((answer["subject"], answer["dataset"], answer["id"]) for answer in answers)
    for subject, dataset, id_ in wanted:
        if given[subject, dataset, id_] != 1:
            what = "no prediction" if not given[subject, dataset, id_] else "more than one prediction"
            raise UserError(f"{path}: {what} of {subject} for {dataset}, row '{id_}'; delete the file to make it anew")
    strangers = set(given) - set(wanted)
    if strangers:
        subject, dataset, id_ = min(strangers)
        raise UserError(
            f"{path}: a prediction of {subject} for {dataset}, row '{id_}', which is not asked for; "
            "delete the file to make it anew"
        )
    places = {key: place for place, key in enumerate(wanted)}
    return sorted(answers, key=lambda answer: places[answer["subject"], answer["dataset"], answer["id"]])


def trivial_answers(dataset: str, kind: str, rows: Iterable[Row], train: Sequence[Row]) -> list[Row]:
    """What someone would answer who learned one number or one string from the training rows.

    majority: the most frequent training completion (of equally frequent ones the first in the alphabet).
    first_words: the first words of the user's text, as many as the median training completion has.
    Raises UserError without training rows.
    """
    if not train:
        raise UserError(f"dataset '{dataset}': the trivial baseline needs training rows, and there are none")
    completions = [completion_of(row) for row in train]
    if kind == "majority":
        counts = Counter(completions)
        most_frequent = min(counts, key=lambda text: (-counts[text], text))
        return [_trivial(dataset, row, most_frequent) for row in rows]
    length = statistics.median_high([len(completion.split()) for completion in completions])
    return [_trivial(dataset, row, " ".join(question_of(row).split()[:length])) for row in rows]


def _trivial(dataset: str, row: Row, text: str) -> Row:
    return {"subject": "trivial", "dataset": dataset, "id": row["id"], "generated": text}


def completion_of(row: Row) -> str:
    """The reference: the last supervised message."""
    return str(next(message["content"] for message in reversed(row["messages"]) if message["supervised"]))


def question_of(row: Row) -> str:
    """The user's text that the reference answers: the last message of the user."""
    return str(next(message["content"] for message in reversed(row["messages"]) if message["role"] == "user"))


def scored_row(answer: Row, row: Row, task: str) -> Row:
    """One line of scores.jsonl: all that the metrics need of an answer."""
    where = f"{answer['dataset']}, row '{row['id']}'"
    scores = score_answer(task, completion_of(row), answer["generated"], row.get("database"), where)
    if "stopped" in answer:
        scores["stop_rate"] = float(answer["stopped"])
    if answer.get("nll") is not None:
        scores |= {"nll": answer["nll"], "tokens": answer["tokens"]}
    identity = {"subject": answer["subject"], "dataset": answer["dataset"], "slice": row["slice"], "id": row["id"]}
    return {**identity, "scores": scores}


def metrics_of(scored: Sequence[Row], bootstrap: Bootstrap) -> Iterator[Row]:
    """A record for each subject, dataset, slice (the whole test set first) and metric."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in scored:
        for part in slices_of(row):
            groups.setdefault((row["subject"], row["dataset"], part), []).append(row["scores"])
    for (subject, dataset, part), scores in groups.items():
        columns = columns_of(scores)
        for metric in available(columns):
            value, low, high, n = bootstrap.estimate(metric, columns)
            yield {
                **{"subject": subject, "dataset": dataset, "slice": part, "metric": metric},
                **{"value": number(value), "ci_low": number(low), "ci_high": number(high), "n": n},
            }


if __name__ == "__main__":
    run_stage(evaluate_predictions)
