"""The canonical form of an example, a list of messages, and how a user's row becomes one."""

import hashlib
import re
import string
import unicodedata
from collections.abc import Mapping
from typing import Any, TypedDict

from qlora.errors import UserError


class Message(TypedDict):
    """One turn; `supervised` says whether the model learns to write it."""

    role: str  # system, user or assistant
    content: str
    supervised: bool


ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "prompter": "user"}  # other names of the roles
TEMPLATES = (("system", "system"), ("user", "prompt"), ("assistant", "completion"))  # role, key of the config
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of surrogate pairs, which UTF-8 cannot write
END_MARKS = re.compile(r"""[?!.,;:'"]+(?=\s|$)""")
LLAMA2_TURN = re.compile(r"\[INST\](?P<user>.*?)\[/INST\](?P<assistant>.*?)(?=\[INST\]|\Z)", re.DOTALL)
LLAMA2_SYSTEM = re.compile(r"<<SYS>>(?P<system>.*?)<</SYS>>", re.DOTALL)


def message(role: str, content: str) -> Message:
    """A message; assistant messages are supervised, no other."""
    return {"role": role, "content": content, "supervised": role == "assistant"}


def conversation(row: Mapping[str, Any], mapping: Mapping[str, Any], place: str) -> list[Message]:
    """The messages of a user's row, as the dataset's mapping in the config says.

    `place` names file and row for the UserError that a missing column or an unusable value raises.
    """
    if "messages" in mapping:
        messages = _from_messages(column_value(row, mapping["messages"], place), place)
    elif "llama2_text" in mapping:
        messages = from_llama2_text(str(column_value(row, mapping["llama2_text"], place)), place)
    else:
        parts = [(role, mapping[key]) for role, key in TEMPLATES if key in mapping]
        messages = [message(role, fill(template, row, place)) for role, template in parts]
    for turn in messages:
        bad = NO_TEXT.search(turn["content"])
        if bad:
            raise UserError(f"{place}: its {turn['role']} text holds {bad[0]!a}, which no text may hold; remove it")
    return messages


def fill(template: str, row: Mapping[str, Any], place: str) -> str:
    """A template like `{schema}: {question}` with the row's columns put in; doubled braces stand for themselves."""
    pieces = []
    for literal, column, _, _ in string.Formatter().parse(template):
        pieces.append(literal)
        if column is not None:
            pieces.append(str(column_value(row, column, place)))
    return "".join(pieces).strip()


def column_value(row: Mapping[str, Any], column: str, place: str) -> Any:
    """The value in a row's column, "" for none. Raises UserError, naming `place`, where there is no such column."""
    if column not in row:
        raise UserError(f"{place}: has no column '{column}'; it has {', '.join(map(str, row))}")
    value = row[column]
    return "" if value is None else value


def _from_messages(turns: Any, place: str) -> list[Message]:
    """Messages from a list of {role, content} or, as ShareGPT has them, {from, value}."""
    if not isinstance(turns, list):
        raise UserError(f"{place}: the messages must be a list, are {type(turns).__name__}")
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise UserError(f"{place}: a message must be an object with role and content, is {type(turn).__name__}")
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        role = ROLES.get(str(role), str(role))
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise UserError(f"{place}: a message needs a role (system, user or assistant) and a text as content")
        messages.append(message(role, content.strip()))
    return messages


def from_llama2_text(text: str, place: str) -> list[Message]:
    """Parse literal `<s>[INST] user [/INST] answer </s><s>[INST] …` into turns (Llama 2's published chat format)."""
    bare = text.replace("<s>", "").replace("</s>", "")
    turns = list(LLAMA2_TURN.finditer(bare))
    if not turns:
        raise UserError(f"{place}: holds no [INST] … [/INST]; is this text in the chat format of Llama 2?")
    messages: list[Message] = []
    for turn in turns:
        user = turn["user"]
        system = LLAMA2_SYSTEM.search(user)
        if system:
            messages.append(message("system", system["system"].strip()))
            user = LLAMA2_SYSTEM.sub("", user)
        messages += [message("user", user.strip()), message("assistant", turn["assistant"].strip())]
    return messages


def normalised(text: str) -> str:
    """Text without what makes no other example of it: case, white space, marks that end a word, compatible forms."""
    folded = unicodedata.normalize("NFKC", text).casefold()  # which may undo the normal form
    return " ".join(END_MARKS.sub("", unicodedata.normalize("NFKC", folded)).split())


def prompt_hash(messages: list[Message]) -> str:
    """SHA-256 over the normalised text before the last answer; equal prompts share it, whatever case or spaces."""
    prompt = "\n".join(f"{turn['role']}: {normalised(turn['content'])}" for turn in messages[:-1])
    return hashlib.sha256(prompt.encode()).hexdigest()


def unusable(messages: list[Message]) -> str | None:
    """Why a conversation teaches nothing, or None: the reason that the card counts."""
    if not messages or messages[-1]["role"] != "assistant":
        return "does not end in an answer"
    if not any(turn["role"] == "user" and turn["content"] for turn in messages):
        return "has no prompt"
    if any(not turn["content"] for turn in messages if turn["role"] == "assistant"):
        return "empty answer"
    return None
