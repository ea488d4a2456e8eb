"""Measure how long the rows of the experiments are, into lengths.json beside this file: facts on data, and no data.

    QLORA_TEST_DATA=FOLDER python benchmarks/gpu/measure_lengths.py

FOLDER/data holds copies of the sources, FOLDER/tokenizers the tokenizers. Rows go through the workflow's own stages; of
the training rows in the order of their length, 101 at equal distances are noted: tokens, and how many of them are
learned. What is not at hand is stood in for by what is nearest, and lengths.json says by what.
"""

import csv
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import pyarrow
from transformers import AutoTokenizer

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
sys.path.append(str(Path(__file__).parents[2] / "tests/unit"))
from tokenizers_for_tests import LLAMA2_CHAT, MISTRAL_INSTRUCT, ZEPHYR

from concatenate_mixture import concatenate_mixture
from format_dataset import format_dataset
from lengths import LENGTHS
from overlays import BASES, EXPERIMENTS, ROOT, configured, runs_of
from qlora.files import read_jsonl, replacing, write_jsonl
from qlora.render import IGNORED
from shapes import SHAPES
from tokenize_mixture import tokenize_mixture

POINTS = 100
TABLES = 14  # of four columns: a database of BIRD has 54 columns on average (arXiv 2305.03111, table 1)
TOKENIZERS = {  # model → folder, chat template, what it stands in for
    "mistral-7b-v0.1": ("mistral-v1", None, ""),
    "mistral-7b-instruct-v0.2": ("mistral-v1", MISTRAL_INSTRUCT, ""),
    "zephyr-7b-beta": ("mistral-v1", ZEPHYR, ""),
    "llama-2-7b": ("llama2", None, ""),
    "llama-2-7b-chat": ("llama2", LLAMA2_CHAT, ""),
    "gemma-2b": ("llama2", None, "Llama 2's tokenizer, of an eighth as many tokens as Gemma's"),
    "gemma-7b": ("llama2", None, "Llama 2's tokenizer, of an eighth as many tokens as Gemma's"),
    "falcon-7b": ("falcon", None, ""),
    "phi-2": ("gpt2", None, "GPT-2's tokenizer, to which Phi-2's adds some tokens"),
}
Rows = Iterator[dict[str, Any]]
Source = tuple[Path, dict[str, Any]]  # where it lies, and the settings of its files


def main() -> None:
    """Measure all datasets of all runs."""
    given = Path(os.environ["QLORA_TEST_DATA"])
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for experiment in EXPERIMENTS:
            config = configured(experiment)
            for run in runs_of(experiment):
                mixture = config["mixtures"][run.entry["mixture"]]
                found[run.name] = {
                    name: measured(Path(scratch), given, config, run.entry["model"], name, mixture)
                    for name in mixture["datasets"]
                }
                print(run.name, {name: entry["rows"] for name, entry in found[run.name].items()}, flush=True)
    write_lengths(LENGTHS, found)


def measured(
    scratch: Path, given: Path, config: Mapping[str, Any], model: str, name: str, mixture: Mapping[str, Any]
) -> dict[str, Any]:
    """How many training rows a dataset has, 101 of their lengths, and what stood in for what."""
    folder, template, instead = TOKENIZERS[model]
    entry, form = config["datasets"][name], config["models"][model]["format"]
    (source, files), rows, other = source_of(name, entry, given / "data", scratch)
    dataset, joined, tokens = (scratch / kind / name for kind in ("datasets", "mixtures", "tokens"))
    kept = {key: value for key, value in entry.items() if key not in ("files", "slice", "database")}
    format_dataset(source, dataset, name, {**kept, **files, "task": "text"})
    concatenate_mixture([dataset], [], joined, name, {name: {"weight": 1.0, "cap": None}}, 0)
    base = scratch / "models" / model
    tokenizer = AutoTokenizer.from_pretrained(given / "tokenizers" / folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(base)
    SHAPES[BASES[model]].save_pretrained(base)
    tokenize_mixture(
        joined,
        base,
        tokens,
        config["formats"][form] if form else None,
        mixture["max_length"],
        mixture["overlong"],
        config["models"][model]["system"],
        mixture["lossy"],
    )
    pairs = sorted(lengths_in(tokens / "train.arrow"))
    shown = [pairs[round(point * (len(pairs) - 1) / POINTS)] for point in range(POINTS + 1)]
    notes = {"instead of the source": other, "instead of the tokenizer": instead}
    return {"rows": rows or len(pairs), **{key: note for key, note in notes.items() if note}, "lengths": shown}


def source_of(name: str, entry: Mapping[str, Any], data: Path, scratch: Path) -> tuple[Source, int | None, str]:
    """Where rows of a dataset are, how many it has for training where these are others, and what these are."""
    if "path" in entry["source"]:
        files = {"files": entry["files"]} if entry.get("files") else {}
        return (ROOT / entry["source"]["path"], files), None, ""
    if name == "gsm8k":
        return (data / "gsm8k", {"files": {"train": "train.jsonl", "test": "test.jsonl"}}), None, ""
    if name == "guanaco-llama2-1k":
        return (data / "guanaco_llama2_1k", {}), None, ""
    rows, count, other = {
        "law-stack-exchange": (legal(data, scratch), None, LEGAL),
        "law-topics": (legal(data, scratch), None, LEGAL),
        "synthetic-text-to-sql": (synthetic(), 95_000, OWN),
        "bird-sql-with-reasoning": (
            bird(data),
            5_600,
            f"questions on basketball, with {TABLES} of this project's tables as schema",
        ),
    }[name]
    source = scratch / f"{name}.jsonl"
    write_jsonl(source, rows)
    return (source, {"unusable_rows": "drop"}), count, other


OWN = "this project's own questions to be answered in SQL, with the script of their tables"
LEGAL = "answers of chats as bodies, this project's own titles, and intents of a bank's customers as topics"


def legal(data: Path, scratch: Path) -> Rows:
    """Long prose, with a title and a topic."""
    chats = scratch / "chats"
    if not chats.exists():
        chat = configured("open-models")["datasets"]["guanaco-llama2-1k"]
        kept = {key: value for key, value in chat.items() if key != "files"}
        format_dataset(data / "guanaco_llama2_1k", chats, "chats", kept)
    titles = cycle(row["title"] for row in read_jsonl(ROOT / "data/examples/title/train.jsonl"))
    with (data / "banking77/train.csv").open(encoding="utf-8", newline="") as file:
        topics = cycle(row["category"] for row in list(csv.DictReader(file)))
    for row in read_jsonl(chats / "train.jsonl"):
        body = next(turn["content"] for turn in row["messages"] if turn["role"] == "assistant")
        yield {"title": next(titles), "body": body, "text_label": next(topics)}


def synthetic() -> Rows:
    """Questions, each with the script that makes and fills its table."""
    for row in read_jsonl(ROOT / "data/examples/sql/test.jsonl"):  # the others have no script
        yield {"sql_context": row["database"], "sql_prompt": row["question"], "sql": row["sql"]}


def bird(data: Path) -> Rows:
    """Questions, each with the schema of many tables."""
    scripts = [row["database"] for row in read_jsonl(ROOT / "data/examples/sql/test.jsonl")]
    tables = cycle(script.partition(" INSERT")[0] for script in scripts)
    for row in read_jsonl(data / "nba_text2sql/generated_queries_v2_large_filtered.jsonl"):
        schema = "\n".join(next(tables) for _ in range(TABLES))
        yield {"schema": schema, "evidence": "", "question": row["question"], "SQL": row["sql"]}


def lengths_in(path: Path) -> Iterator[tuple[int, int]]:
    """Of each tokenised row: its tokens, and how many of them are learned."""
    with pyarrow.OSFile(str(path)) as file:
        for batch in pyarrow.ipc.open_stream(file):
            for labels in batch["labels"].to_pylist():
                yield len(labels), len(labels) - labels.count(IGNORED)


def write_lengths(path: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what was found as JSON, a dataset a line."""
    runs = []
    for run, datasets in found.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in datasets.items()]
        runs.append(f"{json.dumps(run)}: {{\n" + ",\n".join(lines) + "\n}")
    with replacing(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(runs) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
