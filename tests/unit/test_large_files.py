"""A download of large files ends when it is told to, and the next start goes on where any stop came."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer
from hub_sources import MODEL, NAME, WEIGHTS, files_in, pinned, refusal
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock

from download_source import download_source
from qlora import large_files, stage

ROOT = Path(__file__).parents[2]
HASH = hashlib.sha256(WEIGHTS).hexdigest()
PIECE = constants.DOWNLOAD_CHUNK_SIZE  # bytes that the client hands over at a time
SHARDS = {f"model-{number}.safetensors": bytes([number]) * (PIECE * 3 // 2) for number in (1, 2)}
real_sleep = time.sleep  # the fixture `waits` replaces it


@pytest.fixture
def blobs(tmp_path: Path) -> Path:
    """Where the cache holds the files of the repository."""
    folder = tmp_path / "cache" / "models--owner--name" / "blobs"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def weights(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The source of a repository whose one file is large, as it were, and comes in small pieces."""
    monkeypatch.setattr(large_files, "LARGE", len(WEIGHTS) - 1)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    return pinned(hub, files={"model.safetensors": WEIGHTS})


def ranges(hub: HubServer) -> list[str]:
    """The ranges of large files that were asked for since the last time."""
    asked = [seen.range for seen in hub.asked("/objects/", method="GET")]
    hub.requests.clear()
    return asked


def begun(tmp_path: Path) -> list[int]:
    """The sizes of the files in the cache that are not whole."""
    return [path.stat().st_size for path in (tmp_path / "cache").rglob("*.incomplete")]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        real_sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stop_waits_for_no_file_and_the_next_start_goes_on(tmp_path, hub, number):
    source = pinned(hub, files={**SHARDS, "config.json": b"{}"})
    hub.fail("/objects/", method="GET", held=PIECE, times=100)
    options = {"folder": "out", "kind": "models", "name": "mine", "source": source, "patterns": MODEL}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}
    process = subprocess.Popen(
        [sys.executable, ROOT / "scripts/download_source.py", *(f"--{name}={text}" for name, text in texts.items())],
        cwd=tmp_path,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: begun(tmp_path) == [PIECE, PIECE])
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else -signal.SIGINT)
    assert ranges(hub) == ["", ""], "it waited for the files, which a server that gives no more keeps"
    if number != signal.SIGKILL:
        assert errors.splitlines()[-1] == "download_source: error: interrupted; start again to go on"
        assert not list(tmp_path.glob("*out*"))
    hub.faults.clear()
    download_source(tmp_path / "out", "models", "mine", source, MODEL)
    assert ranges(hub) == [f"bytes={PIECE}-"] * 2
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in SHARDS.items())
    assert begun(tmp_path) == []


def test_after_trouble_of_the_hub_the_next_start_goes_on(tmp_path, hub, weights):
    hub.fail("/objects/", method="GET", cut=600_000)
    hub.fail("/objects/", method="GET", status=503)
    assert refusal(tmp_path, "models", weights) == (
        f"models.mine: {NAME}: the hub has trouble (503); start again later, to go on"
    )
    assert ranges(hub) == ["", "bytes=600000-"]
    download_source(tmp_path / "out", "models", "mine", weights, MODEL)
    assert ranges(hub) == ["bytes=600000-"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_file_that_only_xet_transfers_is_told(tmp_path, hub, weights, monkeypatch):
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", len(WEIGHTS) - 1)
    assert refusal(tmp_path, "models", weights) == (
        f"models.mine: {NAME}: model.safetensors has 1,024,000 bytes, and one of over 1,023,999 comes by Xet alone:"
        " start again with HF_HUB_DISABLE_XET=0"
    )
    assert ranges(hub) == []


def test_a_full_disk_keeps_what_came_and_a_larger_one_goes_on(tmp_path, hub, weights):
    cache = tmp_path / "cache"
    cache.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(cache)], check=False).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        assert "no space left for the hub's cache" in refusal(tmp_path, "models", weights)
        (there,) = begun(tmp_path)
        assert there > 0
        hub.requests.clear()
        subprocess.run(["mount", "-o", "remount,size=4m", str(cache)], check=True)
        download_source(tmp_path / "out", "models", "mine", weights, MODEL)
        assert ranges(hub) == [f"bytes={there}-"]
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_a_wrong_beginning_ends_in_a_fresh_download(tmp_path, hub, weights, blobs):
    (blobs / f"{HASH}.incomplete").write_bytes(b"x" * 600_000)
    assert "model.safetensors is not what it should be" in refusal(tmp_path, "models", weights)
    assert ranges(hub) == ["bytes=600000-"]
    download_source(tmp_path / "out", "models", "mine", weights, MODEL)
    assert ranges(hub) == [""]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS


def test_what_is_still_to_come_is_shown_on_a_terminal(tmp_path, hub, weights, blobs, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(stage, "console", Terminal())
    monkeypatch.setattr(stage, "PROGRESS_SECONDS", 0.0)
    (blobs / f"{HASH}.incomplete").write_bytes(WEIGHTS[:24_000])
    download_source(tmp_path / "out", "models", "mine", weights, MODEL)
    last = stage.console.getvalue().splitlines()[-1]
    assert last == "  download: 1,000,000 of 1,000,000 bytes, 0 s left"


def test_large_files_are_asked_for_as_they_are(tmp_path, hub, weights):
    """A range of what was compressed on the way is no range of the file."""
    download_source(tmp_path / "out", "models", "mine", weights, MODEL)
    assert [seen.encoding for seen in hub.asked("/objects/", method="GET")] == ["identity"]


def test_a_token_goes_to_the_hub_alone(tmp_path, hub, weights, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repositories[NAME].private = True
    download_source(tmp_path / "out", "models", "mine", weights, MODEL)
    assert {seen.authorization for seen in hub.asked("/resolve/")} == {f"Bearer {TOKEN}"}
    assert {seen.authorization for seen in hub.asked("/objects/")} == {""}, "files lie on another host"


def test_a_beginning_that_is_longer_than_the_file_is_dropped(tmp_path, hub, weights, blobs):
    (blobs / f"{HASH}.incomplete").write_bytes(WEIGHTS + b"x")
    download_source(tmp_path / "out", "models", "mine", weights, MODEL)
    assert ranges(hub) == [""]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS


def test_what_is_whole_already_but_for_its_name_is_not_asked_for(tmp_path, hub, weights, blobs):
    (blobs / f"{HASH}.incomplete").write_bytes(WEIGHTS)
    download_source(tmp_path / "out", "models", "mine", weights, MODEL)
    assert ranges(hub) == []
    assert (tmp_path / "out" / "model.safetensors").samefile(blobs / HASH)


def test_what_killed_downloads_left_goes_once_the_file_is_whole(tmp_path, hub, weights, blobs):
    others = blobs / f"{'0' * 64}.12345678.incomplete"  # of a file that is not wanted here
    for path in (others, blobs / f"{HASH}.12345678.incomplete", blobs / f"{HASH}.9abcdef0.incomplete"):
        path.write_bytes(b"x")
    download_source(tmp_path / "out", "models", "mine", weights, MODEL)
    assert files_in(blobs) == {HASH, others.name}


def test_what_a_process_at_work_has_begun_stays(tmp_path, hub, weights, blobs):
    download_source(tmp_path / "one", "models", "mine", weights, MODEL)
    beginning = blobs / f"{HASH}.12345678.incomplete"
    beginning.touch()
    with WeakFileLock(tmp_path / "cache" / ".locks" / "models--owner--name" / f"{HASH}.lock"):
        download_source(tmp_path / "two", "models", "mine", weights, MODEL)
        assert beginning.exists()
    download_source(tmp_path / "three", "models", "mine", weights, MODEL)
    assert not beginning.exists()
