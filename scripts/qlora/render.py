"""The one place where messages become text, and text token ids and labels: for training, evaluation and chat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora.conversations import Message
from qlora.errors import UserError

IGNORED = -100  # label of a position that is not learned (torch.nn.functional.cross_entropy's ignore_index)
Format = Mapping[str, str]  # a named prompt format of the config: system, user, assistant, between


@dataclass(frozen=True)
class Segment:
    """A stretch of the rendered text, and whether the model learns to write it."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class Tokens:
    """Token ids of a row and their labels, of equal length; `apart`: prompts and answers were tokenised apart."""

    input_ids: list[int]
    labels: list[int]
    apart: bool

    @property
    def supervised(self) -> int:
        """How many tokens are learned."""
        return sum(label != IGNORED for label in self.labels)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a downloaded or built model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: its tokenizer has no stop token (eos_token), so the model could not learn to stop")
    tokenizer.backend_tokenizer.no_truncation()  # some are saved with the limits of whoever trained them
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, nothing put in front or behind; without the offsets and masks that a call computes."""
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with. Which one does not matter, since masks and labels alone decide what counts."""
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    raise UserError("the tokenizer has neither a padding, an unknown nor a stop token")


def segments(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, form: Format | None) -> list[Segment]:
    """The rendered text of a conversation in stretches that are learned or not; the stop token belongs to the answer.

    With `form` None the tokenizer's own chat template renders.
    """
    return (
        _from_template(messages, tokenizer) if form is None else _from_format(messages, str(tokenizer.eos_token), form)
    )


def prompt_text(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, form: Format | None) -> str:
    """The rendered text up to where the last message, an answer, begins."""
    return "".join(segment.text for segment in segments(messages, tokenizer, form)[:-1])


def _from_format(messages: Sequence[Message], stop: str, form: Format) -> list[Segment]:
    rendered: list[Segment] = []
    for turn in messages:
        text = form[turn["role"]].replace("{content}", turn["content"])
        if turn["role"] == "assistant":
            rendered.append(Segment(text + stop, turn["supervised"]))
        else:
            after_answer = form["between"] if rendered and rendered[-1].text.endswith(stop) else ""
            rendered.append(Segment(after_answer + text, False))
    return rendered


def _from_template(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: has no chat template; set 'format' of the model to a named format")
    rendered: list[Segment] = []
    done = ""

    def render(upto: int, generate: bool) -> str:
        turns: list[Any] = list(messages[:upto])
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate))
        except jinja2.TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(
                f"{tokenizer.name_or_path}: its chat template refuses the roles {roles} ({error})"
            ) from error

    def append(text: str, supervised: bool) -> None:
        nonlocal done
        if not text.startswith(done):
            raise UserError(
                f"{tokenizer.name_or_path}: its chat template rewrites earlier turns, which a single row cannot carry"
            )
        rendered.append(Segment(text[len(done) :], supervised))
        done = text

    for index, turn in enumerate(messages):
        if turn["role"] == "assistant":
            append(render(index, True), False)
            whole = render(index + 1, False)
            end = whole.rfind(str(tokenizer.eos_token), len(done))
            append(whole if end < 0 else whole[: end + len(str(tokenizer.eos_token))], turn["supervised"])
    return rendered


@cache
def opening_ids(tokenizer: PreTrainedTokenizerBase, from_template: bool) -> tuple[int, ...]:
    """The ids in front of a named format's text: one BOS where the tokenizer puts one; a template writes its own."""
    if from_template:
        return ()
    opened = tokenizer("")["input_ids"]
    return (tokenizer.bos_token_id,) if opened and opened[0] == tokenizer.bos_token_id else ()


def tokenized(parts: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, form: Format | None) -> Tokens:
    """Ids and labels of a rendered row.

    The whole text is tokenised at once where the ids of each prompt alone are the beginning of the whole's ids;
    where a merge over a boundary breaks that, prompts and answers are tokenised apart.
    """
    stretches = [
        Segment("".join(part.text for part in group), supervised)
        for supervised, group in groupby(parts, key=lambda part: part.supervised)
    ]
    texts = [stretch.text for stretch in stretches]
    *beginnings, whole = encode(tokenizer, list(accumulate(texts)))
    apart = any(whole[: len(beginning)] != beginning for beginning in beginnings)
    bounds = [0, *map(len, beginnings), len(whole)]
    pieces = encode(tokenizer, texts) if apart else [whole[start:end] for start, end in pairwise(bounds)]
    opening = opening_ids(tokenizer, form is None)
    ids, labels = list(opening), [IGNORED] * len(opening)
    for piece, stretch in zip(pieces, stretches, strict=True):
        ids += piece
        labels += piece if stretch.supervised else [IGNORED] * len(piece)
    return Tokens(ids, labels, apart)


def prompt_ids(tokens: Tokens) -> list[int]:
    """The ids up to where the last learned stretch begins: what the model is given when it is asked."""
    end = len(tokens.labels)
    while end and tokens.labels[end - 1] == IGNORED:
        end -= 1
    while end and tokens.labels[end - 1] != IGNORED:
        end -= 1
    return tokens.input_ids[:end]
