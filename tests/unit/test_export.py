"""A run copied to any folder: whole or not at all, and nothing of somebody else's is overwritten."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from outgoing import COMMANDS, FORBIDDEN, MODEL, SOURCES, make_run

import export_run as stage
from export_run import export_run
from qlora.errors import UserError
from qlora.files import files_below, read_json, sha256_of, sha256_of_file


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    """The arguments of the stage."""
    folder = tmp_path / "run"
    folder.mkdir()
    make_run(folder)
    return {
        **{"adapter": folder / "adapter", "model": folder / MODEL, "record": folder / "run.json"},
        **{"metrics": folder / "metrics.csv", "receipt": folder / "exported.json", "to": str(tmp_path / "to")},
        **{"base": "owner/base", "sources": SOURCES, "commands": COMMANDS},
    }


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in files_below(folder)]


def test_adapter_tokenizer_card_and_record_are_copied(run, tmp_path):
    export_run(**run)
    target = tmp_path / "to/llama"
    assert names(target) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "export.json"),
        *("run.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    assert f'PeftModel.from_pretrained(base, "{target}")' in (target / "README.md").read_text()
    assert read_json(target / "export.json")["run.json"] == sha256_of_file(target / "run.json")
    assert read_json(run["receipt"])["folder"] == str(target)


def test_the_merged_model_goes_into_a_folder_of_its_own(run, tmp_path):
    export_run(**run, merged=run["record"].parent / "merged")
    inner = tmp_path / "to/llama/merged"
    assert names(inner) == [
        *("README.md", "config.json", "merge.json", "model.safetensors", "run.json", "tokenizer.json")
    ]
    assert f'from_pretrained("{inner}", dtype="auto")' in (inner / "README.md").read_text()


def test_a_licence_that_forbids_publishing_is_told_on_the_console_and_on_the_card(run, tmp_path, monkeypatch):
    shown: list[str] = []
    monkeypatch.setattr(stage, "console", type("Console", (), {"write": staticmethod(shown.append)}))
    export_run(**{**run, "sources": [*SOURCES, FORBIDDEN]})
    told = "dataset mine (not stated) forbids publishing what is made of it"
    assert f"export: licence: {told}\n" in shown
    assert shown[-1] == f"export: {tmp_path}/to/llama\n"
    assert f"**Licence:** {told}." in (tmp_path / "to/llama/README.md").read_text()


def test_an_earlier_export_is_replaced_whole(run, tmp_path):
    export_run(**run, merged=run["record"].parent / "merged")
    (run["adapter"] / "adapter_model.safetensors").write_bytes(b"other weights")
    export_run(**run)
    target = tmp_path / "to/llama"
    assert (target / "adapter_model.safetensors").read_bytes() == b"other weights"
    assert not (target / "merged").exists()


@pytest.mark.parametrize("name", ["notes.txt", "export.jsonl"])
def test_a_folder_that_is_no_export_is_left_alone(run, tmp_path, name):
    theirs = tmp_path / "to/llama" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(UserError, match="is there and is no earlier export; move it away"):
        export_run(**run)
    assert names(theirs.parent) == [name]
    assert not run["receipt"].exists()


@pytest.mark.parametrize("name", ["README.md", "merged/notes.txt", ".notes"])
def test_an_export_that_somebody_changed_is_left_alone(run, tmp_path, name):
    export_run(**run)
    theirs = tmp_path / "to/llama" / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("mine")
    before = sha256_of(theirs.parent)
    with pytest.raises(UserError, match=rf"{name} was changed or added since the export; move it away"):
        export_run(**run)
    assert sha256_of(theirs.parent) == before


def test_a_copy_that_breaks_off_leaves_the_earlier_one(run, tmp_path, monkeypatch):
    export_run(**run)
    before = sha256_of(tmp_path / "to/llama")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stage.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        export_run(**run)
    assert sha256_of(tmp_path / "to/llama") == before
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["llama"]


def test_what_somebody_adds_to_the_earlier_one_meanwhile_is_left_alone(run, tmp_path, monkeypatch):
    export_run(**run)
    theirs, copied = tmp_path / "to/llama/notes.txt", stage.copy
    monkeypatch.setattr(stage, "copy", lambda *given: theirs.write_text("mine") and copied(*given))
    with pytest.raises(UserError, match=r"notes.txt was changed or added since the export; move it away"):
        export_run(**run)
    assert theirs.read_text() == "mine"


def test_a_place_must_be_named(run):
    with pytest.raises(UserError, match=r"^export: say where to with --config to=FOLDER$"):
        export_run(**{**run, "to": ""})


def test_a_place_that_is_a_file_is_told(run, tmp_path):
    (tmp_path / "to").write_text("a file")
    with pytest.raises(UserError, match=r"to/llama cannot be written \(.*\); choose another folder"):
        export_run(**run)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_place_that_takes_no_files_is_told(run, tmp_path, monkeypatch, number):
    def refusing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("qlora.files.tempfile.TemporaryDirectory", refusing)  # the first that writes there
    with pytest.raises(UserError, match=rf"to/llama cannot be written \({os.strerror(number)}\); choose another"):
        export_run(**run)
    assert not run["receipt"].exists()
