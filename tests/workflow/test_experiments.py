"""Each experiment can be planned without a network, and names only its own runs."""

import re

import pytest
import yaml
from workspaces import ROOT, Workspace

EXPERIMENTS = sorted((ROOT / "config/experiments").glob("*.yaml"))


def test_the_five_experiments_are_there() -> None:
    named = {"mistral-text-label", "mistral-law", "llama2-custom", "open-models", "llama2-sql-mix"}
    assert named <= {path.stem for path in EXPERIMENTS}


@pytest.mark.parametrize("overlay", EXPERIMENTS, ids=lambda path: path.stem)
def test_plans_its_own_runs_alone(workspace: Workspace, overlay: object) -> None:
    path = ROOT / "config/experiments" / str(overlay).rsplit("/", 1)[1]
    runs = {run["name"] for run in yaml.safe_load(path.read_text())["runs"]}
    shown = workspace.snakemake("-n", configs=(str(path),)).stdout
    assert set(re.findall(r"Job \d+: train (\S+)", shown)) == runs
    assert f"results/experiments/{path.stem}/report/index.html" in shown


def test_the_slurm_profile_plans_the_default(workspace: Workspace) -> None:
    shown = workspace.snakemake("-n", "--profile", "profiles/slurm", configs=()).stdout
    assert "train llama" in shown
