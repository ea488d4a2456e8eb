"""Stage `concatenate`: training and validation rows of several datasets become one mixture."""

from qlora.stage import run_stage

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from qlora.conversations import prompt_hash
from qlora.errors import UserError
from qlora.files import read_jsonl, replacing, write_json, write_jsonl

# Held-out splits in which no prompt of a split of the mixture may stand.
HELD_FROM = {"train": ("test", "validation"), "validation": ("test",)}
Leaks = dict[bytes, str]  # hash of a prompt → where it is held out


class Place(NamedTuple):
    """Where a row lies, and the digest that decides on it: rows stay on disk, so memory holds 200 bytes a row."""

    digest: bytes  # over the dataset's name and the messages
    file: int
    offset: int


def concatenate_mixture(
    datasets: list[Path],
    evaluated: list[Path],
    mixture: Path,
    name: str,
    shares: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> None:
    """Write `mixture`/{train,validation}.jsonl and card.json from formatted dataset folders.

    `shares` maps a dataset's name to its weight and cap. Which rows are taken, and their order, is decided by a hash of
    the seed and the row alone: neither the order of files and rows nor another dataset of the mixture moves a choice.
    A training row whose prompt stands in the test or validation rows of one of the datasets, or of the `evaluated`
    ones, is left out and counted, and so is a validation row whose prompt stands in test rows.
    """
    counts: dict[str, dict[str, Any]] = {folder.name: dict(shares[folder.name]) for folder in datasets}
    left_out: dict[str, dict[str, int]] = {folder.name: {} for folder in datasets}
    taken: dict[str, list[Place]] = {}
    paths: dict[str, list[Path]] = {}
    for split, held in HELD_FROM.items():
        leaks = held_out_prompts({folder.name: folder for folder in [*datasets, *evaluated]}, held)
        paths[split] = [folder / f"{split}.jsonl" for folder in datasets]
        taken[split] = []
        for index, folder in enumerate(datasets):
            share, left = shares[folder.name], Counter[str]()
            rows = list(_places(index, paths[split][index], leaks, left))
            chosen = weighted(rows, share["weight"], share["cap"], seed) if split == "train" else rows
            counts[folder.name] |= {f"{split} rows": len(rows) + left.total(), f"{split} rows taken": len(chosen)}
            left_out[folder.name] |= {f"{split} prompt stands in {leak}": count for leak, count in sorted(left.items())}
            taken[split] += chosen
    if not taken["train"]:
        raise UserError(
            f"mixture '{name}': no training row; look at the weights and caps, and at the datasets' card.json"
        )
    with replacing(mixture) as folder:
        folder.mkdir()
        for split, places in taken.items():
            write_jsonl(folder / f"{split}.jsonl", _rows_at(in_seeded_order(places, seed), paths[split]))
        write_json(
            folder / "card.json",
            {
                "mixture": name,
                "seed": seed,
                **{split: len(places) for split, places in taken.items()},
                "datasets": counts,
                "left out": left_out,
            },
        )


def held_out_prompts(folders: Mapping[str, Path], splits: Iterable[str]) -> Leaks:
    """The hash of each prompt in these splits of the datasets → where it stands: the split, then the dataset."""
    leaks: Leaks = {}
    for split in splits:
        for name, folder in sorted(folders.items()):
            for row in read_jsonl(folder / f"{split}.jsonl"):
                leaks.setdefault(bytes.fromhex(prompt_hash(row["messages"])), f"{split} of {name}")
    return leaks


def _places(index: int, path: Path, leaks: Leaks, left_out: Counter[str]) -> Iterator[Place]:
    """Where the rows of a dataset's split lie that may be taken; those whose prompt leaks are counted in `left_out`."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            messages = json.loads(line)["messages"]
            leak = leaks.get(bytes.fromhex(prompt_hash(messages)))
            if leak:
                left_out[leak] += 1
            else:
                content = json.dumps([path.parent.name, messages], sort_keys=True)
                yield Place(hashlib.sha256(content.encode()).digest(), index, offset)
            offset += len(line)


def _rows_at(places: Iterable[Place], paths: list[Path]) -> Iterator[dict[str, Any]]:
    """The rows of the mixture; the rest of a row, its database for instance, is for tests alone."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in paths]
        for place in places:
            files[place.file].seek(place.offset)
            row = json.loads(files[place.file].readline())
            yield {"dataset": paths[place.file].parent.name, "id": row["id"], "messages": row["messages"]}


def weighted(rows: list[Place], weight: float, cap: int | None, seed: int) -> list[Place]:
    """Each row floor(weight) times, and the share that remains of them once more, at most `cap` in all."""
    ordered = in_seeded_order(rows, seed)
    whole, part = divmod(weight, 1)
    taken = ordered * int(whole) + ordered[: round(part * len(ordered))]
    return taken if cap is None else taken[:cap]


def in_seeded_order(rows: Iterable[Place], seed: int) -> list[Place]:
    """Rows in an order that depends on the seed and on their content, not on where they came from.

    A row that stands there several times is spread out: its copies have different keys.
    """
    copies: Counter[bytes] = Counter()

    def key(row: Place) -> bytes:
        copies[row.digest] += 1
        return hashlib.sha256(b"%d %d %b" % (seed, copies[row.digest], row.digest)).digest()

    return sorted(rows, key=key)


if __name__ == "__main__":
    run_stage(concatenate_mixture)
