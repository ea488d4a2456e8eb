"""Rows and tokens a second of our tokenisation, and of TRL's preprocessing on the same rows in the same run.

    python benchmarks/tokenize_rows.py --rows 20000 --repeats 5 --threads 2
    python benchmarks/tokenize_rows.py --rows 1000000 --repeats 1 --alone     # ours alone: seconds and peak memory

Rows are generated, short ones; with QLORA_TEST_DATA, questions of its gsm8k. The tokenizer is made from them, or is
the one in the folder `--tokenizer`. TRL's side is what SFTTrainer does with a dataset of prompts and completions under
completion_only_loss, on rows that already lie in Arrow; ours reads JSONL, and counts and checks. Both give the same
ids and labels, which is checked.
"""

import argparse
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from qlora.conversations import message
from qlora.files import read_json
from tokenize_mixture import tokenize_mixture

PLAIN = {"system": "{content}\n", "user": "{content}\nAnswer:", "assistant": " {content}", "between": "\n\n"}
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message.role + ']\n' + message.content }}"
    "{{ eos_token if message.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
MAX_LENGTH = 1024


def questions(count: int) -> Iterator[tuple[str, str]]:
    """Pairs of a question of 30 to 50 words and an answer of 3 to 12."""
    draw = random.Random(0)
    if "QLORA_TEST_DATA" in os.environ:
        path = Path(os.environ["QLORA_TEST_DATA"], "data", "gsm8k", "train.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for _ in range(count):
            row = draw.choice(rows)
            yield row["question"], row["answer"].rpartition("####")[2].strip()
        return
    letters = "etaoinshrdlucmfw"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(3000)]
    for _ in range(count):
        asked, given = (draw.choices(words, k=draw.randint(*bounds)) for bounds in ((30, 50), (3, 12)))
        yield f"{' '.join(asked).capitalize()}?", " ".join(given)


def write_mixture(folder: Path, count: int) -> Path:
    """A mixture of `count` training rows."""
    folder.mkdir()
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for number, (asked, given) in enumerate(questions(count)):
            messages = [message("user", asked), message("assistant", given)]
            row = {"id": str(number), "slice": "", "messages": messages, "dataset": "rows"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / "validation.jsonl").touch()
    return folder


def write_tokenizer(folder: Path, source: Path | None, chat: bool) -> Path:
    """The tokenizer of both sides: the one in `source`, or a byte-level BPE of 8,000 tokens made from the rows."""
    if source:
        tokenizer = AutoTokenizer.from_pretrained(source)
    else:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<s>", "</s>"], show_progress=False)
        raw.train_from_iterator((" ".join(pair) for pair in questions(5000)), trainer)
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT if chat else None
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=MAX_LENGTH).save_pretrained(folder)
    return folder


def ours(mixture: Path, model: Path, target: Path, chat: bool, threads: int) -> float:
    """Seconds of our stage."""
    started = time.perf_counter()
    tokenize_mixture(mixture, model, target, None if chat else PLAIN, MAX_LENGTH, "cut_completion", threads=threads)
    return time.perf_counter() - started


def theirs(mixture: Path, model: Path, chat: bool, processes: int) -> tuple[float, Any]:
    """Seconds of TRL's preprocessing, and the dataset that it made."""
    import datasets
    from trl import SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    rows = [json.loads(line)["messages"] for line in (mixture / "train.jsonl").open(encoding="utf-8")]
    turns = [[{key: turn[key] for key in ("role", "content")} for turn in row] for row in rows]
    if chat:
        columns = {"prompt": [row[:1] for row in turns], "completion": [row[1:] for row in turns]}
    else:
        filled = [[PLAIN[turn["role"]].replace("{content}", turn["content"]) for turn in row] for row in turns]
        columns = {"prompt": [row[0] for row in filled], "completion": [row[1] for row in filled]}
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=tokenizer.chat_template, completion_only_loss=True)
    settings = SimpleNamespace(
        dataset_num_proc=processes if processes > 1 else None,
        dataset_text_field="text",
        assistant_only_loss=False,
        max_length=MAX_LENGTH,
        truncation_mode="keep_start",
        shuffle_dataset=False,
    )
    dataset = datasets.Dataset.from_dict(columns)
    started = time.perf_counter()
    made = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, settings, False, None, "train")
    return time.perf_counter() - started, made


def check_same(target: Path, made: Any, wanted: int) -> None:
    """Exit with a message where the two sides do not give the same ids and labels."""
    import datasets

    written = datasets.Dataset.from_file(str(target / "train.arrow"))
    for place, (left, right) in enumerate(zip(written, made, strict=True)):
        if any(left[key] != right[key] for key in ("input_ids", "labels")):
            sys.exit(f"row {place} differs:\n{left}\n{right}")
        if place == wanted:
            return


def told(name: str, seconds: list[float], rows: int, tokens: int) -> float:
    """Print the median and the spread of a side, and return the median in seconds."""
    middle = statistics.median(seconds)
    print(
        f"{name:28} {middle:8.2f} s (from {min(seconds):.2f} to {max(seconds):.2f})"
        f" {rows / middle:10,.0f} rows/s {tokens / middle:12,.0f} tokens/s"
    )
    return middle


def main() -> None:
    """Run both sides by turns and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="our threads, and TRL's processes")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer")
    parser.add_argument("--chat", action="store_true", help="rows through a chat template, not a named format")
    parser.add_argument("--alone", action="store_true", help="without TRL")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        mixture = write_mixture(folder / "mixture", options.rows)
        model = write_tokenizer(folder / "model", options.tokenizer, options.chat)
        seconds: dict[str, list[float]] = {"ours": [], "TRL": []}
        for repeat in range(options.repeats):
            seconds["ours"].append(ours(mixture, model, folder / "tokens", options.chat, options.threads))
            if repeat == 0:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            if not options.alone:
                taken, made = theirs(mixture, model, options.chat, options.threads)
                seconds["TRL"].append(taken)
                check_same(folder / "tokens", made, 1000)
        card = read_json(folder / "tokens" / "card.json")["train"]
        middle = told("ours", seconds["ours"], options.rows, card["tokens"])
        print(f"{'':28} {peak:8.0f} MB at most, after one run")
        if not options.alone:
            other = told("TRL", seconds["TRL"], options.rows, card["tokens"])
            print(f"ours is {other / middle:.2f} times as fast")


if __name__ == "__main__":
    main()
