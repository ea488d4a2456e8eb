"""Each experiment from its sources to its report, on small random models of the same architecture.

The overlay is the experiment's own; a second one takes fewer steps and shorter answers.
"""

import csv
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from experiment_data import TOPICS, stand_in, stand_in_datasets, stand_in_models, write_parquet
from hub_server import USER, HubServer
from test_interruptions import interrupted
from test_real_data import DATA, needs_data
from workspaces import Workspace

from qlora.files import read_json, read_jsonl

FEWER = {"suites": {"held-out": {"max_new_tokens": 8, "shots": 1, "bootstrap": {"samples": 100}}}}


def configs_of(workspace: Workspace, name: str, recipe: str, **settings: Any) -> tuple[str, str]:
    """The experiment's overlay, and the one that makes it short."""
    workspace.write("fewer.yaml", yaml.safe_dump({**FEWER, "recipes": {recipe: settings}} if settings else FEWER))
    return f"config/experiments/{name}.yaml", "fewer.yaml"


def results_of(workspace: Workspace, name: str) -> Path:
    return workspace.folder / "results/experiments" / name


def metrics_of(results: Path) -> dict[tuple[str, str, str], float]:
    """(run, or model of a base; dataset; metric) → value on the whole test set, of the tuned and the bases as they are."""
    with (results / "metrics.csv").open(newline="") as file:
        return {
            (row["run"] or row["model"], row["dataset"], row["metric"]): float(row["value"])
            for row in csv.DictReader(file)
            if row["slice"] == "all" and row["subject"] in ("base", "tuned")
        }


def learned_texts(workspace: Workspace, tokens: str, model: str) -> list[str]:
    """What is supervised in each tokenised training row, stop token and all."""
    import pyarrow
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workspace.folder / "bases" / model)
    with pyarrow.ipc.open_stream(workspace.folder / tokens / "train.arrow") as rows:
        labels = rows.read_all()["labels"].to_pylist()
    return [tokenizer.decode([label for label in row if label >= 0]) for row in labels]


def prompts_of(results: Path, kind: str, name: str) -> list[str]:
    return [row["prompt"] for row in read_jsonl(results / f"predictions/held-out/{kind}/{name}.jsonl")]


@pytest.mark.xdist_group("experiments")
def test_mistral_text_label(workspace: Workspace) -> None:
    stand_in_models(workspace, "mistral-7b-v0.1")
    configs = configs_of(workspace, "mistral-text-label", "text-label", max_steps=4, save_steps=4)
    workspace.write("rows.yaml", "datasets: {label: {limit: {train: 80, validation: 6, test: 24}}}\n")
    workspace.snakemake("--cores", "2", configs=(*configs, "rows.yaml"))
    results = results_of(workspace, "mistral-text-label")
    record = read_json(results / "runs/mistral-text-label/run.json")
    assert (record["settings"]["optimizer"], record["settings"]["learning_rate"]) == ("adamw_8bit", 1e-5)
    metrics = metrics_of(results)
    for name in ("mistral-7b-v0.1", "mistral-text-label"):
        assert {(name, "label", "accuracy"), (name, "label", "macro_f1")} <= set(metrics)
    report = (results / "report/index.html").read_text(encoding="utf-8")
    assert 'aria-label="Confusion matrix: label, mistral-text-label, tuned"' in report
    learned = learned_texts(workspace, f"{results}/tokens/mistral-7b-v0.1/labels", "mistral-7b-v0.1")
    assert all(re.fullmatch(r" ?[a-z -]+</s>", text) for text in learned), learned[:3]


@pytest.mark.slow
def test_mistral_law_is_interrupted_and_goes_on(workspace: Workspace) -> None:
    stand_in_models(workspace, "mistral-7b-instruct-v0.2")
    stand_in_datasets(workspace, "law-stack-exchange", "law-topics")
    short = {"max_steps": 20, "save_steps": 2, "samples": 0}
    configs = configs_of(workspace, "mistral-law", "law", **short)
    results = results_of(workspace, "mistral-law")
    titles = "results/experiments/mistral-law/runs/law-titles/adapter"
    interrupted(workspace, signal.SIGINT, titles, configs)
    workspace.snakemake("--cores", "2", configs=configs)
    record = read_json(results / "runs/law-titles/run.json")
    assert record["resumed from"].startswith("checkpoint-")
    assert (record["steps"], record["batching"]) == (20, "grouped")
    metrics = metrics_of(results)
    assert ("law-titles", "law-stack-exchange", "rouge_l") in metrics
    assert {("law-topics", "law-topics", "accuracy"), ("law-topics", "law-topics", "macro_f1")} <= set(metrics)
    tokens = read_json(results / "tokens/mistral-7b-instruct-v0.2/titles/card.json")
    assert tokens["train"]["kept"] == 32
    assert tokens["train"]["over max_length, cut_prompt"] == 4
    model = "mistral-7b-instruct-v0.2"
    titles_learned = learned_texts(workspace, f"{results}/tokens/{model}/titles", model)
    assert all(re.fullmatch(r"May I copy [a-z]+ book \d+\?</s>", text.strip()) for text in titles_learned)
    topics_learned = learned_texts(workspace, f"{results}/tokens/{model}/topics", model)
    assert {text.strip().removesuffix("</s>") for text in topics_learned} == set(TOPICS)
    asked = prompts_of(results, "tuned", "law-titles")
    assert sum(prompt.endswith("What is the title of this question? [/INST]") for prompt in asked) == 36
    assert sum(prompt.endswith("What is the topic of this question? [/INST]") for prompt in asked) == 36


USER_FILES = {
    "csv": (
        "data/mine.csv",
        "Question,Answer\n" + "".join(f'"Where is shelf {n}, please?",Room {n}\n' for n in range(60)),
    ),
    "jsonl": (
        "data/mine.jsonl",
        "".join(json.dumps({"Question": f"Where is shelf {n}?", "Answer": f"Room {n}"}) + "\n" for n in range(60)),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", USER_FILES)
def test_llama2_custom_takes_three_lines(workspace: Workspace, kind: str) -> None:
    stand_in_models(workspace, "llama-2-7b")
    path, text = USER_FILES[kind]
    workspace.write(path, text)
    overlay = "config/experiments/llama2-custom.yaml"
    lines = workspace.read(overlay).splitlines()
    at = lines.index("  custom:")
    lines[at + 1 : at + 4] = [
        f"    source: {{path: {path}}}",
        '    prompt: "{Question}"',
        '    completion: "{Answer}"',
    ]
    workspace.write(overlay, "\n".join(lines))
    configs = configs_of(workspace, "llama2-custom", "small-card", max_steps=3, save_steps=3)
    refused = workspace.snakemake("-n", configs=configs, expect=1).stdout
    pin = re.search(r"datasets\.custom\.source: not pinned; add '(sha256: [0-9a-f]{64})'", refused)
    assert pin, refused
    lines[at + 1] = f"    source: {{path: {path}, {pin[1]}}}"
    workspace.write(overlay, "\n".join(lines))
    workspace.snakemake("--cores", "2", configs=configs)
    results = results_of(workspace, "llama2-custom")
    card = read_json(workspace.folder / "results/datasets/custom/card.json")
    assert sum(card["kept"].values()) == 60
    assert card["kept"]["test"] > 0
    assert ("llama2-custom", "custom", "rouge_l") in metrics_of(results)
    assert (results / "runs/llama2-custom/adapter/adapter_model.safetensors").stat().st_size > 1000
    learned = learned_texts(workspace, f"{results}/tokens/llama-2-7b/custom", "llama-2-7b")
    assert all(re.fullmatch(r" ?Room \d+</s>", text) for text in learned)


@pytest.mark.slow
def test_open_models(workspace: Workspace, hub: HubServer) -> None:
    models = {
        **{"gemma-2b": "gemma-2b", "gemma-7b": "gemma-7b", "falcon-7b": "falcon-7b", "phi-2": "phi-2"},
        "zephyr-7b": "zephyr-7b-beta",
    }
    stand_in_models(workspace, *models.values())
    stand_in_datasets(workspace, "gsm8k", "guanaco-llama2-1k")
    configs = configs_of(workspace, "open-models", "open", max_steps=2, save_steps=2, samples=0)
    workspace.snakemake("--cores", "2", configs=configs)
    results = results_of(workspace, "open-models")
    metrics = metrics_of(results)
    for run, model in models.items():
        record = read_json(results / f"runs/{run}/run.json")
        assert record["batching"] == ("grouped" if run == "falcon-7b" else "packed")
        assert {(run, "gsm8k", "number_match"), (model, "gsm8k", "number_match")} <= set(metrics)
        learned = learned_texts(workspace, f"{results}/tokens/{model}/chat-and-maths", model)
        assert not any("[INST]" in text or "Ana has" in text for text in learned)
        stop = {"gemma": "<eos>", "falco": "<|endoftext|>", "phi-2": "<|endoftext|>"}.get(run[:5], "</s>")
        assert all(text.strip().endswith(stop) for text in learned), (run, learned[:3])
    chats = read_json(workspace.folder / "results/datasets/guanaco-llama2-1k/card.json")
    assert chats["dropped"]["train"] == {"empty answer": 1}
    assert chats["kept"]["test"] == 0
    assert not hub.repositories
    shown = workspace.snakemake(
        "--config", f"publish_to={USER}/open", "--cores", "2", "publish", configs=configs
    ).stdout
    assert re.search(r"^total +6$", shown, re.M), shown  # five runs and their target: nothing is trained again
    assert "publish: licence: model gemma-7b (Gemma Terms of Use (gated)) allows publishing on conditions" in shown
    assert set(hub.repositories) == {f"{USER}/open-{run}" for run in models}
    for run in models:
        repository = hub.repositories[f"{USER}/open-{run}"]
        assert repository.private
        files = repository.commits[repository.branches["main"]]
        weights = results / f"runs/{run}/adapter/adapter_model.safetensors"
        assert files["adapter_model.safetensors"] == weights.read_bytes()
        card = files["README.md"].decode()
        assert "| gsm8k | all | number_match |" in card
        assert f'PeftModel.from_pretrained(base, "{USER}/open-{run}")' in card
        assert ("FalconLinear" in card) == (run == "falcon-7b")
        assert card.endswith("--configfile config/experiments/open-models.yaml fewer.yaml\n```\n")


@needs_data
@pytest.mark.slow
def test_phi_2_of_the_open_models_on_real_rows(workspace: Workspace) -> None:
    stand_in_models(workspace, "phi-2")
    sources = workspace.folder / "sources"
    for split in ("train", "test"):
        write_parquet(sources / f"gsm8k/main/{split}-0.parquet", list(read_jsonl(DATA / f"gsm8k/{split}.jsonl")))
    (sources / "guanaco-llama2-1k/data").mkdir(parents=True)
    shutil.copy(DATA / "guanaco_llama2_1k/train.parquet", sources / "guanaco-llama2-1k/data/train-0.parquet")
    for name in ("gsm8k", "guanaco-llama2-1k"):
        stand_in(workspace, "datasets", name, sources / name)
    configs = configs_of(workspace, "open-models", "open", max_steps=2, save_steps=2, samples=0)
    alone = {
        "runs": [{"name": "phi-2", "model": "phi-2", "mixture": "chat-and-maths", "recipe": "open"}],
        "datasets": {"gsm8k": {"limit": {"validation": 8, "test": 8}}},
    }
    workspace.write("alone.yaml", yaml.safe_dump(alone))
    workspace.snakemake("--cores", "2", configs=(*configs, "alone.yaml"))
    cards = {
        name: read_json(workspace.folder / f"results/datasets/{name}/card.json")
        for name in ("gsm8k", "guanaco-llama2-1k")
    }
    assert cards["gsm8k"]["read"] == {"train": 7473, "validation": 0, "test": 1319}
    assert cards["guanaco-llama2-1k"]["dropped"]["train"] == {"empty answer": 1, "has no prompt": 2}
    results = results_of(workspace, "open-models")
    assert ("phi-2", "gsm8k", "number_match") in metrics_of(results)
    learned = learned_texts(workspace, f"{results}/tokens/phi-2/chat-and-maths", "phi-2")
    assert not any("[INST]" in text or "</s>" in text for text in learned)
    assert sum("####" in text for text in learned) > 1000


@pytest.mark.slow
def test_llama2_sql_mix_by_its_smoke_test(workspace: Workspace) -> None:
    stand_in_models(workspace, "llama-2-7b-chat")
    stand_in_datasets(workspace, "guanaco-llama2-1k", "synthetic-text-to-sql", "bird-sql-with-reasoning")
    configs = configs_of(workspace, "llama2-sql-mix", "sql-mix")
    workspace.write(configs[0], workspace.read(configs[0]).replace("recipe: sql-mix,", "recipe: sql-smoke,"))
    workspace.snakemake("--cores", "2", configs=configs)
    results = results_of(workspace, "llama2-sql-mix")
    record = read_json(results / "runs/llama2-sql-mix/run.json")
    assert record["steps"] == 20
    metrics = metrics_of(results)
    for name in ("llama-2-7b-chat", "llama2-sql-mix"):
        assert (name, "synthetic-text-to-sql", "execution_accuracy") in metrics
        assert (name, "bird-sql-with-reasoning", "exact_match") in metrics
    card = read_json(workspace.folder / "results/datasets/synthetic-text-to-sql/card.json")
    assert card["dropped"]["test"] == {"its tables or its query fail in SQLite": 4}
    assert card["kept"] == {"test": 4, "train": card["kept"]["train"], "validation": card["kept"]["validation"]}
    asked = prompts_of(results, "tuned", "llama2-sql-mix")
    assert "[INST] CREATE TABLE paint" in asked[0]
    assert any("refers to town" in prompt and "CREATE TABLE shop" in prompt for prompt in asked)
    learned = learned_texts(workspace, f"{results}/tokens/llama-2-7b-chat/sql-mix", "llama-2-7b-chat")
    assert not any("[INST]" in text or "CREATE TABLE" in text for text in learned)
