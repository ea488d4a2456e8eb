"""Conversations rendered by a tokenizer's own chat template, in stretches that are learned or not."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from itertools import takewhile
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from qlora.conversations import Message, message
from qlora.encoding import added_pattern, plain, special_pattern
from qlora.errors import UserError

TODAY = date(2024, 7, 26)  # for templates that read the clock: the day that Llama 3.1's has where none is given
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(?P<format>[^"']*)\1\s*\)""")
THOUGHT = "<think>"  # how the thought of a model that thinks begins
ANOTHER_FORMAT = "set 'format' of the model to a named format"


@dataclass(frozen=True)
class Segment:
    """A stretch of the rendered text, and whether the model learns to write it."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class Ending:
    """What a template writes after an answer that ends a conversation."""

    stop: str  # the special token that ends the answer
    learned: int  # characters up to and with the stop token
    text: str  # all of it


def template_rows(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[list[Segment]]:
    """The rows of a conversation: one, or one for each supervised answer where the template rewrites earlier turns.

    A row ends with an answer and its stop token. Raises UserError, naming the tokenizer, where the template refuses
    or drops a message, or does not say where an answer ends.
    """
    _check_roles(tokenizer, tuple(turn["role"] for turn in messages))
    return _rows(messages, tokenizer)


def _rows(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[list[Segment]]:
    learned = [place for place, turn in enumerate(messages) if turn["supervised"]]
    if not learned:
        return [[Segment(_render(messages, tokenizer, generate=False), False)]]
    texts = [_prompt_and_answer(messages[: place + 1], tokenizer) for place in learned]
    rows = [[Segment(prompt, False), Segment(answer, True)] for prompt, answer in texts]
    done, joined = "", []
    for prompt, answer in texts:
        if not prompt.startswith(done):
            break
        joined += [Segment(prompt[len(done) :], False), Segment(answer, True)]
        done = prompt + answer
    else:
        rows = [joined]
    for place, (prompt, answer) in zip(learned, texts, strict=True):
        _check_contents(messages[:place], prompt, tokenizer)
        _check_contents(messages[place : place + 1], answer, tokenizer)
    return rows


def _prompt_and_answer(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the model is given for the last message, and what it is to write, with its stop token.

    Where a template leaves the end of a generation prompt out once the answer is there (an opened thought), the answer
    is what follows the beginning that both share.
    """
    content = messages[-1]["content"].strip()
    prompt = _render(messages[:-1], tokenizer, generate=True, thinking=THOUGHT in content)
    whole = _render(messages, tokenizer, generate=False)
    ending = answer_ending(tokenizer)
    if not whole.endswith(ending.text):
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template ends one answer otherwise than another; {ANOTHER_FORMAT}"
        )
    shared = len(prompt)
    if not whole.startswith(prompt):
        found = whole.rfind(content)
        shared = min(_shared(prompt, whole), found if found >= 0 else len(whole))  # not into the answer itself
    return prompt, whole[shared : len(whole) - len(ending.text) + ending.learned]


def _shared(left: str, right: str) -> int:
    """How many characters two texts share at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


@cache
def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template, with TODAY in the place of the clock. Raises UserError where there is none."""
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: has no chat template; {ANOTHER_FORMAT}")
    pinned = CLOCK.sub(lambda call: f"'{TODAY.strftime(call['format'])}'", tokenizer.get_chat_template())
    if "strftime_now(" in pinned:
        raise UserError(f"{tokenizer.name_or_path}: its chat template reads the clock; {ANOTHER_FORMAT}")
    return pinned


def _render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, generate: bool, thinking: bool = False
) -> str:
    """The template's text.

    `thinking`: whether a template that knows the two (Qwen 3) lets an answer begin with a thought; where not, its
    generation prompt ends with an empty one.
    """
    turns: list[Any] = list(messages)
    template = _template(tokenizer)
    try:
        return str(
            tokenizer.apply_chat_template(
                turns,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generate,
                enable_thinking=thinking,
            )
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        change = "set 'system' of the model to user" if "system" in roles else "mend the rows or " + ANOTHER_FORMAT
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template refuses the roles {roles} ({error}); {change}"
        ) from error


@cache
def answer_ending(tokenizer: PreTrainedTokenizerBase) -> Ending:
    """What the chat template writes after an answer. Raises UserError where there is no stop token."""
    probe = _probe(("user", "assistant"))
    _, found, text = _render(probe, tokenizer, generate=False).rpartition(probe[1]["content"])
    stop = special_pattern(tokenizer).search(text)
    if not found or stop is None:
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template writes no stop token after an answer; {ANOTHER_FORMAT}"
        )
    return Ending(stop[0], stop.end(), text)


def _probe(roles: Sequence[str]) -> list[Message]:
    return [message(role, f"probe number {place} of {role}") for place, role in enumerate(roles)]


@cache
def _check_roles(tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...]) -> None:
    """Raise UserError where the template refuses or drops a message of such a conversation, whatever stands in it."""
    answer_ending(tokenizer)
    messages = _probe(roles)
    asked = [turn["content"] for turn in messages if turn["role"] != "assistant"]
    learned = [part.text for row in _rows(messages, tokenizer) for part in row if part.supervised]
    if any(content in text for content in asked for text in learned):
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template does not begin an answer with its generation prompt;"
            f" {ANOTHER_FORMAT}"
        )


def _check_contents(messages: Sequence[Message], text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError where a message does not stand in the text; of an answer the thought before it may be missing."""
    for turn in messages:
        content = turn["content"].strip()
        if content in text:
            continue
        thoughts_left_out = added_pattern(tokenizer).split(content)[-1].strip()
        if turn["role"] != "assistant" or thoughts_left_out not in text:
            shown = plain(content, tokenizer)[:40]
            change = "set 'system' of the model to user" if turn["role"] == "system" else ANOTHER_FORMAT
            raise UserError(
                f"{tokenizer.name_or_path}: its chat template drops the {turn['role']} message {shown!r}; {change}"
            )
