"""Stage `predict`: a base model or a run answers a suite's test rows, and says how likely the true answers are."""

from qlora.stage import Progress, log, run_stage

import hashlib
import heapq
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from qlora.conversations import Message, placed_system
from qlora.encoding import encode
from qlora.errors import UserError
from qlora.files import check_files, check_source, meanwhile, read_json, read_jsonl, write_jsonl
from qlora.generation import SLACK, greedy, named_stops
from qlora.loss import softcap_of, token_nll
from qlora.models import load_quantized, set_threads
from qlora.render import (
    IGNORED,
    Format,
    Tokens,
    last_answer,
    load_tokenizer,
    padding_id,
    prompt_ids,
    rows_of,
    stop_ids,
    tokenized,
)

BATCH_ROWS = 1000  # whose answers are measured at a time
CANDIDATES = 100  # training rows looked at for an example of a few-shot prompt
LOSS_TOKENS = 16_384  # padded tokens of a batch when the likelihood of answers is computed


@dataclass(frozen=True)
class Question:
    """One thing asked of the model: the whole row as ids and labels, and the prompt's ids with which it is asked."""

    subject: str
    dataset: str
    id: str
    tokens: Tokens
    prompt: list[int]
    limit: int  # tokens that may be generated
    one_line: bool  # the answer ends with its line, as the examples in the prompt show


def predict_rows(
    model: Path,
    datasets: list[Path],
    predictions: Path,
    adapter: Path | None,
    record: Path | None,
    form: Format | None,
    quantization: Mapping[str, Any],
    attention: str,
    shots: int,
    max_new_tokens: int,
    batch_size: int,
    device: str,
    threads: int,
    system: str = "template",
    overlong: str = "refuse",
) -> None:
    """Write a prediction for each test row of the formatted `datasets`, a row a line.

    Without `adapter` the subject is the base, and with `shots` above 0 also the base with that many training rows in
    its prompt. Decoding is greedy, up to the longest training answer of the dataset and some tokens more, and at most
    `max_new_tokens`. `nll` is in nats over the answer's tokens, its stop token included. `system` is where a system
    message goes. A row that does not fit into the model's context is an error, or its prompt is cut on the left, as
    `overlong` says. An adapter comes with its run's `record`; a file of it or of the base that is not the recorded one
    is an error.
    """
    if adapter is not None and record is not None:
        check_files(adapter, read_json(record)["adapter"], "run.json")
    set_threads(threads, device)
    with meanwhile(partial(check_source, model)):
        tokenizer = load_tokenizer(model)
        network: Any = load_quantized(model, quantization, device, attention)
    if adapter is not None:
        network = PeftModel.from_pretrained(network, adapter)
    network.eval()
    context = getattr(network.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    subject = "base" if adapter is None else "tuned"
    asked = [
        question
        for folder in datasets
        for question in questions(
            folder, subject, tokenizer, form, shots, max_new_tokens, context, system=system, overlong=overlong
        )
    ]
    if silent := {folder.name for folder in datasets} - {question.dataset for question in asked}:
        raise UserError(
            f"dataset '{min(silent)}': no test rows are left; see its card.json, and give it a test file or a larger"
            " holdout.test"
        )
    stops = stop_ids(tokenizer, form) | named_stops(network)
    answers = generate(network, asked, stops, padding_id(tokenizer), batch_size)
    likelihoods = answer_nll(network, asked, padding_id(tokenizer))
    write_jsonl(
        predictions,
        (
            _row(question, answer, nll, stops, tokenizer)
            for question, answer, nll in zip(asked, answers, likelihoods, strict=True)
        ),
    )


def _row(question: Question, answer: list[int], nll: float, stops: set[int], tokenizer: Any) -> dict[str, Any]:
    stopped = bool(answer) and answer[-1] in stops
    text = tokenizer.decode(answer[:-1] if stopped else answer, skip_special_tokens=True)
    if question.one_line and "\n" in text.strip():
        text, stopped = text.strip().split("\n", 1)[0], True
    is_few_shot = question.subject == "few_shot"
    return {
        "subject": question.subject,
        "dataset": question.dataset,
        "id": question.id,
        "prompt": tokenizer.decode(question.prompt, skip_special_tokens=True),
        "generated": text,
        "stopped": stopped,
        "nll": None if is_few_shot else nll,
        "tokens": 0 if is_few_shot else question.tokens.supervised,
    }


def questions(
    folder: Path,
    subject: str,
    tokenizer: Any,
    form: Format | None,
    shots: int,
    max_new_tokens: int,
    context: int,
    system: str = "template",
    overlong: str = "refuse",
) -> Iterator[Question]:
    """What is asked of a model for one dataset: each test row as it is, and where `shots` > 0 with examples before it.

    Prompt and answer share `context` tokens. A row that is over it is refused with a UserError, or the left of its
    prompt is cut, counted. Examples are left out, the first one first, until they fit, and counted.
    """
    limit = min(max_new_tokens, longest_answer(folder / "train.jsonl", tokenizer, max_new_tokens) + SLACK)
    room = context - limit
    if room < 2:
        raise UserError(f"{folder.name}: answers of {limit} tokens leave no room for a prompt; lower max_new_tokens")
    examples = few_shot_examples(read_jsonl(folder / "train.jsonl"), shots) if shots else []
    if shots and not examples:
        raise UserError(f"{folder.name}: no training row for the few-shot baseline; take few_shot out of its baselines")
    left_out = cut = few_shot_cut = 0

    def rendered(messages: Sequence[Message]) -> Tokens:
        return tokenized(rows_of(placed_system(list(messages), system), tokenizer, form)[-1], tokenizer, form)

    for row in read_jsonl(folder / "test.jsonl"):
        tokens = asked_alone(rendered(row["messages"]))
        prompt, length = prompt_ids(tokens), len(tokens.input_ids)
        if len(prompt) > room or length > context:
            _check_overlong(f"{folder.name}: row {row['id']}", overlong, len(prompt), length, limit, context)
            opening = tokens.opening
            ids, labels = (_cut(row_of, context, opening) for row_of in (tokens.input_ids, tokens.labels))
            tokens = replace(tokens, input_ids=ids, labels=labels)
            prompt, cut = _cut(prompt, room, opening), cut + 1
        yield Question(subject, folder.name, row["id"], tokens, prompt, limit, one_line=False)
        given = list(examples)
        while given:
            shown = [{**turn, "supervised": False} for turns in given for turn in turns if turn["role"] != "system"]
            messages: list[Any] = [*shown, *row["messages"]]
            messages.sort(key=lambda turn: turn["role"] != "system")  # the row's own system message stands first
            prompt = prompt_ids(rendered(messages))
            if len(prompt) <= room or len(given) == 1:
                few_shot_cut += len(prompt) > room
                prompt = _cut(prompt, room, tokens.opening)
                yield Question("few_shot", folder.name, row["id"], tokens, prompt, limit, _one_line(examples))
                break
            given, left_out = given[1:], left_out + 1
    if cut:
        log.info("%s: %d rows cut on the left, to fit into %d tokens with the answer", folder.name, cut, context)
    if few_shot_cut:
        log.info("%s: %d few-shot prompts cut on the left, through their one example", folder.name, few_shot_cut)
    if left_out:
        log.info(
            "%s: %d examples left out of few-shot prompts, which have %d tokens of room", folder.name, left_out, room
        )


def _check_overlong(row: str, overlong: str, prompt: int, length: int, limit: int, context: int) -> None:
    """Raise UserError for a row over the context, unless its prompt may be cut and its answer alone is not over it."""
    if overlong == "refuse":
        raise UserError(
            f"{row}: its prompt has {prompt} tokens and its answer {length - prompt}, and up to {limit} are generated,"
            f" over the model's context of {context}; shorten the row, lower max_new_tokens,"
            " or set 'overlong' of the suite to cut_prompt"
        )
    if length - prompt >= context:
        raise UserError(
            f"{row}: its answer alone has {length - prompt} tokens, over the model's context of {context};"
            " shorten it or leave the row out"
        )


def longest_answer(path: Path, tokenizer: Any, most: int) -> int:
    """Tokens of the longest last answer of a JSONL file, `most` where it has no row."""
    answers = (row["messages"][-1]["content"] for row in read_jsonl(path))
    longest = 0
    while batch := list(islice(answers, BATCH_ROWS)):
        longest = max(longest, *map(len, encode(tokenizer, batch)))
    return longest or most


def asked_alone(tokens: Tokens) -> Tokens:
    """The row with the labels of its last answer alone: the one that is asked for."""
    place = last_answer(tokens.labels)
    return replace(
        tokens, labels=[IGNORED] * place.start + tokens.labels[place] + [IGNORED] * (len(tokens.labels) - place.stop)
    )


def few_shot_examples(rows: Iterable[Mapping[str, Any]], shots: int) -> list[list[Message]]:
    """`shots` training conversations with different answers where there are any, chosen by a hash of the row."""
    ordered = heapq.nsmallest(
        CANDIDATES * shots, rows, key=lambda row: hashlib.sha256(repr(row["messages"]).encode()).digest()
    )
    by_answer: dict[str, list[Message]] = {}
    for row in ordered:
        by_answer.setdefault(row["messages"][-1]["content"], row["messages"])
    return list(by_answer.values())[:shots]


def _one_line(examples: Sequence[Sequence[Message]]) -> bool:
    return all("\n" not in example[-1]["content"] for example in examples)


def _cut(ids: list[int], room: int, opening: int) -> list[int]:
    """Ids, or labels, cut on the left to `room`; the first `opening` ones stay, a BOS where there is one."""
    return ids if len(ids) <= room else ids[:opening] + ids[len(ids) - room + opening :]


def batches_of(asked: Sequence[Question], size: int) -> list[list[int]]:
    """Places of the questions in batches: one limit a batch, prompts of like length side by side."""
    by_limit: dict[int, list[int]] = {}
    for place in sorted(range(len(asked)), key=lambda place: (len(asked[place].prompt), place)):
        by_limit.setdefault(asked[place].limit, []).append(place)
    return [places[start : start + size] for places in by_limit.values() for start in range(0, len(places), size)]


def generate(
    network: Any, asked: Sequence[Question], stops: set[int], padding: int, batch_size: int
) -> list[list[int]]:
    """Greedy answers, in the order asked, each up to and with its stop token."""
    answers: list[list[int]] = [[] for _ in asked]
    progress = Progress(len(asked), "predict", "answers")
    done = 0
    for batch in batches_of(asked, batch_size):
        written = greedy(network, [asked[index].prompt for index in batch], asked[batch[0]].limit, stops, padding)
        for index, answer in zip(batch, written, strict=True):
            answers[index] = answer
        done += len(batch)
        progress.update(done)
    return answers


def answer_nll(network: Any, asked: Sequence[Question], padding: int) -> list[float]:
    """Negative log-likelihood of each true answer in nats, summed over its tokens; 0 for a few-shot question."""
    order = sorted(
        (index for index in range(len(asked)) if asked[index].subject != "few_shot"),
        key=lambda index: len(asked[index].tokens.input_ids),
    )
    sums = [0.0] * len(asked)
    batch: list[int] = []
    for position, index in enumerate(order):
        batch.append(index)
        following = order[position + 1] if position + 1 < len(order) else None
        if following is None or (len(batch) + 1) * len(asked[following].tokens.input_ids) > LOSS_TOKENS:
            for place, value in zip(
                batch, _batch_nll(network, [asked[item].tokens for item in batch], padding), strict=True
            ):
                sums[place] = value
            batch = []
    return sums


def _batch_nll(network: Any, rows: Sequence[Tokens], padding: int) -> list[float]:
    """NLL of the labels of each row, shape (rows,); logits exist for the answers' positions alone, a tile at a time."""
    width = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), width), padding)
    labels = torch.full((len(rows), width), IGNORED)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        length = len(row.input_ids)
        ids[place, :length] = torch.tensor(row.input_ids)
        labels[place, :length] = torch.tensor(row.labels)
        mask[place, :length] = 1
    with torch.inference_mode():
        core: Any = network.get_base_model() if isinstance(network, PeftModel) else network
        given = {"input_ids": ids.to(network.device), "attention_mask": mask.to(network.device)}
        hidden = core.base_model(**given, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:].to(network.device)
        chosen = wanted != IGNORED
        nll = token_nll(hidden[chosen], wanted[chosen], core.get_output_embeddings(), softcap_of(core))
        sums = (
            torch.zeros(wanted.shape, dtype=torch.float64, device=nll.device)
            .masked_scatter(chosen, nll.double())
            .sum(dim=1)
        )
    return [float(value) for value in sums]


if __name__ == "__main__":
    run_stage(predict_rows)
