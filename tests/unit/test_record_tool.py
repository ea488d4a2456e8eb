"""What `make record` and `make restore` refuse, and what they read out of DVC's and Snakemake's words."""

import json
import os
import resource
import subprocess
import sys
from base64 import urlsafe_b64encode
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import UserError
from qlora.files import sha256_of_file
from record import ROOT, anew, changed_files, changed_since, record
from recorded import (
    NO_SPACE,
    Out,
    Planned,
    alone,
    files_of_outs,
    job_hash,
    job_records,
    md5_of,
    not_in_cache,
    read_plan,
    recorded_outs,
    why_failed,
)
from restore import dirty, lost, not_recorded, other_bytes
from results_lock import read_lock

PLAN = """Building DAG of jobs...
Job stats:
job      count
-----  -------
train        1
all          1
total        2


[Sat Nov 21 03:55:13 2026]
Job 1: train llama
Reason: Params have changed since last execution
[Sat Nov 21 03:55:13 2026]
Job 0: all done
"""


def noted(root: Path, path: str, **more: Any) -> dict[str, Any]:
    """Write an output and Snakemake's note about its job."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(path)
    record = {"params": ["1"], "input": [], "input_checksums": {}, "endtime": (root / path).stat().st_mtime, **more}
    note = root / ".snakemake/metadata" / urlsafe_b64encode(path.encode()).decode()
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(record))
    return record


def kept(root: Path, content: bytes) -> str:
    """Put a content into DVC's cache; its MD5."""
    scratch = root / "scratch"
    scratch.write_bytes(content)
    md5 = md5_of(scratch)
    place = root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch.rename(place)
    return md5


def test_a_plan_is_its_jobs_and_the_first_with_its_reason():
    assert read_plan("...\nNothing to be done (all requested files are present and up to date).\n") == Planned(0, None)
    assert read_plan(PLAN) == Planned(1, "train llama (Params have changed since last execution)")


def test_a_failure_is_told_in_one_line():
    assert why_failed("dvc", "x\nERROR: failed to push - No space left on device\n") == NO_SPACE
    assert why_failed("dvc", "working\nERROR: no such remote\nHaving any troubles?\n") == "dvc: no such remote"
    assert why_failed("snakemake", "\nWorkflowError in x\n") == "snakemake: WorkflowError in x"
    assert (
        why_failed("dvc", "ERROR: busy, blocked by:\n  (PID 7): dvc repro\n")
        == "dvc: busy, blocked by: (PID 7): dvc repro"
    )
    assert why_failed("dvc", "") == "dvc: it failed without a word"


def test_what_a_killed_snakemake_left_locked_is_told(tmp_path):
    alone(tmp_path).close()
    (tmp_path / ".snakemake/locks").mkdir(parents=True)
    (tmp_path / ".snakemake/locks/0.input.lock").touch()
    with pytest.raises(UserError, match="snakemake --unlock"):
        alone(tmp_path)


def test_what_a_cut_off_restore_left_is_not_recorded(tmp_path):
    for name in ("results/metrics.csv", ".snakemake/restoring"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="make restore was cut off here: run it again"):
        record(tmp_path)


def test_outputs_as_their_jobs_wrote_them_are_not_refused(tmp_path):
    noted(tmp_path, "results/a")
    noted(tmp_path, "results/b", input_checksums={"results/a": f"sha256:{sha256_of_file(tmp_path / 'results/a')}"})
    assert changed_files(tmp_path, [], job_records(tmp_path)) is None


def test_an_output_that_is_newer_than_its_job_is_named(tmp_path):
    noted(tmp_path, "results/a", endtime=1.0)
    assert changed_files(tmp_path, [], job_records(tmp_path)) == "results/a was modified after its job wrote it"


def test_an_output_with_other_bytes_than_were_read_is_named(tmp_path):
    noted(tmp_path, "results/a")
    noted(tmp_path, "results/b", input_checksums={"results/a": "sha256:00"})
    assert (
        changed_files(tmp_path, [], job_records(tmp_path))
        == "results/a is not what it was when results/b was made of it"
    )


@pytest.mark.parametrize(
    ("record", "about", "file"),
    [
        ("results/sources/models/m/source.json", {"files": {"w": {"sha256": "00"}}}, "results/sources/models/m/w"),
        ("results/tokens/m/x/card.json", {"sha256": {"w": "00"}}, "results/tokens/m/x/w"),
        ("results/runs/r/run.json", {"adapter": {"w": "00"}}, "results/runs/r/adapter/w"),
    ],
)
def test_a_file_with_another_hash_than_the_results_note_is_named(tmp_path, record, about, file):
    for path, text in ((record, json.dumps(about)), (file, "other")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert changed_files(tmp_path, [], {}) is None  # not the default's
    assert changed_files(tmp_path, [str(Path(record).parent), record], {}) == f"{file} is not what its job wrote"


def test_what_differs_from_an_equal_record_is_named_and_another_machine_is_none():
    before = {"decided by": "1", "hardware": {}, "files": {"train": {"a": "0"}}}
    now = {**before, "files": {"train": {"a": "1"}}}
    assert "train" in changed_since(before, now)
    assert changed_since({}, now) is None
    assert changed_since(before, {**now, "hardware": {"a": "another"}}) is None
    assert changed_since(before, {**now, "decided by": "2"}) is None


@pytest.mark.parametrize("failure", [UserError("a full disk"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [None, b"stages: {a"])
def test_dvc_lock_is_written_anew_and_stays_where_that_fails(tmp_path, before, failure):
    path = tmp_path / "dvc.lock"
    if before is not None:
        path.write_bytes(before)
    with suppress(UserError, KeyboardInterrupt), anew(path):
        assert not path.exists()
        path.write_text("half")
        raise failure
    assert path.read_bytes() == (before or b"half")
    with anew(path):
        path.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def full_disk():
    """No byte can be written meanwhile; not until the test ends, since pytest may write into a file itself."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_dvc_lock_comes_back_where_nothing_can_be_written(tmp_path):
    path = tmp_path / "dvc.lock"
    path.write_text("old")
    with full_disk(), suppress(UserError), anew(path):
        raise UserError(NO_SPACE)
    assert path.read_text() == "old"


KILLED = """
import os, sys
from pathlib import Path
from record import anew
path = Path(sys.argv[1])
with anew(path):
    if len(sys.argv) > 2:
        path.write_text(sys.argv[2])
    os._exit(9)
"""


@pytest.mark.parametrize("written", [[], ["half"]])
def test_dvc_lock_comes_back_after_a_kill(tmp_path, written):
    path = tmp_path / "dvc.lock"
    path.write_text("old")
    command = [sys.executable, "-c", KILLED, str(path), *written]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    for _ in range(2):  # killed twice, and nothing is lost
        assert subprocess.run(command, env=environment, check=False).returncode == 9
        (aside,) = set(tmp_path.iterdir()) - {path}
    with suppress(UserError), anew(path):
        raise UserError("it failed, too")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert subprocess.run(["git", "check-ignore", "-q", aside.name], cwd=ROOT, check=False).returncode == 0


DVC_LOCK = """schema: '2.0'
stages:
  train:
    cmd: make it
    outs:
    - path: results/runs
      hash: md5
      md5: 1.dir
      size: 12
"""


def test_of_a_dvc_lock_cut_off_anywhere_nothing_is_read_that_is_not_there(tmp_path):
    (tmp_path / "dvc.yaml").write_text("stages: {}")
    assert recorded_outs(tmp_path) == {}
    for end in range(len(DVC_LOCK)):
        (tmp_path / "dvc.lock").write_text(DVC_LOCK[:end])
        with suppress(UserError):
            assert set(recorded_outs(tmp_path)) <= {"results/runs"}
    (tmp_path / "dvc.lock").write_text(DVC_LOCK[: DVC_LOCK.index("md5: ")])
    with pytest.raises(
        UserError, match=r"dvc\.lock is not whole: take it back with git, or make record writes it anew"
    ):
        recorded_outs(tmp_path)
    (tmp_path / "dvc.lock").write_text(DVC_LOCK)
    assert recorded_outs(tmp_path) == {"results/runs": Out("1.dir", True)}


def test_a_lock_that_is_not_json_is_told_with_its_line(tmp_path):
    assert read_lock(tmp_path) == {}
    (tmp_path / "results").mkdir()
    (tmp_path / "results/lock.json").write_text('{"outs": {},\n<<<<<<< HEAD\n')
    with pytest.raises(UserError, match=r"results/lock\.json, line 2: not JSON; take the file back with git"):
        read_lock(tmp_path)


@pytest.mark.parametrize("text", ["", '{"rule": "trai'])
def test_a_half_written_note_of_snakemake_counts_for_what_is_recorded_alone(tmp_path, text):
    noted(tmp_path, "results/a")
    noted(tmp_path, "results/other")
    (note,) = (tmp_path / ".snakemake/metadata").glob(urlsafe_b64encode(b"results/other").decode())
    note.write_text(text)
    records = job_records(tmp_path)
    assert changed_files(tmp_path, [], {"results/a": records["results/a"]}) is None
    assert changed_files(tmp_path, [], records) == "what Snakemake noted about results/other is half-written"


def test_a_job_is_another_when_its_params_inputs_or_own_files_are(tmp_path):
    record = noted(tmp_path, "results/a", input_checksums={"data/x": "1", "results/y": "1"})
    same = {**record, "endtime": 5, "input_checksums": {"data/x": "1", "results/y": "2"}}
    assert job_hash(same) == job_hash(record)
    for other in ({"params": ["2"]}, {"input": ["b"]}, {"input_checksums": {"data/x": "2"}}):
        assert job_hash({**record, **other}) != job_hash(record)


def test_a_long_name_of_a_record_is_read_over_its_folders(tmp_path):
    path = f"results/{'x' * 200}/a"
    record = noted(tmp_path, "results/a")
    name = urlsafe_b64encode(path.encode()).decode()
    cut = tmp_path / ".snakemake/metadata" / f"@{name[:100]}" / name[100:]
    cut.parent.mkdir()
    cut.write_text(json.dumps(record))
    assert path in job_records(tmp_path)


def test_a_lock_of_another_record_is_refused():
    outs = {"results/runs": Out("1.dir", True)}
    assert not_recorded(outs, {"outs": {"results/runs": "1.dir"}}) is None
    assert "are not of one record" in not_recorded(outs, {"outs": {"results/runs": "2.dir"}})
    assert "nothing is recorded" in not_recorded({}, {})


def test_a_dirty_tree_is_refused_with_a_file():
    assert dirty("") is None
    assert dirty("M config/config.yaml\n M x").startswith("config/config.yaml differs from the commit")


def test_missing_and_damaged_contents_of_the_cache_are_told_apart(tmp_path):
    good, bad = kept(tmp_path, b"good"), kept(tmp_path, b"bad")
    entries = [{"md5": good, "relpath": "g"}, {"md5": bad, "relpath": "b"}, {"md5": "0" * 32, "relpath": "m"}]
    outs = {"results/runs": Out(kept(tmp_path, json.dumps(entries).encode()) + ".dir", True)}
    listed = tmp_path / ".dvc/cache/files/md5" / outs["results/runs"].md5[:2] / outs["results/runs"].md5[2:]
    listed.with_suffix("").rename(listed)
    (tmp_path / ".dvc/cache/files/md5" / bad[:2] / bad[2:]).write_bytes(b"worse")
    assert not_in_cache(tmp_path, outs) == {"results/runs/b": "damaged", "results/runs/m": "missing"}
    listed.unlink()
    assert files_of_outs(tmp_path, outs) == {"results/runs": outs["results/runs"].md5}
    assert not_in_cache(tmp_path, outs) == {"results/runs": "missing"}


def test_only_a_file_that_nothing_else_has_would_be_lost(tmp_path):
    folder = tmp_path / "results/runs/r"
    (folder / "merged").mkdir(parents=True)
    (folder / "merged/model").write_text("not the default's")
    others = ["results/runs/r/merged"]
    (folder / "old").write_text("recorded before")
    kept(tmp_path, b"recorded before")
    assert lost(tmp_path, ["results/runs", "results/none"], {}, others) is None
    (folder / "new").write_text("not recorded")
    assert lost(tmp_path, ["results/runs"], {}, others).startswith(
        "results/runs/r/new would be lost, it is not recorded"
    )
    assert lost(tmp_path, ["results/runs"], {"results/runs/r/new": md5_of(folder / "new")}, others) is None


def test_the_first_file_with_other_bytes_is_named(tmp_path):
    (tmp_path / "a").write_text("a")
    right = md5_of(tmp_path / "a")
    assert other_bytes(tmp_path, {"a": right}) is None
    assert other_bytes(tmp_path, {"a": "00"}).startswith("a is not the file that dvc.lock has")
    assert other_bytes(tmp_path, {"a": right, "b": right}).startswith("b is missing")
