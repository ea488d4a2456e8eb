"""What goes wrong on the way from the hub is a line that says what to do, and the next start goes on."""

import errno
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import TOKEN
from hub_sources import FILES, MODEL, NAME, OF_MODEL, WEIGHTS, files_in, pinned, refusal
from huggingface_hub import constants, file_download

import download_source as module
from download_source import download_source

REFUSED = {
    "no such repository": (
        {"hub": "owner/none", "revision": "0" * 40},
        "owner/none is not on the hub, or private; mend the name,"
        " or set HF_TOKEN to a token that may read it, or store one with `.venv/bin/hf auth login`",
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
        " then set HF_TOKEN to a token of that account, or store one with `.venv/bin/hf auth login`"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.accepted[TOKEN].add("owner/gated")
    download_source(tmp_path / "out", f"{kind}s", "mine", source, MODEL)


def test_a_token_that_the_hub_does_not_know(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refusal(tmp_path, "models", pinned(hub))
    assert message == (
        f"models.mine: {NAME}: the hub refuses the token (401), which HF_TOKEN or `.venv/bin/hf auth login` gave;"
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


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"], ids=["by its SHA-256", "by git's hash"])
def test_wrong_bytes_are_told_and_fetched_anew(tmp_path, hub, path):
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    source = pinned(hub, files=files)
    hub.fail("/objects/" if path.startswith("model") else path, method="GET", wrong=True)
    message = refusal(tmp_path, "models", source)
    assert message.startswith(f"models.mine: {NAME}: {path} is not what it should be: its hash is ")
    assert message.endswith("; it was taken out of the hub's cache: start again, to fetch it anew")
    hub.requests.clear()
    download_source(tmp_path / "out", "models", "mine", source, MODEL)
    assert (tmp_path / "out" / path).read_bytes() == files[path]
    assert {Path(seen.path).name for seen in hub.asked("/resolve/")} == {path}


def test_a_file_that_is_not_as_locked_is_refused_and_stays_in_the_cache(tmp_path, hub):
    source = pinned(hub)
    download_source(tmp_path / "first", "models", "mine", source, MODEL)
    found = hashlib.sha256(WEIGHTS).hexdigest()
    files = {"model.safetensors": {"size": 1, "sha256": "0" * 64}}
    entry = {"hub": NAME, "asked": "main", "commit": source["revision"], "files": files}
    lock = tmp_path / "lock.yaml"
    lock.write_text(yaml.safe_dump({"models": {"mine": entry}}))
    hub.requests.clear()
    assert refusal(tmp_path, "models", source, lock=lock) == (
        f"models.mine: {NAME}: model.safetensors has the SHA-256 {'0' * 64} in the lock, and {found}"
        " in the hub's listing of the same commit; find out why, then take what the hub says now with"
        " `make pin NAME=mine`"
    )
    files["model.safetensors"]["sha256"] = found
    lock.write_text(yaml.safe_dump({"models": {"mine": entry}}))
    download_source(tmp_path / "out", "models", "mine", source, MODEL, lock)
    assert not hub.asked("/resolve/")


def test_a_hub_that_asks_to_wait_is_given_the_time(tmp_path, hub, waits):
    source = pinned(hub)
    for text in ("/tree/", "name=model.safetensors"):
        hub.fail(text, status=429, headers={"Retry-After": "7"})
    download_source(tmp_path / "out", "models", "mine", source, MODEL)
    assert [seconds for seconds in waits if seconds > 5] == [8, 8], "a second longer than asked"


FAILING = {
    "too many requests": (429, "the hub asks for fewer requests (429); start again in some minutes, to go on"),
    "trouble": (503, "the hub has trouble (503); start again later, to go on"),
    "a token without the right": (
        403,
        "the hub refuses the token (403), which HF_TOKEN or `.venv/bin/hf auth login` gave;"
        " make one that may read it at {hub}/settings/tokens",
    ),
}


@pytest.mark.parametrize("text", ["/tree/", "/resolve/"])
@pytest.mark.parametrize(("status", "message"), FAILING.values(), ids=FAILING.keys())
def test_a_hub_that_keeps_failing_is_told(tmp_path, hub, monkeypatch, status, message, text):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    source = pinned(hub)
    hub.fail(text, status=status, times=1000)
    assert refusal(tmp_path, "models", source) == f"models.mine: {NAME}: {message.format(hub=hub.url)}"


def test_a_refusal_of_the_storage_blames_no_token(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    source = pinned(hub)
    hub.fail("/objects/", status=403, times=1000)
    assert refusal(tmp_path, "models", source) == (
        f"models.mine: {NAME}: localhost, where the hub stores its files, refuses to give them (403); look whether a"
        " proxy or a firewall keeps you from there, and start again, to go on"
    )


@pytest.mark.parametrize("text", ["/tree/", "/resolve/"])
def test_a_refusal_where_there_is_no_token_asks_for_one(tmp_path, hub, text):
    source = pinned(hub)
    hub.fail(text, status=403, times=1000)
    assert refusal(tmp_path, "models", source) == (
        f"models.mine: {NAME}: the hub refuses those without a token (403);"
        " set HF_TOKEN, or store one with `.venv/bin/hf auth login`"
    )


def test_a_hub_that_fails_once_is_asked_again(tmp_path, hub):
    source = pinned(hub)
    for text in ("/tree/", "/config.json"):
        hub.fail(text, status=500)
    download_source(tmp_path / "out", "models", "mine", source, MODEL)
    assert files_in(tmp_path / "out") == OF_MODEL | {"source.json"}


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
        f"models.mine: {NAME} at {source['revision']} is not known to be whole in the hub's cache, {tmp_path / 'cache'},"
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


def test_another_s_cache_is_told(tmp_path, hub, monkeypatch):
    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "cache/blob"))

    source = pinned(hub)
    monkeypatch.setattr(file_download, "http_get", refuse)
    assert refusal(tmp_path, "models", source) == (
        f"models.mine: {NAME}: the hub's cache, {tmp_path / 'cache'}, cannot be used ([Errno 13]"
        f" Permission denied: '{tmp_path / 'cache/blob'}'); set HF_HOME to a folder that you may write, and start again"
    )


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
