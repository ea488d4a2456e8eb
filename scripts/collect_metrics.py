"""Join the metrics of all base models and runs, and compare each run with its base and the baselines."""

from qlora.stage import run_stage

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora.bootstrap import Bootstrap, disjoint
from qlora.errors import UserError
from qlora.files import read_jsonl, write_json
from qlora.findings import estimate_of
from qlora.metrics import Columns, available, columns_of
from qlora.results import (
    COMPARISON_COLUMNS,
    IDENTITY,
    METRIC_COLUMNS,
    Record,
    number,
    read_table,
    slices_of,
    write_table,
)

SUBJECTS = ("base", "few_shot", "trivial", "tuned")
# Scores of a subject on one part of a test set: (subject, dataset, slice) → its rows by id.
RowsById = dict[tuple[str, str, str], dict[str, Any]]


def collect_metrics(
    tables: list[Path],
    scores: list[Path],
    metrics: Path,
    nested: Path,
    comparison: Path,
    training_logs: list[Path],
    training_log: Path,
    bootstraps: dict[str, dict[str, Any]],
) -> None:
    """Write one table of all metrics, the same nested for `dvc metrics`, and the differences tuned − baseline.

    tables, scores: what evaluate_predictions wrote for each base model and run, in the same order.
    metrics, nested, comparison: results/metrics.csv, results/metrics.json and results/comparison.csv to write.
    training_logs, training_log: runs/{run}/training_log.csv of each run, and the same in one table for `dvc plots`.
    bootstraps: samples, seed and level of the intervals by suite.
    Raises UserError where a run has no base on the same suite to be compared with.
    """
    parts = [(read_table(table), path) for table, path in zip(tables, scores, strict=True)]
    records = in_order([record for table, _ in parts for record in table])
    bases = {(table[0]["model"], table[0]["suite"]): (table, path) for table, path in parts if not table[0]["run"]}
    differences: list[dict[str, object]] = []
    for table, path in parts:
        if table[0]["run"]:
            differences += _compared(table, path, bases, Bootstrap(**bootstraps[table[0]["suite"]]))
    write_table(metrics, METRIC_COLUMNS, records)
    write_json(nested, nested_values(records))
    write_table(comparison, COMPARISON_COLUMNS, differences)
    logged = [{"run": path.parent.name, **row} for path in training_logs for row in read_table(path)]
    write_table(training_log, ("run", *_columns(training_logs[0])), logged)  # a short run may have logged nothing


def _columns(table: Path) -> list[str]:
    with table.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file))


def in_order(records: Sequence[Record]) -> list[Record]:
    """Records by suite, dataset, model, subject, run, slice; each in the order in which it is first seen.

    That is the order of the config, which is its author's choice.
    """
    keys = ("suite", "dataset", "model", "subject", "run", "slice")
    seen = {key: list(dict.fromkeys(record[key] for record in records)) for key in keys}
    seen["subject"] = list(SUBJECTS)
    places = {key: {value: place for place, value in enumerate(values)} for key, values in seen.items()}
    return sorted(records, key=lambda record: [places[key][record[key]] for key in keys])


def nested_values(records: Sequence[Record]) -> dict[str, Any]:
    """Run, or subject and model of a baseline → suite → dataset → slice → metric → value."""
    tree: dict[str, Any] = {}
    for record in records:
        name = record["run"] or f"{record['model']} ({record['subject']})"
        leaf = tree.setdefault(name, {})
        for key in ("suite", "dataset", "slice"):
            leaf = leaf.setdefault(record[key], {})
        leaf[record["metric"]] = float(record["value"])
    return tree


def _compared(
    table: Sequence[Record], path: Path, bases: dict[tuple[str, str], tuple[list[Record], Path]], bootstrap: Bootstrap
) -> Iterator[dict[str, object]]:
    """The rows of the comparison of one run with the baselines of its model on its suite."""
    model, suite = table[0]["model"], table[0]["suite"]
    if (model, suite) not in bases:
        raise UserError(f"run '{table[0]['run']}': no metrics of its base model '{model}' on the suite '{suite}'")
    base_table, base_path = bases[model, suite]
    intervals = {_place(record): estimate_of(record) for record in [*table, *base_table]}
    rows = _rows_by_id(path) | _rows_by_id(base_path)
    identity = {key: table[0][key] for key in (*IDENTITY, "suite")}
    for (subject, dataset, part), tuned in rows.items():
        for baseline in SUBJECTS[:-1] if subject == "tuned" else ():
            if (baseline, dataset, part) not in rows:
                continue
            columns, other = _paired(tuned, rows[baseline, dataset, part])
            both = available(other)
            for metric in [metric for metric in available(columns) if metric in both]:
                apart = disjoint(*(intervals[name, dataset, part, metric] for name in (subject, baseline)))
                difference, low, high, n = bootstrap.difference(metric, columns, other)
                yield {
                    **identity,
                    **{"baseline": baseline, "dataset": dataset, "slice": part, "metric": metric},
                    **{"difference": number(difference), "ci_low": number(low), "ci_high": number(high), "n": n},
                    "disjoint": str(apart).lower(),
                }


def _place(record: Record) -> tuple[str, str, str, str]:
    return record["subject"], record["dataset"], record["slice"], record["metric"]


def _rows_by_id(path: Path) -> RowsById:
    """The scores of a file by subject, dataset and slice, the whole test set being a slice too."""
    rows: RowsById = {}
    for row in read_jsonl(path):
        for part in slices_of(row):
            rows.setdefault((row["subject"], row["dataset"], part), {})[row["id"]] = row["scores"]
    return rows


def _paired(tuned: dict[str, Any], baseline: dict[str, Any]) -> tuple[Columns, Columns]:
    """The scores of two subjects on the same rows in the same order."""
    return columns_of([tuned[id_] for id_ in tuned]), columns_of([baseline[id_] for id_ in tuned])


if __name__ == "__main__":
    run_stage(collect_metrics)
