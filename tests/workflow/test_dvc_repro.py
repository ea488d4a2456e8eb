"""git, DVC and Snakemake together, as they are, on a reduced default in a temporary folder."""

import json
import re
import shutil
from pathlib import Path

import pytest
from repositories import Repository

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("dvc")]


def stages_run(output: str) -> list[str]:
    return re.findall(r"^Running stage '(\w+)'", output, re.MULTILINE)


def test_a_second_repro_is_up_to_date_and_git_holds_just_the_small_files(published: Repository) -> None:
    assert "Data and pipelines are up to date." in published.dvc("repro")
    assert published.jobs() == set()
    assert published.run("git", "ls-files", "results").split() == [
        "results/comparison.csv",
        "results/lock.json",
        "results/metrics.csv",
        "results/metrics.json",
        "results/training_log.csv",
    ]
    assert published.run("git", "status", "--short") == ""


def test_what_is_made_on_request_is_not_an_out(published: Repository) -> None:
    merged = published.write("results/runs/llama/merged/model.safetensors", "merged")
    assert "up to date" in published.dvc("status")
    shutil.rmtree(merged.parent)


def test_plots_show_the_training_logs_and_the_metrics(published: Repository) -> None:
    shown = json.loads(re.search(r"^{.*", published.dvc("plots", "show", "--json"), re.MULTILINE)[0])["data"]
    for plot in ("results/training_log.csv", "results/metrics.csv"):
        assert shown[plot], f"no plot of {plot}"


def test_a_changed_recipe_reruns_from_train_on_and_its_difference_is_a_number(
    published: Repository, tmp_path: Path
) -> None:
    copy = published.copy(tmp_path / "copy")
    before = copy.config()["recipes"]["brief"]["max_steps"]
    output = copy.dvc("exp", "run", "--set-param", "config/config.yaml:recipes.brief.max_steps=3")
    assert stages_run(output) == ["preflight", "train", "predict", "evaluate", "report"]
    jobs = re.findall(r"Finished jobid: \d+ \(Rule: (\w+)\)", output)
    assert jobs == ["train", "predict_tuned", "evaluate_tuned", "collect", "report"]
    assert copy.jobs() == set()
    changed = json.loads(copy.dvc("params", "diff", "--json"))["config/config.yaml"]
    assert changed == {"recipes.brief.max_steps": {"old": before, "new": 3, "diff": 3 - before}}
    metrics = json.loads(copy.dvc("metrics", "diff", "--json"))["results/metrics.json"]
    assert abs(metrics["brief.held-out.label.all.loss"]["diff"]) > 1e-6
    assert all(name.startswith("brief.") for name in metrics), "another run's or a base model's metrics changed"
