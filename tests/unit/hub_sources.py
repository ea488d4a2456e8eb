"""Sources on the loopback hub, and what a download of one leaves or says."""

from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

from download_source import download_source
from qlora.errors import UserError
from qlora.pins import needed_files

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
