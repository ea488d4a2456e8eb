"""Which files of a hub source are needed, and what config/sources.lock.yaml, which `make pin` writes, says of it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qlora.errors import UserError

Entry = Mapping[str, Any]
BRANCH = "main"  # what is asked for where a source names no revision
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
)
NEVER = (
    *("*.gguf", "original/*", "onnx/*", "*consolidated*"),  # other copies of the same weights
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"),  # would run code when they are loaded
    *(".*", "*/.*"),  # hidden files, which hold settings of tools
    "source.json",  # the name of our own record beside the files
)
CODE = "*.py"  # of a model whose source has `remote_code`, and of no other


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit, which never moves, and no branch or tag."""
    return re.fullmatch("[0-9a-f]{40}", revision) is not None


def needed_files(kind: str, item: Entry) -> list[str]:
    """Globs of the files that a model or a dataset needs of its hub repository; what is `unwanted` goes off them.

    `kind` is models or datasets, `item` the entry in the config. All files of a dataset that names none.
    """
    if kind == "models":
        return [*MODEL_FILES, *([CODE] if item.get("source", {}).get("remote_code") else [])]
    if "files" not in item:
        return ["*"]
    database = item.get("database", {}).get("file")
    return [*item["files"].values(), *([database] if database else [])]


def unwanted(source: Entry) -> list[str]:
    """Globs of the files that are never taken from a hub source."""
    return [*NEVER, *([] if source.get("remote_code") else [CODE])]


def read_lock(path: Path) -> dict[str, dict[str, Entry]]:
    """The lock, models or datasets → name → entry; empty where there is no file.

    Raises UserError where it cannot be read.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    except yaml.YAMLError as error:
        raise UserError(
            f"{path}: cannot be read as YAML; delete it and run `make pin`, which writes it anew"
        ) from error
    return {kind: dict((found or {}).get(kind) or {}) for kind in ("models", "datasets")}


def lock_entry(lock: Mapping[str, Mapping[str, Entry]], kind: str, name: str, source: Entry) -> Entry | None:
    """What the lock holds of a hub source; None where that is nothing, or of another repository or revision."""
    entry = lock[kind].get(name)
    if entry is None or entry["hub"] != source["hub"]:
        return None
    return entry if source.get("revision", BRANCH) in (entry["asked"], entry["commit"]) else None


def with_locked_commits(config: Mapping[str, Any], lock: Mapping[str, Mapping[str, Entry]]) -> dict[str, Any]:
    """The configuration in which each hub source that the lock holds has its commit as `revision`."""
    full = dict(config)
    for kind in ("models", "datasets"):
        full[kind] = {name: _with_commit(lock, kind, name, item) for name, item in config[kind].items()}
    return full


def _with_commit(lock: Mapping[str, Mapping[str, Entry]], kind: str, name: str, item: Entry) -> Entry:
    entry = lock_entry(lock, kind, name, item["source"]) if "hub" in item["source"] else None
    return {**item, "source": {**item["source"], "revision": entry["commit"]}} if entry else item
