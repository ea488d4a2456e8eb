"""The one place where messages become text, and text token ids and labels: for training, evaluation and chat."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby, pairwise
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora.conversations import Message
from qlora.encoding import dividers, encode, quoted, special_pattern
from qlora.errors import UserError
from qlora.pretrained import loaded
from qlora.templates import Segment, answer_ending, template_rows

IGNORED = -100  # label of a position that is not learned (torch.nn.functional.cross_entropy's ignore_index)
Format = Mapping[str, str]  # a named prompt format of the config: system, user, assistant, between


@dataclass(frozen=True)
class Tokens:
    """Token ids of a row and their labels, of equal length.

    `apart`: prompts and answers were tokenised apart. `opening`: how many ids stand in front of every row, 1 for a BOS.
    """

    input_ids: list[int]
    labels: list[int]
    apart: bool
    opening: int = 0

    @property
    def supervised(self) -> int:
        """How many tokens are learned."""
        return len(self.labels) - self.labels.count(IGNORED)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a downloaded or built model."""
    tokenizer = loaded(AutoTokenizer.from_pretrained, folder)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: its tokenizer has no stop token (eos_token), so the model could not learn to stop")
    tokenizer.backend_tokenizer.no_truncation()  # some are saved with the limits of whoever trained them
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with. Which one does not matter, since masks and labels alone decide what counts."""
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    raise UserError("the tokenizer has neither a padding, an unknown nor a stop token")


def stop_ids(tokenizer: PreTrainedTokenizerBase, form: Format | None) -> set[int]:
    """The tokens at which an answer ends: the tokenizer's own, and the one that the chat template writes after it."""
    stops = {tokenizer.eos_token_id}
    if form is None:
        stops.add(tokenizer.convert_tokens_to_ids(answer_ending(tokenizer).stop))
    return stops


def rows_of(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, form: Format | None
) -> list[list[Segment]]:
    """The rows that a conversation becomes, each as stretches of text that are learned or not.

    With `form` None the tokenizer's own chat template renders; where it rewrites earlier turns there is a row for each
    supervised answer, otherwise always one. An answer ends with its stop token. The text of a special token inside a
    message is quoted (qlora.encoding), so that it is read as ordinary text.
    """
    if quotes(messages, tokenizer):
        messages = [{**turn, "content": quoted(turn["content"], tokenizer)} for turn in messages]
    return (
        template_rows(messages, tokenizer) if form is None else [_from_format(messages, str(tokenizer.eos_token), form)]
    )


def quotes(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a message holds the text of a special token."""
    return any(special_pattern(tokenizer).search(turn["content"]) for turn in messages)


def _from_format(messages: Sequence[Message], stop: str, form: Format) -> list[Segment]:
    rendered: list[Segment] = []
    after_answer = ""
    for turn in messages:
        text = form[turn["role"]].replace("{content}", turn["content"])
        if turn["role"] == "assistant":
            rendered.append(Segment(text + stop, turn["supervised"]))
        else:
            rendered.append(Segment(after_answer + text, False))
        after_answer = form["between"] if turn["role"] == "assistant" else ""
    return rendered


@cache
def _own_bos(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The BOS that the tokenizer puts in front of a text by itself, if it does."""
    opened = tokenizer("")["input_ids"]
    return (tokenizer.bos_token_id,) if opened and opened[0] == tokenizer.bos_token_id else ()


def opening_ids(text: str, tokenizer: PreTrainedTokenizerBase, form: Format | None) -> tuple[int, ...]:
    """What is put in front of a rendered text's ids: the tokenizer's own BOS, unless the template wrote it."""
    own = _own_bos(tokenizer)
    return () if own and form is None and text.startswith(str(tokenizer.bos_token)) else own


def tokenized(parts: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, form: Format | None) -> Tokens:
    """Ids and labels of a rendered row: see `tokenized_batch`."""
    return tokenized_batch([parts], tokenizer, form)[0]


def tokenized_batch(
    rows: Sequence[Sequence[Segment]], tokenizer: PreTrainedTokenizerBase, form: Format | None
) -> list[Tokens]:
    """Ids and labels of rendered rows.

    A row's text is tokenised at once where the ids of each prompt alone are the beginning of the whole's ids; where a
    merge over a boundary breaks that, prompts and answers are tokenised apart.
    """
    stretches = [
        [
            Segment("".join(part.text for part in group), supervised)
            for supervised, group in groupby(row, key=lambda part: part.supervised)
        ]
        for row in rows
    ]
    texts = ["".join(part.text for part in row) for row in stretches]
    # Of a prompt alone, only what follows its last special token can be tokenised otherwise than in the whole.
    tails = [_tails(row, text, tokenizer) for row, text in zip(stretches, texts, strict=True)]
    wholes = encode(tokenizer, texts)
    encoded = iter(encode(tokenizer, [tail for row in tails for _, tail in row]))
    return [
        _labelled(row, whole, [(divider, next(encoded)) for divider, _ in tail], tokenizer, form)
        for row, whole, tail in zip(stretches, wholes, tails, strict=True)
    ]


def _tails(stretches: Sequence[Segment], text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, str]]:
    """For each beginning of a row but the whole: how many special tokens are in it, and its text from the last on."""
    pattern, _ = dividers(tokenizer)
    starts = [found.start() for found in pattern.finditer(text)]
    ends = list(accumulate(len(stretch.text) for stretch in stretches[:-1]))
    counts = [bisect_left(starts, end) for end in ends]
    return [(count, text[starts[count - 1] if count else 0 : end]) for count, end in zip(counts, ends, strict=True)]


def _labelled(
    stretches: Sequence[Segment],
    whole: list[int],
    tails: Sequence[tuple[int, list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    form: Format | None,
) -> Tokens:
    """A row's tokens, given its stretches, the ids of its text, and those of the tails of its beginnings."""
    _, numbers = dividers(tokenizer)
    places = [place for place, token in enumerate(whole) if token in numbers]
    bounds = [0]
    for count, tail in tails:
        start = places[count - 1] if 0 < count <= len(places) else 0
        if whole[start : start + len(tail)] == tail:
            bounds.append(start + len(tail))
    apart = len(bounds) <= len(tails)
    if apart:
        following = encode(tokenizer, [stretch.text for stretch in stretches[1:]], continuing=True)
        pieces = [*encode(tokenizer, [stretches[0].text]), *following]
    else:
        pieces = [whole[start:end] for start, end in pairwise([*bounds, len(whole)])]
    ids = list(opening_ids(stretches[0].text, tokenizer, form))
    labels = [IGNORED] * len(ids)
    for piece, stretch in zip(pieces, stretches, strict=True):
        ids += piece
        labels += piece if stretch.supervised else [IGNORED] * len(piece)
    opens = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return Tokens(ids, labels, apart, int(opens))


def last_answer(labels: Sequence[int]) -> slice:
    """Where the last learned stretch of a row lies."""
    end = len(labels)
    while end and labels[end - 1] == IGNORED:
        end -= 1
    start = end
    while start and labels[start - 1] != IGNORED:
        start -= 1
    return slice(start, end)


def prompt_ids(tokens: Tokens) -> list[int]:
    """The ids up to where the last learned stretch begins: what the model is given when it is asked."""
    return tokens.input_ids[: last_answer(tokens.labels).start]
