"""What becomes of a row that is longer than it may be."""

from collections.abc import Iterator
from dataclasses import replace

from qlora.render import IGNORED, Tokens


def fitted(tokens: Tokens, max_length: int, overlong: str) -> list[Tokens]:
    """The rows of at most `max_length` tokens that a row becomes by the declared policy; none where it is dropped.

    drop: none. cut_prompt: the left of the text before the first answer goes, but for a BOS; none where that is not
    enough, or would leave nothing of it. cut_completion: the end goes; none where nothing is left to learn. split:
    see `split_row`.
    """
    if len(tokens.input_ids) <= max_length:
        return [tokens]
    if overlong == "cut_prompt":
        return _cut_prompt(tokens, max_length)
    if overlong == "cut_completion":
        cut = _part(tokens, 0, max_length)
        return [cut] if cut.supervised else []
    return list(split_row(tokens, max_length)) if overlong == "split" else []


def split_row(tokens: Tokens, max_length: int) -> Iterator[Tokens]:
    """Rows of at most `max_length` tokens in which each learned token is learned exactly once.

    A conversation is split where a turn's prompt begins, with as many whole turns in a row as it holds. A turn that is
    longer than a row by itself becomes several: the answer goes on from row to row, and in front of each part stands
    what came before it in the turn, not learned: as much as there is room for, and half a row at least where there is
    that much. So of a prompt longer than a row only the end is there. Text after the last learned token is left out.
    """
    turns = _turns(tokens.labels)
    opening = tokens.opening
    room = max_length - opening
    begin = end = opening
    for place, (first, answer, stop) in enumerate(turns):
        start = first if place else opening
        if stop - begin > room:
            if end > begin:
                yield _part(tokens, begin, end, opening)
            begin = start
            if stop - start > room:
                yield from _parts_of_answer(tokens, (start, answer, stop), room, opening)
                begin = stop
        end = stop
    if end > begin:
        yield _part(tokens, begin, end, opening)


def _parts_of_answer(tokens: Tokens, turn: tuple[int, int, int], room: int, opening: int) -> Iterator[Tokens]:
    start, begin, stop = turn
    while begin < stop:
        size = min(stop - begin, max(room - room // 2, room - (begin - start)))
        before = max(start, begin + size - room)
        part = _part(tokens, before, begin + size, opening)
        yield replace(part, labels=[IGNORED] * (len(part.labels) - size) + part.labels[-size:])
        begin += size


def _turns(labels: list[int]) -> list[tuple[int, int, int]]:
    """(start of the prompt, start of the answer, end of the answer) of each learned stretch, in tokens."""
    turns = []
    start = answer = 0
    for place in range(1, len(labels) + 1):
        learned = labels[place - 1] != IGNORED
        if learned and (place == len(labels) or labels[place] == IGNORED):
            turns.append((start, answer, place))
            start = place
        elif not learned and place < len(labels) and labels[place] != IGNORED:
            answer = place
    return turns


def _part(tokens: Tokens, begin: int, end: int, opening: int = 0) -> Tokens:
    """The tokens from `begin` up to `end`, behind the row's first `opening` ones, unless they begin with those."""
    if tokens.input_ids[begin : begin + opening] == tokens.input_ids[:opening]:
        opening = 0
    return replace(
        tokens,
        input_ids=tokens.input_ids[:opening] + tokens.input_ids[begin:end],
        labels=tokens.labels[:opening] + tokens.labels[begin:end],
    )


def _cut_prompt(tokens: Tokens, max_length: int) -> list[Tokens]:
    begin = tokens.opening + len(tokens.input_ids) - max_length
    first = next((place for place, label in enumerate(tokens.labels) if label != IGNORED), 0)
    return [_part(tokens, begin, len(tokens.input_ids), tokens.opening)] if begin < first else []
