"""What stands in for an experiment's models and data: small models of the same architecture, generated rows of the same
columns in files of the same names."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from tiny_models import make_base
from workspaces import Workspace

from qlora.files import sha256_of

Row = dict[str, Any]

FAMILY_OF = {
    "mistral-7b-v0.1": "mistral",
    "mistral-7b-instruct-v0.2": "mistral-instruct",
    "zephyr-7b-beta": "zephyr",
    "llama-2-7b": "llama2",
    "llama-2-7b-chat": "llama2-chat",
    **dict.fromkeys(("gemma-2b", "gemma-7b"), "gemma"),
    "falcon-7b": "falcon",
    "phi-2": "phi-2",
}
CONTEXT = 2048  # tokens: that of Falcon-7B and Phi-2, the shortest
COLOURS = ("red", "green", "blue", "black", "white", "amber", "pink")
TOPICS = (
    *("business", "civil-law", "constitutional-law", "contract", "contract-law", "copyright", "criminal-law"),
    *("employment", "intellectual-property", "internet", "liability", "licensing", "privacy", "software"),
    *("tax-law", "trademark"),
)


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    """Rows as a Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    """Rows as a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def gsm8k(folder: Path) -> None:
    """openai/gsm8k: calculator notes inside the answer, the result behind `####`, at times with a comma."""
    for split, first, count in (("train", 0, 20), ("test", 100, 4)):
        rows = [
            {
                "question": f"Ana has {number} boxes of {COLOURS[number % 7]} pens, 100 in each. How many pens?",
                "answer": f"She has {number}*100 = <<{number}*100={100 * number}>>{100 * number}.\n#### {100 * number:,}",
            }
            for number in range(first, first + count)
        ]
        write_parquet(folder / f"main/{split}-00000-of-00001.parquet", rows)


def guanaco(folder: Path) -> None:
    """mlabonne/guanaco-llama2-1k: literal marks, some rows of two turns, one with an empty answer."""
    turns = [f"<s>[INST] Name {colour} things. [/INST] A {colour} cup. </s>" for colour in COLOURS]
    turns += [f"{turn}<s>[INST] And another? [/INST] A hat. </s>" for turn in turns[:3]]
    turns.append("<s>[INST] What is amber? [/INST]  </s>")
    write_parquet(folder / "data/train-00000-of-00001.parquet", [{"text": text} for text in turns])


def text_to_sql(folder: Path) -> None:
    """gretelai/synthetic_text_to_sql: `sql_context` makes the tables; some rows write, or are of another dialect."""
    kinds = {
        "basic SQL": "SELECT SUM(litres) FROM paint WHERE colour = '{colour}';",
        "aggregation": "SELECT colour, COUNT(*) FROM paint GROUP BY colour;",
        "data manipulation": "INSERT INTO paint VALUES ('{colour}', 9);",
        "another dialect": "SELECT DATEADD(day, 1, colour) FROM paint;",
    }
    for split, first, count in (("train", 0, 24), ("test", 100, 8)):
        rows = []
        for number in range(first, first + count):
            colour, kind = COLOURS[number % 7], list(kinds)[number % 4]
            given = {
                "sql_complexity": kind,
                "sql_prompt": f"Order {number}: what of the {colour} paint ({kind})?",
                "sql_context": f"CREATE TABLE paint (colour TEXT, litres INT); INSERT INTO paint VALUES ('{colour}', {number});",
                "sql": kinds[kind].format(colour=colour),
                "sql_explanation": "It looks at the paint.",
            }
            others = dict.fromkeys(
                (
                    *("domain", "domain_description", "sql_complexity_description", "sql_task_type"),
                    "sql_task_type_description",
                ),
                "paint",
            )
            rows.append({"id": number, **others, **given})
        write_parquet(folder / f"synthetic_text_to_sql_{split}.snappy.parquet", rows)


def bird(folder: Path) -> None:
    """meowterspace45/bird-sql-train-with-reasoning: the schema without rows, and evidence that may be empty."""
    rows = [
        {
            "db_id": "shop",
            "schema": "CREATE TABLE shop (id INTEGER, town TEXT);",
            "question": f"How many shops has town {number}?",
            "evidence": f"town {number} refers to town = '{number}'" if number % 3 else "",
            "SQL": f"SELECT COUNT(*) FROM shop WHERE town = '{number}'",
            "reasoning_trace": "First count, then filter.",
        }
        for number in range(30)
    ]
    write_parquet(folder / "data/train-00000-of-00001.parquet", rows)


def law(folder: Path) -> None:
    """jonathanli/law-stack-exchange: more rows to test than to train on, some longer than 512 tokens."""
    for split, first, count in (("train", 0, 32), ("validation", 100, 4), ("test", 200, 36)):
        rows = [
            {
                "title": f"May I copy {COLOURS[number % 7]} book {number}?",
                "body": f"<p>I bought {COLOURS[number % 7]} book {number}.</p> "
                + "I like it. " * (60 * (number % 8 == 0)),
                "text_label": TOPICS[number % 16],
                "score": number,
            }
            for number in range(first, first + count)
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)


MAKE: dict[str, Callable[[Path], None]] = {
    "gsm8k": gsm8k,
    "guanaco-llama2-1k": guanaco,
    "synthetic-text-to-sql": text_to_sql,
    "bird-sql-with-reasoning": bird,
    "law-stack-exchange": law,
    "law-topics": law,
}


def stand_in(workspace: Workspace, registry: str, name: str, folder: Path) -> None:
    """Let a registry's entry have its source in a folder of the workspace; all else of the entry stays."""
    path = f"config/{registry}.yaml"
    entries = yaml.safe_load(workspace.read(path))
    source = {"path": str(folder.relative_to(workspace.folder)), "sha256": sha256_of(folder)}
    entries[registry][name]["source"] = source
    workspace.write(path, yaml.safe_dump(entries, sort_keys=False))


def stand_in_models(workspace: Workspace, *names: str) -> None:
    """Small random models of the same architecture for models of the registry."""
    for name in names:
        family = FAMILY_OF[name]
        folder = make_base(workspace.folder / "bases" / name, family, max_position_embeddings=CONTEXT)
        stand_in(workspace, "models", name, folder)


def stand_in_datasets(workspace: Workspace, *names: str) -> None:
    """Generated rows for datasets of the registry."""
    for name in names:
        folder = workspace.folder / "sources" / name
        MAKE[name](folder)
        stand_in(workspace, "datasets", name, folder)
