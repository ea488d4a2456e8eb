"""The joint tables: all metrics, the same nested, and the differences between runs and their baselines."""

import json
import shutil
from pathlib import Path

import pytest
from synthetic import BOOTSTRAP, SUITE, make_results

from collect_metrics import collect_metrics
from qlora.errors import UserError
from qlora.results import COMPARISON_COLUMNS, METRIC_COLUMNS, read_table

PARTS = ("base/tiny-llama", "tuned/tiny-llama-s1", "base/tiny-mistral", "tuned/tiny-mistral-s1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    make_results(root)
    return root


def collect(root: Path, parts: tuple[str, ...], to: Path) -> None:
    folder = root / "metrics" / SUITE
    tables = [folder / f"{part}.csv" for part in parts]
    scores = [folder / f"{part}.scores.jsonl" for part in parts]
    logs = sorted(root.glob("runs/*/training_log.csv"))
    made = [to / name for name in ("metrics.csv", "metrics.json", "comparison.csv")]
    collect_metrics(tables, scores, *made, logs, to / "training_log.csv", {SUITE: BOOTSTRAP})


def test_every_row_of_the_parts_is_in_the_table_once(root: Path) -> None:
    joined = read_table(root / "metrics.csv")
    parts = [row for part in PARTS for row in read_table(root / "metrics" / SUITE / f"{part}.csv")]
    assert sorted(map(str, joined)) == sorted(map(str, parts))
    assert tuple(joined[0]) == METRIC_COLUMNS
    keys = [tuple(row[key] for key in METRIC_COLUMNS[:-4]) for row in joined]
    assert len(keys) == len(set(keys))


def test_the_training_logs_are_one_table_with_a_column_for_the_run(root: Path) -> None:
    joined = read_table(root / "training_log.csv")
    logs = {path.parent.name: read_table(path) for path in root.glob("runs/*/training_log.csv")}
    assert logs
    assert joined == [{"run": run, **row} for run in sorted(logs) for row in logs[run]]


def test_a_run_too_short_to_log_a_row_leaves_an_empty_log(root: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(root, copied)
    for log in copied.glob("runs/*/training_log.csv"):
        log.write_text(log.read_text().splitlines()[0] + "\n")
    collect(copied, PARTS, tmp_path)
    assert read_table(tmp_path / "training_log.csv") == []
    assert (tmp_path / "training_log.csv").read_text().startswith("run,step,")


def test_rows_stand_in_the_order_of_the_config(root: Path) -> None:
    joined = read_table(root / "metrics.csv")
    assert list(dict.fromkeys(row["dataset"] for row in joined)) == ["sql", "messages", "titles"]
    one = [row for row in joined if row["dataset"] == "sql" and row["model"] == "tiny-llama"]
    assert list(dict.fromkeys(row["subject"] for row in one)) == ["base", "few_shot", "trivial", "tuned"]
    assert list(dict.fromkeys(row["slice"] for row in one)) == [
        "all",
        "unseen values",
        "unseen wordings",
        "unseen tables",
    ]


def test_the_nested_values_are_those_of_the_table(root: Path) -> None:
    nested = json.loads((root / "metrics.json").read_text(encoding="utf-8"))
    assert set(nested) == {
        *("tiny-llama-s1", "tiny-mistral-s1"),
        *(
            f"{model} ({subject})"
            for model in ("tiny-llama", "tiny-mistral")
            for subject in ("base", "few_shot", "trivial")
        ),
    }
    for row in read_table(root / "metrics.csv"):
        name = row["run"] or f"{row['model']} ({row['subject']})"
        assert nested[name][SUITE][row["dataset"]][row["slice"]][row["metric"]] == float(row["value"])


def test_the_comparison_is_the_difference_of_the_values(root: Path) -> None:
    values = {
        (row["model"], row["subject"], row["dataset"], row["slice"], row["metric"]): row
        for row in read_table(root / "metrics.csv")
    }
    comparison = read_table(root / "comparison.csv")
    assert tuple(comparison[0]) == COMPARISON_COLUMNS
    for row in comparison:
        place = (row["dataset"], row["slice"], row["metric"])
        tuned = values[row["model"], "tuned", *place]
        other = values[row["model"], row["baseline"], *place]
        difference = float(tuned["value"]) - float(other["value"])
        assert float(row["difference"]) == pytest.approx(difference, abs=1e-4 * (1 + abs(float(other["value"]))))
        assert float(row["ci_low"]) <= float(row["difference"]) <= float(row["ci_high"])
        assert row["n"] == tuned["n"] == other["n"]
        apart = float(tuned["ci_low"]) > float(other["ci_high"]) or float(tuned["ci_high"]) < float(other["ci_low"])
        assert row["disjoint"] == str(apart).lower()
    assert {row["baseline"] for row in comparison} == {"base", "few_shot", "trivial"}
    assert {row["metric"] for row in comparison if row["baseline"] == "trivial"} == {
        *("execution_accuracy", "exact_match", "accuracy", "macro_f1", "rouge_l")
    }
    assert {row["disjoint"] for row in comparison} == {"true", "false"}


def test_a_second_time_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    collect(root, PARTS, tmp_path)
    for name in ("metrics.csv", "metrics.json", "comparison.csv"):
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes()


def test_the_comparison_does_not_depend_on_where_the_base_stands(root: Path, tmp_path: Path) -> None:
    collect(root, (PARTS[1], PARTS[0], PARTS[2], PARTS[3]), tmp_path)
    assert (tmp_path / "comparison.csv").read_bytes() == (root / "comparison.csv").read_bytes()


def test_rows_are_paired_by_their_ids(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    for path in (copy / "metrics" / SUITE / "base").glob("*.jsonl"):
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[::-1]), encoding="utf-8")
    collect(copy, PARTS, tmp_path)
    assert (tmp_path / "comparison.csv").read_bytes() == (root / "comparison.csv").read_bytes()


def test_a_run_without_its_base_is_an_error(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run 'tiny-llama-s1': no metrics of its base model 'tiny-llama'"):
        collect(root, PARTS[1:], tmp_path)
    assert not list(tmp_path.iterdir())
