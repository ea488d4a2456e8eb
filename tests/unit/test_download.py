"""A source is taken only as it is pinned, whole, once; what the hub answers becomes one line.

The hub here is a loopback server (tests/hub_server.py), which the hub's own client talks to.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from hub_server import TOKEN, HubServer
from huggingface_hub import constants, file_download

import download_source as module
from download_source import download_source
from qlora import stage
from qlora.errors import UserError
from qlora.files import read_json, sha256_of
from qlora.pins import needed_files

ROOT = Path(__file__).parents[2]
NAME = "owner/name"
WEIGHTS = bytes(range(256)) * 4000  # about a megabyte
FILES = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "tokenizer.model": b"words",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"pickled weights",
    "optimizer.pt": b"pickled",
    "modeling_own.py": b"code",
    "model.gguf": b"other weights",
    "source.json": b"not the record of the download",
    "original/consolidated.safetensors": b"more weights",
    "data/train-0.parquet": b"rows",
    "data/test-0.parquet": b"more rows",
    ".gitattributes": b"",
}
OF_MODEL = {"config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja"}
MODEL = needed_files("models", {})
ROWS = ["data/train-*.parquet", "data/test-*"]


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def pinned(hub: HubServer, name: str = NAME, files: dict[str, bytes] = FILES, **about: Any) -> dict[str, str]:
    """The source of a repository that the hub has now, pinned to its commit."""
    return {"hub": name, "revision": hub.add(name, files, **about)}


def refusal(
    tmp_path: Path, kind: str, source: dict[str, str], patterns: list[str] = MODEL, lock: Path | None = None
) -> str:
    """The message of a download that is refused, and leaves nothing."""
    target = tmp_path / "sources" / "mine"
    with pytest.raises(UserError) as caught:
        download_source(target, kind, "mine", source, patterns, lock)
    assert not list(target.parent.glob("*")) + list(target.parent.glob(".*"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


REFUSED = {
    "no such repository": (
        {"hub": "owner/none", "revision": "0" * 40},
        "owner/none is not on the hub, or private; mend the name,"
        " or set HF_TOKEN to a token that may read it, or store one with `hf auth login`",
    ),
    "no such commit": (
        {"hub": NAME, "revision": "0" * 40},
        f"{NAME} has no revision {'0' * 40}; pin one that it has",
    ),
}


@pytest.mark.parametrize(("source", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_message_of_what_is_not_there(tmp_path, hub, source, message):
    hub.add(NAME, FILES)
    assert refusal(tmp_path, "models", source) == f"models.mine: {message}"


@pytest.mark.parametrize("token", ["", TOKEN], ids=["no token", "a token that accepted nothing"])
@pytest.mark.parametrize(("kind", "page"), [("model", "owner/gated"), ("dataset", "datasets/owner/gated")])
def test_a_gated_repository_names_the_page_and_the_variable(tmp_path, hub, monkeypatch, token, kind, page):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    source = pinned(hub, "owner/gated", gated=True, kind=kind)
    assert refusal(tmp_path, f"{kind}s", source) == (
        f"{kind}s.mine: owner/gated is gated: accept its terms at {hub.url}/{page},"
        " then set HF_TOKEN to a token of that account, or store one with `hf auth login`"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.accepted[TOKEN].add("owner/gated")
    download_source(tmp_path / "out", f"{kind}s", "mine", source, MODEL)


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


def test_a_token_that_the_hub_does_not_know(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refusal(tmp_path, "models", pinned(hub))
    assert message == (
        f"models.mine: {NAME}: the hub refuses the token (401), which HF_TOKEN or `hf auth login` gave;"
        f" make one that may read it at {hub.url}/settings/tokens"
    )
    assert "hf_wrong" not in message


def test_a_renamed_repository_is_fetched_and_its_new_name_is_told(tmp_path, hub, capsys, monkeypatch):
    source = pinned(hub, "owner/old")
    hub.rename("owner/old", "owner/new")
    monkeypatch.setattr(module, "console", sys.stderr)
    download_source(tmp_path / "out", "models", "mine", source, MODEL)
    assert files_in(tmp_path / "out") == OF_MODEL | {"source.json"}
    line = "models.mine: the hub now calls owner/old owner/new; write that into its source\n"
    assert capsys.readouterr().err.endswith(line)


def test_pickled_weights_alone_are_refused(tmp_path, hub):
    files = {"config.json": b"{}", "pytorch_model.bin": b"pickled"}
    source = pinned(hub, files=files)
    assert refusal(tmp_path, "models", source) == (
        f"models.mine: {NAME} at {source['revision']} has no safetensors; pickled weights run code when they are loaded"
        " and are never taken: choose a revision or a repository that has safetensors"
    )


def test_patterns_that_match_nothing_are_told(tmp_path, hub):
    source = pinned(hub, kind="dataset")
    assert refusal(tmp_path, "datasets", source, ["*.csv", "*.jsonl"]) == (
        f"datasets.mine: {NAME} at {source['revision']} has no file like *.csv, *.jsonl; mend the source or 'files'"
    )


def test_a_cut_file_goes_on_where_it_stopped(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # bytes that are kept at a time, else ten million
    hub.fail("/objects/", method="GET", cut=600_000)
    download_source(tmp_path / "out", "models", "mine", pinned(hub, files={"model.safetensors": WEIGHTS}), MODEL)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS
    first, second = hub.asked("/objects/", method="GET")
    assert first.range == ""
    assert second.range == "bytes=600000-"


def test_after_a_lost_connection_the_next_start_fetches_only_what_is_missing(tmp_path, hub):
    source = pinned(hub)
    hub.fail("name=tokenizer.model", method="GET", cut=0, times=100)
    assert refusal(tmp_path, "models", source) == (
        f"models.mine: {NAME} cannot be fetched (peer closed connection without sending complete message body"
        " (received 0 bytes, expected 5)); is there a network? Start again to go on"
    )
    hub.faults.clear()
    hub.requests.clear()
    download_source(tmp_path / "out", "models", "mine", source, MODEL)
    assert {seen.query for seen in hub.asked("/objects/")} == {"name=tokenizer.model"}


@pytest.mark.parametrize(
    ("what", "how"),
    [("weights", {"text": "name=model.safetensors"}), ("a small file", {"text": "resolve/", "method": "GET"})],
)
def test_wrong_bytes_are_told_and_fetched_anew(tmp_path, hub, what, how):
    path = "model.safetensors" if what == "weights" else "config.json"
    source = pinned(hub, files={"config.json": b"{}", "model.safetensors": WEIGHTS})
    if what != "weights":
        how = {**how, "text": "resolve/" + source["revision"] + "/config.json"}
    hub.fail(**how, wrong=True)
    message = refusal(tmp_path, "models", source)
    assert f"models.mine: {NAME}: {path} is not what it should be: its SHA-256 is " in message
    assert "taken out of the hub's cache: start again, to fetch it anew" in message
    hub.requests.clear()
    download_source(tmp_path / "out", "models", "mine", source, MODEL)
    assert (tmp_path / "out" / path).read_bytes() == {"config.json": b"{}", "model.safetensors": WEIGHTS}[path]
    assert {Path(seen.path).name for seen in hub.asked("/resolve/")} == {path}


def test_a_file_that_is_not_as_locked_is_refused(tmp_path, hub):
    source = pinned(hub)
    files = {"model.safetensors": {"size": 1, "sha256": "0" * 64}}
    entry = {"hub": NAME, "asked": "main", "commit": source["revision"], "files": files}
    lock = tmp_path / "lock.yaml"
    lock.write_text(yaml.safe_dump({"models": {"mine": entry}}))
    assert f"its SHA-256 is {hashlib.sha256(WEIGHTS).hexdigest()}, stated is {'0' * 64};" in refusal(
        tmp_path, "models", source, lock=lock
    )
    entry["files"]["model.safetensors"]["sha256"] = hashlib.sha256(WEIGHTS).hexdigest()
    lock.write_text(yaml.safe_dump({"models": {"mine": entry}}))
    download_source(tmp_path / "out", "models", "mine", source, MODEL, lock)


def test_a_hub_that_asks_to_wait_is_given_the_time(tmp_path, hub, waits):
    source = pinned(hub)
    for text in ("/tree/", "name=model.safetensors"):
        hub.fail(text, status=429, headers={"Retry-After": "7"})
    download_source(tmp_path / "out", "models", "mine", source, MODEL)
    assert [seconds for seconds in waits if seconds > 5] == [8, 8], "a second longer than asked"


FAILING = {
    "too many requests": (429, "the hub asks for fewer requests (429); start again in some minutes, to go on"),
    "trouble": (503, "the hub has trouble (503); start again later, to go on"),
}


@pytest.mark.parametrize("text", ["/tree/", "/resolve/"])
@pytest.mark.parametrize(("status", "message"), FAILING.values(), ids=FAILING.keys())
def test_a_hub_that_keeps_failing_is_told(tmp_path, hub, status, message, text):
    source = pinned(hub)
    hub.fail(text, status=status, times=1000)
    assert refusal(tmp_path, "models", source) == f"models.mine: {NAME}: {message}"


def test_a_hub_that_fails_once_is_asked_again(tmp_path, hub):
    source = pinned(hub)
    for text in ("/tree/", "/config.json"):
        hub.fail(text, status=500)
    download_source(tmp_path / "out", "models", "mine", source, MODEL)
    assert files_in(tmp_path / "out") == OF_MODEL | {"source.json"}


def test_the_bytes_that_came_are_shown_on_a_terminal(tmp_path, hub, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(stage, "console", Terminal())
    monkeypatch.setattr(stage, "PROGRESS_SECONDS", 0.0)
    download_source(tmp_path / "out", "models", "mine", pinned(hub, files={"model.safetensors": WEIGHTS}), MODEL)
    last = stage.console.getvalue().splitlines()[-1]
    assert last == "  download: 1,024,000 of 1,024,000 bytes, 0 s left"


def test_no_network_is_told(tmp_path, hub):
    source = pinned(hub)
    hub.stop()
    message = refusal(tmp_path, "models", source)
    assert message.startswith(f"models.mine: {NAME} cannot be fetched (")
    assert "Connection refused" in message
    assert message.endswith("); is there a network? Start again to go on")


def test_offline_without_the_files_is_told(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = pinned(hub)
    assert refusal(tmp_path, "models", source) == (
        f"models.mine: {NAME} at {source['revision']} is not whole in the hub's cache, {tmp_path / 'cache'},"
        " and HF_HUB_OFFLINE is set; unset it once, to fetch what is missing"
    )
    assert not hub.requests


def full_disk(repository: str, cache: Path) -> str:
    return (
        f"models.mine: {repository}: no space left for the hub's cache, {cache};"
        " free some, or set HF_HOME to a folder on a larger disk, and start again"
    )


def test_a_full_disk_names_the_cache(tmp_path, hub, monkeypatch):
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = pinned(hub)
    monkeypatch.setattr(file_download, "http_get", full)
    assert refusal(tmp_path, "models", source) == full_disk(NAME, tmp_path / "cache")


def test_a_small_disk_fills_and_a_larger_one_goes_on(tmp_path, hub):
    cache = tmp_path / "cache"
    cache.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(cache)], check=False).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        source = pinned(hub)
        assert refusal(tmp_path, "models", source) == full_disk(NAME, cache)
        assert not list(cache.rglob("*.incomplete")), "half a file is no use"
        subprocess.run(["mount", "-o", "remount,size=4m", str(cache)], check=True)
        download_source(tmp_path / "out", "models", "mine", source, MODEL)
        assert (tmp_path / "out" / "model.safetensors").stat().st_nlink == 1, "the cache is on another disk: a copy"
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_the_variables_of_the_hub_are_honoured_and_the_token_is_seen_nowhere(tmp_path, hub):
    source = pinned(hub, private=True)
    (tmp_path / "token").write_text(TOKEN)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    values: dict[str, Any] = {"folder": "out", "kind": "models", "name": "mine", "source": source, "patterns": MODEL}
    options = [
        part
        for name, value in values.items()
        for part in (f"--{name}", json.dumps(value) if name in ("source", "patterns") else value)
    ]
    command = [sys.executable, str(ROOT / "scripts/download_source.py"), *options]
    for place in ({"HF_TOKEN": "hf_wrong"}, {"HF_TOKEN_PATH": str(tmp_path / "token")}):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**environment, **place},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert (done.returncode == 0) == ("HF_TOKEN_PATH" in place), done.stdout
        assert TOKEN not in done.stdout
        assert "hf_wrong" not in done.stdout
        assert "HTTP Request" not in done.stdout, "addresses of gated files open them"
    assert files_in(tmp_path / "out") == OF_MODEL | {"source.json"}
    assert list((tmp_path / "home/hub").rglob(hashlib.sha256(WEIGHTS).hexdigest()))
