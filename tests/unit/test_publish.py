"""What goes to the hub with an adapter: a card of its results, its record, and nothing from another run."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from publish_adapter import card, publish_adapter
from qlora.errors import UserError
from qlora.files import read_json, write_json
from qlora.results import METRIC_COLUMNS

PINS = {"model": {"source": {"hub": "owner/base", "revision": "a" * 40}}}
RUN = {"name": "llama", "mixture": "all", "recipe": "tiny", "seed": 1, "steps": 900, "pins": PINS}
CARD = """\
---
base_model: owner/base
library_name: peft
---
# llama

A QLoRA adapter for `owner/base`: mixture all, recipe tiny, seed 1, 900 steps. Licence of the base: MIT.

| test set | slice | metric | value | interval | n |
|---|---|---|---|---|---|
| notes | all | accuracy | 0.812 | 0.750 to 0.874 | 200 |
| notes | hard | loss | 1.500 | 1.000 to 2.000 | 50 |
"""


def metrics_row(**values: Any) -> dict[str, Any]:
    known = {"model": "base", "subject": "tuned", "suite": "held-out", "dataset": "notes"}
    return dict.fromkeys(METRIC_COLUMNS, "") | known | values


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Path]:
    """The inputs of the stage as earlier stages leave them, and its output."""
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, METRIC_COLUMNS)
        writer.writeheader()
        writer.writerows(
            [
                metrics_row(run="", slice="all", metric="accuracy", value=0.1, ci_low=0, ci_high=0.2, n=200),
                metrics_row(
                    run="llama", slice="all", metric="accuracy", value=0.8123, ci_low=0.75, ci_high=0.874, n=200
                ),
                metrics_row(run="llama", slice="hard", metric="loss", value=1.5, ci_low=1, ci_high=2, n=50),
                metrics_row(run="mistral", slice="all", metric="accuracy", value=0.9, ci_low=0.8, ci_high=1, n=200),
            ]
        )
    write_json(tmp_path / "run.json", RUN)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    write_json(tmp_path / "adapter" / "adapter_config.json", {"base_model_name_or_path": "results/sources/models/base"})
    (tmp_path / "adapter" / "README.md").write_text("what a library wrote")
    return {
        "adapter": tmp_path / "adapter",
        "record": tmp_path / "run.json",
        "metrics": tmp_path / "metrics.csv",
        "receipt": tmp_path / "published.json",
    }


def test_card_tells_base_recipe_and_the_results_of_this_run_alone(run):
    assert card(RUN, run["metrics"], "owner/base", "MIT") == CARD


def test_adapter_card_and_record_go_up_in_one_commit(run, monkeypatch):
    calls: list[Any] = []

    def create_repo(_: HfApi, name: str, private: bool, exist_ok: bool) -> None:
        calls.append((name, private, exist_ok))

    def upload_folder(_: HfApi, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        files = {path.name: path.read_text() for path in folder_path.iterdir()}
        calls.append((repo_id, files, commit_message))
        return SimpleNamespace(oid="c" * 40)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    before = {path.name for path in run["adapter"].parent.iterdir()}
    publish_adapter(**run, repository="owner/llama", base="owner/base", licence="MIT", private=True)
    created, (repository, files, message) = calls
    assert created == ("owner/llama", True, True)
    assert repository == "owner/llama"
    assert message == "Add adapter of run llama"
    assert files.keys() == {"adapter_model.safetensors", "adapter_config.json", "README.md", "run.json"}
    assert json.loads(files["adapter_config.json"]) == {"base_model_name_or_path": "owner/base", "revision": "a" * 40}
    assert files["README.md"] == CARD
    assert read_json(run["receipt"]) == {"repository": "owner/llama", "commit": "c" * 40}
    assert {path.name for path in run["adapter"].parent.iterdir()} == before | {"published.json"}


def test_refusal_of_the_hub_is_one_line_and_leaves_no_receipt(run, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise HTTPError("401 Unauthorized\nmore of it")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(UserError) as caught:
        publish_adapter(**run, repository="owner/llama", base="owner/base", licence="MIT", private=True)
    assert str(caught.value) == ("publish: owner/llama: 401 Unauthorized; is HF_TOKEN set, and may it write there?")
    assert not run["receipt"].exists()


def test_missing_repository_is_told_before_anything_is_asked(run):
    with pytest.raises(UserError, match=r"^publish: say where to with --config publish_to=owner/name$"):
        publish_adapter(**run, repository="", base="owner/base", licence="MIT", private=True)
