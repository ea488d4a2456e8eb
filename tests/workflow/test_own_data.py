"""An experiment, and data of one's own, beside the published results."""

import json
import shutil
from pathlib import Path

import pytest
from repositories import Repository, remote_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("dvc")]


EXPERIMENT = """
name: mine
datasets:
  mine:
    source: {{path: {folder}, sha256: {sha256}}}
    files: {{train: train.jsonl, validation: validation.jsonl, test: test.jsonl}}
    prompt: "{{question}}"
    completion: "{{label}}"
    task: label
    licence: CC0-1.0
mixtures: {{examples: {{datasets: {{mine: {{}}}}}}}}
runs:
  - {{name: mine, model: tiny-llama, mixture: examples, recipe: brief, seed: 1}}
suites: {{held-out: {{datasets: [mine]}}}}
"""


def test_an_experiment_with_data_of_ones_own_leaves_the_published_results_alone(
    published: Repository, restored: Repository, tmp_path: Path
) -> None:
    from qlora.files import sha256_of

    copy, own = restored.copy(tmp_path / "copy"), tmp_path / "own"
    own.mkdir()
    for name, rows in (("train", range(60)), ("validation", range(60, 66)), ("test", range(66, 72))):
        lines = [json.dumps({"question": f"Is {row} even?", "label": "odd" if row % 2 else "even"}) for row in rows]
        (own / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(EXPERIMENT.format(folder=own, sha256=sha256_of(own)))
    remote = shutil.copytree(remote_of(published), tmp_path / "remote")
    copy.set_remote(str(remote))
    before, lock = copy.bytes_of(), copy.read("dvc.lock")
    kept = {path for path in remote.rglob("*") if path.is_file()}
    copy.snakemake("--cores", "2", configs=(str(overlay),))
    assert (copy.folder / "results/experiments/mine/runs/mine/adapter").is_dir()
    after = copy.bytes_of()
    assert {name: after[name] for name in before} == before
    assert copy.read("dvc.lock") == lock
    assert copy.run("git", "status", "--short") == ""
    assert copy.jobs() == set()
    assert copy.tool("record").startswith("Recorded ")
    assert copy.read("dvc.lock") == lock
    assert {path for path in remote.rglob("*") if path.is_file()} == kept
    assert "up to date" in copy.dvc("status")
    assert "nothing to do" in copy.tool("restore")
    assert copy.bytes_of() == after
