"""`make record` and `make restore` between real git clones: what was recorded comes back, and nothing is computed twice."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from repositories import Repository, jobs_of, remote_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("dvc")]
JOINT = {"collect all metrics, and compare each run with its base", "write the report"}


@pytest.fixture(scope="module")
def overridden(restored: Repository, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """The restored clone in which one run has another learning rate, computed, recorded and committed."""
    copy = restored.copy(tmp_path_factory.mktemp("overridden") / "copy")
    config = copy.config()
    config["runs"][0]["overrides"] = {"learning_rate": 0.002}
    copy.write_config(config)
    assert copy.jobs() == jobs_of("llama") | JOINT
    copy.snakemake("--cores", "2", configs=())
    assert copy.tool("record").startswith("Recorded ")
    copy.commit("another learning rate")
    return copy


def test_a_clone_restores_to_nothing_to_do_and_the_same_bytes(published: Repository, restored: Repository) -> None:
    assert restored.jobs() == set()
    assert restored.bytes_of() == published.bytes_of()
    assert restored.run("git", "status", "--short") == ""
    assert "up to date" in restored.dvc("status")


def test_a_recipe_changed_is_the_runs_that_use_it(restored: Repository, tmp_path: Path) -> None:
    copy = restored.copy(tmp_path / "copy")
    for recipe, run in (("tiny", "llama"), ("brief", "brief")):
        config = restored.config()
        config["recipes"][recipe]["learning_rate"] = 0.003
        copy.write_config(config)
        assert copy.jobs() == jobs_of(run) | JOINT


def test_a_value_changed_back_trains_nothing_and_gives_the_first_bytes(
    published: Repository, overridden: Repository, tmp_path: Path
) -> None:
    copy = overridden.copy(tmp_path / "copy")
    assert copy.bytes_of("runs/llama/adapter") != published.bytes_of("runs/llama/adapter")
    copy.write_config(published.config())
    assert copy.jobs() == jobs_of("llama") | JOINT
    copy.snakemake("--cores", "2", configs=())
    log = copy.read("results/logs/train/llama.log")
    assert "finished before: taken from" in log
    assert "starting at step" not in log
    assert copy.bytes_of() == published.bytes_of()


def test_each_commit_gets_its_own_results_back(published: Repository, overridden: Repository, tmp_path: Path) -> None:
    copy = overridden.copy(tmp_path / "copy")
    new, old = (copy.run("git", "rev-parse", name).strip() for name in ("HEAD", "HEAD~1"))
    for commit, whose in ((old, published), (new, overridden)):
        copy.run("git", "checkout", "--quiet", commit)
        copy.tool("restore")
        assert copy.jobs() == set()
        assert copy.bytes_of() == whose.bytes_of()


def test_the_difference_between_two_commits_is_a_number(overridden: Repository) -> None:
    shown = json.loads(overridden.dvc("metrics", "diff", "--json", "HEAD~1", "HEAD"))["results/metrics.json"]
    difference = shown["llama.held-out.label.all.loss"]
    assert difference["diff"] == pytest.approx(difference["new"] - difference["old"])
    assert abs(difference["diff"]) > 1e-6
    assert not [name for name in shown if not name.startswith("llama.")]


CONDA = """#!/bin/sh
# Answers what Snakemake asks of conda, and makes environments that hold nothing.
case "$*" in
  --version) echo "conda 24.9.2" ;;
  *"info --json"*) echo '{"conda_version": "24.9.2", "conda_prefix": "HERE", "root_prefix": "HERE", "platform": "linux-64", "envs": []}' ;;
  *"config --get channel_priority --json"*) echo '{"get": {"channel_priority": "strict"}}' ;;
  *"env create"*) while [ $# -gt 0 ]; do [ "$1" = --prefix ] && mkdir -p "$2/conda-meta"; shift; done ;;
  *) echo "what is: $*" >&2; exit 1 ;;
esac
"""


def test_with_conda_environments_nothing_is_to_be_done_either(
    published: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conda = tmp_path / "bin/conda"
    conda.parent.mkdir()
    conda.write_text(CONDA.replace("HERE", str(tmp_path)))
    conda.chmod(0o755)
    (conda.parent / "activate").write_text("")
    monkeypatch.setenv("PATH", f"{conda.parent}:{os.environ['PATH']}")
    clone = published.clone(tmp_path / "clone", remote_of(published))
    assert "nothing to do" in clone.tool("restore")
    assert clone.jobs("--sdm", "conda") == set()
    assert clone.jobs() == set()


def test_a_commit_that_asks_for_more_leaves_just_that_to_do(restored: Repository, tmp_path: Path) -> None:
    copy = restored.copy(tmp_path / "copy")
    config = copy.config()
    config["recipes"]["brief"]["learning_rate"] = 0.003
    copy.write_config(config)
    copy.commit("a change without its results")
    shutil.rmtree(copy.folder / ".snakemake")
    shown = copy.tool("restore")
    assert "5 jobs are due, first: train brief (Params have changed" in shown
    assert shown.endswith("next: snakemake --cores all")
    assert copy.jobs() == jobs_of("brief") | JOINT


def test_a_comment_and_a_docstring_leave_nothing_to_do(restored: Repository, tmp_path: Path) -> None:
    copy = restored.copy(tmp_path / "copy")
    for name in ("scripts/qlora/files.py", "scripts/train_run.py", "rules/train.smk"):
        copy.write(name, f"{copy.read(name)}\n# A remark.\n")
    copy.commit("a remark")
    shutil.rmtree(copy.folder / ".snakemake")
    assert "nothing to do" in copy.tool("restore")


def test_another_place_umask_and_time_zone_change_nothing_and_scrambled_times_are_restored(
    restored: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = restored.copy(tmp_path / "elsewhere/moved here")
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    before = os.umask(0o077)
    try:
        assert copy.jobs() == set()
        drawn = random.Random(0)
        for path in [path for name in ("results", "data", "report") for path in (copy.folder / name).rglob("*")]:
            os.utime(path, times=(1, drawn.randrange(1, 2_000_000_000)))
        assert "nothing to do" in copy.tool("restore")
        assert copy.jobs() == set()
    finally:
        os.umask(before)
