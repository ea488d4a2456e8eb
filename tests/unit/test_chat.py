"""Talking to a run, as a user would: on a tiny model, with the answers that evaluation has."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FORM, QUANTIZATION, make_base, make_preflight, make_rows, make_tokens, train

from chat import conversations, main
from merge_adapter import merge_adapter
from predict_rows import predict_rows
from qlora.errors import UserError
from qlora.files import read_json, read_jsonl, write_json
from qlora.generation import greedy

ROOT = Path(__file__).resolve().parents[2]
LIMIT = ("--max-new-tokens", "12")
EXACT = {**QUANTIZATION, "compute_dtype": "float32"}  # on every device


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository's folder with a trained run and its predictions; no config, which may be another one by now."""
    here = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "scripts", here / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    base = make_base(here / "results/sources/models/tiny")
    dataset = make_rows(here)
    tokens, run = make_tokens(here, base, dataset), here / "results/runs/facts"
    settings = {"quantization": EXACT, "max_steps": 30, "eval_steps": None, "save_steps": 500, "learning_rate": 1e-2}
    train(base, tokens, make_preflight(base), run, **settings)
    for name, adapter in (("tuned", run / "adapter"), ("base", None)):
        predict_rows(
            *(base, [dataset], here / f"{name}.jsonl", adapter, run / "run.json" if adapter else None),
            **{"form": FORM, "quantization": EXACT, "attention": "sdpa", "device": "cpu", "threads": 1},
            **{"shots": 0, "max_new_tokens": 12, "batch_size": 1},
        )
    return here


@pytest.fixture
def chat(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call the command in the repository's folder, and hand back what it prints."""
    monkeypatch.chdir(folder)

    def call(*arguments: str, said: str = "") -> str:
        monkeypatch.setattr(sys, "argv", ["chat.py", *arguments, "--device", "cpu"])
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return call


def generated(folder: Path, name: str) -> list[str]:
    return [row["generated"] for row in read_jsonl(folder / f"{name}.jsonl")]


def asked(folder: Path) -> list[str]:
    return [row["messages"][0]["content"] for row in read_jsonl(folder / "facts/test.jsonl")]


@pytest.mark.slow
def test_as_a_user_would_a_file_is_answered_as_in_evaluation_with_the_base_beside(folder: Path) -> None:
    command = [sys.executable, "scripts/chat.py", "results/runs/facts", "--file", "facts/test.jsonl", "--compare"]
    done = subprocess.run([*command, *LIMIT], cwd=folder, capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["prompt"] for row in told] == asked(folder)
    assert [row["answer"] for row in told] == generated(folder, "tuned")
    assert [row["base"] for row in told] == generated(folder, "base")
    assert generated(folder, "base") != generated(folder, "tuned")
    command = [sys.executable, "scripts/chat.py", "results/runs/none"]
    refused = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.endswith(
        "chat: error: results/runs/none: no run.json there; give the folder of a trained run, as results/runs/RUN\n"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_answers_are_those_of_the_cpu(folder: Path) -> None:
    command = [sys.executable, "scripts/chat.py", "results/runs/facts", "--file", "facts/test.jsonl", "--compare"]
    done = subprocess.run(
        [*command, *LIMIT, "--device", "cuda"], cwd=folder, capture_output=True, text=True, check=True
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["answer"] for row in told] == generated(folder, "tuned")
    assert [row["base"] for row in told] == generated(folder, "base")


def test_a_prompt_is_answered_and_nothing_else_is_printed(folder: Path, chat: Callable[..., str]) -> None:
    arguments = ("results/runs/facts", "--prompt", asked(folder)[0], *LIMIT)
    answer, base = generated(folder, "tuned")[0], generated(folder, "base")[0]
    assert chat(*arguments).strip() == answer.strip()
    assert chat(*arguments, "--compare").strip() == f"base:  {base}\ntuned: {answer}".strip()


class Terminal(io.StringIO):
    """A terminal that notes how many tokens were found when each piece of text arrived."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0
        self.pieces: list[tuple[int, str]] = []

    def write(self, text: str) -> int:
        self.pieces.append((self.found, text))
        return super().write(text)


def test_an_answer_is_written_while_it_grows(
    folder: Path, chat: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()

    def watched(network: Any, *job: Any) -> list[list[int]]:
        def count(*_: object) -> None:
            terminal.found += 1

        hook = network.get_base_model().register_forward_hook(count)
        terminal.found = 0
        written = greedy(network, *job)
        hook.remove()
        terminal.found = 0
        return written

    monkeypatch.setattr("chat.greedy", watched)
    monkeypatch.setattr(sys, "stdout", terminal)
    answers = generated(folder, "base")  # of more words than those of the run
    longest = max(range(len(answers)), key=lambda row: len(answers[row].split()))
    chat("results/runs/facts", "--prompt", asked(folder)[longest], "--compare", *LIMIT)
    pieces = terminal.pieces[: terminal.pieces.index((0, "tuned: "))]
    while_it_grew = [(found, text) for found, text in pieces if found]
    assert len({found for found, text in while_it_grew if text.strip()}) > 1, pieces
    assert "".join(text for _, text in while_it_grew).strip() == answers[longest].strip()


def test_a_file_of_lines_and_one_of_objects_are_answered_alike(folder: Path, chat: Callable[..., str]) -> None:
    (folder / "prompts.txt").write_text("\n\n".join(asked(folder)))
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps({'prompt': text})}\n" for text in asked(folder)))
    lines, objects = (chat("results/runs/facts", "--file", f"prompts.{ending}", *LIMIT) for ending in ("txt", "jsonl"))
    assert lines == objects
    assert [json.loads(line)["answer"] for line in lines.splitlines()] == generated(folder, "tuned")


def test_lines_are_answered_one_by_one_and_an_empty_line_begins_anew(folder: Path, chat: Callable[..., str]) -> None:
    first, second = asked(folder)[:2]
    told = chat("results/runs/facts", *LIMIT, said=f"{first}\n\n{second}\n")
    assert told.split() == " ".join(generated(folder, "tuned")[:2]).split()
    with_history = chat("results/runs/facts", *LIMIT, said=f"{first}\n{second}\n")
    assert with_history.split() != told.split()


def test_a_full_context_is_told_and_what_was_said_is_forgotten(
    folder: Path, chat: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = asked(folder)[:2]
    aside = io.StringIO()
    monkeypatch.setattr(sys, "stderr", aside)
    told = chat("results/runs/facts", *LIMIT, said=f"{first}\n{'long ' * 300}\n{second}\n")
    assert told.split() == " ".join(generated(folder, "tuned")[:2]).split()
    assert aside.getvalue().endswith(
        "tokens and fills the model's context of 256; shorten it (what was said before is forgotten)\n"
    )


def test_the_merged_model_answers_too(folder: Path, chat: Callable[..., str]) -> None:
    arguments = ("results/runs/facts", "--file", "facts/test.jsonl", *LIMIT, "--merged")
    making = ".venv/bin/snakemake --cores all results/runs/facts/merged"
    with pytest.raises(UserError, match=f"results/runs/facts/merged is not there; make it: {making}"):
        chat(*arguments)
    run, base = folder / "results/runs/facts", folder / "results/sources/models/tiny"
    merge_adapter(base, run / "adapter", run / "merged", EXACT, "sdpa", "cpu")
    told = [json.loads(line)["answer"] for line in chat(*arguments).splitlines()]
    same = sum(answer == wanted for answer, wanted in zip(told, generated(folder, "tuned"), strict=True))
    assert same >= len(told) / 2  # bfloat16 decides near ties otherwise
    shutil.copytree(run, folder / "results/runs/again")
    with (folder / "results/runs/again/adapter/adapter_config.json").open("a") as file:
        file.write("\n")
    again = "results/runs/again/merged"
    with pytest.raises(UserError) as caught:
        chat("results/runs/again", "--merged", "--configfile", "mine.yaml", "more.yaml")
    assert str(caught.value) == (
        f"{again}: of another adapter than the run has now; delete it and make it anew:"
        f" .venv/bin/snakemake --cores all {again} --configfile mine.yaml more.yaml"
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["results/runs/facts", "--base", "gone"],
            "gone: the base 'tiny' is not there; make it: .venv/bin/snakemake --cores all results/sources/models/tiny"
            " (with --configfile where the run is of an overlay)",
        ),
        (
            ["results/runs/facts", "--base", "gone", "--configfile", "mine.yaml"],
            "make it: .venv/bin/snakemake --cores all results/sources/models/tiny --configfile mine.yaml",
        ),
        (["results/runs/facts", "--file", "gone.txt"], "gone.txt: no such file of prompts"),
        (["results/runs/facts", "--base", "other"], "other: not the base that the run was trained on"),
        (["results/runs/facts", "--prompt", "long " * 300], "tokens and fills the model's context of 256; shorten it"),
    ],
)
def test_what_is_missing_is_named(folder: Path, chat: Callable[..., str], arguments: list[str], line: str) -> None:
    write_json(folder / "other/source.json", {"source": {}, "files": {}})
    with pytest.raises(UserError) as caught:
        chat(*arguments)
    assert line in str(caught.value)


ASKED = [("user", "one"), ("assistant", "two"), ("user", "three")]
TURNS = [{"role": role, "content": content} for role, content in [*ASKED, ("assistant", "four")]]
SHARED = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}, {"from": "human", "value": "three"}]


def asked_in(path: Path, text: str, system: str | None = None) -> list[list[tuple[str, str]]]:
    """Role and text of each message of the conversations in a file of prompts."""
    path.write_text(text, encoding="utf-8")
    return [[(turn["role"], turn["content"]) for turn in turns] for turns in conversations(path, system)]


@pytest.mark.parametrize("turns", [TURNS, TURNS[:-1], SHARED])
def test_messages_are_asked_up_to_their_last_question(turns: list[Any], tmp_path: Path) -> None:
    row = {"messages": turns}
    assert asked_in(tmp_path / "rows.jsonl", json.dumps(row)) == [ASKED]
    assert asked_in(tmp_path / "rows.json", json.dumps([row, {"prompt": "{x}"}])) == [ASKED, [("user", "{x}")]]
    of_all = json.dumps([{**row, "prompt": None}, {"messages": None, "prompt": "{x}"}])  # as Parquet has columns
    assert asked_in(tmp_path / "rows.json", of_all) == [ASKED, [("user", "{x}")]]


@pytest.mark.parametrize("name", ["rows.csv.txt", "rows"])
def test_another_kind_of_file_is_a_prompt_a_line(name: str, tmp_path: Path) -> None:
    assert asked_in(tmp_path / name, "prompt\none\n") == [[("user", "prompt")], [("user", "one")]]


def test_a_run_of_an_earlier_version_is_told(folder: Path, chat: Callable[..., str]) -> None:
    earlier = {
        name: value for name, value in read_json(folder / "results/runs/facts/run.json").items() if name != "prompt"
    }
    write_json(folder / "results/runs/earlier/run.json", earlier)
    with pytest.raises(UserError, match=r"earlier/run.json does not say how the run's prompts are rendered; train"):
        chat("results/runs/earlier")


def test_a_system_message_that_is_given_stands_before_all_prompts_of_a_file(tmp_path: Path) -> None:
    own = {"messages": [{"role": "system", "content": "Be rude."}, *TURNS]}
    rows = "".join(json.dumps(row) + "\n" for row in (own, {"messages": TURNS}, {"prompt": "one"}))
    given, kept = ("system", "Be short."), ("system", "Be rude.")
    assert asked_in(tmp_path / "rows.jsonl", rows, "Be short.") == [[given, *ASKED], [given, *ASKED], [given, ASKED[0]]]
    assert asked_in(tmp_path / "rows.jsonl", rows) == [[kept, *ASKED], ASKED, [ASKED[0]]]
    assert asked_in(tmp_path / "rows.txt", "one\n", "Be short.") == [[given, ASKED[0]]]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt"\n', ", line 2: not JSON (Expecting ':' delimiter at column 10)"),
        ("rows.jsonl", '{"messages": []}', ", row 1: has no prompt; mend it"),
        ("rows.jsonl", '{"messages": [{"role": "tool", "content": "a"}]}', ", row 1: holds a turn of a tool; mend it"),
        ("rows.jsonl", '{"prompt": ["a"]}', ", row 1, column 'prompt': holds a list, must be a text or a number"),
        ("rows.jsonl", '{"prompt": "a"}\n{"text": "b"}', ", row 2: neither 'prompt' nor 'messages' in it; add one"),
        ("rows.json", '{"prompt": "a"}', ": must hold a list of objects"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(name: str, text: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        asked_in(tmp_path / name, text)
    assert str(caught.value) == f"{tmp_path / name}{line}"


def test_lines_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UserError, match=r"prompts\.txt: not UTF-8; convert the file, e\.g\. with iconv"):
        list(conversations(tmp_path / "prompts.txt", None))
