"""From files to a mixture: order of rows, of files and of datasets, their kind and the number of workers change nothing."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from concatenate_mixture import concatenate_mixture
from format_dataset import SPLITS, format_dataset
from qlora.conversations import prompt_hash
from qlora.files import read_json, read_jsonl, sha256_of

SCRIPTS = Path(__file__).parents[2] / "scripts"
SETTINGS: dict[str, Any] = {
    "source": {"path": "rows"},
    "prompt": "{q}",
    "completion": "{a}",
    "task": "text",
    "files": {"train": "train/*"},
    "limit": {},
    "unusable_rows": "drop",
    "licence": "MIT",
}
# Other shares of equal prompts, so that what one dataset tests the other would train.
HOLDOUT = {"maths": {"validation": 0.15, "test": 0.15}, "chat": {"validation": 0.1, "test": 0.4}}
Given = list[tuple[str, str]]
# Few questions, so that repeats, variants of one text and empty ones come together; equal ones in both datasets leak.
QUESTIONS = st.one_of(
    st.sampled_from(["", "Who?", "who", " WHO ", "Top-up?", "top up"]), st.integers(0, 30).map("Question {}?".format)
)
ROWS = st.lists(st.tuples(QUESTIONS, st.sampled_from(["", "one", "two", "One"])), max_size=40)
STAYING = [(f"stays {number}", "sure") for number in range(16)]  # so that no file and no mixture is empty
SHARES = st.fixed_dictionaries(
    {
        "weight": st.sampled_from([0.25, 0.5, 1.0, 1.3, 2.0]),
        "cap": st.one_of(st.none(), st.integers(1, 30)),
    }
)


def write_source(folder: Path, rows: Given, parts: int, kind: str) -> Path:
    """The rows in files of one name in folders of their own, as many as there are parts."""
    for part in range(parts):
        path = folder / "train" / f"part-{part}" / f"rows{kind}"
        path.parent.mkdir(parents=True)
        mine = rows[part::parts]
        with path.open("w", encoding="utf-8", newline="") as file:
            if kind == ".csv":
                csv.writer(file).writerows([("q", "a"), *mine])
            else:
                file.writelines(json.dumps({"a": answer, "q": question}) + "\n" for question, answer in mine)
    return folder


def mixture(
    folder: Path,
    datasets: dict[str, Given],
    shares: dict[str, dict[str, Any]],
    limit: dict[str, int],
    parts: int = 1,
    kind: str = ".jsonl",
    workers: int = 1,
) -> dict[str, Any]:
    """All that a mixture says beside the rows' ids: what is trained in its order, what is tested, the cards."""
    shutil.rmtree(folder, ignore_errors=True)
    formatted = [folder / "datasets" / name for name in datasets]

    def make(name: str) -> None:
        rows = [*datasets[name], *STAYING]
        source = write_source(folder / "sources" / name, rows, parts, kind)
        format_dataset(source, folder / "datasets" / name, name, {**SETTINGS, "limit": limit, "holdout": HOLDOUT[name]})

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(make, datasets))
    concatenate_mixture(
        formatted, formatted[:1], folder / "mixture", "all", {name: shares[name] for name in datasets}, 5
    )
    said: dict[str, Any] = {"mixture": read_json(folder / "mixture" / "card.json")}
    for split in ("train", "validation"):
        rows = read_jsonl(folder / "mixture" / f"{split}.jsonl")
        said[split] = [(row["dataset"], [tuple(turn.values()) for turn in row["messages"]]) for row in rows]
    for path in formatted:
        said[path.name] = read_json(path / "card.json")
        tested = read_jsonl(path / "test.jsonl")
        said[f"test of {path.name}"] = Counter(str(row["messages"]) for row in tested)
    return said


@given(ROWS, ROWS, SHARES, SHARES, st.dictionaries(st.sampled_from(SPLITS), st.integers(4, 12)), st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_order_files_kinds_and_workers_change_nothing(tmp_path, maths, chat, one, other, limit, data):
    shares = {"maths": one, "chat": other}
    first = mixture(tmp_path / "run", {"maths": maths, "chat": chat}, shares, limit)
    order = random.Random(data.draw(st.integers(0, 99)))
    again = mixture(
        tmp_path / "run",
        {"chat": order.sample(chat, len(chat)), "maths": order.sample(maths, len(maths))},
        shares,
        limit,
        parts=data.draw(st.integers(1, 3)),
        kind=data.draw(st.sampled_from([".jsonl", ".csv"])),
        workers=data.draw(st.integers(1, 3)),
    )
    assert again == first


@given(ROWS, ROWS, SHARES, SHARES)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counts_add_up_and_no_prompt_that_is_tested_is_trained(tmp_path, maths, chat, one, other):
    said = mixture(tmp_path / "run", {"maths": maths, "chat": chat}, {"maths": one, "chat": other}, {})
    tested: set[str] = set()
    for name in ("maths", "chat"):
        for row in read_jsonl(tmp_path / "run" / "datasets" / name / "test.jsonl"):
            tested.add(prompt_hash(row["messages"]))
    for split in ("train", "validation"):
        rows = list(read_jsonl(tmp_path / "run" / "mixture" / f"{split}.jsonl"))
        assert not tested & {prompt_hash(row["messages"]) for row in rows}
        taken = Counter(row["dataset"] for row in rows)
        assert said["mixture"][split] == len(rows)
        for name, share in (("maths", one), ("chat", other)):
            counts, left = said["mixture"]["datasets"][name], said["mixture"]["left out"][name]
            assert counts[f"{split} rows"] == said[name]["kept"][split]
            usable = counts[f"{split} rows"] - sum(left[reason] for reason in left if reason.startswith(split))
            whole, part = divmod(share["weight"], 1)
            wanted = int(whole) * usable + round(part * usable) if split == "train" else usable
            wanted = min(wanted, share["cap"] or wanted) if split == "train" else wanted
            assert taken[name] == counts[f"{split} rows taken"] == wanted


def test_no_mixture_moves_a_row_of_a_dataset(tmp_path):
    rows = [(f"Question {number}?", "one") for number in range(60)]
    shares = {"weight": 0.5, "cap": 3}
    mixture(tmp_path / "run", {"maths": rows, "chat": rows}, {"maths": shares, "chat": shares}, {})
    folders = [tmp_path / "run" / "datasets" / name for name in ("maths", "chat")]
    before = [sha256_of(folder) for folder in folders]
    for seed, weight in ((1, 0.3), (2, 3.0)):
        shares = {folder.name: {"weight": weight, "cap": None} for folder in folders}
        concatenate_mixture(folders, [], tmp_path / "other", "other", shares, seed)
    assert before == [sha256_of(folder) for folder in folders]


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_writes_the_same_bytes(tmp_path, hash_seed):
    rows = [(f"Question {number % 40}?", str(number % 3)) for number in range(90)]
    shares = {"maths": {"weight": 0.5, "cap": None}, "chat": {"weight": 1.5, "cap": 50}}
    mixture(tmp_path / "run", {"maths": rows, "chat": rows[20:]}, shares, {"test": 4})
    before = sha256_of(tmp_path / "run")

    def stage(script: str, **options: Any) -> None:
        arguments = [text for key, value in options.items() for text in (f"--{key}", value)]
        command = [
            sys.executable,
            str(SCRIPTS / script),
            *(yaml.safe_dump(a) if a is not str(a) else a for a in arguments),
        ]
        subprocess.run(command, cwd=tmp_path / "run", env={**os.environ, "PYTHONHASHSEED": hash_seed}, check=True)

    for name in ("maths", "chat"):
        limited = {**SETTINGS, "limit": {"test": 4}, "holdout": HOLDOUT[name]}
        stage("format_dataset.py", source=f"sources/{name}", dataset=f"datasets/{name}", name=name, settings=limited)
    both = ["datasets/maths", "datasets/chat"]
    stage(
        "concatenate_mixture.py",
        **{"datasets": both, "evaluated": both, "mixture": "mixture", "name": "all", "shares": shares, "seed": 5},
    )
    assert sha256_of(tmp_path / "run") == before
