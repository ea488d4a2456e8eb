"""Text-to-SQL rows: a schema, a question, the SQL that answers it, and a small database that tells right from wrong."""

import sqlite3
from collections import Counter
from dataclasses import dataclass, replace
from random import Random

from sql_words import AGGREGATES, FRAMES, NUMBER_CONDITIONS, NUMERALS, SUPERLATIVES, TABLES, TEXT_CONDITIONS
from words import code, number, word

SLICES = ("unseen_values", "unseen_wordings", "unseen_tables")
KINDS = (*3 * ("list",), "list_two", "both", *2 * ("count",), *2 * ("aggregate",), "top", *2 * ("group",))


@dataclass(frozen=True)
class Condition:
    """A column compared with a value."""

    column: str
    operator: str
    value: str | int

    def sql(self) -> str:
        """The condition as SQL."""
        return f"{self.column} {self.operator} {literal(self.value)}"


@dataclass(frozen=True)
class Query:
    """A query in parts, so that a mistake in one of them can be made on purpose."""

    table: str
    select: tuple[str, ...]
    conditions: tuple[Condition, ...] = ()
    aggregate: str = ""
    group: str = ""
    order: str = ""
    direction: str = ""
    limit: int = 0

    def sql(self) -> str:
        """The query as SQL."""
        what = ", ".join(self.select)
        if self.aggregate:
            what = f"{self.aggregate}({what})"
        if self.group:
            what = f"{self.group}, {what}"
        text = f"SELECT {what} FROM {self.table}"
        if self.conditions:
            text += " WHERE " + " AND ".join(condition.sql() for condition in self.conditions)
        if self.group:
            text += f" GROUP BY {self.group}"
        if self.order:
            text += f" ORDER BY {self.order} {self.direction} LIMIT {self.limit}"
        return text


@dataclass(frozen=True)
class Table:
    """A table's name and columns."""

    name: str
    texts: tuple[str, ...]
    numbers: tuple[str, ...]
    columns: tuple[str, ...]  # texts and numbers in the order of the schema


def literal(value: str | int) -> str:
    """A value as it stands in SQL."""
    return f"'{value}'" if isinstance(value, str) else str(value)


def draw_table(random: Random, split: str) -> Table:
    """A table with three or four columns of one domain."""
    nouns, texts, numbers = random.choice(TABLES[split])
    chosen_texts = tuple(random.sample(texts, 2))
    chosen_numbers = tuple(random.sample(numbers, random.choice((1, 2))))
    columns = list(chosen_texts + chosen_numbers)
    random.shuffle(columns)
    return Table(random.choice(nouns), chosen_texts, chosen_numbers, tuple(columns))


def text_value(random: Random, split: str) -> str:
    """A word, two words or a code."""
    kind = random.random()
    if kind < 0.15:
        return code(random, split)
    if kind < 0.3:
        return f"{word(random, split)} {word(random, split)}"
    return word(random, split)


def draw_condition(random: Random, table: Table, split: str, free: list[str]) -> Condition:
    """A condition on one of the columns in `free`, which it leaves without that column."""
    column = free.pop(random.randrange(len(free)))
    if column in table.texts:
        return Condition(column, "=", text_value(random, split))
    return Condition(column, random.choice(">><<="), number(random, split))


def draw_query(random: Random, table: Table, values: str, kind: str) -> Query:
    """A query of the given kind, with values of the split `values`."""
    free = list(table.columns)
    random.shuffle(free)
    if kind == "top":
        order = free.pop(free.index(random.choice(table.numbers)))
        direction = random.choice(("ASC", "DESC"))
        return Query(table.name, (free[0],), order=order, direction=direction, limit=random.choice(list(NUMERALS)))
    if kind == "group":
        group = free.pop(free.index(random.choice(table.texts)))
        conditions = (draw_condition(random, table, values, free),) if random.random() < 0.7 else ()
        return Query(table.name, ("*",), conditions, aggregate="COUNT", group=group)
    if kind == "aggregate":
        column = free.pop(free.index(random.choice(table.numbers)))
        aggregate = random.choice(list(AGGREGATES.values()))
        return Query(table.name, (column,), (draw_condition(random, table, values, free),), aggregate=aggregate)
    if kind == "count":
        conditions = tuple(draw_condition(random, table, values, free) for _ in range(random.choice((1, 1, 2))))
        return Query(table.name, ("*",), conditions, aggregate="COUNT")
    select = (free.pop(), free.pop()) if kind == "list_two" else (free.pop(),)
    conditions = tuple(draw_condition(random, table, values, free) for _ in range(2 if kind == "both" else 1))
    return Query(table.name, select, conditions)


def phrase(random: Random, condition: Condition, wordings: str) -> str:
    """A condition in words."""
    forms = TEXT_CONDITIONS if isinstance(condition.value, str) else NUMBER_CONDITIONS[condition.operator]
    return random.choice(forms[wordings]).format(c=condition.column, v=condition.value)


def ask(random: Random, query: Query, wordings: str) -> str:
    """A question whose sentence frame belongs to the split `wordings`.

    One condition in three of a held-out wording is phrased in a held-out form too, the others in a form of train.
    """
    phrases = [
        phrase(random, condition, wordings if random.random() < 1 / 3 else "train") for condition in query.conditions
    ]
    asked = {
        "t": query.table,
        "c": " and ".join(query.select),
        "w": " and ".join(phrases),
        "g": query.group,
        "o": query.order,
        "n": NUMERALS.get(query.limit, ""),
        "a": next((said for said, name in AGGREGATES.items() if name == query.aggregate), ""),
        "s": random.choice([said for said, direction in SUPERLATIVES.items() if direction == query.direction] or [""]),
    }
    frame = random.choice(FRAMES[kind_of(query)][wordings])
    return frame.format(**asked).replace(" .", ".").replace(" ?", "?").replace(" ,", ",")


def kind_of(query: Query) -> str:
    """Which sentence frames can ask for a query."""
    if query.order:
        return "top"
    if query.group:
        return "group"
    if query.aggregate:
        return "count" if query.aggregate == "COUNT" else "aggregate"
    return "list"


def mistakes(query: Query, table: Table) -> list[str]:
    """The SQL of near misses, none of which may give the right answer."""
    wrong = [Query(table.name, ("*",)), replace(query, conditions=(), order="")] if query.conditions else []
    wrong.append(Query(table.name, ("*",), query.conditions))
    if query.select != ("*",):
        pool = table.numbers if query.aggregate else table.columns
        wrong += [replace(query, select=(column,)) for column in pool if (column,) != query.select]
    for i, condition in enumerate(query.conditions):
        others = query.conditions[:i] + query.conditions[i + 1 :]
        elsewhere = "Nowhere" if isinstance(condition.value, str) else 100_000
        changed = [replace(condition, value=elsewhere)]
        changed += [replace(condition, column=column) for column in table.columns if column != condition.column]
        changed += [replace(condition, operator=operator) for operator in "<=>" if operator != condition.operator]
        wrong += [replace(query, conditions=(*others, change)) for change in changed]
        wrong.append(replace(query, conditions=others))
    if query.aggregate and query.select != ("*",):
        wrong += [replace(query, aggregate=name) for name in AGGREGATES.values() if name != query.aggregate]
    if query.group:
        wrong += [replace(query, group=column) for column in table.columns if column != query.group]
    if query.order:
        wrong += [replace(query, order=column) for column in table.columns if column != query.order]
        wrong += [replace(query, limit=query.limit + step) for step in (-1, 1)]
        wrong.append(replace(query, direction="ASC" if query.direction == "DESC" else "DESC"))
    return [candidate.sql() for candidate in wrong]


def answer(database: sqlite3.Connection, sql: str) -> Counter[tuple[object, ...]]:
    """The rows that a query gives, in any order."""
    return Counter(tuple(row) for row in database.execute(sql).fetchall())


def draw_database(random: Random, query: Query, table: Table, split: str) -> str:
    """An SQLite script of 7 to 10 rows, on which the query has an answer and every near miss another one."""
    types = ", ".join(f"{column} {'TEXT' if column in table.texts else 'INTEGER'}" for column in table.columns)
    create = f"CREATE TABLE {table.name} ({types});"
    asked = {condition.column: condition for condition in query.conditions}
    for _ in range(1000):
        pools: dict[str, list[str | int]] = {}
        for column in table.columns:
            text = column in table.texts
            pool = [text_value(random, split) if text else number(random, split) for _ in range(9)]
            pools[column] = pool[:3] if column == query.group else pool
        rows = []
        for _ in range(random.randint(7, 10)):
            row = {column: random.choice(pools[column]) for column in table.columns}
            row |= {column: near(random, condition, random.random() < 0.65) for column, condition in asked.items()}
            rows.append("(" + ", ".join(literal(row[column]) for column in table.columns) + ")")
        script = f"{create} INSERT INTO {table.name} VALUES {', '.join(rows)};"
        if discriminates(script, query, table):
            return script
    raise AssertionError(f"no database tells {query.sql()} from its near misses")


def near(random: Random, condition: Condition, holds: bool) -> str | int:
    """A value for which a condition holds, or for which it does not."""
    if isinstance(condition.value, str):
        return condition.value if holds else word(random, "train")
    step = random.randint(1, max(3, condition.value // 2))
    if condition.operator == "=":
        return condition.value if holds else condition.value + step
    upwards = (condition.operator == ">") == holds
    return condition.value + step if upwards else condition.value - min(step, condition.value - 1)


def discriminates(script: str, query: Query, table: Table) -> bool:
    """Whether the query has an answer on this database, and no near miss has the same one."""
    database = sqlite3.connect(":memory:")
    database.executescript(script)
    gold = answer(database, query.sql())
    empty = not gold or any(value in (None, 0) for row in gold for value in row)
    wrong = not empty and any(answer(database, sql) == gold for sql in mistakes(query, table))
    database.close()
    return not empty and not wrong


def draw_row(random: Random, split: str, held_out: str) -> dict[str, str]:
    """One row without its id; `held_out` is the slice, or "" for a row of train."""
    table = draw_table(random, split if held_out == "unseen_tables" else "train")
    kind = random.choice(KINDS)
    query = draw_query(random, table, split, kind)
    while held_out == "unseen_values" and not query.conditions:
        query = draw_query(random, table, split, random.choice(KINDS))
    row = {
        "slice": held_out,
        "schema": f"{table.name} ({', '.join(table.columns)})",
        "question": ask(random, query, split if held_out == "unseen_wordings" else "train"),
        "sql": query.sql(),
    }
    if held_out:
        row["database"] = draw_database(random, query, table, split)
    return row
