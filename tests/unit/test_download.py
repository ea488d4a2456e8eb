"""A source is taken only as it is pinned, whole, once, with nothing that could run code."""

import errno
import hashlib
import io
import os
import shutil
import threading
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import TOKEN
from hub_sources import FILES, MODEL, NAME, OF_MODEL, ROWS, WEIGHTS, files_in, pinned, refusal
from huggingface_hub import constants

from download_source import download_source
from qlora import stage
from qlora.files import read_json, sha256_of
from qlora.pins import needed_files


def test_local_folder_is_copied_and_recorded(tmp_path):
    given = tmp_path / "given"
    (given / "deep").mkdir(parents=True)
    (given / "a.csv").write_bytes(b"x\n1\n")
    (given / "deep" / "b.csv").write_bytes(b"")
    (given / ".DS_Store").touch()
    source = {"path": str(given), "sha256": sha256_of(given)}
    download_source(tmp_path / "out", "datasets", "mine", source, [])
    assert files_in(tmp_path / "out") == {"a.csv", "deep/b.csv", "source.json"}
    assert (tmp_path / "out" / "a.csv").read_bytes() == b"x\n1\n"
    assert read_json(tmp_path / "out" / "source.json") == {
        "source": source,
        "files": {
            "a.csv": {"sha256": hashlib.sha256(b"x\n1\n").hexdigest(), "size": 4},
            "deep/b.csv": {"sha256": hashlib.sha256(b"").hexdigest(), "size": 0},
        },
    }


def test_a_local_folder_that_a_download_wrote_gets_a_record_of_its_own(tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    (given / "a.csv").write_text("x\n1\n")
    (given / "source.json").write_text("{}")
    source = {"path": str(given), "sha256": sha256_of(given)}
    download_source(tmp_path / "out", "datasets", "mine", source, [])
    assert read_json(tmp_path / "out" / "source.json")["source"] == source
    assert list(read_json(tmp_path / "out" / "source.json")["files"]) == ["a.csv"]


def test_a_local_file_of_the_record_s_own_name_is_refused(tmp_path):
    given = tmp_path / "source.json"
    given.write_text("[]")
    assert "rename the file" in refusal(tmp_path, "datasets", {"path": str(given), "sha256": sha256_of(given)})


def test_local_file_is_copied_into_a_folder(tmp_path):
    given = tmp_path / "rows.csv"
    given.write_text("x\n1\n")
    download_source(tmp_path / "out", "datasets", "mine", {"path": str(given), "sha256": sha256_of(given)}, [])
    assert files_in(tmp_path / "out") == {"rows.csv", "source.json"}
    assert (tmp_path / "out" / "rows.csv").stat().st_mode & 0o200, "a copy of the user's file is no file of a cache"


@pytest.mark.parametrize("pin", [{"sha256": "0" * 64}, {}])
def test_changed_or_unpinned_local_file_is_refused_with_both_hashes(tmp_path, pin):
    given = tmp_path / "rows.csv"
    given.write_text("x\n1\n")
    assert refusal(tmp_path, "datasets", {"path": str(given), **pin}) == (
        f"datasets.mine: the SHA-256 of {given} is {sha256_of(given)}, pinned is {pin.get('sha256', 'none')};"
        " bring the pinned data back, or pin the new value if the change is meant"
    )


@pytest.mark.parametrize(("revision", "shown"), [({}, "main"), ({"revision": "v1"}, "v1")])
def test_unpinned_hub_source_is_refused_before_anything_is_asked(tmp_path, hub, revision, shown):
    assert refusal(tmp_path, "models", {"hub": NAME, **revision}) == (
        "config: models.mine.source: not pinned; run `make pin NAME=mine`, which finds the commit of"
        f" '{shown}' on the hub, or write the commit, 40 hex digits, as its 'revision'"
    )
    assert not hub.requests


@pytest.mark.parametrize(
    ("kind", "patterns", "expected"),
    [("model", MODEL, OF_MODEL), ("dataset", ROWS, {"data/train-0.parquet", "data/test-0.parquet"})],
)
def test_what_is_needed_comes_from_the_hub_at_its_commit(tmp_path, hub, kind, patterns, expected):
    source = pinned(hub, kind=kind)
    hub.add(NAME, {"config.json": b"newer"})
    download_source(tmp_path / "out", f"{kind}s", "mine", source, patterns)
    assert files_in(tmp_path / "out") == expected | {"source.json"}
    record = read_json(tmp_path / "out" / "source.json")
    assert record["source"] == source
    assert record["files"].keys() == expected
    for path in expected:
        assert not (tmp_path / "out" / path).is_symlink()
        assert (tmp_path / "out" / path).read_bytes() == FILES[path]
    fetched = {seen.path.partition(f"/resolve/{source['revision']}/")[2] for seen in hub.asked("/resolve/")}
    assert fetched == expected, "fetched more than is used"


def test_all_files_of_a_dataset_that_names_none_but_no_code_and_no_pickles(tmp_path, hub):
    download_source(tmp_path / "out", "datasets", "mine", pinned(hub, kind="dataset"), needed_files("datasets", {}))
    assert files_in(tmp_path / "out") == OF_MODEL | {"data/train-0.parquet", "data/test-0.parquet", "source.json"}
    assert not hub.asked("/.gitattributes")


def test_files_come_at_the_same_time(tmp_path, hub):
    hub.meeting = threading.Barrier(2)
    download_source(tmp_path / "out", "models", "mine", pinned(hub), MODEL)
    assert len(hub.asked("/objects/")) == 2
    assert files_in(tmp_path / "out") == OF_MODEL | {"source.json"}


def test_a_long_listing_is_read_to_its_end(tmp_path, hub):
    hub.page = 3
    download_source(tmp_path / "out", "models", "mine", pinned(hub), MODEL)
    assert files_in(tmp_path / "out") == OF_MODEL | {"source.json"}


def test_what_was_fetched_once_is_not_fetched_again_nor_needs_a_hub(tmp_path, hub, monkeypatch):
    source = pinned(hub)
    download_source(tmp_path / "one", "models", "mine", source, MODEL)
    asked = len(hub.asked("/resolve/")) + len(hub.asked("/tree/"))
    shutil.rmtree(tmp_path / "one")
    hub.fail("/", status=500, times=100)
    download_source(tmp_path / "two", "models", "mine", source, MODEL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    download_source(tmp_path / "three", "models", "mine", source, MODEL)
    assert len(hub.asked("/resolve/")) + len(hub.asked("/tree/")) == asked
    assert files_in(tmp_path / "three") == OF_MODEL | {"source.json"}


def test_what_another_download_left_in_the_cache_is_not_taken(tmp_path, hub):
    source = pinned(hub)
    huggingface_hub.snapshot_download(NAME, revision=source["revision"])
    download_source(tmp_path / "out", "models", "mine", source, MODEL)
    assert files_in(tmp_path / "out") == OF_MODEL | {"source.json"}


def test_a_file_is_no_second_copy_and_cannot_be_written(tmp_path, hub):
    source = pinned(hub)
    download_source(tmp_path / "out", "models", "mine", source, MODEL)
    weights = tmp_path / "out" / "model.safetensors"
    (blob,) = (tmp_path / "cache").rglob(hashlib.sha256(WEIGHTS).hexdigest())
    assert weights.samefile(blob)
    assert weights.stat().st_mode & 0o777 == 0o444
    shutil.rmtree(tmp_path / "out")
    assert blob.read_bytes() == WEIGHTS, "what is removed from the results stays in the cache"


def test_a_file_is_copied_where_the_disk_is_another(tmp_path, hub, monkeypatch, caplog):
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    caplog.set_level("INFO")
    download_source(tmp_path / "out", "models", "mine", pinned(hub), MODEL)
    weights = tmp_path / "out" / "model.safetensors"
    assert weights.stat().st_nlink == 1
    assert weights.read_bytes() == WEIGHTS
    assert "model.safetensors: copied from the hub's cache (Invalid cross-device link)" in caplog.text


def test_a_private_repository_is_read_with_a_stored_login_that_only_the_hub_sees(tmp_path, hub, monkeypatch):
    source = pinned(hub, private=True)
    assert "is not on the hub, or private" in refusal(tmp_path, "models", source)
    (tmp_path / "login").write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "login"))
    hub.requests.clear()
    download_source(tmp_path / "out", "models", "mine", source, MODEL)
    assert {seen.authorization for seen in hub.asked(NAME)} == {f"Bearer {TOKEN}"}
    assert {seen.authorization for seen in hub.asked("/objects/")} == {""}, "files lie on another host"
    assert TOKEN not in (tmp_path / "out" / "source.json").read_text()


def test_the_bytes_that_came_are_shown_on_a_terminal(tmp_path, hub, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(stage, "console", Terminal())
    monkeypatch.setattr(stage, "PROGRESS_SECONDS", 0.0)
    download_source(tmp_path / "out", "models", "mine", pinned(hub, files={"model.safetensors": WEIGHTS}), MODEL)
    last = stage.console.getvalue().splitlines()[-1]
    assert last == "  download: 1,024,000 of 1,024,000 bytes, 0 s left"
