"""Do two SQL queries give the same result on a small SQLite database? Predicted queries are text that nobody has read.

A query may only read: an authorizer refuses everything else while it is compiled, so no statement that writes, attaches
a file or changes a setting ever runs. Work, time, rows and bytes are limited, so that none hangs or fills the memory.
"""

import math
import re
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from qlora.errors import UserError

MAX_STEPS = 50_000_000  # instructions of SQLite's virtual machine, about two seconds: the same limit on any machine
MAX_SECONDS = 20.0  # only reached where single instructions are slow
STEPS_BETWEEN_CHECKS = 10_000
MAX_ROWS = 10_000
MAX_BYTES = 16_000_000  # of a result
MAX_VALUE_BYTES = 100_000  # of one string or blob: nothing interrupts a function while it works on one
MAX_HEAP_BYTES = 512_000_000  # of all that SQLite holds in this process, sorted and intermediate rows too
MAX_PATTERN_BYTES = 1_000  # of a LIKE or GLOB pattern, whose cost grows with each wildcard
RELATIVE_TOLERANCE = 1e-6  # between two floats: sums and averages differ by the order of their rows
ABSOLUTE_TOLERANCE = 1e-9

DATABASE_SUFFIXES = (".db", ".sqlite", ".sqlite3")
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
NEVER_IN_A_SCRIPT = {sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_CREATE_VTABLE}
REFUSED_FUNCTIONS = frozenset({"load_extension"})
SLOW_FUNCTIONS = frozenset({"printf", "format"})  # one call can work for minutes; only where the reference has them too
# What sqlite3 raises for a wrong query: ValueError for a NUL or a lone surrogate, MemoryError over MAX_HEAP_BYTES.
SQL_ERRORS = (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError)

Value = None | int | float | str | bytes
Row = tuple[Value, ...]
_TOKEN = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?(?:\*/|$)|[()]|\w+""", re.S)


class TooMuch(sqlite3.Error):
    """A query whose result is over the limit of rows or bytes."""


def same_result(gold: str, predicted: str, database: str, where: str = "a row") -> bool:
    """Whether `predicted` gives what `gold` gives on `database`.

    Column names do not matter, their order does; the order of rows matters where `gold` has an ORDER BY of its own (not
    within parentheses). Floats are compared with a tolerance. A prediction that is not one single statement that reads,
    or is over a limit, is wrong. `database` is a script, or the path of a .db, .sqlite or .sqlite3 file.
    Raises UserError, naming `where`, for a gold query or a database that does not work.
    """
    with opened(database, where) as connection:
        expected = _reference_rows(connection, gold, where)
        connection.set_authorizer(partial(_only_reading, REFUSED_FUNCTIONS | SLOW_FUNCTIONS - _words(gold)))
        try:
            given = rows_of(connection, predicted)
        except SQL_ERRORS:
            return False
    return same_rows(expected, given, ordered=has_top_level_order(gold))


def check_reference(gold: str, database: str, where: str = "a row") -> None:
    """Raise UserError, naming `where`, for a gold query or a database that does not work, as `same_result` would."""
    with opened(database, where) as connection:
        _reference_rows(connection, gold, where)


def _reference_rows(connection: sqlite3.Connection, gold: str, where: str) -> list[Row]:
    try:
        return rows_of(connection, gold)
    except SQL_ERRORS as error:
        raise UserError(f"{where}: the reference SQL fails ({error}): {' '.join(gold.split())}") from error


@contextmanager
def opened(database: str, where: str = "a row") -> Iterator[sqlite3.Connection]:
    """A connection to `database` that can only read. Raises UserError, naming `where`, when there is no database."""
    is_file = database.endswith(DATABASE_SUFFIXES) and "\n" not in database
    if is_file and not Path(database).is_file():
        raise UserError(f"{where}: the database {database} does not exist; mend the path in the dataset")
    address = f"{Path(database).resolve().as_uri()}?mode=ro&immutable=1" if is_file else ":memory:"
    with closing(sqlite3.connect(address, uri=is_file, isolation_level=None)) as connection:
        # Text that is no UTF-8 (an old file, a cast blob) is read with replacement characters instead of an error.
        connection.text_factory = lambda text: text.decode("utf-8", "replace")
        if not is_file:
            _run_script(connection, database, where)
        connection.execute("PRAGMA trusted_schema = 0")
        connection.execute("PRAGMA temp_store = 2")  # in memory: a query leaves nothing on the disk
        connection.execute(f"PRAGMA hard_heap_limit = {MAX_HEAP_BYTES}")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, MAX_PATTERN_BYTES)
        connection.set_authorizer(partial(_only_reading, REFUSED_FUNCTIONS))
        yield connection


def _run_script(connection: sqlite3.Connection, script: str, where: str) -> None:
    """Build a database from a dataset's script, which may fill tables, but reach no file."""
    connection.set_authorizer(_only_tables)
    _limit_work(connection)
    try:
        connection.executescript(script)
    except SQL_ERRORS as error:
        raise UserError(f"{where}: the database script fails ({error}); mend it in the dataset") from error
    connection.set_authorizer(None)


def _words(query: str) -> frozenset[str]:
    return frozenset(token.lower() for token in _TOKEN.findall(query))


def _only_reading(refused: frozenset[str], action: int, _: str | None, name: str | None, *_more: str | None) -> int:
    """SQLite's question whether a query may do something: only read tables and call functions."""
    harmless = action in READING and not (action == sqlite3.SQLITE_FUNCTION and name in refused)
    return sqlite3.SQLITE_OK if harmless else sqlite3.SQLITE_DENY


def _only_tables(action: int, _: str | None, name: str | None, *_more: str | None) -> int:
    """SQLite's question whether a script may do something: settings, as `.dump` writes them, are left out."""
    if action == sqlite3.SQLITE_PRAGMA:
        return sqlite3.SQLITE_IGNORE
    refused = action in NEVER_IN_A_SCRIPT or (action == sqlite3.SQLITE_FUNCTION and name in REFUSED_FUNCTIONS)
    return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK


def _limit_work(connection: sqlite3.Connection) -> None:
    """Interrupt what runs on the connection from now on, once it took too many steps or too long."""
    deadline = time.monotonic() + MAX_SECONDS
    checks = iter(range(MAX_STEPS // STEPS_BETWEEN_CHECKS))

    def exhausted() -> bool:
        return next(checks, None) is None or time.monotonic() > deadline

    connection.set_progress_handler(exhausted, STEPS_BETWEEN_CHECKS)


def rows_of(connection: sqlite3.Connection, query: str) -> list[Row]:
    """All rows of one query. Raises one of SQL_ERRORS when it is wrong, is not one statement, or is over a limit."""
    _limit_work(connection)
    with closing(connection.execute(query)) as cursor:
        if cursor.description is None:
            raise sqlite3.ProgrammingError("not a query")
        rows: list[Row] = []
        size = 0
        for row in cursor:
            rows.append(row)
            size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
            if len(rows) > MAX_ROWS or size > MAX_BYTES:
                raise TooMuch(f"the result is over {MAX_ROWS} rows or {MAX_BYTES} bytes")
        return rows


def has_top_level_order(query: str) -> bool:
    """Whether a query has an ORDER BY outside parentheses, quotes and comments, so that its result is a sequence."""
    depth = 0
    previous = ""
    for token in _TOKEN.findall(query):
        if token.startswith(("--", "/*")):
            continue
        depth += {"(": 1, ")": -1}.get(token, 0)
        word = token.lower()
        if depth == 0 and (previous, word) == ("order", "by"):
            return True
        previous = word
    return False


def same_rows(expected: list[Row], given: list[Row], *, ordered: bool) -> bool:
    """Whether two results are equal, as sequences or as multisets, floats within the tolerance."""
    if len(expected) != len(given):
        return False
    if ordered:
        return all(map(_same_row, expected, given))
    groups: dict[Row, tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))
    for side, rows in enumerate((expected, given)):
        for row in rows:
            groups[_without_numbers(row)][side].append(row)
    return all(_same_group(*sides) for sides in groups.values())


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float)


def _without_numbers(row: Row) -> Row:
    """What must be equal exactly; the type keeps the text '1' and the blob x'31' apart, and both from numbers."""
    return tuple("number" if _is_number(value) else (type(value).__name__, value) for value in row)  # type: ignore[misc]


def _same_group(expected: list[Row], given: list[Row]) -> bool:
    """Whether rows that differ in their numbers alone can be paired so that each pair is within the tolerance.

    Sorted, the partner of a row is almost always the first one left; nearly equal floats may have moved it further.
    """
    if len(expected) != len(given):
        return False
    left = sorted(given, key=_numbers)
    for row in sorted(expected, key=_numbers):
        partner = next((place for place, other in enumerate(left) if _same_row(row, other)), None)
        if partner is None:
            return False
        del left[partner]
    return True


def _numbers(row: Row) -> list[int | float]:
    return [value for value in row if isinstance(value, int | float)]


def _same_row(expected: Row, given: Row) -> bool:
    return len(expected) == len(given) and all(map(_same_value, expected, given))


def _same_value(expected: Value, given: Value) -> bool:
    """Equal; or, where one of two numbers is a float, within the tolerance (1 and 1.0 are the same number)."""
    if isinstance(expected, int | float) and isinstance(given, int | float):
        if isinstance(expected, int) and isinstance(given, int):
            return expected == given
        return math.isclose(expected, given, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
    return type(expected) is type(given) and expected == given
