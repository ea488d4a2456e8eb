"""A dataset's rows are split without leaks, by content and not by place, and every row is accounted for."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from format_dataset import SPLITS, Row, format_dataset, held_out, split_files
from qlora.conversations import prompt_hash
from qlora.errors import UserError
from qlora.files import read_json, read_jsonl
from qlora.pins import needed_files

SETTINGS: dict[str, Any] = {
    "source": {"path": "notes.jsonl", "sha256": "0" * 64},
    "prompt": "{text}",
    "completion": "{label}",
    "task": "label",
    "holdout": {"validation": 0.05, "test": 0.1},
    "limit": {},
    "unusable_rows": "refuse",
    "licence": "MIT",
}
THREE_FILES = {"files": {split: f"{split}.jsonl" for split in SPLITS}}


def notes(numbers: Any, label: str = "x") -> list[dict[str, str]]:
    return [{"text": f"note {number}", "label": label} for number in numbers]


def put(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def folder_with(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    """A source as the download leaves it: the files of the splits, and its record."""
    for split, rows in splits.items():
        put(folder / f"{split}.jsonl", rows)
    put(folder / "source.json", [{}])
    return folder


def formatted(source: Path, **changes: Any) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """The rows of each split, and the card; the counts must add up."""
    out = source.parent / "formatted"
    format_dataset(source, out, "notes", {**SETTINGS, **changes})
    rows = {split: list(read_jsonl(out / f"{split}.jsonl")) for split in SPLITS}
    card = read_json(out / "card.json")
    assert card["kept"] == {split: len(rows[split]) for split in SPLITS}
    check_balance(card)
    assert {split: sum(counts.values()) for split, counts in card["slices"].items()} == card["kept"]
    return rows, card


def check_balance(card: dict[str, Any]) -> None:
    """Each row read for a split is kept there, dropped for a reason, or given up by train to a split without a file."""
    held = card["held out of train"]
    for split in SPLITS:
        given = card["read"][split] + (held.get(split, 0) if split != "train" else -sum(held.values()))
        assert given == card["kept"][split] + sum(card["dropped"][split].values()), (split, card)


def refusal(source: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        formatted(source, **changes)
    assert not (source.parent / "formatted").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def prompts(rows: list[dict[str, Any]]) -> set[str]:
    return {row["messages"][0]["content"] for row in rows}


def test_row_in_its_canonical_form(tmp_path):
    source = folder_with(tmp_path / "source", train=notes([1]), validation=notes([2]), test=notes([3]))
    rows, card = formatted(source, **THREE_FILES)
    assert rows["train"] == [
        {
            "id": "train.jsonl:1",
            "slice": "",
            "messages": [
                {"role": "user", "content": "note 1", "supervised": False},
                {"role": "assistant", "content": "x", "supervised": True},
            ],
        }
    ]
    assert card == {
        "dataset": "notes",
        "source": SETTINGS["source"],
        "licence": "MIT",
        "task": "label",
        "read": {"train": 1, "validation": 1, "test": 1},
        "held out of train": {},
        "kept": {"train": 1, "validation": 1, "test": 1},
        "repeated": {split: {"prompt and answers": 0, "prompt": 0} for split in SPLITS},
        "slices": {"train": {"all": 1}, "validation": {"all": 1}, "test": {"all": 1}},
        "dropped": {"train": {}, "validation": {}, "test": {}},
    }


def test_files_of_a_split_are_found_by_glob_and_read_in_order(tmp_path):
    source = folder_with(tmp_path / "source", test=notes([9]))
    put(source / "data" / "part-2.jsonl", notes([2]))
    put(source / "data" / "part-1.jsonl", notes([1]))
    rows, _ = formatted(source, files={"train": "data/*.jsonl", "test": "test.jsonl"}, holdout={"validation": 0})
    assert [row["id"] for row in rows["train"]] == ["data/part-1.jsonl:1", "data/part-2.jsonl:1"]


@pytest.mark.parametrize(
    "pattern", ["*train*", "*/train*", "**/*train*", "*[n]-1.jsonl", "data/*", "data/", "data/train-1.jsonl"]
)
def test_a_glob_finds_the_files_that_the_download_fetches_by_it(tmp_path, pattern):
    files = ["train-0.jsonl", "test.jsonl", "data/train-1.jsonl", "data/more/train-2.jsonl"]
    for number, file in enumerate(files):
        put(tmp_path / "source" / file, notes([number]))
    found = split_files(tmp_path / "source", "notes", {"train": pattern})["train"]
    fetched = filter_repo_objects(sorted(files), allow_patterns=needed_files("datasets", {"files": {"train": pattern}}))
    assert [path.relative_to(tmp_path / "source").as_posix() for path in found] == list(fetched)


def test_single_file_needs_no_files_key_and_the_record_of_its_download_is_no_data(tmp_path):
    rows, card = formatted(folder_with(tmp_path / "source", notes=notes(range(1000))))
    assert card["read"] == {"train": 1000, "validation": 0, "test": 0}
    assert card["held out of train"] == {split: len(rows[split]) for split in ("validation", "test")}
    assert 70 < len(rows["test"]) < 130
    assert 30 < len(rows["validation"]) < 70


def test_several_files_need_the_files_key(tmp_path):
    source = folder_with(tmp_path / "source", train=notes([1]), test=notes([2]))
    assert refusal(source) == ("config: datasets.notes: its source has 2 files; say with 'files' which split is which")


def test_record_of_the_download_matches_no_glob(tmp_path):
    source = folder_with(tmp_path / "source")
    (source / "rows.json").write_text(json.dumps(notes(range(10))))
    _, card = formatted(source, files={"train": "*.json"})
    assert card["read"]["train"] == 10


def test_a_file_in_two_splits_is_refused(tmp_path):
    source = folder_with(tmp_path / "source", train=notes([1]), test=notes([2]))
    assert refusal(source, files={"train": "*.jsonl", "test": "test.jsonl"}) == (
        "config: datasets.notes.files: test.jsonl is in train and in test; choose one"
    )


def test_source_may_be_a_file(tmp_path):
    rows, _ = formatted(put(tmp_path / "notes.jsonl", notes(range(10))), holdout={"validation": 0, "test": 0})
    assert [row["id"] for row in rows["train"]] == [f"notes.jsonl:{number}" for number in range(1, 11)]


@given(st.lists(st.integers(0, 60), min_size=30, max_size=120), st.randoms(use_true_random=False))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_adding_and_moving_rows_moves_no_row_between_splits(tmp_path, numbers, random):
    def split_of_each(order):
        rows, _ = formatted(put(tmp_path / "notes.jsonl", notes(order)), holdout={"validation": 0.3, "test": 0.3})
        sides = {split: prompts(rows[split]) for split in SPLITS}
        assert sum(len(side) for side in sides.values()) == len(set(order)), "equal prompts stand on two sides"
        return {prompt: split for split in SPLITS for prompt in sides[split]}

    shuffled = [*numbers, *range(100, 120)]
    random.shuffle(shuffled)
    before, after = split_of_each(numbers), split_of_each(shuffled)
    assert before == {prompt: after[prompt] for prompt in before}


def test_prompts_that_differ_in_case_and_spaces_alone_are_held_out_together(tmp_path):
    variants = [{"text": text, "label": "x"} for n in range(50) for text in (f"note {n}", f"  NOTE\u00a0 {n}")]
    rows, _ = formatted(put(tmp_path / "notes.jsonl", variants), holdout={"validation": 0.3, "test": 0.3})
    for split in SPLITS:
        hashes = Counter(prompt_hash(row["messages"]) for row in rows[split])
        assert hashes
        assert set(hashes.values()) == {2}


@pytest.mark.parametrize("shares", [(0.0, 0.5), (0.5, 0.0), (0.2, 0.7), (0.7, 0.2)])
def test_each_split_gets_its_share_whatever_the_other_takes(tmp_path, shares):
    validation, test = shares
    rows, _ = formatted(
        put(tmp_path / "notes.jsonl", notes(range(2000))), holdout={"validation": validation, "test": test}
    )
    assert len(rows["validation"]) / 2000 == pytest.approx(validation, abs=0.03)
    assert len(rows["test"]) / 2000 == pytest.approx(test, abs=0.03)


def test_share_of_one_split_does_not_move_the_rows_of_the_other(tmp_path):
    source = put(tmp_path / "notes.jsonl", notes(range(300)))
    few, _ = formatted(source, holdout={"validation": 0.05, "test": 0.2})
    many, _ = formatted(source, holdout={"validation": 0.4, "test": 0.2})
    assert few["test"] == many["test"]
    assert prompts(few["validation"]) < prompts(many["validation"])


def test_held_out_bounds_take_all_or_nothing():
    rows = [Row(digit * 64, b"", "", "") for digit in "0f"]
    for split in ("validation", "test"):
        assert held_out(rows, split, 0.0) == (rows, [])
        assert held_out(rows, split, 1.0) == ([], rows)


def test_training_rows_whose_prompt_is_tested_are_dropped_and_counted(tmp_path):
    source = folder_with(
        tmp_path / "source",
        train=[*notes(range(10)), *notes([3], label="another")],
        validation=notes([3, 4]),
        test=[*notes([4]), {"text": " NOTE 5 ", "label": "x"}],
    )
    rows, card = formatted(source, **THREE_FILES)
    assert prompts(rows["train"]) == {f"note {number}" for number in (0, 1, 2, 6, 7, 8, 9)}
    assert prompts(rows["validation"]) == {"note 3"}
    assert len(rows["test"]) == 2
    assert card["dropped"] == {
        "train": {"prompt stands in test": 2, "prompt stands in validation": 2},
        "validation": {"prompt stands in test": 1},
        "test": {},
    }


def test_leaking_row_is_not_held_out_for_validation_either(tmp_path):
    source = folder_with(tmp_path / "source", train=notes(range(200)), test=notes(range(100)))
    rows, _ = formatted(
        source, files={"train": "train.jsonl", "test": "test.jsonl"}, holdout={"validation": 0.5, "test": 0.1}
    )
    assert len(rows["test"]) == 100
    assert rows["validation"]
    assert not prompts(rows["test"]) & (prompts(rows["validation"]) | prompts(rows["train"]))


def test_limit_keeps_rows_by_content_in_their_own_order(tmp_path):
    order = [7, 3, 9, 1, 5, 0, 2, 8, 6, 4]
    source = folder_with(tmp_path / "source", train=notes(order), test=notes(range(20, 30)))
    files = {"train": "train.jsonl", "test": "test.jsonl"}
    changes = {"files": files, "holdout": {"validation": 0}, "limit": {"train": 4, "test": 20}}
    rows, card = formatted(source, **changes)
    numbers = [int(row["messages"][0]["content"].split()[1]) for row in rows["train"]]
    assert numbers == [number for number in order if number in numbers]
    assert card["dropped"]["train"] == {"over the limit": 6}
    assert len(rows["test"]) == 10
    put(source / "train.jsonl", notes(sorted(order)))
    again, _ = formatted(source, **changes)
    assert prompts(again["train"]) == prompts(rows["train"])


TEACH_NOTHING = [{"text": "a", "label": ""}, {"text": "b", "label": None}, {"text": " ", "label": "x"}]


def test_rows_that_teach_nothing_are_dropped_and_counted_by_reason_where_the_config_says_so(tmp_path):
    source = put(tmp_path / "notes.jsonl", [*notes(range(20)), *TEACH_NOTHING])
    rows, card = formatted(source, unusable_rows="drop")
    assert card["dropped"]["train"] == {"empty answer": 2, "has no prompt": 1}
    assert card["read"]["train"] == 23
    assert sum(map(len, rows.values())) == 20


def test_row_that_teaches_nothing_is_refused_otherwise(tmp_path):
    way_out = "mend the row, or set datasets.notes.unusable_rows: drop, which leaves such rows out and counts them"
    messages = [
        f"notes.jsonl, row 3, column 'label': empty answer; {way_out}",
        f"notes.jsonl, row 3, column 'label': empty answer; {way_out}",
        f"notes.jsonl, row 3, column 'text': has no prompt; {way_out}",
    ]
    for row, expected in zip(TEACH_NOTHING, messages, strict=True):
        assert refusal(put(tmp_path / "notes.jsonl", [*notes(range(2)), row])) == expected
    chat = put(tmp_path / "chat.jsonl", [{"turns": [{"role": "user", "content": "Hi"}]}])
    assert refusal(chat, messages="turns") == (
        f"chat.jsonl, row 1, column 'turns': does not end in an answer; {way_out}"
    )
    alpaca = put(tmp_path / "alpaca.jsonl", [{"instruction": "", "output": "x"}])
    assert refusal(alpaca, alpaca=True) == (
        f"alpaca.jsonl, row 1, column 'instruction', 'input': has no prompt; {way_out}"
    )


def test_answer_outside_the_declared_labels_is_refused_with_the_nearest(tmp_path):
    source = put(tmp_path / "notes.jsonl", [*notes([1], "card"), *notes([2], " cash "), *notes([3], "crad")])
    assert refusal(source, labels=["card", "cash"]) == (
        "notes.jsonl, row 3, column 'label': the label 'crad' is not declared in 'labels'; the nearest is 'card'"
    )
    assert refusal(source, labels=["zebra", "card"]) == (
        "notes.jsonl, row 2, column 'label': the label 'cash' is not declared in 'labels'; the nearest is 'card'"
    )
    formatted(source, labels=["card", "cash", "crad"])


def test_repeated_rows_are_kept_and_counted(tmp_path):
    given = [*notes([1, 1, 1, 2, 3]), *notes([1], "y"), {"text": "Note 2!", "label": "x"}]
    source = folder_with(tmp_path / "source", train=given, validation=notes([8]), test=notes([9, 9]))
    rows, card = formatted(source, **THREE_FILES)
    assert len(rows["train"]) == 7
    assert card["repeated"] == {
        "train": {"prompt and answers": 2, "prompt": 4},
        "validation": {"prompt and answers": 0, "prompt": 0},
        "test": {"prompt and answers": 1, "prompt": 1},
    }


ANY_ROW = st.fixed_dictionaries(
    {
        "text": st.sampled_from(["", " ", None, *(f"note {number}" for number in range(6))]),
        "label": st.sampled_from(["", None, "x", "y", 3, False]),
    }
)


@given(st.lists(ANY_ROW, max_size=25), st.lists(ANY_ROW, max_size=12), st.lists(ANY_ROW, max_size=6), st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_row_disappears_uncounted(tmp_path, train, validation, test, data):
    source = tmp_path / "source"
    splits = {"train": [*train, *notes([99])], "validation": validation, "test": test}
    splits = {split: rows for split, rows in splits.items() if rows}
    for split in SPLITS:
        (source / f"{split}.jsonl").unlink(missing_ok=True)
    folder_with(source, **splits)
    limit = data.draw(st.dictionaries(st.sampled_from(SPLITS), st.integers(1, 8)))
    shares = {"validation": 0.2, "test": 0.2}
    rows, card = formatted(
        source, files={split: f"{split}.jsonl" for split in splits}, limit=limit, holdout=shares, unusable_rows="drop"
    )
    assert card["read"] == {split: len(splits.get(split, [])) for split in SPLITS}
    hashes = {split: {prompt_hash(row["messages"]) for row in rows[split]} for split in SPLITS}
    assert not hashes["test"] & hashes["validation"]
    assert not hashes["train"] & (hashes["test"] | hashes["validation"])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such column": (
        {"prompt": "{question}"},
        "train.jsonl, row 1: has no column 'question'; it has text, label",
    ),
    "no such slice": ({"slice": "part"}, "train.jsonl, row 1: has no column 'part'; it has text, label"),
    "no database in test": (
        {"database": {"column": "db"}, "holdout": {"validation": 0, "test": 1}},
        "train.jsonl:1: nothing in column 'db', which the config names as database",
    ),
    "no such file": (
        {"files": {"train": "train.csv"}},
        "config: datasets.notes.files.train: nothing in {source} matches 'train.csv'",
    ),
    "no such database": (
        {"database": {"file": "shop.db"}},
        "config: datasets.notes.database.file: {source}/shop.db does not exist",
    ),
    "no row is left": (
        {"completion": "{label}", "prompt": "{empty}"},
        "dataset 'notes': no row is left of 2 read; dropped: {{'has no prompt': 2}}",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_message_of_a_dataset_that_cannot_be_used(tmp_path, changes, message):
    rows = notes(range(2))
    if changes.get("prompt") == "{empty}":
        rows = [{**row, "empty": ""} for row in rows]
    source = folder_with(tmp_path / "source", train=rows)
    given = {"files": {"train": "train.jsonl"}, "unusable_rows": "drop", **changes}
    assert refusal(source, **given) == message.format(source=source)


def test_empty_file_is_refused(tmp_path):
    source = put(tmp_path / "notes.jsonl", [])
    assert refusal(source) == f"{source}: has no rows"


def test_formatting_again_gives_the_same_bytes(tmp_path):
    source = put(tmp_path / "notes.jsonl", notes(range(40)))
    formatted(source)
    first = {path.name: path.read_bytes() for path in (tmp_path / "formatted").iterdir()}
    formatted(source)
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "formatted").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"notes.jsonl", "formatted"}
