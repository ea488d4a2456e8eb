"""Stage `tokenize`: the rows of a mixture become token ids and labels for one model."""

from qlora.stage import Progress, run_stage

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow

from qlora.errors import UserError
from qlora.files import read_jsonl, replacing, write_json
from qlora.render import IGNORED, Format, Tokens, load_tokenizer, segments, tokenized

SCHEMA = pyarrow.schema(
    [
        ("input_ids", pyarrow.list_(pyarrow.int32())),
        ("labels", pyarrow.list_(pyarrow.int32())),
        ("length", pyarrow.int32()),
        ("dataset", pyarrow.string()),
    ]
)
BATCH_ROWS = 1000
PROGRESS_ROWS = 10_000
Counts = Counter[str]


def tokenize_mixture(
    mixture: Path, model: Path, tokens: Path, form: Format | None, max_length: int, overlong: str
) -> None:
    """Write `tokens`/{train,validation}.arrow (input_ids, labels, length, dataset) and card.json, with the counts.

    Labels come from where the answer begins in the rendered text. A row over `max_length` tokens is dropped, or its
    prompt is cut on the left, or its completion at the end, as `overlong` says.
    """
    tokenizer = load_tokenizer(model)
    card: dict[str, Any] = {
        "model": model.name,
        "mixture": mixture.name,
        "max_length": max_length,
        "overlong": overlong,
    }
    with replacing(tokens) as folder:
        folder.mkdir()
        for split in ("train", "validation"):
            counts: Counts = Counter({"read": 0, "kept": 0, "tokens": 0, "supervised tokens": 0})
            rows = _tokenized_rows(mixture / f"{split}.jsonl", tokenizer, form, max_length, overlong, counts)
            _write_arrow(folder / f"{split}.arrow", rows)
            card[split] = dict(sorted(counts.items()))
        if not card["train"]["kept"]:
            raise UserError(
                f"{mixture / 'train.jsonl'}: no row fits into max_length {max_length};"
                " raise it, or set 'overlong' to cut"
            )
        write_json(folder / "card.json", card)


def _tokenized_rows(
    path: Path, tokenizer: Any, form: Format | None, max_length: int, overlong: str, counts: Counts
) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        total = sum(1 for _ in file)
    progress = Progress(total, f"tokenize {path}", "rows")
    for number, row in enumerate(read_jsonl(path), start=1):
        counts["read"] += 1
        given = tokenized(segments(row["messages"], tokenizer, form), tokenizer, form)
        counts["prompt and answer tokenised apart"] += given.apart
        fitted = fit(given, max_length, overlong)
        if len(given.input_ids) > max_length:
            counts["over max_length, dropped" if fitted is None else f"over max_length, {overlong}"] += 1
        if fitted is not None:
            if not fitted.supervised:
                raise UserError(
                    f"{path}, line {number} ({row['id']}): nothing in it is learned;"
                    " look at its answer and at max_length"
                )
            counts.update({"kept": 1, "tokens": len(fitted.input_ids), "supervised tokens": fitted.supervised})
            length = len(fitted.input_ids)
            yield {"input_ids": fitted.input_ids, "labels": fitted.labels, "length": length, "dataset": row["dataset"]}
        if number % PROGRESS_ROWS == 0:
            progress.update(number)


def fit(tokens: Tokens, max_length: int, overlong: str) -> Tokens | None:
    """The row within `max_length` tokens by the declared policy; None to drop it, or where nothing is left to learn."""
    excess = len(tokens.input_ids) - max_length
    if excess <= 0:
        return tokens
    if overlong == "cut_completion":
        cut = replace(tokens, input_ids=tokens.input_ids[:max_length], labels=tokens.labels[:max_length])
        return cut if cut.supervised else None
    first = next((index for index, label in enumerate(tokens.labels) if label != IGNORED), 0)
    if overlong == "cut_prompt" and first - 1 > excess:  # the first id stays: it is the BOS where there is one
        keep = slice(1 + excess, None)
        return replace(
            tokens,
            input_ids=tokens.input_ids[:1] + tokens.input_ids[keep],
            labels=tokens.labels[:1] + tokens.labels[keep],
        )
    return None


def _write_arrow(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write rows as an Arrow stream, batch by batch, so that memory does not grow with their number."""
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, SCHEMA) as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == BATCH_ROWS:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, SCHEMA))
                batch = []
        if batch:
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, SCHEMA))


if __name__ == "__main__":
    run_stage(tokenize_mixture)
