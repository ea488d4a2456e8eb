"""What was changed after its job wrote it is named, and neither recorded nor used: outputs, DVC's cache, pinned data."""

import os
import shutil
from pathlib import Path

import pytest
from repositories import ADAPTER, Repository, flip, in_cache, remote_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("dvc")]
BASE = "results/sources/models/tiny-llama/model.safetensors"


@pytest.mark.parametrize("file", [ADAPTER, BASE])
def test_a_flipped_byte_of_an_output_is_named_not_recorded_and_mended_on_request(
    restored: Repository, tmp_path: Path, file: str
) -> None:
    copy = restored.copy(tmp_path / "copy")
    right = (copy.folder / file).read_bytes()
    flip(copy.folder / file)
    assert copy.tool("record", expect=1).startswith(f"make record: error: {file} is not what ")
    assert copy.tool("restore", expect=1).startswith(f"make restore: error: {file} would be lost, it is not recorded")
    assert copy.run("git", "status", "--short") == ""
    copy.tool("restore", "--discard")
    assert (copy.folder / file).read_bytes() == right
    assert copy.jobs() == set()


def test_an_edited_output_is_named_and_not_recorded(restored: Repository, tmp_path: Path) -> None:
    copy = restored.copy(tmp_path / "copy")
    copy.write("results/metrics.csv", copy.read("results/metrics.csv").replace("0.", "0.9", 1))
    modified = "results/metrics.csv was modified after its job wrote it"
    assert copy.tool("record", expect=1).startswith(f"make record: error: {modified}; delete it and run snakemake")
    assert "results/metrics.csv differs from the commit" in copy.tool("restore", expect=1)


def test_a_flipped_byte_in_the_cache_is_named_or_fetched_anew_and_never_used(
    published: Repository, restored: Repository, tmp_path: Path
) -> None:
    copy = restored.copy(tmp_path / "copy")
    flip(in_cache(copy, ADAPTER))
    shutil.rmtree(copy.folder / "results/runs")
    (copy.folder / ".dvc/config.local").unlink()
    shown = copy.tool("restore", expect=1)
    assert f"{ADAPTER} is damaged in DVC's cache (1 such), and no DVC remote is configured: make reproduce" in shown
    assert not (copy.folder / "results/runs").exists()
    copy.set_remote(str(remote_of(published)))
    assert "nothing to do" in copy.tool("restore")
    assert copy.bytes_of() == published.bytes_of()


def test_a_flipped_byte_in_the_remote_is_named_and_never_used(published: Repository, tmp_path: Path) -> None:
    remote = shutil.copytree(remote_of(published), tmp_path / "remote")
    place = in_cache(published, ADAPTER)
    flip(remote / "files/md5" / place.parent.name / place.name)
    clone = published.clone(tmp_path / "clone", remote)
    shown = clone.tool("restore", expect=1)
    assert f"{ADAPTER} is damaged: DVC got it neither from its cache nor from 'far', whose file is damaged too" in shown
    assert not (clone.folder / "results/runs").exists()


@pytest.mark.parametrize(
    ("file", "record"), [(BASE, "source.json"), ("results/tokens/tiny-llama/examples/train.arrow", "card.json")]
)
def test_a_flipped_byte_of_what_is_trained_on_stops_the_training(
    restored: Repository, tmp_path: Path, file: str, record: str
) -> None:
    copy = restored.copy(tmp_path / "copy")
    config = copy.config()
    config["runs"][0]["overrides"] = {"learning_rate": 0.002}
    copy.write_config(config)
    flip(copy.folder / file)
    shown = copy.snakemake("--cores", "1", configs=(), expect=1).stdout
    folder = file.rpartition("/")[0]
    assert f"train: error: {file} is not the file that {record} names; delete {folder} and run snakemake again" in shown
    assert not (copy.folder / "results/runs/llama/adapter").exists()


def test_a_flipped_byte_of_pinned_data_is_named_and_never_used(restored: Repository, tmp_path: Path) -> None:
    copy = restored.copy(tmp_path / "copy")
    flip(copy.folder / "data/examples/sql/train.jsonl")
    os.utime(copy.folder / "data/examples/sql/train.jsonl")
    stale = "the results are stale, 14 jobs are due, first: download dataset sql"
    assert stale in copy.tool("record", expect=1)
    assert "data/examples/sql/train.jsonl differs from the commit" in copy.tool("restore", expect=1)
    shown = copy.snakemake("--cores", "1", configs=(), expect=1).stdout
    assert "datasets.sql: the SHA-256 of data/examples/sql is" in shown


def test_stale_results_are_not_recorded(restored: Repository, tmp_path: Path) -> None:
    copy = restored.copy(tmp_path / "copy")
    lock, config = copy.read("dvc.lock"), copy.config()
    config["runs"][0]["overrides"] = {"learning_rate": 0.002}
    copy.write_config(config)
    shown = copy.tool("record", expect=1)
    assert shown.startswith("make record: error: the results are stale, 5 jobs are due, first: train llama (Params")
    assert copy.read("dvc.lock") == lock
