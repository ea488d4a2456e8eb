"""Execution of SQL answers: what counts as the same result, and what a prediction can never do."""

import sqlite3
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora import sqlite
from qlora.errors import UserError
from qlora.sqlite import has_top_level_order, opened, rows_of, same_result, same_rows

SCRIPT = """
CREATE TABLE city (name TEXT, country TEXT, people INTEGER, area REAL);
INSERT INTO city VALUES ('Oslo', 'Norway', 700, 454.1), ('Bergen', 'Norway', 290, 465.3), ('Lyon', 'France', 520, 47.9);
"""


@pytest.fixture
def database_file(tmp_path: Path) -> Path:
    path = tmp_path / "with space & ?mode=rw#.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(SCRIPT)
    connection.close()
    return path


@pytest.mark.parametrize(
    ("gold", "predicted", "same"),
    [
        ("SELECT name FROM city", "select NAME as anything from city;", True),
        ("SELECT name FROM city", "SELECT name FROM city ORDER BY name DESC -- any order will do", True),
        ("SELECT name FROM city ORDER BY people", "SELECT name FROM city ORDER BY people DESC", False),
        ("SELECT name FROM city ORDER BY people", "SELECT name FROM city ORDER BY people", True),
        ("SELECT name, people FROM city", "SELECT people, name FROM city", False),
        ("SELECT country FROM city", "SELECT DISTINCT country FROM city", False),
        ("SELECT country FROM city", "SELECT 'Norway' UNION ALL SELECT 'France' UNION ALL SELECT 'France'", False),
        ("SELECT avg(area) FROM city", "SELECT sum(area) / count(*) FROM city", True),
        ("SELECT 0.1 + 0.2", "SELECT 0.3", True),
        ("SELECT count(*) FROM city", "SELECT 3.0", True),
        ("SELECT 10000000001", "SELECT 10000000002", False),
        ("SELECT 1", "SELECT '1'", False),
        ("SELECT 'a'", "SELECT x'61'", False),
        ("SELECT NULL", "SELECT NULL", True),
        ("SELECT NULL", "SELECT 0", False),
        ("SELECT name FROM city WHERE 0", "SELECT name FROM city WHERE people < 0", True),
        ("SELECT max(people) FROM city", "SELECT people FROM city ORDER BY people DESC LIMIT 1", True),
    ],
)
def test_what_counts_as_the_same_result(gold: str, predicted: str, same: bool) -> None:
    assert same_result(gold, predicted, SCRIPT) is same


@pytest.mark.parametrize(
    "predicted",
    [
        "",
        "   ",
        ";",
        "-- nothing",
        "I think it is Oslo",
        "SELECT name FROM town",
        "SELECT name FROM city; SELECT name FROM city",
        "SELECT name FROM city; DROP TABLE city",
        "SELECT name FROM city\0",
        "SELECT name FROM city WHERE name = '\ud800'",
        "SELECT name FROM city WHERE name = ?",
        "SELECT name FROM city WHERE " + "(" * 5000 + "1",
        "EXPLAIN SELECT name FROM city",
        "```sql\nSELECT name FROM city\n```",
    ],
)
def test_a_prediction_that_is_not_one_query_is_wrong_and_no_error(predicted: str) -> None:
    assert same_result("SELECT name FROM city", predicted, SCRIPT) is False


ATTACKS = [
    "DELETE FROM city",
    "INSERT INTO city VALUES ('x', 'y', 1, 1.0)",
    "INSERT INTO city VALUES ('x', 'y', 1, 1.0) RETURNING name",
    "UPDATE city SET people = 0 RETURNING name",
    "DROP TABLE city",
    "CREATE TABLE evil (a)",
    "CREATE TEMP TABLE evil (a)",
    "CREATE VIRTUAL TABLE evil USING fts5(a)",
    "ALTER TABLE city RENAME TO town",
    "WITH gone AS (SELECT 1) DELETE FROM city",
    "ATTACH DATABASE '{target}' AS other",
    "VACUUM INTO '{target}'",
    "VACUUM",
    "REINDEX",
    "ANALYZE",
    "BEGIN IMMEDIATE",
    "SAVEPOINT evil",
    "PRAGMA writable_schema = 1",
    "PRAGMA query_only = 0",
    "PRAGMA journal_mode = DELETE",
    "PRAGMA table_info(city)",
    "SELECT * FROM pragma_database_list",
    "SELECT load_extension('{target}')",
    "SELECT LOAD_EXTENSION('{target}', 'main')",
    "SELECT writefile('{target}', 'x')",
    "SELECT readfile('/etc/passwd')",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_but_reading_is_compiled(attack: str, database_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    before = database_file.read_bytes()
    for database in (SCRIPT, str(database_file)):
        with opened(database) as connection:
            with pytest.raises(sqlite.SQL_ERRORS):
                rows_of(connection, attack.format(target=target))
            assert rows_of(connection, "SELECT count(*) FROM city WHERE people > 0") == [(3,)]
        assert same_result("SELECT name FROM city", attack.format(target=target), database) is False
    assert database_file.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [database_file]


@pytest.mark.parametrize(
    "endless",
    [
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n) SELECT i FROM n WHERE i < 0",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT group_concat(i) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT 2 FROM n) SELECT sum(length(hex(zeroblob(40000)))) FROM n",
        "WITH n(i) AS (SELECT 1 FROM city a, city b, city c, city d, city e, city f, city g) "
        "SELECT count(*) FROM n a, n b, n c",
    ],
)
def test_endless_work_is_stopped(endless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "MAX_STEPS", 1_000_000)
    monkeypatch.setattr(sqlite, "MAX_SECONDS", 0.5)
    started = time.monotonic()
    assert same_result("SELECT 1", endless, SCRIPT) is False
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "huge",
    [
        "SELECT zeroblob(1000000000)",
        "SELECT replace(hex(zeroblob(40000)), '0', 'aaaaaaaaaaaaaaaaaaaaaaaa')",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 20000) SELECT i FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 1000) SELECT hex(zeroblob(40000)) FROM n",
        "SELECT 'x' LIKE hex(zeroblob(2000))",
    ],
)
def test_a_huge_result_is_refused(huge: str) -> None:
    with opened(SCRIPT) as connection, pytest.raises(sqlite3.Error):
        rows_of(connection, huge)


def test_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "MAX_HEAP_BYTES", 50_000_000)
    sort = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT 2 FROM n) SELECT randomblob(90000) AS b FROM n ORDER BY b"
    started = time.monotonic()
    with opened(SCRIPT) as connection, pytest.raises(MemoryError):
        rows_of(connection, sort)
    assert time.monotonic() - started < 5
    assert same_result("SELECT 1", sort, SCRIPT) is False


def test_a_function_that_nothing_interrupts_needs_a_reference_with_it() -> None:
    assert same_result("SELECT '1.50'", "SELECT printf('%.*c', 2000000000, 'x')", SCRIPT) is False
    assert same_result("SELECT '1.50'", "SELECT PRINTF('%.2f', 1.5)", SCRIPT) is False
    assert same_result("SELECT Printf('%.2f', 1.5)", "SELECT PRINTF('%.2f', 1.5)", SCRIPT) is True


def test_a_database_file_gives_the_same_rows_as_its_script(database_file: Path) -> None:
    query = "SELECT name, people FROM city ORDER BY name"
    with opened(str(database_file)) as file, opened(SCRIPT) as script:
        assert rows_of(file, query) == rows_of(script, query) == [("Bergen", 290), ("Lyon", 520), ("Oslo", 700)]


def test_wrong_references_and_databases_are_errors_that_name_the_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sql, row 7: the reference SQL fails .*town"):
        same_result("SELECT name FROM town", "SELECT 1", SCRIPT, "sql, row 7")
    with pytest.raises(UserError, match="sql, row 7: the database script fails"):
        same_result("SELECT 1", "SELECT 1", "CREATE TABEL t (a)", "sql, row 7")
    with pytest.raises(UserError, match=r"sql, row 7: the database .*none\.db does not exist"):
        same_result("SELECT 1", "SELECT 1", str(tmp_path / "none.db"), "sql, row 7")


def test_a_script_reaches_no_file_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for attack in (f"ATTACH '{tmp_path}/a' AS a", f"VACUUM INTO '{tmp_path}/b'", "SELECT load_extension('c')"):
        with pytest.raises(UserError, match="the database script fails"):
            same_result("SELECT 1", "SELECT 1", f"CREATE TABLE t (a); {attack};")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sqlite, "MAX_STEPS", 100_000)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) INSERT INTO t SELECT i FROM n"
    with pytest.raises(UserError, match="interrupted"):
        same_result("SELECT 1", "SELECT 1", f"CREATE TABLE t (a); {endless};")


def test_a_dump_with_settings_is_a_script() -> None:
    dump = f"PRAGMA foreign_keys=OFF;\nBEGIN TRANSACTION;\n{SCRIPT}\nCOMMIT;\n"
    assert same_result("SELECT count(*) FROM city", "SELECT 3", dump)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n\tby a limit 3", True),
        ("SELECT a FROM t ORDER /* so */ BY a", True),
        ("SELECT a FROM t UNION SELECT b FROM s ORDER BY 1", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT row_number() OVER (ORDER BY a) FROM t", False),
        ("SELECT 'x ORDER BY y' FROM t", False),
        ("SELECT 'it''s ( ORDER BY y' FROM t", False),
        ('SELECT "order by" FROM t -- ORDER BY a', False),
        ("SELECT a FROM t /* ORDER BY a */", False),
        ("SELECT ')' FROM t ORDER BY a", True),
        ("SELECT a, [order], by FROM t", False),
    ],
)
def test_the_order_of_rows_matters_where_the_query_itself_orders(query: str, expected: bool) -> None:
    assert has_top_level_order(query) is expected


VALUES = st.one_of(
    st.none(),
    st.integers(-3, 3),
    st.floats(-2, 2).map(lambda number: round(number, 1)),
    st.sampled_from(["a", "b", "1"]),
    st.just(b"a"),
)
ROWS = st.lists(st.tuples(VALUES, VALUES, VALUES), max_size=8)


@given(ROWS, st.randoms(use_true_random=False), st.floats(-1e-8, 1e-8))
def test_rows_are_the_same_in_any_order_and_with_any_small_error(rows: list[tuple], random, error: float) -> None:
    moved = [tuple(value * (1 + error) if isinstance(value, float) else value for value in row) for row in rows]
    random.shuffle(moved)
    assert same_rows(rows, moved, ordered=False)
    assert same_rows(moved, rows, ordered=False)


@given(ROWS, ROWS)
def test_rows_agree_with_matching_by_trial(left: list[tuple], right: list[tuple]) -> None:
    waiting = list(right)
    matched = len(left) == len(right)
    for row in left:
        partner = next((other for other in waiting if same_rows([row], [other], ordered=True)), None)
        matched = matched and partner is not None
        if partner is not None:
            waiting.remove(partner)
    assert same_rows(left, right, ordered=False) is matched


@given(st.text())
def test_no_text_raises(text: str) -> None:
    same_result("SELECT count(*) FROM city", text, SCRIPT)
