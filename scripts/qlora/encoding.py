"""Text to token ids and back, where a text may hold what looks like a special token, or continue another text.

A special token's text inside a user's content is ordinary text. `quoted` puts a mark in its place, so that a rendered
text still tells it from the special tokens that the prompt format writes.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

MARK = "\0"  # no content may hold it (qlora.conversations), so it begins nothing but the marks below
QUOTED, CONTROL = 0xF0000, 0x100000  # private use areas; a mark is MARK and the character of a special token's place
QUOTED_MARK = re.compile(f"{MARK}(.)")


@cache
def special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The special tokens as text, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    return tuple(sorted((token.content for token in added if token.special), key=len, reverse=True))


@cache
def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds special tokens in a text."""
    return re.compile("|".join(map(re.escape, special_texts(tokenizer))))


@cache
def added_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds added tokens in a text, special or not: `<think>` is one that is not."""
    texts = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)))


@cache
def dividers(tokenizer: PreTrainedTokenizerBase) -> tuple[re.Pattern[str], frozenset[int]]:
    """Finds the special tokens that divide a text into parts which are tokenised each by itself; and their ids.

    The unknown token is none, since its id may stand for other text, and none that is looked for in a normalised text.
    """
    found = {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content != tokenizer.unk_token and not (token.normalized or token.single_word)
    }
    texts = sorted(found, key=len, reverse=True)
    nothing = "(?!)"
    return re.compile("|".join(map(re.escape, texts)) or nothing), frozenset(found.values())


def quoted(content: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`content` with a mark in the place of each special token's text."""
    places = {text: place for place, text in enumerate(special_texts(tokenizer))}
    return special_pattern(tokenizer).sub(lambda found: f"{MARK}{chr(QUOTED + places[found[0]])}", content)


def plain(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text with the marks of `quoted` written out."""
    if MARK not in text:
        return text
    texts = special_texts(tokenizer)
    return QUOTED_MARK.sub(lambda found: texts[ord(found[1]) - QUOTED], text)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], continuing: bool = False) -> list[list[int]]:
    """Token ids of each text, nothing put in front or behind; special tokens that are `quoted` are read as plain text.

    `continuing`: the texts go on after others, so that a tokenizer which puts a space in front of a text does not.
    """
    backend = _backend(tokenizer, False, True) if continuing else tokenizer.backend_tokenizer
    # the fast form leaves out offsets, which nothing here needs
    ids = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    for place, text in enumerate(texts):
        if MARK in text:
            ids[place] = _encode_quoted(tokenizer, text, continuing)
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]]) -> list[str]:
    """The text of each row of ids, special tokens and all."""
    return tokenizer.backend_tokenizer.decode_batch(rows, skip_special_tokens=False)


def _encode_quoted(tokenizer: PreTrainedTokenizerBase, text: str, continuing: bool) -> list[int]:
    """Ids of a text in which the special tokens that are meant stand as they are, and others are quoted."""
    texts = special_texts(tokenizer)
    places = {special: place for place, special in enumerate(texts)}
    meant = special_pattern(tokenizer).sub(lambda found: f"{MARK}{chr(CONTROL + places[found[0]])}", text)
    read = re.sub(f"{MARK}([{chr(QUOTED)}-{chr(CONTROL - 1)}])", lambda found: texts[ord(found[1]) - QUOTED], meant)
    backend = _backend(tokenizer, True, continuing)
    controls = _controls(tokenizer, continuing)
    [encoding] = backend.encode_batch_fast([read], add_special_tokens=False)
    return [controls.get(token, token) for token in encoding.ids]


@cache
def _backend(tokenizer: PreTrainedTokenizerBase, quoting: bool, continuing: bool) -> Tokenizer:
    """A copy of the tokenizer for texts that hold quoted special tokens, or that continue others."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    if continuing:
        for step in ("normalizer", "pre_tokenizer"):
            settings[step] = _without_prefix(settings[step])
    backend = Tokenizer.from_str(json.dumps(settings))
    if quoting:
        backend.encode_special_tokens = True
        backend.add_tokens([alias for _, alias in _aliases(tokenizer)])
    return backend


@cache
def _controls(tokenizer: PreTrainedTokenizerBase, continuing: bool) -> dict[int, int]:
    """Id of a special token's mark in the copy that quotes → id of the special token."""
    vocabulary = _backend(tokenizer, True, continuing).get_added_tokens_decoder()
    numbers = {alias.content: number for number, alias in vocabulary.items()}
    return {numbers[alias.content]: token for token, alias in _aliases(tokenizer)}


def _aliases(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, AddedToken]]:
    """The id of each special token, and an ordinary token that stands for it and takes the same white space along."""
    places = {text: place for place, text in enumerate(special_texts(tokenizer))}
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            content = f"{MARK}{chr(CONTROL + places[token.content])}"
            yield number, AddedToken(content, normalized=False, lstrip=token.lstrip, rstrip=token.rstrip)


def _without_prefix(step: Any) -> Any:
    """A tokenizer's step (as tokenizer.json has it) that puts no space in front of a text."""
    if not isinstance(step, dict):
        return step
    if step["type"] == "Prepend":
        return None
    changed = {
        **step,
        **({"prepend_scheme": "never"} if "prepend_scheme" in step else {}),
        **({"add_prefix_space": False} if "add_prefix_space" in step else {}),
    }
    for name in ("normalizers", "pretokenizers"):
        if name in step:
            changed[name] = [part for part in map(_without_prefix, step[name]) if part is not None]
    return changed
