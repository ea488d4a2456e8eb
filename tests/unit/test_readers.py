"""Rows come out of every kind of file alike, and a broken file is named with the row to mend."""

import csv
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qlora.errors import UserError
from qlora.readers import READERS, read_rows

ROWS = [{"text": "Où est\r\nmon colis ?", "label": "delivery"}, {"text": 'a "quoted", word 🙂', "label": "praise"}]


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_arrow(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path], Any]] = {
    ".jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    ".json": lambda path: path.write_text(json.dumps(ROWS)),
    ".csv": write_csv,
    ".tsv": lambda path: write_csv(path, "\t"),
    ".parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
    ".arrow": write_arrow,
}


def message_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message.removeprefix(str(path))


@pytest.mark.parametrize("kind", READERS)
def test_each_kind_gives_the_same_numbered_rows(tmp_path, kind):
    path = tmp_path / f"rows{kind}"
    WRITERS[kind](path)
    assert list(read_rows(path)) == [(1, ROWS[0]), (2, ROWS[1])]


def test_kind_is_told_by_the_ending_whatever_its_case(tmp_path):
    path = tmp_path / "ROWS.JSONL"
    WRITERS[".jsonl"](path)
    assert len(list(read_rows(path))) == 2


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_a_large_file_is_never_in_memory_as_a_whole(tmp_path, kind):
    rows = [{"text": str(number), "unused": os.urandom(1000).hex()} for number in range(10_000)]
    path = tmp_path / f"rows{kind}"
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=500, use_dictionary=False)
    else:
        header = [] if kind == ".jsonl" else ["text,unused"]
        lines = [json.dumps(row) if kind == ".jsonl" else ",".join(row.values()) for row in rows]
        path.write_text("\n".join([*header, *lines]))
    assert path.stat().st_size > 10_000_000
    del rows
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    used = max(tracemalloc.get_traced_memory()[0] + pyarrow.total_allocated_bytes() - before for _ in read_rows(path))
    tracemalloc.stop()
    assert used < path.stat().st_size / 2


def test_parquet_is_read_over_the_bounds_of_batches(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"number": list(range(3000))})
    pyarrow.parquet.write_table(table, path, row_group_size=700)
    assert [(number, row["number"]) for number, row in read_rows(path)] == [(i + 1, i) for i in range(3000)]


def test_unknown_kind_names_the_known_ones(tmp_path):
    assert message_of(tmp_path / "rows.xlsx") == (
        ": unknown kind of file '.xlsx'; known: .arrow, .csv, .json, .jsonl, .parquet, .tsv, and texts with .gz or .zst "
        "behind it"
    )
    assert message_of(tmp_path / "rows.parquet.gz").startswith(": unknown kind of file '.gz'")
    assert message_of(tmp_path / "rows").startswith(": unknown kind of file ''")


NOT_UTF8 = ": not UTF-8; convert the file, e.g. with iconv"
RAGGED = ", row 2: has another number of fields than the header line"
TEXTS = {
    "broken line": (".jsonl", b'{"a": 1}\n\n{"a": 2\n', ", line 3: not JSON (Expecting ',' delimiter at column 8)"),
    "line that is no object": (".jsonl", b'{"a": 1}\n[1]\n', ", line 2: must be an object with columns, is list"),
    "NUL byte": (".jsonl", b'{"a": "\x00"}\n', ", line 1: not JSON (Invalid control character at at column 8)"),
    "broken JSON": (".json", b'[{"a": 1},\n {"a" 2}]', ", line 2: not JSON (Expecting ':' delimiter)"),
    "JSON without a list": (".json", b'{"a": 1}', ": must hold a list of objects"),
    "JSON with its list under a key": (
        ".json",
        b'{"version": 1, "data": [{"a": 1}]}',
        ": must hold a list of objects; it has one under the key 'data': save that list alone",
    ),
    "JSON with two lists": (".json", b'{"a": [1], "b": [2]}', ": must hold a list of objects"),
    "JSON with a row that is no object": (".json", b'[{"a": 1}, 2]', ", row 2: must be an object with columns, is int"),
    "latin-1 JSON": (".json", b'[{"a": 1},\n{"a": "\xe9"}]', f", line 2, byte 8{NOT_UTF8}"),
    "header twice": (".csv", b"a,b,a\n1,2,3\n", ": the column 'a' stands twice in its header; rename one"),
    "header twice in TSV": (".tsv", b"a\ta\n1\t2\n", ": the column 'a' stands twice in its header; rename one"),
    "cut off": (".jsonl", b'{"a": 1}\n{"a": "2', ", line 2: not JSON (Unterminated string starting at at column 7)"),
    "latin-1": (".jsonl", b'{"a": 1}\n' * 3000 + b'{"a": "\xe9"}\n', f", line 3001, byte 8{NOT_UTF8}"),
    "latin-1 CSV": (".csv", b"a\nx\n\xe9t\xe9\n", f", line 3, byte 1{NOT_UTF8}"),
    "UTF-16": (".csv", "a,b\n1,2\n".encode("utf-16"), f", line 1, byte 1{NOT_UTF8}"),
    "long row": (".csv", b"a,b\n1,2\n1,2,3\n", RAGGED),
    "short row": (".csv", b"a,b\n1,2\n1\n", RAGGED),
    "open quote": (".csv", b'a,b\n1,2\n1,"2\n1,2\n', ", after row 1: cannot be read (unexpected end of data)"),
    "header alone": (".csv", b"a,b\n", ": has no rows"),
    "no Parquet": (".parquet", b"a,b\n1,2\n" * 10, ", after row 0: cannot be read (Parquet magic bytes not found"),
    "no Arrow": (".arrow", b"a,b\n1,2\n" * 10, ", after row 0: cannot be read ("),
}


@pytest.mark.parametrize(("kind", "content", "message"), TEXTS.values(), ids=TEXTS.keys())
def test_message_of_a_broken_file(tmp_path, kind, content, message):
    path = tmp_path / f"rows{kind}"
    path.write_bytes(content)
    found = message_of(path)
    assert found == message or kind in (".parquet", ".arrow")  # their library words the rest
    assert found.startswith(message)


@pytest.mark.parametrize("kind", READERS)
def test_empty_file_is_refused(tmp_path, kind):
    path = tmp_path / f"rows{kind}"
    path.touch()
    assert message_of(path)


@pytest.mark.parametrize("kind", READERS)
def test_missing_file_is_refused(tmp_path, kind):
    assert message_of(tmp_path / f"rows{kind}")


@pytest.mark.parametrize("kind", [".parquet", ".arrow"])
def test_truncated_file_is_refused(tmp_path, kind):
    path = tmp_path / f"rows{kind}"
    WRITERS[kind](path)
    path.write_bytes(path.read_bytes()[:-40])
    assert message_of(path).startswith(", after row")


def test_garbled_parquet_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    WRITERS[".parquet"](path)
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    assert message_of(path).startswith(", after row 0: cannot be read (")


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize(("ending", "codec"), [(".gz", "gzip"), (".zst", "zstd"), (".GZ", "gzip")])
def test_compressed_text_is_read_and_a_broken_one_is_named(tmp_path, kind, ending, codec):
    plain, path = tmp_path / f"plain{kind}", tmp_path / f"rows{kind}{ending}"
    WRITERS[kind](plain)

    def compress(content: bytes) -> bytes:
        with pyarrow.output_stream(str(path), compression=codec) as file:
            file.write(content)
        return path.read_bytes()

    whole = compress(plain.read_bytes())
    assert list(read_rows(path)) == [(1, ROWS[0]), (2, ROWS[1])]
    path.write_bytes(whole[:-20])
    assert message_of(path)
    path.write_bytes(b"no such thing")
    assert message_of(path).startswith(", after row 0: cannot be read (")
    compress(plain.read_bytes() + b"\xff")
    assert NOT_UTF8 in message_of(path)


def test_arrow_in_its_file_format_is_read_too(tmp_path):
    path = tmp_path / "rows.arrow"
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
        writer.write_table(table)
    assert [row for _, row in read_rows(path)] == ROWS * 2


@pytest.mark.parametrize("kind", [".parquet", ".arrow"])
def test_binary_column_names_and_texts_are_checked(tmp_path, kind):
    write = {
        ".parquet": pyarrow.parquet.write_table,
        ".arrow": lambda table, path: pyarrow.ipc.new_stream(str(path), table.schema).write_table(table),
    }[kind]
    path = tmp_path / f"rows{kind}"
    write(pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"]), path)
    assert message_of(path) == ": the column 'a' stands twice in its header; rename one"
    texts = [b"x"] * 2000 + [b"\xe9"]
    broken = pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())
    write(pyarrow.table({"n": range(2001), "text": broken}), path)
    assert message_of(path) == ", row 2001, column 'text': not UTF-8; write the file anew"


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_byte_order_mark_and_windows_line_ends_are_no_part_of_the_rows(tmp_path, kind):
    rows = [{"text": "one", "label": "x"}, {"text": "two", "label": "y"}]
    content = {
        ".jsonl": "\r\n".join(map(json.dumps, rows)),
        ".json": json.dumps(rows, indent=1).replace("\n", "\r\n"),
        ".csv": "text,label\r\none,x\r\ntwo,y\r\n",
        ".tsv": "text\tlabel\r\none\tx\r\ntwo\ty\r\n",
    }[kind]
    path = tmp_path / f"rows{kind}"
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert list(read_rows(path)) == [(1, rows[0]), (2, rows[1])]


def test_long_field_of_a_csv_is_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f'text\n"{"word " * 50_000}"\n')
    assert len(next(read_rows(path))[1]["text"]) == 250_000
