"""How tokenised rows become the tensors of a batch: padded side by side, end to end, or packed to a fixed length."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from random import Random
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler

from qlora.loss import TILE, places_of
from qlora.render import IGNORED

POOL = 50  # batches
Batch = dict[str, Any]
Row = Mapping[str, Any]


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of rows grouped into packs of at most `room` tokens: each row once, none cut (best fit decreasing).

    The longest row goes first, each into the fullest pack that has room for it (Johnson, 1973: at most 11/9 of the
    fewest packs possible, and one). Raises ValueError for a row that is longer than `room`.
    """
    packs: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # free tokens → packs that have just these
    spaces = 0  # bit n is set where a pack has n free tokens, so the smallest that suffices is one shift away
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        if length > room:
            raise ValueError(f"row {index} has {length} tokens, over {room}")
        enough = spaces >> length
        if enough:
            space = length + (enough & -enough).bit_length() - 1
            pack = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, pack = room, len(packs)
            packs.append([])
        packs[pack].append(index)
        left = space - length
        with_space.setdefault(left, []).append(pack)
        spaces |= 1 << left
    return packs


def with_places(batch: Batch, tile: int = 1) -> Batch:
    """Add where the loss is (`qlora.loss.places_of`), padded with ignored places to a whole number of tiles."""
    learned, wanted = places_of(batch["labels"])
    missing = -len(learned) % tile
    batch["learned"] = torch.nn.functional.pad(learned, (0, missing))
    batch["wanted"] = torch.nn.functional.pad(wanted, (0, missing), value=IGNORED)
    return batch


class PaddedBatch:
    """Rows side by side, padded on the right to the longest: input_ids, labels and attention_mask, all (rows, width).

    `tokens` (rows,) counts what is no padding; the trainer takes it out before the model sees the batch.
    """

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """Collate `examples`, which hold input_ids and labels."""
        lengths = [len(example["input_ids"]) for example in examples]
        shape = (len(examples), max(lengths))
        batch = {
            "input_ids": torch.full(shape, self.padding),
            "labels": torch.full(shape, IGNORED),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "tokens": torch.tensor(lengths),
        }
        for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            batch["input_ids"][row, :length] = torch.tensor(example["input_ids"])
            batch["labels"][row, :length] = torch.tensor(example["labels"])
            batch["attention_mask"][row, :length] = 1
        return with_places(batch)


def packed(packs: Sequence[Sequence[Row]], room: int, padding: int, documents: int | None) -> Batch:
    """Packs of several rows each: input_ids, labels and position_ids, all (packs, room), and no attention mask.

    Attention stays inside a row because its positions begin at 0 again; transformers looks at them only where there is
    no mask. Padding tokens are rows of one token. `tokens` (packs,) counts what is no padding.

    With `documents`, the most rows of any pack, all shapes are the same in each batch of as many packs, but for the
    number of learned places in whole tiles; and `cu_seq_lens_q` says where each row begins, for attention that
    takes them apart itself: padding is then one row, and rows of no token fill up the count.
    """
    shape = (len(packs), room)
    batch: Batch = {
        "input_ids": torch.full(shape, padding),
        "labels": torch.full(shape, IGNORED),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "tokens": torch.zeros(len(packs), dtype=torch.long),
    }
    starts = []
    for pack, rows in enumerate(packs):
        end = 0
        for row in rows:
            start, end = end, end + len(row["input_ids"])
            starts.append(pack * room + start)
            batch["input_ids"][pack, start:end] = torch.tensor(row["input_ids"])
            batch["labels"][pack, start:end] = torch.tensor(row["labels"])
            batch["labels"][pack, start] = IGNORED  # else it would be learned from the row before
            batch["position_ids"][pack, start:end] = torch.arange(end - start)
        batch["tokens"][pack] = end
        if end < room:
            starts.append(pack * room + end)
    if documents is None:
        return with_places(batch)
    ends = [len(packs) * room] * (len(packs) * (documents + 1) + 1 - len(starts))
    batch["cu_seq_lens_q"] = torch.tensor(starts + ends, dtype=torch.int32)
    batch["max_length_q"] = room
    return with_places(batch, min(TILE, len(packs) * room))


class PackedBatch:
    """Packs of rows that were chosen to fill `room` tokens; see `packed`, whose arguments these are."""

    def __init__(self, rows: Dataset, room: int, padding: int, documents: int | None = None) -> None:
        self.rows, self.room, self.padding, self.documents = rows, room, padding, documents

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """Collate `examples`, each with the indices of a pack's rows under `rows`."""
        packs = [[self.rows[row] for row in example["rows"]] for example in examples]
        return packed(packs, self.room, self.padding, self.documents)


class EndToEnd:
    """The rows of a batch, at most `documents`, as one pack (see `packed`), with no padding between them.

    Where steps are `recorded`, the pack's room is one of a few sizes, each of which is recorded once.
    """

    def __init__(self, padding: int, documents: int | None, recorded: bool = True) -> None:
        self.padding, self.documents, self.recorded = padding, documents, recorded

    def __call__(self, examples: Sequence[Row]) -> Batch:
        """Collate `examples`, which hold input_ids and labels."""
        tokens = sum(len(example["input_ids"]) for example in examples)
        return packed([examples], size_for(tokens) if self.recorded else tokens, self.padding, self.documents)


def size_for(tokens: int) -> int:
    """The least of 128, 160, 192, 224, 256, 320, 384, … (four to a doubling) that is at least `tokens`."""
    tokens = max(tokens, 128)
    step = 1 << (tokens - 1).bit_length() - 3
    return -(-tokens // step) * step


class LikeLengths(Sampler[int]):
    """Places of rows so that each batch holds rows of like length; another order each epoch, decided by the seed alone.

    Rows are drawn in pools of POOL batches, which are sorted by length and cut into batches; the batches are shuffled.
    The one with the most tokens comes first: what does not fit into memory shows at once, and what it took serves all.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer when an epoch begins, so that one that was cut off goes on in its own order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = Random(f"{self.seed} {self.epoch}")
        order = random.sample(range(len(self)), len(self))
        pool = POOL * self.batch_size
        sorted_pools = [
            sorted(order[start : start + pool], key=lambda row: -self.lengths[row])
            for start in range(0, len(self), pool)
        ]
        places = list(chain.from_iterable(sorted_pools))
        batches = [places[start : start + self.batch_size] for start in range(0, len(self), self.batch_size)]
        last = batches.pop() if batches and len(batches[-1]) < self.batch_size else []
        random.shuffle(batches)
        if batches:
            tokens = [sum(self.lengths[row] for row in batch) for batch in batches]
            largest = tokens.index(max(tokens))
            batches[0], batches[largest] = batches[largest], batches[0]
        return chain(*batches, last)


def packs_of(rows: Dataset, room: int, first: int) -> Dataset:
    """A dataset of packs; its column `rows` has the indices of each pack's rows, counted from `first`."""
    return Dataset.from_dict({"rows": [[first + row for row in pack] for pack in best_fit(rows["length"][:], room)]})
