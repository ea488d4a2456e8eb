"""Stage `download`: a pinned model or dataset comes from the hub or from a local path, and is checked."""

from qlora.stage import Progress, console, log, run_stage

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.utils import filter_repo_objects, tqdm

from qlora.errors import UserError
from qlora.files import files_below, read_json, replacing, sha256_of, write_source_record
from qlora.hub import HUB_ERRORS, ListedFile, asked_listing, cached_listing, checked_token, explained
from qlora.large_files import fetch_large, remove_left_over
from qlora.pins import BRANCH, is_commit, lock_entry, read_lock, unwanted

READ_ONLY = 0o444
BAR_OF_BYTES = "huggingface_hub.snapshot_download"  # what the client calls it


def download_source(
    folder: Path, kind: str, name: str, source: Mapping[str, Any], patterns: list[str], lock: Path | None = None
) -> None:
    """Put a source's files and source.json (their SHA-256 and sizes) into `folder`.

    `kind` is models or datasets, `source` its entry in the config with hub and revision, or path and sha256;
    `patterns` are globs of the files that are needed from the hub. Each of these must have the hash that the hub and
    `lock`, the file that `make pin` writes, state for it.
    """
    revision = source.get("revision", BRANCH)
    if "hub" in source and not is_commit(revision):
        raise UserError(
            f"config: {kind}.{name}.source: not pinned; run `make pin NAME={name}`, which finds the commit of"
            f" '{revision}' on the hub, or write the commit, 40 hex digits, as its 'revision'"
        )
    with replacing(folder) as scratch:
        scratch.mkdir()
        if "hub" in source:
            _from_hub(scratch, kind, name, source, patterns, lock)
        else:
            _from_path(scratch, kind, name, source)
            write_source_record(scratch, source)


def _from_path(folder: Path, kind: str, name: str, source: Mapping[str, Any]) -> None:
    path = Path(source["path"])
    found, pinned = sha256_of(path), source.get("sha256", "none")
    if found != pinned:
        raise UserError(
            f"{kind}.{name}: the SHA-256 of {path} is {found}, pinned is {pinned};"
            " bring the pinned data back, or pin the new value if the change is meant"
        )
    below = path if path.is_dir() else path.parent
    for file in files_below(path):
        if file == path / "source.json":  # what an earlier download said of the folder: ours says it anew
            log.info("%s is left out", file)
        elif file.name == "source.json" and file.parent == below:
            raise UserError(f"{kind}.{name}: {file}: this name is that of the workflow's own record; rename the file")
        else:
            shutil.copyfile(file, _place(file, below, folder))


def _from_hub(
    folder: Path, kind: str, name: str, source: Mapping[str, Any], patterns: list[str], lock: Path | None
) -> None:
    repository, revision = source["hub"], source["revision"]
    what = f"{kind}.{name}: {repository}"
    log.info("downloading %s at %s", repository, revision)
    checked_token()
    locked = lock_entry(read_lock(lock), kind, name, source) if lock else None
    try:
        listed = cached_listing(repository, kind, revision) or asked_listing(repository, kind, revision)
        files = _needed(listed, kind, name, source, patterns)
        if locked:
            _check_lock(files, locked["files"], what, f"`make pin NAME={name}`")
        snapshot = _snapshot(files, kind, source, patterns, what)
    except HUB_ERRORS as error:
        raise UserError(f"{kind}.{name}: {explained(error, kind, repository, revision)}") from error
    now = _name_now(kind, repository)
    if now != repository:
        line = f"{kind}.{name}: the hub now calls {repository} {now}; write that into its source"
        log.warning(line)
        print(line, file=console, flush=True)
    cached = [snapshot / file.path for file in files]
    remove_left_over(cached)
    _link(cached, snapshot, folder)
    write_source_record(folder, source)
    _check(files, folder, snapshot, what)


def _snapshot(
    files: Iterable[ListedFile], kind: str, source: Mapping[str, Any], patterns: list[str], what: str
) -> Path:
    """The folder of the hub's cache in which the needed files now are; what is there already is not fetched.

    Raises the client's errors, and OSError where a file is missing: without a hub, the client is content with less.
    """
    repository, revision = source["hub"], source["revision"]
    if constants.HF_HUB_DISABLE_XET:
        fetch_large(files, repository, kind, revision, _Lines(name=BAR_OF_BYTES), what)
    snapshot = Path(
        snapshot_download(
            repository,
            repo_type=kind.removesuffix("s"),
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=unwanted(source),
            tqdm_class=_Lines,
        )
    )
    for file in files:
        if not (snapshot / file.path).exists():
            raise OSError(f"{file.path} did not come")
    return snapshot


class _Lines(tqdm):
    """The client's bars as lines on the terminal, where several jobs may write, and nothing in the job's log."""

    def __init__(self, *arguments: Any, name: str | None = None, **options: Any) -> None:
        super().__init__(*arguments, name=name, **{**options, "disable": True})
        self.progress = Progress(0, "download", "bytes") if name == BAR_OF_BYTES else None
        self.done = 0

    def update(self, n: float | None = 1) -> None:
        """Count what came; the total grows as further files begin."""
        if self.progress:
            self.done += int(n or 0)
            self.progress.total = int(self.total)
            self.progress.update(self.done)


def _name_now(kind: str, repository: str) -> str:
    """What the hub, which redirects from old names, calls a repository; its old name where the hub is not there."""
    try:
        return HfApi().repo_info(repository, repo_type=kind.removesuffix("s"), expand="sha", timeout=10).id
    except HUB_ERRORS as error:
        log.info("not asked for the name of %s: %s", repository, error)
        return repository


def _needed(
    listed: Iterable[ListedFile], kind: str, name: str, source: Mapping[str, Any], patterns: list[str]
) -> list[ListedFile]:
    """The needed files of those that the hub lists."""
    ignored = unwanted(source)
    wanted = filter_repo_objects(listed, allow_patterns=patterns, ignore_patterns=ignored, key=lambda file: file.path)
    files = list(wanted)
    where = f"{kind}.{name}: {source['hub']} at {source['revision']}"
    if kind == "models" and not any(file.path.endswith(".safetensors") for file in files):
        raise UserError(
            f"{where} has no safetensors; pickled weights run code when they are loaded and are never taken:"
            " choose a revision or a repository that has safetensors"
        )
    if source.get("remote_code") and not any(file.path.endswith(".py") for file in files):
        raise UserError(f"{where} has no code (.py); leave out 'remote_code'")
    if not files:
        raise UserError(f"{where} has no file like {', '.join(patterns)}; mend the source or 'files'")
    return files


def _check_lock(files: Iterable[ListedFile], locked: Mapping[str, Mapping[str, Any]], what: str, mend: str) -> None:
    """Raise UserError for the first file for which the hub states another SHA-256 than the lock holds."""
    for file in files:
        held, stated = locked.get(file.path, {}).get("sha256"), file.sha256 or "none"
        if held not in (None, stated):
            raise UserError(
                f"{what}: {file.path} has the SHA-256 {held} in the lock, and {stated} in the hub's listing"
                f" of the same commit; find out why, then take what the hub says now with {mend}"
            )


def _link(files: Iterable[Path], snapshot: Path, folder: Path) -> None:
    """Put files of the cache into `folder` without a second copy, or as copies where its disk is another.

    A linked file is one with the cache's: it becomes read-only, so that nobody changes the cache through it.
    """
    for file in files:
        target, blob = _place(file, snapshot, folder), file.resolve()
        try:
            os.link(blob, target)
            target.chmod(READ_ONLY)
            log.info("%s: linked to the hub's cache", target.name)
        except OSError as error:  # another disk, a file system without links, or another user's cache
            target.unlink(missing_ok=True)
            shutil.copyfile(blob, target)
            log.info("%s: copied from the hub's cache (%s)", target.name, error.strerror)


def _place(file: Path, below: Path, folder: Path) -> Path:
    """Where in `folder` a file goes, as it lies below another folder; makes the folders on the way."""
    target = folder / file.relative_to(below)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _check(files: Iterable[ListedFile], folder: Path, snapshot: Path, what: str) -> None:
    """Raise UserError for the first file that is not as stated, and take it out of the cache, so it is fetched anew.

    The hub states a SHA-256 for large files and git's hash for others.
    """
    found = read_json(folder / "source.json")["files"]
    for file in files:
        stated = file.sha256 or file.git_hash
        here = found[file.path]["sha256"] if file.sha256 else _git_hash(folder / file.path)
        if here != stated:
            wrong = f"{what}: {file.path} is not what it should be: its hash is {here}, stated is {stated}"
            try:
                _drop(snapshot / file.path, snapshot.parents[1] / "blobs" / stated)
            except OSError as error:
                raise UserError(
                    f"{wrong}; it cannot be taken out of the hub's cache ({error}): remove it there, or set HF_HOME to"
                    " a folder that you may write, and start again"
                ) from error
            raise UserError(f"{wrong}; it was taken out of the hub's cache: start again, to fetch it anew")


def _git_hash(path: Path) -> str:
    """The hash by which git, and so the hub, names a small file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _drop(cached: Path, blob: Path) -> None:
    """Take a file of a snapshot out of the hub's cache, and the blob that it leads to, or is a copy of."""
    for path in (cached.resolve(), cached, blob):
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    run_stage(download_source)
