"""An adapter is held against its record and the lock, file by file."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import verify
from qlora.errors import UserError
from results_lock import content_hash

ADAPTER = "results/runs/llama/adapter/adapter_model.safetensors"
TOKENS = "results/tokens/tiny/all/train.arrow"
MODEL = "results/sources/models/tiny/model.safetensors"
DATA = "results/sources/datasets/sql/train.jsonl"
BUILD, PINNED = {"build": {"seed": 1}}, {"path": "data/sql", "sha256": "5" * 64}


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run with its adapter, tokens, model and data, each named by its record."""
    hashes = {name: write(tmp_path / name, name) for name in (ADAPTER, TOKENS, MODEL, DATA)}
    for name, source in ((MODEL, BUILD), (DATA, PINNED)):
        path = tmp_path / name
        write_json(path.with_name("source.json"), {"source": source, "files": {path.name: {"sha256": hashes[name]}}})
    write_json(tmp_path / "results/mixtures/all/card.json", {"mixture": "all", "datasets": {"sql": {}}})
    record = {
        **{"model": "tiny", "mixture": "all", "adapter": {"adapter_model.safetensors": hashes[ADAPTER]}},
        "pins": {
            "model": {"source": BUILD, "files": {"model.safetensors": hashes[MODEL]}},
            "tokens": {"train.arrow": hashes[TOKENS]},
        },
        "seconds": 1.0,
    }
    write_json(tmp_path / "results/runs/llama/run.json", record)
    return tmp_path


@pytest.fixture
def lock(root: Path) -> dict[str, Any]:
    names = (ADAPTER, "results/runs/llama/run.json", TOKENS, MODEL, DATA)
    sources = {"models/tiny": {"source": BUILD}, "datasets/sql": {"source": PINNED}}
    return {"files": {"all": {name: content_hash(root / name) for name in names}}, "sources": sources}


def wrong(root: Path, lock: dict[str, Any]) -> dict[str, str]:
    return {what: told for what, told in verify.verify(root, "llama", lock) if told}


def test_what_is_as_recorded_is_ok(root: Path, lock: dict[str, Any]) -> None:
    checked = dict(verify.verify(root, "llama", lock))
    assert wrong(root, lock) == {}
    files = {ADAPTER, TOKENS, MODEL, DATA, "results/runs/llama/run.json"}
    assert checked.keys() == {"the pin of models/tiny", "the pin of datasets/sql", *files}
    assert wrong(root, {}) == {}, "an unrecorded run has its own record"


@pytest.mark.parametrize(
    ("name", "who"), [(ADAPTER, "run.json"), (TOKENS, "run.json"), (MODEL, "run.json"), (DATA, "source.json")]
)
def test_a_changed_file_is_named_with_or_without_a_lock(root: Path, lock: dict[str, Any], name: str, who: str) -> None:
    write(root / name, "another")
    assert wrong(root, {}).keys() == {name}
    told = wrong(root, lock)
    assert told.keys() == {name}
    assert who in told[name]
    assert "results/lock.json" in told[name]


def test_an_adapter_swapped_together_with_its_record_differs_from_the_lock(root: Path, lock: dict[str, Any]) -> None:
    path = root / "results/runs/llama/run.json"
    record = json.loads(path.read_text())
    record["adapter"]["adapter_model.safetensors"] = write(root / ADAPTER, "another")
    write_json(path, record)
    assert wrong(root, {}) == {}
    assert wrong(root, lock) == {
        ADAPTER: "is not the file named by results/lock.json",
        "results/runs/llama/run.json": "is not the file named by results/lock.json",
    }


def test_seconds_do_not_count(root: Path, lock: dict[str, Any]) -> None:
    path = root / "results/runs/llama/run.json"
    write_json(path, json.loads(path.read_text()) | {"seconds": 9.0})
    assert wrong(root, lock) == {}


def test_missing_and_unknown_files_are_named(root: Path, lock: dict[str, Any]) -> None:
    (root / ADAPTER).unlink()
    write(root / "results/runs/llama/adapter/extra.bin", "x")
    assert wrong(root, lock) == {
        ADAPTER: "is missing (named by run.json and results/lock.json)",
        "results/runs/llama/adapter/extra.bin": "is in no record",
    }


def test_a_moved_pin_is_named(root: Path, lock: dict[str, Any]) -> None:
    path = root / "results/sources/datasets/sql/source.json"
    write_json(path, json.loads(path.read_text()) | {"source": PINNED | {"sha256": "6" * 64}})
    assert wrong(root, lock).keys() == {"the pin of datasets/sql"}


def test_an_unknown_run_is_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no run 'lama' in results/runs; there: llama"):
        list(verify.verify(root, "lama", {}))
    monkeypatch.setattr(verify, "ROOT", root)
    assert verify.main(["lama"]) == 1
    assert verify.main([""]) == 1
    assert "make verify RUN=llama" in capsys.readouterr().err
    assert verify.main(["llama"]) == 0
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith("verify: 7 of 7 are as recorded; results/lock.json is missing")
    )
    write(root / ADAPTER, "another")
    assert verify.main(["llama"]) == 1
    assert f"WRONG  {ADAPTER} is not the file named by run.json" in capsys.readouterr().out


def test_what_is_not_restored_is_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "ROOT", root)
    (root / "results/mixtures/all/card.json").unlink()
    assert verify.main(["llama"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("verify: error: ")
    assert "mixtures/all/card.json" in error
    assert error.count("\n") == 1
