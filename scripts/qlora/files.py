"""Reading and writing files so that an output is there whole or not at all."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from qlora.errors import UserError

READERS = 8  # files that are hashed at a time


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` for a file or a folder, and rename it onto `path` at success.

    On any error the temporary is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        temporary = Path(scratch) / path.name
        yield temporary
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file, several at a time: a base of 7 billion weights takes 10 s on one core."""
    with ThreadPool(READERS) as pool:  # unlike an executor's, its threads hold up no process that is told to stop
        return pool.map(sha256_of_file, paths, chunksize=1)


def files_below(path: Path) -> list[Path]:
    """The file itself, or all files below a folder in the order of their relative POSIX paths; dot files left out."""
    if path.is_file():
        return [path]
    below = (file for file in path.rglob("*") if file.is_file())
    seen = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    return sorted(seen, key=lambda file: file.relative_to(path).as_posix())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, or of a folder: then over a line `<sha256>  <relative path>` a file, as `sha256sum` prints."""
    if path.is_file():
        return sha256_of_file(path)
    lines = [f"{sha256_of_file(file)}  {file.relative_to(path).as_posix()}\n" for file in files_below(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file that this workflow wrote, one a line."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not JSON ({error.msg}); delete the file to make it anew"
                ) from error


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows one a line, whole or not at all; returns how many."""
    count = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def check_files(folder: Path, hashes: Mapping[str, str], record: str) -> None:
    """Raise UserError that names the first file of a folder that has not the SHA-256 that the file `record` notes."""
    there = {name: folder / name for name in hashes if (folder / name).is_file()}
    found = dict(zip(there, sha256_of_files(list(there.values())), strict=True))
    for name, noted in sorted(hashes.items()):
        if found.get(name) != noted:
            raise UserError(
                f"{folder / name} is not the file that {record} names; delete {folder} and run snakemake again,"
                " which makes it anew"
            )


@contextmanager
def meanwhile(check: Callable[[], None]) -> Iterator[None]:
    """Run `check` beside the block, and end with what it raises, whatever the block made of bad files.

    A request to stop is not kept waiting.
    """
    with ThreadPool(1) as pool:
        checked = pool.apply_async(check)
        try:
            yield
        except Exception:
            checked.get()
            raise
        checked.get()


def check_source(folder: Path) -> None:
    """Raise UserError where a file of a source is not the one that its source.json names."""
    files = read_json(folder / "source.json")["files"]
    check_files(folder, {name: file["sha256"] for name, file in files.items()}, "source.json")


def write_source_record(folder: Path, source: Mapping[str, object]) -> None:
    """Write source.json into a folder: where its files came from, and each one's SHA-256 and size in bytes."""
    paths = files_below(folder)
    files = {
        file.relative_to(folder).as_posix(): {"sha256": digest, "size": file.stat().st_size}
        for file, digest in zip(paths, sha256_of_files(paths), strict=True)
    }
    write_json(folder / "source.json", {"source": dict(source), "files": files})
