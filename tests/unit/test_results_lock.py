"""The lock of the results: which files it names, what of them counts, and what decided them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import results_lock
from qlora.errors import UserError
from results_lock import (
    ROOT,
    content_hash,
    counted,
    deciding_config,
    declared_outputs,
    differences,
    environment,
    first_difference,
    hashes_of,
    made_lock,
    stage_outputs,
)

RECORD = {
    "key": "1f",
    "adapter": {"adapter_model.safetensors": "ab"},
    "seconds": 3.2,
    "tokens per second": 99.5,
    "peak memory in bytes": {"resident": 5},
    "hardware": {"device": "cpu", "threads": 1, "cpu": "a", "cores": 2},
    "commit": "0" * 40,
    "resumed from": None,
}
SOURCES = ("models/tiny-llama", "models/tiny-mistral", "datasets/sql", "datasets/label", "datasets/title")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("key", ["seconds", "peak memory in bytes", "hardware", "commit", "resumed from"])
def test_what_differs_from_one_making_to_the_next_does_not_count(tmp_path: Path, key: str) -> None:
    first = content_hash(write(tmp_path / "a/run.json", json.dumps(RECORD)))
    assert content_hash(write(tmp_path / "b/run.json", json.dumps(RECORD | {key: "other"}, indent=2))) == first


def test_everything_else_counts(tmp_path: Path) -> None:
    first = content_hash(write(tmp_path / "a/run.json", json.dumps(RECORD)))
    assert content_hash(write(tmp_path / "b/run.json", json.dumps(RECORD | {"key": "2f"}))) != first
    text = json.dumps(RECORD)
    assert content_hash(write(tmp_path / "a/card.json", text)) != content_hash(
        write(tmp_path / "b/card.json", text + " ")
    )


def test_only_what_the_jobs_declare_is_named_and_not_the_report(tmp_path: Path) -> None:
    for name in ("sources/a/x", "sources/of-an-experiment/x", "runs/r/adapter/w", "runs/old/adapter/w", "m.csv"):
        write(tmp_path / "results" / name, name)
    write(tmp_path / "results/report/index.html", "page")
    stages = {
        "download": ["results/sources"],
        "train": ["results/runs"],
        "evaluate": ["results/m.csv"],
        "report": ["results/report"],
    }
    declared = ["results/report/index.html", "results/m.csv", "results/runs/r/adapter", "results/sources/a"]
    found = hashes_of(tmp_path, stages, declared)
    assert {stage: list(names) for stage, names in found.items()} == {
        "download": ["results/sources/a/x"],
        "train": ["results/runs/r/adapter/w"],
        "evaluate": ["results/m.csv"],
        "report": [],
    }
    assert counted(found) == "3 files of 3 stages"


def test_every_output_of_the_default_has_a_stage() -> None:
    stages = stage_outputs(ROOT)
    declared = declared_outputs(ROOT)
    assert "results/runs/llama/adapter" in declared
    for path in declared:
        assert any(Path(path).is_relative_to(out) for outs in stages.values() for out in outs), path


def test_a_configuration_that_cannot_be_planned_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "Snakefile", 'raise ValueError("no such model")\n')
    with pytest.raises(UserError, match=r"cannot be planned; .*snakemake -n"):
        declared_outputs(tmp_path)


def test_the_first_difference_is_that_of_the_first_stage() -> None:
    wanted = {"evaluate": {"m": "1"}, "download": {"a": "1", "b": "2"}}  # as JSON sorts or does not
    assert first_difference(wanted, {"download": {"a": "1", "b": "2"}, "evaluate": {"m": "1"}}) is None
    changed = {"download": {"a": "1", "b": "3"}, "evaluate": {"m": "2"}}
    assert first_difference(wanted, changed) == "stage download: b differs"
    assert differences(wanted, changed)["evaluate"] == ["m differs"]
    assert first_difference(wanted, {"download": {"a": "1"}, "evaluate": {}}) == "stage download: b is missing"
    more = {"download": {"a": "1", "b": "2", "c": "3"}, "evaluate": {"m": "1"}}
    assert first_difference(wanted, more) == "stage download: c is not in the lock"
    assert first_difference(wanted, {"download": wanted["download"]}) == "stage evaluate: m is missing"


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    """A folder with the repository's configuration, which a test may change."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    return tmp_path


def change(root: Path, name: str, **keys: Any) -> None:
    path = root / "config" / name
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump(config | keys, sort_keys=False), encoding="utf-8")


def test_the_config_holds_what_decides_and_no_more(configured: Path) -> None:
    before = deciding_config(configured)
    assert sorted(before["models"]) == ["tiny-llama", "tiny-mistral"]
    assert sorted(before["datasets"]) == ["label", "sql", "title"]
    config = yaml.safe_load((configured / "config/config.yaml").read_text(encoding="utf-8"))
    unused = {"source": {"build": {"architecture": "llama", "seed": 7}}, "format": "plain", "licence": "MIT"}
    sent = {"publish_to": "you/demo", "publish_private": False, "publish_dry_run": True, "to": "/mnt", "merged": True}
    change(configured, "config.yaml", title="Another title", models={"unused": unused}, **sent)
    assert deciding_config(configured) == before
    runs = [config["runs"][0] | {"seed": 2}, config["runs"][1]]
    change(configured, "config.yaml", runs=runs)
    assert deciding_config(configured) != before


def test_the_environment_names_what_the_stages_load() -> None:
    found = environment(ROOT)
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "numpy"} <= found["packages"].keys()
    assert not {"dvc", "pytest", "snakemake"} & found["packages"].keys()


def test_equal_results_give_equal_locks_of_a_size_that_git_likes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config", "rules", "scripts", "dvc.yaml", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    declared = [f"results/sources/{name}" for name in SOURCES]
    for path in declared:
        write(tmp_path / path / "source.json", json.dumps({"source": {"path": path}, "files": {}}))
    declared.append("results/runs/llama/run.json")
    write(tmp_path / declared[-1], json.dumps(RECORD))
    monkeypatch.setattr(results_lock, "git", lambda *_: "c" * 40)
    monkeypatch.setattr(results_lock, "declared_outputs", lambda _: declared)
    first = made_lock(tmp_path)
    monkeypatch.setattr(results_lock, "declared_outputs", lambda _: declared[::-1])
    text = json.dumps(first, indent=2, sort_keys=True)
    assert json.dumps(made_lock(tmp_path), indent=2, sort_keys=True) == text
    assert len(text) < 100_000
    assert first["hardware"] == {"llama": RECORD["hardware"]}
    assert first["sources"].keys() == set(SOURCES)
    write(tmp_path / "results/sources/models/tiny-llama/source.json", json.dumps({"source": {"path": "x"}}))
    assert made_lock(tmp_path)["decided by"] != first["decided by"]
