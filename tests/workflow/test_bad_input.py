"""What a user's mistake looks like: one clear line, a non-zero exit, nothing half-written."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from workspaces import ROOT, Workspace


@pytest.mark.parametrize(
    ("overlay", "line"),
    [
        (
            "recipes: {tiny: {learning_rat: 1}}",
            "config: recipes.tiny: unknown key 'learning_rat'; did you mean 'learning_rate'?",
        ),
        (
            "runs: [{name: a, model: tiny-lama, mixture: examples, recipe: tiny}]",
            "run 'a' names the unknown model 'tiny-lama'; did you mean 'tiny-llama'?",
        ),
        (
            "datasets: {sql: {source: {path: data/nowhere}}}",
            "config: datasets.sql.source.path: data/nowhere does not exist",
        ),
    ],
)
def test_a_mistake_in_the_config_is_one_line(workspace: Workspace, overlay: str, line: str) -> None:
    workspace.write("overlay.yaml", overlay)
    shown = workspace.snakemake("-n", configs=("overlay.yaml",), expect=1).stdout
    assert line in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("overlay", "line"),
    [
        (
            'datasets: {sql: {source: {sha256: "' + "0" * 64 + '"}}}',
            "download_dataset: error: datasets.sql: the SHA-256 of data/examples/sql is ",
        ),
        ('datasets: {sql: {prompt: "{shema}"}}', "format: error: train.jsonl, row 1: has no column 'shema'"),
    ],
)
def test_bad_data_is_one_line_and_leaves_no_output(workspace: Workspace, overlay: str, line: str) -> None:
    workspace.write("overlay.yaml", overlay)
    shown = workspace.snakemake("--cores", "1", "results/datasets/sql", configs=("overlay.yaml",), expect=1).stdout
    assert line in shown
    assert "Traceback" not in shown
    assert not (workspace.folder / "results/datasets/sql").exists()
    assert not list((workspace.folder / "results").rglob(".*.*/"))


SETTINGS = {
    "source": {"path": "rows"},
    "files": {"train": "train.*"},
    "prompt": "{text}",
    "completion": "{label}",
    "task": "label",
    "labels": ["card", "cash"],
    "holdout": {"validation": 0, "test": 0},
    "limit": {},
    "unusable_rows": "refuse",
    "licence": "MIT",
}
GOOD = b'{"text": "Where is it?", "label": "card"}\n'
BAD_ROWS = {
    "missing column": (".jsonl", b'{"text": "a"}', "train.jsonl, row 2: has no column 'label'; it has text"),
    "missing column of a CSV": (
        ".csv",
        b"text;label\na;card\n",
        "train.csv, row 1: has no column 'text'; it has text;label",
    ),
    "wrong type": (
        ".jsonl",
        b'{"text": ["a"], "label": "card"}',
        "train.jsonl, row 2, column 'text': holds a list, must be a text or a number",
    ),
    "empty file": (".csv", b"", "rows/train.csv: has no rows"),
    "header alone": (".csv", b"text,label\n", "rows/train.csv: has no rows"),
    "broken line": (
        ".jsonl",
        b'{"text": "a"',
        "rows/train.jsonl, line 2: not JSON (Expecting ',' delimiter at column 13)",
    ),
    "invalid UTF-8": (
        ".jsonl",
        b'{"text": "caf\xe9", "label": "card"}',
        "rows/train.jsonl, line 2, byte 14: not UTF-8; convert the file, e.g. with iconv",
    ),
    "NUL byte": (
        ".csv",
        b"text,label\na,card\nb\0,card\n",
        "train.csv, row 2, column 'text': holds '\\x00', which no text may hold; remove it",
    ),
    "escaped NUL": (
        ".jsonl",
        b'{"text": "a\\u0000", "label": "card"}',
        "train.jsonl, row 2, column 'text': holds '\\x00', which no text may hold; remove it",
    ),
    "label outside the set": (
        ".jsonl",
        b'{"text": "a", "label": "crad"}',
        "train.jsonl, row 2, column 'label': the label 'crad' is not declared in 'labels'; the nearest is 'card'",
    ),
    "empty answer": (
        ".jsonl",
        b'{"text": "a", "label": " "}',
        "train.jsonl, row 2, column 'label': empty answer; mend the row, or set datasets.mine.unusable_rows: drop, "
        "which leaves such rows out and counts them",
    ),
}


@pytest.mark.parametrize(("kind", "content", "line"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_one_line_a_failure_and_no_output(tmp_path: Path, kind: str, content: bytes, line: str) -> None:
    """The stage in a process of its own, as Snakemake runs it, without the seconds that Snakemake itself takes."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / f"train{kind}").write_bytes((GOOD if kind == ".jsonl" else b"") + content)
    options = {"source": "rows", "dataset": "out/mine", "name": "mine", "settings": yaml.safe_dump(SETTINGS)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "format_dataset.py"), *(f"--{key}={options[key]}" for key in options)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == f"format_dataset: error: {line}\n"
    assert not list((tmp_path / "out").glob("**/*"))
