"""What a user's mistake looks like: one clear line, a non-zero exit, nothing half-written."""

import pytest
from workspaces import Workspace

from qlora.files import sha256_of


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


def test_an_empty_dataset_is_one_line(workspace: Workspace) -> None:
    workspace.write("data/examples/sql/train.jsonl", "")
    digest = sha256_of(workspace.folder / "data/examples/sql")
    workspace.write("overlay.yaml", f"datasets: {{sql: {{source: {{sha256: {digest}}}}}}}")
    shown = workspace.snakemake("--cores", "1", "results/datasets/sql", configs=("overlay.yaml",), expect=1).stdout
    assert "format: error:" in shown
    assert "train.jsonl: has no rows" in shown
    assert not (workspace.folder / "results/datasets/sql").exists()
