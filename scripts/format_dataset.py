"""Stage `format`: a dataset's own rows become conversations, split into train, validation and test."""

from qlora.stage import run_stage

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from qlora.conversations import (
    ALPACA,
    Message,
    check_label,
    column_text,
    columns_of,
    conversation,
    prompt_hash,
    unusable,
)
from qlora.errors import UserError
from qlora.files import files_below, replacing, write_json
from qlora.readers import read_rows
from qlora.sqlite import check_reference

SPLITS = ("train", "validation", "test")
HELD_FROM = {"validation": ("test",), "train": ("test", "validation")}  # no prompt of a split may stand in these


class Row(NamedTuple):
    """A row in the canonical form, as the line that is written, and what decides its side."""

    prompt: str  # the prompt's hash
    content: bytes  # digest over all of its messages
    slice: str
    line: str


Rows = dict[str, list[Row]]
Dropped = dict[str, Counter[str]]  # split → reason → rows


def format_dataset(source: Path, dataset: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Write `dataset`/{train,validation,test}.jsonl and card.json, which counts every row read, kept and dropped.

    `source` is the downloaded file or folder, `settings` the dataset's entry in the config. A split without a file is
    taken from the training rows by the hash of the normalised prompt. Equal prompts are never on two sides: a training
    row whose prompt stands in validation or test is dropped, and so is a validation row whose prompt stands in test.
    """
    dropped: Dropped = {split: Counter() for split in SPLITS}
    files = split_files(source, name, settings.get("files"))
    rows: Rows = {split: [] for split in SPLITS}
    read = dict.fromkeys(SPLITS, 0)
    with replacing(dataset) as folder:
        folder.mkdir()
        database = _copied_database(source, folder, dataset, name, settings)
        for split, paths in files.items():
            for path in paths:
                rows[split] += _read(path, source, name, settings, database, dropped[split])
            read[split] = len(rows[split]) + dropped[split].total()
        rows = without_leaks(rows, dropped)  # before rows are held out, or one that leaks could be among them
        held = {}
        for split in ("validation", "test"):
            if split not in files:
                rows["train"], rows[split] = held_out(rows["train"], split, settings["holdout"][split])
                held[split] = len(rows[split])
        if "column" in settings.get("database", {}):
            _check_databases(rows["test"], settings["database"]["column"])
        if settings["task"] == "sql":
            rows["test"] = list(_that_can_be_scored(rows["test"], source, name, settings, dropped["test"]))
        for split, most in settings["limit"].items():
            dropped[split]["over the limit"] += max(0, len(rows[split]) - most)
            rows[split] = limited(rows[split], most)
        if not rows["train"] and not rows["test"]:
            reasons = dict(+sum(dropped.values(), Counter()))
            raise UserError(f"dataset '{name}': no row is left of {sum(read.values())} read; dropped: {reasons}")
        for split in SPLITS:
            with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(row.line for row in rows[split])
        write_json(folder / "card.json", _card(name, settings, read, held, rows, dropped))


def split_files(source: Path, name: str, patterns: Mapping[str, str] | None) -> dict[str, list[Path]]:
    """The files of each split inside a source: by glob, as the hub's client reads it, or one file as training rows.

    `*` stands for anything, `/` too (`fnmatch`); a glob that ends in `/` is of all below that folder.
    """
    record = source / "source.json"  # written by the download, no data
    files = [path for path in files_below(source) if path != record]
    if patterns is None:
        if len(files) != 1:
            raise UserError(
                f"config: datasets.{name}: its source has {len(files)} files; say with 'files' which split is which"
            )
        return {"train": files}
    globs = {split: f"{glob}*" if glob.endswith("/") else glob for split, glob in patterns.items()}
    found = {split: [path for path in files if fnmatch(_place(path, source), glob)] for split, glob in globs.items()}
    owner: dict[Path, str] = {}
    for split, paths in found.items():
        if not paths:
            raise UserError(f"config: datasets.{name}.files.{split}: nothing in {source} matches '{patterns[split]}'")
        for path in paths:
            if owner.setdefault(path, split) != split:
                raise UserError(
                    f"config: datasets.{name}.files: {_place(path, source)} is in {owner[path]} and in {split};"
                    " choose one"
                )
    return found


def _place(path: Path, source: Path) -> str:
    """Where a file lies in its source, which may be the file itself."""
    return path.relative_to(source).as_posix() if path != source else path.name


def _copied_database(source: Path, folder: Path, dataset: Path, name: str, settings: Mapping[str, Any]) -> str | None:
    """Copy the database file of a dataset beside its rows; its path there, or None where the config names none."""
    pattern = settings.get("database", {}).get("file")
    if not pattern:
        return None
    given = source / pattern
    if not given.is_file():
        raise UserError(f"config: datasets.{name}.database.file: {given} does not exist")
    shutil.copyfile(given, folder / given.name)
    return str(dataset / given.name)


def _read(
    path: Path, source: Path, name: str, settings: Mapping[str, Any], database: str | None, dropped: Counter[str]
) -> Iterator[Row]:
    """All usable rows of a file in the canonical form; others are refused, or counted in `dropped`."""
    column = settings.get("database", {}).get("column")
    where = _place(path, source)
    for number, given in read_rows(path):
        place = f"{where}, row {number}"
        messages = conversation(given, settings, place)
        reason = unusable(messages)
        if reason:
            if settings["unusable_rows"] == "refuse":
                raise UserError(
                    f"{place}, {_columns(settings, reason)}: {reason}; mend the row, or set"
                    f" datasets.{name}.unusable_rows: drop, which leaves such rows out and counts them"
                )
            dropped[reason] += 1
            continue
        if "labels" in settings:
            check_label(messages[-1]["content"], settings["labels"], f"{place}, {_columns(settings, 'empty answer')}")
        row: dict[str, Any] = {
            "id": f"{where}:{number}",
            "slice": column_text(given, settings["slice"], place) if "slice" in settings else "",
            "messages": messages,
        }
        if database or (column and given.get(column)):
            row["database"] = database or column_text(given, column, place)
        yield Row(
            prompt_hash(messages), content_digest(messages), row["slice"], json.dumps(row, ensure_ascii=False) + "\n"
        )


def _columns(settings: Mapping[str, Any], reason: str) -> str:
    """The columns that a reason to refuse a row is about."""
    for key in ("messages", "llama2_text"):
        if key in settings:
            return f"column '{settings[key]}'"
    templates = ALPACA if settings.get("alpaca") else settings
    names = columns_of(templates["prompt" if reason == "has no prompt" else "completion"])
    return "column " + ", ".join(f"'{name}'" for name in names)


def content_digest(messages: list[Message]) -> bytes:
    """A digest over roles and texts: rows that share it are the same example."""
    return hashlib.sha256(json.dumps([(turn["role"], turn["content"]) for turn in messages]).encode()).digest()


def held_out(rows: list[Row], split: str, share: float) -> tuple[list[Row], list[Row]]:
    """Rows that stay and rows that are held out: those whose prompt's hash falls into the split's own share.

    Test takes the low end of the hashes and validation the high one, so neither moves the other.
    """

    def is_held_out(row: Row) -> bool:
        place = int(row.prompt[:13], 16) / 16**13
        return place < share if split == "test" else place >= 1 - share

    return [row for row in rows if not is_held_out(row)], [row for row in rows if is_held_out(row)]


def without_leaks(rows: Rows, dropped: Dropped) -> Rows:
    """The rows without those whose prompt stands in a split that is held out from theirs; these are counted."""
    kept = {"test": rows["test"]}
    prompts = {"test": {row.prompt for row in rows["test"]}}
    for split, others in HELD_FROM.items():
        kept[split] = []
        for row in rows[split]:
            leak = next((other for other in others if row.prompt in prompts[other]), None)
            if leak:
                dropped[split][f"prompt stands in {leak}"] += 1
            else:
                kept[split].append(row)
        prompts[split] = {row.prompt for row in kept[split]}
    return kept


def limited(rows: list[Row], most: int) -> list[Row]:
    """At most `most` rows, chosen by their content in the order of the prompts' hashes, in their own order."""
    chosen = sorted(range(len(rows)), key=lambda index: (rows[index].prompt, rows[index].content))[:most]
    return [rows[index] for index in sorted(chosen)]


def _check_databases(rows: list[Row], column: str) -> None:
    """Raise UserError for a test row without the database that its answer is to be run on."""
    for row in map(json.loads, (row.line for row in rows)):
        if "database" not in row:
            raise UserError(f"{row['id']}: nothing in column '{column}', which the config names as database")


def _that_can_be_scored(
    rows: list[Row], source: Path, name: str, settings: Mapping[str, Any], dropped: Counter[str]
) -> Iterator[Row]:
    """The rows whose SQL gives a result in SQLite, before a model is asked; others are refused or counted."""
    file = settings["database"].get("file")
    for row in rows:
        given = json.loads(row.line)
        database = str(source / file) if file else given["database"]
        try:
            check_reference(given["messages"][-1]["content"], database, given["id"])
        except UserError as error:
            if settings["unusable_rows"] == "refuse":
                raise UserError(f"{error}; mend the row, or set datasets.{name}.unusable_rows: drop") from error
            dropped["its tables or its query fail in SQLite"] += 1
        else:
            yield row


def _card(
    name: str,
    settings: Mapping[str, Any],
    read: Mapping[str, int],
    held: Mapping[str, int],
    rows: Rows,
    dropped: Dropped,
) -> dict[str, Any]:
    """What the dataset is, and for each split: read + held out - given up to the held out = kept + dropped."""
    return {
        "dataset": name,
        "source": settings["source"],
        "licence": settings["licence"],
        "task": settings["task"],
        "read": dict(read),
        "held out of train": dict(held),
        "kept": {split: len(rows[split]) for split in SPLITS},
        "repeated": {
            split: {
                "prompt and answers": len(rows[split]) - len({row.content for row in rows[split]}),
                "prompt": len(rows[split]) - len({row.prompt for row in rows[split]}),
            }
            for split in SPLITS
        },
        "slices": {split: dict(sorted(Counter(row.slice or "all" for row in rows[split]).items())) for split in SPLITS},
        "dropped": {split: dict(sorted((+dropped[split]).items())) for split in SPLITS},
    }


if __name__ == "__main__":
    run_stage(format_dataset)
