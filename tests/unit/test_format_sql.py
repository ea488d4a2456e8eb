"""Datasets with databases: where a row finds its own, and which test rows can be scored on it at all."""

import sqlite3
from typing import Any

from test_format import SPLITS, folder_with, formatted, notes, put, refusal

SHOP = "CREATE TABLE paint (name TEXT, litres INTEGER); INSERT INTO paint VALUES ('red', 3);"
SQL_ROWS = {
    "runs": {"text": "How many?", "label": "SELECT COUNT(*) FROM paint", "db": SHOP},
    "another dialect": {"text": "When?", "label": "SELECT TOP 1 EXTRACT(YEAR FROM litres) FROM paint", "db": SHOP},
    "writes": {"text": "Sell it.", "label": "DELETE\nFROM paint", "db": SHOP},
    "a database of another dialect": {
        "text": "Which?",
        "label": "SELECT 1",
        "db": "CREATE TABLE t (kind ENUM('a', 'b') NOT NULL AUTO_INCREMENT);",
    },
}
AS_SQL: dict[str, Any] = {
    "task": "sql",
    "database": {"column": "db"},
    "files": {"train": "train.jsonl", "test": "test.jsonl"},
    "holdout": {"validation": 0},
}


def test_slice_and_database_columns(tmp_path):
    script = "CREATE TABLE t (x INTEGER); INSERT INTO t VALUES (1);"
    rows, card = formatted(
        put(
            tmp_path / "notes.jsonl",
            [
                {"text": "a", "label": "b", "part": "hard", "db": script},
                {"text": "c", "label": "d", "part": None, "db": script},
            ],
        ),
        slice="part",
        database={"column": "db"},
        holdout={"validation": 0, "test": 1},
    )
    assert [(row["slice"], row["database"]) for row in rows["test"]] == [("hard", script), ("", script)]
    assert card["slices"]["test"] == {"hard": 1, "all": 1}


def test_training_rows_need_no_database(tmp_path):
    source = folder_with(
        tmp_path / "source", train=notes(range(3)), test=[{**notes([9])[0], "db": "CREATE TABLE t (x);"}]
    )
    files = {"train": "train.jsonl", "test": "test.jsonl"}
    rows, _ = formatted(source, files=files, database={"column": "db"}, holdout={"validation": 0})
    assert [row.get("database") for row in rows["test"] + rows["train"]] == ["CREATE TABLE t (x);", None, None, None]


def test_database_file_is_copied_beside_the_rows(tmp_path):
    source = folder_with(tmp_path / "source", train=notes(range(30)))
    (source / "data").mkdir()
    with sqlite3.connect(source / "data" / "shop.db") as connection:
        connection.execute("CREATE TABLE t (x)")
    rows, _ = formatted(source, files={"train": "train.jsonl"}, database={"file": "data/shop.db"})
    place = tmp_path / "formatted" / "shop.db"
    assert {row["database"] for split in SPLITS for row in rows[split]} == {str(place)}
    assert place.read_bytes() == (source / "data" / "shop.db").read_bytes()


def test_test_rows_that_sqlite_cannot_score_are_counted_and_training_rows_stay(tmp_path):
    rows = list(SQL_ROWS.values())
    train = [{**row, "text": f"{row['text']} Say it."} for row in rows]
    source = folder_with(tmp_path / "source", train=train, test=rows)
    kept, card = formatted(source, **AS_SQL, unusable_rows="drop")
    assert [row["messages"][-1]["content"] for row in kept["test"]] == [SQL_ROWS["runs"]["label"]]
    assert card["dropped"]["test"] == {"its tables or its query fail in SQLite": 3}
    assert len(kept["train"]) == 4


def test_a_test_row_that_sqlite_cannot_score_is_refused_by_name(tmp_path):
    source = folder_with(tmp_path / "source", train=[SQL_ROWS["runs"]], test=[SQL_ROWS["writes"]])
    assert refusal(source, **AS_SQL) == (
        "test.jsonl:1: the reference SQL fails (not authorized): DELETE FROM paint;"
        " mend the row, or set datasets.notes.unusable_rows: drop"
    )


def test_references_are_run_on_a_database_file_too(tmp_path):
    source = folder_with(tmp_path / "source", train=[], test=[SQL_ROWS["runs"], SQL_ROWS["another dialect"]])
    with sqlite3.connect(source / "shop.db") as connection:
        connection.executescript(SHOP)
    settings = {"task": "sql", "database": {"file": "shop.db"}, "files": {"test": "test.jsonl"}}
    rows, _ = formatted(source, **settings, unusable_rows="drop")
    assert [row["database"] for row in rows["test"]] == [str(tmp_path / "formatted/shop.db")]
