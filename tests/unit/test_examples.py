"""The example data: what is committed is what the generator writes, and what is held out is held out."""

import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from random import Random
from types import ModuleType
from zlib import crc32

import pytest

from qlora import corpus

EXAMPLES = Path(__file__).parents[2] / "data" / "examples"
DATASETS = ("sql", "label", "title")
SPLITS = ("train", "validation", "test")
HELD_OUT = ("validation", "test")
MADE_UP = re.compile(r"\b[A-Z]{2}-\d{3}\b|\b\d{2,4}\b")


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    """The generator's modules, by name."""
    import importlib

    sys.path.insert(0, str(EXAMPLES))
    try:
        return {
            name: importlib.import_module(name)
            for name in ("sql_words", "sql_rows", "label_rows", "title_rows", "words")
        }
    finally:
        sys.path.remove(str(EXAMPLES))


def rows(dataset: str, split: str) -> list[dict[str, str]]:
    lines = (EXAMPLES / dataset / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def prompt_of(row: dict[str, str]) -> str:
    return " ".join(row[column] for column in ("schema", "question", "text") if column in row)


def pattern(frame: str) -> re.Pattern[str]:
    """A wording as a regular expression, whatever stands in its gaps."""
    return re.compile(".+".join(re.escape(part) for part in re.split(r"\s?\{\w\}", frame.rstrip(".?")) if part))


def test_generator_reproduces_the_committed_bytes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, EXAMPLES / "generate.py", "--output", tmp_path], check=True)
    for dataset in DATASETS:
        for split in SPLITS:
            name = f"{dataset}/{split}.jsonl"
            assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes(), name


def test_files_are_small() -> None:
    sizes = [(EXAMPLES / dataset / f"{split}.jsonl").stat().st_size for dataset in DATASETS for split in SPLITS]
    assert max(sizes) < 1_000_000
    assert sum(sizes) < 4_000_000


@pytest.mark.parametrize("dataset", DATASETS)
def test_slices_ids_and_prompts(dataset: str, modules: dict[str, ModuleType]) -> None:
    ids = [row["id"] for split in SPLITS for row in rows(dataset, split)]
    assert len(ids) == len(set(ids))
    prompts = [prompt_of(row) for split in SPLITS for row in rows(dataset, split)]
    assert len(prompts) == len(set(prompts))
    for split, count in (("validation", 60), ("test", 200)):
        slices = [row["slice"] for row in rows(dataset, split)]
        assert {name: slices.count(name) for name in slices} == dict.fromkeys(modules[f"{dataset}_rows"].SLICES, count)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("split", SPLITS)
def test_values_belong_to_their_split(dataset: str, split: str, modules: dict[str, ModuleType]) -> None:
    for row in rows(dataset, split):
        for value in MADE_UP.findall(prompt_of(row)):
            if "-" in value or f"-{value}" not in prompt_of(row):
                assert modules["words"].split_of(value) == split, row
        for value in re.findall(r"'(\w+)'", row.get("sql", "")):
            assert modules["words"].split_of(value) == split, row


def test_pretraining_leaves_the_held_out_values_alone(modules: dict[str, ModuleType]) -> None:
    for value in ("Norvik", "KV-482", "377", *map(str, range(40))):
        held_out = modules["words"].split_of(value) != "train"
        assert corpus.is_held_out(value) == held_out == (crc32(value.encode()) % 10 < 2)


@pytest.mark.parametrize("split", HELD_OUT)
def test_tables_and_columns_are_held_out(split: str) -> None:
    seen = {name for row in rows("sql", "train") for name in re.findall(r"\w+", row["schema"])}
    unseen = [row for row in rows("sql", split) if row["slice"] == "unseen_tables"]
    assert len(unseen) >= 60
    for row in unseen:
        assert seen.isdisjoint(re.findall(r"\w+", row["schema"])), row


@pytest.mark.parametrize("split", HELD_OUT)
def test_sentence_frames_are_held_out(split: str, modules: dict[str, ModuleType]) -> None:
    sql, label, title = modules["sql_words"], modules["label_rows"], modules["title_rows"]
    held_out = {
        "sql": [frame for kind in sql.FRAMES.values() for frame in kind[split]],
        "label": label.REQUESTS[split],
        "title": [frame for kind in title.KINDS.values() for frame in kind[split]],
    }
    for dataset, frames in held_out.items():
        column = "text" if dataset == "label" else "question"
        patterns = [pattern(frame) for frame in frames]
        for row in rows(dataset, split):
            if row["slice"] == "unseen_wordings":
                assert any(form.search(row[column]) for form in patterns), row
    train = {frame for kind in sql.FRAMES.values() for frame in kind["train"]}
    assert train.isdisjoint(held_out["sql"])
    assert set(label.REQUESTS["train"]).isdisjoint(held_out["label"])
    assert {frame for kind in title.KINDS.values() for frame in kind["train"]}.isdisjoint(held_out["title"])


def test_topic_pairs_are_held_out(modules: dict[str, ModuleType]) -> None:
    label = modules["label_rows"]
    named = {topic: [pattern(action) for action in label.ACTIONS[topic]] for topic in label.LABELS}
    for split in SPLITS:
        for row in rows("label", split):
            topics = {topic for topic in label.LABELS if any(form.search(row["text"]) for form in named[topic])}
            assert row["label"] in topics, row
            if row["slice"] == "two_topics":
                assert len(topics) >= 2, row
                pairs = {label.pair_split(other, row["label"]) for other in topics - {row["label"]}}
                assert split in pairs, row


def test_labels_are_in_the_declared_set(modules: dict[str, ModuleType]) -> None:
    for split in SPLITS:
        counts = [row["label"] for row in rows("label", split)]
        assert set(counts) == set(modules["label_rows"].LABELS)
        assert max(counts.count(name) for name in set(counts)) < 0.2 * len(counts)


def test_title_pairs_and_objects_are_held_out(modules: dict[str, ModuleType]) -> None:
    title = modules["title_rows"]
    for split in SPLITS:
        for row in rows("title", split):
            verb = next(word for word in row["title"].split() if word in title.VERBS)
            about = row["title"].split(f"{verb} a ")[1].split()
            thing = next(word for things in title.OBJECTS.values() for word in things if word in about)
            if row["slice"] == "unseen_objects":
                assert thing in title.OBJECTS[split]
                assert thing not in title.OBJECTS["train"]
            else:
                assert title.pair_split(verb, thing) == split, row
            assert not row["question"].startswith(row["title"].split()[0] + " " + verb)


@pytest.mark.parametrize("split", HELD_OUT)
def test_gold_sql_is_answered_and_near_misses_are_not(split: str) -> None:
    for row in rows("sql", split):
        database = sqlite3.connect(":memory:")
        database.executescript(row["database"])
        gold = sorted(map(repr, database.execute(row["sql"]).fetchall()))
        assert gold, row
        assert {"(None,)", "(0,)"}.isdisjoint(gold), row
        table = row["sql"].split(" FROM ")[1].split()[0]
        wrong = [f"SELECT * FROM {table}", row["sql"].split(" WHERE ")[0] if " WHERE " in row["sql"] else "SELECT 1"]
        columns = re.findall(r"\w+", row["schema"])[1:]
        selected = row["sql"].split("SELECT ")[1].split(" FROM ")[0]
        if re.fullmatch(r"\w+", selected):
            wrong += [row["sql"].replace(selected, other, 1) for other in columns if other != selected]
        wrong += [row["sql"].replace(f"'{value}'", "'Nowhere'") for value in re.findall(r"'([^']+)'", row["sql"])]
        for sql in wrong:
            assert sorted(map(repr, database.execute(sql).fetchall())) != gold, (row["id"], sql)
        database.close()


def test_generated_words_differ(modules: dict[str, ModuleType]) -> None:
    random = Random(1)
    assert len({modules["words"].word(random, "train") for _ in range(1000)}) > 980
