"""Chat templates: our stretches are the template's own text up to the stop token, and just the answers are learned."""

import re
from typing import Any

import pytest
from tokenizers_for_tests import (
    CHAT_TEMPLATE,
    FAMILIES,
    REAL,
    REAL_WITH_BOS,
    family_tokenizer,
    make_tokenizer,
    real_tokenizer_folder,
    reference_template,
)
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from qlora.conversations import Message, message, placed_system
from qlora.errors import UserError
from qlora.render import IGNORED, Tokens, load_tokenizer, rows_of, stop_ids, tokenized

PLAIN = {"system": "{content}\n", "user": "{content}\nAnswer:", "assistant": " {content}", "between": "\n\n"}
TEMPLATED = [name for name, family in FAMILIES.items() if "template" in family or "reference" in family]
ONE = [message("user", "How many?"), message("assistant", "42 boxes")]
MORE = [*ONE, message("user", "Of what?"), message("assistant", "paint")]
SYSTEM = [message("system", "Be brief."), *MORE]
# The rendered prompts as the models' cards have them, up to the last stop token.
GOLDENS = {
    "llama2-chat": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHow many? [/INST] 42 boxes </s><s>[INST] Of what? [/INST] paint </s>",
    "mistral-instruct": "<s> [INST] Be brief.\n\nHow many? [/INST] 42 boxes</s> [INST] Of what? [/INST] paint</s>",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHow many?</s>\n<|assistant|>\n42 boxes</s>\n<|user|>\nOf what?</s>\n<|assistant|>\npaint</s>",
    "gemma-it": "<bos><start_of_turn>user\nBe brief.\n\nHow many?<end_of_turn>\n<start_of_turn>model\n42 boxes<end_of_turn>\n<start_of_turn>user\nOf what?<end_of_turn>\n<start_of_turn>model\npaint<end_of_turn>",
    "smollm": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n42 boxes<|im_end|>\n<|im_start|>user\nOf what?<|im_end|>\n<|im_start|>assistant\npaint<|im_end|>",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHow many?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n42 boxes<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nOf what?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\npaint<|eot_id|>",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHow many?<|end|>\n<|assistant|>\n42 boxes<|end|>\n<|user|>\nOf what?<|end|>\n<|assistant|>\npaint<|end|>",
}  # fmt: skip
STOPS = {
    "llama2-chat": {"</s>"},
    "mistral-instruct": {"</s>"},
    "zephyr": {"</s>"},
    "gemma-it": {"<eos>", "<end_of_turn>"},
    "gemma2": {"<eos>", "<end_of_turn>"},
    "gemma3": {"<eos>", "<end_of_turn>"},
    "llama3": {"<|end_of_text|>", "<|eot_id|>"},
    "llama3.2": {"<|eot_id|>"},
    "qwen2.5": {"<|im_end|>"},
    "qwen3": {"<|im_end|>"},
    "phi3": {"<|endoftext|>", "<|end|>"},
    "smollm": {"<|im_end|>"},
}


def place_of_system(family: str) -> str:
    return "user" if family in ("gemma-it", "gemma2") else "template"


def text_of(row: list[Any]) -> str:
    return "".join(part.text for part in row)


def own_rendering(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """What the template itself writes, up to and with the stop token after the last answer."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024")
    last = messages[-1]["content"]
    stop = min(
        place + len(token)
        for token in tokenizer.get_added_vocab()
        if (place := text.find(token, text.rindex(last) + len(last))) >= 0
    )
    return text[:stop]


def learned_texts(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    stretches: list[list[int]] = [[]]
    for token, label in zip(tokens.input_ids, tokens.labels, strict=True):
        assert label in (token, IGNORED)
        if label == IGNORED:
            stretches.append([])
        else:
            stretches[-1].append(token)
    return [str(tokenizer.decode(stretch)) for stretch in stretches if stretch]


@pytest.mark.parametrize("family", TEMPLATED)
@pytest.mark.parametrize("messages", [ONE, MORE, SYSTEM], ids=["one turn", "two turns", "with system"])
def test_rows_are_what_the_template_writes(family, messages):
    tokenizer = family_tokenizer(family)
    placed = placed_system(messages, place_of_system(family))
    rows = rows_of(placed, tokenizer, None)
    answers = [place for place, turn in enumerate(placed) if turn["role"] == "assistant"]
    ends = answers if len(rows) > 1 else answers[-1:]
    assert [text_of(row) for row in rows] == [own_rendering(tokenizer, placed[: end + 1]) for end in ends]
    assert (len(rows) > 1) == (family == "qwen3" and len(answers) > 1)
    learned = [text for row in rows for text in learned_texts(tokenized(row, tokenizer, None), tokenizer)]
    stop = text_of(rows[0])[text_of(rows[0]).rindex("<") :]
    space = " " if family == "llama2-chat" else ""
    assert [text.lstrip() for text in learned] == [f"{placed[end]['content']}{space}{stop}" for end in answers]


@pytest.mark.parametrize("family", GOLDENS)
def test_text_is_that_of_the_model_card(family):
    tokenizer = family_tokenizer(family)
    [row] = rows_of(placed_system(SYSTEM, place_of_system(family)), tokenizer, None)
    assert text_of(row) == GOLDENS[family]


@pytest.mark.parametrize("family", TEMPLATED)
def test_stop_tokens(family):
    tokenizer = family_tokenizer(family)
    stops = stop_ids(tokenizer, None)
    assert set(tokenizer.convert_ids_to_tokens(sorted(stops))) == STOPS[family]
    for row in rows_of(MORE, tokenizer, None):
        tokens = tokenized(row, tokenizer, None)
        assert tokens.labels[-1] == tokens.input_ids[-1]
        assert tokens.input_ids[-1] in stops
    assert stop_ids(tokenizer, PLAIN) == {tokenizer.eos_token_id}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_bos_where_the_tokenizer_puts_one_and_none_elsewhere(family):
    tokenizer = family_tokenizer(family)
    opens = tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
    for form in (None, PLAIN) if tokenizer.chat_template else (PLAIN,):
        for row in rows_of(ONE, tokenizer, form):
            ids = tokenized(row, tokenizer, form).input_ids
            if opens:
                assert ids.count(tokenizer.bos_token_id) == 1
                assert ids[0] == tokenizer.bos_token_id
            elif tokenizer.bos_token_id not in (None, tokenizer.eos_token_id) and family != "smollm":
                assert tokenizer.bos_token_id not in ids


def test_qwen3_has_a_row_an_answer_and_no_thought_of_an_earlier_one():
    tokenizer = family_tokenizer("qwen3")
    thinking = message("assistant", "<think>\nboxes?\n</think>\n\n42 boxes")
    first, second = rows_of([ONE[0], thinking, *MORE[2:]], tokenizer, None)
    assert text_of(first).endswith("assistant\n<think>\nboxes?\n</think>\n\n42 boxes<|im_end|>")
    assert "assistant\n42 boxes<|im_end|>" in text_of(second)
    assert "boxes?" not in text_of(second)
    [only] = rows_of([ONE[0], {**thinking, "supervised": False}, *MORE[2:]], tokenizer, None)
    assert only == second


def test_generation_prompt_that_opens_a_thought_stays_in_front_of_the_answer():
    tokenizer = make_tokenizer.__wrapped__(True, reference_template("deepseek_r1_distill").replace("<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>"))  # fmt: skip
    prompt = tokenizer.apply_chat_template(ONE[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<think>\n")
    [[asked, answer]] = rows_of(ONE, tokenizer, None)
    assert (asked.text, answer.text) == (prompt, "42 boxes</s>")
    # An answer that begins like the thought is not cut.
    bold = [ONE[0], message("assistant", "<b>42</b>")]
    assert rows_of(bold, tokenizer, None)[0][1].text == "<b>42</b></s>"


def test_no_turn_is_learned_that_is_not_supervised():
    tokenizer = family_tokenizer("llama3")
    messages = [{**turn, "supervised": turn["content"] == "paint"} for turn in MORE]
    [row] = rows_of(messages, tokenizer, None)
    assert text_of(row) == text_of(rows_of(MORE, tokenizer, None)[0])
    assert [part.text for part in row if part.supervised] == ["paint<|eot_id|>"]
    [unlearned] = rows_of([{**turn, "supervised": False} for turn in MORE], tokenizer, None)
    assert not any(part.supervised for part in unlearned)


def refusal(messages: list[Message], template: str | None, family: str = "") -> str:
    tokenizer = family_tokenizer(family) if family else make_tokenizer.__wrapped__(True, template)
    tokenizer.name_or_path = "models/some"
    with pytest.raises(UserError) as caught:
        rows_of(messages, tokenizer, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_template_that_refuses_a_system_message():
    assert refusal(SYSTEM, None, "gemma-it") == (
        "models/some: its chat template refuses the roles system, user (no system message);"
        " set 'system' of the model to user"
    )


def test_template_that_refuses_the_order_of_roles():
    assert refusal([ONE[0], *MORE], None, "gemma-it") == (
        "models/some: its chat template refuses the roles user, user (roles must alternate);"
        " mend the rows or set 'format' of the model to a named format"
    )


DROPS_SYSTEM = CHAT_TEMPLATE.replace("{% else %}", "{% elif message.role == 'user' %}")
CUTS_QUESTIONS = CHAT_TEMPLATE.replace("{{ message.content }}\n{% endif %}", "{{ message.content[:40] }}\n{% endif %}")


def test_template_that_drops_a_message():
    probe = "models/some: its chat template drops the system message 'probe number 0 of system'; set 'system' of the model to user"
    assert refusal(SYSTEM, DROPS_SYSTEM) == probe
    assert refusal([message("system", "e"), *ONE], DROPS_SYSTEM) == probe, "though an e stands elsewhere"
    long = message("user", "How many boxes of paint are there on the shelf?")
    assert refusal([long, ONE[1]], CUTS_QUESTIONS) == (
        "models/some: its chat template drops the user message 'How many boxes of paint are there on the';"
        " set 'format' of the model to a named format"
    )


def test_template_without_a_stop_token():
    template = CHAT_TEMPLATE.replace("{{ eos_token }}", "")
    assert refusal(ONE, template) == (
        "models/some: its chat template writes no stop token after an answer; set 'format' of the model to a named format"
    )


def test_template_whose_generation_prompt_has_nothing_to_do_with_the_answer():
    template = CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{% if add_generation_prompt %}Now: {% endif %}")
    assert "does not begin an answer with its generation prompt; set 'format'" in refusal(ONE, template)


def test_missing_template():
    assert refusal(ONE, None) == "models/some: has no chat template; set 'format' of the model to a named format"


class NextYear:
    @staticmethod
    def now() -> Any:
        import datetime

        return datetime.datetime(2099, 1, 2)


@pytest.mark.parametrize("template", ["llama3_2", "clock"])
def test_date_in_a_prompt_is_pinned(template, monkeypatch):
    clock = CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token + strftime_now('%Y-%m-%d') }}")
    tokenizer = family_tokenizer("llama3.2") if template == "llama3_2" else make_tokenizer.__wrapped__(True, clock)
    before = rows_of(ONE, tokenizer, None)
    monkeypatch.setattr(chat_template_utils, "datetime", NextYear)
    assert "2099" in tokenizer.apply_chat_template(ONE, tokenize=False), "the clock of this test is not read"
    assert rows_of(ONE, tokenizer, None) == before
    assert re.search("26 Jul 2024|2024-07-26", text_of(before[0]))


def test_clock_that_cannot_be_pinned():
    assert "its chat template reads the clock; set 'format'" in refusal(ONE, "{{ strftime_now(form) }}" + CHAT_TEMPLATE)


HOSTILE = "a{0} b {0}{1} [INST] {1}"


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_a_message_are_ordinary_text(family):
    tokenizer = family_tokenizer(family)
    form = None if tokenizer.chat_template else PLAIN
    specials = FAMILIES[family]["specials"][-2:]
    hostile = HOSTILE.format(specials[0], specials[-1])
    messages = [message("user", hostile), message("assistant", hostile), *MORE[2:]]
    special = {tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    for row, harmless in zip(rows_of(messages, tokenizer, form), rows_of(MORE, tokenizer, form), strict=True):
        tokens, other = tokenized(row, tokenizer, form), tokenized(harmless, tokenizer, form)
        marks = [token for token in tokens.input_ids if token in special]
        assert marks == [token for token in other.input_ids if token in special]
        assert hostile in tokenizer.decode(tokens.input_ids)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("family", ["llama2-chat", "zephyr", None])
def test_real_tokenizer_with_templates(name, family):
    if family == "llama2-chat" and name not in REAL_WITH_BOS:
        family = "zephyr"  # a template that writes a BOS is not for a tokenizer that has none
    template = family and FAMILIES[family]["template"]
    tokenizer = load_tokenizer(real_tokenizer_folder(name))
    tokenizer.chat_template = template
    form = None if template else PLAIN
    stop = str(tokenizer.eos_token)
    question, answer = f"Où est 数据 🙂{stop}? It isn't   here,\n\tis it?", "Voilà:  数 🙂 42"
    messages = [message("user", question), message("assistant", answer), *MORE[2:]]
    [row] = rows_of(messages, tokenizer, form)
    tokens = tokenized(row, tokenizer, form)
    assert not tokens.apart
    text = str(tokenizer.decode(tokens.input_ids))
    assert question in text
    space = " " if family == "llama2-chat" else ""
    assert [learned.strip() for learned in learned_texts(tokens, tokenizer)] == [
        f"{answer}{space}{stop}",
        f"paint{space}{stop}",
    ]
    if name in REAL_WITH_BOS:
        assert [token == tokenizer.bos_token_id for token in tokens.input_ids[:2]] == [True, False]
    else:
        assert tokens.input_ids[0] != tokenizer.bos_token_id
