"""A user's row becomes a list of messages; what makes two prompts the same."""

import os
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qlora.conversations import conversation, fill, from_llama2_text, message, normalised, prompt_hash, unusable
from qlora.errors import UserError
from qlora.readers import read_rows

PLACE = "train.jsonl, row 3"
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)
SPACES = st.text(" \t\n\r\u00a0\u2003\u3000", min_size=1, max_size=4)


def roles_and_texts(messages):
    return [(turn["role"], turn["content"]) for turn in messages]


def refusal(row, mapping):
    with pytest.raises(UserError) as caught:
        conversation(row, mapping, PLACE)
    return str(caught.value)


def test_template_is_filled_with_columns():
    assert fill("{a}\n{b}: {a}", {"a": "x", "b": 2}, PLACE) == "x\n2: x"


def test_doubled_braces_stand_for_themselves_and_values_are_put_in_as_they_are():
    assert fill('{{"q": "{q}"}}', {"q": "{nobody} {{}} %s \\n"}, PLACE) == '{"q": "{nobody} {{}} %s \\n"}'


def test_empty_column_gives_nothing_and_the_ends_are_stripped():
    assert fill("{a}\n{b}\n", {"a": None, "b": " x "}, PLACE) == "x"


def test_prompt_completion_and_system_become_messages_with_only_the_answer_supervised():
    mapping = {"system": "Use {tool}.", "prompt": "{q}", "completion": "{a}"}
    assert conversation({"tool": "SQL", "q": "Who?", "a": "SELECT 1"}, mapping, PLACE) == [
        {"role": "system", "content": "Use SQL.", "supervised": False},
        {"role": "user", "content": "Who?", "supervised": False},
        {"role": "assistant", "content": "SELECT 1", "supervised": True},
    ]


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": "Hi "}, {"role": "assistant", "content": " Hello"}],
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        [{"role": "prompter", "content": "Hi", "id": 7}, {"role": "bot", "content": "Hello"}],
    ],
)
def test_lists_of_messages_in_their_usual_shapes(turns):
    assert conversation({"turns": turns}, {"messages": "turns"}, PLACE) == [
        message("user", "Hi"),
        message("assistant", "Hello"),
    ]


@pytest.mark.parametrize(
    ("row", "mapping", "expected"),
    [
        ({"b": 1}, {"prompt": "{a}", "completion": "x"}, f"{PLACE}: has no column 'a'; it has b"),
        ({"b": 1}, {"messages": "turns"}, f"{PLACE}: has no column 'turns'; it has b"),
        ({"t": "Hi"}, {"messages": "t"}, f"{PLACE}: the messages must be a list, are str"),
        ({"t": ["Hi"]}, {"messages": "t"}, f"{PLACE}: a message must be an object with role and content, is str"),
        (
            {"t": [{"role": "tool", "content": "x"}]},
            {"messages": "t"},
            f"{PLACE}: a message needs a role (system, user or assistant) and a text as content",
        ),
        (
            {"t": [{"role": "user", "content": None}]},
            {"messages": "t"},
            f"{PLACE}: a message needs a role (system, user or assistant) and a text as content",
        ),
        (
            {"t": "plain"},
            {"llama2_text": "t"},
            f"{PLACE}: holds no [INST] … [/INST]; is this text in the chat format of Llama 2?",
        ),
        (
            {"a": "x\0y"},
            {"prompt": "{a}", "completion": "z"},
            f"{PLACE}: its user text holds '\\x00', which no text may hold; remove it",
        ),
        (
            {"t": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\ud83d"}]},
            {"messages": "t"},
            f"{PLACE}: its assistant text holds '\\ud83d', which no text may hold; remove it",
        ),
    ],
)
def test_message_of_a_row_that_cannot_be_used(row, mapping, expected):
    assert refusal(row, mapping) == expected


def test_llama2_text_of_one_turn():
    assert from_llama2_text("<s>[INST] Who? [/INST] Me.\nYes. </s>", PLACE) == [
        message("user", "Who?"),
        message("assistant", "Me.\nYes."),
    ]


def test_llama2_text_with_system_and_several_turns():
    text = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nOne? [/INST] 1 </s><s>[INST] Two? [/INST] 2 </s>"
    assert roles_and_texts(from_llama2_text(text, PLACE)) == [
        ("system", "Be brief."),
        ("user", "One?"),
        ("assistant", "1"),
        ("user", "Two?"),
        ("assistant", "2"),
    ]


def test_llama2_text_with_an_open_last_question_ends_with_the_last_answer():
    messages = from_llama2_text("<s>[INST] One? [/INST] 1 </s><s>[INST] Two?", PLACE)
    assert roles_and_texts(messages) == [("user", "One?"), ("assistant", "1")]


@pytest.mark.skipif("QLORA_TEST_DATA" not in os.environ, reason="QLORA_TEST_DATA is not set: no real data")
def test_real_llama2_texts_are_parsed_whole():
    path = Path(os.environ["QLORA_TEST_DATA"], "data", "guanaco_llama2_1k", "train.parquet")
    turns, empty = [], 0
    for number, row in read_rows(path):
        messages = from_llama2_text(row["text"], f"row {number}")
        text = "".join(turn["content"] for turn in messages)
        bare = re.sub(r"</?s>|\[/?INST\]", "", row["text"])
        assert "".join(text.split()) == "".join(bare.split()), f"row {number} lost text, or kept a tag"
        turns.append(len(messages))
        empty += unusable(messages) == "empty answer"
    assert (len(turns), sum(length > 2 for length in turns), empty) == (1000, 353, 1)


def test_reasons_why_a_conversation_teaches_nothing():
    user, answer = message("user", "Hi"), message("assistant", "Hello")
    assert unusable([user, answer]) is None
    assert unusable([message("system", "Be brief."), user, answer, user, answer]) is None
    assert unusable([]) == "does not end in an answer"
    assert unusable([user, answer, user]) == "does not end in an answer"
    assert unusable([message("system", "Be brief."), answer]) == "has no prompt"
    assert unusable([message("user", ""), answer]) == "has no prompt"
    assert unusable([user, message("assistant", "")]) == "empty answer"
    assert unusable([user, message("assistant", ""), user, answer]) == "empty answer"


@given(TEXTS)
@example("\u1ffc\u0308")  # folding its case undoes the composition
def test_normalising_twice_changes_nothing(text):
    assert normalised(normalised(text)) == normalised(text)


@given(st.lists(st.text("abcé数🙂", min_size=1, max_size=5), min_size=1), SPACES, SPACES)
def test_white_space_does_not_matter_but_where_words_end(words, first, second):
    assert normalised(first + first.join(words)) == normalised(second.join(words) + second)
    assert normalised("".join(words)) != normalised(" ".join(words)) or len(words) == 1


@given(st.text(st.characters(max_codepoint=0x17F, exclude_characters="ıŉſ"), max_size=20))
def test_case_and_composition_do_not_matter(text):
    assert normalised(text.upper()) == normalised(text.lower())
    assert normalised(unicodedata.normalize("NFD", text)) == normalised(unicodedata.normalize("NFC", text))


def test_full_width_and_ligatures_are_the_same_text():
    assert normalised("Ｆｉｌｅ ﬁx ℋ") == normalised("file FIX h")  # noqa: RUF001 it is what this is about


@given(st.lists(TEXTS, min_size=1, max_size=3), TEXTS, TEXTS)
def test_hash_of_a_prompt_ignores_the_answer(prompts, one, two):
    turns = [message("user", prompt) for prompt in prompts]
    assert prompt_hash([*turns, message("assistant", one)]) == prompt_hash([*turns, message("assistant", two)])


def test_marks_that_end_a_word_do_not_matter_but_those_inside_do():
    assert normalised("Where is it?!") == normalised("where, is it.")
    assert normalised("3.5") != normalised("35")


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), TEXTS), max_size=3), st.data())
def test_hash_differs_just_where_the_normalised_prompt_differs(turns, data):
    others = data.draw(st.one_of(st.just(turns), st.lists(st.tuples(st.sampled_from(["user", "system"]), TEXTS))))
    same = [(role, normalised(text)) for role, text in turns] == [(role, normalised(text)) for role, text in others]
    hashes = [prompt_hash([*(message(*turn) for turn in given), message("assistant", "")]) for given in (turns, others)]
    assert (hashes[0] == hashes[1]) == same
