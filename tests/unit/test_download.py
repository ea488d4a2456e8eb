"""A source is taken only as it is pinned; what the hub answers becomes one line. The hub here is a loopback server."""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from download_source import download_source
from qlora.errors import UserError
from qlora.files import read_json, sha256_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"old weights",
    "original/consolidated.safetensors": b"more weights",
    "tokenizer.model": b"words",
    "data/train-0.parquet": b"rows",
    "data/test-0.parquet": b"more rows",
    ".gitattributes": b"",
}
HUB = {"hub": "owner/name", "revision": COMMIT}


class Hub(BaseHTTPRequestHandler):
    """Lists and serves FILES as the hub does, or refuses with the server's `refusal`, a status and an error code."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        address = self.path.partition("?")[0]
        server: Any = self.server
        server.asked.append(address)
        if server.refusal:
            status, code = server.refusal
            self.answer(status, b"{}", {"X-Error-Code": code} if code else {})
        elif "/tree/" in address:
            assert address.endswith(f"/owner/name/tree/{COMMIT}")
            listing = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in FILES.items()
            ]
            self.answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
        else:
            _, _, path = address.partition(f"/resolve/{COMMIT}/")
            etag = hashlib.sha1(FILES[path]).hexdigest()
            self.answer(200, FILES[path], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET  # noqa: N815 the name that the server looks for

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub on the loopback device, which the hub's own client talks to; `asked` holds the addresses asked for."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.refusal, server.asked = None, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # as the stage does before it imports the client
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the client's retries
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def refusal(tmp_path: Path, kind: str, source: dict[str, str], patterns: list[str]) -> str:
    target = tmp_path / "sources" / "mine"
    with pytest.raises(UserError) as caught:
        download_source(target, kind, "mine", source, patterns)
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


@pytest.mark.parametrize("pin", [{"sha256": "0" * 64}, {}])
def test_changed_or_unpinned_local_file_is_refused_with_both_hashes(tmp_path, pin):
    given = tmp_path / "rows.csv"
    given.write_text("x\n1\n")
    assert refusal(tmp_path, "datasets", {"path": str(given), **pin}, []) == (
        f"datasets.mine: the SHA-256 of {given} is {sha256_of(given)}, pinned is {pin.get('sha256', 'none')};"
        " bring the pinned data back, or pin the new value if the change is meant"
    )


def test_unpinned_hub_source_is_refused_before_anything_is_asked(tmp_path, hub):
    assert refusal(tmp_path, "models", {"hub": "owner/name"}, []) == (
        "config: models.mine.source: not pinned; add 'revision:' with the commit, 40 hex digits, that is to be used"
    )
    assert not hub.asked


@pytest.mark.parametrize(
    ("kind", "patterns", "expected"),
    [
        ("models", [], {"config.json", "model.safetensors", "tokenizer.model"}),
        ("datasets", ["data/train-*.parquet", "data/test-*"], {"data/train-0.parquet", "data/test-0.parquet"}),
    ],
)
def test_what_is_needed_comes_from_the_hub_at_its_commit(tmp_path, hub, kind, patterns, expected):
    download_source(tmp_path / "out", kind, "mine", HUB, patterns)
    assert files_in(tmp_path / "out") == expected | {"source.json"}
    record = read_json(tmp_path / "out" / "source.json")
    assert record["source"] == HUB
    assert record["files"].keys() == expected
    for path in expected:
        assert not (tmp_path / "out" / path).is_symlink()
        assert (tmp_path / "out" / path).read_bytes() == FILES[path]
    listed, *fetched = hub.asked
    assert listed == f"/api/{kind}/owner/name/tree/{COMMIT}"
    assert {address.partition(f"/resolve/{COMMIT}/")[2] for address in fetched} == expected, "fetched more than is used"


@pytest.mark.usefixtures("hub")
def test_download_without_a_pattern_takes_all_files_of_a_dataset(tmp_path):
    download_source(tmp_path / "out", "datasets", "mine", HUB, [])
    assert files_in(tmp_path / "out") == FILES.keys() - {".gitattributes", "original/consolidated.safetensors"} | {
        "source.json"
    }


def test_what_was_fetched_once_is_not_fetched_again(tmp_path, hub):
    download_source(tmp_path / "one", "models", "mine", HUB, [])
    asked = len(hub.asked)
    shutil.rmtree(tmp_path / "one")
    hub.refusal = (500, "")
    download_source(tmp_path / "two", "models", "mine", HUB, [])
    assert len(hub.asked) == asked


@pytest.mark.usefixtures("hub")
def test_what_another_download_left_in_the_cache_is_not_taken(tmp_path):
    huggingface_hub.snapshot_download("owner/name", revision=COMMIT)
    download_source(tmp_path / "out", "models", "mine", HUB, [])
    assert files_in(tmp_path / "out") == {"config.json", "model.safetensors", "tokenizer.model", "source.json"}


REFUSED = {
    "no such repository": (404, "RepoNotFound", "is not on the hub, or private; mend the name, or set HF_TOKEN"),
    "no such commit": (404, "RevisionNotFound", f"has no commit {COMMIT}; pin one that it has"),
    "gated": (403, "GatedRepo", "is gated; accept its terms on its page on the hub, then set HF_TOKEN"),
}


@pytest.mark.parametrize(("status", "code", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_message_of_what_the_hub_refuses(tmp_path, hub, status, code, message):
    hub.refusal = (status, code)
    assert refusal(tmp_path, "models", HUB, []) == f"models.mine: owner/name {message}"


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "401"), (500, "500 Internal Server Error"), (None, "Connection refused")]
)
def test_other_failures_are_told_in_the_words_of_the_client(tmp_path, hub, status, reason):
    hub.refusal = (status, "")
    if status is None:
        hub.shutdown()
        hub.server_close()
    message = refusal(tmp_path, "models", HUB, [])
    assert message.startswith("models.mine: owner/name cannot be fetched (")
    assert reason in message
    assert message.endswith("); is there a network, and is HF_TOKEN good? Start again to go on")


@pytest.mark.usefixtures("hub")
def test_patterns_that_match_nothing_are_told(tmp_path):
    assert refusal(tmp_path, "datasets", HUB, ["*.csv", "*.jsonl"]) == (
        f"datasets.mine: owner/name at {COMMIT} has no file like *.csv, *.jsonl; mend the source or 'files'"
    )
