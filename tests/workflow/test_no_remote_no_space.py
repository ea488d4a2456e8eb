"""No remote, one that cannot be reached, a full disk: a clear line, and nothing half-done is used."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repositories import Repository, remote_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("dvc")]
# A disk that others do not see, and that needs no root; the small results that git has are brought back onto it.
SMALL_DISK = "mount -t tmpfs -o size={size}k tmpfs {place} && {first} && exec {python} tools/{tool}.py"


def test_without_a_remote_the_way_is_make_reproduce(published: Repository, tmp_path: Path) -> None:
    clone = published.clone(tmp_path / "clone")
    shown = clone.tool("restore", expect=1)
    assert "no DVC remote is configured: make reproduce computes the results anew" in shown


def test_an_unreachable_remote_is_one_line(published: Repository, tmp_path: Path) -> None:
    clone = published.clone(tmp_path / "clone")
    clone.set_remote("http://127.0.0.1:9/nothing")
    shown = clone.tool("restore", expect=1)
    assert (
        "results/sources is missing: DVC got it neither from its cache nor from 'far', or it cannot be reached" in shown
    )
    copy = published.copy(tmp_path / "copy")
    copy.set_remote(str(tmp_path / "a file"))
    copy.write("../a file", "")
    assert "recorded here, but not in the remote 'far'" in copy.tool("record", expect=1)


def on_small_disk(repository: Repository, place: str, tool: str) -> str:
    """The line of a tool that fails since the folder `place` is a disk too small, which others do not see."""
    (repository.folder / place).mkdir(parents=True, exist_ok=True)
    first = "git checkout --quiet -- results" if place == "results" else "true"
    size = 250 if place == "results" else 100
    command = SMALL_DISK.format(place=place, first=first, size=size, python=sys.executable, tool=tool)
    shown = repository.run("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", command, expect=1)
    return shown.strip()


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
    reason="no file system of one's own can be mounted here",
)
def test_a_full_disk_is_one_line_and_nothing_is_used(published: Repository, tmp_path: Path) -> None:
    full = "no space left on the disk"
    clone = published.clone(tmp_path / "clone", remote_of(published))
    assert full in on_small_disk(clone, ".dvc/cache", "restore")
    assert full in on_small_disk(clone, "results", "restore")
    assert "nothing to do" in clone.tool("restore")
    shutil.rmtree(clone.folder / ".dvc/cache")
    lock = clone.read("dvc.lock")
    assert full in on_small_disk(clone, ".dvc/cache", "record")
    assert clone.read("dvc.lock") == lock
    assert clone.jobs() == set()
