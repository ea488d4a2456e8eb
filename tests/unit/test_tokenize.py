"""A mixture becomes ids and labels in Arrow files, and what did not fit is counted."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers_for_tests import FAMILIES, REAL, family_tokenizer, make_tokenizer, real_tokenizer_folder
from transformers import AutoTokenizer, FalconConfig, LlamaConfig, PreTrainedTokenizerFast

import tokenize_mixture as stage
from qlora.conversations import message
from qlora.errors import UserError
from qlora.files import read_json
from qlora.render import IGNORED
from tokenize_mixture import BATCH_ROWS, COUNTED, tokenize_mixture

PLAIN = {"system": "{content}\n", "user": "{content}\nAnswer:", "assistant": " {content}", "between": "\n\n"}
BARE = {"system": "{content}", "user": "{content}", "assistant": "{content}", "between": ""}
COLUMNS = ["input_ids", "labels", "length", "dataset"]


def make_row(prompt: str, answer: str) -> dict[str, Any]:
    messages = [message("user", prompt), message("assistant", answer)]
    return {"id": f"train.jsonl:{prompt}", "slice": "", "messages": messages, "dataset": "notes"}


def save_model(tokenizer: PreTrainedTokenizerFast, folder: Path, **config: Any) -> None:
    """What tokenising needs of a model: its tokenizer and its config."""
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=200_000, max_position_embeddings=4096, **config).save_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(make_tokenizer(), folder)
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
            **dict.fromkeys(COUNTED, 0),
            "read": len(expected),
            "kept": len(expected),
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
    assert read_json(tmp_path / "tokens" / "card.json")["validation"] == dict.fromkeys(COUNTED, 0)


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


def refusal(tmp_path: Path, model: Path, rows: list[dict[str, Any]], max_length: int) -> str:
    with pytest.raises(UserError) as caught:
        tokenize_mixture(mixture(tmp_path / "all", rows, []), model, tmp_path / "tokens", PLAIN, max_length, "drop")
    assert {path.name for path in tmp_path.iterdir()} == {"all"}, "something half-written is left"
    return str(caught.value).removeprefix(str(tmp_path))


def test_mixture_of_which_nothing_fits_is_refused(tmp_path, model):
    assert refusal(tmp_path, model, [make_row("a b c d e f g h", "i")], 8) == (
        "/all/train.jsonl: no row fits into max_length 8; raise it, or set 'overlong' to cut"
    )


def test_row_of_which_nothing_is_learned_is_refused(tmp_path, model):
    row = make_row("a", "b")
    row["messages"][1]["supervised"] = False
    assert refusal(tmp_path, model, [make_row("c", "d"), row], 64) == (
        "/all/train.jsonl, line 2 (train.jsonl:a): nothing in it is learned; look at its answer"
    )


LONG = [make_row("a b c d e f g h i", "j k l m n o p q"), make_row("i " * 40, "x"), make_row("x", "y " * 60)]
CHAT = {"id": "chat", "slice": "", "dataset": "notes"}
TURNS = [("user", "How many?"), ("assistant", "42 boxes"), ("user", "Of what?"), ("assistant", "paint " * 20)]


@pytest.mark.parametrize("overlong", ["drop", "cut_prompt", "cut_completion", "split"])
@pytest.mark.parametrize("family", ["llama2", "qwen3"])
def test_counts_add_up(tmp_path, family, overlong):
    tokenizer = family_tokenizer(family)
    save_model(tokenizer, tmp_path / "model")
    chat = {**CHAT, "messages": [message(*turn) for turn in TURNS]}
    rows = [make_row("a </s> b <|im_end|>", "b"), *LONG, chat, make_row("un", "happy"), chat]
    source = mixture(tmp_path / "all", rows, LONG[:1])
    form = None if tokenizer.chat_template else BARE
    tokenize_mixture(source, tmp_path / "model", tmp_path / "tokens", form, 60, overlong)
    for split, read in (("train", len(rows)), ("validation", 1)):
        card = read_json(tmp_path / "tokens" / "card.json")[split]
        written = load(tmp_path / "tokens" / f"{split}.arrow")
        further = card["further rows, one an answer"] + card["further rows, split"]
        assert card["read"] == read
        assert card["read"] + further == card["kept"] + card["over max_length, dropped"]
        assert card["kept"] == len(written)
        assert card["tokens"] == sum(row["length"] for row in written)
        assert card["supervised tokens"] == sum(label != IGNORED for row in written for label in row["labels"])
        assert all(row["length"] <= 60 for row in written)
    card = read_json(tmp_path / "tokens" / "card.json")["train"]
    assert card["further rows, one an answer"] == (2 if family == "qwen3" else 0)
    assert card["special tokens read as text"] == 1
    assert bool(card["further rows, split"]) == (overlong == "split")
    assert bool(card["over max_length, dropped"]) == (overlong != "split")
    assert (card.get(f"over max_length, {overlong}", 0) > 0) == (overlong != "drop")


def test_system_message_goes_where_the_model_has_it(tmp_path):
    tokenizer = family_tokenizer("gemma-it")
    save_model(tokenizer, tmp_path / "model")
    row = {
        **make_row("How many?", "2"),
        "messages": [message("system", "Be brief."), *make_row("How many?", "2")["messages"]],
    }
    source = mixture(tmp_path / "all", [row], [])
    tokenize_mixture(source, tmp_path / "model", tmp_path / "tokens", None, 200, "drop", system="user")
    [written] = load(tmp_path / "tokens" / "train.arrow")
    assert "<start_of_turn>user\nBe brief.\n\nHow many?<end_of_turn>" in tokenizer.decode(written["input_ids"])


def test_a_row_with_an_id_beyond_the_embedding_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "small")
    LlamaConfig(vocab_size=len(tokenizer) - 1, max_position_embeddings=64).save_pretrained(tmp_path / "small")
    last = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1).replace("Ġ", " ")
    source = mixture(tmp_path / "all", [make_row("a", "b"), make_row("c", last)], [])
    with pytest.raises(UserError, match=r"line 2 .*has \d+ rows; take the token out of the row"):
        tokenize_mixture(source, tmp_path / "small", tmp_path / "tokens", BARE, 64, "drop")


def test_the_card_says_at_which_ids_an_answer_ends(tmp_path):
    tokenizer = family_tokenizer("gemma2")
    save_model(tokenizer, tmp_path / "model")
    source = mixture(tmp_path / "all", [make_row("a", "b")], [])
    tokenize_mixture(source, tmp_path / "model", tmp_path / "tokens", None, 64, "drop")
    named = tokenizer.convert_ids_to_tokens(read_json(tmp_path / "tokens" / "card.json")["stop ids"])
    assert sorted(named) == ["<end_of_turn>", "<eos>"]


@pytest.mark.parametrize("config", [LlamaConfig(max_position_embeddings=64), FalconConfig(max_position_embeddings=64)])
def test_rows_longer_than_the_models_context_are_refused(tmp_path, config):
    make_tokenizer().save_pretrained(tmp_path / "some-7b")
    config.save_pretrained(tmp_path / "some-7b")
    source = mixture(tmp_path / "all", [make_row("a", "b")], [])
    tokenize_mixture(source, tmp_path / "some-7b", tmp_path / "tokens", PLAIN, 64, "drop")
    with pytest.raises(UserError) as caught:
        tokenize_mixture(source, tmp_path / "some-7b", tmp_path / "others", PLAIN, 65, "drop")
    assert str(caught.value) == (
        "some-7b: max_length 65 of the mixture is over the model's context of 64 tokens; set max_length to 64 or less"
    )
    assert not (tmp_path / "others").exists()


def lossy_model(folder: Path, kind: str) -> Path:
    """A tokenizer that loses text: small letters only, no accents, or words that it does not know."""
    if kind == "unknown":
        words = ["<unk>", "</s>", "a", "b", "c", "?", "Answer:", *"0123456789"]
        backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, "<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        backend = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
        backend.normalizer = {
            "small": normalizers.Lowercase(),
            "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        }[kind]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    save_model(tokenizer, folder / "lossy-1b")
    return folder / "lossy-1b"


@pytest.mark.parametrize(("kind", "lost"), [("small", "A"), ("accents", "é"), ("unknown", "zebra")])
def test_text_that_is_not_given_back_is_counted_and_refused_above_the_limit(tmp_path, kind, lost):
    form = {**PLAIN, "user": "{content} ?", "assistant": " {content} "}
    base = lossy_model(tmp_path, kind)
    rows = [*(make_row("a", "b") for _ in range(18)), make_row(f"b {lost}", "a"), make_row("b", f"{lost} {lost}")]
    source = mixture(tmp_path / "all", rows, [])
    tokenize_mixture(source, base, tmp_path / "tokens", form, 60, "drop", lossy=0.1)
    assert read_json(tmp_path / "tokens" / "card.json")["train"]["text lost"] == 2
    with pytest.raises(UserError) as caught:
        tokenize_mixture(source, base, tmp_path / "others", form, 60, "drop", lossy=0.09)
    assert str(caught.value) == (
        "lossy-1b: its tokenizer does not give back the text of 2 of 20 rows (10.00%, over 'lossy' of 9.00%), first"
        f" {source}/train.jsonl, line 19 (train.jsonl:b {lost}), with '{lost}';"
        " mend the rows, take another model, or raise 'lossy'"
    )
    assert not (tmp_path / "others").exists()


UNUSUAL = "Où  est 数据 🙂?\n\n\tIt isn't   here, is it? x=1;y -= 2 e\u0301 <b> ``` \\ ''"


@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_back_what_they_can(tmp_path, family):
    tokenizer = family_tokenizer(family)
    save_model(tokenizer, tmp_path / "model")
    source = mixture(tmp_path / "all", [make_row(UNUSUAL, UNUSUAL), make_row("a", "bars: ▁▂▃")], [])
    form = None if tokenizer.chat_template else PLAIN
    tokenize_mixture(source, tmp_path / "model", tmp_path / "tokens", form, 1000, "drop", lossy=1.0)
    lost = FAMILIES[family]["style"] != "bytes"  # sentencepiece's own mark becomes a space
    assert read_json(tmp_path / "tokens" / "card.json")["train"]["text lost"] == lost


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_give_back_what_they_can(tmp_path, name):
    source = mixture(tmp_path / "all", [make_row(UNUSUAL, UNUSUAL), make_row("a", "bars: ▁▂▃")], [])
    save_model(AutoTokenizer.from_pretrained(real_tokenizer_folder(name)), tmp_path / "model")
    tokenize_mixture(source, tmp_path / "model", tmp_path / "tokens", PLAIN, 1000, "drop", lossy=1.0)
    lost = name in ("llama2", "mistral-v1")
    assert read_json(tmp_path / "tokens" / "card.json")["train"]["text lost"] == lost


def test_thought_that_a_template_leaves_out_is_not_lost(tmp_path):
    tokenizer = family_tokenizer("qwen3")
    save_model(tokenizer, tmp_path / "model")
    turns = [*TURNS[:1], ("assistant", "<think>six by seven</think>42 boxes"), *TURNS[2:]]
    source = mixture(tmp_path / "all", [{**CHAT, "messages": [message(*turn) for turn in turns]}], [])
    tokenize_mixture(source, tmp_path / "model", tmp_path / "tokens", None, 1000, "drop", lossy=0.0)
    assert read_json(tmp_path / "tokens" / "card.json")["train"]["text lost"] == 0


def test_thought_that_a_template_writes_anew_is_looked_for_in_its_pieces(tmp_path):
    tokenizer = family_tokenizer("qwen3")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    save_model(tokenizer, tmp_path / "model")
    turns = [message("user", "how many?"), message("assistant", "<think>Six by seven</think>42 boxes")]
    source = mixture(tmp_path / "all", [{**CHAT, "messages": turns}], [])
    tokenize_mixture(source, tmp_path / "model", tmp_path / "tokens", None, 1000, "drop", lossy=1.0)
    assert read_json(tmp_path / "tokens" / "card.json")["train"]["text lost"] == 1


def test_memory_does_not_grow_with_the_rows(tmp_path, model, monkeypatch):
    monkeypatch.setattr(stage, "BATCH_ROWS", 100)
    peaks = []
    for count in (300, 1500):
        rows = [make_row(f"How many boxes {number}?", "42 boxes of paint") for number in range(count)]
        source = mixture(tmp_path / str(count), rows, [])
        del rows
        tracemalloc.start()
        tokenize_mixture(source, model, tmp_path / f"tokens-{count}", PLAIN, 64, "drop")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_threads_and_batches_change_nothing(tmp_path, model, monkeypatch):
    rows = [make_row(f"How many {number}?" * (1 + number % 7), f"{number} </s> boxes") for number in range(300)]
    source = mixture(tmp_path / "all", rows, rows[:20])
    written = []
    for threads, size in ((1, 1000), (2, 1000), (2, 7)):
        monkeypatch.setattr(stage, "BATCH_ROWS", size)
        folder = tmp_path / f"{threads}-{size}"
        tokenize_mixture(source, model, folder, PLAIN, 40, "split", threads=threads)
        card = {key: value for key, value in read_json(folder / "card.json").items() if key != "sha256"}
        written.append((load(folder / "train.arrow"), load(folder / "validation.arrow"), card))
    assert written[0] == written[1] == written[2]
