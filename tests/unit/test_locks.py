"""Who works on the results has them alone, or beside others who only read the plan; and is named to who comes later."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import qlora.locks
from qlora.errors import UserError
from qlora.locks import locked

SCRIPTS = Path(__file__).parents[2] / "scripts"
HOLDER = """
import os, signal, subprocess, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from qlora.locks import locked
with locked(Path(sys.argv[2])):
    child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, close_fds=False)
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_one_alone_or_several_together(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lock"
    told = rf"^process {os.getpid()} \(.*\) is at work here and holds {path}: wait"
    with locked(path, shared=True), locked(path, shared=True), pytest.raises(UserError, match=told):
        locked(path)
    with locked(path), pytest.raises(UserError, match=f"process {os.getpid()} "):
        locked(path, shared=True)
    locked(path).close()


def test_a_holder_that_ends_while_it_is_looked_for_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    holder = locked(path)
    looked: list[Path] = []

    def ended(path: Path) -> None:
        looked.append(path)
        if len(looked) == 2:
            holder.close()

    monkeypatch.setattr("qlora.locks._holder", ended)
    locked(path).close()
    assert len(looked) == 2
    with locked(path), pytest.raises(UserError, match="another user or machine is at work here"):
        locked(path)


def test_a_killed_holder_lets_go_and_its_living_child_does_not(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(SCRIPTS), str(path)]
    child = int(subprocess.run(command, stdout=subprocess.PIPE).stdout)
    with pytest.raises(UserError, match=rf"^process {child} \(60\) is at work here"):
        locked(path)
    os.kill(child, signal.SIGKILL)
    while Path(f"/proc/{child}/fd").exists() and any(Path(f"/proc/{child}/fd").iterdir()):
        pass
    locked(path).close()


def test_a_holder_without_a_command_is_ending_just_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    holder = locked(path)

    def command() -> list[str]:
        holder.close()
        return []

    ending = SimpleNamespace(pid=1, open_files=lambda: [SimpleNamespace(path=str(path))], cmdline=command)
    monkeypatch.setattr(qlora.locks.psutil, "process_iter", lambda: [ending])
    locked(path).close()


def test_who_cannot_be_seen_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    monkeypatch.setattr(qlora.locks.psutil, "process_iter", lambda: [])
    with locked(path), pytest.raises(UserError, match="another user or machine is at work here"):
        locked(path)


@pytest.mark.parametrize(("number", "goes_on"), [(errno.ENOLCK, True), (errno.EIO, False)])
def test_a_file_system_without_locks_holds_nobody_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, goes_on: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if goes_on:
        locked(tmp_path / "lock").close()
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            locked(tmp_path / "lock")


def test_the_shared_lock_wants_no_right_to_write(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", shared=True) as file:
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
