"""Prediction: greedy answers, few-shot prompts and likelihoods, held to slow plain references."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    FORM,
    QUANTIZATION,
    SETTINGS,
    make_base,
    make_preflight,
    make_rows,
    make_tokens,
    tokenizer,
    train,
)
from tokenizers_for_tests import FAMILIES, family_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge_adapter import merge_adapter
from predict_rows import Question, _row, answer_nll, few_shot_examples, generate, predict_rows, questions
from qlora.conversations import message
from qlora.errors import UserError
from qlora.files import read_jsonl, write_jsonl
from qlora.generation import SLACK
from qlora.models import load_quantized
from qlora.render import IGNORED, rows_of

torch.set_num_threads(1)
ASKED: dict[str, Any] = {"form": FORM, "quantization": QUANTIZATION, "attention": "sdpa", "device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows"))


def asked_of(dataset: Path, shots: int = 0, max_new_tokens: int = 12, context: int = 256) -> list[Question]:
    return list(questions(dataset, "base", tokenizer(), FORM, shots, max_new_tokens, context))


def test_a_row_a_test_row_and_subject(base: Path, dataset: Path, tmp_path: Path) -> None:
    predict_rows(base, [dataset], tmp_path / "out.jsonl", None, None, shots=2, max_new_tokens=8, batch_size=4, **ASKED)
    rows = list(read_jsonl(tmp_path / "out.jsonl"))
    wanted = [row["id"] for row in read_jsonl(dataset / "test.jsonl")]
    assert [row["id"] for row in rows if row["subject"] == "base"] == wanted
    assert [row["id"] for row in rows if row["subject"] == "few_shot"] == wanted
    assert all((row["nll"] is None) == (row["subject"] == "few_shot") for row in rows)
    assert all(row["nll"] > 0 and row["tokens"] > 1 for row in rows if row["subject"] == "base")


@pytest.mark.parametrize(
    ("split", "shots", "message"),
    [
        (
            "test",
            0,
            "dataset 'none': no test rows are left; see its card.json, and give it a test file or a larger holdout.test",
        ),
        ("train", 2, "none: no training row for the few-shot baseline; take few_shot out of its baselines"),
    ],
)
def test_rows_that_are_not_there_are_told_before_anything_is_asked(
    base: Path, dataset: Path, tmp_path: Path, split: str, shots: int, message: str
) -> None:
    shutil.copytree(dataset, tmp_path / "none")
    (tmp_path / f"none/{split}.jsonl").write_text("")
    with pytest.raises(UserError, match=f"^{message}$"):
        predict_rows(
            *(base, [dataset, tmp_path / "none"], tmp_path / "out.jsonl", None, None),
            **(ASKED | {"shots": shots, "max_new_tokens": 8, "batch_size": 4}),
        )
    assert not (tmp_path / "out.jsonl").exists()


def test_batched_and_single_answers_are_the_same(base: Path, dataset: Path) -> None:
    network = load_quantized(base, QUANTIZATION, "cpu", "sdpa").eval()
    asked = asked_of(dataset, shots=1)
    assert len({len(question.prompt) for question in asked}) > 1
    assert generate(network, asked, {2}, 0, 12) == generate(network, asked, {2}, 0, 1)


def test_the_likelihood_is_that_of_the_whole_logits(base: Path, dataset: Path) -> None:
    network = load_quantized(base, QUANTIZATION, "cpu", "sdpa").eval()
    asked = asked_of(dataset)
    for question, found in zip(asked, answer_nll(network, asked, 0), strict=True):
        ids, labels = torch.tensor([question.tokens.input_ids]), question.tokens.labels
        with torch.no_grad():
            log_p = network(input_ids=ids).logits[0].log_softmax(-1)
        plain = -sum(float(log_p[place - 1, label]) for place, label in enumerate(labels) if label != IGNORED)
        assert found == pytest.approx(plain, rel=1e-5)


def test_the_prompt_is_what_training_saw_and_holds_no_answer(dataset: Path) -> None:
    rows = list(read_jsonl(dataset / "test.jsonl"))
    for question, row in zip(asked_of(dataset), rows, strict=True):
        [parts] = rows_of(row["messages"], tokenizer(), FORM)
        assert tokenizer().decode(question.prompt[1:]) == "".join(part.text for part in parts[:-1])
        assert question.prompt == question.tokens.input_ids[: len(question.prompt)]
        assert question.prompt.count(1) == 1


def test_examples_have_different_answers_and_come_from_training(dataset: Path) -> None:
    train = list(read_jsonl(dataset / "train.jsonl"))
    examples = few_shot_examples(train, 3)
    assert len({example[-1]["content"] for example in examples}) == 3
    assert all(example in [row["messages"] for row in train] for example in examples)
    assert few_shot_examples(list(reversed(train)), 3) == examples


def test_examples_are_left_out_until_prompt_and_answer_fit(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    context = 60
    asked = asked_of(dataset, shots=3, context=context)
    assert all(len(question.prompt) + question.limit <= context for question in asked)
    assert "examples left out of few-shot prompts" in caplog.text


def test_a_row_over_the_context_is_refused_by_name(dataset: Path) -> None:
    with pytest.raises(UserError) as caught:
        asked_of(dataset, context=20)
    first = next(read_jsonl(dataset / "test.jsonl"))["id"]
    assert str(caught.value).startswith(f"facts: row {first}: its prompt has ")
    assert str(caught.value).endswith(
        "over the model's context of 20; shorten the row, lower max_new_tokens, or set 'overlong' of the suite to cut_prompt"
    )


def test_a_row_over_the_context_is_cut_on_the_left_for_the_answer_and_for_its_likelihood(
    base: Path, dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    whole = asked_of(dataset)
    cut = list(questions(dataset, "base", tokenizer(), FORM, 2, 12, 20, overlong="cut_prompt"))
    assert "6 rows cut on the left" in caplog.text
    assert all(len(question.prompt) + question.limit <= 20 for question in cut)
    zero_shot = [question for question in cut if question.subject == "base"]
    for question, uncut in zip(zero_shot, whole, strict=True):
        ids, labels = question.tokens.input_ids, question.tokens.labels
        assert question.prompt == [1, *uncut.prompt[len(uncut.prompt) - len(question.prompt) + 1 :]]
        assert len(ids) == len(labels) <= 20
        assert ids == [1, *uncut.tokens.input_ids[len(uncut.tokens.input_ids) - len(ids) + 1 :]]
        assert question.tokens.supervised == uncut.tokens.supervised
    network = load_quantized(base, QUANTIZATION, "cpu", "sdpa").eval()
    ids, labels = torch.tensor([zero_shot[0].tokens.input_ids]), zero_shot[0].tokens.labels
    with torch.no_grad():
        log_p = network(input_ids=ids).logits[0].log_softmax(-1)
    plain = -sum(float(log_p[place - 1, label]) for place, label in enumerate(labels) if label != IGNORED)
    assert answer_nll(network, zero_shot, 0)[0] == pytest.approx(plain, rel=1e-5)


def test_an_answer_over_the_context_is_refused_under_each_policy(dataset: Path, tmp_path: Path) -> None:
    row = {"id": "test.jsonl:1", "messages": [message("user", "What?"), message("assistant", "blue " * 80)]}
    for split in ("train", "test"):
        write_jsonl(tmp_path / "long" / f"{split}.jsonl", [row])
    with pytest.raises(UserError, match=r"^long: row test.jsonl:1: its answer alone has .* tokens, over the model's"):
        list(questions(tmp_path / "long", "base", tokenizer(), FORM, 0, 12, 60, overlong="cut_prompt"))


def test_a_system_message_goes_where_the_model_has_it(tmp_path: Path) -> None:
    words = family_tokenizer("gemma-it")
    turns = [message("system", "Be brief."), message("user", "What?"), message("assistant", "blue")]
    for split in ("train", "test"):
        write_jsonl(tmp_path / "rows" / f"{split}.jsonl", [{"id": "1", "messages": turns}])
    asked = list(questions(tmp_path / "rows", "base", words, None, 1, 12, 256, system="user"))
    assert "user\nBe brief.\n\nWhat?<end_of_turn>" in words.decode(asked[0].prompt)
    few_shot = words.decode(asked[1].prompt)
    assert few_shot.count("Be brief.") == 1
    assert few_shot.index("Be brief.") < few_shot.index("blue")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_template_puts_around_an_answer_is_no_part_of_it(tmp_path: Path, family: str) -> None:
    words = family_tokenizer(family)
    form = None if words.chat_template else FORM
    row = {"id": "1", "messages": [message("user", "What?"), message("assistant", "42 boxes")]}
    for split in ("train", "test"):
        write_jsonl(tmp_path / "rows" / f"{split}.jsonl", [row])
    [question] = questions(tmp_path / "rows", "base", words, form, 0, 12, 256)
    learned = question.tokens.input_ids[len(question.prompt) :]
    stops = {learned[-1]}
    told = _row(question, learned, 1.0, stops, words)
    assert (told["generated"].strip(), told["stopped"], told["tokens"]) == ("42 boxes", True, len(learned))


def test_the_longest_training_answer_bounds_what_is_generated(dataset: Path, tmp_path: Path) -> None:
    longest = max(
        len(tokenizer()(row["messages"][-1]["content"])["input_ids"]) - 1 for row in read_jsonl(dataset / "train.jsonl")
    )
    assert {question.limit for question in asked_of(dataset, max_new_tokens=500)} == {longest + SLACK}
    assert {question.limit for question in asked_of(dataset, max_new_tokens=5)} == {5}


def test_a_model_that_is_taught_facts_answers_and_stops_and_so_does_its_merge(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    dataset = make_rows(tmp_path)
    tokens = make_tokens(tmp_path, base, dataset)
    adapter = tmp_path / "run" / "adapter"
    lora = {**SETTINGS["lora"], "r": 16, "alpha": 32}
    train(
        *(base, tokens, make_preflight(base), tmp_path / "run"),
        **{
            "lora": lora,
            "batch_size": 20,
            "max_steps": 150,
            "learning_rate": 1e-2,
            "eval_steps": None,
            "save_steps": 500,
        },
    )
    write_jsonl(dataset / "test.jsonl", list(read_jsonl(dataset / "train.jsonl")))
    out = tmp_path / "out.jsonl"
    record = tmp_path / "run" / "run.json"
    predict_rows(base, [dataset], out, adapter, record, shots=0, max_new_tokens=16, batch_size=8, **ASKED)
    rows = list(read_jsonl(out))
    references = [row["messages"][-1]["content"] for row in read_jsonl(dataset / "train.jsonl")]
    assert all(row["stopped"] for row in rows)
    assert [row["generated"].strip() for row in rows] == references

    merge_adapter(base, adapter, tmp_path / "merged", QUANTIZATION, "sdpa", "cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for row, reference in zip(rows[:5], references, strict=False):
        ids = words(row["prompt"], return_tensors="pt")["input_ids"]
        written = merged.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        assert words.decode(written, skip_special_tokens=True).strip() == reference

    for file, told in ((adapter / "adapter_model.safetensors", "run.json"), (base / "config.json", "source.json")):
        right = file.read_bytes()
        file.write_bytes(right + b" ")
        with pytest.raises(UserError, match=rf"{file.name} is not the file that {told} names; delete "):
            predict_rows(base, [dataset], out, adapter, record, shots=0, max_new_tokens=1, batch_size=8, **ASKED)
        file.write_bytes(right)
