"""Stage `tokenize`: the rows of a mixture become token ids and labels for one model."""

from qlora.stage import Progress, run_stage

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import pyarrow
from transformers import PreTrainedTokenizerBase

from qlora.conversations import Message, placed_system
from qlora.encoding import added_pattern, decode, plain
from qlora.errors import UserError
from qlora.files import read_jsonl, replacing, sha256_of_file, write_json
from qlora.overlong import fitted
from qlora.pretrained import model_config
from qlora.render import Format, Segment, Tokens, load_tokenizer, quotes, rows_of, stop_ids, tokenized_batch

SCHEMA = pyarrow.schema(
    [
        ("input_ids", pyarrow.list_(pyarrow.int32())),
        ("labels", pyarrow.list_(pyarrow.int32())),
        ("length", pyarrow.int32()),
        ("dataset", pyarrow.string()),
    ]
)
# What the card counts: read + further rows = kept + dropped.
COUNTED = (
    *("read", "further rows, one an answer", "further rows, split", "kept", "over max_length, dropped"),
    *("special tokens read as text", "text lost", "prompt and answer tokenised apart", "tokens", "supervised tokens"),
)
BATCH_ROWS = 500
Row = dict[str, Any]  # id, messages, dataset


@dataclass
class Counts:
    """What became of the rows of a split, for the card; `lost`: the first row whose text is not given back."""

    rows: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTED, 0)))
    lost: str = ""


@dataclass(frozen=True)
class Way:
    """How rows are turned into tokens: what the config says for the model and the mixture."""

    tokenizer: PreTrainedTokenizerBase
    form: Format | None
    system: str
    max_length: int
    overlong: str
    vocabulary: int  # rows of the model's embedding


def tokenize_mixture(
    mixture: Path,
    model: Path,
    tokens: Path,
    form: Format | None,
    max_length: int,
    overlong: str,
    system: str = "template",
    lossy: float = 0.01,
    threads: int = 1,
) -> None:
    """Write `tokens`/{train,validation}.arrow (input_ids, labels, length, dataset) and card.json, with the counts.

    Labels come from where the answers begin in the rendered text. A row over `max_length` tokens is treated as
    `overlong` says (qlora.overlong). `system` is where a system message goes. The mixture is refused where the
    tokenizer does not give back the text of more than the share `lossy` of its rows, and where `max_length` is over
    the model's context. Rows are worked on in batches, so that memory does not grow with their number, by `threads`
    threads, on which the result does not depend.
    """
    vocabulary = check_limits(model, max_length)
    os.environ.update(TOKENIZERS_PARALLELISM=str(threads > 1).lower(), RAYON_NUM_THREADS=str(threads))
    way = Way(load_tokenizer(model), form, system, max_length, overlong, vocabulary)
    card: dict[str, Any] = {
        "model": model.name,
        "mixture": mixture.name,
        "max_length": max_length,
        "overlong": overlong,
        "stop ids": sorted(stop_ids(way.tokenizer, form)),
    }
    with replacing(tokens) as folder:
        folder.mkdir()
        counts = {split: Counts() for split in ("train", "validation")}
        for split, counted in counts.items():
            write_arrow(folder / f"{split}.arrow", tokenized_rows(mixture / f"{split}.jsonl", way, counted))
            card[split] = dict(sorted(counted.rows.items()))
        check_losses(model, list(counts.values()), lossy)
        if not card["train"]["kept"]:
            raise UserError(
                f"{mixture / 'train.jsonl'}: no row fits into max_length {max_length};"
                " raise it, or set 'overlong' to cut"
            )
        card["sha256"] = {path.name: sha256_of_file(path) for path in sorted(folder.iterdir())}
        write_json(folder / "card.json", card)


def check_limits(model: Path, max_length: int) -> int:
    """The rows of the model's embedding.

    Raises UserError where a row may be longer than what the model can look at; some families name no limit.
    """
    config = model_config(model).get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise UserError(
            f"{model.name}: max_length {max_length} of the mixture is over the model's context of {context} tokens;"
            f" set max_length to {context} or less"
        )
    return int(config.vocab_size)


def check_losses(model: Path, counts: Sequence[Counts], lossy: float) -> None:
    """Raise UserError where the tokenizer did not give back the text of more than a share `lossy` of the rows."""
    lost, read = (sum(counted.rows[name] for counted in counts) for name in ("text lost", "read"))
    if lost > lossy * read:
        first = next(counted.lost for counted in counts if counted.lost)
        raise UserError(
            f"{model.name}: its tokenizer does not give back the text of {lost} of {read} rows ({lost / read:.2%}, over"
            f" 'lossy' of {lossy:.2%}), first {first}; mend the rows, take another model, or raise 'lossy'"
        )


def tokenized_rows(path: Path, way: Way, counts: Counts) -> Iterator[list[tuple[Tokens, str]]]:
    """Batches of (tokens, dataset) of the rows of a JSONL file, with what became of them counted."""
    with path.open("rb") as file:
        total = sum(1 for _ in file)
    progress = Progress(total, f"tokenize {path}", "rows")
    rows = enumerate(read_jsonl(path), start=1)
    while batch := list(islice(rows, BATCH_ROWS)):
        yield list(_tokenized_batch(path, batch, way, counts))
        progress.update(batch[-1][0])


def _tokenized_batch(
    path: Path, batch: Sequence[tuple[int, Row]], way: Way, counts: Counts
) -> Iterator[tuple[Tokens, str]]:
    tokenizer = way.tokenizer
    messages = [placed_system(row["messages"], way.system) for _, row in batch]
    rendered = [rows_of(turns, tokenizer, way.form) for turns in messages]
    encoded = tokenized_batch(list(chain.from_iterable(rendered)), tokenizer, way.form)
    given_back = iter(decode(tokenizer, [given.input_ids for given in encoded]))
    made = iter(encoded)
    for (number, row), turns, parts in zip(batch, messages, rendered, strict=True):
        place = f"{path}, line {number} ({row['id']})"
        lost = next(filter(None, [lost_text(turns, part, next(given_back), tokenizer) for part in parts]), "")
        counts.lost = counts.lost or (lost and f"{place}, with {lost!r}")
        counts.rows.update(
            {
                "read": 1,
                "further rows, one an answer": len(parts) - 1,
                "special tokens read as text": quotes(turns, tokenizer),
                "text lost": bool(lost),
            }
        )
        for given in islice(made, len(parts)):
            if not given.supervised:
                raise UserError(f"{place}: nothing in it is learned; look at its answer")
            if max(given.input_ids) >= way.vocabulary:
                raise UserError(
                    f"{place}: the tokenizer gives it the id {max(given.input_ids)}, and the model's embedding has"
                    f" {way.vocabulary} rows; take the token out of the row, or a tokenizer that fits the model"
                )
            for fit in _fitted(given, way, counts.rows):
                yield fit, row["dataset"]


def lost_text(
    messages: Sequence[Message], parts: Sequence[Segment], given_back: str, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The first word of the messages in a row that its ids, decoded, do not give back; "" where there is none."""
    contents = [turn["content"].strip() for turn in messages]
    missing = [content for content in contents if content not in given_back]
    if not missing:
        return ""
    rendered = plain("".join(part.text for part in parts), tokenizer)
    pieces = chain.from_iterable(  # a template may leave a thought out, or write the marks around it anew
        [content] if content in rendered else map(str.strip, added_pattern(tokenizer).split(content))
        for content in missing
    )
    gone = [piece for piece in pieces if piece in rendered and piece not in given_back]
    return next((word for piece in gone for word in piece.split() if word not in given_back), "".join(gone)[:40])


def _fitted(given: Tokens, way: Way, counts: Counter[str]) -> list[Tokens]:
    """The rows of the right length that a row becomes, counted."""
    fits = fitted(given, way.max_length, way.overlong)
    counts["prompt and answer tokenised apart"] += given.apart
    counts["kept"] += len(fits)
    if len(given.input_ids) > way.max_length:
        counts[f"over max_length, {way.overlong if fits else 'dropped'}"] += 1
        counts["further rows, split"] += max(0, len(fits) - 1)
    for fit in fits:
        counts["tokens"] += len(fit.input_ids)
        counts["supervised tokens"] += fit.supervised
    return fits


def write_arrow(path: Path, batches: Iterable[Sequence[tuple[Tokens, str]]]) -> None:
    """Write batches of (tokens, dataset) as an Arrow stream, so that memory does not grow with the number of rows."""
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, SCHEMA) as writer:
        for batch in batches:
            lengths = [len(tokens.input_ids) for tokens, _ in batch]
            columns = [
                _lists(lengths, [tokens.input_ids for tokens, _ in batch]),
                _lists(lengths, [tokens.labels for tokens, _ in batch]),
                pyarrow.array(lengths, pyarrow.int32()),
                pyarrow.array([dataset for _, dataset in batch], pyarrow.string()),
            ]
            writer.write_batch(pyarrow.RecordBatch.from_arrays(columns, schema=SCHEMA))


def _lists(lengths: Sequence[int], rows: Iterable[list[int]]) -> pyarrow.ListArray:
    """Lists of 32-bit integers as an Arrow array; several times faster than from a list of lists."""
    offsets = pyarrow.array(accumulate(lengths, initial=0), pyarrow.int32())
    values = pyarrow.Array.from_buffers(
        pyarrow.int32(), sum(lengths), [None, pyarrow.py_buffer(array("i", chain.from_iterable(rows)))]
    )
    return pyarrow.ListArray.from_arrays(offsets, values)


if __name__ == "__main__":
    run_stage(tokenize_mixture)
