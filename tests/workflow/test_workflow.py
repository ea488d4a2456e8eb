"""The whole workflow, run by Snakemake itself on a reduced default."""

import csv
import json
import re

import pytest
from workspaces import REDUCED, Workspace

pytestmark = pytest.mark.xdist_group("finished")  # one worker, since they share one finished run

JOINT = {"collect": 1, "report": 1, "all": 1}


def test_leaves_every_output_of_the_public_interface(finished: Workspace) -> None:
    with (finished.folder / "results/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        list(rows[0])
        == "run model mixture recipe seed subject suite dataset slice metric value ci_low ci_high n".split()
    )
    assert {row["subject"] for row in rows} == {"base", "few_shot", "trivial", "tuned"}
    assert {row["run"] for row in rows if row["subject"] == "tuned"} == {"llama", "mistral"}
    assert {row["run"] for row in rows if row["subject"] != "tuned"} == {""}
    assert all(float(row["ci_low"]) <= float(row["value"]) <= float(row["ci_high"]) for row in rows)
    for run in ("llama", "mistral"):
        folder = finished.folder / "results/runs" / run
        assert (folder / "adapter/adapter_model.safetensors").is_file()
        record = json.loads((folder / "run.json").read_text())
        assert record["steps"] == 12
        assert record["supervised tokens"] > 0
        assert record["prompt"]["format"]["user"] == "{content}\nAnswer:"
        assert (record["prompt"]["system"], record["attention"]) == ("template", "sdpa")
        assert record["versions"]["torch"].startswith("2.13.0")
        log = list(csv.DictReader((folder / "training_log.csv").open()))
        assert [row["step"] for row in log if row["eval_loss"]] == ["6", "12"]
    nested = json.loads(finished.read("results/metrics.json"))
    tuned = next(row for row in rows if row["run"] == "llama" and row["metric"] == "loss" and row["slice"] == "all")
    assert nested["llama"]["held-out"][tuned["dataset"]]["all"]["loss"] == float(tuned["value"])
    assert "<html" in finished.read("results/report/index.html")


def test_tuning_lowers_the_loss_of_held_out_answers(finished: Workspace) -> None:
    rows = [row for row in csv.DictReader(finished.read("results/metrics.csv").splitlines()) if row["metric"] == "loss"]
    losses = {
        (row["model"], row["subject"], row["dataset"]): float(row["value"]) for row in rows if row["slice"] == "all"
    }
    for model, subject, dataset in losses:
        assert losses[model, "tuned", dataset] < losses[model, "base", dataset], (model, subject, dataset)


def test_library_noise_stays_in_the_logs(finished: Workspace) -> None:
    again = finished.snakemake("--cores", "2")
    assert "Nothing to be done" in again.stdout
    assert "Loading weights" in finished.read("results/logs/train/llama.log")


def test_a_second_run_and_a_comment_have_nothing_to_do(finished_copy: Workspace) -> None:
    assert finished_copy.planned() == {}
    script = finished_copy.folder / "scripts/train_run.py"
    script.write_text(script.read_text() + "\n# a comment\n")
    assert finished_copy.planned() == {}


def test_one_value_of_one_run_reruns_that_run_alone(finished_copy: Workspace) -> None:
    config = finished_copy.folder / "config/config.yaml"
    text = config.read_text()
    changed = re.sub(r"(\{name: llama,.*?)\}", r"\1, overrides: {learning_rate: 1.0e-3}}", text)
    assert changed != text
    config.write_text(changed)
    assert finished_copy.planned() == {"train": 1, "predict_tuned": 1, "evaluate_tuned": 1, **JOINT}
    config.write_text(text)
    assert finished_copy.planned() == {}


def test_another_format_makes_rows_and_runs_anew(finished_copy: Workspace) -> None:
    registry = finished_copy.folder / "config/models.yaml"
    registry.write_text(registry.read_text().replace('user: "{content}\\nAnswer:"', 'user: "{content}\\nSo:"'))
    planned = finished_copy.planned()
    assert {rule: planned.get(rule) for rule in ("tokenize", "train")} == {"tokenize": 2, "train": 2}


def test_an_edit_to_a_shared_module_reruns_what_imports_it(finished_copy: Workspace) -> None:
    module = finished_copy.folder / "scripts/qlora/batches.py"
    module.write_text(module.read_text().replace("POOL = 50", "POOL = 60"))
    assert finished_copy.planned() == {"train": 2, "predict_tuned": 2, "evaluate_tuned": 2, **JOINT}


def test_a_dataset_of_ones_own_is_a_few_lines(finished_copy: Workspace) -> None:
    finished_copy.write("data/mine.csv", "ask,reply\n" + "".join(f"what is {n},it is {n}\n" for n in range(80)))
    lines = 'datasets: {mine: {source: {path: data/mine.csv}, prompt: "{ask}", completion: "{reply}"}}\n'
    mixture = "mixtures: {mine: {datasets: {mine: {}}}}\nsuites: {held-out: {datasets: [mine]}}\nname: mine\n"
    run = "runs: [{name: mine, model: tiny-llama, mixture: mine, recipe: tiny}]\n"
    finished_copy.write("mine.yaml", lines + mixture + run)
    refused = finished_copy.snakemake("--cores", "2", configs=("reduced.yaml", "mine.yaml"), expect=1).stdout
    pin = re.search(r"config: datasets\.mine\.source: not pinned; add '(sha256: [0-9a-f]{64})'", refused)
    assert pin, refused
    finished_copy.write("mine.yaml", lines.replace("data/mine.csv", f"data/mine.csv, {pin[1]}") + mixture + run)
    before = finished_copy.read("results/metrics.csv")
    finished_copy.snakemake("--cores", "2", configs=("reduced.yaml", "mine.yaml"))
    assert "tuned" in finished_copy.read("results/experiments/mine/metrics.csv")
    assert finished_copy.read("results/metrics.csv") == before
    assert finished_copy.planned() == {}


def test_adapters_do_not_depend_on_the_number_of_cores(finished: Workspace, workspace: Workspace) -> None:
    workspace.write("reduced.yaml", REDUCED)
    workspace.snakemake("--cores", "1", "results/runs/llama/adapter")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        path = f"results/runs/llama/adapter/{name}"
        assert (workspace.folder / path).read_bytes() == (finished.folder / path).read_bytes()
