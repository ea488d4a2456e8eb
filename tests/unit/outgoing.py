"""A finished run as the earlier stages leave it, for the tests of what leaves with it."""

import csv
from pathlib import Path
from typing import Any

from tiny_models import SETTINGS

from qlora.files import write_json
from qlora.results import METRIC_COLUMNS

MODEL = "sources/models/base"
SOURCES = [
    {
        "kind": "model",
        "name": "base",
        "address": "owner/base",
        "hub": "owner/base",
        "pin": "a" * 40,
        "licence": "MIT",
        "publishing": "allowed",
    },
    {
        "kind": "dataset",
        "name": "notes",
        "address": "owner/notes",
        "hub": "owner/notes",
        "pin": "b" * 40,
        "licence": "not stated",
        "publishing": "unclear",
    },
]
RUN = {
    **{"name": "llama", "model": "base", "mixture": "all", "recipe": "tiny", "seed": 1, "steps": 900},
    **{"tokens": 90000, "supervised tokens": 5000, "commit": "c" * 40},
    "hardware": {"device": "cpu", "cpu": "a processor"},
    "pins": {"model": {"source": {"hub": "owner/base", "revision": "a" * 40}}},
    "prompt": {"format": {"user": "{content}\nAnswer:"}, "system": "template"},
    "settings": {**SETTINGS, "batch_size": 8, "accumulation": 2, "schedule": "cosine"},
}

COMMANDS = {"base": "snakemake sources/models/base", "adapter": "snakemake runs/llama"}
DRIFT = {"largest": 0.122, "rms": 0.0171, "same next token": 0.984, "tokens": 122}  # of merge.json
FORBIDDEN = {**SOURCES[1], "name": "mine", "address": "data/mine.csv", "hub": "", "publishing": "forbidden"}


def metrics_row(**values: Any) -> dict[str, Any]:
    known = {"model": "base", "subject": "tuned", "suite": "held-out", "dataset": "notes"}
    return dict.fromkeys(METRIC_COLUMNS, "") | known | values


def make_run(folder: Path) -> Path:
    """run.json, metrics.csv, adapter/, merged/ and the base's tokenizer in `folder`."""
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, METRIC_COLUMNS)
        writer.writeheader()
        writer.writerows(
            [
                metrics_row(run="", slice="all", metric="accuracy", value=0.1, ci_low=0, ci_high=0.2, n=200),
                metrics_row(
                    run="llama", slice="all", metric="accuracy", value=0.8123, ci_low=0.75, ci_high=0.874, n=200
                ),
                metrics_row(run="llama", slice="hard", metric="loss", value=1.5, ci_low=1, ci_high=2, n=50),
                metrics_row(run="mistral", slice="all", metric="accuracy", value=0.9, ci_low=0.8, ci_high=1, n=200),
            ]
        )
    write_json(folder / "run.json", RUN)
    write_json(folder / "adapter/adapter_config.json", {"base_model_name_or_path": "results/sources/models/base"})
    write_json(folder / "merged/merge.json", {"drift": DRIFT})
    contents = {
        "adapter/adapter_model.safetensors": b"weights",
        "merged/model.safetensors": b"all weights",
        "merged/config.json": b"{}",
        "merged/tokenizer.json": b"{}",
        f"{MODEL}/model.safetensors": b"base",
        f"{MODEL}/config.json": b'{"model_type": "llama"}',
        f"{MODEL}/tokenizer.json": b"{}",
        f"{MODEL}/tokenizer_config.json": b"{}",
        f"{MODEL}/chat_template.jinja": b"{{ messages }}",
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
