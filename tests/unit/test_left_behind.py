"""DVC's list of who is at work, as a killed DVC leaves it, and as one that lives does."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc.lock import LockBase, make_lock
from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

from left_behind import AT_WORK, GUARD, drop_dead_list
from qlora.errors import UserError

HALF = ["", '{"write": {"/home/me/results/sour']
OTHER = ["[]", '"write"', '{"write": {"/home/me/results/runs": {"pid": 1}}}', '{"write": {}, "read": {"/home/me": 1}}']


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


@pytest.fixture(params=[False, True], ids=["flock", "hardlink"])
def guard(tmp_path: Path, listed: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LockBase:
    """The guard of the list as DVC takes it, which waits for nobody, for either of DVC's `core.hardlink_lock`."""
    monkeypatch.setattr("dvc.lock.DEFAULT_TIMEOUT", 0)
    (tmp_path / ".dvc/config").write_text(f"[core]\nhardlink_lock = {request.param}\n")
    return make_lock(str(tmp_path / GUARD), tmp_dir=str(listed.parent), hardlink_lock=request.param)


@pytest.mark.parametrize("text", HALF + OTHER)
def test_a_list_that_dvc_cannot_read_goes(tmp_path: Path, listed: Path, text: str) -> None:
    listed.write_text(text)
    drop_dead_list(tmp_path)
    assert not listed.exists()


@pytest.mark.parametrize("text", HALF)
def test_a_list_that_a_living_dvc_is_writing_stays(tmp_path: Path, listed: Path, guard: LockBase, text: str) -> None:
    listed.write_text(text)
    told = r"a DVC is at work here and holds .*rwlock\.lock: wait for its end, or remove the file where none runs$"
    with guard, pytest.raises(UserError, match=told):
        drop_dead_list(tmp_path)
    assert listed.read_text() == text


def test_dvc_can_write_its_list_after_a_dead_one_went(tmp_path: Path, listed: Path, guard: LockBase) -> None:
    listed.write_text("")
    drop_dead_list(tmp_path)
    assert not listed.exists()
    with guard:
        assert guard.is_locked


def test_a_config_that_dvc_cannot_read_is_told(tmp_path: Path, listed: Path) -> None:
    listed.write_text("")
    (tmp_path / ".dvc/config").write_text("[core]\nhardlink_lock = perhaps\n")
    with pytest.raises(UserError, match=r"^dvc: config file error: expected true or false"):
        drop_dead_list(tmp_path)


def test_a_list_that_was_whole_when_its_writer_let_go_stays(
    tmp_path: Path, listed: Path, living: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waited(*place: str, **how: object) -> LockBase:
        listed.write_text(entries(living))
        return make_lock(*place, **how)

    listed.write_text("")
    monkeypatch.setattr("left_behind.make_lock", waited)
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


def test_a_list_of_a_living_dvc_that_was_given_as_code_stays(tmp_path: Path, listed: Path, living: int) -> None:
    listed.write_text(entries(living, "-c"))
    drop_dead_list(tmp_path)
    assert listed.read_text() == entries(living, "-c")


def test_a_list_whose_process_is_gone_or_is_another_one_now_goes(tmp_path: Path, listed: Path, living: int) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for text in (entries(ended.pid), entries(ended.pid, "-c"), entries(living, "/env/bin/dvc repro")):
        listed.write_text(text)
        drop_dead_list(tmp_path)
        assert not listed.exists()
