"""The whole workflow on four real datasets, where the environment variable QLORA_TEST_DATA says that they are."""

import csv
import os
from pathlib import Path

import pytest
import yaml
from workspaces import Workspace

from qlora.files import read_json, sha256_of

DATA = Path(os.environ.get("QLORA_TEST_DATA", "/nonexistent")) / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="QLORA_TEST_DATA names no folder with real datasets")

DATASETS = {
    "nba": {
        "source": "nba_text2sql",
        "files": {"train": "generated_queries_v2_large_filtered.jsonl", "test": "gold-test-set.jsonl"},
        "prompt": "{question}",
        "completion": "{sql}",
        "task": "sql",
        "database": {"file": "nba_roster.db"},
    },
    "banking": {
        "source": "banking77",
        "files": {"train": "train.csv", "test": "test.csv"},
        "prompt": "{text}",
        "completion": "{category}",
        "task": "label",
        "labels": read_json(DATA / "banking77" / "categories.json") if DATA.is_dir() else [],
        "limit": {"train": 400, "test": 40},
    },
    "maths": {
        "source": "gsm8k",
        "files": {"train": "train.jsonl", "test": "test.jsonl"},
        "prompt": "{question}",
        "completion": "{answer}",
        "task": "number",
        "limit": {"train": 200, "test": 20},
    },
    "chat": {
        "source": "guanaco_llama2_1k",
        "files": {"train": "train.parquet"},
        "llama2_text": "text",
        "unusable_rows": "drop",
        "limit": {"train": 200},
    },
}


@needs_data
@pytest.mark.slow
def test_runs_whole_on_four_real_datasets(workspace: Workspace) -> None:
    datasets = {
        name: {**entry, "source": {"path": str(DATA / entry["source"]), "sha256": sha256_of(DATA / entry["source"])}}
        for name, entry in DATASETS.items()
    }
    overlay = {
        "name": "real",
        "datasets": datasets,
        "mixtures": {
            "real": {"datasets": {name: {} for name in datasets}, "max_length": 384, "overlong": "cut_completion"}
        },
        "runs": [{"name": "real", "model": "tiny-llama", "mixture": "real", "recipe": "tiny"}],
        "suites": {
            "held-out": {
                "datasets": ["nba", "banking", "maths"],  # answers of the chat are longer than the tiny model's context
                "max_new_tokens": 48,
                "shots": 1,
                "overlong": "cut_prompt",
            }
        },
    }
    workspace.write("real.yaml", yaml.safe_dump(overlay))
    workspace.snakemake("--cores", "2", configs=("reduced.yaml", "real.yaml"))
    results = workspace.folder / "results/experiments/real"
    with (results / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scored = {(row["dataset"], row["metric"]) for row in rows if row["subject"] == "tuned"}
    assert {
        ("nba", "execution_accuracy"),
        ("banking", "accuracy"),
        ("maths", "number_match"),
    } <= scored
    cards = {name: read_json(workspace.folder / f"results/datasets/{name}/card.json") for name in datasets}
    assert cards["nba"]["dropped"]["train"] == {"prompt stands in test": 2}
    assert cards["banking"]["dropped"]["train"]["prompt stands in test"] == 26
    unusable = cards["chat"]["dropped"]["train"]
    assert (unusable["empty answer"], unusable["has no prompt"]) == (1, 2)
    for card in cards.values():
        dropped = sum(sum(reasons.values()) for reasons in card["dropped"].values())
        assert sum(card["read"].values()) == sum(card["kept"].values()) + dropped
    mixture = read_json(results / "mixtures/real/card.json")
    assert mixture["train"] == sum(counts["train rows taken"] for counts in mixture["datasets"].values())
    tokens = read_json(results / "tokens/tiny-llama/real/card.json")["train"]
    assert tokens["over max_length, cut_completion"] > 0
    assert "<html" in (results / "report/index.html").read_text(encoding="utf-8")
