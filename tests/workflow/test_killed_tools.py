"""`make record` and `make restore` killed in the middle: run again, they complete, and nothing is lost."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest
from repositories import PLAIN, Repository, remote_of, started, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("dvc")]


KILLED = {"with all that it started": os.killpg, "alone": os.kill}
MOMENTS: dict[str, str] = {  # a file that is there at the moment
    "while it fetches": ".dvc/cache/files/md5/*/*",
    "before it checks out": ".snakemake/restoring",
    "while it checks out": "results/*/*",
    "while it lets Snakemake agree": ".snakemake/metadata/*",
}


def again(repository: Repository, tool: str) -> str:
    """What a tool says that is run until no process is left of the killed one; until then it must say which is."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        command = [sys.executable, f"tools/{tool}.py"]
        done = subprocess.run(
            command, cwd=repository.folder, env={**os.environ, **PLAIN}, capture_output=True, text=True
        )
        if not done.returncode:
            return done.stdout
        assert re.search(r"error: process \d+ \(-m (dvc|snakemake) .*\) is at work here", done.stderr), done.stderr
        time.sleep(0.2)
    raise AssertionError("what a killed tool had started did not end")


@pytest.mark.parametrize("whom", KILLED)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_restore_is_not_used_and_completes_when_run_again(
    published: Repository, tmp_path: Path, moment: str, whom: str
) -> None:
    clone = published.clone(tmp_path / "clone", remote_of(published))
    tracked = {path for path in clone.folder.glob("results/*") if path.is_file()}
    running = started(clone, "restore")
    wait_until(lambda: bool(set(clone.folder.glob(MOMENTS[moment])) - tracked), running)
    KILLED[whom](running.pid, signal.SIGKILL)
    running.wait()
    if (clone.folder / ".snakemake/restoring").exists():
        assert re.search(r"run it again|\(-m (dvc|snakemake)", clone.snakemake("-n", configs=(), expect=1).stdout)
    else:
        assert not list(clone.folder.glob("results/*/*"))
    assert "nothing to do" in again(clone, "restore")
    assert clone.bytes_of() == published.bytes_of()


NOTE = ".snakemake/metadata/" + urlsafe_b64encode(b"results/experiments/other/metrics.csv").decode()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (".dvc/tmp/rwlock", ""),
        (".dvc/tmp/rwlock", '{"write": {"/home/me/results/sour'),
        ("dvc.lock", "schema: '2.0'\nstages:\n"),
        (
            "dvc.lock",
            "schema: '2.0'\nstages:\n  download:\n    cmd: x\n    outs:\n    - path: results/sources\n      hash: m",
        ),
        (NOTE, ""),
        (NOTE, '{"rule": "coll'),
    ],
)
def test_what_a_kill_left_half_written_is_in_nobodys_way(
    published: Repository, tmp_path: Path, name: str, text: str
) -> None:
    copy = published.copy(tmp_path / "copy")
    copy.write(name, text)
    assert copy.tool("record").startswith("Recorded ")
    assert copy.run("git", "status", "--short") == ""
    copy.write(name, text)
    if name == "dvc.lock":
        assert "error: dvc.lock differs from the commit: commit it" in copy.tool("restore", expect=1)
        copy.run("git", "checkout", "--quiet", name)
    assert "nothing to do" in copy.tool("restore")
    assert copy.bytes_of() == published.bytes_of()
    assert copy.jobs() == set()


@pytest.mark.parametrize("whom", KILLED)
@pytest.mark.parametrize("moment", [".dvc/cache/files/md5/*/*", ".dvc/tmp/rwlock", "dvc.lock"])
def test_a_killed_record_loses_nothing_and_completes_when_run_again(
    published: Repository, tmp_path: Path, moment: str, whom: str
) -> None:
    copy = published.copy(tmp_path / "copy")
    shutil.rmtree(copy.folder / ".dvc/cache")
    shutil.rmtree(copy.folder / ".dvc/tmp")
    locks = [copy.read(name) for name in ("dvc.lock", "results/lock.json")]
    (copy.folder / "dvc.lock").unlink()
    running = started(copy, "record")
    wait_until(lambda: bool(list(copy.folder.glob(moment))), running)
    KILLED[whom](running.pid, signal.SIGKILL)
    running.wait()
    assert again(copy, "record").startswith("Recorded ")
    assert [copy.read(name) for name in ("dvc.lock", "results/lock.json")] == locks
    assert copy.bytes_of() == published.bytes_of()
    assert copy.jobs() == set()
    assert copy.run("git", "status", "--short") == ""
