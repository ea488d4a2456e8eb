"""A mixture becomes ids and labels in Arrow files, and what did not fit is counted."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers_for_tests import make_tokenizer

from qlora.conversations import message
from qlora.errors import UserError
from qlora.files import read_json
from qlora.render import IGNORED, Tokens
from tokenize_mixture import BATCH_ROWS, fit, tokenize_mixture

PLAIN = {"system": "{content}\n", "user": "{content}\nAnswer:", "assistant": " {content}", "between": "\n\n"}
BARE = {"system": "{content}", "user": "{content}", "assistant": "{content}", "between": ""}
COLUMNS = ["input_ids", "labels", "length", "dataset"]


def make_row(prompt: str, answer: str) -> dict[str, Any]:
    messages = [message("user", prompt), message("assistant", answer)]
    return {"id": f"train.jsonl:{prompt}", "slice": "", "messages": messages, "dataset": "notes"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tokenizer().save_pretrained(folder)
    return folder


def mixture(folder: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for split, rows in (("train", train), ("validation", validation)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def load(path: Path) -> list[dict[str, Any]]:
    table = datasets.Dataset.from_file(str(path))
    assert table.column_names == COLUMNS
    return table.to_list()


def test_rows_and_card(tmp_path, model):
    rows = [make_row(f"question {number}?", str(number)) for number in range(12)]
    source = mixture(tmp_path / "all", rows[:10], rows[10:])
    tokenize_mixture(source, model, tmp_path / "tokens", PLAIN, 64, "drop")
    loaded = {split: load(tmp_path / "tokens" / f"{split}.arrow") for split in ("train", "validation")}
    card = read_json(tmp_path / "tokens" / "card.json")
    tokenizer = make_tokenizer()
    for split, expected in (("train", rows[:10]), ("validation", rows[10:])):
        for row, given in zip(loaded[split], expected, strict=True):
            prompt, answer = (turn["content"] for turn in given["messages"])
            assert tokenizer.decode(row["input_ids"]) == f"<s>{prompt}\nAnswer: {answer}</s>"
            assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == f" {answer}</s>"
            assert row["length"] == len(row["input_ids"]) == len(row["labels"])
            assert row["dataset"] == "notes"
        assert card[split] == {
            "read": len(expected),
            "kept": len(expected),
            "prompt and answer tokenised apart": 0,
            "tokens": sum(row["length"] for row in loaded[split]),
            "supervised tokens": sum(label != IGNORED for row in loaded[split] for label in row["labels"]),
        }
    assert {key: card[key] for key in ("model", "mixture", "max_length", "overlong")} == {
        "model": "tiny",
        "mixture": "all",
        "max_length": 64,
        "overlong": "drop",
    }


def test_more_rows_than_a_batch_and_no_validation_row(tmp_path, model):
    source = mixture(tmp_path / "all", [make_row(str(n), "x") for n in range(2 * BATCH_ROWS + 1)], [])
    tokenize_mixture(source, model, tmp_path / "tokens", PLAIN, 64, "drop")
    assert len(load(tmp_path / "tokens" / "train.arrow")) == 2 * BATCH_ROWS + 1
    assert load(tmp_path / "tokens" / "validation.arrow") == []
    assert read_json(tmp_path / "tokens" / "card.json")["validation"] == {
        "read": 0, "kept": 0, "tokens": 0, "supervised tokens": 0
    }  # fmt: skip


def test_rows_tokenised_apart_are_counted(tmp_path, model):
    source = mixture(tmp_path / "all", [make_row("un", "happy"), make_row("a?", "b")], [])
    tokenize_mixture(source, model, tmp_path / "tokens", BARE, 64, "drop")
    assert read_json(tmp_path / "tokens" / "card.json")["train"]["prompt and answer tokenised apart"] == 1


@pytest.mark.parametrize(
    ("overlong", "counted", "kept"),
    [
        ("drop", "over max_length, dropped", 1),
        ("cut_prompt", "over max_length, cut_prompt", 2),
        ("cut_completion", "over max_length, cut_completion", 2),
    ],
)
def test_long_rows_are_counted_by_what_happened_to_them(tmp_path, model, overlong, counted, kept):
    long = make_row("a b c d e f g h i", "j k l m n o p q")
    source = mixture(tmp_path / "all", [make_row("a", "b"), long], [])
    tokenize_mixture(source, model, tmp_path / "tokens", PLAIN, 30, overlong)
    card = read_json(tmp_path / "tokens" / "card.json")["train"]
    rows = load(tmp_path / "tokens" / "train.arrow")
    assert (card["read"], card["kept"], card[counted]) == (2, kept, 1)
    assert len(rows) == kept
    assert all(row["length"] == 30 for row in rows[1:])


TOKENS = Tokens([1, 10, 11, 12, 13, 20, 21, 2], [IGNORED] * 5 + [20, 21, 2], False)


def test_row_that_fits_is_left_alone():
    for overlong in ("drop", "cut_prompt", "cut_completion"):
        assert fit(TOKENS, 8, overlong) is TOKENS


def test_dropped_row():
    assert fit(TOKENS, 7, "drop") is None


def test_cut_prompt_keeps_the_bos_the_end_of_the_prompt_and_the_answer():
    assert fit(TOKENS, 6, "cut_prompt") == Tokens([1, 12, 13, 20, 21, 2], [IGNORED] * 3 + [20, 21, 2], False)
    assert fit(TOKENS, 5, "cut_prompt") == Tokens([1, 13, 20, 21, 2], [IGNORED] * 2 + [20, 21, 2], False)
    assert fit(TOKENS, 4, "cut_prompt") is None


def test_cut_completion_keeps_the_beginning_while_something_is_left_to_learn():
    assert fit(TOKENS, 6, "cut_completion") == Tokens([1, 10, 11, 12, 13, 20], [IGNORED] * 5 + [20], False)
    assert fit(TOKENS, 5, "cut_completion") is None


def refusal(tmp_path: Path, model: Path, rows: list[dict[str, Any]], max_length: int) -> str:
    with pytest.raises(UserError) as caught:
        tokenize_mixture(mixture(tmp_path / "all", rows, []), model, tmp_path / "tokens", PLAIN, max_length, "drop")
    assert {path.name for path in tmp_path.iterdir()} == {"all"}
    return str(caught.value).removeprefix(str(tmp_path))


def test_mixture_of_which_nothing_fits_is_refused(tmp_path, model):
    assert refusal(tmp_path, model, [make_row("a b c d e f g h", "i")], 8) == (
        "/all/train.jsonl: no row fits into max_length 8; raise it, or set 'overlong' to cut"
    )


def test_row_of_which_nothing_is_learned_is_refused(tmp_path, model):
    row = make_row("a", "b")
    row["messages"][1]["supervised"] = False
    assert refusal(tmp_path, model, [make_row("c", "d"), row], 64) == (
        "/all/train.jsonl, line 2 (train.jsonl:a): nothing in it is learned; look at its answer and at max_length"
    )
