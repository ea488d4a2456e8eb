"""Packing: no row lost, cut or seen by another."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.batches import EndToEnd, LikeLengths, PackedBatch, PaddedBatch, best_fit, packs_of, size_for
from qlora.render import IGNORED


def plain_best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """The same by looking at every pack."""
    packs: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fits = [place for place in range(len(packs)) if free[place] >= lengths[index]]
        if fits:
            place = min(fits, key=lambda place: free[place])
        else:
            place = len(packs)
            packs.append([])
            free.append(room)
        packs[place].append(index)
        free[place] -= lengths[index]
    return packs


@given(st.lists(st.integers(1, 64), max_size=80))
@settings(max_examples=200, deadline=None)
def test_each_row_is_in_one_pack_and_as_few_are_needed_as_best_fit_needs(lengths: list[int]) -> None:
    packs = best_fit(lengths, 64)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in pack) <= 64 for pack in packs)
    assert len(packs) == len(plain_best_fit(lengths, 64))
    assert best_fit(lengths, 64) == packs


def test_a_row_over_the_room_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 9 tokens, over 8"):
        best_fit([3, 9], 8)


def rows_of_lengths(*lengths: int) -> Dataset:
    rows = []
    for start, length in enumerate(lengths):
        ids = [100 * (start + 1) + place for place in range(length)]
        rows.append({"input_ids": ids, "labels": [IGNORED, *ids[1:]], "length": length})
    return Dataset.from_list(rows)


def test_a_packed_batch_holds_its_rows_whole_and_restarts_positions() -> None:
    rows = rows_of_lengths(3, 5, 2)
    packs = packs_of(rows, 8, 0)
    assert packs["rows"] == [[1, 0], [2]]
    batch = PackedBatch(rows, 8, padding=7)(list(packs))
    assert batch["input_ids"].tolist() == [
        [200, 201, 202, 203, 204, 100, 101, 102],
        [300, 301, 7, 7, 7, 7, 7, 7],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert batch["labels"][0].tolist() == [IGNORED, 201, 202, 203, 204, IGNORED, 101, 102]
    assert batch["labels"][1].tolist() == [IGNORED, 301] + [IGNORED] * 6
    assert batch["tokens"].tolist() == [8, 2]
    assert "attention_mask" not in batch


def test_a_rows_first_token_is_not_learned_from_the_row_before() -> None:
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2], "length": 2}] * 2)
    batch = PackedBatch(rows, 4, padding=0)([{"rows": [0, 1]}])
    assert batch["labels"].tolist() == [[IGNORED, 2, IGNORED, 2]]


def test_rows_end_to_end_are_one_pack_of_one_of_a_few_sizes() -> None:
    rows = list(rows_of_lengths(60, 70))
    batch = EndToEnd(padding=7, documents=3)(rows)
    assert batch["input_ids"].tolist() == [[*rows[0]["input_ids"], *rows[1]["input_ids"], *[7] * 30]]
    assert batch["position_ids"].tolist() == [[*range(60), *range(70), *[0] * 30]]
    assert batch["tokens"].tolist() == [130]
    assert batch["cu_seq_lens_q"].tolist() == [0, 60, 130, 160, 160]
    shapes = {name: getattr(value, "shape", value) for name, value in batch.items()}
    other = EndToEnd(padding=7, documents=3)(list(rows_of_lengths(50, 50, 45)))
    assert {name: getattr(value, "shape", value) for name, value in other.items()} == shapes
    assert len(batch["learned"]) == 160
    exact = EndToEnd(padding=7, documents=3, recorded=False)(rows)
    assert exact["input_ids"].shape == (1, 130)
    assert exact["cu_seq_lens_q"].tolist() == [0, 60, 130, 130, 130]


@given(st.integers(1, 10**6))
def test_sizes_are_few_and_near(tokens: int) -> None:
    size = size_for(tokens)
    assert size == size_for(size) >= tokens
    assert size == 128 or size < 1.25 * tokens
    assert size % (1 << size.bit_length() - 3) == 0


def test_a_padded_batch_masks_what_is_padding_even_where_it_equals_a_token() -> None:
    rows: list[dict[str, Any]] = [
        {"input_ids": [5, 2, 2], "labels": [IGNORED, 2, 2]},
        {"input_ids": [5], "labels": [5]},
    ]
    batch = PaddedBatch(padding=2)(rows)
    assert batch["labels"].tolist() == [[IGNORED, 2, 2], [5, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["tokens"].tolist() == [3, 1]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.long


@given(st.lists(st.integers(1, 90), max_size=120), st.integers(1, 7), st.integers(0, 3))
@settings(deadline=None, max_examples=100)
def test_each_epoch_takes_each_row_once_in_its_own_order(lengths: list[int], size: int, epoch: int) -> None:
    sampler, again = LikeLengths(lengths, size, 1), LikeLengths(lengths, size, 1)
    for one in (sampler, again):
        one.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(lengths)))
    torch.manual_seed(epoch)  # which has no say
    assert list(sampler) == list(sampler) == list(again)


def test_batches_hold_rows_of_like_length() -> None:
    lengths = [(37 * place) % 100 + 1 for place in range(200)]
    order = list(LikeLengths(lengths, 4, 1))
    spreads = [max(batch) - min(batch) for batch in zip(*[iter([lengths[row] for row in order])] * 4, strict=True)]
    assert sum(spreads) / len(spreads) < 4
    tokens = [sum(batch) for batch in zip(*[iter([lengths[row] for row in order])] * 4, strict=True)]
    assert tokens[0] == max(tokens)
    assert tokens[1:] != sorted(tokens[1:], reverse=True)
    other = LikeLengths(lengths, 4, 1)
    other.set_epoch(1)
    assert list(other) != order
