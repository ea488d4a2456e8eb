"""Stage `format`: a dataset's own rows become conversations, split into train, validation and test."""

from qlora.stage import run_stage

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.conversations import column_value, conversation, prompt_hash, unusable
from qlora.errors import UserError
from qlora.files import files_below, replacing, write_json, write_jsonl
from qlora.readers import read_rows

SPLITS = ("train", "validation", "test")
LEAKS = {"validation": "validation prompt stands in test", "train": "training prompt stands in validation or test"}
Rows = dict[str, list[dict[str, Any]]]  # split → rows; a row carries its prompt's hash until it is written


def format_dataset(source: Path, dataset: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Write `dataset`/{train,validation,test}.jsonl and card.json, which counts every row read, kept and dropped.

    `source` is the downloaded file or folder, `settings` the dataset's entry in the config. A split without a file is
    taken from the training rows by the hash of the normalised prompt. Equal prompts are never on two sides: a training
    row whose prompt stands in validation or test is dropped, and so is a validation row whose prompt stands in test.
    """
    dropped: Counter[str] = Counter()
    files = split_files(source, name, settings.get("files"))
    rows: Rows = {split: [] for split in SPLITS}
    read: dict[str, int] = {}
    for split, paths in files.items():
        before = dropped.total()
        for path in paths:
            rows[split] += _read(path, source, settings, dropped)
        read[split] = len(rows[split]) + dropped.total() - before
    rows = without_leaks(rows, dropped)  # before rows are held out, or one that leaks could be among them
    for split in ("validation", "test"):
        if split not in files:
            rows["train"], rows[split] = held_out(rows["train"], split, settings["holdout"][split])
    for split, most in settings["limit"].items():
        dropped[f"over the limit of {split}"] += max(0, len(rows[split]) - most)
        rows[split] = limited(rows[split], most)
    if not rows["train"] and not rows["test"]:
        raise UserError(f"dataset '{name}': no row is left of {sum(read.values())} read; dropped: {dict(+dropped)}")
    if "column" in settings.get("database", {}):
        _check_databases(rows["test"], settings["database"]["column"])
    with replacing(dataset) as folder:
        folder.mkdir()
        database = settings.get("database", {}).get("file")
        if database:
            given = _one_file(source, database, name)
            database = given.name
            shutil.copyfile(given, folder / database)
        for split in SPLITS:
            for row in rows[split]:
                if database:
                    row["database"] = str(dataset / database)
            write_jsonl(
                folder / f"{split}.jsonl",
                ({key: value for key, value in row.items() if key != "hash"} for row in rows[split]),
            )
        write_json(folder / "card.json", _card(name, settings, read, rows, dropped))


def split_files(source: Path, name: str, patterns: Mapping[str, str] | None) -> dict[str, list[Path]]:
    """The files of each split inside a source: by glob, or the single file as training rows."""
    record = source / "source.json"  # written by the download, no data
    if patterns is None:
        files = [path for path in files_below(source) if path != record]
        if len(files) != 1:
            raise UserError(
                f"config: datasets.{name}: its source has {len(files)} files; say with 'files' which split is which"
            )
        return {"train": files}
    found = {split: sorted(set(source.glob(pattern)) - {record}) for split, pattern in patterns.items()}
    for split, paths in found.items():
        if not paths:
            raise UserError(f"config: datasets.{name}.files.{split}: nothing in {source} matches '{patterns[split]}'")
    return found


def _one_file(source: Path, pattern: str, name: str) -> Path:
    path = source / pattern
    if not path.is_file():
        raise UserError(f"config: datasets.{name}.database.file: {path} does not exist")
    return path


def _read(path: Path, source: Path, settings: Mapping[str, Any], dropped: Counter[str]) -> list[dict[str, Any]]:
    """All usable rows of a file in the canonical form; what cannot be used is counted in `dropped`."""
    rows = []
    column = settings.get("database", {}).get("column")
    where = path.relative_to(source) if path != source else Path(path.name)
    for number, given in read_rows(path):
        place = f"{where}, row {number}"
        messages = conversation(given, settings, place)
        reason = unusable(messages)
        if reason:
            dropped[reason] += 1
            continue
        row = {
            "id": f"{where.as_posix()}:{number}",
            "slice": str(column_value(given, settings["slice"], place)) if "slice" in settings else "",
            "messages": messages,
            "hash": prompt_hash(messages),
        }
        if column and given.get(column):
            row["database"] = given[column]
        rows.append(row)
    return rows


def held_out(rows: list[dict[str, Any]], split: str, share: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows that stay and rows that are held out: those whose prompt's hash falls into the split's own share.

    Test takes the low end of the hashes and validation the high one, so neither moves the other.
    """

    def is_held_out(row: Mapping[str, Any]) -> bool:
        place = int(row["hash"][:13], 16) / 16**13
        return place < share if split == "test" else place >= 1 - share

    return [row for row in rows if not is_held_out(row)], [row for row in rows if is_held_out(row)]


def without_leaks(rows: Rows, dropped: Counter[str]) -> Rows:
    """The rows without those whose prompt stands in a split that is held out from theirs; these are counted."""
    kept = {"test": rows["test"]}
    seen = {row["hash"] for row in rows["test"]}
    for split, leak in LEAKS.items():
        kept[split] = [row for row in rows[split] if row["hash"] not in seen]
        dropped[leak] += len(rows[split]) - len(kept[split])
        seen |= {row["hash"] for row in kept[split]}
    return kept


def limited(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` rows, chosen by the prompt's hash, in their own order."""
    chosen = {row["id"] for row in sorted(rows, key=lambda row: row["hash"])[:most]}
    return [row for row in rows if row["id"] in chosen]


def _check_databases(rows: list[dict[str, Any]], column: str) -> None:
    """Raise UserError for a test row without the database that its answer is to be run on."""
    for row in rows:
        if "database" not in row:
            raise UserError(f"{row['id']}: nothing in column '{column}', which the config names as database")


def _card(
    name: str, settings: Mapping[str, Any], read: Mapping[str, int], rows: Rows, dropped: Counter[str]
) -> dict[str, Any]:
    return {
        "dataset": name,
        "source": settings["source"],
        "licence": settings["licence"],
        "task": settings["task"],
        "read": dict(read),
        "kept": {split: len(rows[split]) for split in SPLITS},
        "slices": {
            split: dict(sorted(Counter(row["slice"] or "all" for row in rows[split]).items())) for split in SPLITS
        },
        "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
    }


if __name__ == "__main__":
    run_stage(format_dataset)
