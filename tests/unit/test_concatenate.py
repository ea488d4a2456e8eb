"""What a mixture takes of a dataset depends on the seed and the rows' content, on nothing else."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concatenate_mixture import Place, concatenate_mixture, in_seeded_order, weighted
from qlora.conversations import message
from qlora.errors import UserError
from qlora.files import read_json, read_jsonl


def make_row(number: int) -> dict[str, Any]:
    messages = [message("user", f"Question {number}?"), message("assistant", str(number))]
    return {"id": f"{number}", "slice": "", "messages": messages}


def dataset(folder: Path, train: list[int], validation: list[int], test: Sequence[int] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", train), ("validation", validation), ("test", test)):
        text = "".join(json.dumps(make_row(number)) + "\n" for number in numbers)
        (folder / f"{split}.jsonl").write_text(text)
    return folder


def mixed(
    folders: list[Path], seed: int = 0, evaluated: Sequence[Path] = (), **shares: dict[str, Any]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Rows of both splits, and the card."""
    out = folders[0].parent / "mixture"
    full = {folder.name: {"weight": 1.0, "cap": None, **shares.get(folder.name, {})} for folder in folders}
    concatenate_mixture(folders, list(evaluated), out, "all", full, seed)
    return {split: list(read_jsonl(out / f"{split}.jsonl")) for split in ("train", "validation")}, read_json(
        out / "card.json"
    )


def ids(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(row["dataset"], int(row["id"])) for row in rows]


@pytest.fixture
def two(tmp_path):
    return [dataset(tmp_path / "maths", [*range(20)], [100, 101]), dataset(tmp_path / "chat", [*range(50, 58)], [200])]


def test_card_counts_what_was_taken_of_each_dataset(two):
    rows, card = mixed(two, maths={"weight": 0.5}, chat={"weight": 2.0, "cap": 12})
    assert card == {
        "mixture": "all",
        "seed": 0,
        "train": 22,
        "validation": 3,
        "datasets": {
            "maths": {
                **{"weight": 0.5, "cap": None, "train rows": 20, "train rows taken": 10},
                **{"validation rows": 2, "validation rows taken": 2},
            },
            "chat": {
                **{"weight": 2.0, "cap": 12, "train rows": 8, "train rows taken": 12},
                **{"validation rows": 1, "validation rows taken": 1},
            },
        },
        "left out": {"maths": {}, "chat": {}},
    }
    assert Counter(row["dataset"] for row in rows["train"]) == {"maths": 10, "chat": 12}
    assert sorted(ids(rows["validation"])) == [("chat", 200), ("maths", 100), ("maths", 101)]


def test_order_of_rows_and_of_datasets_changes_nothing(two):
    first = mixed(two, maths={"weight": 0.6}, chat={"cap": 5})
    dataset(two[0], [*reversed(range(20))], [101, 100])
    dataset(two[1], [53, 51, 52, 50, 57, 56, 55, 54], [200])
    assert mixed(two[::-1], maths={"weight": 0.6}, chat={"cap": 5}) == first


def test_another_dataset_or_its_share_moves_no_choice(two):
    together, _ = mixed(two, maths={"weight": 0.4}, chat={"weight": 2.0})
    alone, _ = mixed(two[:1], maths={"weight": 0.4})
    assert [row for row in together["train"] if row["dataset"] == "maths"] == alone["train"]


def test_datasets_are_shuffled_into_each_other_and_the_seed_decides_how(two):
    rows, _ = mixed(two)
    again, _ = mixed(two)
    other, _ = mixed(two, seed=1)
    order = [name for name, _ in ids(rows["train"])]
    assert sum(one != two for one, two in pairwise(order)) > 4
    assert again == rows
    assert ids(other["train"]) != ids(rows["train"])
    assert sorted(ids(other["train"])) == sorted(ids(rows["train"]))


def test_added_row_moves_no_other(two):
    before, _ = mixed(two)
    dataset(two[0], [*range(21)], [100, 101])
    after, _ = mixed(two)
    assert [row for row in ids(after["train"]) if row != ("maths", 20)] == ids(before["train"])


def places(numbers: Iterable[int]) -> list[Place]:
    """Rows as concatenate holds them; equal numbers are equal rows that stand in different places."""
    return [Place(f"row {number}".encode(), 0, offset) for offset, number in enumerate(numbers)]


def weigh(count: int, weight: float, cap: int | None = None, seed: int = 0) -> Counter[bytes]:
    return Counter(place.digest for place in weighted(places(range(count)), weight, cap, seed))


@pytest.mark.parametrize(
    ("weight", "times"),
    [(1.0, {1: 10}), (0.5, {1: 5}), (2.0, {2: 10}), (2.5, {2: 5, 3: 5}), (0.26, {1: 3}), (1, {1: 10})],
)
def test_weight_says_how_often_rows_are_taken(weight, times):
    assert Counter(weigh(10, weight).values()) == times


def test_larger_weight_or_cap_keeps_what_the_smaller_took():
    assert weigh(10, 0.3) <= weigh(10, 0.8) <= weigh(10, 1.0) <= weigh(10, 1.4)
    assert weigh(10, 1.0, cap=3) <= weigh(10, 1.0, cap=6)


def test_cap_takes_each_row_once_before_any_twice():
    assert Counter(weigh(10, 2.0, cap=13).values()) == {1: 7, 2: 3}
    assert Counter(weigh(10, 1.0, cap=30).values()) == {1: 10}


def test_seed_decides_which_rows_are_taken():
    assert len({frozenset(weigh(20, 0.5, seed=seed)) for seed in range(5)}) == 5


def test_copies_of_a_row_are_spread_out():
    order = [place.digest for place in in_seeded_order(places([*range(30)] * 2), 0)]
    assert sum(one == two for one, two in pairwise(order)) < 5


@given(st.lists(st.integers(0, 9), max_size=20), st.randoms(use_true_random=False), st.integers())
def test_seeded_order_depends_on_content_alone(numbers, random, seed):
    orders = [in_seeded_order(places(order), seed) for order in (numbers, random.sample(numbers, len(numbers)))]
    assert [place.digest for place in orders[0]] == [place.digest for place in orders[1]]


def test_mixture_without_a_row_is_refused(tmp_path):
    empty = dataset(tmp_path / "maths", [], [1])
    with pytest.raises(UserError, match=r"^mixture 'all': no training row; look at the weights and caps"):
        mixed([empty])
    assert not (tmp_path / "mixture").exists()


def test_prompts_held_out_in_another_dataset_are_left_out_and_counted(tmp_path):
    maths = dataset(tmp_path / "maths", [*range(10)], [20, 21, 40], [30])
    chat = dataset(tmp_path / "chat", [9, 20, 30, 50], [60, 30], [40, 8])
    suite = dataset(tmp_path / "suite", [1], [2], [3, 50, 60])
    rows, card = mixed([maths, chat], evaluated=[chat, suite])
    assert sorted(ids(rows["train"])) == [("chat", 9), *(("maths", n) for n in (0, 1, 4, 5, 6, 7, 9))]
    assert sorted(ids(rows["validation"])) == [("maths", 20), ("maths", 21)]
    assert card["left out"] == {
        "maths": {
            "train prompt stands in test of chat": 1,
            "train prompt stands in test of suite": 1,
            "train prompt stands in validation of suite": 1,
            "validation prompt stands in test of chat": 1,
        },
        "chat": {
            "train prompt stands in test of maths": 1,
            "train prompt stands in test of suite": 1,
            "train prompt stands in validation of maths": 1,
            "validation prompt stands in test of maths": 1,
            "validation prompt stands in test of suite": 1,
        },
    }
    assert (card["datasets"]["maths"]["train rows"], card["datasets"]["maths"]["train rows taken"]) == (10, 7)


def test_prompt_is_the_same_whatever_its_case_and_marks(tmp_path):
    maths = dataset(tmp_path / "maths", [1, 2], [])
    suite = dataset(tmp_path / "suite", [], [])
    row = make_row(1)
    row["messages"][0]["content"] = "QUESTION  1"
    (suite / "test.jsonl").write_text(json.dumps(row) + "\n")
    assert ids(mixed([maths], evaluated=[suite])[0]["train"]) == [("maths", 2)]


def test_row_of_a_mixture_holds_what_is_trained_alone(tmp_path):
    maths = dataset(tmp_path / "maths", [1], [])
    (maths / "train.jsonl").write_text(json.dumps({**make_row(1), "database": "CREATE TABLE t (x);"}) + "\n")
    assert mixed([maths])[0]["train"] == [{"dataset": "maths", "id": "1", "messages": make_row(1)["messages"]}]
