"""A small set of results as the stages leave them, for the tests of evaluation and report."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from collect_metrics import collect_metrics
from evaluate_predictions import evaluate_predictions

SUITE = "held-out"
BOOTSTRAP = {"samples": 200, "seed": 0, "level": 0.95}
DATASETS = {
    "sql": {"task": "sql", "trivial": "majority"},
    "messages": {"task": "label", "trivial": "majority"},
    "titles": {"task": "title", "trivial": "first_words"},
}
SLICES = {
    "sql": ["unseen values", "unseen wordings", "unseen tables"],
    "messages": ["keyword", "no single keyword"],
    "titles": [""],
}
MODELS = ("tiny-llama", "tiny-mistral")
# Share of right answers of a run, by slice.
SKILL = {
    "unseen values": 0.88,
    "unseen wordings": 0.65,
    "unseen tables": 0.08,
    "keyword": 0.97,
    "no single keyword": 0.8,
    "": 0.95,
}
LABELS = ("refund", "delivery", "login", "praise")
COLOURS = ("red", "green", "blue", "black", "white", "amber")


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content, "supervised": role == "assistant"}


def make_row(dataset: str, part: str, number: int) -> dict[str, Any]:
    """A row whose answer follows from its number."""
    row: dict[str, Any] = {"id": f"test.jsonl:{number}", "slice": part}
    colour = COLOURS[number % len(COLOURS)]
    if dataset == "sql":
        question = f"paint (name, colour, litres)\nWhich paints are {colour}{number}?"
        answer = f"SELECT name FROM paint WHERE colour = '{colour}{number}'"
        rows = ", ".join(f"('p{i}', '{colour}{number if i % 2 else 'x'}', {i})" for i in range(4))
        row["database"] = (
            f"CREATE TABLE paint (name TEXT, colour TEXT, litres INTEGER); INSERT INTO paint VALUES {rows};"
        )
    elif dataset == "messages":
        question = f"Order {number}: <b>where</b> is my {colour} parcel & what now?"
        answer = LABELS[number % len(LABELS)]
    else:
        question = f"How do I mix {colour} and {COLOURS[(number + 1) % 6]} paint number {number} without streaks?"
        answer = f"Mixing {colour} and {COLOURS[(number + 1) % 6]} paint"
    return {**row, "messages": [message("user", question), message("assistant", answer)]}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, value: Any) -> Path:
    return write_jsonl(path, [value])


def make_datasets(root: Path, rows: int) -> dict[str, list[dict[str, Any]]]:
    """Formatted datasets with `rows` test rows a slice; returns the test rows by dataset."""
    tests: dict[str, list[dict[str, Any]]] = {}
    for name, parts in SLICES.items():
        tests[name] = [make_row(name, part, rows * place + i) for place, part in enumerate(parts) for i in range(rows)]
        train = [make_row(name, "", 10_000 + i) for i in range(20)]
        folder = root / "datasets" / name
        write_jsonl(folder / "test.jsonl", tests[name])
        write_jsonl(folder / "train.jsonl", train)
        write_json(
            folder / "card.json",
            {
                "dataset": name,
                "source": {"path": f"data/examples/{name}", "sha256": "0123456789abcdef" * 4},
                "licence": "MIT",
                "task": DATASETS[name]["task"],
                "read": {"train": 2010, "validation": 100, "test": len(tests[name])},
                "kept": {"train": 2000, "validation": 100, "test": len(tests[name])},
                "slices": {"test": {part or "all": rows for part in parts}},
                "held out of train": {},
                "repeated": {"train": {"prompt and answers": 2, "prompt": 5}},
                "dropped": {"train": {"empty answer": 3, "prompt stands in test": 7}, "validation": {}, "test": {}},
            },
        )
    return tests


def make_predictions(path: Path, subjects: Iterable[str], tests: Mapping[str, list[dict[str, Any]]], seed: int) -> Path:
    """Answers that are right as often as SKILL says for tuned, and hardly ever for the others."""
    generator = np.random.default_rng(seed)
    predictions = []
    for subject in subjects:
        for dataset, rows in tests.items():
            for row in rows:
                right = generator.random() < {"base": 0.0, "few_shot": 0.12, "tuned": SKILL[row["slice"]]}[subject]
                prompt, answer = (message["content"] for message in row["messages"])
                few_shot = subject == "few_shot"
                predictions.append(
                    {
                        "subject": subject,
                        "dataset": dataset,
                        "id": row["id"],
                        "prompt": f"{prompt}\nAnswer:",
                        "generated": answer if right else f"{answer.split()[0]} <script>alert(1)</script> and so on",
                        "stopped": subject == "tuned" or few_shot,
                        "nll": None if few_shot else float(generator.exponential(2.0 if subject == "tuned" else 40.0)),
                        "tokens": 0 if few_shot else len(answer.split()) + 1,
                    }
                )
    return write_jsonl(path, predictions)


def make_run(folder: Path, run: str, model: str, seed: int) -> None:
    """run.json and training_log.csv of a run."""
    write_json(
        folder / "run.json",
        {
            **{
                "name": run,
                "model": model,
                "mixture": "all",
                "recipe": "demo",
                "seed": seed,
                "key": "0123456789abcdef",
            },
            "adapter": {"adapter_model.safetensors": f"{seed:02x}" + "ad" * 31},
            "commit": "c0" * 20,
            "settings": {"lora": {"r": 16, "alpha": 32, "target_modules": "all-linear"}, "learning_rate": 0.005},
            "pins": {"model": {"files": {"model.safetensors": "ab" * 32}}, "tokens": {"train.arrow": "cd" * 32}},
            "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
            "hardware": {"device": "cpu", "threads": 1, "cpu": "A processor with <angle> brackets", "cores": 2},
            **{"steps": 900, "tokens": 1_043_211, "supervised tokens": 201_334, "seconds": 38.41},
            **{"tokens per second": 27160.4, "trainable parameters": 43_008, "resumed from": None},
            "rows": {"read": 6000, "kept": 5990, "overlong, dropped": 10},
            "peak memory in bytes": {"resident": 1_234_567_890},
        },
    )
    with (folder / "training_log.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens"])
        for step in range(10, 901, 10):
            loss = 0.1 + (2.9 + 0.1 * seed) * math.exp(-step / 120) + 0.05 * math.sin(step * (seed + 1))
            writer.writerow([step, step / 375, f"{loss:.4f}", "", 0.005, 0.7, step * 1160])
            if step % 100 == 0:
                writer.writerow([step, step / 375, "", f"{loss + 0.06:.4f}", "", "", step * 1160])


def make_results(
    root: Path, rows: int = 8, runs: Sequence[str] = ("tiny-llama-s1", "tiny-mistral-s1")
) -> dict[str, Any]:
    """Everything that the report is made of, below `root`, as its inputs by name."""
    tests = make_datasets(root, rows)
    files: dict[str, list[Path]] = {"predictions": [], "scores": [], "tables": [], "records": [], "training_logs": []}
    datasets = [root / "datasets" / name for name in DATASETS]
    for number, (model, run) in enumerate(zip(MODELS, runs, strict=True)):
        make_run(root / "runs" / run, run, model, number)
        files["records"].append(root / "runs" / run / "run.json")
        files["training_logs"].append(root / "runs" / run / "training_log.csv")
        for kind, name, subjects in (("base", model, ("base", "few_shot")), ("tuned", run, ("tuned",))):
            predictions = make_predictions(
                root / "predictions" / SUITE / kind / f"{name}.jsonl", subjects, tests, 10 * number + len(subjects)
            )
            folder = root / "metrics" / SUITE / kind
            is_run = kind == "tuned"
            evaluate_predictions(
                predictions=predictions,
                folders=datasets,
                metrics=folder / f"{name}.csv",
                scores=folder / f"{name}.scores.jsonl",
                datasets=DATASETS,
                suite=SUITE,
                model=model,
                baselines=[] if is_run else ["few_shot", "trivial"],
                bootstrap=BOOTSTRAP,
                **({"run": run, "mixture": "all", "recipe": "demo", "seed": 1} if is_run else {}),
            )
            files["predictions"].append(predictions)
            files["scores"].append(folder / f"{name}.scores.jsonl")
            files["tables"].append(folder / f"{name}.csv")
    tables = files.pop("tables")
    metrics, comparison = root / "metrics.csv", root / "comparison.csv"
    logs = (files["training_logs"], root / "training_log.csv")
    collect_metrics(tables, files["scores"], metrics, root / "metrics.json", comparison, *logs, {SUITE: BOOTSTRAP})
    write_json(
        root / "mixtures" / "all" / "card.json",
        {
            **{"mixture": "all", "seed": 0, "train": 6000, "validation": 300},
            "datasets": {
                name: {"weight": 1.0, "cap": None, "train rows": 2000, "train rows taken": 2000} for name in DATASETS
            },
            "left out": {name: {} for name in DATASETS},
        },
    )
    return {
        **files,
        "metrics": metrics,
        "comparison": comparison,
        "datasets": datasets,
        "mixtures": [root / "mixtures/all"],
    }
