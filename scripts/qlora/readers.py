"""Rows of a user's file, whatever its kind, with the place of each for messages about it."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from qlora.errors import UserError

Row = dict[str, Any]
BATCH_ROWS = 1024
csv.field_size_limit(1 << 30)  # characters; the module's own limit of 131,072 is less than a long document


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield (number, row) from a JSONL, JSON, CSV, TSV, Parquet or Arrow file; the first row is number 1.

    Raises UserError that names the file, the row and what to mend.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: unknown kind of file '{path.suffix}'; known: {', '.join(sorted(READERS))}")
    number = 0
    try:
        for row in reader(path):
            number += 1
            yield number, row
    except UnicodeDecodeError as error:
        line = _line_outside_utf8(path)
        raise UserError(f"{path}, line {line}: not UTF-8; convert the file, e.g. with iconv") from error
    except (csv.Error, pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}, after row {number}: cannot be read ({str(error).splitlines()[0]})") from error
    if not number:
        raise UserError(f"{path}: has no rows")


def _line_outside_utf8(path: Path) -> int:
    """Number of the first line that is not UTF-8; decoding runs ahead of the rows, so they do not tell."""
    number = 1
    with path.open("rb") as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError:
                break
            number += 1
    return number


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line.rstrip())
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
                yield _as_object(row, path, number)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: must hold a list of objects")
    for number, row in enumerate(rows, start=1):
        yield _as_object(row, path, number)


def _as_object(row: Any, path: Path, number: int) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{path}, row {number}: must be an object with columns, is {type(row).__name__}")
    return row


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter=delimiter, strict=True), start=1):
            if None in row or None in row.values():
                raise UserError(f"{path}, row {number}: has another number of fields than the header line")
            yield row


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_csv(path, delimiter="\t")


def _read_parquet(path: Path) -> Iterator[Row]:
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(BATCH_ROWS):
        yield from batch.to_pylist()


def _read_arrow(path: Path) -> Iterator[Row]:
    with pyarrow.memory_map(str(path)) as source:
        for batch in pyarrow.ipc.open_stream(source):
            yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
