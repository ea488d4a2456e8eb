"""Two at work in one folder: the second says who the first is, and nothing is damaged."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from repositories import Repository, remote_of, started, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("dvc")]


def refusal(running: subprocess.Popen[str], command: str, folder: Path) -> str:
    return (
        f"process {running.pid} ({command}) is at work here and holds {folder}.snakemake/results.lock: wait for its end"
    )


@contextmanager
def paused(running: subprocess.Popen[str]) -> Iterator[None]:
    """Hold up a tool and all that it started, so that it does not end before another one has looked."""
    os.killpg(running.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(running.pid, signal.SIGCONT)


def test_beside_a_restore_neither_a_tool_nor_snakemake_runs(published: Repository, tmp_path: Path) -> None:
    clone = published.clone(tmp_path / "clone", remote_of(published))
    running = started(clone, "restore")
    wait_until((clone.folder / ".snakemake/restoring").exists, running)
    told = refusal(running, "tools/restore.py", clone.folder / "_").replace("_.", ".")
    with paused(running):
        assert clone.tool("restore", expect=1) == f"make restore: error: {told}"
        assert clone.tool("record", expect=1) == f"make record: error: {told}"
        shown = clone.snakemake("-n", configs=(), expect=1).stdout
    assert f"process {running.pid} (tools/restore.py) is at work here" in shown
    assert "nothing to do" in running.communicate(timeout=120)[0]
    assert clone.jobs() == set()
    assert clone.bytes_of() == published.bytes_of()


def test_beside_a_record_snakemake_does_not_run(published: Repository, tmp_path: Path) -> None:
    copy = published.copy(tmp_path / "copy")
    shutil.rmtree(copy.folder / ".dvc/cache")
    running = started(copy, "record")
    wait_until((copy.folder / ".dvc/cache").exists, running)
    with paused(running):
        shown = copy.snakemake("--cores", "1", configs=(), expect=1).stdout
    assert f"process {running.pid} (tools/record.py) is at work here" in shown
    assert running.communicate(timeout=120)[0].startswith("Recorded ")
    assert copy.jobs() == set()


def test_beside_a_snakemake_no_tool_runs(published: Repository, tmp_path: Path) -> None:
    copy = published.copy(tmp_path / "copy")
    command = copy.command("--cores", "1", "--forcerun", "collect", configs=())
    running = subprocess.Popen(
        command, cwd=copy.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    wait_until(lambda: any(copy.folder.glob(".snakemake/locks/*")), running)
    for tool in ("record", "restore"):
        shown = copy.tool(tool, expect=1)
        assert shown.startswith(
            f"make {tool}: error: process {running.pid} (-m snakemake --cores 1 --forcerun collect)"
        )
    assert copy.jobs() == set()  # a dry run takes nothing from it
    assert running.wait(timeout=120) == 0
    assert copy.tool("record").startswith("Recorded ")


def test_what_a_killed_snakemake_left_locked_is_looked_at_first(published: Repository, tmp_path: Path) -> None:
    copy = published.copy(tmp_path / "copy")
    copy.write(".snakemake/locks/0.output.lock", "results/metrics.csv\n")
    assert "a snakemake was killed here: see that no job of it still runs" in copy.tool("record", expect=1)
    copy.snakemake("--unlock", configs=())
    assert copy.tool("record").startswith("Recorded ")
