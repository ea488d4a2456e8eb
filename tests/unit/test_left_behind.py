"""DVC's list of who is at work, as a killed DVC leaves it, and as one that lives does."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc.lock import make_lock
from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

from left_behind import AT_WORK, GUARD, drop_dead_list
from qlora.errors import UserError

HALF = ["", '{"write": {"/home/me/results/sour']


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Where DVC's list is, below a folder that has one of DVC's."""
    assert (AT_WORK.name, GUARD.name) == (RWLOCK_FILE, RWLOCK_LOCK)
    (tmp_path / AT_WORK).parent.mkdir(parents=True)
    return tmp_path / AT_WORK


@pytest.fixture
def living() -> Iterator[int]:
    """The number of a process that was started as `dvc commit --force results/runs` is."""
    command = [sys.executable, "-c", "input()", "commit", "--force", "results/runs"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as running:
        yield running.pid


def entries(pid: int, command: str = "/env/dvc/__main__.py commit --force results/runs") -> str:
    info = {"pid": pid, "cmd": command}
    return json.dumps({"write": {"/home/me/results/runs": info}, "read": {"/home/me/scripts": [info]}})


@pytest.mark.parametrize("text", HALF)
def test_a_half_written_list_goes(tmp_path: Path, listed: Path, text: str) -> None:
    listed.write_text(text)
    drop_dead_list(tmp_path)
    assert not listed.exists()


@pytest.mark.parametrize("text", HALF)
def test_a_list_that_a_living_dvc_is_writing_stays(tmp_path: Path, listed: Path, text: str) -> None:
    listed.write_text(text)
    told = rf"process {os.getpid()} \(.*\) is at work here and holds .*rwlock.lock"
    with make_lock(str(tmp_path / GUARD)), pytest.raises(UserError, match=told):
        drop_dead_list(tmp_path)
    assert listed.read_text() == text


def test_a_list_that_was_whole_when_its_writer_let_go_stays(
    tmp_path: Path, listed: Path, living: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_of_the_writer(guard: Path) -> Path:
        listed.write_text(entries(living))
        return guard

    listed.write_text("")
    monkeypatch.setattr("left_behind.locked", lambda guard: end_of_the_writer(guard).open("a"))
    drop_dead_list(tmp_path)
    assert listed.read_text() == entries(living)


@pytest.mark.parametrize("text", ["{}", '{"write": {}, "read": {}}'])
def test_no_list_and_a_list_of_nobody_are_left_alone(tmp_path: Path, listed: Path, text: str) -> None:
    drop_dead_list(tmp_path)
    listed.write_text(text)
    drop_dead_list(tmp_path)
    assert listed.read_text() == text
    assert not (tmp_path / GUARD).exists()


def test_a_list_that_names_a_living_dvc_stays(tmp_path: Path, listed: Path, living: int) -> None:
    listed.write_text(entries(living))
    drop_dead_list(tmp_path)
    assert listed.read_text() == entries(living)


def test_a_list_whose_process_is_gone_or_is_another_one_now_goes(tmp_path: Path, listed: Path, living: int) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for text in (entries(ended.pid), entries(living, "/env/bin/dvc repro")):
        listed.write_text(text)
        drop_dead_list(tmp_path)
        assert not listed.exists()
