"""Families through the whole workflow, from a folder with a model to the report, by Snakemake itself."""

import csv
import json

import pytest
from tiny_models import FAMILIES, make_base
from workspaces import Workspace

from qlora.files import sha256_of

WORDS = "red green blue seven eight nine river stone cloud apple".split()
# Beside LAYERS of test_families.py and the packing test there, this is what a run's own files must say.
MODULES = {"falcon": 8, "phi": 12, "phi3": 8}
CLASSES = {
    **{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "gemma": "GemmaForCausalLM"},
    **{"gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "falcon": "FalconForCausalLM"},
    **{"phi": "PhiForCausalLM", "phi3": "Phi3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"},
}
CHOSEN = ["falcon", "qwen3"]
SAME_BUT_FOR_THE_PROMPT = {"llama", "llama2", "llama3", "mistral", "gemma-it"}  # each as another here
ALL = [name for name in FAMILIES if name not in SAME_BUT_FOR_THE_PROMPT]


def run_families(workspace: Workspace, names: list[str]) -> None:
    """A model of each family, a dataset with a system message, a run of each model; everything, and the merge."""
    rows = {split: [fact(split, number) for number in range(count)] for split, count in SPLITS.items()}
    for split, lines in rows.items():
        workspace.write(f"data/facts/{split}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    models = {f"{name}-base": registry_entry(workspace, name) for name in names}  # no name of the registry
    config = {
        "models": models,
        "datasets": {
            "facts": {
                "source": {"path": "data/facts", "sha256": sha256_of(workspace.folder / "data/facts")},
                "files": {split: f"{split}.jsonl" for split in SPLITS},
                **{"system": "Be short.", "prompt": "{ask}", "completion": "{reply}", "task": "text"},
            }
        },
        "mixtures": {"facts": {"datasets": {"facts": {}}, "max_length": 192}},
        "recipes": {
            "few": {
                **{"lora": {"r": 4, "alpha": 8}, "learning_rate": 1.0e-3, "batch_size": 2, "max_steps": 3},
                **{"log_steps": 1, "save_steps": 3, "samples": 1},
            }
        },
        "runs": [
            {"name": f"{name}-run", "model": f"{name}-base", "mixture": "facts", "recipe": "few"} for name in names
        ],
        "suites": {
            "held-out": {
                "datasets": ["facts"],
                "baselines": ["trivial"],
                "max_new_tokens": 8,
                "bootstrap": {"samples": 100},
            }
        },
    }
    workspace.write("families.yaml", json.dumps(config))
    workspace.snakemake("--cores", "2", "all", "merge", configs=("families.yaml",))


SPLITS = {"train": 16, "validation": 4, "test": 4}


def fact(split: str, number: int) -> dict[str, str]:
    return {"ask": f"What is {split} {WORDS[number % 10]} {number}?", "reply": f"{WORDS[3 * number % 10]} {number % 7}"}


def registry_entry(workspace: Workspace, name: str) -> dict[str, object]:
    """What config/models.yaml would have for a model of this family."""
    made, folder = FAMILIES[name], make_base(workspace.folder / "bases" / f"{name}-base", name)
    return {
        "source": {"path": f"bases/{name}-base", "sha256": sha256_of(folder)},
        "format": {None: None, "Instruct": "instruct"}.get(made.form and made.form["user"].split(":")[0], "plain"),
        **{"attention": made.attention, "system": made.system, "licence": "MIT"},
    }


def check_family(workspace: Workspace, name: str) -> None:
    """What the workflow must have left of a family."""
    made, run = FAMILIES[name], f"results/runs/{name}-run"
    kind = made.config.model_type
    found = json.loads(workspace.read(f"results/preflight/{name}-base.json"))
    assert found["class"] == CLASSES[kind]
    assert found["quantised modules"] == MODULES.get(kind, 14)
    assert found["targets"] == {"all-linear": found["quantised names"]}
    assert found["packs"] == (kind != "falcon")
    assert found["system message"] == made.system
    record = json.loads(workspace.read(f"{run}/run.json"))
    assert record["steps"] == 3
    assert record["batching"] == ("packed" if found["packs"] else "grouped")
    assert (workspace.folder / run / "adapter/adapter_model.safetensors").stat().st_size > 1000
    assert json.loads(workspace.read(f"{run}/merged/config.json"))["architectures"] == [CLASSES[kind]]
    rows = [
        json.loads(line) for line in workspace.read(f"results/predictions/held-out/tuned/{name}-run.jsonl").splitlines()
    ]
    assert len(rows) == SPLITS["test"]
    assert all(row["nll"] > 0 and row["tokens"] > 1 for row in rows)
    tokens = json.loads(workspace.read(f"results/tokens/{name}-base/facts/card.json"))
    assert tokens["train"]["kept"] == SPLITS["train"]
    # The stop token is among what is learned: the tokenised rows end with it.
    assert all(ids[-1] in stop_token_ids(workspace, name, found["stop tokens"]) for ids in learned_ids(workspace, name))
    metrics = csv.DictReader(workspace.read("results/metrics.csv").splitlines())
    mine = {(row["subject"], row["metric"]) for row in metrics if row["model"] == f"{name}-base"}
    assert {("base", "loss"), ("tuned", "loss"), ("tuned", "rouge_l"), ("tuned", "stop_rate")} <= mine
    assert f"{name}-run" in workspace.read("results/report/index.html")


def learned_ids(workspace: Workspace, name: str) -> list[list[int]]:
    """The learned ids of the tokenised training rows."""
    import pyarrow

    with pyarrow.ipc.open_stream(workspace.folder / f"results/tokens/{name}-base/facts/train.arrow") as rows:
        labels = rows.read_all()["labels"].to_pylist()
    return [[label for label in row if label >= 0] for row in labels]


def stop_token_ids(workspace: Workspace, name: str, stops: list[str]) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workspace.folder / "bases" / f"{name}-base")
    return list(tokenizer.convert_tokens_to_ids(stops))


@pytest.mark.xdist_group("families")
def test_two_families_run_from_a_folder_to_the_report(workspace: Workspace) -> None:
    run_families(workspace, CHOSEN)
    for name in CHOSEN:
        check_family(workspace, name)
    # Another run of a model is trained and asked, and what was made with the model before stays.
    config = json.loads(workspace.read("families.yaml"))
    config["runs"].append({**config["runs"][0], "name": "other", "seed": 2})
    workspace.write("more.yaml", json.dumps(config))
    once = dict.fromkeys(("train", "predict_tuned", "evaluate_tuned", "collect", "report", "all"), 1)
    assert workspace.planned(configs=("more.yaml",)) == once
    config["runs"][-1]["overrides"] = {"lora": {"target_modules": ["q_proj"]}}
    workspace.write("more.yaml", json.dumps(config))
    refused = workspace.snakemake("--cores", "2", configs=("more.yaml",), expect=1).stdout
    assert "models.falcon-base: LoRA targets: 'q_proj' finds no layer; set lora.target_modules of the recipe" in refused


@pytest.mark.slow
@pytest.mark.xdist_group("families")
def test_every_family_runs_from_a_folder_to_the_report(workspace: Workspace) -> None:
    run_families(workspace, ALL)
    for name in ALL:
        check_family(workspace, name)
