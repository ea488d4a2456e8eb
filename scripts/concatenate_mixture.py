"""Stage `concatenate`: training and validation rows of several datasets become one mixture."""

from qlora.stage import run_stage

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora.errors import UserError
from qlora.files import read_jsonl, replacing, write_json, write_jsonl


def concatenate_mixture(
    datasets: list[Path], mixture: Path, name: str, shares: Mapping[str, Mapping[str, Any]], seed: int
) -> None:
    """Write `mixture`/{train,validation}.jsonl and card.json from formatted dataset folders.

    `shares` maps a dataset's name to its weight and cap. Which rows are taken, and their order, is decided by a hash of
    the seed and the row alone: neither the order of files and rows nor another dataset of the mixture moves a choice.
    """
    train: list[dict[str, Any]] = []
    validation: list[dict[str, Any]] = []
    counts: dict[str, dict[str, Any]] = {}
    for folder in datasets:
        share = shares[folder.name]
        rows = [{**row, "dataset": folder.name} for row in read_jsonl(folder / "train.jsonl")]
        taken = weighted(rows, share["weight"], share["cap"], seed)
        held = [{**row, "dataset": folder.name} for row in read_jsonl(folder / "validation.jsonl")]
        counts[folder.name] = {**share, "training rows": len(rows), "taken": len(taken), "validation rows": len(held)}
        train += taken
        validation += held
    if not train:
        raise UserError(
            f"mixture '{name}': no training row; look at the weights and caps, and at the datasets' card.json"
        )
    with replacing(mixture) as folder:
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", in_seeded_order(train, seed))
        write_jsonl(folder / "validation.jsonl", in_seeded_order(validation, seed))
        write_json(
            folder / "card.json",
            {"mixture": name, "seed": seed, "train": len(train), "validation": len(validation), "datasets": counts},
        )


def weighted(rows: list[dict[str, Any]], weight: float, cap: int | None, seed: int) -> list[dict[str, Any]]:
    """Each row floor(weight) times, and the share that remains of them once more, at most `cap` in all."""
    ordered = in_seeded_order(rows, seed)
    whole, part = divmod(weight, 1)
    taken = ordered * int(whole) + ordered[: round(part * len(ordered))]
    return taken if cap is None else taken[:cap]


def in_seeded_order(rows: Iterable[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Rows in an order that depends on the seed and on their content, not on where they came from.

    A row that stands there several times is spread out: its copies have different keys.
    """
    copies: dict[str, int] = {}

    def key(row: Mapping[str, Any]) -> bytes:
        content = json.dumps([row["dataset"], row["messages"]], sort_keys=True)
        copies[content] = copies.get(content, -1) + 1
        return hashlib.sha256(f"{seed} {copies[content]} {content}".encode()).digest()

    return sorted(rows, key=key)


if __name__ == "__main__":
    run_stage(concatenate_mixture)
