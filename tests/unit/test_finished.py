"""Finished runs are kept whole, taken whole or not at all, and not more of them than asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from qlora.files import write_json
from qlora.finished import keep, take, trim


def outputs_in(folder: Path) -> dict[str, Path]:
    return {"adapter": folder / "adapter", "record": folder / "run.json"}


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Path]:
    outputs = outputs_in(tmp_path / "made")
    outputs["adapter"].mkdir(parents=True)
    (outputs["adapter"] / "weights").write_bytes(b"weights")
    outputs["record"].write_text("{}")
    return outputs


def test_what_is_kept_is_taken_with_the_same_bytes(tmp_path: Path, made: dict[str, Path]) -> None:
    entry, places = tmp_path / "finished/key", outputs_in(tmp_path / "other")
    assert not take(entry, places)
    assert not places["adapter"].exists()
    keep(entry, made)
    assert take(entry, places)
    assert (places["adapter"] / "weights").read_bytes() == b"weights"
    assert places["record"].read_text() == "{}"


@pytest.mark.parametrize("damage", ["flip", "lose", "add"])
def test_a_damaged_entry_is_named_removed_and_never_taken(
    tmp_path: Path, made: dict[str, Path], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    entry, places = tmp_path / "finished/key", outputs_in(tmp_path / "other")
    keep(entry, made)
    if damage == "flip":
        (entry / "adapter/weights").write_bytes(b"weightz")
    elif damage == "lose":
        (entry / "record").unlink()
    else:
        (entry / "adapter/more").touch()
    assert not take(entry, places)
    assert not entry.exists()
    assert not places["adapter"].exists()
    assert f"{entry} is damaged" in caplog.text


def test_those_unused_for_longest_go_first(tmp_path: Path, made: dict[str, Path]) -> None:
    folder = tmp_path / "finished"
    for age, name in enumerate("abc"):
        keep(folder / name, made)
        os.utime(folder / name, (100 - age, 100 - age))
    take(folder / "c", outputs_in(tmp_path / "other"))
    assert trim(folder, 2) == [folder / "b"]
    assert sorted(path.name for path in folder.iterdir()) == ["a", "c"]
    assert trim(tmp_path / "none", 2) == []


def test_the_cache_is_cleaned_by_one_command_that_leaves_results(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parents[2] / "Makefile", tmp_path)
    for name in ("finished/a/run.json", "checkpoints/a/state", "runs/llama/run.json"):
        write_json(tmp_path / "results" / name, {})
    subprocess.run(["make", "clean-cache"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["runs"]
