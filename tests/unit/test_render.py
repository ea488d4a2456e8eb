"""One rendering for training, evaluation and chat: one BOS, the stop token learned, no token of a prompt learned."""

import re
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_for_tests import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    FAMILIES,
    REAL,
    REAL_WITH_BOS,
    TEXT,
    family_tokenizer,
    make_tokenizer,
    real_tokenizer_folder,
)
from transformers import PreTrainedTokenizerBase

from qlora.conversations import Message, message
from qlora.errors import UserError
from qlora.render import (
    IGNORED,
    Segment,
    Tokens,
    encode,
    load_tokenizer,
    opening_ids,
    padding_id,
    prompt_ids,
    rows_of,
    stop_ids,
    tokenized,
    tokenized_batch,
)

PLAIN = {"system": "{content}\n", "user": "{content}\nAnswer:", "assistant": " {content}", "between": "\n\n"}
BARE = {"system": "{content}", "user": "{content}", "assistant": "{content}", "between": ""}
ONE = [message("user", "How many?"), message("assistant", "42 boxes")]
SEVERAL = [message("system", "Be brief."), *ONE, message("user", "Of what?"), message("assistant", "paint")]
SPECIALS = ("<s>", "</s>", "<eos>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "[INST]")
FORMS = {
    "format with BOS": (True, None, PLAIN),
    "format": (False, None, PLAIN),
    "template": (True, CHAT_TEMPLATE, None),
}
forms = pytest.mark.parametrize(("with_bos", "template", "form"), FORMS.values(), ids=FORMS.keys())


def segments(messages: list[Message], tokenizer: PreTrainedTokenizerBase, form: dict[str, str] | None) -> list[Segment]:
    [row] = rows_of(messages, tokenizer, form)
    return row


def prompt_text(messages: list[Message], tokenizer: PreTrainedTokenizerBase, form: dict[str, str] | None) -> str:
    return "".join(part.text for part in segments(messages, tokenizer, form)[:-1])


def tokens_of(messages: list[Message], tokenizer: PreTrainedTokenizerBase, form: dict[str, str] | None) -> Tokens:
    return tokenized(segments(messages, tokenizer, form), tokenizer, form)


def learned_texts(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each stretch that is learned."""
    stretches: list[list[int]] = [[]]
    for token, label in zip(tokens.input_ids, tokens.labels, strict=True):
        if label == IGNORED:
            stretches.append([])
        else:
            assert label == token
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def test_format_renders_one_question():
    assert segments(ONE, make_tokenizer(), PLAIN) == [
        Segment("How many?\nAnswer:", False),
        Segment(" 42 boxes</s>", True),
    ]


def test_format_renders_system_and_several_turns():
    rendered = segments(SEVERAL, make_tokenizer(), PLAIN)
    assert "".join(part.text for part in rendered) == (
        "Be brief.\nHow many?\nAnswer: 42 boxes</s>\n\nOf what?\nAnswer: paint</s>"
    )
    assert [part.text for part in rendered if part.supervised] == [" 42 boxes</s>", " paint</s>"]


def test_braces_in_a_text_stay_as_they_are():
    messages = [message("user", "{content} {0} {{x}}"), message("assistant", "{content}")]
    form = {**PLAIN, "user": "{{user}} {content}\nAnswer:"}
    assert "".join(part.text for part in segments(messages, make_tokenizer(), form)) == (
        "{{user}} {content} {0} {{x}}\nAnswer: {content}</s>"
    )


def test_template_renders_up_to_the_stop_token():
    rendered = segments(SEVERAL, make_tokenizer(True, CHAT_TEMPLATE), None)
    assert rendered == [
        Segment("<s>[system] Be brief.\n[user] How many?\n[assistant]\n", False),
        Segment("42 boxes</s>", True),
        Segment("\n[user] Of what?\n[assistant]\n", False),
        Segment("paint</s>", True),
    ]


@forms
def test_prompt_text_ends_where_the_last_answer_begins(with_bos, template, form):
    tokenizer = make_tokenizer(with_bos, template)
    for messages in (ONE, SEVERAL):
        whole = "".join(part.text for part in segments(messages, tokenizer, form))
        prompt = prompt_text(messages, tokenizer, form)
        assert whole.startswith(prompt)
        assert whole.removeprefix(prompt).strip() == messages[-1]["content"] + EOS


@forms
def test_one_bos_and_answers_with_their_stop_token_are_all_that_is_learned(with_bos, template, form):
    tokenizer = make_tokenizer(with_bos, template)
    for messages in (ONE, SEVERAL):
        tokens = tokens_of(messages, tokenizer, form)
        assert not tokens.apart
        assert tokens.input_ids.count(tokenizer.bos_token_id) == with_bos
        assert (tokens.input_ids[0] == tokenizer.bos_token_id) == with_bos
        assert tokens.input_ids[-1] == tokens.labels[-1] == tokenizer.eos_token_id
        answers = [turn["content"] + EOS for turn in messages if turn["role"] == "assistant"]
        assert [text.strip() for text in learned_texts(tokens, tokenizer)] == answers
        assert tokens.supervised == sum(label != IGNORED for label in tokens.labels)


@forms
def test_turn_that_is_not_supervised_is_not_learned(with_bos, template, form):
    tokenizer = make_tokenizer(with_bos, template)
    messages = [{**turn, "supervised": turn["content"] == "paint"} for turn in SEVERAL]
    tokens = tokens_of(messages, tokenizer, form)
    assert [text.strip() for text in learned_texts(tokens, tokenizer)] == ["paint</s>"]
    assert tokens.input_ids == tokens_of(SEVERAL, tokenizer, form).input_ids


def opening(tokenizer: PreTrainedTokenizerBase, form: dict[str, str] | None, with_bos: bool) -> list[int]:
    """What stands in front of a named format's ids; a template writes its own BOS."""
    return [tokenizer.bos_token_id] if with_bos and form else []


@forms
def test_prompt_ids_are_those_of_the_prompt_alone(with_bos, template, form):
    tokenizer = make_tokenizer(with_bos, template)
    for messages in (ONE, SEVERAL):
        alone = encode(tokenizer, [prompt_text(messages, tokenizer, form)])[0]
        assert prompt_ids(tokens_of(messages, tokenizer, form)) == opening(tokenizer, form, with_bos) + alone


def test_merge_over_the_boundary_is_tokenised_apart():
    tokenizer = make_tokenizer()
    [whole] = encode(tokenizer, ["unhappy"])
    assert len(whole) == 1, "the tokenizer of this test has no merge over the boundary"
    tokens = tokens_of([message("user", "un"), message("assistant", "happy")], tokenizer, BARE)
    assert tokens.apart
    assert learned_texts(tokens, tokenizer) == ["happy</s>"]
    assert prompt_ids(tokens) == [tokenizer.bos_token_id, *encode(tokenizer, ["un"])[0]]
    assert tokenizer.decode(tokens.input_ids) == "<s>unhappy</s>"


def test_whole_prompt_is_tokenised_at_once_also_where_the_answer_is_apart():
    tokenizer = make_tokenizer()
    messages = [message("system", "un"), message("user", "happy un"), message("assistant", "happy")]
    tokens = tokens_of(messages, tokenizer, BARE)
    assert tokens.apart
    assert prompt_ids(tokens) == [tokenizer.bos_token_id, *encode(tokenizer, ["unhappy un"])[0]]


WORDS = st.text(alphabet=TEXT + "éß数🙂{}[]", min_size=1, max_size=12)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)


@given(TURNS, st.sampled_from([PLAIN, BARE, None]), st.booleans())
def test_ids_are_the_text_and_labels_are_the_answers_whatever_stands_in_them(turns, form, with_bos):
    tokenizer = make_tokenizer(with_bos, None if form else CHAT_TEMPLATE)
    messages = [message(*turn) for pair in turns for turn in zip(("user", "assistant"), pair, strict=True)]
    parts = segments(messages, tokenizer, form)
    tokens = tokenized(parts, tokenizer, form)
    begin = opening(tokenizer, form, with_bos)
    text = "".join(part.text for part in parts)
    assert tokenizer.decode(tokens.input_ids[len(begin) :]) == text
    assert learned_texts(tokens, tokenizer) == [part.text for part in parts if part.supervised]
    last = prompt_ids(tokens)
    assert tokenizer.decode(last[len(begin) :]) == prompt_text(messages, tokenizer, form)
    assert tokens.input_ids[: len(last)] == last
    if len(turns) == 1:
        assert last == begin + encode(tokenizer, [prompt_text(messages, tokenizer, form)])[0]


@cache
def family(name: str) -> PreTrainedTokenizerBase:
    return family_tokenizer(name)


HOSTILE = st.lists(st.sampled_from([*TEXT, "é", "数", "🙂", "\u2581", "  ", "\n", *SPECIALS]), min_size=1, max_size=10)
CONTENT = HOSTILE.map("".join).map(str.strip).filter(bool)


@given(CONTENT, CONTENT, st.sampled_from(sorted(FAMILIES)), st.sampled_from([PLAIN, BARE, None]))
def test_ids_of_the_prompt_alone_begin_the_row_in_every_family(prompt, answer, name, form):
    tokenizer = family(name)
    if form is None and not tokenizer.chat_template:
        form = PLAIN
    [row] = rows_of([message("user", prompt), message("assistant", answer)], tokenizer, form)
    tokens = tokenized(row, tokenizer, form)
    asked = "".join(part.text for part in row[:-1])
    assert prompt_ids(tokens) == [*opening_ids(asked, tokenizer, form), *encode(tokenizer, [asked])[0]]
    assert tokens.labels[: len(prompt_ids(tokens))] == [IGNORED] * len(prompt_ids(tokens))
    assert tokens.labels[len(prompt_ids(tokens)) :] == tokens.input_ids[len(prompt_ids(tokens)) :]
    assert tokens.input_ids[-1] in stop_ids(tokenizer, form)
    given_back = tokenizer.decode(tokens.input_ids)
    if "\u2581" not in prompt + answer:
        assert prompt in given_back
        assert answer in given_back


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(
    "pair", [("un", "happy"), ("x = 1", "00 + 2"), ("It is  ", "  so"), ("Über", "all"), ("a ", "▁b")]
)
def test_real_tokenizer_apart_gives_the_text_back(name, pair):
    tokenizer = load_tokenizer(real_tokenizer_folder(name))
    [row] = rows_of([message("user", pair[0]), message("assistant", pair[1])], tokenizer, BARE)
    tokens = tokenized(row, tokenizer, BARE)
    begin = len(opening_ids(row[0].text, tokenizer, BARE))
    text = "".join(pair) + tokenizer.eos_token
    lost = {"▁": " "} if name in REAL_WITH_BOS else {}  # sentencepiece's space
    assert tokenizer.decode(tokens.input_ids[begin:]) == text.translate(str.maketrans(lost))


@pytest.mark.parametrize("name", REAL_WITH_BOS)
def test_dummy_space_stands_in_front_of_a_text_alone(name):
    tokenizer = load_tokenizer(real_tokenizer_folder(name))
    [alone], [continued] = encode(tokenizer, ["happy"]), encode(tokenizer, ["happy"], continuing=True)
    assert tokenizer.convert_ids_to_tokens(alone)[0].startswith("▁")
    assert not tokenizer.convert_ids_to_tokens(continued)[0].startswith("▁")


def test_rows_in_a_batch_are_the_rows_alone():
    tokenizer = family("llama2")
    rows = [
        rows_of([message("user", prompt), message("assistant", "happy")], tokenizer, BARE)[0]
        for prompt in ("un", "a </s> b", "x", "un")
    ]
    batch = tokenized_batch(rows, tokenizer, BARE)
    assert batch == [tokenized(row, tokenizer, BARE) for row in rows]
    assert [tokens.apart for tokens in batch] == [True, False, False, True]


def test_padding_takes_the_first_token_there_is():
    tokenizer = make_tokenizer()
    assert padding_id(tokenizer) == tokenizer.unk_token_id
    other = make_tokenizer.__wrapped__()
    other.unk_token = None
    assert padding_id(other) == other.eos_token_id
    other.unk_token, other.pad_token = "<unk>", BOS
    assert padding_id(other) == other.bos_token_id


def test_loaded_tokenizer_neither_cuts_nor_pads(tmp_path):
    tokenizer = make_tokenizer.__wrapped__()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.save_pretrained(tmp_path)
    [ids] = encode(load_tokenizer(tmp_path), ["how many unhappy people"])
    assert tokenizer.decode(ids) == "how many unhappy people"


def test_tokenizer_without_a_stop_token_is_refused(tmp_path):
    tokenizer = make_tokenizer.__wrapped__()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: its tokenizer has no stop token")):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizer(name):
    tokenizer = load_tokenizer(real_tokenizer_folder(name))
    prompt, answer = "Où est 数据 🙂? It isn't   here,\n\tis it?", "Voilà: 数 🙂 42"
    for messages in (
        [message("user", prompt), message("assistant", answer)],
        [message("system", "Be brief."), *ONE, message("user", prompt), message("assistant", answer)],
    ):
        tokens = tokens_of(messages, tokenizer, PLAIN)
        begin = 1 if name in REAL_WITH_BOS else 0
        assert not tokens.apart
        assert (tokens.input_ids[0] == tokenizer.bos_token_id) == bool(begin)
        assert (
            tokenizer.bos_token_id not in tokens.input_ids[begin:-1] or tokenizer.bos_token_id == tokenizer.eos_token_id
        )
        stops = tokens.input_ids.count(tokenizer.eos_token_id)
        assert stops == sum(turn["role"] == "assistant" for turn in messages)
        assert tokens.labels[-1] == tokenizer.eos_token_id
        text = "".join(part.text for part in segments(messages, tokenizer, PLAIN))
        assert tokenizer.decode(tokens.input_ids[begin:]) == text
        assert learned_texts(tokens, tokenizer)[-1].strip() == answer + tokenizer.eos_token
        alone = encode(tokenizer, [prompt_text(messages, tokenizer, PLAIN)])[0]
        assert prompt_ids(tokens)[begin:] == alone
