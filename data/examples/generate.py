"""Writes the example data: `python data/examples/generate.py [--output FOLDER]`. The same bytes every time."""

import argparse
import json
from pathlib import Path
from random import Random
from types import ModuleType

import label_rows
import sql_rows
import title_rows

SEEDS = {"train": 20261120, "validation": 20261120, "test": 20261121}  # test has its own: a look at it costs a new one
DATASETS = {"sql": sql_rows, "label": label_rows, "title": title_rows}
TRAIN_ROWS = {"sql": 4200, "label": 4000, "title": 2000}
ANSWERS = ("slice", "database", "sql", "label", "title")  # what is no part of a prompt
HELD_OUT_ROWS = {"validation": 60, "test": 200}  # per slice


def rows_of(
    module: ModuleType, name: str, split: str, slices: tuple[str, ...], count: int, taken: set[str]
) -> list[dict[str, str]]:
    """`count` different rows of each slice, none of which is in `taken`; adds them to it."""
    random = Random(f"{SEEDS[split]} {name} {split}")
    rows: dict[str, dict[str, str]] = {}
    for held_out in slices:
        wanted = len(rows) + count
        while len(rows) < wanted:
            row = module.draw_row(random, split, held_out)
            key = json.dumps({column: row[column] for column in row if column not in ANSWERS})
            if key not in taken:
                taken.add(key)
                rows[key] = {"id": f"{name}-{split}-{len(rows):04d}"} | row
    return list(rows.values())


def write(folder: Path) -> None:
    """Write every dataset's splits below `folder`."""
    for name, module in DATASETS.items():
        taken: set[str] = set()
        for split in ("train", "validation", "test"):
            slices, count = (("",), TRAIN_ROWS[name]) if split == "train" else (module.SLICES, HELD_OUT_ROWS[split])
            path = folder / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) for row in rows_of(module, name, split, slices, count, taken)]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    write(parser.parse_args().output)
