"""git, DVC and Snakemake together, as they are, on a reduced default in a temporary folder."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from snakemake.utils import update_config
from workspaces import REDUCED, ROOT, Workspace

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("dvc")]
SOMEBODY = {f"GIT_{role}_{key}": "tester" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
PLAIN = {"NO_COLOR": "1", "GIT_CONFIG_GLOBAL": os.devnull, "DVC_NO_ANALYTICS": "1"}


class Repository(Workspace):
    """A git repository with DVC, in which the reduced configuration with one run is the default."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name in (".gitignore", ".dvcignore", "dvc.yaml"):
            shutil.copy(ROOT / name, folder / name)
        shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "*.local"))
        (folder / ".venv").symlink_to(sys.prefix)
        config = yaml.safe_load(self.read("config/config.yaml"))
        update_config(config, yaml.safe_load(REDUCED))
        config["runs"] = config["runs"][:1]
        self.write("config/config.yaml", yaml.safe_dump(config, sort_keys=False))
        self.write(".git/info/exclude", ".venv\n")
        self.run("git", "init", "--quiet")
        self.commit("the configuration")

    def run(self, *command: str) -> str:
        """What a command prints, on both streams."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, **SOMEBODY, **PLAIN},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    def dvc(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments)

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", message)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository in which `dvc repro` ran, and its lock and metrics were committed."""
    repository = Repository(tmp_path_factory.mktemp("dvc"))
    repository.dvc("repro")
    repository.commit("the results")
    return repository


def stages_run(output: str) -> list[str]:
    return re.findall(r"^Running stage '(\w+)'", output, re.MULTILINE)


def test_a_second_repro_is_up_to_date_and_git_holds_just_the_small_files(reproduced: Repository) -> None:
    assert "Data and pipelines are up to date." in reproduced.dvc("repro")
    assert reproduced.planned(configs=()) == {}
    assert reproduced.run("git", "ls-files", "results").split() == [
        "results/comparison.csv",
        "results/metrics.csv",
        "results/metrics.json",
        "results/training_log.csv",
    ]
    assert reproduced.run("git", "status", "--short") == ""


def test_what_is_made_on_request_is_not_an_out(reproduced: Repository) -> None:
    merged = reproduced.write("results/runs/llama/merged/model.safetensors", "merged")
    assert "up to date" in reproduced.dvc("status")
    shutil.rmtree(merged.parent)


def test_plots_show_the_training_logs_and_the_metrics(reproduced: Repository) -> None:
    shown = json.loads(re.search(r"^{.*", reproduced.dvc("plots", "show", "--json"), re.MULTILINE)[0])["data"]
    for plot in ("results/training_log.csv", "results/metrics.csv"):
        assert shown[plot], f"no plot of {plot}"


def test_a_changed_recipe_reruns_from_train_on_and_its_difference_is_a_number(reproduced: Repository) -> None:
    before = yaml.safe_load(reproduced.read("config/config.yaml"))["recipes"]["tiny"]["learning_rate"]
    output = reproduced.dvc("exp", "run", "--set-param", "config/config.yaml:recipes.tiny.learning_rate=0.001")
    assert stages_run(output) == ["train", "predict", "evaluate", "report"]
    jobs = set(re.findall(r"Finished jobid: \d+ \(Rule: (\w+)\)", output))
    assert jobs == {"train", "predict_tuned", "evaluate_tuned", "collect", "report"}
    assert reproduced.planned(configs=()) == {}
    changed = json.loads(reproduced.dvc("params", "diff", "--json"))["config/config.yaml"]
    difference = pytest.approx(0.001 - before)
    assert changed == {"recipes.tiny.learning_rate": {"old": before, "new": 0.001, "diff": difference}}
    metrics = json.loads(reproduced.dvc("metrics", "diff", "--json"))["results/metrics.json"]
    assert metrics["llama.held-out.label.all.loss"]["diff"] != 0
    assert all(name.startswith("llama.") for name in metrics), "a base model's metrics changed with a recipe"
