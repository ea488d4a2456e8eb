"""Stage `download`: a pinned model or dataset comes from the hub or from a local path, and is checked."""

from qlora.stage import log, run_stage

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from qlora.errors import UserError
from qlora.files import files_below, replacing, sha256_of, write_source_record

MODEL_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
]
NEVER = ["*.gguf", "original/*", "onnx/*", "*consolidated*"]


def download_source(folder: Path, kind: str, name: str, source: Mapping[str, str], patterns: list[str]) -> None:
    """Put a source's files and source.json (their SHA-256 and sizes) into `folder`.

    `kind` is models or datasets, `source` its entry in the config with hub and revision, or path and sha256;
    `patterns` are globs of the files that are needed from the hub, all where the list is empty.
    """
    if "hub" in source and "revision" not in source:
        raise UserError(
            f"config: {kind}.{name}.source: not pinned;"
            " add 'revision:' with the commit, 40 hex digits, that is to be used"
        )
    with replacing(folder) as scratch:
        scratch.mkdir()
        if "hub" in source:
            _from_hub(scratch, kind, name, source, patterns)
        else:
            _from_path(scratch, kind, name, source)
        write_source_record(scratch, source)


def _from_path(folder: Path, kind: str, name: str, source: Mapping[str, str]) -> None:
    path = Path(source["path"])
    found, pinned = sha256_of(path), source.get("sha256", "none")
    if found != pinned:
        raise UserError(
            f"{kind}.{name}: the SHA-256 of {path} is {found}, pinned is {pinned};"
            " bring the pinned data back, or pin the new value if the change is meant"
        )
    _copy(files_below(path), path if path.is_dir() else path.parent, folder)


def _from_hub(folder: Path, kind: str, name: str, source: Mapping[str, str], patterns: list[str]) -> None:
    repository, revision = source["hub"], source["revision"]
    wanted = patterns or (MODEL_FILES if kind == "models" else ["*"])
    log.info("downloading %s at %s", repository, revision)
    try:
        snapshot = snapshot_download(
            repository,
            repo_type=kind.removesuffix("s"),
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=NEVER,
        )
    except GatedRepoError as error:
        raise UserError(
            f"{kind}.{name}: {repository} is gated; accept its terms on its page on the hub, then set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{kind}.{name}: {repository} has no commit {revision}; pin one that it has") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{kind}.{name}: {repository} is not on the hub, or private; mend the name, or set HF_TOKEN"
        ) from error
    except (HTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{kind}.{name}: {repository} cannot be fetched ({reason});"
            " is there a network, and is HF_TOKEN good? Start again to go on"
        ) from error
    cached = {file.relative_to(snapshot).as_posix(): file for file in files_below(Path(snapshot))}
    files = [cached[path] for path in filter_repo_objects(cached, allow_patterns=wanted, ignore_patterns=NEVER)]
    if not files:
        raise UserError(
            f"{kind}.{name}: {repository} at {revision} has no file like {', '.join(wanted)};"
            " mend the source or 'files'"
        )
    _copy(files, Path(snapshot), folder)  # not all of the cache, which may hold what something else fetched


def _copy(files: Iterable[Path], source: Path, folder: Path) -> None:
    """Copy files below `source` into `folder`, each to the same place."""
    for file in files:
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


if __name__ == "__main__":
    run_stage(download_source)
