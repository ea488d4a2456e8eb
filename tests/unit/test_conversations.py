"""A user's row becomes a list of messages; what makes two prompts the same."""

import datetime
import os
import re
import unicodedata
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qlora.conversations import (
    conversation,
    fill,
    from_llama2_text,
    message,
    normalised,
    placed_system,
    prompt_hash,
    unusable,
)
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
        [{"role": "User", "content": "Hi"}, {"role": "ASSISTANT", "content": "Hello", "tool_calls": None}],
        [{"role": "developer", "content": " "}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
    ],
)
def test_lists_of_messages_in_their_usual_shapes(turns):
    assert conversation({"turns": turns}, {"messages": "turns"}, PLACE) == [
        message("user", "Hi"),
        message("assistant", "Hello"),
    ]


def test_alpaca_with_input_without_and_with_none():
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    for more, prompt in (("1, 2", "Add.\n\n1, 2"), ("", "Add."), (None, "Add.")):
        turns = conversation({**row, "input": more}, {"alpaca": True}, PLACE)
        assert roles_and_texts(turns) == [("user", prompt), ("assistant", "3")]
    del row["input"]
    with_system = {"alpaca": True, "system": "Be brief."}
    assert roles_and_texts(conversation(row, with_system, PLACE)) == [
        ("system", "Be brief."),
        ("user", "Add."),
        ("assistant", "3"),
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (0.1, "0.1"),
        (12.0, "12.0"),
        (True, "true"),
        (False, "false"),
        (None, ""),
        (float("nan"), ""),
        (Decimal("1.50"), "1.50"),
        (datetime.date(2024, 2, 29), "2024-02-29"),
    ],
)
def test_values_that_are_no_text_as_they_are_rendered(value, text):
    assert fill("<{a}>", {"a": value}, PLACE) == f"<{text}>"


COLUMN_T = f"{PLACE}, column 't'"


@pytest.mark.parametrize(
    ("row", "mapping", "expected"),
    [
        ({"b": 1}, {"prompt": "{a}", "completion": "x"}, f"{PLACE}: has no column 'a'; it has b"),
        ({"b": 1}, {"messages": "turns"}, f"{PLACE}: has no column 'turns'; it has b"),
        ({"instruction": "x"}, {"alpaca": True}, f"{PLACE}: has no column 'output'; it has input, instruction"),
        ({"t": "Hi"}, {"messages": "t"}, f"{COLUMN_T}: the messages must be a list, are str"),
        ({"t": ["Hi"]}, {"messages": "t"}, f"{COLUMN_T}, message 1: must be an object with role and content, is str"),
        (
            {"t": [{"role": "user", "content": "Hi"}, {"role": "narrator", "content": "x"}]},
            {"messages": "t"},
            f"{COLUMN_T}, message 2: its role is 'narrator', must be system, user or assistant (or human, gpt)",
        ),
        (
            {"t": [{"content": "x"}]},
            {"messages": "t"},
            f"{COLUMN_T}, message 1: its role is None, must be system, user or assistant (or human, gpt)",
        ),
        (
            {"t": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
            {"messages": "t"},
            f"{COLUMN_T}, message 1: its content must be a text, is list",
        ),
        (
            {"t": "plain"},
            {"llama2_text": "t"},
            f"{COLUMN_T}: holds no [INST] … [/INST]; is this text in the chat format of Llama 2?",
        ),
        ({"t": 3.5j}, {"llama2_text": "t"}, f"{COLUMN_T}: holds a complex, must be a text or a number"),
        ({"t": ["x"]}, {"prompt": "{t}", "completion": "z"}, f"{COLUMN_T}: holds a list, must be a text or a number"),
        (
            {"t": {"a": 1}},
            {"prompt": "{t}", "completion": "z"},
            f"{COLUMN_T}: holds a dict, must be a text or a number",
        ),
        ({"t": b"x"}, {"prompt": "{t}", "completion": "z"}, f"{COLUMN_T}: holds a bytes, must be a text or a number"),
        (
            {"t": "x\0y"},
            {"prompt": "{t}", "completion": "z"},
            f"{COLUMN_T}: holds '\\x00', which no text may hold; remove it",
        ),
        (
            {"t": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\ud83d"}]},
            {"messages": "t"},
            f"{COLUMN_T}, message 2: holds '\\ud83d', which no text may hold; remove it",
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


def test_llama2_system_block_in_front_of_the_first_question_is_kept():
    text = "<s><<SYS>>Be brief.<</SYS>>\n[INST] One? [/INST] 1"
    assert roles_and_texts(from_llama2_text(text, PLACE)) == [
        ("system", "Be brief."),
        ("user", "One?"),
        ("assistant", "1"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Chat: [INST] a [/INST] b", "text stands before the first [INST]: 'Chat:'; move it into a turn"),
        ("<s>[INST] a [INST] b [/INST] c", "[INST] stands where [/INST] number 1 must; pair the markers"),
        ("[INST] a [/INST] b [/INST] c", "[/INST] stands where [INST] number 2 must; pair the markers"),
        ("[/INST] a [INST]", "[/INST] stands where [INST] number 1 must; pair the markers"),
        ("[INST] a [/INST] b [INST] c", "the end stands where [/INST] number 2 must; pair the markers"),
        ("[INST] a [/INST] b </s> c", "</s> stands inside the text of a turn; end the turn there, or remove it"),
        ("[INST] a </s> [/INST] b", "</s> stands inside the text of a turn; end the turn there, or remove it"),
        ("[INST] a [/INST] <s> b", "<s> stands inside the text of a turn; end the turn there, or remove it"),
        (
            "[INST] a [/INST] b [INST] <<SYS>>c<</SYS>> d [/INST] e",
            "<<SYS>> stands inside the text of a turn; end the turn there, or remove it",
        ),
        ("[INST] <<SYS>> a [/INST] b", "<<SYS>> stands inside the text of a turn; end the turn there, or remove it"),
    ],
)
def test_llama2_text_that_would_lose_something_is_refused(text, expected):
    with pytest.raises(UserError) as caught:
        from_llama2_text(text, PLACE)
    assert str(caught.value) == f"{PLACE}: {expected}"


LLAMA2_PIECES = ["<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "a", "b c", "\n", " "]


@given(st.lists(st.sampled_from(LLAMA2_PIECES), max_size=14))
def test_llama2_text_is_kept_whole_or_refused(pieces):
    text = "".join(pieces)
    try:
        messages = from_llama2_text(text, PLACE)
    except UserError:
        return
    words = re.sub(r"</?s>|\[/?INST\]|<</?SYS>>|\s", "", text)
    assert "".join("".join(turn["content"].split()) for turn in messages) == words


@pytest.mark.skipif("QLORA_TEST_DATA" not in os.environ, reason="QLORA_TEST_DATA is not set: no real data")
def test_real_llama2_texts_are_parsed_whole():
    path = Path(os.environ["QLORA_TEST_DATA"], "data", "guanaco_llama2_1k", "train.parquet")
    turns, reasons = [], Counter()
    for number, row in read_rows(path):
        messages = from_llama2_text(row["text"], f"row {number}")
        text = "".join(turn["content"] for turn in messages)
        bare = re.sub(r"</?s>|\[/?INST\]", "", row["text"])
        assert "".join(text.split()) == "".join(bare.split()), f"row {number} lost text, or kept a tag"
        turns.append(len(messages))
        reasons[unusable(messages)] += 1
    assert (len(turns), sum(length > 2 for length in turns)) == (1000, 353)
    assert reasons == {None: 997, "empty answer": 1, "has no prompt": 2}


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
    assert unusable([user, answer, message("user", ""), answer]) == "has no prompt"
    assert unusable([user, message("tool", ""), answer]) == "holds a turn of a tool"
    for turns in ([answer, user, answer], [user, user, answer], [user, answer, message("system", "x"), user, answer]):
        assert unusable(turns) == "turns are not user and assistant in turn"


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "tool", "content": "42"},
        {"role": "function", "content": None},
        {"from": "observation", "value": "42"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
    ],
)
def test_turns_of_tools_make_a_conversation_unusable(turn):
    given = [{"role": "user", "content": "Hi"}, turn, {"role": "assistant", "content": "Hello"}]
    assert unusable(conversation({"t": given}, {"messages": "t"}, PLACE)) == "holds a turn of a tool"


def test_system_message_stays_or_goes_in_front_of_the_first_question():
    system, user, answer = message("system", "Be brief."), message("user", "Hi"), message("assistant", "Hello")
    turns = [system, user, answer, user, answer]
    assert placed_system(turns, "template") == turns
    assert placed_system(turns, "user") == [message("user", "Be brief.\n\nHi"), answer, user, answer]
    assert placed_system(turns[1:], "user") == turns[1:]


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


@given(st.lists(TEXTS, min_size=1, max_size=3), TEXTS, st.lists(TEXTS))
def test_hash_of_a_prompt_ignores_the_answer_and_what_follows(prompts, one, others):
    turns = [message("user", prompt) for prompt in prompts]
    rest = [message(role, text) for text in others for role in ("assistant", "user")]
    assert prompt_hash([*turns, message("assistant", one)]) == prompt_hash([*turns, message("assistant", one), *rest])


def test_marks_that_end_a_word_do_not_matter_but_those_inside_do():
    assert normalised("Where is it?!") == normalised("where, is it.")
    assert normalised("3.5") != normalised("35")


def test_quotes_and_hyphens_between_letters_do_not_matter_but_signs_and_operators_do():
    assert normalised("can’t top-up “now”…") == normalised("can't top up 'now'") == normalised("cant top\u2010up now")  # noqa: RUF001
    for one, two in (("5-3", "5 3"), ("-5", "5"), ("2*3", "2/3"), ("a + b", "a * b"), ("$1", "€1"), ("x[1]", "x(1)")):
        assert normalised(one) != normalised(two)


@given(st.lists(st.tuples(st.sampled_from(["user", "system"]), TEXTS), max_size=3), st.data())
def test_hash_differs_just_where_the_normalised_prompt_differs(turns, data):
    others = data.draw(st.one_of(st.just(turns), st.lists(st.tuples(st.sampled_from(["user", "system"]), TEXTS))))
    same = [(role, normalised(text)) for role, text in turns] == [(role, normalised(text)) for role, text in others]
    hashes = [prompt_hash([*(message(*turn) for turn in given), message("assistant", "")]) for given in (turns, others)]
    assert (hashes[0] == hashes[1]) == same
