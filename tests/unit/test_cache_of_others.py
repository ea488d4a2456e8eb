"""What other programs put into the hub's cache is used where it is whole and right, and never taken for more."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import HubServer
from hub_sources import MODEL, NAME, WEIGHTS, files_in, pinned, refusal
from huggingface_hub import constants

from download_source import download_source

SHARDS = {"config.json": b"{}", "model-1.safetensors": b"first", "model-2.safetensors": b"second"}
PARTS = {"train-0.parquet": b"rows", "train-1.parquet": b"more rows"}


def offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def gone(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.stop()
    huggingface_hub.close_session()


def in_trouble(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fail("/", status=503, times=1000)


def refusing(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")


LOST = {
    offline: "is not known to be whole in the hub's cache",
    gone: "is there a network?",
    in_trouble: "the hub has trouble (503)",
    refusing: "the hub refuses the token (401)",
}


@pytest.mark.parametrize(("lost", "told"), LOST.items(), ids=[lost.__name__ for lost in LOST])
@pytest.mark.parametrize(
    ("kind", "files", "there", "patterns"),
    [
        ("dataset", PARTS, ["train-0.parquet"], ["train-*.parquet"]),
        ("model", SHARDS, ["config.json", "model-1.safetensors"], MODEL),
        ("model", SHARDS, ["config.json"], MODEL),
    ],
)
def test_a_part_is_not_taken_for_the_whole(
    tmp_path: Path,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    lost: Callable[[HubServer, pytest.MonkeyPatch], None],
    told: str,
    kind: str,
    files: dict[str, bytes],
    there: list[str],
    patterns: list[str],
) -> None:
    source = pinned(hub, files=files, kind=kind)
    for name in there:
        huggingface_hub.hf_hub_download(NAME, name, revision=source["revision"], repo_type=kind)
    lost(hub, monkeypatch)
    assert told in refusal(tmp_path, f"{kind}s", source, patterns)


def test_a_hub_that_is_lost_once_it_has_listed_its_files_is_told(tmp_path, hub):
    source = pinned(hub, files=SHARDS)
    huggingface_hub.hf_hub_download(NAME, "model-1.safetensors", revision=source["revision"])
    hub.fail("/tree/")  # is answered
    hub.fail("/", status=503, times=1000)
    assert refusal(tmp_path, "models", source) == (
        f"models.mine: {NAME} cannot be fetched (config.json did not come); is there a network? Start again to go on"
    )


def test_what_is_whole_needs_but_the_listing(tmp_path, hub):
    source = pinned(hub, files=SHARDS)
    for name in SHARDS:
        huggingface_hub.hf_hub_download(NAME, name, revision=source["revision"])
    hub.requests.clear()
    download_source(tmp_path / "out", "models", "mine", source, MODEL)
    assert not hub.asked("/resolve/")
    assert files_in(tmp_path / "out") == {*SHARDS, "source.json"}


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache on a disk that knows no symbolic links: files lie in the snapshot itself."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"], ids=["by its SHA-256", "by git's hash"])
@pytest.mark.parametrize("size", [len(WEIGHTS), 2 * len(WEIGHTS)], ids=["small", "large"])
def test_a_cache_without_symbolic_links_is_checked_too(tmp_path, hub, without_links, path, size):
    files = {"config.json": b"{}", "model.safetensors": (WEIGHTS * 2)[:size]}
    source = pinned(hub, files=files)
    hub.fail("/objects/" if path.startswith("model") else path, method="GET", wrong=True)
    assert f"{path} is not what it should be" in refusal(tmp_path, "models", source)
    download_source(tmp_path / "out", "models", "mine", source, MODEL)
    assert not list((tmp_path / "cache").rglob("snapshots/*/*/"))
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Makes the cache, a disk of its own, one that cannot be written."""
    cache = tmp_path / "cache"
    cache.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(cache)], check=False).returncode:
        pytest.skip("only root can mount a disk")
    yield lambda: subprocess.run(["mount", "-o", "remount,ro", str(cache)], check=True) and None
    subprocess.run(["umount", str(cache)], check=True)


@pytest.mark.parametrize("weights", [WEIGHTS, WEIGHTS * 2], ids=["small", "large"])
def test_a_cache_that_cannot_be_written_is_told(tmp_path, hub, read_only, weights):
    source = pinned(hub, files={"model.safetensors": weights})
    read_only()
    message = refusal(tmp_path, "models", source)
    assert message.startswith(
        f"models.mine: {NAME}: the hub's cache, {tmp_path / 'cache'}, cannot be used ([Errno 30] Read-only"
    )
    assert message.endswith("); set HF_HOME to a folder that you may write, and start again")


def test_a_cache_that_cannot_be_written_is_used_where_it_is_whole(tmp_path, hub, read_only):
    source = pinned(hub, files=SHARDS)
    for name in SHARDS:
        huggingface_hub.hf_hub_download(NAME, name, revision=source["revision"])
    read_only()
    download_source(tmp_path / "out", "models", "mine", source, MODEL)
    assert files_in(tmp_path / "out") == {*SHARDS, "source.json"}
