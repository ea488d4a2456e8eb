"""Rows of a user's file, whatever its kind, with the place of each for messages about it."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from qlora.errors import UserError

Row = dict[str, Any]
BATCH_ROWS = 1024
READ_BYTES = 1 << 20  # of a column, at a time
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
ARROW_FILE = b"ARROW1"  # how Arrow's file format begins; its stream format has no such mark
csv.field_size_limit(1 << 30)  # characters; the module's own limit of 131,072 is less than a long document


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield (number, row) from a JSONL, JSON, CSV, TSV, Parquet or Arrow file; the first row is number 1.

    The text kinds may be compressed (.gz, .zst). Raises UserError that names the file, the row and what to mend.
    """
    endings = [suffix.lower() for suffix in path.suffixes]
    if endings and endings[-1] in COMPRESSED:
        endings.pop()
    kind = endings[-1] if endings else ""
    if kind not in READERS or (kind in BINARY and path.suffix.lower() in COMPRESSED):
        raise UserError(
            f"{path}: unknown kind of file '{path.suffix}'; known: {', '.join(sorted(READERS))},"
            " and texts with .gz or .zst behind it"
        )
    number = 0
    try:
        for row in READERS[kind](path):
            number += 1
            yield number, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, {_outside_utf8(path)}: not UTF-8; convert the file, e.g. with iconv") from error
    except (csv.Error, pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}, after row {number}: cannot be read ({str(error).splitlines()[0]})") from error
    if not number:
        raise UserError(f"{path}: has no rows")


def _open_bytes(path: Path) -> Any:
    """The bytes of a file as they are, or decompressed."""
    return pyarrow.input_stream(str(path), compression=COMPRESSED.get(path.suffix.lower()))


def _open_text(path: Path, newline: str | None = None) -> TextIO:
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", newline=newline)


def _outside_utf8(path: Path) -> str:
    """The first place in a file of text that is not UTF-8; decoding runs ahead of the rows, so they do not tell."""
    with io.BufferedReader(_open_bytes(path)) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}, byte {error.start + 1}"
    return "at its end"


def _read_jsonl(path: Path) -> Iterator[Row]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line.rstrip())
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
                except (ValueError, RecursionError) as error:  # an integer of thousands of digits; too deep a nesting
                    raise UserError(f"{path}, line {number}: cannot be read as JSON ({error})") from error
                yield _as_object(row, f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[Row]:
    try:
        with _open_text(path) as file:
            rows = json.load(file)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(rows, list):
        lists = [key for key, value in rows.items() if isinstance(value, list)] if isinstance(rows, dict) else []
        hint = f"; it has one under the key '{lists[0]}': save that list alone" if len(lists) == 1 else ""
        raise UserError(f"{path}: must hold a list of objects{hint}")
    for number, row in enumerate(rows, start=1):
        yield _as_object(row, f"{path}, row {number}")


def _as_object(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{place}: must be an object with columns, is {type(row).__name__}")
    return row


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    with _open_text(path, newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter, strict=True)
        _check_names(rows.fieldnames or [], path)
        for number, row in enumerate(rows, start=1):
            if None in row or None in row.values():
                raise UserError(f"{path}, row {number}: has another number of fields than the header line")
            yield row


def _check_names(names: Sequence[str], path: Path) -> None:
    """Raise UserError where two columns have one name, of which a row would keep the last alone."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path}: the column '{twice[0]}' stands twice in its header; rename one")


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_csv(path, delimiter="\t")


def _read_parquet(path: Path) -> Iterator[Row]:
    file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES)  # else all of it is in memory
    _check_names(file.schema_arrow.names, path)
    yield from _rows_of(file.iter_batches(BATCH_ROWS), path)


def _read_arrow(path: Path) -> Iterator[Row]:
    with pyarrow.memory_map(str(path)) as source:
        if source.read(len(ARROW_FILE)) == ARROW_FILE:
            file = pyarrow.ipc.open_file(source)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            source.seek(0)
            batches = file = pyarrow.ipc.open_stream(source)
        _check_names(file.schema.names, path)
        yield from _rows_of(batches, path)


def _rows_of(batches: Iterator[Any], path: Path) -> Iterator[Row]:
    """The rows of batches of columns. Raises UserError that names row and column of a text that is not UTF-8."""
    number = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError as error:
            row, column = _broken_text(batch)
            raise UserError(f"{path}, row {number + row}, column '{column}': not UTF-8; write the file anew") from error
        yield from rows
        number += len(rows)


def _broken_text(batch: Any) -> tuple[int, str]:
    """Number, within the batch, of the first row whose text is not UTF-8, and its column."""
    for row in range(batch.num_rows):
        for column in batch.schema.names:
            try:
                batch[column][row].as_py()
            except UnicodeDecodeError:
                return row + 1, column
    raise ValueError("every text of the batch is UTF-8")


BINARY: dict[str, Callable[[Path], Iterator[Row]]] = {".parquet": _read_parquet, ".arrow": _read_arrow}
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    **BINARY,
}
