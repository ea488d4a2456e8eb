"""The canonical form of an example, a list of messages, and how a user's row becomes one."""

import datetime
import difflib
import hashlib
import math
import re
import string
import unicodedata
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, TypedDict

from qlora.errors import UserError


class Message(TypedDict):
    """One turn; `supervised` says whether the model learns to write it."""

    role: str  # system, user or assistant
    content: str
    supervised: bool


# Other names of the roles, in lower case.
ROLES = {"human": "user", "prompter": "user", "developer": "system"} | dict.fromkeys(
    ("gpt", "bot", "chatgpt", "model", "ai"), "assistant"
)
TOOLS = ("tool", "function", "function_call", "function-call", "tool_call", "tool_response", "observation", "ipython")
TEMPLATES = (("system", "system"), ("user", "prompt"), ("assistant", "completion"))  # role, key of the config
ALPACA = {"prompt": "{instruction}\n\n{input}", "completion": "{output}"}
PLAIN = (int, float, Decimal, datetime.date, datetime.time)  # values beside text that a template may render
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of surrogate pairs, which UTF-8 cannot write
QUOTES = re.compile("['\"`´‘’‚‛“”„‟«»‹›]")  # noqa: RUF001 marks that are written in many ways
HYPHENS = re.compile(r"(?<=[^\W\d_])[-\u2010-\u2015](?=[^\W\d_])")  # between letters; 5-3 and -5 keep theirs
END_MARKS = re.compile(r"[?!.,;:…]+(?=\s|$)")
LLAMA2_MARK = re.compile(r"(\[/?INST\])")
LLAMA2_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)
LLAMA2_END = re.compile(r"\s*(</s>)?\s*(<s>)?\s*\Z")  # behind an answer: its end, and the begin of the next turn
LLAMA2_STRAY = re.compile(r"</?s>|<</?SYS>>")


def message(role: str, content: str) -> Message:
    """A message; assistant messages are supervised, no other."""
    return {"role": role, "content": content, "supervised": role == "assistant"}


def conversation(row: Mapping[str, Any], mapping: Mapping[str, Any], place: str) -> list[Message]:
    """The messages of a user's row, as the dataset's mapping in the config says; an empty system message is left out.

    `place` names file and row for the UserError that a missing column or a value of the wrong type raises. Whether the
    model can learn from the messages is for `unusable` to say.
    """
    if "messages" in mapping:
        column = mapping["messages"]
        messages = list(_from_messages(column_value(row, column, place), f"{place}, column '{column}'"))
    elif "llama2_text" in mapping:
        column = mapping["llama2_text"]
        messages = from_llama2_text(column_text(row, column, place), f"{place}, column '{column}'")
    else:
        if mapping.get("alpaca"):
            row, mapping = {"input": "", **row}, {**mapping, **ALPACA}
        parts = [(role, mapping[key]) for role, key in TEMPLATES if key in mapping]
        messages = [message(role, fill(template, row, place)) for role, template in parts]
    return [turn for turn in messages if turn["content"] or turn["role"] != "system"]


def fill(template: str, row: Mapping[str, Any], place: str) -> str:
    """A template like `{schema}: {question}` with the row's columns put in; doubled braces stand for themselves."""
    pieces = []
    for literal, column, _, _ in string.Formatter().parse(template):
        pieces.append(literal)
        if column is not None:
            pieces.append(column_text(row, column, place))
    return "".join(pieces).strip()


def columns_of(template: str) -> list[str]:
    """Names of the columns that a template is filled with."""
    return [column for _, column, _, _ in string.Formatter().parse(template) if column is not None]


def column_value(row: Mapping[str, Any], column: str, place: str) -> Any:
    """The value in a row's column, "" for none. Raises UserError, naming `place`, where there is no such column."""
    if column not in row:
        raise UserError(f"{place}: has no column '{column}'; it has {', '.join(map(str, row))}")
    value = row[column]
    return "" if value is None else value


def column_text(row: Mapping[str, Any], column: str, place: str) -> str:
    """The value in a row's column as text: "" for none and NaN, true and false, numbers and dates as Python has them.

    Raises UserError for any other type, a list for instance, which as text would be a program's notation.
    """
    value = column_value(row, column, place)
    if isinstance(value, str):
        return _checked(value, f"{place}, column '{column}'")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, PLAIN):
        return "" if isinstance(value, float) and math.isnan(value) else str(value)
    raise UserError(f"{place}, column '{column}': holds a {type(value).__name__}, must be a text or a number")


def _checked(text: str, place: str) -> str:
    """The text, free of what no text may hold."""
    bad = NO_TEXT.search(text)
    if bad:
        raise UserError(f"{place}: holds {bad[0]!a}, which no text may hold; remove it")
    return text


def _from_messages(turns: Any, place: str) -> Iterator[Message]:
    """Messages from a list of {role, content} or, as ShareGPT has them, {from, value}; turns of tools have no text."""
    if not isinstance(turns, list):
        raise UserError(f"{place}: the messages must be a list, are {type(turns).__name__}")
    for number, turn in enumerate(turns, start=1):
        here = f"{place}, message {number}"
        if not isinstance(turn, Mapping):
            raise UserError(f"{here}: must be an object with role and content, is {type(turn).__name__}")
        given = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        role = ROLES.get(str(given).lower(), str(given).lower())
        if role in TOOLS or turn.get("tool_calls") or turn.get("function_call"):
            yield message("tool", "")
            continue
        if role not in ("system", "user", "assistant"):
            raise UserError(f"{here}: its role is {given!r}, must be system, user or assistant (or human, gpt)")
        if not isinstance(content, str):
            raise UserError(f"{here}: its content must be a text, is {type(content).__name__}")
        yield message(role, _checked(content, here).strip())


def from_llama2_text(text: str, place: str) -> list[Message]:
    """Parse literal `<s>[INST] user [/INST] answer </s><s>[INST] …` into turns (Llama 2's published chat format).

    A system block may stand in front of the first `[INST]` or at the head of its question. Raises UserError for markers
    that do not pair, and for text outside the turns: nothing is lost.
    """
    head, *pieces = LLAMA2_MARK.split(text)
    marks, texts = pieces[::2], pieces[1::2]
    if not marks:
        raise UserError(f"{place}: holds no [INST] … [/INST]; is this text in the chat format of Llama 2?")
    for index, wanted in enumerate(["[INST]", "[/INST]"] * ((len(marks) + 1) // 2)):
        found = marks[index] if index < len(marks) else "the end"
        if found != wanted:
            raise UserError(f"{place}: {found} stands where {wanted} number {index // 2 + 1} must; pair the markers")
    head = head.strip().removeprefix("<s>").strip()
    if head.startswith("<<SYS>>") and head.endswith("<</SYS>>"):
        head, texts[0] = "", head + texts[0]
    if head:
        raise UserError(f"{place}: text stands before the first [INST]: {head[:40]!r}; move it into a turn")
    block = LLAMA2_SYSTEM.match(texts[0])
    if block:
        texts[0] = texts[0][block.end() :]
    messages = [message("system", block[1].strip())] if block else []
    for user, answer in zip(texts[::2], texts[1::2], strict=True):
        messages += [message("user", user.strip()), message("assistant", LLAMA2_END.sub("", answer, count=1).strip())]
    for turn in messages:
        stray = LLAMA2_STRAY.search(turn["content"])
        if stray:
            raise UserError(f"{place}: {stray[0]} stands inside the text of a turn; end the turn there, or remove it")
    return messages


def placed_system(messages: list[Message], system: str) -> list[Message]:
    """The messages with a system message where the model's prompts have it, by the registry's `system`.

    `template` leaves it to the chat template; `user` joins it in front of the first question, with an empty line.
    """
    if system != "user" or not messages or messages[0]["role"] != "system":
        return messages
    first, question, *others = messages
    return [message("user", f"{first['content']}\n\n{question['content']}"), *others]


def normalised(text: str) -> str:
    """Text without what makes no other example of it.

    That is case, white space, compatible forms of Unicode, quotation marks and apostrophes, hyphens between letters,
    and marks that end a word. What is left, an operator, a sign or a point in a number, may be all that differs.
    """
    if not text.isascii():
        folded = unicodedata.normalize("NFKC", text).casefold()  # which may undo the normal form
        text = unicodedata.normalize("NFKC", folded)
        text = unicodedata.normalize("NFKC", QUOTES.sub("", text))
    text = QUOTES.sub("", text.casefold())
    return " ".join(END_MARKS.sub("", HYPHENS.sub(" ", text)).split())


def prompt_hash(messages: list[Message]) -> str:
    """SHA-256 over the normalised text before the first answer: what decides the side of a split, and what a leak is.

    Equal prompts share it, and so do all continuations of one opening: a model is taught each answer of a conversation.
    """
    opening = []
    for turn in messages:
        if turn["role"] == "assistant":
            break
        opening.append(f"{turn['role']}: {normalised(turn['content'])}")
    return hashlib.sha256("\n".join(opening).encode()).hexdigest()


def unusable(messages: list[Message]) -> str | None:
    """Why a conversation teaches nothing, or None: the reason that the card counts."""
    roles = [turn["role"] for turn in messages]
    if "tool" in roles:
        return "holds a turn of a tool"
    if not roles or roles[-1] != "assistant":
        return "does not end in an answer"
    turns = roles[1:] if roles[0] == "system" else roles
    if "user" not in turns or any(not turn["content"] for turn in messages if turn["role"] == "user"):
        return "has no prompt"
    if any(not turn["content"] for turn in messages if turn["role"] == "assistant"):
        return "empty answer"
    if turns != ["user", "assistant"] * (len(turns) // 2):
        return "turns are not user and assistant in turn"
    return None


def check_label(answer: str, labels: list[str], place: str) -> None:
    """Raise UserError, naming the nearest label, for an answer that is none of the declared ones."""
    if answer not in labels:
        near = difflib.get_close_matches(answer, labels, n=1, cutoff=0)[0]
        raise UserError(f"{place}: the label {answer[:60]!r} is not declared in 'labels'; the nearest is '{near}'")
